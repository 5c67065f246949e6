"""Verdicts: a grid's rows against the bands it declares, the paper's numbers in a column apart.

What a grid declares, and the file it is read from: `seqbench.suite.expectation`.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from seqbench.suite.expectation import (
    DeclaredRow,
    declared_files,
    family,
    load_declared,
)
from seqbench.suite.records import Record
from seqbench.suite.report.aggregate import (
    T_SEEDS,
    Estimate,
    estimate,
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
    score_text,
)


@dataclass(frozen=True, kw_only=True)
class Line:
    """One row that a grid declares, with the records that answer to it, whatever their status."""

    row: DeclaredRow
    records: tuple[Record, ...]

    @cached_property
    def values(self) -> tuple[float, ...]:
        """The metric of every seed that has it."""
        found = []
        for record in self.records:
            label = self.row.variant
            metrics = record.variants.get(label, {}) if label else record.test
            if self.row.metric in metrics:
                found.append(float(metrics[self.row.metric]))
        return tuple(found)

    @property
    def median(self) -> float | None:
        return statistics.median(self.values) if self.values else None

    @property
    def score(self) -> Estimate | None:
        """Mean and interval over the seeds."""
        return estimate(self.values, self.row.metric)

    def holds(self, value: float) -> bool:
        """Whether a value lies in the band."""
        low, high = self.row.low, self.row.high
        return (low is None or value >= low) and (high is None or value <= high)

    @property
    def banded(self) -> bool:
        return self.row.low is not None or self.row.high is not None

    @property
    def verdict(self) -> str:
        """inside, below, above; or why there is none: not run, failed, stopped, no band."""
        median = self.median
        if median is None:
            reasons = [r.status for r in self.records if r.status != "done"]
            if any(self.row.variant in r.stopped for r in self.records):
                return "stopped"
            return "/".join(dict.fromkeys(reasons)) if reasons else "not run"
        if not self.banded:
            return "no band"
        if self.holds(median):
            return "inside"
        return "below" if self.row.low is not None and median < self.row.low else "above"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """A grid at one scale against its bands."""

    grid: str  # the stem of the file that declares it: table1-cpu
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
        return f"verdict-{slug(self.grid)}"


def verdicts(results: Path, records: Sequence[Record], grid: str | None = None) -> list[Verdict]:
    """The verdicts of a grid, or of all that ran into `results`, as far as there are records."""
    families: dict[str, list[Record]] = {}
    files = declared_files(results)
    for record in records if files else ():
        families.setdefault(family(record.cell), []).append(record)
    made = []
    for path in files:
        declared = load_declared(path)
        if grid is not None and not path.stem.startswith(Path(grid).stem):
            continue
        lines = tuple(
            Line(row=row, records=tuple(families.get(row.cell, ()))) for row in declared.rows
        )
        if any(line.records for line in lines):
            made.append(
                Verdict(grid=path.stem, title=declared.title, scale=declared.scale, lines=lines)
            )
    return made


def table(verdict: Verdict) -> Table:
    """Row by row: ours, the paper's in a column of its own, the band, inside it or not."""
    lines = verdict.lines
    records = verdict.records
    metrics = {line.row.metric for line in lines}
    variants = any(line.row.variant for line in lines)
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
                Entry(text=line.row.name),
                *([Entry(text=line.row.variant or "test")] if variants else []),
                *([] if one else [Entry(text=metric_label(line.row.metric))]),
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
    return metric_text(value, metric)


def _ours(line: Line) -> tuple[Entry, Entry, Entry]:
    median, score = line.median, line.score
    bad = [r.status for r in line.records if r.status != "done"]
    detail = f"{len(bad)} of {len(line.records)} {'/'.join(dict.fromkeys(bad))}" if bad else ""
    if median is None or score is None:
        return Entry(text=NOTHING, detail=detail), Entry(text=NOTHING), Entry(text=NOTHING)
    return (
        Entry(text=metric_text(median, line.row.metric), value=median, detail=detail),
        Entry(text=score_text(score, line.row.metric), value=score.mean),
        _share(_in_band(line)),
    )


def _in_band(line: Line) -> tuple[int, int] | None:
    """k of n seeds; one without a result is outside."""
    if not line.banded or not line.records:
        return None
    return sum(line.holds(v) for v in line.values), len(line.records)


def _solved(line: Line) -> tuple[int, int] | None:
    if line.row.variant or not line.records:
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
    low, high, metric = line.row.low, line.row.high, line.row.metric
    if low is not None and high is not None:
        return f"{metric_text(low, metric)} to {metric_text(high, metric)}"
    if low is not None:
        return f"≥ {metric_text(low, metric)}"
    return NOTHING if high is None else f"≤ {metric_text(high, metric)}"


def _judged(line: Line) -> Entry:
    mark = {"inside": "✓ ", "below": "✗ ", "above": "✗ "}.get(line.verdict, "")
    return Entry(text=mark + line.verdict)


def _paper(line: Line) -> Entry:
    value = line.row.paper
    number = None if isinstance(value, str) else value
    return Entry(text=paper_text(value, line.row.metric), value=number)


def _notes(verdict: Verdict) -> list[str]:
    counts = sorted({len(line.values) for line in verdict.lines if len(line.values) > 1})
    notes = []
    if counts:
        how = ["Student's t"] if counts[0] <= T_SEEDS else []
        how += ["the percentile bootstrap"] if counts[-1] > T_SEEDS else []
        seeds = "/".join(map(str, counts))
        notes.append(
            f"Over {seeds} seeds: the median, which the band is for, and the mean ± half its 95 % "
            f"interval ({', '.join(how)}), or with its ends where one stops at 0 or 100 %."
        )
    if any(len(line.values) == 1 for line in verdict.lines):
        notes.append("A number without ± is from one seed: no interval.")
    stopped: dict[str, str] = {}  # row -> where first, and why
    for line in verdict.lines:
        reasons = [
            r.stopped[line.row.variant] for r in line.records if line.row.variant in r.stopped
        ]
        if line.verdict == "stopped" and reasons:
            stopped.setdefault(line.row.name, f"at {line.row.variant}: {reasons[0]}")
    notes += [f"{name} stopped {where}." for name, where in stopped.items()]
    notes += [
        f"The paper's (its scale, data and code, no part of the verdict): {source}."
        for source in dict.fromkeys(line.row.source for line in verdict.lines if line.row.source)
    ]
    return notes


def _tidy(verdict: Verdict, line: Line) -> Mapping[str, Any]:
    score, solved, in_band = line.score, _solved(line), _in_band(line)
    return {
        "grid": verdict.grid,
        "scale": verdict.scale,
        "row": line.row.name,
        "test_set": line.row.variant or "test",
        "metric": line.row.metric,
        "median": line.median,
        "mean": None if score is None else score.mean,
        "low": None if score is None else score.low,
        "high": None if score is None else score.high,
        "seeds": len(line.values),
        "seeds_run": len(line.records),
        "seeds_in_band": None if in_band is None else in_band[0],
        "solved": None if solved is None else solved[0],
        "parameters": _parameters(line).value,
        "band_low": line.row.low,
        "band_high": line.row.high,
        "verdict": line.verdict,
        "paper": line.row.paper,
        "digests": " ".join(sorted(r.digest for r in line.records)),
    }
