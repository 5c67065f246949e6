"""What a grid expects of its rows: the paper's number and the band that our median should lie in.

A grid file may define, beside `requests(scale)`,

    TITLE = "Table 1: selective copying by block and layer"     # of its verdict; optional

    def expected(scale: str) -> list[Expected]: ...

one Expected a row of its verdict table, in the table's order; none at a scale that has no bands.
`seqbench report` finds the records of each by the request's task, model, scale and settings,
whatever their seeds; of two rows that fit a record the one with more settings has it.
"""

from __future__ import annotations

from dataclasses import dataclass

from seqbench.suite.experiment import Request


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
