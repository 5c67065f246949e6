"""Selective copying: recall the data tokens of a noisy sequence in order (Gu & Dao 2023, 4.1).

The task is Jing et al. 2019's denoising task; the setting is the paper's Table 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np
import torch

from seqbench.tasks.base import IGNORE, Batch, Scale, Split, Task, TaskError
from seqbench.tasks.streams import FEWEST_SEQUENCES, digest, fixed_rows, fresh_rows, stage_of

GENERATOR = "selective-copying, generator 2"  # raised when the sequences change
NOISE = 0
SHORTEST_STAGE = 8  # of the derived curriculum
BASELINE_SEQUENCES = 512


@dataclass(frozen=True, kw_only=True)
class SelectiveCopyingConfig:
    """Sizes of the task; the paper's are length 4096, 16 tokens, vocabulary 16."""

    length: int = 4096  # of the whole input: noise and data, then the markers
    num_tokens: int = 16  # data tokens to recall
    vocab_size: int = 16  # noise 0, marker vocab_size - 1, data in between
    # (length, data tokens) of the curriculum, easiest first; None: the length doubles from 8 to the
    # task's, a quarter of it data, up to num_tokens.
    stages: tuple[tuple[int, int], ...] | None = None
    mix: float = 0.0  # fraction of train batches that replay a stage already passed
    test_lengths: tuple[int, ...] = ()  # longer or shorter sequences to test at
    eval_sequences: int = 2048  # of validation and of test
    data_seed: int = 0  # moves all three splits


class SelectiveCopying(Task):
    """Recall the data tokens among the noise, in order.

    Data tokens stand at random places of a body of noise; then come as many markers as there are
    data tokens, and at each marker the next data token is the answer. `length` counts the whole
    input, markers too (the paper's 4096 leaves that open). Fresh sequences at every step; a hash of
    its content gives each sequence to one split, and no other split ever draws it.

        Inputs   0 3 0 0 7 1 0 4 | 15 15 15 15      (noise 0, marker 15)
        Targets  - - - - - - - - |  3  7  1  4      (- is not scored)

    Guessing scores 1 / (vocab_size - 2) of the tokens.
    """

    Config = SelectiveCopyingConfig
    config: SelectiveCopyingConfig
    headline = "accuracy"
    difficulty = ("length", "num_tokens", "vocab_size")
    scales: ClassVar[Mapping[str, Scale]] = {
        "cpu": Scale(
            note="length 64 instead of the paper's 4096, with a curriculum over length "
            "and fewer, larger steps; not the paper's setting.",
            task={"length": 64},
            model={"d_model": 64, "num_layers": 2},
            train={
                "steps": 4500,
                "batch_size": 32,
                "lr": 5e-3,
                "eval_every": 200,
                "curriculum": True,
                "stop_at": 0.98,
            },
        ),
        "paper": Scale(
            note="length 4096, 16 tokens, 400K steps at a constant rate of 1e-4.",
            task={"length": 4096, "num_tokens": 16, "vocab_size": 16},
            model={"d_model": 64, "num_layers": 2},
            train={
                "steps": 400_000,
                "batch_size": 64,
                "lr": 1e-4,
                "schedule": "constant",
                "warmup_steps": 0,
                "eval_every": 1000,
                "stop_at": 0.9999,
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
                f"task.vocab_size={c.vocab_size}: selective-copying needs noise, a marker and at "
                "least one data token: give 3 or more"
            )
        if not 0 <= c.mix <= 1:
            raise TaskError(f"task.mix={c.mix}: a fraction of the batches: give 0 to 1")
        if c.eval_sequences < 1:
            raise TaskError(f"task.eval_sequences={c.eval_sequences}: give at least 1")
        self._check("length", c.length, c.num_tokens)
        for length in c.test_lengths:
            self._check("test_lengths", length, c.num_tokens)
        for length, tokens in c.stages or ():
            self._check("stages", length, tokens)

    def fingerprint(self) -> str:
        return digest(GENERATOR)

    @property
    def num_stages(self) -> int:
        return len(self._stages())

    def batch(
        self, split: Split, index: int, batch_size: int, *, seed: int = 0, stage: int | None = None
    ) -> Batch:
        c = self.config
        stage = stage_of(stage, self.num_stages, c.mix, split, c.data_seed, seed, index)
        length, tokens = (c.length, c.num_tokens) if stage is None else self._stages()[stage]
        body = length - tokens

        def draw(rng: np.random.Generator, rows: int) -> np.ndarray:
            places = _subsets(rng, rows, body, tokens)
            values = rng.integers(1, c.vocab_size - 1, (rows, tokens), dtype=np.int64)
            return np.concatenate([places, values], axis=1)  # all that there is to a sequence

        purpose = (GENERATOR, c.data_seed, c.vocab_size, length, tokens)
        if split == "train":
            drawn = fresh_rows(split, batch_size, draw, *purpose, seed, index)
        else:
            first = index * batch_size
            count = min(batch_size, c.eval_sequences - first)
            drawn = fixed_rows(split, first, count, draw, *purpose)
        places, values = drawn[:, :tokens], drawn[:, tokens:]
        inputs = np.full((len(drawn), length), NOISE, dtype=np.int64)
        np.put_along_axis(inputs, places, values, axis=1)
        inputs[:, body:] = c.vocab_size - 1
        targets = np.full((len(drawn), length), IGNORE, dtype=np.int64)
        targets[:, body:] = values
        return Batch(torch.from_numpy(inputs), torch.from_numpy(targets))

    def num_batches(self, split: Split, batch_size: int) -> int | None:
        return None if split == "train" else -(-self.config.eval_sequences // batch_size)

    def chance(self) -> float:
        return 1 / (self.config.vocab_size - 2)

    def baselines(self) -> dict[str, float]:
        """What answering with the most frequent data token of the sequence scores on test."""
        targets = self.batch("test", 0, BASELINE_SEQUENCES).targets.numpy()
        data = targets[:, -self.config.num_tokens :]
        counts = np.stack([np.bincount(row, minlength=self.vocab_size) for row in data])
        return {"most frequent token": float(counts.max(1).sum() / data.size)}

    def test_variants(self) -> dict[str, Self]:
        return {
            f"length={n}": self.with_config(length=n, test_lengths=())
            for n in self.config.test_lengths
        }

    def oracle(self, inputs: torch.Tensor) -> torch.Tensor:
        """The data tokens of each row one after the other, one at each marker."""
        marker = self.config.vocab_size - 1
        is_marker = inputs == marker
        data_first = torch.argsort(((inputs == NOISE) | is_marker).long(), dim=1, stable=True)
        nth = (is_marker.cumsum(1) - 1).clamp(min=0)
        return inputs.gather(1, data_first.gather(1, nth))

    def _stages(self) -> tuple[tuple[int, int], ...]:
        """(length, data tokens) of the curriculum."""
        c = self.config
        if c.stages is not None:
            return c.stages
        doubling, length = [], SHORTEST_STAGE
        while length < c.length:
            tokens = min(c.num_tokens, length // 4)
            if self._distinct(length, tokens) >= FEWEST_SEQUENCES:
                doubling.append((length, tokens))
            length *= 2
        return tuple(doubling)

    def _distinct(self, length: int, tokens: int) -> int:
        return math.comb(length - tokens, tokens) * (self.config.vocab_size - 2) ** tokens

    def _check(self, key: str, length: int, tokens: int) -> None:
        if tokens < 1 or length < 2 * tokens:
            raise TaskError(
                f"task.{key}: length {length} with {tokens} data tokens: the data and as many "
                f"markers must fit: give at least 1 token and length {2 * max(1, tokens)}"
            )
        if self._distinct(length, tokens) < FEWEST_SEQUENCES:
            raise TaskError(
                f"task.{key}: length {length} with {tokens} data tokens has only "
                f"{self._distinct(length, tokens)} distinct sequences, too few for three splits: "
                f"at least {FEWEST_SEQUENCES} are needed; raise length or vocab_size"
            )


def _subsets(rng: np.random.Generator, rows: int, places: int, size: int) -> np.ndarray:
    """Sorted subsets (rows, size) of range(places), uniform: Floyd's algorithm on all rows."""
    largest = np.arange(places - size, places)
    picked = rng.integers(0, largest + 1, (rows, size), dtype=np.int64)
    for i in range(1, size):
        again = (picked[:, :i] == picked[:, i : i + 1]).any(axis=1)
        picked[again, i] = largest[i]
    picked.sort(axis=1)
    return picked
