"""Parity: say after every bit whether the ones so far are even or odd in number."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from seqbench.tasks.base import Batch, Scale, Split, Task, TaskError
from seqbench.tasks.streams import digest, fixed_rows, fresh_rows

GENERATOR = "parity, generator 1"


@dataclass(frozen=True, kw_only=True)
class ParityConfig:
    """Sizes of the task."""

    length: int = 32
    ones: float = 0.5  # their share
    eval_sequences: int = 512


class Parity(Task):
    """Say after every bit whether the ones so far are even (0) or odd (1) in number.

    Inputs   0 1 1 0 1 0
    Targets  0 1 0 0 1 1      (every position is scored)
    """

    Config = ParityConfig
    config: ParityConfig
    headline = "accuracy"
    difficulty = ("length",)
    scales: ClassVar[Mapping[str, Scale]] = {
        "cpu": Scale(
            note="length 32, a few hundred steps.",
            model={"d_model": 32, "num_layers": 2},
            train={"steps": 500, "batch_size": 32, "lr": 3e-3, "eval_every": 50, "stop_at": 0.99},
        ),
    }

    @property
    def vocab_size(self) -> int:
        return 2

    def prepare(self) -> None:
        c = self.config
        if c.length < 20:
            raise TaskError(f"task.length={c.length}: too few distinct sequences: give 20 or more")
        if not 0.1 <= c.ones <= 0.9:
            raise TaskError(f"task.ones={c.ones}: give 0.1 to 0.9")
        if c.eval_sequences < 1:
            raise TaskError(f"task.eval_sequences={c.eval_sequences}: give at least 1")

    def fingerprint(self) -> str:
        return digest(GENERATOR)

    def batch(
        self, split: Split, index: int, batch_size: int, *, seed: int = 0, stage: int | None = None
    ) -> Batch:
        c = self.config

        def draw(rng: np.random.Generator, rows: int) -> np.ndarray:
            return (rng.random((rows, c.length)) < c.ones).astype(np.int64)

        purpose = (GENERATOR, c.length, c.ones)
        if split == "train":
            inputs = fresh_rows(split, batch_size, draw, *purpose, seed, index)
        else:
            first = index * batch_size
            inputs = fixed_rows(
                split, first, min(batch_size, c.eval_sequences - first), draw, *purpose
            )
        inputs_BL = torch.from_numpy(inputs)
        return Batch(inputs_BL, self.oracle(inputs_BL))

    def num_batches(self, split: Split, batch_size: int) -> int | None:
        return None if split == "train" else -(-self.config.eval_sequences // batch_size)

    def chance(self) -> float:
        return 0.5

    def oracle(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs.cumsum(1) % 2
