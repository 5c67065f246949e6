"""Scaling: loss against compute, sizes x backbones at matched tokens (Gu & Dao 2023, Figure 4).

cpu: bytes of the State of the Union, windows of 256, 28K to 313K parameters, 20 tokens of training
a parameter as in the paper's Table 12; every model of a size sees as many tokens. One recipe,
"improved", for all, so that a difference is the backbone's; the paper gave its Hyena the recipe
"gpt3". The scaling law is a power law in the FLOPs of training, fitted to all seeds.
paper: Table 12's depths, widths, steps and rates on a Pile-like corpus in GPT-2's tokens, context
2048 and 8192, each model by the recipe that the paper gave it, half a million tokens a step; give
the text with `--set task.path=FILE.jsonl`, for a GPU.

Cost: on one core 10 to 20 s a cell at the smallest size, about 40 s, 2.5 and 7 minutes at the
largest; an hour of one core for the 24, half of it on 2 quiet cores with `--workers 2`. Expected:
loss falls with compute in every model; mamba is below hyena at every size, and transformer++ above
both: the few hundred steps of the small sizes are too few for attention (2.7 against 2.0 bits per
byte at 66K), and it comes nearer with size.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from seqbench.suite.experiment import Request
from seqbench.suite.figures import Figure, Line, PaperLine, paper_lines
from seqbench.suite.recipes import IMPROVED_PEAK

TITLE = "Scaling: language loss against training compute"
SEEDS = (0, 1)
WINDOW = 256
BATCH = 8
TOKENS_PER_PARAMETER = 20
# Parameters of a size, and the width and layers that bring each model next to it. As in the paper
# two Mamba blocks stand for one of attention or convolution with its MLP.
SIZES: tuple[tuple[int, dict[str, tuple[int, int]]], ...] = (
    (28_000, {"mamba": (32, 2), "transformer++": (40, 1), "hyena": (32, 1)}),
    (66_000, {"mamba": (56, 2), "transformer++": (64, 1), "hyena": (56, 1)}),
    (147_000, {"mamba": (64, 4), "transformer++": (72, 2), "hyena": (64, 2)}),
    (298_000, {"mamba": (96, 4), "transformer++": (104, 2), "hyena": (104, 2)}),
)
MODELS = tuple(SIZES[0][1])

# Table 12: nominal parameters, layers, width, heads, steps, GPT-3's peak rate.
Row = tuple[int, int, int, int, int, float]
TABLE_12: tuple[Row, ...] = (
    (125_000_000, 12, 768, 12, 4_800, 6e-4),
    (350_000_000, 24, 1024, 16, 13_500, 3e-4),
    (760_000_000, 24, 1536, 16, 29_000, 2.5e-4),
    (1_300_000_000, 24, 2048, 32, 50_000, 2e-4),
)
PAPER_TOKENS = 2**19  # of a step,
MICRO_TOKENS = 2**14  # and of it at a time: their logits are 3 GB
CONTEXTS = (2048, 8192)
# Recipe, layers for one of Table 12's, and options: the paper's E.2.
PAPER_MODELS: dict[str, tuple[str, float, dict[str, Any]]] = {
    "mamba": ("improved", 2, {}),
    "transformer++": ("improved", 1, {}),
    "h3": ("improved", 2, {"model.head_dim": 8}),
    "transformer": ("gpt3", 1, {}),
    "hyena": ("gpt3", 1.5, {"model.mlp_expand": 2.0}),
}

PAPER_NAMES = {
    "Mamba": "mamba",
    "Transformer++": "transformer++",
    "H3++": "h3",
    "Hyena": "hyena",
}


def requests(scale: str) -> list[Request]:
    """Every model at every size; at the paper scale also at both contexts."""
    if scale == "paper":
        return [
            _paper(model, row, context)
            for context in CONTEXTS
            for row in TABLE_12
            for model in PAPER_MODELS
        ]
    return [
        _request(model, size, *shapes[model], scale) for size, shapes in SIZES for model in MODELS
    ]


def figures(scale: str) -> list[Figure]:
    """Loss against compute with its power law, and against size; the paper's Figure 4 beside."""
    theirs = paper_lines("Figure 4", PAPER_NAMES)
    if scale == "paper":
        lines = {
            f", context {context}": [
                Line(name=m, requests=tuple(_paper(m, row, context) for row in TABLE_12))
                for m in PAPER_MODELS
            ]
            for context in CONTEXTS
        }
    else:
        lines = {
            "": [
                Line(name=m, requests=tuple(_request(m, n, *s[m], scale) for n, s in SIZES))
                for m in MODELS
            ]
        }
    return [
        Figure(
            name=f"{name}{on.replace(', context ', '-')}",
            title=f"{title}{on}",
            x=x,
            lines=tuple(of),
            paper=tuple(map(_by_flops, theirs)) if x == "train_flops" else theirs,
            fit=True,
        )
        for on, of in lines.items()
        for x, name, title in (
            ("train_flops", "scaling", TITLE),
            ("parameters", "scaling-size", "Scaling: language loss against size"),
        )
    ]


def _by_flops(line: PaperLine) -> PaperLine:
    """A series of the paper's over 6 N D FLOPs: its own axis was not read off."""
    tokens = {float(row[0]): row[4] * PAPER_TOKENS for row in TABLE_12}
    return replace(
        line,
        points=tuple((6 * n * tokens[n], value) for n, value in line.points),
        setting=f"{line.setting}; FLOPs are 6 x parameters x tokens, of Table 12",
    )


def _request(model: str, size: int, width: int, layers: int, scale: str) -> Request:
    steps = round(TOKENS_PER_PARAMETER * size / (BATCH * WINDOW))
    settings: dict[str, Any] = {
        "model.d_model": width,
        "model.num_layers": layers,
        "train.recipe": "improved",
        "train.steps": steps,
        "train.batch_size": BATCH,
        "train.eval_every": max(1, steps // 10),
        "train.eval_batches": 32,
        "train.test_batches": 256,
    }
    if model == "hyena":
        settings["model.filter_length"] = WINDOW
    return Request(task="language", model=model, scale=scale, settings=settings)


def _paper(model: str, row: Row, context: int) -> Request:
    _, layers, width, heads, steps, rate = row
    recipe, deeper, options = PAPER_MODELS[model]
    peak = round(rate * (IMPROVED_PEAK if recipe == "improved" else 1), 6)
    settings: dict[str, Any] = {
        "task.tokenizer": "gpt2",
        "task.length": context,
        "model.d_model": width,
        "model.num_layers": round(deeper * layers),
        "train.recipe": recipe,
        "train.steps": steps,
        "train.batch_size": PAPER_TOKENS // context,
        "train.lr": peak,
        "train.min_lr": 1e-5 if recipe == "improved" else round(peak / 10, 6),
        "train.precision": "bf16-mixed",
        "train.micro_tokens": MICRO_TOKENS,
        **options,
    }
    if model in ("transformer", "transformer++"):
        settings["model.num_heads"] = heads
    return Request(task="language", model=model, scale="paper", settings=settings)
