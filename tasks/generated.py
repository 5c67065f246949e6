"""Tasks of generated sequences: fresh ones at every step, and splits that never share one."""

from __future__ import annotations

from abc import abstractmethod
from functools import cached_property, partial
from typing import Any, ClassVar, Self

import numpy as np

from seqbench.tasks.base import Batch, Split, Task, TaskError
from seqbench.tasks.streams import TrainSets, digest, fixed_rows, fresh_rows, stage_of

Size = tuple[int, ...]  # what a sequence is drawn at: its length, then how many of what is in it


class GeneratedTask(Task):
    """A hash of its content gives each sequence to one split, and no other split ever draws it.

    Config has `length`, `vocab_size`, `stages` (of the curriculum; None: `derived_stages`), `mix`,
    `test_lengths`, `eval_sequences`, `data_seed` and, where a task can train on a finite set,
    `train_examples`.
    """

    generator: ClassVar[str]  # the task and a version, raised when the sequences change

    @abstractmethod
    def size_at(self, length: int) -> Size:
        """The task's own size, but for the length."""

    @abstractmethod
    def derived_stages(self) -> tuple[Size, ...]:
        """Sizes of the curriculum where the config gives none, easiest first."""

    @abstractmethod
    def check_size(self, key: str, size: Size) -> None:
        """Raises TaskError, naming `key`, if no sequence fits, or too few for three splits."""

    @abstractmethod
    def draw(self, rng: np.random.Generator, rows: int, size: Size) -> np.ndarray:
        """All that there is to so many sequences, (rows, n) small integers."""

    @abstractmethod
    def arrange(self, drawn: np.ndarray, size: Size, split: Split) -> Batch:
        """What was drawn, as inputs and targets."""

    def settings(self) -> tuple[object, ...]:
        """What else in the config moves the sequences."""
        return ()

    @property
    def vocab_size(self) -> int:
        size: int = self.config.vocab_size
        return size

    def prepare(self) -> None:
        c = self.config
        if not 0 <= c.mix <= 1:
            raise TaskError(f"task.mix={c.mix}: a fraction of the batches: give 0 to 1")
        for key in ("eval_sequences", "train_examples"):
            value = getattr(c, key, None)
            if value is not None and value < 1:
                raise TaskError(f"task.{key}={value}: give at least 1")
        self.check_size("length", self.size_at(c.length))
        for length in c.test_lengths:
            self.check_size("test_lengths", self.size_at(length))
        for size in self._given_stages() or ():
            self.check_size("stages", size)

    def fingerprint(self) -> str:
        return digest(self.generator)

    @cached_property
    def stages(self) -> tuple[Size, ...]:
        """Sizes of the curriculum, easiest first."""
        given = self._given_stages()
        return self.derived_stages() if given is None else given

    @property
    def num_stages(self) -> int:
        return len(self.stages)

    def batch(
        self, split: Split, index: int, batch_size: int, *, seed: int = 0, stage: int | None = None
    ) -> Batch:
        c = self.config
        stage = stage_of(stage, self.num_stages, c.mix, split, c.data_seed, seed, index)
        size = self.size_at(c.length) if stage is None else self.stages[stage]
        draw = partial(self.draw, size=size)
        purpose = (self.generator, c.data_seed, c.vocab_size, *size, *self.settings())
        examples = getattr(c, "train_examples", None)
        if split != "train":
            first = index * batch_size
            count = min(batch_size, c.eval_sequences - first)
            drawn = fixed_rows(split, first, count, draw, *purpose)
        elif examples is not None:
            drawn = self._train_sets.rows(index, batch_size, examples, draw, purpose, seed)
        else:
            drawn = fresh_rows(split, batch_size, draw, *purpose, seed, index)
        return self.arrange(drawn, size, split)

    def num_batches(self, split: Split, batch_size: int) -> int | None:
        return None if split == "train" else -(-self.config.eval_sequences // batch_size)

    def test_variants(self) -> dict[str, Self]:
        return {
            f"length={n}": self.with_config(length=n, test_lengths=())
            for n in self.config.test_lengths
        }

    def _given_stages(self) -> tuple[Size, ...] | None:
        given: tuple[Any, ...] | None = self.config.stages
        if given is None:
            return None
        return tuple((stage,) if isinstance(stage, int) else tuple(stage) for stage in given)

    @cached_property
    def _train_sets(self) -> TrainSets:
        return TrainSets()
