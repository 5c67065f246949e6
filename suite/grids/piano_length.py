"""Piano against context: bits per sample by the length trained at, tokens constant (Figure 7).

Mamba and SaShiMi (S4 + MLP) in the same U-Net, five stages and two poolings of 16; Mamba's state is
complex, as in the paper. Every step sees as many samples, in fewer and longer windows.

cpu: rendered piano, lengths 2^10 to 2^15 of the paper's 2^13 to 958,464, width 32 and one block a
stage (0.5M parameters of the paper's 3.5M), 600 steps of 2^15 samples; all of the test piece.
paper: YouTubeMix, width 64, three blocks a stage, 200K steps of 2^20 samples, for a GPU; a longer
row than the GPU holds goes through in pieces: --set train.segment_length=65536.

Cost: about 7 minutes a cell of mamba on one core, 5 of sashimi; 24 cells, two and a half hours with
`--workers 2`, or a minute or two each on a GPU. Expected: Mamba below SaShiMi at every length; both
are best at 2^12 to 2^13 samples, for beyond them a step has too few windows, and worst at 2^15.
"""

from __future__ import annotations

import math
from typing import Any

from seqbench.suite.experiment import Request
from seqbench.suite.figures import Figure, Line, paper_lines

TITLE = "Piano: bits per sample against the length trained at"
SEEDS = (0, 1)
COMMON = 2**15  # samples of the windows that models of all lengths are tested on, at cpu scale
TOKENS = {"cpu": 2**15, "paper": 2**20}  # samples a step, about
LENGTHS = {
    "cpu": tuple(2**k for k in range(10, 16)),
    # The paper's (Table 14): multiples of its chunks near to powers of two.
    "paper": (8192, 16384, 30720, 61440, 120832, 239616, 479232, 958464),
}
MODELS = {  # ours -> its name in the plot, and the paper's
    "mamba": ("Mamba, complex", "Mamba (complex)"),
    "sashimi": ("S4 + MLP (SaShiMi)", "SaShiMi (S4+MLP)"),
}
# No state that is real: this is raw sound (Figure 10).
COMPLEX = {"model.backbone": "unet", "model.init": "complex"}
CPU = {
    "model.d_model": 32,
    "model.num_layers": 1,
    "train.steps": 600,
    "train.lr": 4e-3,
    "train.warmup_steps": 60,
    "train.weight_decay": 0.1,
    "train.beta2": 0.95,
    "train.eval_every": 150,
    "train.eval_batches": 4,
    "train.test_batches": 30,  # the whole of the test piece
}


def requests(scale: str) -> list[Request]:
    """Both models at every length."""
    return [request(model, n, scale) for model in MODELS for n in LENGTHS[scale]]


def figures(scale: str) -> list[Figure]:
    """The paper's axes; and for cpu the same models on windows of one length."""
    lines = tuple(
        Line(name=name, requests=tuple(request(model, n, scale) for n in LENGTHS[scale]))
        for model, (name, _) in MODELS.items()
    )
    label = "length trained at (samples)"
    drawn = Figure(
        name="piano-length",
        title=TITLE,
        x="task.length",
        x_label=label,
        lines=lines,
        paper=paper_lines("Figure 7", {theirs: name for name, theirs in MODELS.values()}),
    )
    if scale == "paper":
        return [drawn]
    common = Figure(
        name="piano-length-common",
        title="Piano: the same models, all on windows of 32K",
        x="task.length",
        x_label=label,
        lines=lines,
        variant=f"length={COMMON}",
    )
    return [drawn, common]


def request(model: str, length: int, scale: str) -> Request:
    """A cell at a length, with as many samples a step as at any other."""
    batch = 2 ** round(math.log2(TOKENS[scale] / length))
    settings: dict[str, Any] = {"task.length": length, "train.batch_size": batch}
    settings |= COMPLEX if model == "mamba" else {}
    if scale == "cpu":
        settings |= {"task.test_lengths": (COMMON,), **CPU}
    return Request(task="piano", model=model, scale=scale, settings=settings)
