"""Induction heads: what followed the special token before follows it again (Gu & Dao 2023, 4.1.2).

The idea is Olsson et al. 2022's; the setting is the paper's Table 2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from seqbench.tasks.base import IGNORE, Batch, Scale, Split, TaskError
from seqbench.tasks.generated import GeneratedTask, Size
from seqbench.tasks.streams import FEWEST_SEQUENCES

SHORTEST = 4  # special, answer, one more, special
SHORTEST_STAGE = 8  # of the derived curriculum
BASELINE_SEQUENCES = 512


@dataclass(frozen=True, kw_only=True)
class InductionHeadsConfig:
    """Sizes of the task; the paper trains at 256 with a vocabulary of 16."""

    length: int = 256  # of the whole input, with both special tokens
    vocab_size: int = 16  # with the special token, which is vocab_size - 1
    score_all: bool = False  # train on every next token, not on the answer alone
    stages: tuple[int, ...] | None = None  # lengths of the curriculum; None: doubling from 8
    mix: float = 0.0  # fraction of train batches that replay a stage already passed
    test_lengths: tuple[int, ...] = ()  # longer or shorter sequences to test at
    eval_sequences: int = 2048  # of validation and of test
    data_seed: int = 0  # moves all three splits


class InductionHeads(GeneratedTask):
    """Say what followed the special token, when it comes again at the end.

    The special token stands at one random place of a random sequence and again at its end; the
    token after its first place is the answer. Fresh sequences at every step.

        Inputs   4 9 15 3 7 7 1 15      (special 15)
        Targets  - -  - - - - -  3      (- is not scored)
        or       9 15 3 7 7 1 15 3      (score_all, in training; tests always score the answer)

    The vocabulary counts the special token, so guessing scores 1 / (vocab_size - 1).
    """

    generator = "induction-heads, generator 2"
    Config = InductionHeadsConfig
    config: InductionHeadsConfig
    headline = "accuracy"
    difficulty = ("length", "vocab_size")
    scales: ClassVar[Mapping[str, Scale]] = {
        "cpu": Scale(
            note="the paper's length 256 and vocabulary 16, reached by a curriculum "
            "over length in few steps; not the paper's setting.",
            task={"length": 256, "test_lengths": (64, 128, 512, 1024, 2048, 4096)},
            model={"d_model": 64, "num_layers": 2},
            train={
                "steps": 1000,
                "batch_size": 16,
                "lr": 3e-3,
                "beta2": 0.95,
                "eval_every": 100,
                "eval_batches": 16,
                "test_batches": 16,
                "curriculum": True,
                "stop_at": 0.99,
                "stop_early": False,  # more steps at the training length lengthen the reach
            },
        ),
        "paper": Scale(
            note="trained at 256 without a curriculum, tested at 2^6 to 2^20.",
            task={"length": 256, "test_lengths": tuple(2**k for k in range(6, 21) if k != 8)},
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

    def prepare(self) -> None:
        if self.vocab_size < 3:
            raise TaskError(
                f"task.vocab_size={self.vocab_size}: induction-heads needs the special token and "
                "at least two others: give 3 or more"
            )
        super().prepare()

    def size_at(self, length: int) -> Size:
        return (length,)

    def draw(self, rng: np.random.Generator, rows: int, size: Size) -> np.ndarray:
        (length,) = size
        special = self.vocab_size - 1
        small = np.uint8 if special < 256 else np.uint32  # a million tokens long is in use
        tokens = rng.integers(0, special, (rows, length), dtype=small)
        place = rng.integers(0, length - 2, rows, dtype=np.int64)
        tokens[np.arange(rows), place] = special
        tokens[:, -1] = special
        return tokens

    def arrange(self, drawn: np.ndarray, size: Size, split: Split) -> Batch:
        inputs = drawn.astype(np.int64)
        targets = np.full_like(inputs, IGNORE)
        if self.config.score_all and split == "train":
            targets[:, :-1] = inputs[:, 1:]
        answer = (drawn == self.vocab_size - 1).argmax(axis=1) + 1
        targets[:, -1] = inputs[np.arange(len(drawn)), answer]
        return Batch(torch.from_numpy(inputs), torch.from_numpy(targets))

    def chance(self) -> float:
        return 1 / (self.config.vocab_size - 1)

    def baselines(self) -> dict[str, float]:
        """What answering with the sequence's most frequent ordinary token scores on test."""
        inputs, targets = self.batch("test", 0, BASELINE_SEQUENCES)
        ordinary = self.vocab_size - 1
        guesses = [
            np.bincount(row, minlength=self.vocab_size)[:ordinary].argmax()
            for row in inputs.numpy()
        ]
        return {"most frequent token": float(np.mean(targets[:, -1].numpy() == guesses))}

    def oracle(self, inputs: torch.Tensor) -> torch.Tensor | None:
        """What followed the first special token; none with score_all, whose tokens are random."""
        if self.config.score_all:
            return None
        first = (inputs == self.config.vocab_size - 1).long().argmax(1, keepdim=True)
        after = (first + 1).clamp(max=inputs.shape[1] - 1)
        return inputs.gather(1, after).expand_as(inputs)

    def derived_stages(self) -> tuple[Size, ...]:
        doubling, length = [], SHORTEST_STAGE
        while length < self.config.length:
            if self._distinct(length) >= FEWEST_SEQUENCES:
                doubling.append((length,))
            length *= 2
        return tuple(doubling)

    def check_size(self, key: str, size: Size) -> None:
        (length,) = size
        if length < SHORTEST or self._distinct(length) < FEWEST_SEQUENCES:
            raise TaskError(
                f"task.{key}: length {length} with task.vocab_size={self.vocab_size}: "
                f"induction-heads needs length {SHORTEST} or more and {FEWEST_SEQUENCES} distinct "
                "sequences for its three splits; raise length or vocab_size"
            )

    def _distinct(self, length: int) -> int:
        return (length - 2) * (self.vocab_size - 1) ** min(length - 2, 64)
