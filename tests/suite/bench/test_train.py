"""The training bench: mambapy's model is ours, rates and the crossover follow from the timings."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from seqbench.suite.bench import train
from seqbench.suite.bench.result import GateClosed
from seqbench.suite.bench.timing import Timing

CPU = torch.device("cpu")


def test_a_mambapy_model_with_other_parameters_closes_the_gate() -> None:
    pytest.importorskip("mambapy")
    ours = train._model("mamba", 16, CPU)
    theirs = train.MambapyModel(ours)
    assert train._judge(ours, theirs, CPU) < 1e-4
    with torch.no_grad():
        theirs.blocks.layers[1].mixer.D.mul_(1.1)
    with pytest.raises(GateClosed, match="mambapy's"):
        train._judge(ours, theirs, CPU)


def test_bench_reports_both_comparisons_and_a_profile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mambapy")
    monkeypatch.setattr(train, "TOKENS", 64)
    monkeypatch.setattr(train, "_PROFILED", (2, 64))
    result = train.bench_train(lengths=(16,), range_=(64,), batch=2, threads=1, profile=True)
    assert [row.model for row in result.beside_mambapy] == ["mamba", "mambapy"]
    assert [row.model for row in result.beside_transformer] == ["mamba", "transformer"]
    row = result.beside_mambapy[0]
    assert row.step and row.rate == pytest.approx(32 / row.step.median)
    assert {"matrix products", "scan", "convolution"} < set(result.profile)
    assert sum(result.profile.values()) == pytest.approx(1)
    assert min(result.profile[kind] for kind in ("matrix products", "scan")) > 0.01
    found = json.loads(result.write(tmp_path)[0].read_text())
    assert found["over_mambapy"]["16"] == result.over_mambapy(16)
    assert found["gate"] < 1e-3 and found["crossover"] == result.crossover()
    assert (tmp_path / "train.png").stat().st_size > 10_000
    assert any("more than 10 %" in line for line in result.remarks())


def test_crossover_lies_where_the_lines_meet() -> None:
    def row(model: str, length: int, seconds: float) -> train.Row:
        step = Timing(median=seconds, fastest=seconds, slowest=seconds, samples=1)
        return train.Row(model=model, ours=model == "mamba", batch=1, length=length, step=step)

    rows = [row("mamba", n, 1.0) for n in (64, 256, 1024)]
    rows += [row("transformer", n, n / 512) for n in (64, 256, 1024)]
    bench = train.TrainBench(parameters={}, gate=None, beside_mambapy=[], beside_transformer=rows)
    assert bench.crossover() == pytest.approx(512)
    assert replace(bench, beside_transformer=[*rows[:2], *rows[3:5]]).crossover() is None
    assert replace(bench, beside_transformer=[rows[2], rows[5]]).crossover() == 0
