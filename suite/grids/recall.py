"""Multi-query associative recall by eight models of one size (the question of Arora et al. 2023).

cpu: 8 pairs among 64 tokens of a vocabulary of 256, up to 16,000 steps of 64 sequences, the
curriculum of 1, 2, 4 and 8 pairs over the first four fifths of them; a cell stops at 99 %. paper:
Zoology's length 512, 64 pairs and vocabulary 8192.

Cost: cpu, 2 to 10 minutes a cell on 2 cores by the tokens/s of the records, 24 cells; on one H100
a dozen cells at once take 3 minutes. Expected: mamba and attention at 95 % or more, what selects
nothing (S4, Hyena) below. The rate is the one of three tried, 1e-3, 2e-3 and 3e-3 or more, at which
mamba and a transformer both learned in three of three seeds; no other row was tuned.
"""

from __future__ import annotations

from seqbench.suite.expectation import Expected
from seqbench.suite.experiment import Request

TITLE = "Multi-query associative recall"
SEEDS = (0, 1, 2)
RECALLS = 0.95
# The row, its preset, the least that is expected of it at the cpu scale.
ROWS = (
    ("Mamba", "mamba", RECALLS),
    ("Mamba + S4", "mamba+s4", None),
    ("H3", "h3", None),
    ("Hyena", "hyena", None),
    ("Linear attention", "linear-attention", None),
    ("RetNet", "retnet", None),
    ("GLA", "gla", None),
    ("Transformer", "transformer", RECALLS),
)


def requests(scale: str) -> list[Request]:
    """A row a model, all of mamba's size."""
    return [_request(model, scale) for _, model, _ in ROWS]


def expected(scale: str) -> list[Expected]:
    """Selection and attention recall."""
    return [
        Expected(name=name, request=_request(model, scale), low=low if scale == "cpu" else None)
        for name, model, low in ROWS
    ]


def _request(model: str, scale: str) -> Request:
    return Request(task="mqar", model=model, scale=scale, same_size_as="mamba")
