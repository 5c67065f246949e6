"""Baselines of a corpus: right on sources whose entropy is known, cached whole or not at all."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from seqbench.tasks import baselines
from seqbench.tasks.baselines import cached, compressed_bits, markov_bits, sample

RNG = np.random.default_rng(0)


def _markov_chain(size: int) -> np.ndarray:
    """A second-order source: the token is the one two places before, but for a tenth of noise."""
    tokens = RNG.integers(0, 4, size).astype(np.uint8)
    keep = RNG.random(size) < 0.9
    for i in range(2, size):
        if keep[i]:
            tokens[i] = tokens[i - 2]
    return tokens


def test_each_order_reaches_the_entropy_of_what_it_can_see() -> None:
    train, validation, test = (_markov_chain(n) for n in (60_000, 10_000, 30_000))
    bits = markov_bits([train], [validation], [test], orders=3, vocab_size=4)
    same = 0.9 + 0.1 / 4
    entropy = -same * math.log2(same) - 3 * 0.025 * math.log2(0.025)
    assert bits["order-0"] == pytest.approx(2.0, abs=0.01)
    assert bits["order-1"] == pytest.approx(2.0, abs=0.01)  # the last token says nothing
    assert bits["order-2"] == pytest.approx(entropy, abs=0.02)
    assert bits["order-3"] == pytest.approx(entropy, abs=0.02)  # smoothing: no worse for rare grams


def test_order_zero_is_the_unigram_entropy() -> None:
    train, test = (RNG.choice(3, n, p=[0.7, 0.2, 0.1]).astype(np.uint8) for n in (50_000, 50_000))
    counts = np.bincount(train, minlength=3) / len(train)
    expected = -np.log2(counts[test]).mean()
    bits = markov_bits([train], [test], [test], orders=0, vocab_size=3)
    assert bits == {"order-0": pytest.approx(expected, abs=1e-3)}


def test_counting_all_grams_or_those_seen_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """In whole blocks or in pieces of them, with gaps too."""
    blocks = [RNG.integers(0, 5, n).astype(np.uint8) for n in (3, 4000, 700)]
    dense = markov_bits(blocks, blocks, blocks, orders=3, vocab_size=5, unscored=4)
    monkeypatch.setattr(baselines, "FIT_PIECE", 64)
    assert markov_bits(blocks, blocks, blocks, orders=3, vocab_size=5, unscored=4) == dense
    monkeypatch.setattr(baselines, "DENSE", 0)
    assert markov_bits(blocks, blocks, blocks, orders=3, vocab_size=5, unscored=4) == dense


def test_a_token_never_seen_costs_bits_and_is_not_infinite() -> None:
    train = np.zeros(1000, dtype=np.uint8)
    test = np.array([0, 0, 200, 0], dtype=np.uint8)
    bits = markov_bits([train], [train], [test], orders=2, vocab_size=256)
    assert all(math.isfinite(b) and b > 0 for b in bits.values())


def test_the_unscored_token_is_no_answer() -> None:
    tokens = RNG.integers(0, 4, 40_000).astype(np.uint8)
    tokens[::2] = 4
    bits = markov_bits([tokens], [tokens], [tokens], orders=1, vocab_size=5, unscored=4)
    assert bits["order-0"] == pytest.approx(2.0, abs=0.01)


def test_blocks_do_not_leak_into_each_other() -> None:
    zeros, ones = np.zeros(5000, dtype=np.uint8), np.ones(5000, dtype=np.uint8)
    pairs = [np.concatenate([zeros[:3], ones[:3]])] * 500
    bits = markov_bits(pairs, pairs, [np.array([1, 1, 0])], orders=1, vocab_size=2)
    assert bits["order-1"] > 5  # 0 after 1 never happens inside a block


@pytest.mark.parametrize("short", range(3))
def test_a_split_too_short_gives_no_figures(short: int) -> None:
    splits = [[RNG.integers(0, 4, 100).astype(np.uint8)] for _ in range(3)]
    splits[short] = [np.zeros(2, dtype=np.uint8)] * 9
    assert markov_bits(*splits, orders=2, vocab_size=4) == {}
    assert len(markov_bits(*splits, orders=1, vocab_size=4)) == 2


def test_compressors_see_the_bytes() -> None:
    noise = RNG.integers(0, 256, 20_000).astype(np.uint8)
    assert 8.0 <= compressed_bits([noise])["gzip"] < 8.1
    assert compressed_bits([noise[:0], np.zeros(20_000, dtype=np.uint8)])["xz"] < 0.1


def test_a_large_corpus_is_sampled_evenly() -> None:
    big = np.arange(40 * baselines.PIECE, dtype=np.int64)
    some = sample([big[: len(big) // 2], big[len(big) // 2 :]], 8 * baselines.PIECE)
    assert sum(map(len, some)) == 8 * baselines.PIECE
    assert some[0][0] == 0 and some[-1][-1] == big[-1]
    assert sample([big], len(big)) == [big]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SEQBENCH_DATA", str(tmp_path))
    monkeypatch.setattr(baselines, "_memory", {})
    return tmp_path / "baselines"


def test_the_cache_spares_the_work(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def compute() -> dict[str, float]:
        calls.append(1)
        return {"order-0": 1.5}

    first = cached("print", compute=compute)
    first["order-0"] = 0  # the caller's own copy
    assert cached("print", compute=compute) == {"order-0": 1.5}
    monkeypatch.setattr(baselines, "_memory", {})  # another process
    assert cached("print", compute=compute) == {"order-0": 1.5}
    assert len(calls) == 1
    cached("another print", compute=compute)
    assert len(calls) == 2


@pytest.mark.parametrize("damage", ["", "{", "[1]", "{}", '{"order-0": NaN}', '{"order-0": "x"}'])
def test_a_damaged_cache_is_worked_out_again(
    cache: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    cached("print", compute=lambda: {"order-0": 1.5})
    (file,) = cache.iterdir()
    file.write_text(damage)
    monkeypatch.setattr(baselines, "_memory", {})
    assert cached("print", compute=lambda: {"order-0": 2.5}) == {"order-0": 2.5}
    assert json.loads(file.read_text()) == {"order-0": 2.5}


def test_no_cache_folder_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("SEQBENCH_DATA", str(tmp_path / "file"))
    monkeypatch.setattr(baselines, "_memory", {})
    assert cached("print", compute=lambda: {"order-0": 1.5}) == {"order-0": 1.5}
