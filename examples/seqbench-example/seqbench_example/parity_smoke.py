"""Parity with three models, a few steps each: does the plugin's road hold?

Cost: about ten seconds on 2 cores. Expected: nothing learned; every cell done.
"""

from __future__ import annotations

from seqbench.suite.experiment import Request

SEEDS = (0,)
SMALL = {
    "train.steps": 20,
    "train.eval_every": 10,
    "train.eval_batches": 1,
    "train.test_batches": 1,
    "train.batch_size": 8,
}


def requests(scale: str) -> list[Request]:
    """The example's task with its own model, its layer in another block, and an LSTM."""
    models = ("smoothie", "none+moving-average", "lstm")
    return [Request(task="parity", model=m, scale=scale, settings=SMALL) for m in models]
