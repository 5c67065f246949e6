"""Feeds training batches: made in the step, or ahead of it by processes of their own.

A batch is a pure function of its index and the curriculum's stage, so making it early changes
nothing. Only a stage that ended in between does, and the batches made for it are made again.
"""

from __future__ import annotations

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

    def over(self, steps: range) -> Iterable[Any]:
        """What the trainer iterates over: one item a step, each for `batch`."""
        if not self.processes:
            return steps
        return DataLoader(
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
        if isinstance(item, int):
            return self.make(item, self.stage())
        return item.batch if item.stage == self.stage() else self.make(item.step, self.stage())

    def make(self, index: int, stage: int | None) -> Batch:
        """The batch itself."""
        return _Ahead(self.task, self.batch_size, self.seed)[index, stage].batch


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
