"""Selective copying: recall the data tokens of a noisy sequence in order (Gu & Dao 2023, 4.1)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from seqbench.tasks.base import IGNORE, Batch, Scale, Split, Task, TaskError
from seqbench.tasks.streams import drawn_for_split, generator

NOISE = 0
SHORTEST_STAGE = 8  # of the curriculum


@dataclass(frozen=True, kw_only=True)
class SelectiveCopyingConfig:
    """Sizes of the task; the paper's are length 4096, 16 tokens, vocabulary 16."""

    length: int = 4096  # of the whole input: noise and data, then the markers
    num_tokens: int = 16  # data tokens to recall
    vocab_size: int = 16  # noise 0, marker vocab_size - 1, data in between
    eval_sequences: int = 2048  # of validation and of test
    data_seed: int = 0  # of the validation and test sequences, and part of the train stream


class SelectiveCopying(Task):
    """Recall the data tokens among the noise, in order.

    Data tokens stand at random places of a body of noise; then come as many markers as there are
    data tokens, and at each marker the next data token is the answer. `length` counts the whole
    input (the paper's 4096 leaves open whether markers count). Fresh sequences at every step.

        Inputs   0 3 0 0 7 1 0 4 | 15 15 15 15      (noise 0, marker 15)
        Targets  - - - - - - - - |  3  7  1  4      (- is not scored)

    The curriculum doubles the length from 8, with a quarter of it data up to `num_tokens`.
    """

    Config = SelectiveCopyingConfig
    config: SelectiveCopyingConfig
    headline = "accuracy"
    difficulty = ("length", "num_tokens", "vocab_size")
    scales: ClassVar[Mapping[str, Scale]] = {
        "cpu": Scale(
            note="cpu scale: length 128 instead of the paper's 4096, with a curriculum over length "
            "and fewer, larger steps; not the paper's setting.",
            task={"length": 128},
            model={"d_model": 64, "num_layers": 2},
            train={
                "steps": 2400,
                "batch_size": 32,
                "lr": 4e-3,
                "eval_every": 200,
                "curriculum": True,
                "stop_at": 0.99,
            },
        ),
        "paper": Scale(
            note="paper scale: length 4096, 16 tokens, 400K steps at a constant rate of 1e-4.",
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
                "least one data token: 3 or more"
            )
        if c.num_tokens < 1 or c.length < 2 * c.num_tokens:
            raise TaskError(
                f"task.length={c.length} with task.num_tokens={c.num_tokens}: the data tokens and "
                f"as many markers must fit, so length is at least {2 * max(1, c.num_tokens)}"
            )
        if c.eval_sequences < 1:
            raise TaskError(f"task.eval_sequences={c.eval_sequences}: must be at least 1")

    def fingerprint(self) -> str:
        return "selective-copying/generator-1"

    @property
    def num_stages(self) -> int:
        return len(self._stages())

    def batch(
        self, split: Split, index: int, batch_size: int, *, seed: int = 0, stage: int | None = None
    ) -> Batch:
        c = self.config
        length, data = (c.length, c.num_tokens) if stage is None else self._stages()[stage]
        stream = seed if split == "train" else "fixed"
        rng = generator(self.fingerprint(), c.data_seed, split, stream, index, length, data)
        body = length - data

        def draw(rows: int) -> np.ndarray:
            tokens = np.zeros((rows, body), dtype=np.int64)
            places = np.sort(rng.random((rows, body)).argpartition(data - 1, axis=1)[:, :data])
            values = rng.integers(1, c.vocab_size - 1, (rows, data))
            np.put_along_axis(tokens, places, values, axis=1)
            return tokens

        tokens = drawn_for_split(split, draw, batch_size)
        inputs = np.full((batch_size, length), c.vocab_size - 1, dtype=np.int64)
        inputs[:, :body] = tokens
        targets = np.full((batch_size, length), IGNORE, dtype=np.int64)
        targets[:, body:] = tokens[tokens != NOISE].reshape(batch_size, data)
        return Batch(torch.from_numpy(inputs), torch.from_numpy(targets))

    def num_batches(self, split: Split, batch_size: int) -> int | None:
        return None if split == "train" else -(-self.config.eval_sequences // batch_size)

    def chance(self) -> float:
        return 1 / (self.config.vocab_size - 2)

    def baselines(self) -> dict[str, float]:
        """What answering with the most frequent data token of the sequence scores on test."""
        right = scored = 0
        for index in range(8):
            inputs, targets = self.batch("test", index, 64)
            for row, wanted in zip(inputs.numpy(), targets.numpy(), strict=True):
                data = row[(row != NOISE) & (row != self.vocab_size - 1)]
                guess = np.bincount(data).argmax()
                wanted = wanted[wanted != IGNORE]
                right += int((wanted == guess).sum())
                scored += wanted.size
        return {"most frequent token": right / scored}

    def _stages(self) -> list[tuple[int, int]]:
        """(length, data tokens) of the curriculum, all shorter than the task."""
        c, stages, length = self.config, [], SHORTEST_STAGE
        while length < c.length:
            stages.append((length, min(c.num_tokens, length // 4)))
            length *= 2
        return stages
