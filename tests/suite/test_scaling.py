"""The scaling grid: sizes and tokens match, the paper's rows are Table 12's, figures fit and draw."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from seqbench.models.build import build_model
from seqbench.suite.configuration import resolve
from seqbench.suite.discovery import grid_requests
from seqbench.suite.expectation import declare
from seqbench.suite.experiment import Cell
from seqbench.suite.grids import scaling
from seqbench.suite.records import Cost, CurvePoint, Record, write
from seqbench.suite.report import write_report
from seqbench.suite.report.figures import figures


def cells() -> list[Cell]:
    return [resolve(request, 0) for request in scaling.requests("cpu")]


def parameters(cell: Cell) -> int:
    return build_model(cell.model, vocab_size=256, **cell.model_config).num_parameters


def test_models_of_a_size_match_in_parameters_and_tokens() -> None:
    found = cells()
    assert len(found) == 12 and len(found) * len(scaling.SEEDS) == 24
    for i, (size, _) in enumerate(scaling.SIZES):
        same = found[3 * i : 3 * i + 3]
        assert [cell.model for cell in same] == ["mamba", "transformer++", "hyena"]
        assert all(abs(parameters(cell) - size) < 0.15 * size for cell in same)
        budgets = {(c.train.steps, c.train.batch_size, c.task_config["length"]) for c in same}
        ((steps, batch, length),) = budgets
        assert steps * batch * length == pytest.approx(20 * size, rel=0.01)
    assert {cell.train.recipe for cell in found} == {"improved"}


def test_the_papers_rows_are_table_12s() -> None:
    _, asked = grid_requests("scaling", "paper")
    assert len(asked) == 2 * 4 * 5
    by_hand = {
        (r.model, r.settings["task.length"], r.settings["model.d_model"]): r.settings for r in asked
    }
    mamba = by_hand["mamba", 2048, 768]
    assert (mamba["model.num_layers"], mamba["train.steps"]) == (24, 4800)
    assert mamba["train.lr"] == pytest.approx(3e-3) and mamba["train.min_lr"] == 1e-5
    long = by_hand["transformer", 8192, 2048]
    assert (long["model.num_layers"], long["model.num_heads"], long["train.steps"]) == (
        24,
        32,
        50_000,
    )
    assert long["train.lr"] == pytest.approx(2e-4) and long["train.recipe"] == "gpt3"
    for (_, length, _), settings in by_hand.items():
        assert settings["train.batch_size"] * length == 2**19
        assert settings["task.tokenizer"] == "gpt2"
    assert by_hand["hyena", 2048, 768]["model.num_layers"] == 18


def test_a_row_of_the_paper_resolves_once_it_has_a_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Many words of a text. " * 9000)
    (_, *_), (request, *_) = grid_requests("scaling", "paper")
    cell = resolve(request, 0, [("task.path", str(tmp_path / "a.txt"))])
    assert cell.train.recipe == "improved" and cell.train.lr == 3e-3 and cell.train.beta2 == 0.95


def _record(cell: Cell, exponent: float, noise: float) -> Record:
    flops = 6 * parameters(cell)
    tokens = cell.train.steps * cell.train.batch_size * 256
    score = 30 * (3 * flops * tokens) ** -exponent * (1 + noise)
    metrics = {"bits_per_byte": score, "loss": score, "perplexity": 2**score}
    point = CurvePoint(
        step=1, seconds=1.0, tokens=tokens, lr=0.1, train_loss=1.0, stage=None, validation=metrics
    )
    return Record(
        cell=cell,
        digest=cell.digest,
        status="done",
        headline="bits_per_byte",
        higher_is_better=False,
        test=metrics,
        curve=(point,),
        by_position={"0": 3.0, "1": 2.5, "2": 2.0},
        cost=Cost(
            parameters=parameters(cell),
            state_numbers=1,
            flops_per_token=flops,
            tokens_per_second=1.0,
            peak_memory_bytes=1,
            train_seconds=1.0,
            wall_seconds=1.0,
        ),
    )


def test_the_law_is_found_with_its_uncertainty_and_the_paper_stands_apart(tmp_path: Path) -> None:
    exponents = {"mamba": 0.1, "transformer++": 0.08, "hyena": 0.09}
    records = [
        _record(replace(cell, seed=seed), exponents[cell.model], 0.002 * (-1) ** (seed + i))
        for i, cell in enumerate(cells())
        for seed in scaling.SEEDS
    ]
    for record in records:
        write(tmp_path, record)
    declare(tmp_path, "scaling", "cpu")
    drawn = {d.figure.x: d for d in figures(tmp_path, records)}
    for curve in drawn["train_flops"].curves:
        assert len(curve.points) == 4 and curve.law is not None
        assert curve.law.k == pytest.approx(exponents[curve.name], abs=2e-3)
        assert curve.law.half_width is not None and 0 < curve.law.half_width < 3e-3
        assert abs(curve.law.k - exponents[curve.name]) < curve.law.half_width
    theirs = {line.name: line for line in drawn["train_flops"].figure.paper}
    x, perplexity = theirs["Mamba"].points[0]
    assert x == pytest.approx(6 * 125e6 * 4800 * 2**19) and perplexity == 11.60
    assert theirs["Mamba"].beside == "mamba" and theirs["Mamba"].metric == "perplexity"
    paths = write_report(tmp_path, grid="scaling", cells=[r.cell for r in records])
    names = {p.name for p in paths.plots}
    assert {"figure-scaling-cpu.png", "figure-scaling-size-cpu.png"} <= names
    table = (tmp_path / "tables" / "figure-scaling-cpu.md").read_text()
    assert "mamba: 0.100 ± 0.00" in table and "paper: Mamba" in table
