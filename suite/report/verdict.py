"""Verdicts: a grid's rows against the bands it declares, the paper's numbers in a column apart.

What a grid declares: `seqbench.suite.expectation`.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from seqbench.suite import discovery
from seqbench.suite.expectation import Expected
from seqbench.suite.experiment import UserError
from seqbench.suite.records import Record
from seqbench.suite.report import paper
from seqbench.suite.report.aggregate import (
    T_SEEDS,
    Estimate,
    estimate,
    flat_settings,
    scale_notes,
    slug,
)
from seqbench.suite.report.tables import (
    NOTHING,
    Column,
    Entry,
    Table,
    compact,
    metric_label,
    metric_text,
    provenance,
)


_SIZES = {"model.d_model", "model.num_layers"}


@dataclass(frozen=True, kw_only=True)
class Line:
    """One row that a grid expects, with the records that answer to it, whatever their status."""

    expected: Expected
    records: tuple[Record, ...]

    @property
    def metric(self) -> str:
        """What is judged; "" where no record says."""
        return self.expected.metric or next((r.headline for r in self.records if r.headline), "")

    @cached_property
    def values(self) -> tuple[float, ...]:
        """The metric of every seed that has it."""
        found = []
        for record in self.records:
            label = self.expected.variant
            metrics = record.variants.get(label, {}) if label else record.test
            if self.metric in metrics:
                found.append(float(metrics[self.metric]))
        return tuple(found)

    @property
    def median(self) -> float | None:
        return statistics.median(self.values) if self.values else None

    @property
    def score(self) -> Estimate | None:
        """Mean and interval over the seeds."""
        return estimate(self.values)

    def holds(self, value: float) -> bool:
        """Whether a value lies in the band."""
        low, high = self.expected.low, self.expected.high
        return (low is None or value >= low) and (high is None or value <= high)

    @property
    def banded(self) -> bool:
        return self.expected.low is not None or self.expected.high is not None

    @property
    def verdict(self) -> str:
        """inside, below, above; or why there is none: not run, failed, stopped, no band."""
        median = self.median
        if median is None:
            reasons = [r.status for r in self.records if r.status != "done"]
            if any(self.expected.variant in r.stopped for r in self.records):
                return "stopped"
            return "/".join(dict.fromkeys(reasons)) if reasons else "not run"
        if not self.banded:
            return "no band"
        if self.holds(median):
            return "inside"
        return "below" if self.expected.low is not None and median < self.expected.low else "above"

    @property
    def paper(self) -> float | str | None:
        """The paper's number in the metric's unit, or in words; NaN: did not fit in its memory."""
        given = self.expected.paper
        options = {k for k in self.expected.request.settings if k.startswith("model.")} - _SIZES
        if given is not None or not self.records or options:  # another model than the paper's
            return given
        cell = self.records[0].cell
        label, _, at = self.expected.variant.partition("=")
        for series in paper.series_for(cell.task, cell.model):
            if series.metric != self.metric:
                continue
            if series.axis == "test length":
                length = at if label == "length" else cell.task_config.get("length")
                if length is not None and int(length) in series.values:
                    return series.values[int(length)]
            elif not self.expected.variant and len(series.values) == 1:
                return next(iter(series.values.values()))
        return None


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """A grid at one scale against its bands."""

    grid: str
    title: str
    scale: str
    lines: tuple[Line, ...]

    @property
    def records(self) -> list[Record]:
        """All that it was drawn from, once each."""
        return list({r.digest: r for line in self.lines for r in line.records}.values())

    @property
    def name(self) -> str:
        """Of its files."""
        return f"verdict-{slug(Path(self.grid).stem, self.scale)}"

    @property
    def bands(self) -> str:
        """Everything the grid declares, as text: a report is stale once it changes."""
        return repr([line.expected for line in self.lines])


def verdicts(records: Sequence[Record], grid: str | None = None) -> list[Verdict]:
    """The verdicts of a grid, or of every grid found, at each scale that the records have."""
    made = []
    scales = list(dict.fromkeys(r.cell.scale for r in records))
    for name in [grid] if grid is not None else discovery.grid_names():
        try:
            module = discovery.grid_module(name)
        except UserError:
            continue  # a broken or absent grid file is no matter of the records
        if not callable(getattr(module, "expected", None)):
            continue
        summary = (module.__doc__ or name).strip().splitlines()[0].rstrip(".")
        for scale in scales:
            lines = _lines(module.expected(scale), [r for r in records if r.cell.scale == scale])
            if any(line.records for line in lines):
                title = str(getattr(module, "TITLE", summary))
                made.append(Verdict(grid=name, title=title, scale=scale, lines=lines))
    return made


def table(verdict: Verdict) -> Table:
    """Row by row: ours, the paper's in a column of its own, the band, inside it or not."""
    lines = verdict.lines
    records = verdict.records
    metrics = {line.metric for line in lines if line.metric}
    variants = any(line.expected.variant for line in lines)
    solved = any(r.cell.train.stop_at is not None for r in records)
    one = next(iter(metrics)) if len(metrics) == 1 else ""
    unit = f" ({metric_label(one)})" if one else ""
    columns = (
        Column(heading="row"),
        *([Column(heading="test set")] if variants else []),
        *([] if one else [Column(heading="metric")]),
        Column(heading="our median", numeric=True),
        Column(heading="our mean", numeric=True),
        Column(heading="seeds in band", numeric=True),
        *([Column(heading="solved", numeric=True)] if solved else []),
        Column(heading="parameters", numeric=True),
        Column(heading="band"),
        Column(heading="verdict"),
        Column(heading="paper's", numeric=True),
    )
    rows, tidy = [], []
    for line in lines:
        rows.append(
            (
                Entry(text=line.expected.name),
                *([Entry(text=line.expected.variant or "test")] if variants else []),
                *([] if one else [Entry(text=metric_label(line.metric) if line.metric else "")]),
                *_ours(line),
                *([_share(_solved(line))] if solved else []),
                _parameters(line),
                Entry(text=_band(line)),
                _judged(line),
                _paper(line),
            )
        )
        tidy.append(_tidy(verdict, line))
    judged = [line for line in lines if line.banded and line.values]
    inside = sum(line.verdict == "inside" for line in judged)
    banded = sum(line.banded for line in lines)
    open_rows = banded - len(judged)
    note = f"{inside} of {banded} banded rows inside their band" + (
        f", {open_rows} without results." if open_rows else "."
    )
    scale = "the paper's scale" if verdict.scale == "paper" else f"{verdict.scale} scale"
    return Table(
        name=verdict.name,
        title=f"{verdict.title}: verdict at {scale}"
        + ("" if verdict.scale == "paper" else " (not the paper's)")
        + unit,
        columns=columns,
        rows=tuple(rows),
        notes=(note, *_notes(verdict), *scale_notes(records), provenance(records)),
        digests=tuple(sorted(r.digest for r in records)),
        tidy=tuple(tidy),
    )


def paper_text(value: float | str | None, metric: str) -> str:
    """99.8, oom, words, or nothing."""
    if value is None:
        return NOTHING
    if isinstance(value, str):
        return value
    return "oom" if math.isnan(value) else metric_text(value, metric)


def _lines(expected: Iterable[Expected], records: Sequence[Record]) -> tuple[Line, ...]:
    """Every row with its records: each record goes to the request that says most of it."""
    rows = list(expected)
    requests = {_key(e): e for e in rows}
    found: dict[str, list[Record]] = {}
    for record in records:
        cell = record.cell
        settings = None
        best: tuple[int, str] | None = None
        for key, e in requests.items():
            r = e.request
            if (r.task, r.model, r.scale) != (cell.task, cell.model, cell.scale):
                continue
            settings = settings or {k: _json(v) for k, v in flat_settings(cell).items()}
            fits = all(settings.get(k) == _json(v) for k, v in r.settings.items())
            if fits and (best is None or len(r.settings) > best[0]):
                best = len(r.settings), key
        if best is not None:
            found.setdefault(best[1], []).append(record)
    return tuple(Line(expected=e, records=tuple(found.get(_key(e), ()))) for e in rows)


def _key(expected: Expected) -> str:
    r = expected.request
    return _json([r.task, r.model, r.scale, dict(r.settings)])


def _json(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        value = float(value)  # 1 and 1.0 are one setting
    return json.dumps(value, sort_keys=True)


def _ours(line: Line) -> tuple[Entry, Entry, Entry]:
    median, score = line.median, line.score
    bad = [r.status for r in line.records if r.status != "done"]
    detail = f"{len(bad)} of {len(line.records)} {'/'.join(dict.fromkeys(bad))}" if bad else ""
    if median is None or score is None:
        return Entry(text=NOTHING, detail=detail), Entry(text=NOTHING), Entry(text=NOTHING)
    half = score.half_width
    mean = metric_text(score.mean, line.metric)
    return (
        Entry(text=metric_text(median, line.metric), value=median, detail=detail),
        Entry(
            text=mean if half is None else f"{mean} ± {metric_text(half, line.metric)}",
            value=score.mean,
        ),
        _share(_in_band(line)),
    )


def _in_band(line: Line) -> tuple[int, int] | None:
    """k of n seeds; one without a result is outside."""
    if not line.banded or not line.records:
        return None
    return sum(line.holds(v) for v in line.values), len(line.records)


def _solved(line: Line) -> tuple[int, int] | None:
    if line.expected.variant or not line.records:
        return None
    if line.records[0].cell.train.stop_at is None:
        return None
    return sum(r.solved_at is not None for r in line.records), len(line.records)


def _share(counts: tuple[int, int] | None) -> Entry:
    if counts is None:
        return Entry(text=NOTHING)
    return Entry(text=f"{counts[0]} of {counts[1]}", value=counts[0] / counts[1])


def _parameters(line: Line) -> Entry:
    value = next((r.cost.parameters for r in line.records if r.cost is not None), None)
    return Entry(text=NOTHING if value is None else compact(value), value=value)


def _band(line: Line) -> str:
    low, high, metric = line.expected.low, line.expected.high, line.metric
    if low is not None and high is not None:
        return f"{metric_text(low, metric)} to {metric_text(high, metric)}"
    if low is not None:
        return f"≥ {metric_text(low, metric)}"
    return NOTHING if high is None else f"≤ {metric_text(high, metric)}"


def _judged(line: Line) -> Entry:
    mark = {"inside": "✓ ", "below": "✗ ", "above": "✗ "}.get(line.verdict, "")
    return Entry(text=mark + line.verdict)


def _paper(line: Line) -> Entry:
    value = line.paper
    number = value if isinstance(value, int | float) and not math.isnan(value) else None
    return Entry(text=paper_text(value, line.metric), value=number)


def _notes(verdict: Verdict) -> list[str]:
    counts = sorted({len(line.values) for line in verdict.lines if len(line.values) > 1})
    notes = []
    if counts:
        how = ["Student's t"] if counts[0] <= T_SEEDS else []
        how += ["the percentile bootstrap"] if counts[-1] > T_SEEDS else []
        seeds = "/".join(map(str, counts))
        notes.append(
            f"Over {seeds} seeds: the median, which the band is for, and the mean ± half its 95 % "
            f"interval ({', '.join(how)})."
        )
    if any(len(line.values) == 1 for line in verdict.lines):
        notes.append("A number without ± is from one seed: no interval.")
    stopped: dict[str, list[str]] = {}
    for line in verdict.lines:
        for record in line.records:
            reason = record.stopped.get(line.expected.variant)
            if reason is not None and line.verdict == "stopped":
                names = stopped.setdefault(reason, [])
                text = f"{line.expected.name} at {line.expected.variant}"
                names += [text] if text not in names else []
    notes += [f"Stopped: {', '.join(names)}: {reason}." for reason, names in stopped.items()]
    cells = {(r.cell.task, r.cell.model) for r in verdict.records}
    used = {s.source: s for task, model in sorted(cells) for s in paper.series_for(task, model)}
    if any(isinstance(line.paper, float) and line.expected.paper is None for line in verdict.lines):
        notes += [
            f"The paper's (its scale, data and code, no part of the verdict): {s.source}, "
            f"{s.setting}."
            for s in used.values()
        ]
    return notes


def _tidy(verdict: Verdict, line: Line) -> Mapping[str, Any]:
    score, solved, in_band = line.score, _solved(line), _in_band(line)
    value = line.paper
    return {
        "grid": verdict.grid,
        "scale": verdict.scale,
        "row": line.expected.name,
        "test_set": line.expected.variant or "test",
        "metric": line.metric,
        "median": line.median,
        "mean": None if score is None else score.mean,
        "low": None if score is None else score.low,
        "high": None if score is None else score.high,
        "seeds": len(line.values),
        "seeds_run": len(line.records),
        "seeds_in_band": None if in_band is None else in_band[0],
        "solved": None if solved is None else solved[0],
        "parameters": _parameters(line).value,
        "band_low": line.expected.low,
        "band_high": line.expected.high,
        "verdict": line.verdict,
        "paper": "oom" if isinstance(value, float) and math.isnan(value) else value,
        "digests": " ".join(sorted(r.digest for r in line.records)),
    }
