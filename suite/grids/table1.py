"""Table 1: selective copying by block and layer, to see which mechanism selects (Gu & Dao 2023).

cpu: 16 tokens at length 256 (the paper's is 4096), widths that give every row nearly mamba's size,
one recipe and one budget for all rows; see `selective-copying`'s cpu scale for its curriculum,
which is over by a tenth of the steps: S6 without a gate learns most at the full length. The recipe
follows the best of 16 tried on that row's three seeds (steps, rate, batch, Adam's beta2, clipping,
the curriculum's share); the other rows were not tuned.
paper: length 4096, D 64 and 400K steps a row, for a GPU.

Cost: 4 to 14 minutes a cell on one core, an hour and 50 minutes for the 24 on 2 cores with
`--workers 2 --threads 1`; a few minutes on two H100s with `--workers 24 --cells-per-gpu 12` under
NVIDIA's MPS.
Expected: the rows with S6 at 95 % of the tokens or more, every other at least 20 points below.
"""

from __future__ import annotations

from seqbench.suite.expectation import Expected
from seqbench.suite.experiment import Request

TITLE = "Table 1: selective copying by block and layer"
SEEDS = (0, 1, 2)
SELECTIVE = 0.95
OTHERS = 0.75
ROWS = (  # model, block and layer as the paper names them, whether the layer selects
    ("s4", "No gate, S4", False),
    ("s6", "No gate, S6", True),
    ("h3", "H3 block, S4", False),
    ("h3+hyena", "H3 block, Hyena", False),
    ("h3+s6", "H3 block, S6", True),
    ("mamba+s4", "Mamba block, S4", False),
    ("mamba+hyena", "Mamba block, Hyena", False),
    ("mamba", "Mamba block, S6", True),
)
CPU = {
    "task.length": 256,
    "train.steps": 10_000,
    "train.batch_size": 16,
    "train.lr": 3e-3,
    "train.curriculum_until": 0.1,
}


def requests(scale: str) -> list[Request]:
    """The paper's eight rows."""
    return [_request(model, scale) for model, _, _ in ROWS]


def expected(scale: str) -> list[Expected]:
    """The paper's ordering."""
    return [
        Expected(
            name=name,
            request=_request(model, scale),
            low=SELECTIVE if selects else None,
            high=None if selects else OTHERS,
        )
        for model, name, selects in ROWS
    ]


def _request(model: str, scale: str) -> Request:
    if scale == "paper":
        return Request(task="selective-copying", model=model, scale=scale)
    return Request(
        task="selective-copying", model=model, scale=scale, settings=CPU, same_size_as="mamba"
    )
