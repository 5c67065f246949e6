"""Multi-query associative recall: the sequences are what the docstring says, an oracle solves them."""

import hashlib

import numpy as np
import pytest

from seqbench.tasks.base import IGNORE, TaskError
from seqbench.tasks.mqar import Mqar, MqarConfig


def _task(**config: object) -> Mqar:
    return Mqar(MqarConfig(**{"length": 64, "num_pairs": 4, "vocab_size": 40, **config}))  # type: ignore[arg-type]


@pytest.mark.parametrize("split", ["train", "validation", "test"])
@pytest.mark.parametrize("fillers", [True, False])
def test_an_oracle_that_looks_back_gets_every_answer(split: str, fillers: bool) -> None:
    inputs, targets = _task(random_fillers=fillers).batch(split, 1, 64)
    for row, wanted in zip(inputs.tolist(), targets.tolist()):
        value_of = dict(zip(row[:8:2], row[1:8:2]))
        assert len(value_of) == len(set(value_of.values())) == 4
        assert all(1 <= k < 20 <= v < 40 for k, v in value_of.items())
        asked = [i for i in range(8, 64) if row[i] in value_of]
        assert sorted(row[i] for i in asked) == sorted(value_of)  # each key once
        assert all(i % 2 == 0 for i in asked)
        assert wanted == [value_of[row[i]] if i in asked else IGNORE for i in range(64)]
        others = {row[i] for i in range(8, 64) if i not in asked}
        assert others == {0} or fillers


def test_most_queries_come_soon_and_evenly_with_power_1() -> None:
    def median_place(power: float) -> float:
        _, targets = _task(num_pairs=1, power=power).batch("train", 0, 512)
        return float(np.median((targets != IGNORE).nonzero()[:, 1]))

    assert median_place(0.01) < 15 < 25 < median_place(1.0) < 41


def test_the_curriculum_doubles_up_to_the_task() -> None:
    assert _task().stages == ((8, 1), (16, 2), (32, 4))
    assert _task(vocab_size=8).stages[:1] != ((8, 1),)  # 3 x 4 choices are too few to split
    inputs, targets = _task(stages=((12, 3),)).batch("train", 0, 2, stage=0)
    assert inputs.shape == (2, 12) and (targets != IGNORE).sum() == 6


def test_test_lengths_give_variants() -> None:
    variants = _task(test_lengths=(128, 256)).test_variants()
    assert list(variants) == ["length=128", "length=256"]
    assert variants["length=256"].batch("test", 0, 2).inputs.shape == (2, 256)


def test_a_finite_train_set_comes_again_after_an_epoch() -> None:
    task = _task(train_examples=16)
    rows = [{row.tobytes() for row in task.batch("train", e, 16).inputs.numpy()} for e in range(2)]
    assert rows[0] == rows[1]


def test_the_sequences_are_pinned() -> None:
    # A change here is a new generator: raise the number, or old records claim data they never saw.
    inputs, targets = _task().batch("train", 3, 8, seed=1)
    data = inputs.numpy().astype("<i8").tobytes() + targets.numpy().astype("<i8").tobytes()
    assert hashlib.sha256(data).hexdigest()[:16] == "223c72c5a7862228"


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"vocab_size": 5}, "task.vocab_size=5"),
        ({"length": 15}, "length 15 with 4 pairs"),
        ({"num_pairs": 0}, "0 pairs"),
        ({"num_pairs": 1, "vocab_size": 8}, "only 12 distinct choices"),
        ({"test_lengths": (128, 8)}, "task.test_lengths: length 8"),
        ({"stages": ((8, 3),)}, "task.stages: length 8"),
        ({"eval_sequences": 0}, "task.eval_sequences=0"),
        ({"train_examples": 0}, "task.train_examples=0"),
        ({"mix": 1.5}, "task.mix=1.5"),
        ({"power": 0.0}, "task.power=0.0"),
    ],
)
def test_a_config_that_cannot_be_is_refused_in_one_line(config: dict, said: str) -> None:
    with pytest.raises(TaskError) as error:
        _task(**config).prepare()
    assert said in str(error.value) and "\n" not in str(error.value)
