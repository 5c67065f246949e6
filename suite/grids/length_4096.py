"""Selective copying by mamba at the paper's length 4096 on a CPU, as far as a fixed budget goes.

cpu: the paper's task and model (16 tokens, vocabulary 16, 2 layers, D 64), 3,000 steps of batch 16
with the cpu scale's curriculum, which goes on by doubling to 4096. paper: its 400K steps of batch
64 at a constant rate, for a GPU.

Cost: the last 700 steps, at the full length, take nearly all of it: 2,500 steps took 12 minutes on
3 cores of a Xeon, where `--conclude` ended the published run. Expected: far above chance at 4096,
with no band. The paper's run is 400,000 x 64 x 4096 = 1.05e11 tokens: at the record's tokens/s, say
32,000, that is 38 days.
"""

from __future__ import annotations

from seqbench.suite.expectation import Expected
from seqbench.suite.experiment import Request

TITLE = "Selective copying at the paper's length, within a CPU budget"
SEEDS = (0,)
BUDGET = {
    "task.length": 4096,
    "train.steps": 3000,
    "train.batch_size": 16,
    "train.eval_every": 100,
    "train.eval_batches": 2,
    "train.test_batches": 8,
}


def requests(scale: str) -> list[Request]:
    """mamba alone."""
    settings = {} if scale == "paper" else BUDGET
    return [Request(task="selective-copying", model="mamba", scale=scale, settings=settings)]


def expected(scale: str) -> list[Expected]:
    """No band: the budget is a CPU's."""
    return [Expected(name="Mamba at 4096", request=r) for r in requests(scale)]
