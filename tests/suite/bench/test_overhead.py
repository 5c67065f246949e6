"""The harness's cost: both loops take the same step, and its start is not taken for one."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from seqbench.suite.bench import overhead
from seqbench.suite.bench.result import GateClosed
from seqbench.suite.configuration import prepared_task, resolve
from seqbench.suite.experiment import Cell, Request


def cell() -> Cell:
    settings: dict[str, Any] = {
        "task.length": 64,
        "model.d_model": 16,
        "model.num_layers": 1,
        "train.batch_size": 4,
        "train.curriculum": True,
    }
    return resolve(Request(task="selective-copying", model="s4", settings=settings), 0)


def test_a_curriculum_is_timed_at_its_first_stage_and_at_the_task() -> None:
    first, whole = overhead.measure_overhead(cell(), steps=3, rounds=2)
    assert (first.stage, whole.stage) == (0, None)
    for found in (first, whole):
        assert found.bare_seconds > 0 and found.harness_seconds > 0
        assert found.fraction == pytest.approx(found.harness_seconds / found.bare_seconds - 1)


def test_the_start_of_a_cell_is_not_taken_for_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter((0.0, 10.0, 11.0, 12.0))

    def fit(module: Any, steps: range, device: torch.device) -> None:
        module.loss = torch.tensor(1.0)
        for _ in steps:
            module.after_step(False)

    monkeypatch.setattr(overhead, "fit", fit)
    monkeypatch.setattr(overhead, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    some = cell()
    found = overhead._harness(some, prepared_task(some.task, some.task_config), None, 3)
    assert found.steps == [1.0, 1.0] and found.setup == 9.0


def test_another_step_closes_the_gate() -> None:
    task = prepared_task(cell().task, cell().task_config)
    faster = replace(cell(), train=replace(cell().train, curriculum=False, warmup_steps=1, lr=0.1))
    slower = replace(faster, train=replace(faster.train, lr=0.01))
    bare = overhead._bare(faster, task, None, 3)
    assert overhead._harness(faster, task, None, 3).losses == pytest.approx(bare.losses, rel=1e-4)
    with pytest.raises(GateClosed, match="losses"):
        overhead._check(bare, overhead._harness(slower, task, None, 3), "a cell")
