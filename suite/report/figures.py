"""The figures that grids declare, with their records: points, power laws, and a table of both.

What a grid declares: `seqbench.suite.figures`; the plot: `seqbench.suite.report.plots.against_x`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from seqbench.suite.expectation import declared_files, family, load_declared
from seqbench.suite.experiment import UserError
from seqbench.suite.figures import COSTS, DeclaredFigure, x_label
from seqbench.suite.records import Record
from seqbench.suite.report.aggregate import (
    Estimate,
    estimate,
    flat_settings,
    scale_notes,
    slug,
    t_quantile,
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
class Point:
    """One cell of a line over its seeds."""

    x: float
    score: Estimate
    seeds: tuple[tuple[float, float], ...]  # (x, value) of each
    records: tuple[Record, ...]


@dataclass(frozen=True, kw_only=True)
class PowerLaw:
    """y = c x^-k, by least squares of log y on log x over all seeds."""

    c: float
    k: float
    half_width: float | None  # of the 95 % interval of k, by Student's t; None from two points

    def at(self, x: float) -> float:
        return self.c * x**-self.k

    @property
    def text(self) -> str:
        """k with its uncertainty."""
        return f"{self.k:.3f}" + ("" if self.half_width is None else f" ± {self.half_width:.3f}")


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One of our lines."""

    name: str
    points: tuple[Point, ...]  # by x

    @cached_property
    def law(self) -> PowerLaw | None:
        return power_law([pair for point in self.points for pair in point.seeds])


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """A figure with its records."""

    grid: str  # the stem of the file that declares it: piano-length-cpu
    scale: str
    figure: DeclaredFigure
    curves: tuple[Curve, ...]

    @property
    def records(self) -> list[Record]:
        return [r for curve in self.curves for point in curve.points for r in point.records]

    @property
    def name(self) -> str:
        """Of its files."""
        return f"figure-{slug(self.figure.name, self.scale)}"

    @property
    def label(self) -> str:
        """Of the x axis."""
        return x_label(self.figure)


def figures(results: Path, records: Sequence[Record], grid: str | None = None) -> list[Drawn]:
    """The figures of a grid, or of all that ran into `results`, as far as there are records."""
    files = declared_files(results)
    families: dict[str, list[Record]] = {}
    for record in records if files else ():
        if record.has_results:
            families.setdefault(family(record.cell), []).append(record)
    made = []
    for path in files:
        declared = load_declared(path)
        if grid is not None and not path.stem.startswith(Path(grid).stem):
            continue
        for figure in declared.figures:
            curves = [
                Curve(
                    name=line.name,
                    points=tuple(
                        sorted(
                            (
                                point
                                for cell in line.cells
                                if (point := _point(figure, families.get(cell, []))) is not None
                            ),
                            key=lambda p: p.x,
                        )
                    ),
                )
                for line in figure.lines
            ]
            if any(curve.points for curve in curves):
                made.append(
                    Drawn(
                        grid=path.stem,
                        scale=declared.scale,
                        figure=figure,
                        curves=tuple(c for c in curves if c.points),
                    )
                )
    return made


def power_law(pairs: Sequence[tuple[float, float]]) -> PowerLaw | None:
    """Through (x, y) pairs, all positive; None with fewer than two different x."""
    found = [(math.log(x), math.log(y)) for x, y in pairs if x > 0 and y > 0]
    n = len(found)
    if len({x for x, _ in found}) < 2:
        return None
    mean_x = math.fsum(x for x, _ in found) / n
    mean_y = math.fsum(y for _, y in found) / n
    spread = math.fsum((x - mean_x) ** 2 for x, _ in found)
    slope = math.fsum((x - mean_x) * (y - mean_y) for x, y in found) / spread
    half = None
    if n > 2:
        left = math.fsum((y - mean_y - slope * (x - mean_x)) ** 2 for x, y in found)
        half = t_quantile(n - 2) * math.sqrt(left / (n - 2) / spread)
    return PowerLaw(c=math.exp(mean_y - slope * mean_x), k=-slope, half_width=half)


def table(drawn: Drawn) -> Table:
    """Every point of ours and of the paper's, in columns apart."""
    figure = drawn.figure
    metric = figure.metric
    rows, tidy = [], []
    for curve in drawn.curves:
        for point in curve.points:
            text = score_text(point.score, metric)
            size = next((r.cost.parameters for r in point.records if r.cost is not None), None)
            rows.append(
                (
                    Entry(text=curve.name),
                    Entry(text=_x_text(point.x), value=point.x),
                    Entry(text=text, value=point.score.mean),
                    Entry(text=NOTHING),
                    Entry(text=str(point.score.count), value=point.score.count),
                    Entry(text=NOTHING if size is None else compact(size), value=size),
                )
            )
            tidy.append(
                {
                    "whose": "ours",
                    "series": curve.name,
                    "x": figure.x,
                    "at": point.x,
                    "metric": metric,
                    "value": point.score.mean,
                    "low": point.score.low,
                    "high": point.score.high,
                    "seeds": point.score.count,
                    "scale": drawn.scale,
                    "source": " ".join(r.digest for r in point.records),
                }
            )
    for line in figure.paper:
        for x, value in line.points:
            rows.append(
                (
                    Entry(text=f"paper: {line.name}"),
                    Entry(text=_x_text(x), value=x),
                    Entry(text=NOTHING),
                    Entry(text=metric_text(value, line.metric or metric), value=value),
                    Entry(text=NOTHING),
                    Entry(text=NOTHING),
                )
            )
            tidy.append(
                {
                    "whose": "paper",
                    "series": line.name,
                    "x": figure.x,
                    "at": x,
                    "metric": line.metric or metric,
                    "value": value,
                    "low": None,
                    "high": None,
                    "seeds": None,
                    "scale": "the paper's",
                    "source": line.source,
                }
            )
    theirs = {line.metric or metric for line in figure.paper} - {metric}
    their_unit = f" ({', '.join(metric_label(m) for m in sorted(theirs))})" if theirs else ""
    records = drawn.records
    on = f" on {figure.variant}" if figure.variant else ""
    return Table(
        name=drawn.name,
        title=f"{figure.title}{on} ({metric_label(metric)})",
        columns=(
            Column(heading="series"),
            Column(heading=drawn.label, numeric=True),
            Column(heading="ours", numeric=True),
            Column(heading="paper's" + their_unit, numeric=True),
            Column(heading="seeds", numeric=True),
            Column(heading="parameters", numeric=True),
        ),
        rows=tuple(rows),
        notes=(*notes(drawn), *scale_notes(records), provenance(records)),
        digests=tuple(sorted({r.digest for r in records})),
        tidy=tuple(tidy),
    )


def notes(drawn: Drawn) -> list[str]:
    """The power laws, and where the paper's numbers come from."""
    said = []
    if drawn.figure.fit:
        laws = [f"{c.name}: {c.law.text}" for c in drawn.curves if c.law is not None]
        if laws:
            said.append(
                f"Power law y = c x^-k through all seeds, k with half its 95 % interval: "
                f"{'; '.join(laws)}."
            )
    for source in dict.fromkeys(line.source for line in drawn.figure.paper):
        lines = [line for line in drawn.figure.paper if line.source == source]
        settings = list(dict.fromkeys(line.setting for line in lines))
        said.append(
            f"The paper's own numbers, of its scale, data and code ({source}): "
            f"{' | '.join(settings)}."
        )
    return said


def _point(figure: DeclaredFigure, records: Sequence[Record]) -> Point | None:
    seeds, used = [], []
    for record in records:
        metrics = record.variants.get(figure.variant, {}) if figure.variant else record.test
        x = _x(figure.x, record)
        if figure.metric in metrics and x is not None:
            seeds.append((x, float(metrics[figure.metric])))
            used.append(record)
    score = estimate([y for _, y in seeds], figure.metric)
    if score is None:
        return None
    return Point(
        x=math.fsum(x for x, _ in seeds) / len(seeds),
        score=score,
        seeds=tuple(seeds),
        records=tuple(used),
    )


def _x(name: str, record: Record) -> float | None:
    if name == "train_flops":
        tokens = record.curve[-1].tokens if record.curve else None
        if record.cost is None or tokens is None:
            return None
        return 3 * record.cost.flops_per_token * tokens
    if name in COSTS:
        return None if record.cost is None else float(getattr(record.cost, name))
    value = flat_settings(record.cell).get(name)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
        raise UserError(
            f"a figure's x={name!r} is {value!r} in cell {record.cell.label}: must be a setting "
            f"that is a number, or one of {', '.join(COSTS)}"
        )
    return None if value is None else float(value)


def _x_text(value: float) -> str:
    return str(int(value)) if value == int(value) and value < 1e7 else compact(value)
