"""mamba against order-k Markov models on all of chromosome 20: bits a base, k up to 8.

63,025,520 bases of GRCh37 (`seqbench data fetch chr20`: 18 MB, from the Debian package that carries
them), split by position: train on the first 80 %, validation and test on a tenth each, in that
order. The Markov models are counted on all of train and scored on all of test, with the k of their
context in the table; mamba is scored on all of test too, in windows of its training length.

cpu: 131,200 parameters, windows of 1024, 15.6M tokens, a third of an epoch. paper: 1.4M parameters
(12 layers of width 128), windows of 1024 of both strands, 3.9e8 tokens, bf16; no cell of the
paper's, but of one of its sizes.

Cost: cpu, 9 to 10 minutes a cell on one core (34K tokens a second), 2 cells; not yet run. paper:
meant for 8 minutes of one H100, not run. Expected: below order-8; the verdict says for each k
whether mamba is. (On the packaged 4 Mbp this model is at 1.80 after 4M tokens, order-8 at 1.855.)
"""

from __future__ import annotations

from typing import Any

from seqbench.suite.expectation import Expected
from seqbench.suite.experiment import Request

TITLE = "All of chromosome 20: mamba and the Markov models"
SEEDS = (0, 1)
CHR20: dict[str, Any] = {"task.dataset": "chr20", "task.bed": None}
CPU = {
    "task.length": 1024,
    "model.d_model": 64,
    "model.num_layers": 4,
    "train.steps": 1900,
    "train.batch_size": 8,
    "train.lr": 8e-3,
    "train.warmup_steps": 190,
    "train.beta2": 0.95,
    "train.eval_every": 380,
    "train.eval_batches": 64,
    "train.test_batches": 1000,  # all of test
}
PAPER = {
    "task.reverse_complement": True,
    "train.steps": 3000,
    "train.batch_size": 128,
    "train.warmup_steps": 300,
    "train.eval_every": 500,
    "train.eval_batches": 16,
    "train.test_batches": 100,  # all of test
    "train.precision": "bf16-mixed",
}


# Bits a base of test, order 1 to 8: what the task's own baselines are on these very bases.
MARKOV = (1.9632, 1.9472, 1.9403, 1.9321, 1.9255, 1.9120, 1.8969, 1.8790)


def requests(scale: str) -> list[Request]:
    """One model."""
    settings = CHR20 | (PAPER if scale == "paper" else CPU)
    return [Request(task="dna", model="mamba", scale=scale, settings=settings)]


def expected(scale: str) -> list[Expected]:
    """Below every Markov model."""
    return [
        Expected(name=f"mamba below order-{k}", request=request, high=bits)
        for request in requests(scale)
        for k, bits in enumerate(MARKOV, 1)
    ]
