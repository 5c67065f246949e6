"""new-task: say again what stood a few places before."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from seqbench.tasks.base import IGNORE, Batch, Scale, Split, Task, TaskError
from seqbench.tasks.streams import digest, fixed_rows, fresh_rows

GENERATOR = "new-task, generator 1"  # raise the number when the sequences change


@dataclass(frozen=True, kw_only=True)
class NewTaskConfig:
    """Sizes of the task; every field can be set on the command line, as --set task.delay=8."""

    length: int = 64
    delay: int = 4  # how far back the answer stands
    vocab_size: int = 16
    eval_sequences: int = 512  # of validation and of test
    data_seed: int = 0  # moves all three splits


class NewTask(Task):
    """Say again the token of `delay` places before.

        Inputs   7 2 9 9 1 4      (delay 2)
        Targets  - - 7 2 9 9      (- is not scored)

    Fresh random sequences at every step; a hash of its content gives each to one split.
    """

    Config = NewTaskConfig
    config: NewTaskConfig
    headline = "accuracy"
    difficulty = ("length", "delay", "vocab_size")
    scales: ClassVar[Mapping[str, Scale]] = {
        "cpu": Scale(
            note="length 64, delay 4, a few hundred steps.",
            model={"d_model": 32, "num_layers": 2},
            train={"steps": 300, "batch_size": 32, "lr": 5e-3, "eval_every": 50, "stop_at": 0.99},
        ),
        "paper": Scale(
            note="length 1024, delay 64.",
            task={"length": 1024, "delay": 64},
            model={"d_model": 64, "num_layers": 2},
            train={"steps": 10_000, "batch_size": 32, "lr": 1e-3, "eval_every": 500},
        ),
    }

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    def prepare(self) -> None:
        c = self.config
        if not 1 <= c.delay < c.length:
            raise TaskError(f"task.delay={c.delay}: give 1 to length - 1, {c.length - 1}")
        if c.vocab_size < 2 or c.vocab_size**c.length < 2**16:
            raise TaskError(
                f"task.vocab_size={c.vocab_size}: too few distinct sequences for three splits; "
                "give 2 or more, or raise length"
            )
        if c.eval_sequences < 1:
            raise TaskError(f"task.eval_sequences={c.eval_sequences}: give at least 1")

    def fingerprint(self) -> str:
        return digest(GENERATOR)

    def batch(
        self, split: Split, index: int, batch_size: int, *, seed: int = 0, stage: int | None = None
    ) -> Batch:
        c = self.config

        def draw(rng: np.random.Generator, rows: int) -> np.ndarray:
            return rng.integers(0, c.vocab_size, (rows, c.length), dtype=np.int64)

        purpose = (GENERATOR, c.data_seed, c.vocab_size, c.length)
        if split == "train":
            inputs = fresh_rows(split, batch_size, draw, *purpose, seed, index)
        else:
            first = index * batch_size
            count = min(batch_size, c.eval_sequences - first)
            inputs = fixed_rows(split, first, count, draw, *purpose)
        targets = np.full_like(inputs, IGNORE)
        targets[:, c.delay :] = inputs[:, : -c.delay]
        return Batch(torch.from_numpy(inputs), torch.from_numpy(targets))

    def num_batches(self, split: Split, batch_size: int) -> int | None:
        return None if split == "train" else -(-self.config.eval_sequences // batch_size)

    def chance(self) -> float:
        return 1 / self.config.vocab_size

    def oracle(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs.roll(self.config.delay, dims=1)
