"""mamba against order-k Markov models on all of chromosome 20: bits a base, k up to 8.

63,025,520 bases of GRCh37 (`seqbench data fetch chr20`: 18 MB, from the Debian package that carries
them), split by position: train on the first 80 %, validation and test on a tenth each, in that
order. The Markov models are counted on all of train and scored on all of test, with the k of their
context in the table; mamba is scored on all of test too, in windows of its training length.

Expected: mamba below order-8 in bits per base.
"""

from __future__ import annotations

from typing import Any

from seqbench.suite.experiment import Request

TITLE = "Chromosome 20: bits per base, below every Markov model"
SEEDS = (0, 1)
CHR20: dict[str, Any] = {"task.dataset": "chr20", "task.bed": None}
CPU = {
    "task.length": 1024,
    "model.d_model": 64,
    "model.num_layers": 2,
    "train.steps": 3600,
    "train.batch_size": 8,
    "train.lr": 4e-3,
    "train.warmup_steps": 200,
    "train.beta2": 0.95,
    "train.eval_every": 400,
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


def requests(scale: str) -> list[Request]:
    """One model."""
    settings = CHR20 | (PAPER if scale == "paper" else CPU)
    return [Request(task="dna", model="mamba", scale=scale, settings=settings)]
