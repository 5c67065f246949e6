"""Learning-rate schedules: pure functions of the step, without a state to resume."""

from __future__ import annotations

import math

from seqbench.suite.experiment import TrainConfig


def learning_rate(train: TrainConfig, step: int) -> float:
    """The rate of step `step`, from 0: linear warm-up, then constant or cosine to min_lr."""
    if step < train.warmup_steps:
        return train.lr * (step + 1) / train.warmup_steps
    if train.schedule == "constant":
        return train.lr
    progress = (step - train.warmup_steps) / max(1, train.steps - train.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return train.min_lr + (train.lr - train.min_lr) * cosine
