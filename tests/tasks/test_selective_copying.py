"""Selective copying: the sequences are what the docstring says, and an oracle solves them."""

import hashlib

import pytest

from seqbench.tasks.base import IGNORE, TaskError
from seqbench.tasks.selective_copying import SelectiveCopying, SelectiveCopyingConfig


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


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_the_form_of_mad_asks_once_and_ends_its_body_in_data(split: str) -> None:
    inputs, targets = _task(length=40, num_tokens=5, vocab_size=7, form="mad-lab").batch(
        split, 1, 64
    )
    last = set()
    for row, wanted in zip(inputs.numpy(), targets.numpy()):
        body = row[:34]
        assert row[34:].tolist() == [6, 5, 5, 5, 5, 5]  # the marker, then noise
        assert (wanted[:35] == IGNORE).all()
        assert body[body != 5].tolist() == wanted[35:].tolist()
        assert ((wanted[35:] >= 0) & (wanted[35:] <= 4)).all()
        last.add(int((body != 5).nonzero()[0][-1]))
    assert last == {33}


def test_a_finite_train_set_is_reshuffled_every_epoch() -> None:
    task = _task(length=12, num_tokens=2, train_examples=24)
    epochs = [
        [row.tobytes() for i in range(3) for row in task.batch("train", 3 * e + i, 8)[0].numpy()]
        for e in range(3)
    ]
    assert set(epochs[0]) == set(epochs[1]) == set(epochs[2])
    assert epochs[0] != epochs[1] != epochs[2]
    again = _task(length=12, num_tokens=2, train_examples=24).batch("train", 4, 8).inputs
    assert (again == task.batch("train", 4, 8).inputs).all()  # needs no batch before it


def test_the_whole_body_can_be_data() -> None:
    inputs, targets = _task(length=16, num_tokens=8).batch("train", 0, 4)
    assert (inputs[:, :8] == targets[:, 8:]).all()


def test_the_curriculum_raises_the_tokens_then_the_length() -> None:
    stages = _task(length=256).stages
    assert stages[:2] == ((12, 2), (16, 4)) and stages[-4:] == (
        (36, 14),
        (40, 16),
        (64, 16),
        (128, 16),
    )
    assert _task(length=64).stages[-1] == (40, 16)
    assert _task(length=100, num_tokens=3).stages == (
        (12, 2),
        (14, 3),
        (16, 3),
        (32, 3),
        (64, 3),
    )
    own = _task(length=100, stages=((20, 4), (50, 16)))
    assert own.num_stages == 2
    inputs, targets = own.batch("train", 0, 4, stage=0)
    assert inputs.shape == (4, 20) and (targets != IGNORE).sum() == 16


def test_stages_too_small_to_split_are_left_out() -> None:
    assert (12, 2) not in _task(length=64, num_tokens=16, vocab_size=3).stages


def test_test_lengths_give_variants() -> None:
    variants = _task(length=64, test_lengths=(128, 256)).test_variants()
    assert list(variants) == ["length=128", "length=256"]
    assert variants["length=256"].batch("test", 0, 2).inputs.shape == (2, 256)
    assert variants["length=256"].test_variants() == {}


def test_the_sequences_are_pinned() -> None:
    # A change here is a new generator: raise the number, or old records claim data they never saw.
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
        ({"form": "mad-lab", "length": 32}, "length 32 with 16 data tokens"),
        ({"train_examples": 0}, "task.train_examples=0"),
        ({"eval_sequences": 0}, "task.eval_sequences=0"),
        ({"mix": 1.5}, "task.mix=1.5"),
    ],
)
def test_a_config_that_cannot_be_is_refused_in_one_line(config: dict, said: str) -> None:
    with pytest.raises(TaskError) as error:
        _task(**config).prepare()
    assert said in str(error.value) and "\n" not in str(error.value)
