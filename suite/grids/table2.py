"""Table 2: induction heads, trained at 256, tested at 2^6 to 2^20 (Gu & Dao 2023, Tables 2 and 11).

Widths are the paper's: D 64 for mamba, 128 for the others, attention with 8 heads and no MLP.
cpu: a curriculum over length up to 256, never beyond it, then on at 256, with a penalty on mamba's
Δ: solving 256 needs no memory beyond it, so plain training stops at a Δ that forgets after some
thousand tokens (in single trials 86 % at 4096 and 62 % at 16384 after 1,500 steps without it). The
paper got there by 204,800 steps.

Every length is tested on as many tokens, 2,048 sequences of the short ones and 8 of a million
tokens; the record counts them. Models with a constant state are tested in pieces that carry it.
Attention goes as far as 2^42 FLOPs for 8 sequences, Hyena as far as 2^17 tokens; the record says so
of each length left out.

Absolute positions need a recipe of their own, larger batches and a longer curriculum: from batches
of 8 they did not learn in 20,000 steps at any rate tried, with a curriculum or without.

Cost: training takes minutes, half an hour for absolute positions, the tests about 5 minutes a cell
on one core; two hours for all on 2 quiet cores with `--workers 2`. Expected: mamba at 99 % or more
at every length; the others perfect at 256 and down to chance from some length on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from seqbench.suite.expectation import Expected
from seqbench.suite.experiment import Request

TITLE = "Table 2: induction heads, trained at 256"
SEEDS = (0, 1, 2)
TRAINED = 256
LENGTHS = tuple(2**k for k in range(6, 21))
PERFECT = 0.99
ABSOLUTE: Mapping[str, Any] = {
    "train.steps": 10_000,
    "train.batch_size": 64,
    "train.test_batches": 256,  # as many tokens as the others
}
ROWS = (  # model, as the paper names it, width, rate at the cpu scale
    ("transformer-absolute", "MHA, absolute", 128, 3e-4),
    ("transformer-rope", "MHA, RoPE", 128, 1e-3),
    ("transformer-xpos", "MHA, xPos", 128, 1e-3),
    ("h3", "H3", 128, 1e-3),
    ("hyena", "Hyena", 128, 1e-3),
    ("mamba", "Mamba", 64, 3e-3),
)
CPU = {
    "task.test_lengths": tuple(n for n in LENGTHS if n != TRAINED),
    "train.steps": 3000,
    "train.batch_size": 8,
    "train.delta_penalty": 3e-4,
    "train.eps": 1e-16,  # the loss is below 1e-6 soon, and the gradients with it
    "train.test_batches": 2048,  # of 8 x 256 tokens: 2^22 a length
}


def requests(scale: str) -> list[Request]:
    """The paper's six models."""
    return [_request(model, width, rate, scale) for model, _, width, rate in ROWS]


def expected(scale: str) -> list[Expected]:
    """mamba perfect at every length; the others' fall-off has no band."""
    return [
        Expected(
            name=f"{name} at {length}",
            request=_request(model, width, rate, scale),
            variant="" if length == TRAINED else f"length={length}",
            low=PERFECT if model == "mamba" else None,
        )
        for model, name, width, rate in ROWS
        for length in LENGTHS
    ]


def _request(model: str, width: int, rate: float, scale: str) -> Request:
    settings: dict[str, Any] = {"model.d_model": width, "train.lr": rate, **CPU}
    if scale == "paper":  # the rate that was the paper's best of two
        settings = {"model.d_model": width, "train.lr": 1e-3 if model == "mamba" else 2e-4}
    elif model == "transformer-absolute":
        settings |= ABSOLUTE
    return Request(task="induction-heads", model=model, scale=scale, settings=settings)
