"""From records to table rows: groups of seeds, the settings that differ, means and intervals.

A group is one model under one setting, over its seeds. A row is one task under one setting with a
group for every model: two groups stand in one row only if their tasks are the same, and a model
that ran under several settings gets as many rows.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property, lru_cache
from typing import Any

from seqbench.suite.experiment import Cell
from seqbench.suite.records import Record, to_plain

CONFIDENCE = 0.95
T_SEEDS = 30  # Student's t up to so many seeds, the bootstrap above
RESAMPLES = 10_000

SHOWN_OF_LIST = 4  # a longer list is named by its length and its ends
# The settings that tell rows apart are named in this order, the ones that differ alone.
_FIRST = ("model.d_model", "model.num_layers", "train.steps", "train.lr", "train.batch_size")


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean over seeds with its 95 % interval; no interval from one seed."""

    mean: float
    low: float | None
    high: float | None
    count: int
    cut: bool = False  # an end that lay beyond what a share can be was moved to 0 or 1

    @property
    def half_width(self) -> float | None:
        """Half of the interval's width."""
        return None if self.low is None or self.high is None else (self.high - self.low) / 2


@dataclass(frozen=True, kw_only=True)
class Group:
    """One model under one setting: the records of its seeds, whatever their status."""

    task: str
    model: str
    scale: str
    settings: Mapping[str, Any]  # flat: "train.steps" -> 500
    records: tuple[Record, ...]

    @cached_property
    def keyed(self) -> Mapping[str, str]:
        """The settings' values as JSON: what two groups are compared by."""
        return {k: json.dumps(v, sort_keys=True) for k, v in self.settings.items()}

    @cached_property
    def done(self) -> tuple[Record, ...]:
        """The records with results."""
        return tuple(r for r in self.records if r.has_results)

    @cached_property
    def score(self) -> Estimate | None:
        """The test headline over the seeds that are done."""
        found = [r for r in self.done if r.headline in r.test]
        return estimate([r.test[r.headline] for r in found], found[0].headline if found else "")

    def cost(self, name: str) -> float | None:
        """The mean of a field of Cost over the seeds that have one."""
        values = [getattr(r.cost, name) for r in self.done if r.cost is not None]
        return sum(values) / len(values) if values else None

    @property
    def solved(self) -> tuple[int, int] | None:
        """k of n seeds reached train.stop_at; None where there is nothing to reach."""
        if self.records[0].cell.train.stop_at is None:
            return None
        return sum(r.solved_at is not None for r in self.records), len(self.records)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One task under one setting, with a group for every model that ran it."""

    task: str
    scale: str
    setting: str  # what tells it from the task's other rows, "" if nothing has to
    task_setting: str  # the part of that which lies in the task, its data or the code
    groups: Mapping[str, Group]  # by model

    @cached_property
    def example(self) -> Record | None:
        """A record that is done: its headline, chance and baselines are the whole row's."""
        return next((g.done[0] for g in self.groups.values() if g.done), None)

    @property
    def records(self) -> list[Record]:
        """All records of the row."""
        return [r for g in self.groups.values() for r in g.records]

    @property
    def title(self) -> str:
        """The task with its setting."""
        return f"{self.task} ({self.setting})" if self.setting else self.task

    @property
    def slug(self) -> str:
        """A file name's part, different for every row."""
        return slug(self.task, self.scale, self.setting)


def rows(records: Sequence[Record], cells: Sequence[Cell] | None = None) -> list[Row]:
    """The rows, tasks and models in the order of `cells` where given, else by name.

    They are kept for the last tuple of records: a report asks for the same ones again and again.
    """
    if isinstance(records, tuple):
        return list(_kept_rows(_Same(records), _Same(cells)))
    return _rows(records, cells)


@dataclass(frozen=True, eq=False)
class _Same:
    """Equal to what holds the very same object."""

    value: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)


@lru_cache(maxsize=1)
def _kept_rows(records: _Same, cells: _Same) -> list[Row]:
    return _rows(records.value, cells.value)


def _rows(records: Sequence[Record], cells: Sequence[Cell] | None) -> list[Row]:
    by_task: dict[tuple[str, str], list[Group]] = {}
    for group in _groups(records):
        by_task.setdefault((group.task, group.scale), []).append(group)
    made = [row for groups in by_task.values() for row in _split(groups)]
    rank = _rank(c.task for c in cells) if cells is not None else {}
    models = models_of(records, cells)
    return [
        replace(row, groups={m: row.groups[m] for m in models if m in row.groups})
        for row in sorted(made, key=lambda r: (rank.get(r.task, 0), r.task, r.scale))
    ]


def models_of(records: Sequence[Record], cells: Sequence[Cell] | None = None) -> list[str]:
    """The models' names, in the order of `cells` where given, else by name."""
    rank = _rank(c.model for c in cells) if cells is not None else {}
    return sorted({r.cell.model for r in records}, key=lambda m: (rank.get(m, len(rank)), m))


def scale_notes(records: Sequence[Record]) -> list[str]:
    """What every table and plot says of its scales."""
    notes = []
    cells = {(r.cell.task, r.cell.scale, r.cell.scale_note): r.cell for r in records}
    for scale in dict.fromkeys(c.scale for c in cells.values()):
        if scale != "paper":
            notes.append(f"{scale} scale: not the paper's.")
        notes += [
            f"{c.task}, {scale} scale: {c.scale_note}"
            for c in cells.values()
            if c.scale == scale and c.scale_note
        ]
    return notes + _truncated(records) + _stopped(records) + _moved(records)


def device_of(environment: Mapping[str, Any]) -> str:
    """Device, or processor and threads."""
    device = str(environment.get("device", "unknown"))
    if device != "cpu":
        return device
    threads = environment.get("threads")
    return str(environment.get("processor") or "cpu") + (
        f", {threads} thread{'' if threads == 1 else 's'}" if threads else ""
    )


def _stopped(records: Sequence[Record]) -> list[str]:
    """Which cells were tested before their last step."""
    cells: dict[str, list[str]] = {}
    for r in records:
        if r.status == "stopped":
            at = f"{_in_task(r)} at step {r.steps_done:,} of {r.cell.train.steps:,}"
            cells.setdefault(f"{r.cell.task}, {r.cell.scale} scale", []).append(at)
    return [
        f"{where}: stopped, not by solution, and tested there: {', '.join(ats)}."
        for where, ats in cells.items()
    ]


def _moved(records: Sequence[Record]) -> list[str]:
    """Which cells were trained on several devices, one after another."""
    cells: dict[tuple[str, ...], list[tuple[str, list[int]]]] = {}
    for r in records:
        ends: list[tuple[str, int]] = []
        for sitting in r.environment.get("sittings", ()):
            if ends and ends[-1][0] == device_of(sitting):
                ends.pop()
            ends.append((device_of(sitting), sitting["to_step"]))
        if len(ends) > 1:
            key = (f"{r.cell.task}, {r.cell.scale} scale", *(device for device, _ in ends))
            cells.setdefault(key, []).append((_in_task(r), [step for _, step in ends]))
    return [
        f"{where}: trained on {', then '.join(devices)}, from step "
        + ", ".join(f"{' and '.join(f'{s:,}' for s in steps[:-1])} ({n})" for n, steps in some)
        + "; seconds are those of all."
        for (where, *devices), some in cells.items()
    ]


def _in_task(record: Record) -> str:
    return record.cell.label.removeprefix(f"{record.cell.task}/")


def _truncated(records: Sequence[Record]) -> list[str]:
    """Whose gradients are not those of the whole sequence."""
    models: dict[tuple[str, str, int | None], set[str]] = {}
    for cell in (r.cell for r in records):
        if cell.train.segment_gradients == "truncated":
            key = (cell.task, cell.scale, cell.train.segment_length)
            models.setdefault(key, set()).add(cell.model)
    return [
        f"{task}, {scale} scale: truncated gradients, cut every {segment} tokens: "
        f"{', '.join(sorted(names))}."
        for (task, scale, segment), names in models.items()
    ]


def is_share(metric: str) -> bool:
    """Whether the metric is a share of 0 to 1 that is printed in per cent."""
    return metric == "accuracy" or metric.endswith("_accuracy")


def estimate(values: Sequence[float], metric: str = "") -> Estimate | None:
    """Mean and 95 % interval: Student's t up to T_SEEDS values, the percentile bootstrap above.

    A share's interval ends at 0 and 1.
    """
    n = len(values)
    if n == 0:
        return None
    mean = math.fsum(values) / n
    if n == 1:
        return Estimate(mean=mean, low=None, high=None, count=1)
    if n > T_SEEDS:
        low, high = _bootstrap(tuple(values))
        return Estimate(mean=mean, low=low, high=high, count=n)
    deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1))
    half = t_quantile(n - 1) * deviation / math.sqrt(n)
    low, high = mean - half, mean + half
    cut = is_share(metric) and (low < 0 or high > 1)
    if cut:
        low, high = max(0.0, low), min(1.0, high)
    return Estimate(mean=mean, low=low, high=high, count=n, cut=cut)


@cache
def t_quantile(freedom: int) -> float:
    """t with P(|T| < t) = 95 % at so many degrees of freedom, by bisection."""
    low, high = 0.0, 100.0
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        if _t_within(middle, freedom) < CONFIDENCE:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def best(row: Row) -> str | None:
    """The model whose interval is clear of every other's, on the better side; None without such."""
    if row.example is None or len(row.groups) < 2:
        return None
    scores = {m: g.score for m, g in row.groups.items() if g.score is not None}
    sign = 1 if row.example.higher_is_better else -1
    if len(scores) < 2 or any(s.low is None for s in scores.values()):
        return None
    winner = max(scores, key=lambda m: sign * scores[m].mean)
    others = [s for m, s in scores.items() if m != winner]
    clear = all(_worst_end(scores[winner], sign) > -_worst_end(s, -sign) for s in others)
    return winner if clear else None


def slug(*parts: str) -> str:
    """Lower-case words joined by dashes; a hash where characters were lost or it grew long."""
    text = "-".join(p for p in parts if p)
    plain = re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.")
    if re.fullmatch(r"[a-z0-9.-]{1,80}", text):
        return text
    return f"{plain[:70]}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"


def _groups(records: Sequence[Record]) -> list[Group]:
    """Records that differ in the seed alone, together; sorted by model and settings."""
    found: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        cell = record.cell
        configs = json.dumps([cell.task_config, cell.model_config, cell.code], sort_keys=True)
        names = (cell.task, cell.model, cell.scale)
        key = (*names, configs, repr(cell.train), cell.data_fingerprint, cell.results_version)
        found.setdefault(key, []).append(record)
    return [
        Group(
            task=members[0].cell.task,
            model=members[0].cell.model,
            scale=members[0].cell.scale,
            settings=flat_settings(members[0].cell),
            records=tuple(sorted(members, key=lambda r: r.cell.seed)),
        )
        for _, members in sorted(found.items())
    ]


def flat_settings(cell: Cell) -> dict[str, Any]:
    """Everything that affects a cell's result but for its seed: "train.steps" -> 500."""
    sections = {
        "task": cell.task_config,
        "model": cell.model_config,
        "train": to_plain(cell.train),
    }
    flat = {f"{s}.{key}": value for s, values in sections.items() for key, value in values.items()}
    flat |= {f"{part}.code": digest[:8] for part, digest in cell.code.items()}
    return flat | {"data": cell.data_fingerprint[:8], "results_version": cell.results_version}


def _split(groups: Sequence[Group]) -> list[Row]:
    """The rows of one task at one scale."""
    task_keys = [k for k in _differing(groups) if not k.startswith(("model.", "train."))]
    keys = list(task_keys)
    for model in dict.fromkeys(g.model for g in groups):
        keys += [k for k in _differing([g for g in groups if g.model == model]) if k not in keys]
    keys = [k for k in (*task_keys, *_FIRST, *keys) if k in keys]
    keys = list(dict.fromkeys(keys))
    found: dict[Hashable, dict[str, Group]] = {}
    for group in groups:
        found.setdefault(_values(group, keys), {})[group.model] = group
    examples = [next(iter(by_model.values())) for by_model in found.values()]
    shown, shown_task = _telling(examples, keys), _telling(examples, task_keys)
    made = [
        Row(
            task=example.task,
            scale=example.scale,
            setting=setting,
            task_setting=task_setting,
            groups=by_model,
        )
        for example, by_model, setting, task_setting in zip(
            examples,
            found.values(),
            _labels(examples, shown),
            _labels(examples, shown_task),
            strict=True,
        )
    ]
    order = {
        id(row): [_sort_key(e.settings.get(k)) for k in shown] for row, e in zip(made, examples)
    }
    return sorted(made, key=lambda row: order[id(row)])


def _differing(groups: Sequence[Group]) -> list[str]:
    keys = dict.fromkeys(k for g in groups for k in g.settings)
    return [k for k in keys if len({_values(g, [k]) for g in groups}) > 1]


def _telling(groups: Sequence[Group], keys: Sequence[str]) -> list[str]:
    """The first few of the keys that tell the groups as far apart as all of them do."""
    chosen: list[str] = []
    for key in keys:
        parts = len({_values(g, chosen) for g in groups})
        if parts == len({_values(g, keys) for g in groups}):
            break
        if len({_values(g, [*chosen, key]) for g in groups}) > parts:
            chosen.append(key)
    return chosen


def _values(group: Group, keys: Iterable[str]) -> tuple[str, ...]:
    return tuple(group.keyed.get(k, "null") for k in keys)


def _labels(groups: Sequence[Group], keys: Sequence[str]) -> list[str]:
    """What the settings are, long lists by their ends where that still tells the groups apart."""
    whole, short = ([_label(g, keys, some) for g in groups] for some in (False, True))
    return short if len(set(short)) == len(set(whole)) else whole


def _label(group: Group, keys: Sequence[str], short: bool) -> str:
    texts = []
    for key in keys:
        value = group.settings.get(key)
        text = value if isinstance(value, str) else json.dumps(value)
        if short and isinstance(value, list | tuple) and len(value) > SHOWN_OF_LIST:
            text = f"{len(value)}: {json.dumps(value[0])} to {json.dumps(value[-1])}"
        texts.append(f"{key}={text}")
    return ", ".join(texts)


def _sort_key(value: Any) -> tuple[int, float, str]:
    if isinstance(value, int | float):
        return (0, float(value), "")
    return (1, 0.0, json.dumps(value, sort_keys=True))


def _rank(names: Iterable[str]) -> dict[str, int]:
    return {name: i for i, name in enumerate(dict.fromkeys(names))}


def _worst_end(score: Estimate, sign: int) -> float:
    """The interval's worse end, turned so that more is better; sign is -1 where less is better."""
    assert score.low is not None and score.high is not None
    return min(sign * score.low, sign * score.high)


def _t_within(t: float, freedom: int) -> float:
    """P(|T| < t) for Student's t: the finite series of Abramowitz & Stegun 26.7.3 and 26.7.4."""
    angle = math.atan(t / math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    term = cosine if odd else 1.0
    total = term if freedom > 1 else 0.0
    for k in range(2 + odd, freedom - 1, 2):
        term *= cosine * cosine * (k - 1) / k
        total += term
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


@cache
def _bootstrap(values: tuple[float, ...]) -> tuple[float, float]:
    import numpy as np

    sample = np.asarray(values)
    drawn = np.random.default_rng(0).integers(len(sample), size=(RESAMPLES, len(sample)))
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(sample[drawn].mean(1), [tail, 1 - tail])
    return float(low), float(high)
