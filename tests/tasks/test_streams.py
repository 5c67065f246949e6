"""Splits that cannot meet, windows that stay inside their regions."""

import itertools
from collections import Counter

import numpy as np
import pytest

from seqbench.tasks.streams import (
    SHARES,
    TrainSets,
    Windows,
    belongs,
    fixed_rows,
    fresh_rows,
    generator,
    stage_of,
    subsets,
)


def _draw(rng: np.random.Generator, rows: int) -> np.ndarray:
    return rng.integers(0, 4, (rows, 6))


def test_every_sequence_belongs_to_exactly_one_split() -> None:
    rows = np.array(list(itertools.product(range(4), repeat=6)))
    owners = np.stack([belongs(rows, split) for split in SHARES])
    assert (owners.sum(axis=0) == 1).all()
    shares = dict(zip(SHARES, owners.mean(axis=1)))
    assert shares["train"] == pytest.approx(6 / 8, abs=0.03)
    assert shares["test"] == pytest.approx(1 / 8, abs=0.03)


def test_the_split_depends_on_content_alone() -> None:
    rows = np.random.default_rng(0).integers(0, 16, (50, 100_000), dtype=np.uint8)
    assert (belongs(rows, "test") == belongs(rows.astype(np.int64), "test")).all()
    assert (belongs(rows, "test")[::-1] == belongs(rows[::-1], "test")).all()


def test_drawn_rows_belong_to_their_split() -> None:
    assert belongs(fresh_rows("train", 500, _draw, 7), "train").all()
    assert belongs(fixed_rows("test", 0, 100, _draw, 7), "test").all()


def test_a_fixed_row_is_the_same_in_every_batch_size() -> None:
    whole = fixed_rows("validation", 0, 12, _draw, "set")
    parts = [fixed_rows("validation", i, 3, _draw, "set") for i in range(0, 12, 3)]
    assert (whole == np.concatenate(parts)).all()
    with pytest.raises(IndexError):
        fixed_rows("validation", 12, 0, _draw, "set")


def test_the_generator_is_the_same_everywhere() -> None:
    # Philox's own counter arithmetic, and how a key comes from a purpose: pinned for every machine.
    assert generator(0, "train", 3).bit_generator.random_raw(2).tolist() == [
        18012015066546125054,
        9285424046026389891,
    ]


def test_mix_replays_earlier_stages_of_train_alone() -> None:
    stages = [stage_of(3, 5, 0.5, "train", i) for i in range(400)]
    assert set(stages) == {0, 1, 2, 3}
    assert 0.4 < np.mean([s == 3 for s in stages]) < 0.6
    after = {stage_of(None, 2, 0.5, "train", i) for i in range(100)}
    assert after == {None, 0, 1}
    assert {stage_of(3, 5, 0.0, "train", i) for i in range(50)} == {3}
    assert {stage_of(3, 5, 0.9, "test", i) for i in range(50)} == {3}
    assert {stage_of(0, 5, 0.9, "train", i) for i in range(50)} == {0}


def testsubsets_are_uniform() -> None:
    drawn = subsets(np.random.default_rng(0), 20_000, 5, 3)
    counts = Counter(map(tuple, drawn.tolist()))
    assert len(counts) == 10  # every subset of 3 of 5 places, sorted and without repeats
    assert all(a < b < c for a, b, c in counts)
    assert max(counts.values()) < 1.15 * min(counts.values())


def test_a_finite_train_set_gives_every_row_once_an_epoch() -> None:
    sets = TrainSets()
    rows = [sets.rows(i, 6, 10, _draw, ("set",), seed=1) for i in range(5)]  # three epochs
    epochs = np.concatenate(rows).reshape(3, 10, -1)
    assert belongs(epochs[0], "train").all() and epochs.dtype == np.int64
    as_sets = [sorted(map(tuple, epoch.tolist())) for epoch in epochs]
    assert as_sets[0] == as_sets[1] == as_sets[2]
    assert not (epochs[0] == epochs[1]).all() and not (epochs[1] == epochs[2]).all()
    assert (TrainSets().rows(4, 6, 10, _draw, ("set",), seed=1) == rows[4]).all()
    other = np.concatenate([sets.rows(i, 5, 10, _draw, ("set",), seed=2) for i in range(2)])
    assert sorted(map(tuple, other.tolist())) == as_sets[0]  # a seed moves the order alone
    assert not (other == epochs[0]).all()


REGIONS = [(0, 100), (100, 105), (120, 161), (200, 211)]


def test_windows_stay_inside_their_regions() -> None:
    windows = Windows(REGIONS, length=10)
    inside = {s for start, end in REGIONS for s in range(start, end - 10)}
    starts = windows.random(5000, np.random.default_rng(0))
    assert set(starts.tolist()) == inside  # every place is reached, the short region never
    assert set(windows.fixed(0, len(windows)).tolist()) <= inside


def test_fixed_windows_score_each_token_at_most_once_and_nearly_all() -> None:
    windows = Windows(REGIONS, length=10)
    starts = windows.fixed(0, 1000)
    assert len(starts) == len(windows) == 9 + 4 + 1
    scored = (starts[:, None] + np.arange(1, 11)).ravel()
    assert len(set(scored.tolist())) == scored.size
    assert (windows.fixed(4, 3) == starts[4:7]).all()
    assert not (np.diff(starts) > 0).all()  # shuffled, so that a part is a fair sample


def test_windows_read_the_tokens() -> None:
    tokens = np.arange(300, dtype=np.uint16)
    windows = Windows(REGIONS, length=10)
    read = windows.read(tokens, np.array([3, 200]))
    assert read.dtype == np.int64
    assert read.tolist() == [list(range(3, 14)), list(range(200, 211))]


def test_regions_too_short_hold_no_window() -> None:
    assert len(Windows([(0, 10)], length=10)) == 0
    assert len(Windows([(0, 11)], length=10)) == 1
