"""What the harness costs: a step through Lightning against the same step in a bare PyTorch loop.

And how much of a step waits for its batch.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
import torch.nn.functional as F

from seqbench.models.build import build_model, parameter_groups
from seqbench.suite.bench.result import GateClosed
from seqbench.suite.configuration import prepared_task
from seqbench.suite.environment import keep_freed_memory
from seqbench.suite.experiment import Cell, TrainConfig
from seqbench.suite.schedule import learning_rate
from seqbench.suite.training import CellModule, fit
from seqbench.tasks.base import IGNORE, Task

ENDLESS = 10**6  # steps: no validation and no forced end of a stage falls into what is timed


@dataclass(frozen=True, kw_only=True)
class Overhead:
    """Median seconds of a step, bare and through the harness; the harness's start, its waits."""

    cell: str
    stage: int | None  # of the curriculum, whose batches are smaller; None: the task itself
    bare_seconds: float
    harness_seconds: float
    setup_seconds: float  # once a cell: the trainer made, the optimizer handed over
    waiting_seconds: float  # of a harness step, for its batch

    @property
    def fraction(self) -> float:
        """The harness's extra time a step as a fraction of the bare step."""
        return self.harness_seconds / self.bare_seconds - 1

    @property
    def idle(self) -> float:
        """The fraction of a step that waits for the batch."""
        return self.waiting_seconds / self.harness_seconds


def measure_overhead(cell: Cell, *, steps: int = 20, rounds: int = 7) -> list[Overhead]:
    """Times both loops in turn, `rounds` times each, on the cell's own model and batches.

    Both make their batches, set the rate, clip and step; the harness does its bookkeeping too.
    Validation is left out of both: it is work asked for, not overhead. A cell with a curriculum is
    timed at its first stage and at the task itself. Raises GateClosed unless both loops give the
    same losses.
    """
    task = prepared_task(cell.task, cell.task_config)
    keep_freed_memory()  # as in every worker
    stages = (0, None) if cell.train.curriculum and task.num_stages else (None,)
    return [_measure(cell, task, stage, steps, rounds) for stage in stages]


@dataclass(frozen=True)
class _Timed:
    steps: list[float]  # seconds
    setup: float
    losses: list[float]
    waited: float = 0.0  # seconds a step


def _measure(cell: Cell, task: Task, stage: int | None, steps: int, rounds: int) -> Overhead:
    train = replace(
        cell.train,
        steps=ENDLESS,
        eval_every=ENDLESS,
        curriculum=stage is not None,
        curriculum_pass=1.0,
    )
    quiet = replace(cell, train=train)
    _check(_bare(quiet, task, stage, steps), _harness(quiet, task, stage, steps), cell.label)
    bare, harness, setups, waits = list[float](), list[float](), list[float](), list[float]()
    for _ in range(rounds):
        bare += _bare(quiet, task, stage, steps).steps
        timed = _harness(quiet, task, stage, steps)
        harness += timed.steps
        setups.append(timed.setup)
        waits.append(timed.waited)
    return Overhead(
        cell=cell.label,
        stage=stage,
        bare_seconds=statistics.median(bare),
        harness_seconds=statistics.median(harness),
        setup_seconds=statistics.median(setups),
        waiting_seconds=statistics.median(waits),
    )


def _check(bare: _Timed, harness: _Timed, label: str) -> None:
    """The gate, which warms kernels, allocator and imports too."""
    ours, theirs = torch.tensor(harness.losses), torch.tensor(bare.losses)
    if not torch.allclose(ours, theirs, rtol=1e-3, atol=0):
        raise GateClosed(
            f"{label}: the harness's losses are not the bare loop's: {harness.losses[-1]:.6f} and "
            f"{bare.losses[-1]:.6f} after {len(ours)} steps"
        )


def _bare(cell: Cell, task: Task, stage: int | None, steps: int) -> _Timed:
    torch.manual_seed(0)
    train = cell.train
    model = build_model(cell.model, vocab_size=task.vocab_size, **cell.model_config)
    optimizer = _optimizer(model, train)
    losses, ends = [], [time.perf_counter()]
    for index in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(train, index)
        inputs, targets = task.batch("train", index, train.batch_size, seed=cell.seed, stage=stage)
        loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), ignore_index=IGNORE)
        optimizer.zero_grad()
        loss.backward()
        if train.clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), train.clip)
        optimizer.step()
        losses.append(loss.item())
        ends.append(time.perf_counter())
    return _Timed(_differences(ends), 0.0, losses)


def _optimizer(model: torch.nn.Module, train: TrainConfig) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        parameter_groups(model, train.weight_decay),
        lr=train.lr,
        betas=(train.beta1, train.beta2),
        eps=train.eps,
        fused=True,
    )


def _harness(cell: Cell, task: Task, stage: int | None, steps: int) -> _Timed:
    torch.manual_seed(0)
    model = build_model(cell.model, vocab_size=task.vocab_size, **cell.model_config)
    module = CellModule(cell, task, model, lambda event: None)
    losses, ends = [], [time.perf_counter()]

    def stamp(validated: bool) -> None:
        losses.append(module.loss.item())
        ends.append(time.perf_counter())

    module.after_step = stamp
    fit(module, range(steps), torch.device("cpu"))
    times = _differences(ends)
    return _Timed(
        times[1:], times[0] - statistics.median(times), losses, module.feed.waited / steps
    )


def _differences(ends: list[float]) -> list[float]:
    return [after - before for before, after in pairwise(ends)]
