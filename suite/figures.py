"""What a grid draws: a score against a setting or a cost, one line a series, the paper's beside.

A grid file may define, beside `requests(scale)`,

    def figures(scale: str) -> list[Figure]: ...

as `suite/grids/piano_length.py` does. `seqbench run GRID` writes them to <results>/grids/ with what
the grid expects (suite/expectation.py), each point as the digest of its cell whatever its seed;
`seqbench report` draws them from that file and the records.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from pydantic import ConfigDict

from seqbench.suite.experiment import Request

# What `Figure.x` may be beside a setting ("task.length"), and how its axis is named.
COSTS = {
    "parameters": "parameters",
    "flops_per_token": "FLOPs per token, forward",
    "train_flops": "FLOPs of training",  # three forward passes of every token trained on
    "train_seconds": "seconds of training",
    "state_numbers": "numbers of state per sequence",
}
_STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)


@dataclass(frozen=True, kw_only=True)
class Line:
    """One series of ours: the cells whose scores are joined by a line, over their seeds."""

    name: str
    requests: tuple[Request, ...]  # each one that `requests(scale)` gives


@dataclass(frozen=True, kw_only=True)
class PaperLine:
    """One series of the paper's: hollow and dashed, never joined with ours."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    name: str
    points: tuple[tuple[float, float], ...]  # (x, value), in the unit of `metric`
    source: str  # where it stands: "Figure 7"
    setting: str  # its data and scale
    metric: str = ""  # a key of tasks.base.METRICS; "": the figure's
    beside: str = ""  # the line of ours whose colour it takes


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A plot with its table. The paper's series get a panel of their own where they lie far off."""

    name: str  # of its files: "piano-length"
    title: str
    x: str  # a setting ("task.length", "model.d_model") or a key of COSTS
    lines: tuple[Line, ...]
    paper: tuple[PaperLine, ...] = ()
    x_label: str = ""  # "": the setting's or the cost's name
    metric: str = ""  # a key of tasks.base.METRICS; "": the task's headline
    variant: str = ""  # a test variant ("length=32768") instead of the test set itself
    fit: bool = False  # a power law y = c x^-k through each of our lines, with the interval of k


@dataclass(frozen=True, kw_only=True)
class DeclaredLine:
    """A Line once its requests are resolved."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    name: str
    cells: tuple[str, ...]  # what `expectation.family` gives for the records of each point


@dataclass(frozen=True, kw_only=True)
class DeclaredFigure:
    """A Figure once its requests are resolved; fields as there."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    name: str
    title: str
    x: str
    x_label: str
    metric: str
    variant: str
    fit: bool
    lines: tuple[DeclaredLine, ...]
    paper: tuple[PaperLine, ...]


def paper_lines(source: str, beside: Mapping[str, str] | None = None) -> tuple[PaperLine, ...]:
    """The series of suite/report/paper.py from one of the paper's figures or tables, in its unit.

    `beside` names our line for a name of theirs.
    """
    from seqbench.suite.report.paper import SERIES

    found = [s for s in SERIES if s.source == source]
    assert found, source
    return tuple(
        PaperLine(
            name=s.name,
            points=tuple((float(x), y) for x, y in s.values.items() if not math.isnan(y)),
            source=s.source,
            setting="; ".join(p for p in (s.setting, s.remark) if p),
            metric=s.metric,
            beside=(beside or {}).get(s.name, ""),
        )
        for s in found
    )


def x_label(figure: DeclaredFigure) -> str:
    """How the axis is named."""
    if figure.x_label:
        return figure.x_label
    return COSTS.get(figure.x, figure.x.partition(".")[2].replace("_", " ") or figure.x)
