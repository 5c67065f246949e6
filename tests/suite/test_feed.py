"""The feed: what a step waits for its batch is counted, made in the step or ahead of it."""

from __future__ import annotations

from itertools import count

import pytest

from seqbench.suite import feed
from seqbench.suite.configuration import prepared_task


@pytest.mark.parametrize("processes", [0, 1])
def test_the_wait_for_every_batch_is_counted(
    processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that ticks once a look: one look before and one after each of five batches."""
    task = prepared_task("induction-heads", {"length": 16})
    one = feed.Feed(task, batch_size=2, seed=0, stage=lambda: None, processes=processes)
    ticks = count()
    monkeypatch.setattr(feed.time, "perf_counter", lambda: float(next(ticks)))
    for item in one.over(range(5)):
        assert one.batch(item).inputs.shape == (2, 16)
    assert one.waited == 5.0


def test_a_batch_made_for_a_stage_that_ended_is_waited_for_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    task = prepared_task("induction-heads", {"length": 16})
    one = feed.Feed(task, batch_size=2, seed=0, stage=lambda: 0)
    ticks = count()
    monkeypatch.setattr(feed.time, "perf_counter", lambda: float(next(ticks)))
    made = feed.Made(3, None, task.batch("train", 3, 2, seed=0))
    assert one.batch(made).inputs.shape[1] < 16
    assert one.waited == 1.0
