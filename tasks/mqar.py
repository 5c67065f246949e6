"""Multi-query associative recall: say the value that came with each key (Arora et al. 2023).

The setting is Zoology's: all pairs first, then every key once more, most of them soon.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from seqbench.tasks.base import IGNORE, Batch, Scale, Split, TaskError
from seqbench.tasks.generated import GeneratedTask, Size
from seqbench.tasks.streams import FEWEST_SEQUENCES, subsets

FILLER = 0
SHORTEST_STAGE = 8  # of the derived curriculum
BASELINE_SEQUENCES = 512


@dataclass(frozen=True, kw_only=True)
class MqarConfig:
    """Sizes of the task; Zoology's hardest are length 512, 64 pairs, vocabulary 8192."""

    length: int = 512  # of the whole input: the pairs, then the queries among fillers
    num_pairs: int = 64
    vocab_size: int = 8192  # filler 0; keys from 1, values from vocab_size // 2
    power: float = 0.01  # query slot n is taken in proportion to n^(power - 1); 1: all alike
    random_fillers: bool = True  # any token that is no key of the sequence, or 0 alone
    # (length, pairs) of the curriculum, easiest first; None: the length doubles from 8 to the
    # task's, with an eighth as many pairs, up to num_pairs.
    stages: tuple[tuple[int, int], ...] | None = None
    mix: float = 0.0  # fraction of train batches that replay a stage already passed
    test_lengths: tuple[int, ...] = ()  # longer or shorter sequences to test at
    train_examples: int | None = None  # of a fixed train set, reshuffled every epoch; None: endless
    eval_sequences: int = 2048  # of validation and of test
    data_seed: int = 0  # moves all three splits


class Mqar(GeneratedTask):
    """Say each key's value, when the key comes again.

    Pairs of a key and a value, all different, open the sequence; each key comes once more, two
    places or a multiple of two after the pairs, and its value is the answer there.

        Inputs   2 8 4 7 | 0 0 4 0 0 0 0 0 2 0      (pairs 2 8 and 4 7, filler 0)
        Targets  - - - - | - - 7 - - - - - 8 -      (- is not scored)

    Fillers are random tokens, but no keys of the sequence. Zoology also allows those, which makes
    a query of what is none; at its vocabulary they are rare. Guessing scores 1 / values.
    """

    generator = "mqar, generator 1"
    Config = MqarConfig
    config: MqarConfig
    headline = "accuracy"
    difficulty = ("length", "num_pairs", "vocab_size")
    scales: ClassVar[Mapping[str, Scale]] = {
        "cpu": Scale(
            note="length 64, 8 pairs, vocabulary 256 and a curriculum instead of 512, 64 and 8192; "
            "not the paper's setting.",
            task={"length": 64, "num_pairs": 8, "vocab_size": 256, "test_lengths": (128, 256)},
            model={"d_model": 64, "num_layers": 2},
            train={
                "steps": 16_000,
                "batch_size": 64,
                "lr": 2e-3,
                "beta2": 0.98,
                "eval_every": 400,
                "curriculum": True,
                "curriculum_until": 0.8,
                "stop_at": 0.99,
            },
        ),
        "paper": Scale(
            note="Zoology's length 512, 64 pairs, vocabulary 8192 and 100,000 fixed training "
            "examples, 64 epochs (Arora et al. 2023).",
            task={
                "length": 512,
                "num_pairs": 64,
                "vocab_size": 8192,
                "train_examples": 100_000,
                "eval_sequences": 3000,
            },
            model={"d_model": 128, "num_layers": 2},
            train={
                "steps": 100_000,
                "batch_size": 64,
                "lr": 1e-3,
                "weight_decay": 0.1,
                "eval_every": 1563,
                "stop_at": 0.99,
            },
        ),
    }

    def prepare(self) -> None:
        if self.vocab_size < 6:
            raise TaskError(
                f"task.vocab_size={self.vocab_size}: mqar needs a filler, two keys and as many "
                "values: give 6 or more"
            )
        if not self.config.power > 0:
            raise TaskError(f"task.power={self.config.power}: give a number above 0")
        super().prepare()

    def settings(self) -> tuple[object, ...]:
        return self.config.power, self.config.random_fillers

    def size_at(self, length: int) -> Size:
        return length, self.config.num_pairs

    def draw(self, rng: np.random.Generator, rows: int, size: Size) -> np.ndarray:
        c, (length, pairs) = self.config, size
        first_value = c.vocab_size // 2
        keys = 1 + rng.permuted(subsets(rng, rows, first_value - 1, pairs), axis=1)
        values = rng.permuted(subsets(rng, rows, c.vocab_size - first_value, pairs), axis=1)
        tokens = np.full((rows, length), FILLER, dtype=np.int64)
        if c.random_fillers:
            tokens = rng.integers(0, c.vocab_size, (rows, length), dtype=np.int64)
            tokens[_member_of_row(tokens, keys, c.vocab_size)] = FILLER
        tokens[:, : 2 * pairs : 2] = keys
        tokens[:, 1 : 2 * pairs : 2] = first_value + values
        slots = _weighted(rng, rows, (length - 2 * pairs) // 2, pairs, c.power)
        np.put_along_axis(tokens, 2 * pairs + 2 * slots, keys, axis=1)
        return tokens

    def arrange(self, drawn: np.ndarray, size: Size, split: Split) -> Batch:
        targets = _answers(drawn, size[1], self.vocab_size)
        return Batch(torch.from_numpy(drawn), torch.from_numpy(targets))

    def chance(self) -> float:
        return 1 / (self.config.vocab_size - self.config.vocab_size // 2)

    def baselines(self) -> dict[str, float]:
        """What always answering with the first pair's value scores on test."""
        inputs, targets = self.batch("test", 0, BASELINE_SEQUENCES)
        scored = targets != IGNORE
        return {"first value": float((targets == inputs[:, 1:2])[scored].float().mean())}

    def oracle(self, inputs: torch.Tensor) -> torch.Tensor:
        """What followed the token where it stood first, among the pairs."""
        pairs = inputs[:, None, : 2 * self.config.num_pairs]
        first = (inputs[:, :, None] == pairs).int().argmax(2)
        return inputs.gather(1, (first + 1).clamp(max=inputs.shape[1] - 1))

    def derived_stages(self) -> tuple[Size, ...]:
        c = self.config
        doubling, length = [], SHORTEST_STAGE
        while length < c.length:
            pairs = min(c.num_pairs, length // 8)
            if self._distinct(pairs) >= FEWEST_SEQUENCES:
                doubling.append((length, pairs))
            length *= 2
        return tuple(doubling)

    def check_size(self, key: str, size: Size) -> None:
        length, pairs = size
        if pairs < 1 or length < 4 * pairs:
            raise TaskError(
                f"task.{key}: length {length} with {pairs} pairs: the pairs and a slot of two "
                f"places for each query must fit: give at least 1 pair and length "
                f"{4 * max(1, pairs)}"
            )
        if self._distinct(pairs) < FEWEST_SEQUENCES:
            raise TaskError(
                f"task.{key}: {pairs} pairs with task.vocab_size={self.vocab_size} have only "
                f"{self._distinct(pairs)} distinct choices of keys and values, too few for three "
                f"splits: at least {FEWEST_SEQUENCES} are needed; raise vocab_size"
            )

    def _distinct(self, pairs: int) -> int:
        """At least so many sequences, the queries' places and the fillers left out."""
        keys, values = self.vocab_size // 2 - 1, self.vocab_size - self.vocab_size // 2
        return math.perm(keys, pairs) * math.perm(values, pairs)


def _weighted(
    rng: np.random.Generator, rows: int, slots: int, size: int, power: float
) -> np.ndarray:
    """`size` different slots a row (rows, size), drawn in turn with weights n^(power - 1)."""
    # Gumbel noise on the log weights, largest first, is drawing without replacement.
    scores = (power - 1) * np.log(np.arange(1, slots + 1)) + rng.gumbel(size=(rows, slots))
    return np.argsort(-scores, axis=1)[:, :size]


def _member_of_row(tokens_BL: np.ndarray, keys_BM: np.ndarray, vocab_size: int) -> np.ndarray:
    """Which tokens are among the keys of their row."""
    isin = np.zeros((len(keys_BM), vocab_size), dtype=bool)
    np.put_along_axis(isin, keys_BM, True, axis=1)
    return np.take_along_axis(isin, tokens_BL, axis=1)


def _answers(inputs_BL: np.ndarray, pairs: int, vocab_size: int) -> np.ndarray:
    """Each key's value where the key comes again, IGNORE elsewhere (B, L)."""
    value_of = np.full((len(inputs_BL), vocab_size), IGNORE, dtype=np.int64)
    context = inputs_BL[:, : 2 * pairs]
    np.put_along_axis(value_of, context[:, ::2], context[:, 1::2], axis=1)
    answers = np.take_along_axis(value_of, inputs_BL, axis=1)
    answers[:, : 2 * pairs] = IGNORE
    return answers
