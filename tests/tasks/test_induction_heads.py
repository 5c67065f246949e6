"""Induction heads: the sequences are what the docstring says, and an oracle solves them."""

import hashlib

import pytest

from seqbench.tasks.base import IGNORE, TaskError
from seqbench.tasks.induction_heads import InductionHeads, InductionHeadsConfig


def _task(**config: object) -> InductionHeads:
    return InductionHeads(InductionHeadsConfig(**config))  # type: ignore[arg-type]


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_an_oracle_that_looks_back_gets_every_answer(split: str) -> None:
    inputs, targets = _task(length=24, vocab_size=6).batch(split, 2, 128)
    places = set()
    for row, wanted in zip(inputs.tolist(), targets.tolist()):
        assert row.count(5) == 2 and row[-1] == 5
        assert wanted[:-1] == [IGNORE] * 23
        assert wanted[-1] == row[row.index(5) + 1] < 5
        places.add(row.index(5))
    assert {0, 21} <= places <= set(range(22))


def test_score_all_trains_on_every_next_token_and_tests_on_the_answer() -> None:
    task = _task(length=16, score_all=True)
    inputs, targets = task.batch("train", 0, 8)
    assert (targets[:, :-1] == inputs[:, 1:]).all()
    assert (targets[:, -1] == _task(length=16).batch("train", 0, 8).targets[:, -1]).all()
    assert ((task.batch("test", 0, 8).targets != IGNORE).sum(1) == 1).all()


def test_the_curriculum_doubles_up_to_the_task() -> None:
    assert _task(length=256).stages == ((8,), (16,), (32,), (64,), (128,))
    assert _task(length=256, stages=(10, 20)).batch("train", 0, 2, stage=1).inputs.shape == (2, 20)


def test_test_lengths_give_variants_of_a_million_tokens() -> None:
    variant = _task(test_lengths=(64, 2**20)).test_variants()["length=1048576"]
    inputs, targets = variant.batch("test", 0, 1)
    assert inputs.shape == (1, 2**20)
    assert targets[0, -1] == inputs[0, (inputs[0] == 15).nonzero()[0] + 1]


def test_a_large_vocabulary() -> None:
    inputs, _ = _task(vocab_size=5000, length=64).batch("train", 0, 64)
    assert inputs.max() == 4999 and inputs[inputs < 4999].max() > 4900


def test_the_sequences_are_pinned() -> None:
    # A change here is a new generator: raise the number, or old records claim data they never saw.
    inputs, targets = _task(length=128).batch("train", 3, 8, seed=1)
    data = inputs.numpy().astype("<i8").tobytes() + targets.numpy().astype("<i8").tobytes()
    assert hashlib.sha256(data).hexdigest()[:16] == "e751492d6b4c6cc4"


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"vocab_size": 2}, "task.vocab_size=2"),
        ({"length": 3}, "task.length: length 3"),
        ({"length": 4, "vocab_size": 4}, "task.length: length 4"),
        ({"test_lengths": (64, 2)}, "task.test_lengths: length 2"),
        ({"stages": (1,)}, "task.stages: length 1"),
        ({"eval_sequences": 0}, "task.eval_sequences=0"),
        ({"mix": -1}, "task.mix=-1"),
    ],
)
def test_a_config_that_cannot_be_is_refused_in_one_line(config: dict, said: str) -> None:
    with pytest.raises(TaskError) as error:
        _task(**config).prepare()
    assert said in str(error.value) and "\n" not in str(error.value)
