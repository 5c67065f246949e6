"""Random streams of tasks: generators named by (seed, purpose), and splits that cannot meet."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np

from seqbench.tasks.base import Split

# Of 8 equal shares of all sequences, the test split owns one, validation one, train the rest.
SHARES: dict[Split, tuple[int, ...]] = {
    "test": (0,),
    "validation": (1,),
    "train": (2, 3, 4, 5, 6, 7),
}

_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


def generator(*purpose: object) -> np.random.Generator:
    """A generator of its own for every purpose, such as (seed, "train", batch index).

    Philox is counter-based: the same stream on every platform, and cheap to start.
    """
    text = "/".join(map(str, purpose)).encode()
    key = np.frombuffer(hashlib.sha256(text).digest()[:16], dtype="<u8")
    return np.random.Generator(np.random.Philox(key=key))


def drawn_for_split(split: Split, draw: Callable[[int], np.ndarray], count: int) -> np.ndarray:
    """`count` rows of `draw(n)` (n, L) that belong to the split by the hash of their content.

    No row can be drawn for two splits, whatever the seeds: the others' rows are rejected.
    """
    rows = draw(count)
    wrong = np.flatnonzero(~belongs(rows, split))
    while wrong.size:
        rows[wrong] = draw(wrong.size)
        wrong = wrong[~belongs(rows[wrong], split)]
    return rows


def belongs(rows_BL: np.ndarray, split: Split) -> np.ndarray:
    """Which rows of tokens (B, L) belong to the split: a polynomial hash modulo 2^64, mixed."""
    length = rows_BL.shape[1]
    weights = _weights(length)
    with np.errstate(over="ignore"):
        hashed = (rows_BL.astype(np.uint64) + np.uint64(1)) @ weights
        hashed = (hashed ^ (hashed >> np.uint64(29))) * _MULTIPLIER
    return np.isin((hashed >> np.uint64(61)).astype(np.int64), SHARES[split])


def _weights(length: int) -> np.ndarray:
    if length not in _cache:
        with np.errstate(over="ignore"):
            _cache[length] = np.cumprod(np.full(length, _MULTIPLIER, dtype=np.uint64))
    return _cache[length]


_cache: dict[int, np.ndarray] = {}
