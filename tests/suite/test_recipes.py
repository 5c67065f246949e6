"""Recipes: the paper's values, filled where nobody set them, and written out in the cell."""

from __future__ import annotations

from typing import Any

import pytest

from seqbench.models.build import build_model
from seqbench.suite import records
from seqbench.suite.configuration import resolve
from seqbench.suite.experiment import Cell, Request, TrainConfig, UserError
from seqbench.suite.recipes import gpt3_rate
from seqbench.suite.runner import grid_cells


def cell(*assignments: tuple[str, Any], model: str = "mamba", **settings: Any) -> Cell:
    request = Request(
        task="language",
        model=model,
        settings={k.replace("__", "."): v for k, v in settings.items()},
    )
    return resolve(request, 0, assignments)


@pytest.mark.parametrize(
    ("size", "rate"), [(125e6, 6e-4), (350e6, 3e-4), (760e6, 2.5e-4), (1.3e9, 2e-4), (7e9, 2e-4)]
)
def test_rates_are_table_12s(size: float, rate: float) -> None:
    assert gpt3_rate(int(size)) == pytest.approx(rate)


def test_smaller_models_have_higher_rates() -> None:
    sizes = [30_000, 500_000, 10**7, 124_000_000, 126_000_000, 5 * 10**8, 10**9]
    rates = [gpt3_rate(size) for size in sizes]
    assert rates == sorted(rates, reverse=True)
    assert rates[0] < 2e-3


def test_the_improved_recipe_is_five_times_gpt3s_peak_down_to_1e_5() -> None:
    gpt3, improved = (cell(("train.recipe", name)).train for name in ("gpt3", "improved"))
    assert improved.lr == pytest.approx(5 * gpt3.lr, rel=1e-2)
    assert (improved.min_lr, improved.beta1, improved.beta2) == (1e-5, 0.9, 0.95)
    assert gpt3.min_lr == pytest.approx(gpt3.lr / 10) and gpt3.beta2 == 0.999
    for train in (gpt3, improved):
        assert (train.schedule, train.weight_decay, train.clip) == ("cosine", 0.1, 1.0)
        assert train.warmup_steps == train.steps // 10
    assert (gpt3.recipe, improved.recipe) == ("gpt3", "improved")


def test_what_is_set_stands_above_the_recipe() -> None:
    train = cell(
        ("train.recipe", "improved"), ("train.lr", 0.001), train__steps=300, train__clip=0.5
    ).train
    assert (train.lr, train.clip, train.warmup_steps, train.weight_decay) == (0.001, 0.5, 30, 0.1)


def test_a_wrong_recipe_is_one_line() -> None:
    with pytest.raises(UserError, match=r"train\.recipe='best': .*'gpt3' or 'improved'"):
        cell(("train.recipe", "best"))


@pytest.mark.parametrize("name", ["mamba", "h3", "transformer++", "retnet", "gla"])
def test_presets_of_the_improved_recipe_have_rms_norm_and_no_linear_bias(name: str) -> None:
    model = build_model(name, vocab_size=16, d_model=32, num_layers=1)
    biased = [n for n, _ in model.named_parameters() if n.endswith("proj.bias")]
    assert not biased and type(model.final_norm).__name__ == "RMSNorm"


def test_a_late_field_at_its_default_leaves_the_identity_alone() -> None:
    assert '"recipe"' not in cell().canonical()
    assert '"recipe"' in cell(("train.recipe", "gpt3")).canonical()
    assert TrainConfig().recipe is None


def test_published_records_answer_for_the_quickstart_cells() -> None:
    from seqbench.suite.cli import _published

    for one in grid_cells("quickstart", scale="cpu", seeds=None):
        if one.task == "language":
            assert records.load(records.path_of(_published(), one)).digest == one.digest
