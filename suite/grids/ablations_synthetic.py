"""Tables 7 to 10, asked where a CPU can answer: what selective copying needs of S6.

mamba with Δ, B, C selective one by one, all and none (Table 7); A's initialisations (Table 8); the
rank of the map to Δ (Table 9); N, with B and C selective and constant (Table 10). The paper's own
numbers are perplexities on the Pile; ours are the share of tokens recalled at length 64.

Cost: about 2.5 minutes a cell on one core, 75 minutes for all on 2 quiet cores with `--workers 2`.
Expected: all three selective at 95 % or more, none at least 20 points below; the rest is what the
grid is for. Found: Δ is what selects; alone it does as well as all three.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from seqbench.suite.expectation import Expected
from seqbench.suite.experiment import Request

TITLE = "Tables 7 to 10: what selective copying needs of S6"
SEEDS = (0, 1, 2)
SELECTIVE = 0.95
OTHERS = 0.75
DEFAULT: Mapping[str, Any] = {}  # mamba's own: all selective, A = -(n+1), rank 4, N = 16
CONSTANT_BC = {"model.selective_B": False, "model.selective_C": False}


def _only(name: str) -> dict[str, bool]:
    return {f"model.selective_{each}": each == name for each in ("dt", "B", "C")}


# The row, what it sets, the paper's perplexity on the Pile, the band of ours. Rows that are one
# cell set the same.
Row = tuple[str, Mapping[str, Any], float, float | None, float | None]
TABLE_7: tuple[Row, ...] = (
    ("T7: nothing selective", _only("none"), 10.93, None, OTHERS),
    ("T7: B selective", _only("B"), 10.15, None, None),
    ("T7: C selective", _only("C"), 9.98, None, None),
    ("T7: Δ selective", CONSTANT_BC, 9.81, None, None),
    ("T7: Δ, B and C selective", DEFAULT, 8.71, SELECTIVE, None),
)
TABLE_8: tuple[Row, ...] = (
    ("T8: A = -1/2 + ni", {"model.init": "complex"}, 9.16, None, None),
    ("T8: A = -1/2", {"model.init": "half"}, 8.85, None, None),
    ("T8: A = -(n+1)", DEFAULT, 8.71, SELECTIVE, None),
    ("T8: A = -exp(N(0,1))", {"model.init": "random"}, 8.71, None, None),
)
TABLE_9: tuple[Row, ...] = (
    ("T9: rank of Δ 1", {"model.dt_rank": 1}, 8.97, None, None),
    ("T9: rank of Δ 2", {"model.dt_rank": 2}, 8.97, None, None),
    ("T9: rank of Δ 4", DEFAULT, 8.91, SELECTIVE, None),
    ("T9: rank of Δ 8", {"model.dt_rank": 8}, 8.83, None, None),
    ("T9: rank of Δ 16", {"model.dt_rank": 16}, 8.84, None, None),
)
TABLE_10: tuple[Row, ...] = (
    ("T10: N = 1", {"model.d_state": 1}, 9.73, None, None),
    ("T10: N = 2", {"model.d_state": 2}, 9.40, None, None),
    ("T10: N = 4", {"model.d_state": 4}, 9.09, None, None),
    ("T10: N = 8", {"model.d_state": 8}, 8.84, None, None),
    ("T10: N = 16", DEFAULT, 8.71, SELECTIVE, None),
    ("T10: N = 1, constant B, C", {**CONSTANT_BC, "model.d_state": 1}, 9.88, None, None),
    ("T10: N = 2, constant B, C", {**CONSTANT_BC, "model.d_state": 2}, 9.86, None, None),
    ("T10: N = 4, constant B, C", {**CONSTANT_BC, "model.d_state": 4}, 9.82, None, None),
    ("T10: N = 8, constant B, C", {**CONSTANT_BC, "model.d_state": 8}, 9.82, None, None),
    ("T10: N = 16, constant B, C", CONSTANT_BC, 9.81, None, None),
)
ROWS = (*TABLE_7, *TABLE_8, *TABLE_9, *TABLE_10)
LENGTH = {"cpu": 64, "paper": 4096}
STEPS = 4000  # at the cpu scale: all selective was still rising after the scale's own 3,000


def requests(scale: str) -> list[Request]:
    """Every row; those that ask for the same cell are one cell."""
    return [_request(settings, scale) for _, settings, _, _, _ in ROWS]


def expected(scale: str) -> list[Expected]:
    """All selective solves it, nothing selective does not."""
    return [
        Expected(
            name=name,
            request=_request(settings, scale),
            low=low,
            high=high,
            paper=f"{perplexity} perplexity on the Pile",
        )
        for name, settings, perplexity, low, high in ROWS
    ]


def _request(settings: Mapping[str, Any], scale: str) -> Request:
    # The length is the scale's own; said here, it tells these cells from another grid's.
    own: dict[str, Any] = {"task.length": LENGTH[scale]} if scale in LENGTH else {}
    if scale == "cpu":
        own["train.steps"] = STEPS
    return Request(
        task="selective-copying", model="mamba", scale=scale, settings={**own, **settings}
    )
