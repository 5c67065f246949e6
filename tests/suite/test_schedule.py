"""The learning rate really moves, as the schedule says."""

from itertools import pairwise

import pytest

from seqbench.suite.experiment import TrainConfig
from seqbench.suite.schedule import learning_rate


def test_warm_up_is_linear_and_reaches_the_peak() -> None:
    train = TrainConfig(steps=100, lr=1.0, warmup_steps=10)
    rates = [learning_rate(train, step) for step in range(10)]
    assert rates == pytest.approx([(i + 1) / 10 for i in range(10)])


def test_cosine_falls_every_step_to_the_minimum() -> None:
    train = TrainConfig(steps=100, lr=1.0, warmup_steps=10, min_lr=0.1)
    rates = [learning_rate(train, step) for step in range(10, 101)]
    assert all(a > b for a, b in pairwise(rates))
    assert rates[0] == pytest.approx(1.0)
    assert rates[45] == pytest.approx(0.55)
    assert rates[-1] == pytest.approx(0.1)


def test_constant_stays_after_the_warm_up() -> None:
    train = TrainConfig(steps=100, lr=0.5, warmup_steps=2, schedule="constant")
    assert {learning_rate(train, step) for step in range(2, 100)} == {0.5}
