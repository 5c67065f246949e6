"""The DNA grids: what they hold constant, and that every cell resolves on packaged data."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from seqbench.models.build import build_model
from seqbench.suite.configuration import resolve
from seqbench.suite.discovery import grid_module
from seqbench.suite.experiment import Cell

# What a paper-scale cell would fetch.
PACKAGED: list[tuple[str, Any]] = [
    ("task.dataset", "chr20-slice"),
    ("task.bed", None),
    ("task.sampling", "anywhere"),
]
SHORT: list[tuple[str, Any]] = [("task.length", 1024), ("task.warmup_from", None)]


def cells(grid: str, scale: str, *changes: tuple[str, Any]) -> list[Cell]:
    return [resolve(request, 0, changes) for request in grid_module(grid).requests(scale)]


def size(cell: Cell) -> int:
    config: dict[str, Any] = dict(cell.model_config)
    number: int = build_model(cell.model, vocab_size=5, **config).num_parameters
    return number


def test_models_of_a_size_are_equal_in_size_and_budget() -> None:
    found = cells("dna-size", "cpu")
    assert [c.model for c in found[:3]] == ["mamba", "hyena", "transformer++"]
    for first in range(0, len(found), 3):
        sizes = [size(cell) for cell in found[first : first + 3]]
        assert max(sizes) < 1.06 * min(sizes)
    assert len({(c.train.steps, c.train.batch_size, repr(c.task_config)) for c in found}) == 1
    assert len(grid_module("dna-size").SEEDS) >= 2


def test_the_papers_sizes_are_its_own() -> None:
    found = cells("dna-size", "paper", *PACKAGED)
    ours: dict[str, list[int]] = {cell.model: [] for cell in found[:3]}
    for cell in found:
        assert cell.train.batch_size * cell.task_config["length"] == 2**20
        ours[cell.model].append(size(cell) if cell.model_config["d_model"] <= 128 else 0)
    theirs = {
        line.beside: line.points for line in grid_module("dna-size").figures("paper")[0].paper
    }
    for model, sizes in ours.items():
        for number, (parameters, _) in zip(sizes[:3], theirs[model], strict=False):
            assert number == pytest.approx(parameters, rel=0.1), model


@pytest.mark.parametrize("scale", ["cpu", "paper"])
def test_every_length_has_as_many_tokens_a_step(scale: str) -> None:
    requests = grid_module("dna-length").requests(scale)
    lengths = [r.settings["task.length"] for r in requests]
    assert min(lengths) == 2**10 and max(lengths) >= 2**16
    tokens = {r.settings["task.length"] * r.settings["train.batch_size"] for r in requests}
    assert len(tokens) == 1 and len({r.settings["train.steps"] for r in requests}) == 1
    for request in requests:
        longer = request.settings["task.length"] > 2**10
        assert (request.settings.get("task.warmup_from") == 2**10) == longer
        assert request.settings.get("train.curriculum", False) == longer
        until = request.settings.get("train.curriculum_until", 0.1)
        assert 0 < until < 0.6
    if scale == "paper":  # 2126 steps at 2^18, 4253 at 2^19 and 8 x 532 before them
        assert until == pytest.approx(10_632 / 20_000, abs=1e-3)
        cells("dna-length", "paper", *PACKAGED, *SHORT, ("train.curriculum", False))
    else:
        cells("dna-length", "cpu")


def test_species_are_fine_tuned_from_the_cell_of_their_length() -> None:
    found = cells("species", "cpu")
    sources = {c.task_config["length"]: c for c in found if c.task == "dna"}
    assert {c.digest for c in sources.values()} <= {c.digest for c in cells("dna-length", "cpu")}
    tuned = [c for c in found if c.train.init_from is not None]
    scratch = [c for c in found if c.task == "species" and c not in tuned]
    assert len(tuned) == len(scratch) == len(sources)
    for cell, plain in zip(tuned, scratch, strict=True):
        source = sources[cell.task_config["length"]]
        assert cell.begins_from(source) and cell.model_config == source.model_config
        assert replace(cell, train=replace(cell.train, init_from=None)) == plain
    for request in grid_module("species").requests("paper"):
        assert request.init_from in grid_module("dna-length").requests("paper")
        assert request.settings["task.length"] == request.init_from.settings["task.length"]


@pytest.mark.parametrize("grid", ["dna-size", "dna-length"])
@pytest.mark.parametrize("scale", ["cpu", "paper"])
def test_every_point_of_a_figure_is_a_cell_of_the_grid(grid: str, scale: str) -> None:
    module = grid_module(grid)
    asked = module.requests(scale)
    for figure in module.figures(scale):
        drawn = [request for line in figure.lines for request in line.requests]
        assert len(drawn) == len(asked) and all(request in asked for request in drawn)
        assert figure.metric == "perplexity" and figure.paper
        assert {line.beside for line in figure.paper} - {""} <= {line.name for line in figure.lines}
    assert "Cost:" in module.__doc__ and "Expected:" in module.__doc__


@pytest.mark.parametrize("scale", ["cpu", "paper"])
def test_all_of_chromosome_20_is_trained_on_and_tested(scale: str) -> None:
    (cell,) = cells("dna-chr20", scale, *PACKAGED)
    train, length = cell.train, cell.task_config["length"]
    # A tenth of it is test.
    assert train.test_batches * train.batch_size * length > 6_302_552
    rows = grid_module("dna-chr20").expected(scale)
    assert [row.name for row in rows] == [f"mamba below order-{k}" for k in range(1, 9)]
    assert all(row.request in grid_module("dna-chr20").requests(scale) for row in rows)
