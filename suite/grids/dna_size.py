"""DNA by model size: mamba, Hyena and Transformer++ at equal sizes and tokens (Figure 5, left).

cpu: three sizes of 40K to 270K parameters on the 4 Mbp of chromosome 20 that come with the package,
windows of 512, 4.1M tokens each, a bit more than one epoch; the widths of the two others are those
that come nearest to mamba's size, within 5 %. paper: the seven sizes of 250K to 40M on hg38 (1 GB
to fetch) with the Basenji split, 10B tokens each; as there mamba has twice the blocks of the others
at the same width. Rates are the paper's, mamba's 8e-3 and the others' 2e-3; Figure 5's points stand
in the plot as a series of their own, at another scale and on other data.

Cost: cpu, on one core a cell, 1 to 2 minutes for the smallest size and up to 7 for the largest
Transformer++, or 10 to 40 seconds on one H100; 18 cells. paper, not run: 21 cells, 1e16 FLOPs for
the smallest and 2.5e18 for the largest; micro-batches keep each on one 80 GB GPU. Expected: cpu,
mamba's perplexity the lowest at 40K (3.57) and 130K parameters (3.49), Hyena's at 270K (3.47, mamba
3.50: after 500 steps at the paper's rate its two larger sizes are level), Transformer++ far behind
(3.69 to 3.71): in so few steps attention hardly gets beyond an order-6 Markov model.
"""

from __future__ import annotations

from typing import Any

from seqbench.suite.experiment import Request
from seqbench.suite.figures import Figure, Line, paper_lines

TITLE = "DNA: perplexity by size"
SEEDS = (0, 1)
RATES = {"mamba": 8e-3, "hyena": 2e-3, "transformer++": 2e-3}
# Layers and width of each, of near-equal parameter counts.
CPU_SIZES: tuple[dict[str, tuple[int, int]], ...] = (
    {"mamba": (4, 32), "hyena": (2, 32), "transformer++": (2, 40)},
    {"mamba": (4, 64), "hyena": (2, 68), "transformer++": (2, 72)},
    {"mamba": (4, 96), "hyena": (2, 100), "transformer++": (2, 104)},
)
PAPER_LENGTH = 1024
PAPER_SIZES = ((4, 64), (5, 96), (6, 128), (7, 192), (8, 256), (10, 384), (12, 512))
CPU = {
    "task.length": 512,
    "train.steps": 500,
    "train.batch_size": 16,
    "train.warmup_steps": 50,
    "train.beta2": 0.95,
    "train.eval_every": 100,
    "train.eval_batches": 16,
    "train.test_batches": 64,  # all of test
}


def requests(scale: str) -> list[Request]:
    """Sizes x models, smallest first."""
    if scale != "paper":
        return [
            _request(model, *sizes[model], scale, CPU) for sizes in CPU_SIZES for model in RATES
        ]
    return [_paper(model, blocks, width) for blocks, width in PAPER_SIZES for model in RATES]


def figures(scale: str) -> list[Figure]:
    """Perplexity against parameters."""
    found = requests(scale)
    beside = {"Mamba": "mamba", "HyenaDNA": "hyena", "Transformer++": "transformer++"}
    return [
        Figure(
            name="dna-size",
            title=TITLE,
            x="parameters",
            metric="perplexity",
            lines=tuple(
                Line(name=model, requests=tuple(r for r in found if r.model == model))
                for model in RATES
            ),
            paper=paper_lines("Figure 5, left", beside),
        )
    ]


def _paper(model: str, blocks: int, width: int) -> Request:
    """As there, mamba has two blocks for one of the others, at the same width."""
    settings = {
        "task.sampling": "segments",
        "train.precision": "bf16-mixed",
        "train.micro_tokens": 2**17 if width <= 256 else 2**15,
    }
    layers = 2 * blocks if model == "mamba" else blocks
    return _request(model, layers, width, "paper", settings)


def _request(model: str, layers: int, width: int, scale: str, settings: dict[str, Any]) -> Request:
    size = {"model.num_layers": layers, "model.d_model": width, "train.lr": RATES[model]}
    if model == "hyena":  # its filters are as long as a window
        size["model.filter_length"] = settings.get("task.length", PAPER_LENGTH)
    return Request(task="dna", model=model, scale=scale, settings={**settings, **size})
