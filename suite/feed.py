"""Feeds training batches: made in the step, or ahead of it by processes of their own.

A batch is a pure function of its index and the curriculum's stage, so making it early changes
nothing. Only a stage that ended in between does, and the batches made for it are made again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from torch.utils.data import DataLoader, Dataset, Sampler

from seqbench.tasks.base import Batch, Task

AHEAD = 2  # batches that each process keeps ready: they lie in shared memory, which may be small


class Made(NamedTuple):
    """A batch made ahead, with what it was made from."""

    step: int
    stage: int | None
    batch: Batch


class Feed:
    """The training batches of one run, by index.

    `processes` make them ahead (0: none, the step makes its own); `pinned` puts those into page-
    locked memory, from which a GPU copies while it computes.
    """

    def __init__(
        self,
        task: Task,
        *,
        batch_size: int,
        seed: int,
        stage: Callable[[], int | None],
        processes: int = 0,
        pinned: bool = False,
    ) -> None:
        self.task, self.batch_size, self.seed, self.stage = task, batch_size, seed, stage
        self.processes, self.pinned = processes, pinned
        self.waited = 0.0  # seconds that steps waited for their batches

    def over(self, steps: range) -> Iterable[Any]:
        """What the trainer iterates over: one item a step, each for `batch`."""
        if not self.processes:
            return steps
        return _Loader(
            self._count,
            _Ahead(self.task, self.batch_size, self.seed),
            sampler=_Asked(steps, self.stage),
            batch_size=None,
            num_workers=self.processes,
            prefetch_factor=AHEAD,
            pin_memory=self.pinned,
            collate_fn=_as_it_is,
        )

    def batch(self, item: int | Made) -> Batch:
        """The batch of an item: the one made ahead, if its stage is still the stage."""
        if not isinstance(item, int) and item.stage == self.stage():
            return item.batch
        began = time.perf_counter()
        batch = self.make(item if isinstance(item, int) else item.step, self.stage())
        self._count(time.perf_counter() - began)
        return batch

    def make(self, index: int, stage: int | None) -> Batch:
        """The batch itself."""
        return _Ahead(self.task, self.batch_size, self.seed)[index, stage].batch

    def _count(self, seconds: float) -> None:
        self.waited += seconds


class _Loader(DataLoader[Made]):
    """One that tells how long each batch was waited for."""

    def __init__(self, waited: Callable[[float], None], *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.waited = waited

    def __iter__(self) -> Any:
        batches, began = super().__iter__(), time.perf_counter()
        for batch in batches:
            self.waited(time.perf_counter() - began)
            yield batch
            began = time.perf_counter()


class _Ahead(Dataset[Made]):
    def __init__(self, task: Task, batch_size: int, seed: int) -> None:
        self.task, self.batch_size, self.seed = task, batch_size, seed

    def __getitem__(self, asked: tuple[int, int | None]) -> Made:
        index, stage = asked
        batch = self.task.batch("train", index, self.batch_size, seed=self.seed, stage=stage)
        return Made(index, stage, Batch(*batch))


class _Asked(Sampler[tuple[int, int | None]]):
    """Every step with the stage at the time of asking, which is ahead of the step."""

    def __init__(self, steps: range, stage: Callable[[], int | None]) -> None:
        self.steps, self.stage = steps, stage

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[tuple[int, int | None]]:
        for index in self.steps:
            yield index, self.stage()


def _as_it_is(item: Any) -> Any:
    return item
