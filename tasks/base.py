"""The task contract: every task is tokens in, tokens out.

Shapes: B sequences in a batch, L positions.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Literal, NamedTuple, Self

from torch import Tensor

IGNORE = -100  # a target that is not scored; torch's cross_entropy default

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")

# Metric name, which says the unit -> whether a larger value is better.
METRICS: dict[str, bool] = {
    "accuracy": True,  # of scored tokens, 0 to 1
    "sequence_accuracy": True,  # of sequences with every scored token right
    "loss": False,  # nats per scored token
    "perplexity": False,  # exp(loss)
    "bits_per_byte": False,
    "bits_per_base": False,
    "bits_per_sample": False,
}


# Marks a config's field that came after the first records (metadata=LATE): while it has its default
# it is no part of a cell's identity, so that those records still answer for their cells.
LATE = {"late": True}


class TaskError(ValueError):
    """A mistake in a task's configuration or data that its user can mend.

    One line: what is wrong, the value and where it came from, what is valid, what to do.
    """


class Batch(NamedTuple):
    """Inputs (B, L) int64 and targets (B, L) int64, with IGNORE where nothing is scored."""

    inputs: Tensor
    targets: Tensor


@dataclass(frozen=True, kw_only=True)
class Scale:
    """A named size of a task: what it sets in the task's config, the model and the recipe."""

    note: str  # printed with every table drawn at this scale
    task: Mapping[str, Any] = field(default_factory=dict)
    model: Mapping[str, Any] = field(default_factory=dict)
    train: Mapping[str, Any] = field(default_factory=dict)


class Task(ABC):
    """A benchmark task: the subclass in `tasks/NAME.py` is the task NAME (with dashes)."""

    Config: ClassVar[type]  # frozen, keyword-only dataclass
    scales: ClassVar[Mapping[str, Scale]]  # at least "cpu" and "paper"
    headline: ClassVar[str]  # a key of METRICS; model selection looks at it, on validation only
    difficulty: ClassVar[tuple[str, ...]] = ()  # the config fields that make the task harder
    shows_selection: ClassVar[bool] = (
        False  # what a model selects of a test sequence is worth a look
    )

    config: Any

    def __init__(self, config: Any = None) -> None:
        self.config = self.Config() if config is None else config
        if not isinstance(self.config, self.Config):
            raise TypeError(f"{type(self).__name__} takes a {self.Config.__name__}")

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """The number of token ids; inputs and targets lie in [0, vocab_size)."""

    @abstractmethod
    def prepare(self) -> None:
        """Fetch, generate or open the data once: idempotent, checksummed; raises TaskError."""

    @abstractmethod
    def fingerprint(self) -> str:
        """A hex digest of the data and the code version that makes it; part of a cell's identity.

        Known after `prepare`.
        """

    @abstractmethod
    def batch(
        self, split: Split, index: int, batch_size: int, *, seed: int = 0, stage: int | None = None
    ) -> Batch:
        """The batch number `index` of a split: a pure function of its arguments and the config.

        `seed` (the cell's) moves the train stream alone. Validation and test are fixed rows, the
        same for every cell and cut alike by any batch size; their last batch may be smaller, and
        beyond it is an IndexError. `stage` is a stage of the curriculum, None the task itself. The
        tensors are the caller's.
        """

    @abstractmethod
    def num_batches(self, split: Split, batch_size: int) -> int | None:
        """Batches of a pass over the split; None for an endless (generated) train split."""

    @abstractmethod
    def chance(self) -> float:
        """The headline metric of a uniform guess among the possible answers."""

    def baselines(self) -> dict[str, float]:
        """Name -> headline metric on test of cheap methods (order-k Markov, gzip, xz, ...)."""
        return {}

    @property
    def num_stages(self) -> int:
        """Stages of the curriculum, easiest first; 0: the task has none."""
        return 0

    def test_variants(self) -> dict[str, Self]:
        """Label -> the same task under another config (say, longer), scored on test too."""
        return {}

    def resets(self, inputs: Tensor) -> Tensor | None:
        """Where documents begin in inputs (B, L), bool (B, L); None: they are not kept apart.

        A model is to forget at such a position all that came before it.
        """
        return None

    def oracle(self, inputs: Tensor) -> Tensor | None:
        """Predictions (B, L) int64 of the exact solution from inputs (B, L); None: it has none.

        Right at every scored position of every split; what it says elsewhere is not looked at. It
        is causal: position t follows from the inputs up to t, so any prefix is answered alike.
        """
        return None

    def units_per_token(self, split: Split) -> float:
        """Bytes, bases or samples that one scored token stands for: the divisor of bits_per_*."""
        return 1.0

    def with_config(self, **changes: Any) -> Self:
        """The same task with some config fields changed."""
        return type(self)(replace(self.config, **changes))

    @property
    def models_a_stream(self) -> bool:
        """Whether every token is asked for: its loss by position says what context is worth."""
        return self.headline.startswith("bits_per_")

    @classmethod
    def config_fields(cls) -> tuple[str, ...]:
        """Names of the config's fields."""
        return tuple(f.name for f in fields(cls.Config))


def bits(nats: float) -> float:
    """Nats to bits."""
    return nats / math.log(2)
