"""The task contract, over every task found: a new file in tasks/ is tested by being there."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, get_type_hints

import pytest
import torch

from seqbench.suite.configuration import build_config
from seqbench.suite.discovery import task_class, task_names
from seqbench.suite.experiment import TrainConfig
from seqbench.tasks.base import IGNORE, METRICS, SPLITS, Batch, Task, TaskError

TASKS = task_names()
B = 4


def test_the_tasks_are_found() -> None:
    assert {"selective-copying", "induction-heads", "language", "dna", "piano"} <= set(TASKS)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes the user's cache; one folder serves the whole file."""
    folder = tmp_path_factory.getbasetemp() / "cache"
    monkeypatch.setenv("SEQBENCH_DATA", str(folder))


@pytest.fixture(params=TASKS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def task(name: str) -> Task:
    """The task at its cpu scale, ready."""
    cls = task_class(name)
    ready = cls(build_config(cls.Config, cls.scales["cpu"].task, "task"))
    ready.prepare()
    return ready


def _same(one: Batch, other: Batch) -> bool:
    return torch.equal(one.inputs, other.inputs) and torch.equal(one.targets, other.targets)


@pytest.mark.parametrize("split", SPLITS)
def test_batches_are_tokens_in_tokens_out(task: Task, split: Any) -> None:
    for index in range(3):
        batch = task.batch(split, index, B)
        inputs, targets = batch
        assert isinstance(batch, Batch)
        assert inputs.shape == targets.shape == (B, inputs.shape[1])
        assert inputs.dtype == targets.dtype == torch.int64
        assert inputs.is_contiguous() and targets.is_contiguous()
        assert inputs.min() >= 0 and inputs.max() < task.vocab_size
        scored = targets[targets != IGNORE]
        assert scored.numel() and scored.min() >= 0 and scored.max() < task.vocab_size
        assert ((targets != IGNORE).any(dim=1)).all(), "a sequence with nothing to score"


@pytest.mark.parametrize("split", SPLITS)
def test_a_batch_is_a_function_of_its_arguments(task: Task, split: Any) -> None:
    again = type(task)(task.config)
    again.prepare()
    later = task.batch(split, 2, B)
    first = task.batch(split, 0, B)
    assert _same(first, again.batch(split, 0, B))
    assert _same(later, again.batch(split, 2, B))
    assert not _same(first, later)
    again.batch(split, 1, B).inputs.zero_()  # the caller's to write on
    assert _same(first, again.batch(split, 0, B))


def test_the_seed_moves_the_train_stream_alone(task: Task) -> None:
    assert not _same(task.batch("train", 0, B, seed=0), task.batch("train", 0, B, seed=1))
    for split in ("validation", "test"):
        assert _same(task.batch(split, 0, B, seed=0), task.batch(split, 0, B, seed=1))


def test_the_splits_have_no_sequence_in_common(task: Task) -> None:
    rows = {
        split: {
            row.numpy().tobytes()
            for index in range(8)
            for row in task.batch(split, index, 16).inputs
        }
        for split in SPLITS
    }
    assert not rows["train"] & rows["validation"]
    assert not rows["train"] & rows["test"]
    assert not rows["validation"] & rows["test"]


@pytest.mark.parametrize("split", ["validation", "test"])
def test_a_pass_is_the_same_rows_in_every_batch_size(task: Task, split: Any) -> None:
    whole = task.batch(split, 0, 12)
    for index in range(3):
        part = task.batch(split, index, 4)
        rows = slice(4 * index, 4 * index + 4)
        assert _same(part, Batch(whole.inputs[rows], whole.targets[rows]))
    batches = task.num_batches(split, 32)
    assert batches is not None and batches >= 1
    assert 1 <= len(task.batch(split, batches - 1, 32).inputs) <= 32
    with pytest.raises(IndexError):
        task.batch(split, batches, 32)


def test_the_train_split_serves_any_index(task: Task) -> None:
    batches = task.num_batches("train", B)
    last = 10**9 if batches is None else batches - 1
    assert task.batch("train", last, B).inputs.shape[0] >= 1


def test_stages_are_batches_too_and_end_below_the_task(task: Task) -> None:
    full = task.batch("train", 0, B).inputs.shape[1]
    lengths = []
    for stage in range(task.num_stages):
        inputs, targets = task.batch("train", 0, B, stage=stage)
        assert inputs.shape == targets.shape and (targets != IGNORE).any(dim=1).all()
        lengths.append(inputs.shape[1])
    assert lengths == sorted(lengths)
    assert all(length <= full for length in lengths)


def test_the_fingerprint_is_a_digest_and_stays(task: Task) -> None:
    again = type(task)(task.config)
    again.prepare()
    assert int(task.fingerprint(), 16) >= 0
    assert task.fingerprint() == again.fingerprint()


def test_prepare_is_idempotent(task: Task) -> None:
    before = task.batch("test", 0, B)
    task.prepare()
    assert _same(before, task.batch("test", 0, B))


def test_the_headline_has_a_chance_level_and_a_baseline_at_least_as_good(task: Task) -> None:
    assert task.headline in METRICS
    larger = METRICS[task.headline]
    chance = task.chance()
    assert 0 < chance < 1 if larger else 0 < chance <= math.log2(task.vocab_size)
    baselines = task.baselines()
    assert baselines and all(math.isfinite(v) for v in baselines.values())
    best = max(baselines.values()) if larger else min(baselines.values())
    # Where loci are homologous a cheap method is at chance, give or take a finite test split.
    assert best > 0.9 * chance if larger else best < chance
    assert all(task.units_per_token(split) > 0 for split in SPLITS)


def test_baselines_are_the_same_again(task: Task) -> None:
    task.baselines()
    again = type(task)(task.config)
    again.prepare()
    assert again.baselines() == task.baselines()


def test_variants_are_ready_tasks_of_the_same_vocabulary(task: Task) -> None:
    for label, variant in task.test_variants().items():
        assert label and variant.vocab_size == task.vocab_size
        assert variant.headline == task.headline
        inputs, targets = variant.batch("test", 0, 1)
        assert inputs.shape == targets.shape
        assert variant.config != task.config


def test_scales_name_real_fields_and_say_what_they_are(name: str) -> None:
    cls = task_class(name)
    assert {"cpu", "paper"} <= set(cls.scales)
    for label, scale in cls.scales.items():
        build_config(cls.Config, scale.task, f"{name} {label}")
        build_config(TrainConfig, scale.train, f"{name} {label}")
        assert {"d_model", "num_layers"} <= set(scale.model)
        assert scale.note.endswith(".") and not scale.note.startswith(label)  # tables say it
    assert "not the paper's" in cls.scales["cpu"].note
    assert set(cls.difficulty) <= set(cls.config_fields())


def test_the_docstring_shows_inputs_and_targets(name: str) -> None:
    doc = task_class(name).__doc__ or ""
    assert "Inputs" in doc and "Targets" in doc


def test_the_config_is_frozen_and_keyword_only(name: str) -> None:
    config = task_class(name).Config
    built = config()
    field = dataclasses.fields(config)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(built, field, None)
    with pytest.raises(TypeError):
        config(1)
    with pytest.raises(TypeError):
        task_class(name)(object())


def test_every_number_and_switch_of_the_config_is_live(task: Task) -> None:
    """Changing it changes the batches, the stages, the variants or the size of the splits."""
    hints = get_type_hints(type(task.config))
    tried = 0
    for field in dataclasses.fields(task.config):
        value = getattr(task.config, field.name)
        if hints[field.name] not in (int, float, bool):
            continue
        others = (
            [not value] if hints[field.name] is bool else [value + 1, value * 2, value / 2, 0.5]
        )
        others = [hints[field.name](o) for o in others]
        assert any(_differs(task, **{field.name: other}) for other in others if other != value), (
            f"{type(task).__name__}: {field.name} changes nothing"
        )
        tried += 1
    assert tried


def _differs(task: Task, **change: Any) -> bool:
    other = task.with_config(**change)
    try:
        other.prepare()
    except TaskError:
        return False
    return _shows(task) != _shows(other)


def _shows(task: Task) -> list[object]:
    rows: list[object] = [task.num_stages, len(task.test_variants())]
    rows += [task.num_batches(split, B) for split in SPLITS]
    stages: list[int | None] = [None, *range(task.num_stages)]
    for split in SPLITS:
        for stage in stages:
            for index in range(4 if split == "train" else 1):
                batch = task.batch(split, index, B, stage=stage)
                rows.append([part.numpy().tobytes() for part in batch])
    return rows
