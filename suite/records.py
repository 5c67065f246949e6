"""Record: one JSON file per finished cell, the only truth of the reports. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from seqbench.suite.experiment import Cell

Status = Literal["done", "diverged", "failed"]


@dataclass(frozen=True, kw_only=True)
class CurvePoint:
    """One validation: where training stood and the metrics (names as in tasks.base.METRICS)."""

    step: int
    seconds: float  # of training so far, evaluation left out
    tokens: int  # seen so far
    lr: float
    train_loss: float  # nats, of the last training batch
    stage: int | None  # of the curriculum; None: the task itself
    validation: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What the cell took."""

    parameters: int
    state_numbers: int  # carried per sequence when decoding, after one training length
    flops_per_token: float  # forward, counted by torch's FlopCounterMode plus the scan's own
    tokens_per_second: float  # training
    peak_memory_bytes: int
    train_seconds: float
    wall_seconds: float  # evaluation included


@dataclass(frozen=True, kw_only=True)
class Record:
    """Everything one finished cell leaves behind."""

    cell: Cell
    digest: str
    status: Status
    error: str | None = None
    headline: str = ""  # the task's headline metric, and below whether higher is better
    higher_is_better: bool = True
    test: Mapping[str, float] = field(default_factory=dict)
    variants: Mapping[str, Mapping[str, float]] = field(
        default_factory=dict
    )  # label -> test metrics
    chance: float | None = None
    baselines: Mapping[str, float] = field(default_factory=dict)
    curve: tuple[CurvePoint, ...] = ()
    steps_done: int = 0
    solved_at: int | None = None  # first validated step at train.stop_at or better
    cost: Cost | None = None
    environment: Mapping[str, Any] = field(default_factory=dict)  # versions, device, backend, ...
