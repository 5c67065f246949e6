"""Piano, which part matters: complex state, selective B and C, selective Δ, and where (Figure 10).

Left: S4 + MLP; Mamba with a real state; with a complex one; then without selective B and C; then
without selective Δ too, which leaves an S4 in Mamba's block. Right: that last one everywhere but
at the centre of the U-Net, whose 256 samples a position are no raw sound any more.

cpu: the settings of piano-length at 2^11 and 2^14 samples, so cells that it has are not run again.
paper: eight blocks a stage (6M parameters), rate 1e-3, 100K steps of 2^20 samples (the batch is
not said), lengths 2^11 to 2^18.

Cost: about 7 minutes a cell on one core; 32 cells, 8 of them those of piano-length; the others take
an hour and a half with `--workers 2`, or all of it two minutes on two H100s. Expected, from the
paper: a real state is the worst; complex without selection is at least as good as with it; what the
centre is matters little. Found at the cpu scale: a real state is as good as a complex one, no
selection costs 0.01 to 0.04 bits, and the centre matters little.
"""

from __future__ import annotations

from typing import Any

from seqbench.suite.experiment import Request
from seqbench.suite.figures import Figure, Line, paper_lines
from seqbench.suite.grids import piano_length

TITLE = "Piano: what the state and the selection are worth"
SEEDS = (0, 1)
LENGTHS = {"cpu": (2**11, 2**14), "paper": tuple(2**k for k in range(11, 19))}
PAPER = {
    "model.num_layers": 8,
    "train.lr": 1e-3,
    "train.steps": 100_000,
    "train.warmup_steps": 10_000,
}
NO_B_C = {"selective_B": False, "selective_C": False}
NONE = {**NO_B_C, "selective_dt": False}
ALL = {"selective_B": True, "selective_C": True, "selective_dt": True}
LEFT: dict[str, tuple[str, dict[str, Any]]] = {  # name -> model, options; cumulative
    "S4 + MLP": ("sashimi", {}),
    "Mamba, real": ("mamba", {"init": "real"}),
    "+ complex": ("mamba", {"init": "complex"}),
    "– selective B, C": ("mamba", {"init": "complex", **NO_B_C}),
    "– selective Δ": ("mamba", {"init": "complex", **NONE}),
}
THEIRS = {  # the paper's names
    "S4+MLP": "S4 + MLP",
    "Mamba (S6), real": "Mamba, real",
    "+ complex": "+ complex",
    "- selective B/C": "– selective B, C",
    "Mamba-S4 (no selection), complex": "– selective Δ",
}
_OUTER = {"init": "complex", **NONE}
RIGHT: dict[str, tuple[str, dict[str, Any]]] = {  # the centre; outside it no selection
    "S4 + MLP": ("mamba", {**_OUTER, "center": "sashimi"}),
    "Mamba, real": ("mamba", {**_OUTER, "center_options": {"init": "real", **ALL}}),
    "Mamba, complex": ("mamba", {**_OUTER, "center_options": ALL}),
    "as outside": LEFT["– selective Δ"],
}


def requests(scale: str) -> list[Request]:
    """Every variant once, at every length."""
    variants = [*LEFT.values(), *(v for k, v in RIGHT.items() if k != "as outside")]
    return [_request(variant, n, scale) for variant in variants for n in LENGTHS[scale]]


def figures(scale: str) -> list[Figure]:
    """Both sides of the paper's figure; the right one's numbers were not read."""

    def drawn(name: str, title: str, variants: dict[str, tuple[str, dict[str, Any]]]) -> Figure:
        return Figure(
            name=name,
            title=title,
            x="task.length",
            x_label="length trained at (samples)",
            lines=tuple(
                Line(name=k, requests=tuple(_request(v, n, scale) for n in LENGTHS[scale]))
                for k, v in variants.items()
            ),
            paper=paper_lines("Figure 10, left", THEIRS) if variants is LEFT else (),
        )

    return [
        drawn("piano-ablation", TITLE, LEFT),
        drawn("piano-ablation-centre", "Piano: no selection but at the U-Net's centre", RIGHT),
    ]


def _request(variant: tuple[str, dict[str, Any]], length: int, scale: str) -> Request:
    model, options = variant
    base = piano_length.request(model, length, scale)
    settings = {**base.settings, **{f"model.{k}": v for k, v in options.items()}}
    if scale == "paper":
        settings |= PAPER
    return Request(task="piano", model=model, scale=scale, settings=settings)
