"""Great apes by fine-tuning: mamba pretrained on DNA at the same length, and from scratch (4.3.3).

The species of a window is named at its last base. The pretraining cells are those of dna-length,
which they share the records with; each fine-tuned cell begins from the weights of its own length
and seed. Chance is 25 % for the packaged sample of four species, 20 % for five genomes; a logistic
regression on 6-mers stands beside it.

cpu: lengths 2^10 and 2^12 on the packaged sample, 400 steps of 16 windows. paper: 1.4M and 7M
parameters, 2^10 to 2^20, ten epochs of 1024 steps of 64 windows, from 2^14 on with the length
warm-up; run dna-length at that scale into the same results folder first, and give the genomes, as
in --set 'task.genomes=["human=hg38.fa", "chimpanzee=panTro6.fa", ...]'.

Cost: cpu, 12 cells on one core each: 4 of dna-length of 7 to 8 minutes, 4 of 2 minutes and 4 of 8.
paper, not run: 12 cells of 6.7e8 to 6.9e11 tokens. Expected: cpu, near chance at both lengths: the
paper's own are at 28 to 31 % of five species up to 2^12, and the sample has the same loci of all.
Found: 24 to 25 %, pretrained or not.
"""

from __future__ import annotations

from typing import Any

from seqbench.suite.experiment import Request
from seqbench.suite.figures import Figure, Line
from seqbench.suite.grids import dna_length

TITLE = "Great apes: accuracy by context length"
SEEDS = (0, 1)
CPU_LENGTHS = (2**10, 2**12)
WARM_UP_FROM = 2**14
PAPER_EPOCH = 1024  # steps
CPU = {
    "train.steps": 400,
    "train.batch_size": 16,
    "train.lr": 1e-3,
    "train.warmup_steps": 40,
    "train.micro_tokens": 2**13,
}


def requests(scale: str) -> list[Request]:
    """The pretraining at the cpu scale, then fine-tuning, then training from scratch."""
    lines = _lines(scale)
    cells = [request for line in lines.values() for request in line]
    sources = [r.init_from for r in cells if r.init_from is not None]
    return [*(sources if scale != "paper" else []), *cells]


def figures(scale: str) -> list[Figure]:
    """Accuracy against the length of context."""
    return [
        Figure(
            name="species",
            title=TITLE,
            x="task.length",
            x_label="context length, bases",
            lines=tuple(Line(name=name, requests=tuple(r)) for name, r in _lines(scale).items()),
        )
    ]


def _lines(scale: str) -> dict[str, list[Request]]:
    if scale == "paper":
        return {
            f"{name}, fine-tuned": [
                _request(scale, _paper(source.settings), source) for source in sources
            ]
            for name, sources in dna_length.by_size(scale).items()
        }
    (sources,) = dna_length.by_size(scale).values()
    sources = [s for s in sources if s.settings["task.length"] in CPU_LENGTHS]
    settings = [CPU | {"task.length": s.settings["task.length"]} for s in sources]
    return {
        "mamba, fine-tuned": [
            _request(scale, s, source) for s, source in zip(settings, sources, strict=True)
        ],
        "mamba, from scratch": [_request(scale, s, None) for s in settings],
    }


def _request(scale: str, settings: dict[str, Any], source: Request | None) -> Request:
    return Request(task="species", model="mamba", scale=scale, settings=settings, init_from=source)


def _paper(source: Any) -> dict[str, Any]:
    length = source["task.length"]
    settings = {key: source[key] for key in ("task.length", "model.num_layers", "model.d_model")}
    settings |= {"train.precision": "bf16-mixed", "train.micro_tokens": 2**17}
    settings["train.segment_length"] = 2**17
    if length > WARM_UP_FROM:  # an epoch a length
        stages = (length // WARM_UP_FROM).bit_length() - 1
        settings |= {
            "task.warmup_from": WARM_UP_FROM,
            "train.curriculum": True,
            "train.curriculum_pass": 1.0,
            "train.curriculum_until": stages / 10,
        }
    return settings
