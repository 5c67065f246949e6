"""Five tasks x three backbones at the cpu scale: what `make demo` runs.

Cost: about 12 minutes on 2 cores. Expected: mamba at 95 % or more on selective copying with s4
clearly below it, mamba at 99 % or more on induction heads at the training length, and every model
below the order-0 baseline in bits per byte, base and sample.
"""

from __future__ import annotations

from seqbench.suite.experiment import Request

SEEDS = (0,)
TASKS = ("selective-copying", "induction-heads", "language", "dna", "piano")
MODELS = ("mamba", "s4", "transformer")


def requests(scale: str) -> list[Request]:
    """Every task with every model, at the task's own scale and near-equal parameter counts."""
    return [
        Request(task=task, model=model, scale=scale, same_size_as="mamba")
        for task in TASKS
        for model in MODELS
    ]
