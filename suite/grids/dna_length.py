"""DNA by context length: mamba from 2^10 bases on, at constant tokens a step (Figure 5, right).

Beyond 2^10 with the paper's sequence-length warm-up: training begins at 2^10 and the length doubles
until it is the cell's own; the curve in the record says where it stood. Longer sequences than a
segment are trained in pieces with exact gradients, so that memory is the same at every length.

cpu: 2^10 to 2^16 on the 4 Mbp of chromosome 20 that come with the package, 24M tokens each (7
epochs), the warm-up within a quarter of them. Test is the same 400 kbp at every length, cut into
windows: only 6 of 2^16. paper: 2^10 to 2^20 on hg38 (1 GB to fetch) with the Basenji split, 2^24
tokens a step, 20K steps, the warm-up two epochs a length: 1.4M parameters and 7M.

Cost: cpu, 8 cells of 7 to 8 minutes on one core each, or of 50 to 100 seconds on one H100, in 250
MB of GPU memory at every length. paper, not run: 12 cells of 3.4e11 tokens. Expected: cpu, no gain
from context: perplexity is 3.52 at 2^10, 3.53 at 2^12, 3.55 at 2^14 and 3.62 at 2^16, where a batch
is one window and a quarter of the 360 steps goes to the warm-up. The paper's own gain from 2^10 to
2^16 is 0.03, after 20,000 steps of 256 times the tokens.
"""

from __future__ import annotations

from typing import Any

from seqbench.suite.experiment import Request
from seqbench.suite.figures import Figure, Line, paper_lines

TITLE = "DNA: perplexity by context length"
SEEDS = (0, 1)
SHORTEST = 2**10
CPU_LENGTHS = tuple(2**k for k in (10, 12, 14, 16))
PAPER_LENGTHS = tuple(2**k for k in (10, 12, 14, 16, 18, 20))
CPU_TOKENS, PAPER_TOKENS = 2**16, 2**24  # a step
PAPER_EPOCH = 34_021 * 2**17  # bases of the paper's train segments, up to that length
PAPER_STEPS = 20_000


def requests(scale: str) -> list[Request]:
    """Lengths, shortest first, of every size."""
    return [request for line in by_size(scale).values() for request in line]


def figures(scale: str) -> list[Figure]:
    """Perplexity against the length of context."""
    lines = by_size(scale)
    first = next(iter(lines))
    beside = {"Mamba, 1.4M": first, "Mamba, 7M": list(lines)[-1]}
    return [
        Figure(
            name="dna-length",
            title=TITLE,
            x="task.length",
            x_label="context length, bases",
            metric="perplexity",
            lines=tuple(Line(name=name, requests=tuple(found)) for name, found in lines.items()),
            paper=paper_lines("Figure 5, right", beside),
        )
    ]


def by_size(scale: str) -> dict[str, list[Request]]:
    """The requests for each size of the model, shortest first."""
    if scale != "paper":
        return {"mamba, 66K": [_request(scale, _cpu(length)) for length in CPU_LENGTHS]}
    return {
        name: [
            _request(scale, {**_paper(length), "model.num_layers": layers, "model.d_model": width})
            for length in PAPER_LENGTHS
        ]
        for name, layers, width in (("mamba, 1.4M", 12, 128), ("mamba, 7M", 16, 256))
    }


def _request(scale: str, settings: dict[str, Any]) -> Request:
    return Request(task="dna", model="mamba", scale=scale, settings=settings)


def _cpu(length: int) -> dict[str, Any]:
    return {
        "task.length": length,
        "train.steps": 360,
        "train.batch_size": CPU_TOKENS // length,
        "train.lr": 8e-3,
        "train.warmup_steps": 36,
        "train.beta2": 0.95,
        "train.eval_every": 60,
        "train.eval_batches": 8,  # all of validation
        "train.test_batches": 8,  # and of test
        # What the caches of a core hold is fastest.
        "train.micro_tokens": 2**13,
        "train.segment_length": 2**13,
        **_warm_up(length, until=0.25),
    }


def _paper(length: int) -> dict[str, Any]:
    # Two epochs a length: up to 2^17 one has every base once, beyond it two windows a segment.
    epochs = sum(1 if n <= 2**17 else 2 * n // 2**17 for n in _shorter(length))
    return {
        "task.length": length,
        "task.sampling": "segments",
        "train.steps": PAPER_STEPS,
        "train.batch_size": PAPER_TOKENS // length,
        "train.lr": 8e-3,
        "train.warmup_steps": PAPER_STEPS // 10,
        "train.precision": "bf16-mixed",
        "train.eval_batches": 2,
        "train.test_batches": 2,
        "train.micro_tokens": 2**17,
        "train.segment_length": 2**17,
        **_warm_up(length, until=2 * epochs * PAPER_EPOCH / PAPER_TOKENS / PAPER_STEPS),
    }


def _warm_up(length: int, *, until: float) -> dict[str, Any]:
    """Every stage has the same share of the first `until` of the steps."""
    if length == SHORTEST:
        return {}
    return {
        "task.warmup_from": SHORTEST,
        "train.curriculum": True,
        "train.curriculum_pass": 1.0,  # never by accuracy
        "train.curriculum_until": round(until, 4),
    }


def _shorter(length: int) -> list[int]:
    found, n = [], SHORTEST
    while n < length:
        found.append(n)
        n *= 2
    return found
