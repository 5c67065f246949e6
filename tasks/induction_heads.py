"""Induction heads: what followed the special token before follows it again (Gu & Dao 2023, 4.1.2).

The idea is Olsson et al. 2022's; the setting is the paper's Table 2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np
import torch

from seqbench.tasks.base import IGNORE, Batch, Scale, Split, Task, TaskError
from seqbench.tasks.streams import drawn_for_split, generator

SHORTEST = 4  # special, answer, one more, special
SHORTEST_STAGE = 8  # of the curriculum


@dataclass(frozen=True, kw_only=True)
class InductionHeadsConfig:
    """Sizes of the task; the paper trains at 256 with a vocabulary of 16."""

    length: int = 256
    vocab_size: int = 16  # with the special token, which is vocab_size - 1
    score_all: bool = False  # score the next token everywhere, not the answer alone
    test_lengths: tuple[int, ...] = ()  # longer or shorter sequences to test at
    eval_sequences: int = 2048  # of validation and of test
    data_seed: int = 0


class InductionHeads(Task):
    """Say what followed the special token, when it comes again at the end.

    The special token stands at one random place of a random sequence and again at its end; the
    token after its first place is the answer. Fresh sequences at every step.

        Inputs   4 9 15 3 7 7 1 15      (special 15)
        Targets  - -  - - - - -  3      (- is not scored; with score_all: the next token)

    The curriculum doubles the length from 8. Guessing scores 1 / (vocab_size - 1).
    """

    Config = InductionHeadsConfig
    config: InductionHeadsConfig
    headline = "accuracy"
    difficulty = ("length", "vocab_size")
    scales: ClassVar[Mapping[str, Scale]] = {
        "cpu": Scale(
            note="cpu scale: the paper's length 256 and vocabulary 16, reached by a curriculum "
            "over length in at most 1,500 steps; not the paper's setting.",
            task={"length": 256, "test_lengths": [64, 128, 512, 1024, 2048, 4096]},
            model={"d_model": 64, "num_layers": 2},
            train={
                "steps": 1500,
                "batch_size": 32,
                "lr": 3e-3,
                "eval_every": 100,
                "curriculum": True,
                "stop_at": 0.999,
            },
        ),
        "paper": Scale(
            note="paper scale: trained at 256 without a curriculum, tested at 2^6 to 2^20.",
            task={"length": 256, "test_lengths": [2**k for k in range(6, 21) if k != 8]},
            model={"d_model": 64, "num_layers": 2},
            train={
                "steps": 204_800,
                "batch_size": 8,
                "lr": 1e-3,
                "schedule": "constant",
                "warmup_steps": 0,
                "eval_every": 8192,
                "clip": 0.0,
            },
        ),
    }

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    def prepare(self) -> None:
        c = self.config
        if c.vocab_size < 3:
            raise TaskError(
                f"task.vocab_size={c.vocab_size}: induction-heads needs the special token and at "
                "least two others: 3 or more"
            )
        for key, length in [("length", c.length), *(("test_lengths", n) for n in c.test_lengths)]:
            if length < SHORTEST:
                raise TaskError(f"task.{key}={length}: induction-heads needs at least {SHORTEST}")
        if c.eval_sequences < 1:
            raise TaskError(f"task.eval_sequences={c.eval_sequences}: must be at least 1")

    def fingerprint(self) -> str:
        return "induction-heads/generator-1"

    @property
    def num_stages(self) -> int:
        return len(self._stages())

    def batch(
        self, split: Split, index: int, batch_size: int, *, seed: int = 0, stage: int | None = None
    ) -> Batch:
        c = self.config
        length = c.length if stage is None else self._stages()[stage]
        special = c.vocab_size - 1
        stream = seed if split == "train" else "fixed"
        rng = generator(self.fingerprint(), c.data_seed, split, stream, index, length)

        def draw(rows: int) -> np.ndarray:
            tokens = rng.integers(0, special, (rows, length), dtype=np.int64)
            place = rng.integers(0, length - 2, (rows, 1))
            np.put_along_axis(tokens, place, special, axis=1)
            tokens[:, -1] = special
            return tokens

        inputs = drawn_for_split(split, draw, batch_size)
        answer = inputs[np.arange(batch_size), (inputs == special).argmax(1) + 1]
        targets = np.full_like(inputs, IGNORE)
        if c.score_all:
            targets[:, :-1] = inputs[:, 1:]
        targets[:, -1] = answer
        return Batch(torch.from_numpy(inputs), torch.from_numpy(targets))

    def num_batches(self, split: Split, batch_size: int) -> int | None:
        return None if split == "train" else -(-self.config.eval_sequences // batch_size)

    def chance(self) -> float:
        return 1 / (self.config.vocab_size - 1)

    def baselines(self) -> dict[str, float]:
        """What answering with the sequence's most frequent token scores on test."""
        inputs, targets = self.batch("test", 0, min(512, self.config.eval_sequences))
        guesses = [np.bincount(row[row != self.vocab_size - 1]).argmax() for row in inputs.numpy()]
        return {"most frequent token": float(np.mean(targets[:, -1].numpy() == guesses))}

    def test_variants(self) -> dict[str, Self]:
        return {
            f"length={n}": self.with_config(length=n, test_lengths=())
            for n in self.config.test_lengths
        }

    def _stages(self) -> list[int]:
        """Lengths of the curriculum, all shorter than the task's."""
        stages, length = [], SHORTEST_STAGE
        while length < self.config.length:
            stages.append(length)
            length *= 2
        return stages
