"""Every task with mamba, selective copying with the others, a few steps: does the road hold?

Cost: under a minute on 2 cores. Expected: nothing learned; every cell done, tables and plots drawn.
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
    "train.warmup_steps": 5,
}


def requests(scale: str) -> list[Request]:
    """Five tasks with mamba, then the two other backbones."""
    tasks = ("selective-copying", "induction-heads", "language", "dna", "piano")
    pairs = [(task, "mamba") for task in tasks]
    pairs += [("selective-copying", "s4"), ("selective-copying", "transformer")]
    return [Request(task=t, model=m, scale=scale, settings=SMALL) for t, m in pairs]
