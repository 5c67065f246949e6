"""Random streams of tasks: generators named by their purpose, and splits that cannot meet.

Generated tasks give every sequence to one split by a hash of its content; corpora are partitioned
into regions and read by windows that stay inside one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache

import numpy as np

from seqbench.tasks.base import Split

# Of 8 equal shares of all sequences, the test split owns one, validation one, train the rest.
SHARES: dict[Split, range] = {
    "test": range(0, 1),
    "validation": range(1, 2),
    "train": range(2, 8),
}
# With fewer distinct sequences than this a split could come out empty: (7/8)^256 = 1e-15.
FEWEST_SEQUENCES = 256

Draw = Callable[[np.random.Generator, int], np.ndarray]  # (generator, n) -> n rows, (n, L)

_MULTIPLIER = 0x9E3779B97F4A7C15
_BLOCK = 1024  # rows of a finite set drawn at once: bounds memory
_HASH_BYTES = 2**26  # of an array at once
_HASH_COLUMNS = 2**16  # of a row at once, so that a million tokens need no copy in 64 bits


def generator(*purpose: object) -> np.random.Generator:
    """A generator of its own for every purpose, such as (seed, "train", batch index).

    Philox is counter-based: the same stream on every platform, and cheap to start.
    """
    text = "/".join(map(str, purpose)).encode()
    key = np.frombuffer(hashlib.sha256(text).digest()[:16], dtype="<u8")
    return np.random.Generator(np.random.Philox(key=key))


def digest(*parts: object, release: Callable[[], None] = lambda: None) -> str:
    """The SHA-256, in hex, of texts and of arrays of bytes.

    `release` is called after every piece of an array: what was mapped for it is no longer needed.
    """
    sha = hashlib.sha256()
    for part in parts:
        if not isinstance(part, np.ndarray):
            part = np.frombuffer(str(part).encode(), dtype=np.uint8)
        data = part.reshape(-1).view(np.uint8)
        sha.update(f"{len(data)}:".encode())
        for start in range(0, len(data), _HASH_BYTES):
            sha.update(data[start : start + _HASH_BYTES].data)
            release()
    return sha.hexdigest()


def fresh_rows(split: Split, count: int, draw: Draw, *purpose: object) -> np.ndarray:
    """`count` rows for a train batch, drawn by the generator of that purpose."""
    return _first_belonging(split, count, draw, generator(split, *purpose))


def fixed_rows(split: Split, first: int, count: int, draw: Draw, *purpose: object) -> np.ndarray:
    """Rows `first` to `first + count` of a fixed set; row i is the same in every batch size."""
    if count < 1:
        raise IndexError(f"{split} has no row {first}")
    rows = [
        _first_belonging(split, 1, draw, generator(split, *purpose, i))
        for i in range(first, first + count)
    ]
    return np.concatenate(rows)


class TrainSets:
    """Finite train sets, drawn at first use and kept, and served in a new order every epoch.

    A batch is a function of its index, so a run that goes on needs no place to be remembered.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[object, ...], np.ndarray] = {}

    def rows(
        self,
        index: int,
        count: int,
        examples: int,
        draw: Draw,
        purpose: tuple[object, ...],
        seed: int,
    ) -> np.ndarray:
        """Batch `index` of `count` rows, int64; `purpose` names the set, `seed` moves its order.

        A batch may end one epoch and begin the next.
        """
        key = (examples, *purpose)
        if key not in self._kept:
            blocks = [
                fresh_rows("train", min(_BLOCK, examples - first), draw, *purpose, "set", first)
                for first in range(0, examples, _BLOCK)
            ]
            largest = max(int(block.max()) for block in blocks)
            self._kept[key] = np.concatenate(blocks).astype(np.min_scalar_type(largest))
        places = np.arange(index * count, (index + 1) * count)
        rows = [
            self._kept[key][_epoch_order(int(epoch), examples, *purpose, seed)[within]]
            for epoch in np.unique(places // examples)
            for within in [places[places // examples == epoch] % examples]
        ]
        return np.concatenate(rows).astype(np.int64)


def subsets(rng: np.random.Generator, rows: int, places: int, size: int) -> np.ndarray:
    """Sorted subsets (rows, size) of range(places), uniform: Floyd's algorithm on all rows."""
    largest = np.arange(places - size, places)
    picked = rng.integers(0, largest + 1, (rows, size), dtype=np.int64)
    for i in range(1, size):
        again = (picked[:, :i] == picked[:, i : i + 1]).any(axis=1)
        picked[again, i] = largest[i]
    picked.sort(axis=1)
    return picked


def belongs(rows_BL: np.ndarray, split: Split) -> np.ndarray:
    """Which rows of small integers (B, L) belong to the split: a hash of content alone."""
    hashed = np.zeros(len(rows_BL), dtype=np.uint64)
    with np.errstate(over="ignore"):
        for start in range(0, rows_BL.shape[1], _HASH_COLUMNS):
            piece = rows_BL[:, start : start + _HASH_COLUMNS].astype(np.uint64) + np.uint64(1)
            powers = _powers(piece.shape[1])
            hashed = hashed * powers[-1] + piece @ powers
        hashed = (hashed ^ (hashed >> np.uint64(29))) * np.uint64(_MULTIPLIER)
    share = hashed >> np.uint64(61)
    return (share >= SHARES[split].start) & (share < SHARES[split].stop)


def stage_of(
    stage: int | None, num_stages: int, mix: float, split: Split, *purpose: object
) -> int | None:
    """The stage to draw from: for a fraction `mix` of the train batches an earlier one.

    Replaying short sequences keeps a model from forgetting them when the curriculum moves on.
    """
    earlier = num_stages if stage is None else stage
    if split != "train" or not mix or not earlier:
        return stage
    rng = generator("mix", *purpose)
    return int(rng.integers(earlier)) if rng.random() < mix else stage


class Windows:
    """Windows of `length` + 1 tokens inside half-open regions [start, end) of one long array.

    Train windows start anywhere in a region. The others stand end to end and share one token, so
    that each token is a target at most once; they come in one fixed shuffled order, so that any
    number of batches from the front is a fair sample of the whole.
    """

    def __init__(self, regions: Sequence[tuple[int, int]], length: int) -> None:
        held = [(start, end) for start, end in regions if end - start > length]
        sizes = np.array([end - start for start, end in held], dtype=np.int64)
        self.length = length
        self._starts = np.array([start for start, _ in held], dtype=np.int64)
        # Up to and with each region: the places a window can start at, and the windows end to end.
        self._places = np.cumsum(sizes - length)
        self._tiles = np.cumsum((sizes - 1) // length)

    def __len__(self) -> int:
        """The number of windows end to end."""
        return int(self._tiles[-1]) if self._tiles.size else 0

    def random(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """Starts (count,) of windows anywhere, every place equally likely."""
        place = rng.integers(0, int(self._places[-1]), count, dtype=np.int64)
        return self._start(self._places, place, 1)

    def fixed(self, first: int, count: int) -> np.ndarray:
        """Starts of the windows `first` to `first` + `count`, fewer at the end."""
        if count and not 0 <= first < len(self):
            raise IndexError(f"window {first} of {len(self)}")
        return self._start(self._tiles, self._order[first : first + count], self.length)

    def read(self, tokens: np.ndarray, starts: np.ndarray) -> np.ndarray:
        """The windows (count, length + 1) at those starts, int64."""
        return tokens[starts[:, None] + np.arange(self.length + 1)].astype(np.int64)

    def _start(self, ends: np.ndarray, which: np.ndarray, step: int) -> np.ndarray:
        region = np.searchsorted(ends, which, side="right")
        before = np.concatenate([[0], ends])[region]
        return self._starts[region] + (which - before) * step

    @cached_property
    def _order(self) -> np.ndarray:
        return generator("windows", len(self)).permutation(len(self))


def _first_belonging(split: Split, count: int, draw: Draw, rng: np.random.Generator) -> np.ndarray:
    """The first `count` rows drawn that belong to the split; the other splits' are thrown away."""
    size = -(-10 * count // len(SHARES[split]))  # a quarter more than needed on average
    rows = draw(rng, size)
    rows = rows[belongs(rows, split)]
    while len(rows) < count:
        more = draw(rng, size)
        rows = np.concatenate([rows, more[belongs(more, split)]])
    return rows[:count]


@lru_cache(maxsize=4)
def _epoch_order(epoch: int, examples: int, *purpose: object) -> np.ndarray:
    return generator("epoch", *purpose, epoch).permutation(examples)


@lru_cache(maxsize=16)
def _powers(length: int) -> np.ndarray:
    with np.errstate(over="ignore"):
        return np.cumprod(np.full(length, _MULTIPLIER, dtype=np.uint64))
