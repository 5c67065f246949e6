"""Cheap baselines of a corpus: order-k Markov models, gzip and xz; worked out once, then cached."""

from __future__ import annotations

import contextlib
import gzip
import json
import lzma
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from seqbench.tasks.fetch import cache_folder
from seqbench.tasks.streams import digest

VERSION = 1  # raised when a baseline's figures change
FIT_TOKENS = 2**24  # at most so many of train are counted,
SCORE_TOKENS = 2**22  # and of validation and test scored, in pieces spread evenly
PIECE = 2**16
FIT_PIECE = 2**20  # tokens counted at once
DENSE = 2**24  # at most so many counts of all possible grams are kept as one array
COMPRESSED_BYTES = 2**24  # at most so many of test are compressed
# How many observations the next shorter context counts for; chosen on validation.
WEIGHTS = tuple(4.0**k for k in range(-2, 8))

Blocks = Sequence[np.ndarray]  # stretches of small integers, each contiguous in the corpus


def cached(*identity: object, compute: Callable[[], dict[str, float]]) -> dict[str, float]:
    """The baselines of that identity (data fingerprint, config): from memory, from disk, or new."""
    key = digest(VERSION, *identity)
    if key not in _memory:
        file = cache_folder() / "baselines" / f"{key[:32]}.json"
        found = _read(file)
        if found is None:
            found = compute()
            _write(file, found)
        _memory[key] = found
    return dict(_memory[key])


def markov_bits(
    train: Blocks,
    validation: Blocks,
    test: Blocks,
    *,
    orders: int,
    vocab_size: int,
    unscored: int | None = None,
    limits: tuple[int, int] = (FIT_TOKENS, SCORE_TOKENS),
) -> dict[str, float]:
    """Bits per test token of "order-0" (frequencies alone) to "order-`orders`".

    Counts of train; each order leans on the next shorter one by a Dirichlet prior whose weight is
    chosen on validation. Every order scores the same tokens; `unscored` is never an answer. None if
    a split has no stretch longer than `orders`. Of train, and of the others, at most `limits`
    tokens are read, in pieces spread evenly.
    """
    fitted = _Grams(sample(train, limits[0]), orders, vocab_size, unscored)
    judged = [
        _Grams(sample(blocks, limits[1]), orders, vocab_size, unscored)
        for blocks in (validation, test)
    ]
    scored = [len(grams.codes(0)) for grams in judged]
    if not (all(scored) and any(map(len, fitted.pieces(0)))):
        return {}
    answers = vocab_size - (unscored is not None)
    chances = [np.full(count, 1 / answers) for count in scored]
    bits = {}
    for order in range(orders + 1):
        counts = _counted(fitted, order)
        seen = [counts.of(grams.codes(order)) for grams in judged]
        weight = min(WEIGHTS, key=lambda w: _bits(_leaning(*seen[0], chances[0], w)))
        chances = [_leaning(*s, chance, weight) for s, chance in zip(seen, chances, strict=True)]
        bits[f"order-{order}"] = _bits(chances[1])
    return bits


def compressed_bits(test: Blocks) -> dict[str, float]:
    """Bits per byte of gzip -9 and xz -9 on the test bytes alone: neither sees train."""
    data = np.concatenate([np.asarray(block) for block in test])[:COMPRESSED_BYTES].tobytes()
    return {
        "gzip": 8 * len(gzip.compress(data, 9)) / len(data),
        "xz": 8 * len(lzma.compress(data, preset=9)) / len(data),
    }


def sample(blocks: Blocks, limit: int) -> Blocks:
    """The blocks if they hold at most `limit` tokens, else pieces of them, evenly spread."""
    if sum(map(len, blocks)) <= limit:
        return blocks
    pieces = [block[i : i + PIECE] for block in blocks for i in range(0, len(block), PIECE)]
    chosen = np.linspace(0, len(pieces) - 1, max(1, limit // PIECE)).round().astype(int)
    return [pieces[i] for i in sorted(set(chosen.tolist()))]


class _Grams:
    """The tokens of blocks that have `orders` tokens before them, with those tokens."""

    def __init__(self, blocks: Blocks, orders: int, vocab_size: int, unscored: int | None) -> None:
        self.orders, self.vocab_size, self.unscored = orders, vocab_size, unscored
        self.blocks = [
            block[first : first + FIT_PIECE + orders]
            for block in blocks
            for first in range(0, len(block) - orders, FIT_PIECE)
        ]

    def pieces(self, order: int) -> Iterator[np.ndarray]:
        """For each block one number for every token and the `order` before it; the token is the
        lowest digit."""
        for block in self.blocks:
            past = [np.asarray(block[self.orders - k : len(block) - k]) for k in range(order + 1)]
            code = past[0].astype(np.int64)
            for k in range(1, order + 1):
                code += past[k].astype(np.int64) * self.vocab_size**k
            yield code if self.unscored is None else code[past[0] != self.unscored]

    def codes(self, order: int) -> np.ndarray:
        """Of all blocks."""
        return np.concatenate([*self.pieces(order), _NOTHING])


class _Counts:
    """How often each gram, and each context, was seen."""

    def __init__(self, codes: np.ndarray, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.grams, self.seen = np.unique(codes, return_counts=True)
        self.contexts, first = np.unique(self.grams // vocab_size, return_index=True)
        self.context_seen = np.add.reduceat(self.seen, first)

    def of(self, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """How often the gram, and its context, was seen: for each code."""
        return (
            _lookup(self.grams, self.seen, codes),
            _lookup(self.contexts, self.context_seen, codes // self.vocab_size),
        )


class _DenseCounts:
    """The same, as an array of all grams there can be: of a large corpus of few letters."""

    def __init__(self, pieces: Iterator[np.ndarray], vocab_size: int, size: int) -> None:
        self.vocab_size = vocab_size
        self.seen = np.zeros(size, dtype=np.int64)
        for codes in pieces:
            self.seen += np.bincount(codes, minlength=size)
        self.context_seen = self.seen.reshape(-1, vocab_size).sum(1)

    def of(self, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self.seen[codes], self.context_seen[codes // self.vocab_size]


def _counted(grams: _Grams, order: int) -> _Counts | _DenseCounts:
    size = grams.vocab_size ** (order + 1)
    if size <= DENSE:
        return _DenseCounts(grams.pieces(order), grams.vocab_size, size)
    return _Counts(grams.codes(order), grams.vocab_size)


_NOTHING = np.zeros(0, dtype=np.int64)
_memory: dict[str, dict[str, float]] = {}


def _lookup(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[place] == wanted, values[place], 0)


def _leaning(
    gram: np.ndarray, context: np.ndarray, shorter: np.ndarray, weight: float
) -> np.ndarray:
    return (gram + weight * shorter) / (context + weight)


def _bits(chances: np.ndarray) -> float:
    return float(-np.log2(chances).mean())


def _read(file: Path) -> dict[str, float] | None:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        values = {str(k): float(v) for k, v in found.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return None
    return values if values and all(map(math.isfinite, values.values())) else None


def _write(file: Path, values: dict[str, float]) -> None:
    """Whole or not at all; a cache that cannot be written is no error."""
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_name(f".{file.name}.{os.getpid()}")
        temporary.write_text(json.dumps(values), encoding="utf-8")
        temporary.replace(file)
