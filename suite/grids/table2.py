"""Table 2: induction heads, trained at 256, tested at 2^6 to 2^20 (Gu & Dao 2023, Tables 2 and 11).

Widths are the paper's: D 64 for mamba, 128 for the others, attention with 8 heads and no MLP.
cpu: a curriculum over length up to 256, never beyond it, then on at 256 with steps of batch 16.
Every length is tested on as many tokens, 2,048 sequences of the short ones and 8 of a million
tokens; the record counts them. Models with a constant state are tested in pieces that carry it.
Attention goes as far as 2^42 FLOPs for 8 sequences, Hyena as far as 2^17 tokens; the record says so
of each length left out.

Cost: COST_PLACEHOLDER. Expected: mamba at 99 % or more at every length; the
others perfect at 256 and down to chance from some length on.
"""

from __future__ import annotations

from seqbench.suite.expectation import Expected
from seqbench.suite.experiment import Request

TITLE = "Table 2: induction heads, trained at 256"
SEEDS = (0, 1, 2)
TRAINED = 256
LENGTHS = tuple(2**k for k in range(6, 21))
PERFECT = 0.99
ROWS = (  # model, as the paper names it, width
    ("transformer-absolute", "MHA, absolute", 128),
    ("transformer-rope", "MHA, RoPE", 128),
    ("transformer-xpos", "MHA, xPos", 128),
    ("h3", "H3", 128),
    ("hyena", "Hyena", 128),
    ("mamba", "Mamba", 64),
)
CPU = {
    "task.test_lengths": tuple(n for n in LENGTHS if n != TRAINED),
}


def requests(scale: str) -> list[Request]:
    """The paper's six models."""
    return [_request(model, width, scale) for model, _, width in ROWS]


def expected(scale: str) -> list[Expected]:
    """mamba perfect at every length; the others' fall-off has no band."""
    return [
        Expected(
            name=f"{name} at {length}",
            request=_request(model, width, scale),
            variant="" if length == TRAINED else f"length={length}",
            low=PERFECT if model == "mamba" else None,
        )
        for model, name, width in ROWS
        for length in LENGTHS
    ]


def _request(model: str, width: int, scale: str) -> Request:
    settings = {"model.d_model": width, **(CPU if scale == "cpu" else {})}
    return Request(task="induction-heads", model=model, scale=scale, settings=settings)
