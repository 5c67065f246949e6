"""What a grid expects of its rows: the paper's number and the band that our median should lie in.

A grid file may define, beside `requests(scale)`,

    TITLE = "Table 1: selective copying by block and layer"     # of its verdict; optional

    def expected(scale: str) -> list[Expected]: ...

one Expected a row of its verdict table, in the table's order; none at a scale that has no bands.
Several rows may ask for the same cell. `seqbench run GRID` writes them to <results>/grids/ before
its first cell runs, each with the digest of its cell; `seqbench report` draws the verdict from that
file and the records, whatever their seeds. The same file holds what the grid draws: see
suite/figures.py.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from seqbench.suite.discovery import grid_module
from seqbench.suite.experiment import Cell, Request, UserError
from seqbench.suite.figures import DeclaredFigure, DeclaredLine, Figure
from seqbench.suite.records import write_atomically

OUT_OF_MEMORY = "oom"


@dataclass(frozen=True, kw_only=True)
class Expected:
    """One row of a grid's verdict. Numbers are in the metric's own unit: 0.95, not 95 %."""

    name: str  # of the row, as people read it: "Mamba block, S6"
    request: Request  # the very one that `requests(scale)` gives
    variant: str = ""  # a test variant ("length=1024") instead of the test set itself
    metric: str = ""  # a key of tasks.base.METRICS; "": the task's headline
    low: float | None = None  # the band for our median over seeds; None: open on that side
    high: float | None = None
    # The paper's number for the row: a number in the metric's unit, or words where its number is of
    # another unit or data ("8.71 perplexity on the Pile"). None: what suite/report/paper.py has for
    # the task, the model and the length, unless the request changes the model's options.
    paper: float | str | None = None


@dataclass(frozen=True, kw_only=True)
class DeclaredRow:
    """An Expected once its request is resolved."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", allow_inf_nan=False)

    name: str
    cell: str  # what `family` gives for the row's records
    variant: str
    metric: str
    low: float | None
    high: float | None
    paper: float | str | None
    source: str  # where the paper's number stands, and its setting


@dataclass(frozen=True, kw_only=True)
class Declared:
    """A grid's rows and figures at one scale, as they were declared when it ran."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    grid: str
    title: str
    scale: str
    rows: tuple[DeclaredRow, ...]
    figures: tuple[DeclaredFigure, ...] = ()


def family(cell: Cell) -> str:
    """The digest of a cell whatever its seed."""
    return cell.family


def declare(
    results: Path, grid: str, scale: str, assignments: Sequence[tuple[str, Any]] = ()
) -> None:
    """Writes <results>/grids/GRID-SCALE.json, if the grid has bands or figures at that scale."""
    from seqbench.suite.configuration import resolve  # imports torch

    module = grid_module(grid)
    expected: list[Expected] = getattr(module, "expected", lambda scale: [])(scale)
    figures: list[Figure] = getattr(module, "figures", lambda scale: [])(scale)
    if not expected and not figures:
        return
    name = Path(grid).stem
    summary = (module.__doc__ or name).strip().splitlines()[0].rstrip(".:")
    title = str(getattr(module, "TITLE", summary))
    if assignments:
        changes = ", ".join(f"{key}={value}" for key, value in assignments)
        title += f", with {changes}"
        name += f"-{hashlib.sha256(changes.encode()).hexdigest()[:6]}"
    rows = [_resolved(e, resolve(e.request, 0, assignments)) for e in expected]
    drawn = [_resolved_figure(f, assignments) for f in figures]
    declared = Declared(grid=grid, title=title, scale=scale, rows=tuple(rows), figures=tuple(drawn))
    path = results / "grids" / f"{name}-{scale}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(asdict(declared), indent=1, ensure_ascii=False, allow_nan=False)
    write_atomically(path, f"{text}\n".encode())


def declared_files(results: Path) -> list[Path]:
    """The files that `declare` wrote, by name."""
    return sorted(p for p in (results / "grids").glob("*.json") if not p.name.startswith("."))


def load_declared(path: Path) -> Declared:
    """What `declare` wrote; UserError for anything else."""
    try:
        return _adapter().validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise UserError(
            f"{path}: not what a grid declares ({type(error).__name__}); delete the file and run "
            "its grid again"
        ) from error


def _resolved(expected: Expected, cell: Cell) -> DeclaredRow:
    from seqbench.suite.discovery import task_class

    metric = expected.metric or task_class(cell.task).headline
    number, source = expected.paper, ""
    options = {k for k in expected.request.settings if k.startswith("model.")}
    if number is None and not options - {"model.d_model", "model.num_layers"}:
        number, source = _in_paper(cell, expected.variant, metric)
    return DeclaredRow(
        name=expected.name,
        cell=family(cell),
        variant=expected.variant,
        metric=metric,
        low=expected.low,
        high=expected.high,
        paper=number,
        source=source,
    )


def _resolved_figure(figure: Figure, assignments: Sequence[tuple[str, Any]]) -> DeclaredFigure:
    from seqbench.suite.configuration import resolve
    from seqbench.suite.discovery import task_class

    lines = [
        DeclaredLine(
            name=line.name,
            cells=tuple(family(resolve(request, 0, assignments)) for request in line.requests),
        )
        for line in figure.lines
    ]
    task = figure.lines[0].requests[0].task
    return DeclaredFigure(
        name=figure.name,
        title=figure.title,
        x=figure.x,
        x_label=figure.x_label,
        metric=figure.metric or task_class(task).headline,
        variant=figure.variant,
        fit=figure.fit,
        lines=tuple(lines),
        paper=figure.paper,
    )


def _in_paper(cell: Cell, variant: str, metric: str) -> tuple[float | str | None, str]:
    """The paper's number for a cell on a test variant, and where it stands."""
    from seqbench.suite.report.paper import series_for

    label, _, at = variant.partition("=")
    for series in series_for(cell.task, cell.model):
        if series.metric != metric:
            continue
        value = None
        if series.axis == "test length":
            length = at if label == "length" else cell.task_config.get("length")
            value = series.values.get(int(length)) if length is not None else None
        elif not variant and len(series.values) == 1:
            value = next(iter(series.values.values()))
        if value is not None:
            source = f"{series.source}, {series.setting}"
            return (OUT_OF_MEMORY if math.isnan(value) else value), source
    return None, ""


@cache
def _adapter() -> TypeAdapter[Declared]:
    return TypeAdapter(Declared)
