"""What runs: Cell, one frozen and fully resolved grid cell with its digest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from typing import Any, Literal

# Raised by a change to code that alters results (a layer, the loss, a stream): old records then
# stop matching.
RESULTS_VERSION = 1


class UserError(ValueError):
    """A user's mistake: one line with the value, where it came from, what is valid, the remedy."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The training recipe of one cell; every field is part of its identity."""

    steps: int = 1000
    batch_size: int = 32
    lr: float = 3e-3
    schedule: Literal["constant", "cosine"] = "cosine"
    warmup_steps: int = 50
    min_lr: float = 0.0  # where the cosine ends
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    # Of Adam's denominator: gradients below it no longer move a weight, as those of a task that is
    # solved to many digits are; lower it to train on.
    eps: float = 1e-8
    clip: float = 1.0  # gradient norm; 0: no clipping
    # Weight in the loss of the mean log Δ of every S6 layer (no other layer has one): Δ falls
    # towards 0 wherever the task does not need it, and what is kept stays kept at any length.
    delta_penalty: float = 0.0
    eval_every: int = 100  # steps between validations
    eval_batches: int = 8  # validation batches at most
    test_batches: int = 32  # test batches at most
    stop_at: float | None = None  # solved, and over, once the validation headline is this good
    stop_early: bool = True  # False: solving is noted, and the run goes on to its last step
    patience: int | None = None  # stop after so many validations without gain
    curriculum: bool = False  # go through the task's stages, easiest first
    curriculum_pass: float = 0.9  # training accuracy that ends a stage
    curriculum_until: float = (
        0.5  # by this fraction of the steps every stage is over, passed or not
    )
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"
    # What filled the fields above that nobody set: see suite/recipes.py.
    recipe: Literal["gpt3", "improved"] | None = None
    # Tokens of a train batch that go through the model at a time, in groups of whole rows (or of
    # segments of them, below) whose gradients are added; None: all.
    micro_tokens: int | None = None
    # Train sequences longer than this go through the model in pieces of so many tokens that carry
    # its state: memory no longer grows with the length. None: every sequence as a whole.
    segment_length: int | None = None
    # exact: those of the whole sequence, for a second forward pass. truncated: cut between pieces.
    segment_gradients: Literal["exact", "truncated"] = "exact"
    # Weights to begin from: a checkpoint's file, or the digest of a finished cell whose checkpoint
    # is in the results folder; DIGEST@seed: of that cell with this one's seed. None: drawn.
    init_from: str | None = None
    init_sha256: str = ""  # of a file's weights; filled in, and the file's identity


# Fields that came after the first records: at their default they leave an identity as it was.
_LATER = (
    "recipe",
    "micro_tokens",
    "segment_length",
    "segment_gradients",
    "init_from",
    "init_sha256",
)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One training run, fully resolved: nothing that affects its result lies outside it."""

    task: str
    model: str
    seed: int
    scale: str  # the task's scale that the values below came from
    scale_note: str
    task_config: Mapping[str, Any] = field(default_factory=dict)
    model_config: Mapping[str, Any] = field(default_factory=dict)  # d_model, num_layers, options
    train: TrainConfig = field(default_factory=TrainConfig)
    data_fingerprint: str = ""
    results_version: int = RESULTS_VERSION
    # "task" and "model" -> a hash of the source of those that come from elsewhere; for seqbench's
    # own RESULTS_VERSION stands.
    code: Mapping[str, str] = field(default_factory=dict)

    def canonical(self) -> str:
        """The identity as canonical JSON; the scale's note is prose, and no part of it."""
        identity = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "scale_note"}
        train, usual = asdict(self.train), asdict(TrainConfig())
        for name in _LATER:
            if train[name] == usual[name]:
                del train[name]
        if self.train.init_sha256:
            del train["init_from"]  # where the file lies is no part of it
        identity["train"] = train
        if not self.code:
            del identity["code"]
        return json.dumps(identity, sort_keys=True, separators=(",", ":"), allow_nan=False)

    @cached_property
    def digest(self) -> str:
        """The first 16 hex digits of the identity's SHA-256."""
        return hashlib.sha256(self.canonical().encode()).hexdigest()[:16]

    @cached_property
    def family(self) -> str:
        """The digest whatever the seed."""
        return replace(self, seed=0).digest

    def begins_from(self, other: Cell) -> bool:
        """Whether its first weights are the other cell's last."""
        source = self.train.init_from
        alike = self.seed == other.seed and source == f"{other.family}@seed"
        return alike or source == other.digest

    @property
    def label(self) -> str:
        """task/model/seed, for people; never parsed back."""
        return f"{self.task}/{self.model}/seed{self.seed}"


@dataclass(frozen=True, kw_only=True)
class Request:
    """A cell as a grid or the command line asks for it: names, and changes to the scale."""

    task: str
    model: str
    scale: str = "cpu"
    settings: Mapping[str, Any] = field(default_factory=dict)  # "train.steps" -> 500
    same_size_as: str | None = None  # a model whose parameter count the width is chosen to match
    init_from: Request | None = None  # the cell, of the same seed, whose weights it begins from
