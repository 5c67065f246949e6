"""The task contract, a rule a function: what a batch, a split, a scale and a baseline must be."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator
from functools import cached_property
from typing import Any, get_type_hints
from unittest.mock import patch

import numpy as np
import torch

from seqbench.suite.configuration import build_config
from seqbench.suite.contract import (
    Finding,
    NotChecked,
    Rule,
    alternatives,
    apply_all,
    frozen_config,
    need,
)
from seqbench.suite.discovery import task_class
from seqbench.suite.experiment import TrainConfig
from seqbench.tasks.base import IGNORE, METRICS, SPLITS, Batch, Split, Task, TaskError

B = 4
EVALUATION: tuple[Split, Split] = ("validation", "test")
SAMPLE = 256  # rows of each split that are compared
FEWEST_BITS = 40.0  # a segment with less content than this may stand in two splits by chance
MOST_OVERLAP = 0.1  # of the test split's segments


class Subject:
    """A task at its cpu scale, prepared when the first rule asks for it."""

    def __init__(self, name: str, cls: type[Task] | None = None) -> None:
        self.name = name
        self.cls = cls if cls is not None else task_class(name)

    @cached_property
    def task(self) -> Task:
        """The task, ready."""
        return self.fresh()

    def fresh(self) -> Task:
        """Another instance of the same, ready."""
        scale = self.cls.scales["cpu"]
        made = self.cls(build_config(self.cls.Config, scale.task, "task"))
        made.prepare()
        return made


def check(name: str) -> list[Finding]:
    """The findings of every rule on the task of that name or path."""
    return apply_all(RULES, [("", Subject(name))], GATES)


def config(s: Subject) -> str:
    """Config is a frozen, keyword-only dataclass with defaults, and no other config is taken."""
    frozen_config(s.cls.Config)
    try:
        s.cls(object())
    except TypeError:
        return f"{s.cls.Config.__name__}: {', '.join(s.cls.config_fields()) or 'no fields'}"
    need(False, "a config that is no Config is accepted; call super().__init__(config)")
    return ""


def scales(s: Subject) -> str:
    """There is a scale `cpu`; every scale names real fields and says in a sentence what it is."""
    need("cpu" in s.cls.scales, f"no scale 'cpu' among {', '.join(s.cls.scales) or 'none'}")
    for label, scale in s.cls.scales.items():
        build_config(s.cls.Config, scale.task, f"scale {label}: task")
        build_config(TrainConfig, scale.train, f"scale {label}: train")
        sizes = {"d_model", "num_layers"} - set(scale.model)
        need(not sizes, f"scale {label}: its model lacks {', '.join(sorted(sizes))}")
        note = scale.note
        need(
            note.endswith(".") and not note.startswith(label),
            f"scale {label}: note={note!r}: a sentence that tables print, ending in '.'",
        )
    return ", ".join(s.cls.scales)


def headline(s: Subject) -> str:
    """The headline is a metric of METRICS; `difficulty` names config fields."""
    need(s.cls.headline in METRICS, f"headline={s.cls.headline!r}: valid are {', '.join(METRICS)}")
    strange = sorted(set(s.cls.difficulty) - set(s.cls.config_fields()))
    need(not strange, f"difficulty names {', '.join(strange)}: no field of the config")
    return s.cls.headline


def docstring(s: Subject) -> str:
    """The class's docstring shows an example of Inputs and Targets."""
    doc = s.cls.__doc__ or ""
    need("Inputs" in doc and "Targets" in doc, "no lines 'Inputs ...' and 'Targets ...' in it")
    return "Inputs and Targets shown"


def prepare(s: Subject) -> str:
    """prepare() readies the data, and a second call changes nothing."""
    before = s.task.batch("test", 0, B)
    s.task.prepare()
    need(_same(before, s.task.batch("test", 0, B)), "a second prepare() changes the batches")
    return "idempotent"


def fingerprint(s: Subject) -> str:
    """fingerprint() is a hex digest, the same for every instance."""
    mark = s.task.fingerprint()
    need(
        isinstance(mark, str) and re.fullmatch("[0-9a-f]{8,}", mark) is not None,
        f"{mark!r}: must be a hex digest of 8 digits or more",
    )
    need(s.fresh().fingerprint() == mark, "another instance has another fingerprint")
    return mark[:16]


def shapes(s: Subject) -> str:
    """A batch is Batch(inputs (B, L), targets (B, L)), with B as asked."""
    for split in SPLITS:
        batch = s.task.batch(split, 0, B)
        need(isinstance(batch, Batch), f"{split}: {type(batch).__name__} instead of Batch")
        for part, tensor in zip(batch._fields, batch, strict=True):
            need(isinstance(tensor, torch.Tensor), f"{split} {part}: {type(tensor).__name__}")
        inputs, targets = tuple(batch.inputs.shape), tuple(batch.targets.shape)
        need(len(inputs) == 2 and inputs[1] > 0, f"{split}: inputs {inputs}: must be (B, L)")
        need(inputs == targets, f"{split}: inputs {inputs} and targets {targets} differ")
        need(inputs[0] == B, f"{split}: {inputs[0]} sequences where {B} were asked for")
        resets = s.task.resets(batch.inputs)
        told = None if resets is None else (resets.dtype, tuple(resets.shape))
        need(told in (None, (torch.bool, inputs)), f"{split}: resets {told}: must be bool (B, L)")
    return f"inputs and targets {inputs}"


def dtypes(s: Subject) -> str:
    """Inputs and targets are int64 and contiguous."""
    for split in SPLITS:
        batch = s.task.batch(split, 0, B)
        for part, tensor in zip(batch._fields, batch, strict=True):
            need(tensor.dtype == torch.int64, f"{split} {part}: {tensor.dtype}: must be int64")
            need(tensor.is_contiguous(), f"{split} {part}: not contiguous")
    return "int64"


def vocabulary(s: Subject) -> str:
    """Inputs and scored targets lie in [0, vocab_size)."""
    size = s.task.vocab_size
    need(isinstance(size, int) and size > 1, f"vocab_size={size!r}: an integer, 2 or more")
    for split, batch in _some(s.task):
        for part, values in (("inputs", batch.inputs), ("targets", _scored(batch.targets))):
            if values.numel():
                low, high = int(values.min()), int(values.max())
                inside = low >= 0 and high < size
                need(inside, f"{split} {part}: {low} to {high}, outside [0, {size})")
    return f"inside [0, {size})"


def mask(s: Subject) -> str:
    """Every sequence has something to score."""
    scored = total = 0
    for split, batch in _some(s.task):
        has = batch.targets != IGNORE
        need(bool(has.any(1).all()), f"{split}: a sequence whose targets are all {IGNORE}")
        scored, total = scored + int(has.sum()), total + has.numel()
    return f"{100 * scored / total:.3g} % of the positions are scored"


def determinism(s: Subject) -> str:
    """A batch is a function of its arguments: for another instance, in any order, after writing."""
    again = s.fresh()
    for split in SPLITS:
        last = _last(s.task, split)
        later, first = s.task.batch(split, last, B), s.task.batch(split, 0, B)
        need(_same(first, again.batch(split, 0, B)), f"{split}: another instance, another batch 0")
        need(_same(later, again.batch(split, last, B)), f"{split}: batch {last} depends on history")
        need(last == 0 or not _same(first, later), f"{split}: batches 0 and {last} are the same")
        again.batch(split, 0, B).inputs.zero_()  # the caller's to write on
        need(
            _same(first, again.batch(split, 0, B)), f"{split}: writing on a batch changes the next"
        )
    return "the same batches from two instances"


def seed(s: Subject) -> str:
    """The cell's seed moves the train stream, and nothing else."""
    one, other = (s.task.batch("train", 0, B, seed=n) for n in (0, 1))
    need(not _same(one, other), "train: seeds 0 and 1 give the same batch")
    for split in EVALUATION:
        one, other = (s.task.batch(split, 0, B, seed=n) for n in (0, 1))
        need(_same(one, other), f"{split}: the seed moves it")
    return "moves train alone"


def passes(s: Subject) -> str:
    """Validation and test end, with the same rows in every batch size; train serves any index."""
    told = []
    for split in EVALUATION:
        whole = s.task.batch(split, 0, 3 * B)
        for index, start in enumerate(range(0, len(whole.inputs), B)):
            rows = slice(start, start + B)
            part = s.task.batch(split, index, B)
            same = _same(part, Batch(whole.inputs[rows], whole.targets[rows]))
            need(same, f"{split}: batch {index} of {B} is not those rows of a larger batch")
        batches = s.task.num_batches(split, 32)
        need(batches is not None and batches > 0, f"{split}: num_batches gives {batches}")
        assert batches is not None
        rows_left = len(s.task.batch(split, batches - 1, 32).inputs)
        need(1 <= rows_left <= 32, f"{split}: its last batch has {rows_left} rows")
        try:
            s.task.batch(split, batches, 32)
        except IndexError:
            told.append(f"{split} {32 * (batches - 1) + rows_left} sequences")
        else:
            need(False, f"{split}: batch {batches} of {batches} is no IndexError")
    batches = s.task.num_batches("train", B)
    last = 10**9 if batches is None else batches - 1
    need(len(s.task.batch("train", last, B).inputs) > 0, f"train: batch {last} is empty")
    return ", ".join([*told, f"train {'endless' if batches is None else batches}"])


def streams_disjoint(s: Subject) -> str:
    """No sequence stands in two splits."""
    rows = {split: _rows(s.task, split) for split in SPLITS}
    seen = {split: {row.tobytes() for row in rows[split]} for split in SPLITS}
    for one, other in (("train", "validation"), ("train", "test"), ("validation", "test")):
        common = len(seen[one] & seen[other])  # type: ignore[index]
        need(not common, f"{one} and {other} share {common} of the sequences looked at")
    return "none shared among " + ", ".join(f"{len(rows[s])} {s}" for s in SPLITS)


def train_test_overlap(s: Subject) -> str:
    """Few long segments of the test sequences stand somewhere in the train stream."""
    train, test = _rows(s.task, "train", 4 * SAMPLE), _rows(s.task, "test")
    length = test.shape[1]
    size = length if length < 16 else max(16, length // 2)
    if train.shape[1] < size:
        raise NotChecked("train sequences are shorter than half a test sequence")
    starts = range(0, length - size + 1, max(1, size // 2))
    told = [row[i : i + size] for row in test for i in starts]
    told = [segment for segment in told if _content_bits(segment) >= FEWEST_BITS]
    if not told:
        raise NotChecked("test sequences hold too little to tell them apart")
    seen = np.unique(_segment_hashes(train, size))
    found = np.isin(_segment_hashes(np.stack(told), size)[:, 0], seen).mean()
    need(
        bool(found <= MOST_OVERLAP),
        f"{100 * found:.3g} % of the test segments of {size} tokens stand in train sequences; "
        "split the data first, then cut windows",
    )
    return f"{100 * found:.3g} % of {len(told)} test segments of {size} tokens"


def stages(s: Subject) -> str:
    """Stages are batches too, growing in length and never longer than the task."""
    full = s.task.batch("train", 0, B).inputs.shape[1]
    lengths = []
    for stage in range(s.task.num_stages):
        inputs, targets = s.task.batch("train", 0, B, stage=stage)
        need(inputs.shape == targets.shape, f"stage {stage}: shapes differ")
        need(bool((targets != IGNORE).any(1).all()), f"stage {stage}: nothing to score in a row")
        lengths.append(inputs.shape[1])
    need(lengths == sorted(lengths), f"lengths {lengths}: must grow")
    need(all(n <= full for n in lengths), f"lengths {lengths}: longer than the task's {full}")
    return f"{len(lengths)} stages" if lengths else "no curriculum"


def variants(s: Subject) -> str:
    """Test variants are ready tasks of the same vocabulary under another config."""
    found = s.task.test_variants()
    for label, variant in found.items():
        need(bool(label), "a variant without a label")
        need(variant.vocab_size == s.task.vocab_size, f"{label}: another vocabulary")
        need(variant.headline == s.task.headline, f"{label}: another headline")
        need(variant.config != s.task.config, f"{label}: the same config")
        inputs, targets = variant.batch("test", 0, 1)
        need(inputs.shape == targets.shape, f"{label}: shapes differ")
    return ", ".join(found) or "none"


def chance(s: Subject) -> str:
    """Chance is a plausible value of the headline, and the best baseline is not worse."""
    level, larger = s.task.chance(), METRICS[s.task.headline]
    units = [s.task.units_per_token(split) for split in SPLITS]
    need(all(u > 0 for u in units), f"units_per_token gives {units}: must be above 0")
    size = s.task.vocab_size
    if larger:
        low, high = (0.0 if s.task.headline == "sequence_accuracy" else 1 / size), 1.0
    elif s.task.headline.startswith("bits_per_"):
        low, high = 0.0, math.log2(size) / min(units)
    else:
        low, high = 0.0, float(size) if s.task.headline == "perplexity" else math.log(size)
    slack = 1e-9
    plausible = low - slack <= level <= high + slack and level > 0 and (not larger or level < 1)
    need(
        plausible, f"{s.task.headline}={level:.6g}: of {size} tokens it is {low:.3g} to {high:.3g}"
    )
    baselines = s.task.baselines()
    finite = all(math.isfinite(v) for v in baselines.values())
    need(finite, f"baselines {baselines}: must be finite")
    if not baselines:
        return f"{s.task.headline} {level:.4g}, no baselines"
    best = max(baselines.values()) if larger else min(baselines.values())
    # Of homologous sequences a cheap method knows nothing: it is at chance, give or take what a
    # finite test split does to an accuracy.
    better = best > 0.9 * level if larger else best < level
    need(better, f"the best baseline, {best:.4g}, is no better than chance, {level:.4g}")
    need(s.fresh().baselines() == baselines, "another instance has other baselines")
    return f"{s.task.headline} {level:.4g}, best baseline {best:.4g}"


def config_keys_live(s: Subject) -> str:
    """Changing a config key changes something: batches, vocabulary, splits, stages, variants."""
    hints = get_type_hints(type(s.task.config))
    here, live, untried = _shows(s.task), [], []
    for field in dataclasses.fields(s.task.config):
        others = alternatives(hints[field.name], getattr(s.task.config, field.name))
        outcomes: Iterator[bool] = (
            shown != here
            for shown in (_shown_with(s.task, field.name, other) for other in others)
            if shown is not None
        )
        first = next(outcomes, None)
        if first is None:
            untried.append(field.name)
            continue
        need(first or any(outcomes), f"{field.name} changes nothing")
        live.append(field.name)
    if not live and untried:
        raise NotChecked(f"no other value is known for {', '.join(untried)}")
    more = f"; no other value known for {', '.join(untried)}" if untried else ""
    return (", ".join(live) or "no keys") + more


def oracle(s: Subject) -> str:
    """The oracle, where there is one, answers every scored position from the inputs up to it."""
    answered = 0
    for split in SPLITS:
        inputs, targets = s.task.batch(split, 0, 32)
        given = s.task.oracle(inputs.clone())
        if given is None:
            raise NotChecked("it has none")
        shape = tuple(given.shape)
        need(shape == tuple(inputs.shape), f"its predictions are {shape}: must be (B, L)")
        scored = targets != IGNORE
        wrong = int((given != targets)[scored].sum())
        need(not wrong, f"{split}: wrong at {wrong} of {int(scored.sum())} scored positions")
        answered += int(scored.sum())
        places = scored.any(0).nonzero()[:, 0].tolist()
        for place in {places[0], places[len(places) // 2], places[-1]}:
            early = s.task.oracle(inputs[:, : place + 1].clone())
            assert early is not None
            causal = torch.equal(early[:, -1][scored[:, place]], given[:, place][scored[:, place]])
            need(causal, f"{split}: its answer at position {place} needs inputs after that")
    return f"right at all {answered} scored positions"


RULES: tuple[Rule[Subject], ...] = (
    config,
    scales,
    headline,
    docstring,
    prepare,
    fingerprint,
    shapes,
    dtypes,
    vocabulary,
    mask,
    determinism,
    seed,
    passes,
    streams_disjoint,
    train_test_overlap,
    stages,
    variants,
    chance,
    config_keys_live,
    oracle,
)
GATES: tuple[Rule[Subject], ...] = (config, scales, headline, prepare, shapes, dtypes)
# Cheap enough to ask of a plugin before every run.
BEFORE_A_RUN: tuple[Rule[Subject], ...] = (headline, shapes, dtypes, vocabulary, mask)


def _same(one: Batch, other: Batch) -> bool:
    return torch.equal(one.inputs, other.inputs) and torch.equal(one.targets, other.targets)


def _scored(targets: torch.Tensor) -> torch.Tensor:
    return targets[targets != IGNORE]


def _last(task: Task, split: Split) -> int:
    """The number of a later whole batch, at most 2."""
    batches = task.num_batches(split, B)
    return 2 if batches is None else max(0, min(2, batches - 2))


def _some(task: Task) -> Iterator[tuple[Split, Batch]]:
    for split in SPLITS:
        for index in range(_last(task, split) + 1):
            yield split, task.batch(split, index, B)


def _rows(task: Task, split: Split, count: int = SAMPLE) -> np.ndarray:
    """The first `count` input rows of a split, fewer where it has no more."""
    available = task.num_batches(split, 32)
    batches = count // 32 if available is None else min(count // 32, available)
    return np.concatenate([task.batch(split, i, 32).inputs.numpy() for i in range(batches)])


def _content_bits(segment: np.ndarray) -> float:
    """Tokens times their entropy: how much it would take to hit this segment by chance."""
    _, counts = np.unique(segment, return_counts=True)
    share = counts / segment.size
    return float(-(share * np.log2(share)).sum() * segment.size)


def _segment_hashes(rows: np.ndarray, size: int) -> np.ndarray:
    """Hashes (rows, L - size + 1) of every segment: differences of a polynomial's prefix sums."""
    odd = 0x9E3779B97F4A7C15
    back = pow(odd, -1, 2**64)
    length = rows.shape[1]
    with np.errstate(over="ignore"):
        powers = np.cumprod(np.full(length, odd, dtype=np.uint64))
        inverse = np.cumprod(np.full(length - size + 1, back, dtype=np.uint64))
        sums = np.cumsum((rows.astype(np.uint64) + np.uint64(1)) * powers, axis=1)
        sums = np.concatenate([np.zeros((len(rows), 1), np.uint64), sums], axis=1)
        hashed: np.ndarray = (sums[:, size:] - sums[:, :-size]) * inverse
    return hashed


def _shown_with(task: Task, key: str, value: Any) -> list[object] | None:
    """What the task shows under another value; None where that is not valid, or needs a fetch."""
    try:
        with patch("pooch.retrieve", side_effect=TaskError("no download for a check")):
            other = task.with_config(**{key: value})
            other.prepare()
            return _shows(other)
    except TaskError:
        return None


def _shows(task: Task) -> list[object]:
    rows: list[object] = [task.num_stages, len(task.test_variants()), task.vocab_size]
    rows += [task.chance(), *(task.num_batches(split, B) for split in SPLITS)]
    rows += [task.units_per_token(split) for split in SPLITS]
    stages: list[int | None] = [None, *range(task.num_stages)]
    for split in SPLITS:
        for stage in stages:
            for index in range(4 if split == "train" else 1):
                batch = task.batch(split, index, B, stage=stage)
                resets = task.resets(batch.inputs)
                rows.append([part.numpy().tobytes() for part in batch])
                rows.append(None if resets is None else resets.numpy().tobytes())
    return rows
