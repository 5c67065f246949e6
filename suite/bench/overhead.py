"""What the harness costs: a step through Lightning against the same step in a bare PyTorch loop.

And how much of a step waits for its batch.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from seqbench.models.build import build_model, parameter_groups
from seqbench.suite.configuration import prepared_task
from seqbench.suite.experiment import Cell
from seqbench.suite.training import CellModule, fit
from seqbench.tasks.base import IGNORE, Task


@dataclass(frozen=True, kw_only=True)
class Overhead:
    """Median seconds of a step, bare and through the harness, and of its wait for the batch."""

    cell: str
    bare_seconds: float
    harness_seconds: float
    waiting_seconds: float  # within those of the harness

    @property
    def fraction(self) -> float:
        """The harness's extra time as a fraction of the bare step."""
        return self.harness_seconds / self.bare_seconds - 1

    @property
    def idle(self) -> float:
        """The fraction of a step that waits for the batch."""
        return self.waiting_seconds / self.harness_seconds


def measure_overhead(cell: Cell, *, steps: int = 20, rounds: int = 5) -> Overhead:
    """Times both loops in turn, `rounds` times each, on the cell's own model and batches.

    Both make their batches, clip and step; the harness does its bookkeeping too. Validation is left
    out of both: it is work asked for, not overhead.
    """
    task = prepared_task(cell.task, cell.task_config)
    quiet = replace(
        cell, train=replace(cell.train, steps=10**6, eval_every=10**6, curriculum=False)
    )
    _bare(quiet, task, steps)  # warms the kernels, the allocator and the imports
    _harness(quiet, task, 2)
    bare, harness, waiting = [], [], []
    for _ in range(rounds):
        bare.append(_bare(quiet, task, steps))
        seconds, waited = _harness(quiet, task, steps)
        harness.append(seconds)
        waiting.append(waited)
    return Overhead(
        cell=cell.label,
        bare_seconds=statistics.median(bare) / steps,
        harness_seconds=statistics.median(harness) / steps,
        waiting_seconds=statistics.median(waiting) / steps,
    )


def _bare(cell: Cell, task: Task, steps: int) -> float:
    torch.manual_seed(0)
    train = cell.train
    model = build_model(cell.model, vocab_size=task.vocab_size, **cell.model_config)
    groups = parameter_groups(model, train.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=train.lr, fused=True)
    began = time.perf_counter()
    for index in range(steps):
        inputs, targets = task.batch("train", index, train.batch_size, seed=cell.seed)
        loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), ignore_index=IGNORE)
        optimizer.zero_grad()
        loss.backward()
        if train.clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), train.clip)
        optimizer.step()
    return time.perf_counter() - began


def _harness(cell: Cell, task: Task, steps: int) -> tuple[float, float]:
    """Seconds of the steps, and those of them that waited for batches."""
    torch.manual_seed(0)
    model = build_model(cell.model, vocab_size=task.vocab_size, **cell.model_config)
    module = CellModule(cell, task, model, lambda event: None)
    began = time.perf_counter()
    fit(module, range(steps), torch.device("cpu"))
    return time.perf_counter() - began, module.feed.waited
