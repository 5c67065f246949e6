"""The grids: every cell resolves, rows of a verdict ask for cells that run, budgets are equal."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from seqbench.suite.configuration import resolve
from seqbench.suite.discovery import grid_module
from seqbench.suite.experiment import Cell

GRIDS = ("table1", "table2", "ablations-synthetic", "length-4096")


def cells(grid: str, scale: str) -> list[Cell]:
    return [resolve(request, 0) for request in grid_module(grid).requests(scale)]


@pytest.mark.parametrize("scale", ["cpu", "paper"])
@pytest.mark.parametrize("grid", GRIDS)
def test_every_expected_row_is_a_cell_of_the_grid(grid: str, scale: str) -> None:
    module = grid_module(grid)
    digests = {cell.digest for cell in cells(grid, scale)}
    for row in module.expected(scale):
        cell = resolve(row.request, 0)
        assert cell.digest in digests
        length = row.variant.removeprefix("length=")
        assert not length or int(length) in cell.task_config["test_lengths"]
    assert len({row.name for row in module.expected(scale)}) == len(module.expected(scale))
    assert "Cost:" in module.__doc__ and "Expected:" in module.__doc__


@pytest.mark.parametrize(
    ("grid", "seeds"), [("table1", 3), ("table2", 3), ("ablations-synthetic", 2)]
)
def test_all_rows_have_one_recipe_and_as_many_seeds(grid: str, seeds: int) -> None:
    found = cells(grid, "cpu")
    # Table 2 gives each model its rate, as the paper does; absolute positions learn by no recipe
    # of the others.
    found = [cell for cell in found if cell.model != "transformer-absolute"]
    assert len({repr(replace(cell.train, lr=1.0)) for cell in found}) == 1
    assert grid == "table2" or len({cell.train.lr for cell in found}) == 1
    assert len({repr(cell.task_config) for cell in found}) == 1
    assert len(grid_module(grid).SEEDS) >= seeds


def test_piano_length_sees_as_many_samples_a_step_at_every_length() -> None:
    module = grid_module("piano-length")
    found = cells("piano-length", "cpu")
    assert {c.task_config["length"] * c.train.batch_size for c in found} == {module.TOKENS["cpu"]}
    assert len({repr(replace(c.train, batch_size=1)) for c in found}) == 1
    assert len(found) * len(module.SEEDS) <= 25
    assert {(c.model, c.model_config["backbone"]) for c in found} == {
        ("mamba", "unet"),
        ("sashimi", "unet"),
    }
    assert {c.model_config["init"] for c in found if c.model == "mamba"} == {"complex"}
    # Table 14 of the paper.
    batches = {
        r.settings["task.length"]: r.settings["train.batch_size"] for r in module.requests("paper")
    }
    assert list(batches.values()) == [128, 64, 32, 16, 8, 4, 2, 1] and 958464 in batches
    drawn, common = module.figures("cpu")
    assert drawn.variant == "" and common.variant == "length=32768"
    theirs = {line.name: line.beside for line in drawn.paper}
    assert set(theirs.values()) == {line.name for line in drawn.lines}


def test_piano_ablation_changes_what_it_says_and_shares_cells() -> None:
    module = grid_module("piano-ablation")
    found = {c.digest: c for c in cells("piano-ablation", "cpu")}
    shared = found.keys() & {c.digest for c in cells("piano-length", "cpu")}
    assert len(found) == 16 and len(shared) == 4
    assert len(found) - len(shared) <= 25 / len(module.SEEDS)

    def of(line: Any) -> dict[str, Any]:
        config: dict[str, Any] = dict(resolve(line.requests[0], 0).model_config)
        return config

    left, right = (figure.lines for figure in module.figures("cpu"))
    selective = [
        tuple(of(line)[f"selective_{name}"] for name in ("dt", "B", "C")) for line in left[1:]
    ]
    assert selective == [(True,) * 3, (True,) * 3, (True, False, False), (False,) * 3]
    assert [of(line)["init"] for line in left[1:]] == ["real", "complex", "complex", "complex"]
    assert all(not of(line)["selective_dt"] for line in right)
    assert [of(line)["center"] for line in right] == ["sashimi", "", "", ""]
    theirs = module.figures("paper")[0].paper
    assert {line.beside for line in theirs} == {line.name for line in left}
    assert module.requests("paper")[2].settings["model.num_layers"] == 8


def test_table_1_has_the_papers_pairs_at_near_equal_size() -> None:
    from seqbench.models.build import build_model

    def size(cell: Cell) -> int:
        config: dict[str, Any] = dict(cell.model_config)
        return build_model(cell.model, vocab_size=16, **config).num_parameters

    found = cells("table1", "cpu")
    assert len(found) == 8 and found[0].task_config["num_tokens"] == 16
    sizes = [size(cell) for cell in found]
    assert max(sizes) < 1.15 * min(sizes)
    assert {cell.model_config["d_model"] for cell in cells("table1", "paper")} == {64}


def test_the_ablations_switch_what_they_say() -> None:
    options = [
        tuple(cell.model_config[f"selective_{name}"] for name in ("dt", "B", "C"))
        for cell in cells("ablations-synthetic", "cpu")[:5]
    ]
    assert options == [
        (False, False, False),
        (False, True, False),
        (False, False, True),
        (True, False, False),
        (True, True, True),
    ]
