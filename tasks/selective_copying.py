"""Selective copying: recall the data tokens of a noisy sequence in order (Gu & Dao 2023, 4.1).

The task is Jing et al. 2019's denoising task; the setting is the paper's Table 1. MAD (Poli et al.
2024) has it in another form, which people compare with: that is the scale `mad-lab`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch

from seqbench.tasks.base import IGNORE, Batch, Scale, Split, TaskError
from seqbench.tasks.generated import GeneratedTask, Size
from seqbench.tasks.streams import FEWEST_SEQUENCES, subsets

TOKEN_STEPS = 8  # of the derived curriculum
NOISE_AT_FIRST = 8  # noise tokens in its stages, while their data tokens become more
BASELINE_SEQUENCES = 512


@dataclass(frozen=True, kw_only=True)
class SelectiveCopyingConfig:
    """Sizes of the task; the paper's are length 4096, 16 tokens, vocabulary 16."""

    length: int = 4096  # of the whole input: noise and data, then the markers
    num_tokens: int = 16  # data tokens to recall
    vocab_size: int = 16  # with noise and marker
    # markers: noise 0, marker vocab_size - 1, data in between. mad-lab: data from 0, noise
    # vocab_size - 2, and one marker, vocab_size - 1, before as much noise as there are answers.
    form: Literal["markers", "mad-lab"] = "markers"
    train_examples: int | None = None  # of a fixed train set, reshuffled every epoch; None: endless
    # (length, data tokens) of the curriculum, easiest first; None: eight equal steps in the number
    # of data tokens, among eight of noise, then a length that doubles up to the task's.
    stages: tuple[tuple[int, int], ...] | None = None
    mix: float = 0.0  # fraction of train batches that replay a stage already passed
    test_lengths: tuple[int, ...] = ()  # longer or shorter sequences to test at
    eval_sequences: int = 2048  # of validation and of test
    data_seed: int = 0  # moves all three splits


class SelectiveCopying(GeneratedTask):
    """Recall the data tokens among the noise, in order.

    Data tokens stand at random places of a body of noise; then come as many markers as there are
    data tokens, and at each marker the next data token is the answer. `length` counts the whole
    input, markers too (the paper's 4096 leaves that open). Fresh sequences at every step.

        Inputs   0 3 0 0 7 1 0 4 | 15 15 15 15      (noise 0, marker 15)
        Targets  - - - - - - - - |  3  7  1  4      (- is not scored)

    In the form of MAD one marker asks for all, noise stands where the answers go, and none stands
    between the last data token and the marker:

        Inputs   14 3 14 7 1 14 4 | 15 14 14 14 14  (noise 14, marker 15)
        Targets   - -  - - -  - - |  -  3  7  1  4

    Guessing scores 1 / (vocab_size - 2) of the tokens.
    """

    generator = "selective-copying, generator 2"
    Config = SelectiveCopyingConfig
    config: SelectiveCopyingConfig
    headline = "accuracy"
    shows_selection = True
    difficulty = ("length", "num_tokens", "vocab_size")
    scales: ClassVar[Mapping[str, Scale]] = {
        "cpu": Scale(
            note="length 64 instead of the paper's 4096, with a curriculum over tokens and length "
            "and fewer, larger steps; not the paper's setting.",
            task={"length": 64},
            model={"d_model": 64, "num_layers": 2},
            train={
                "steps": 3000,
                "batch_size": 32,
                "lr": 5e-3,
                "beta2": 0.95,  # gradients shrink and change with every stage
                "eval_every": 250,
                "curriculum": True,
                "curriculum_pass": 0.8,
                "curriculum_until": 0.8,
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
        "mad-lab": Scale(
            note="MAD's length 256, 16 tokens and 12,800 fixed training examples (Poli et al. "
            "2024), 200 epochs in its form of the task; not the paper's setting.",
            task={
                "length": 256,
                "form": "mad-lab",
                "train_examples": 12_800,
                "eval_sequences": 1280,
            },
            model={"d_model": 128, "num_layers": 2},
            train={
                "steps": 20_000,
                "batch_size": 128,
                "lr": 5e-4,
                "warmup_steps": 0,
                "min_lr": 1e-6,
                "eval_every": 500,
                "eval_batches": 10,
            },
        ),
    }

    def prepare(self) -> None:
        if self.vocab_size < 3:
            raise TaskError(
                f"task.vocab_size={self.vocab_size}: selective-copying needs noise, a marker and "
                "at least one data token: give 3 or more"
            )
        super().prepare()

    def settings(self) -> tuple[object, ...]:
        return ("mad-lab",) if self._is_mad else ()

    def size_at(self, length: int) -> Size:
        return length, self.config.num_tokens

    def draw(self, rng: np.random.Generator, rows: int, size: Size) -> np.ndarray:
        """The places of the data tokens, then what they are."""
        body, (_, tokens) = self._body(size), size
        if self._is_mad:
            each = rng.multinomial(body - tokens, [1 / tokens] * tokens, rows)
            places = each.cumsum(axis=1) + np.arange(tokens)
        else:
            places = subsets(rng, rows, body, tokens)
        lowest = 0 if self._is_mad else 1
        highest = lowest + self.vocab_size - 2
        values = rng.integers(lowest, highest, (rows, tokens), dtype=np.int64)
        return np.concatenate([places, values], axis=1)

    def arrange(self, drawn: np.ndarray, size: Size, split: Split) -> Batch:
        body, (length, tokens) = self._body(size), size
        marker = self.vocab_size - 1
        places, values = drawn[:, :tokens], drawn[:, tokens:]
        inputs = np.full((len(drawn), length), marker - 1 if self._is_mad else 0, dtype=np.int64)
        np.put_along_axis(inputs, places, values, axis=1)
        inputs[:, body : body + 1 if self._is_mad else length] = marker
        targets = np.full((len(drawn), length), IGNORE, dtype=np.int64)
        targets[:, length - tokens :] = values
        return Batch(torch.from_numpy(inputs), torch.from_numpy(targets))

    def chance(self) -> float:
        return 1 / (self.config.vocab_size - 2)

    def baselines(self) -> dict[str, float]:
        """What answering with the most frequent data token of the sequence scores on test."""
        targets = self.batch("test", 0, BASELINE_SEQUENCES).targets.numpy()
        data = targets[:, -self.config.num_tokens :]
        counts = np.stack([np.bincount(row, minlength=self.vocab_size) for row in data])
        return {"most frequent token": float(counts.max(1).sum() / data.size)}

    def oracle(self, inputs: torch.Tensor) -> torch.Tensor:
        """The data tokens of each row in order: one at each marker, or from MAD's marker on."""
        mad, marker = self._is_mad, self.vocab_size - 1
        is_marker = inputs == marker
        is_data = ~is_marker & (inputs != (marker - 1 if mad else 0))
        asked = is_marker.cumsum(1)
        if mad:
            asked = asked.cumsum(1) - 1
        data_first = torch.argsort((~is_data).long(), dim=1, stable=True)
        return inputs.gather(1, data_first.gather(1, (asked - 1).clamp(min=0)))

    def derived_stages(self) -> tuple[Size, ...]:
        c = self.config
        step = max(1, c.num_tokens // TOKEN_STEPS)
        counts = [*range(step, c.num_tokens, step), c.num_tokens]
        # More tokens at once would have to be learned at the price of a longer sequence.
        stages = [(2 * tokens + NOISE_AT_FIRST, tokens) for tokens in counts]
        length = 1 << stages[-1][0].bit_length()
        while length < c.length:
            stages.append((length, c.num_tokens))
            length *= 2
        return tuple(
            size
            for size in stages
            if size[0] < c.length and self._distinct(size) >= FEWEST_SEQUENCES
        )

    def check_size(self, key: str, size: Size) -> None:
        length, tokens = size
        shortest = 2 * max(1, tokens) + self._is_mad
        if tokens < 1 or length < shortest:
            raise TaskError(
                f"task.{key}: length {length} with {tokens} data tokens: the data and as many "
                f"answers must fit: give at least 1 token and length {shortest}"
            )
        if self._distinct(size) < FEWEST_SEQUENCES:
            raise TaskError(
                f"task.{key}: length {length} with {tokens} data tokens has only "
                f"{self._distinct(size)} distinct sequences, too few for three splits: "
                f"at least {FEWEST_SEQUENCES} are needed; raise length or vocab_size"
            )

    @property
    def _is_mad(self) -> bool:
        return bool(self.config.form == "mad-lab")

    def _body(self, size: Size) -> int:
        """Positions of noise and data, before the marker."""
        length, tokens = size
        return length - tokens - self._is_mad

    def _distinct(self, size: Size) -> int:
        length, tokens = size
        # With noise only before a data token, MAD's last one always ends the body.
        free = int(self._is_mad)
        places = math.comb(length - tokens - 2 * free, tokens - free)
        return places * (self.vocab_size - 2) ** tokens
