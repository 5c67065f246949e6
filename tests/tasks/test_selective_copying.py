"""Selective copying: the sequences are what the docstring says, and an oracle solves them."""

import hashlib
from collections import Counter

import numpy as np
import pytest

from seqbench.tasks.base import IGNORE, TaskError
from seqbench.tasks.selective_copying import SelectiveCopying, SelectiveCopyingConfig, _subsets


def _task(**config: object) -> SelectiveCopying:
    return SelectiveCopying(SelectiveCopyingConfig(**config))  # type: ignore[arg-type]


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_an_oracle_that_reads_the_sequence_gets_every_answer(split: str) -> None:
    inputs, targets = _task(length=40, num_tokens=5, vocab_size=7).batch(split, 1, 64)
    for row, wanted in zip(inputs.numpy(), targets.numpy()):
        body, markers = row[:35], row[35:]
        assert (markers == 6).all()
        assert (wanted[:35] == IGNORE).all()
        assert body[body != 0].tolist() == wanted[35:].tolist()
        assert ((wanted[35:] >= 1) & (wanted[35:] <= 5)).all()


def test_subsets_are_uniform() -> None:
    drawn = _subsets(np.random.default_rng(0), 20_000, 5, 3)
    counts = Counter(map(tuple, drawn.tolist()))
    assert len(counts) == 10  # every subset of 3 of 5 places, sorted and without repeats
    assert all(a < b < c for a, b, c in counts)
    assert max(counts.values()) < 1.15 * min(counts.values())


def test_the_whole_body_can_be_data() -> None:
    inputs, targets = _task(length=16, num_tokens=8).batch("train", 0, 4)
    assert (inputs[:, :8] == targets[:, 8:]).all()


def test_the_curriculum_doubles_up_to_the_task() -> None:
    assert _task(length=100)._stages() == ((8, 2), (16, 4), (32, 8), (64, 16))
    assert _task(length=100, num_tokens=3)._stages()[-1] == (64, 3)
    own = _task(length=100, stages=((20, 4), (50, 16)))
    assert own.num_stages == 2
    inputs, targets = own.batch("train", 0, 4, stage=0)
    assert inputs.shape == (4, 20) and (targets != IGNORE).sum() == 16


def test_stages_too_small_to_split_are_left_out() -> None:
    assert (8, 2) not in _task(length=64, num_tokens=16, vocab_size=3)._stages()


def test_test_lengths_give_variants() -> None:
    variants = _task(length=64, test_lengths=(128, 256)).test_variants()
    assert list(variants) == ["length=128", "length=256"]
    assert variants["length=256"].batch("test", 0, 2).inputs.shape == (2, 256)
    assert variants["length=256"].test_variants() == {}


def test_the_sequences_are_pinned() -> None:
    # A change here is a new generator: raise GENERATOR, or old records claim data they never saw.
    inputs, targets = _task(length=128).batch("train", 3, 8, seed=1)
    data = inputs.numpy().astype("<i8").tobytes() + targets.numpy().astype("<i8").tobytes()
    assert hashlib.sha256(data).hexdigest()[:16] == "6254e0e0c1fb7fe4"


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"vocab_size": 2}, "task.vocab_size=2"),
        ({"length": 31}, "length 31 with 16 data tokens"),
        ({"num_tokens": 0}, "0 data tokens"),
        ({"length": 2, "num_tokens": 1}, "only 14 distinct sequences"),
        ({"test_lengths": (4096, 20)}, "task.test_lengths: length 20"),
        ({"stages": ((8, 5),)}, "task.stages: length 8"),
        ({"eval_sequences": 0}, "task.eval_sequences=0"),
        ({"mix": 1.5}, "task.mix=1.5"),
    ],
)
def test_a_config_that_cannot_be_is_refused_in_one_line(config: dict, said: str) -> None:
    with pytest.raises(TaskError) as error:
        _task(**config).prepare()
    assert said in str(error.value) and "\n" not in str(error.value)
