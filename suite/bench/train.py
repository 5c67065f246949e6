"""The training bench: tokens a second of whole steps, forward, backward and AdamW.

A small Mamba beside the same model built from mambapy's blocks, with the same parameters; and
beside a Transformer of nearly as many parameters over a range of lengths, at equal tokens a batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seqbench.models.backbone import Backbone
from seqbench.models.build import build_model, match_parameters, parameter_groups
from seqbench.suite.bench.result import (
    COLOURS,
    GateClosed,
    Result,
    binary,
    conditions,
    length_axis,
    plain,
)
from seqbench.suite.bench.timing import Timing, available_memory, free, interleave

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

WIDTH, LAYERS, VOCABULARY = 64, 2, 256
HEADS = 2  # of the Transformer
BATCH = 32
LENGTHS = (256, 1024)  # beside mambapy
RANGE = tuple(2**k for k in range(6, 14))  # beside the Transformer
TOKENS = 8192  # a batch, there

_TOLERANCE = 1e-3  # of the largest logit, or gradient of a parameter; float32
_GATE = (2, 100)
_WHOLE_STATES = 12  # (B, L, D, N) tensors a layer that mambapy keeps for backward, about
_PROFILED = (BATCH, 256)
_OFTEN = 0.1  # share of a step from which an operator is worth naming


@dataclass(frozen=True, kw_only=True)
class Row:
    """One model at one shape."""

    model: str
    ours: bool
    batch: int
    length: int
    step: Timing | None = None
    not_run: str | None = None

    @property
    def rate(self) -> float | None:
        """Tokens a second."""
        return None if self.step is None else self.batch * self.length / self.step.median


@dataclass(frozen=True, kw_only=True)
class TrainBench(Result):
    """What `bench_train` found."""

    name: ClassVar[str] = "train"
    parameters: dict[str, int]
    gate: float | None  # the largest difference to mambapy's; None if that is not installed
    beside_mambapy: list[Row]
    beside_transformer: list[Row]
    profile: dict[str, float] = field(default_factory=dict)  # operator -> share of a Mamba step

    def over_mambapy(self, length: int) -> float | None:
        """Our rate over mambapy's."""
        rates = {r.model: r.rate for r in self.beside_mambapy if r.length == length}
        ours, theirs = rates.get("mamba"), rates.get("mambapy")
        return ours / theirs if ours and theirs else None

    def crossover(self) -> float | None:
        """The length from which Mamba is the faster one; 0 if it always is, None if never."""
        ratios = []
        for length in sorted({row.length for row in self.beside_transformer}):
            rates = {r.model: r.rate for r in self.beside_transformer if r.length == length}
            ours, theirs = rates.get("mamba"), rates.get("transformer")
            if ours and theirs:
                ratios.append((math.log(length), math.log(ours / theirs)))
        if not ratios or ratios[-1][1] < 0:
            return None
        for (x0, y0), (x1, y1) in reversed(list(pairwise(ratios))):
            if y0 < 0 <= y1:
                return math.exp(x0 - y0 * (x1 - x0) / (y1 - y0))
        return 0.0

    def facts(self) -> dict[str, Any]:
        """Everything, as plain data."""
        facts = super().facts()
        for rows in ("beside_mambapy", "beside_transformer"):
            for found, row in zip(facts[rows], getattr(self, rows)):
                found["rate"] = row.rate
        lengths = dict.fromkeys(row.length for row in self.beside_mambapy)
        return {
            **facts,
            "over_mambapy": {length: self.over_mambapy(length) for length in lengths},
            "crossover": self.crossover(),
        }

    def title(self) -> str:
        """What the table shows."""
        sizes = ", ".join(f"{name} {n:,}" for name, n in self.parameters.items())
        return f"Training steps, {LAYERS} layers, float32, {self.machine()}; parameters: {sizes}"

    def table(self) -> Table:
        """For a terminal."""
        from rich.table import Table

        table = Table(box=None, header_style="bold")
        for name in ("batch", "L", "", "ms a step", "tokens/s"):
            table.add_column(name, justify="left" if not name else "right")
        for rows in (self.beside_mambapy, self.beside_transformer):
            previous = None
            for row in rows:
                first = ["", ""]
                if row.length != previous:
                    first = [str(row.batch), str(row.length)]
                previous = row.length
                if row.step is None or row.rate is None:
                    table.add_row(*first, f"{row.model}: not run, {row.not_run}", style="dim")
                    continue
                table.add_row(
                    *first,
                    row.model,
                    f"{1e3 * row.step.median:.1f}",
                    f"{row.rate:,.0f}",
                    style="bold" if row.ours else None,
                )
            table.add_section()
        return table

    def remarks(self) -> list[str]:
        """Ratios, the crossover, where the time goes, and the noise."""
        lines = []
        for batch, length in dict.fromkeys((r.batch, r.length) for r in self.beside_mambapy):
            ratio = self.over_mambapy(length)
            if ratio is not None:
                lines.append(f"over mambapy at batch {batch}, L = {length}: {ratio:.1f}x")
        if self.beside_transformer:
            lines.append(self._crossover_remark())
        if self.profile:
            shares = ", ".join(f"{op} {100 * x:.0f} %" for op, x in self.profile.items())
            lines.append(f"a step of batch {_PROFILED[0]}, L = {_PROFILED[1]}: {shares}")
            often = [
                op for op, x in self.profile.items() if x > _OFTEN and op not in (*_KINDS, _REST)
            ]
            lines.append(
                f"beside {', '.join(_KINDS)}, more than 10 %: {', '.join(often) or 'none'}"
            )
        return lines + self.noise()

    def plot(self) -> Figure:
        """Tokens a second: over lengths, beside mambapy, and where a step's time goes."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(13 if self.profile else 10, 4.4), layout="constrained")
        ratios = [1.5, 0.8, 1.1] if self.profile else [1.5, 0.8]
        panels = figure.subplots(1, len(ratios), width_ratios=ratios)
        self._draw_lengths(panels[0])
        self._draw_mambapy(panels[1])
        if self.profile:
            shares = list(self.profile.items())[::-1]
            bars = panels[2].barh(
                [op for op, _ in shares], [100 * x for _, x in shares], color=COLOURS[0]
            )
            panels[2].bar_label(bars, fmt="%.0f %%", padding=3, fontsize=8)
            panels[2].set(
                title=f"mamba, batch {_PROFILED[0]}, L = {_PROFILED[1]}",
                xlabel="share of a step (%)",
            )
            panels[2].tick_params(axis="y", labelsize=8)
            plain(panels[2])
        figure.suptitle(f"Training steps, {LAYERS} layers, float32, {self.machine()}", fontsize=11)
        return figure

    def _draw_lengths(self, axes: Any) -> None:
        for name, colour, marker in (
            ("mamba", COLOURS[0], "o"),
            ("transformer", COLOURS[3], "s"),
        ):
            rows = [row for row in self.beside_transformer if row.model == name and row.rate]
            axes.plot(
                [row.length for row in rows],
                [row.rate for row in rows],
                label=f"{name}, {self.parameters.get(name, 0):,} parameters",
                color=colour,
                marker=marker,
            )
        length_axis(axes, sorted({row.length for row in self.beside_transformer}))
        axes.set(yscale="log", ylabel="tokens/s", title=f"{TOKENS} tokens a batch")
        if crossover := self.crossover():
            axes.axvline(crossover, color="#666666", linestyle=":", linewidth=1)
            axes.annotate(
                f"{crossover:.0f}",
                (crossover, 0.02),
                xycoords=("data", "axes fraction"),
                xytext=(4, 0),
                textcoords="offset points",
                color="#666666",
            )
        axes.legend(frameon=False, fontsize=9)

    def _draw_mambapy(self, axes: Any) -> None:
        lengths = list(dict.fromkeys(row.length for row in self.beside_mambapy))
        for i, (name, colour) in enumerate((("mamba", COLOURS[0]), ("mambapy", COLOURS[2]))):
            rates = {r.length: r.rate or 0.0 for r in self.beside_mambapy if r.model == name}
            bars = axes.bar(
                [x + 0.4 * i - 0.2 for x in range(len(lengths))],
                [rates.get(length, 0.0) for length in lengths],
                width=0.38,
                label=name,
                color=colour,
            )
            if name == "mambapy":
                ratios = [self.over_mambapy(length) for length in lengths]
                labels = ["not run" if ratio is None else f"1/{ratio:.0f}" for ratio in ratios]
                axes.bar_label(bars, labels, fontsize=9)
        axes.set_xticks(range(len(lengths)), [f"L = {binary(n)}" for n in lengths])
        batches = {row.batch for row in self.beside_mambapy}
        axes.set(title=f"batch {', '.join(map(str, batches))}, the same model")
        axes.set_ylim(top=1.25 * axes.get_ylim()[1])
        plain(axes)
        axes.legend(frameon=False, fontsize=9)

    def _crossover_remark(self) -> str:
        lengths = sorted({row.length for row in self.beside_transformer})
        crossover = self.crossover()
        if crossover is None:
            return f"the transformer is faster up to L = {lengths[-1]}"
        if crossover == 0:
            return f"mamba is faster than the transformer at every length from {lengths[0]} on"
        return f"mamba is faster than the transformer from L = {crossover:.0f} on"


def bench_train(
    *,
    lengths: Sequence[int] = LENGTHS,
    range_: Sequence[int] = RANGE,
    batch: int = BATCH,
    device: str = "cpu",
    threads: int | None = None,
    profile: bool = False,
    progress: Callable[[str], None] = lambda line: None,
) -> TrainBench:
    """Checks that both Mambas are one function, then times whole steps.

    `lengths` are those beside mambapy, `range_` those beside the Transformer. Raises GateClosed,
    before anything is timed, if logits or gradients differ.
    """
    place = torch.device(device)
    with conditions(place, threads, ["mambapy"]) as facts:
        mamba = _model("mamba", WIDTH, place)
        width = match_parameters(
            "transformer",
            parameters=mamba.num_parameters,
            vocab_size=VOCABULARY,
            num_layers=LAYERS,
            num_heads=HEADS,
            multiple_of=2 * HEADS,  # rotation needs heads of even width
        )
        transformer = _model("transformer", width, place, num_heads=HEADS)
        gate = None
        if find_spec("mambapy"):
            progress("checking mamba beside mambapy")
            gate = _judge(mamba, MambapyModel(mamba), place)
        rows = []
        for length in lengths:
            progress(f"timing L = {length} beside mambapy")
            models: dict[str, nn.Module] = {"mamba": mamba}
            refusal = _mambapy_refusal(batch, length, place)
            if refusal is None:
                models["mambapy"] = MambapyModel(mamba)
            rows += _timed(models, batch, length, place)
            if refusal is not None:
                rows.append(
                    Row(model="mambapy", ours=False, batch=batch, length=length, not_run=refusal)
                )
        over = []
        for length in range_:
            progress(f"timing L = {length} beside the transformer")
            models = {"mamba": mamba, "transformer": transformer}
            over += _timed(models, max(1, TOKENS // length), length, place)
        shares = _profile(mamba, place) if profile else {}
    return TrainBench(
        parameters={"mamba": mamba.num_parameters, "transformer": transformer.num_parameters},
        gate=gate,
        beside_mambapy=rows,
        beside_transformer=over,
        profile=shares,
        environment=facts,
    )


class MambapyModel(nn.Module):
    """The Mamba `Backbone` it is given, from mambapy's blocks and with copies of its parameters.

    `pairs` are names of parameters here and there.
    """

    def __init__(self, model: Backbone) -> None:
        from mambapy.mamba import Mamba, MambaConfig

        super().__init__()
        device = model.embedding.weight.device
        blocks = Mamba(MambaConfig(d_model=model.d_model, n_layers=len(model.layers))).to(device)
        self.blocks = blocks
        self.embedding = nn.Embedding.from_pretrained(
            model.embedding.weight.detach().clone(), freeze=False
        )
        self.final_norm = nn.RMSNorm(model.d_model, eps=model.config.norm_eps, device=device)
        self.pairs = {
            "embedding.weight": "embedding.weight",
            "final_norm.weight": "final_norm.weight",
        }
        for i in range(len(model.layers)):
            here, there = f"blocks.layers.{i}", f"layers.{i}"
            self.pairs |= {
                f"{here}.norm.weight": f"{there}.norm.weight",
                f"{here}.mixer.in_proj.weight": f"{there}.block.in_proj.weight",
                f"{here}.mixer.conv1d.weight": f"{there}.block.conv_weight",
                f"{here}.mixer.conv1d.bias": f"{there}.block.conv_bias",
                f"{here}.mixer.x_proj.weight": f"{there}.block.layer.x_proj.weight",
                f"{here}.mixer.dt_proj.weight": f"{there}.block.layer.dt_proj.weight",
                f"{here}.mixer.dt_proj.bias": f"{there}.block.layer.dt_bias",
                f"{here}.mixer.A_log": f"{there}.block.layer.A_log",
                f"{here}.mixer.D": f"{there}.block.layer.D",
                f"{here}.mixer.out_proj.weight": f"{there}.block.out_proj.weight",
            }
        theirs, ours = dict(self.named_parameters()), dict(model.named_parameters())
        assert set(self.pairs) == set(theirs) and set(self.pairs.values()) == set(ours)
        with torch.no_grad():
            for mine, other in self.pairs.items():
                theirs[mine].copy_(ours[other].view_as(theirs[mine]))

    def forward(self, tokens_BL: Tensor) -> Tensor:
        x_BLD = self.final_norm(self.blocks(self.embedding(tokens_BL)))
        return F.linear(x_BLD, self.embedding.weight)


def _model(name: str, width: int, device: torch.device, **options: Any) -> Backbone:
    torch.manual_seed(0)
    model = build_model(name, vocab_size=VOCABULARY, d_model=width, num_layers=LAYERS, **options)
    return model.to(device)


def _judge(ours: Backbone, theirs: MambapyModel, device: torch.device) -> float:
    """The largest difference of logits and gradients, each over its tensor's largest value."""
    tokens, targets = _batch(*_GATE, device)
    found: list[dict[str, Tensor]] = []
    for model in (ours, theirs):
        logits = model(tokens)
        names = [name for name, _ in model.named_parameters()]
        gradients = torch.autograd.grad(_loss(logits, targets), list(model.parameters()))
        found.append({"logits": logits.detach(), **dict(zip(names, gradients))})
    worst = 0.0
    for here, there in {"logits": "logits", **theirs.pairs}.items():
        expected = found[0][there]
        difference = found[1][here].view_as(expected) - expected
        distance = (difference.abs().max() / expected.abs().max()).item()
        worst = max(worst, distance)
        if not distance <= _TOLERANCE:
            raise GateClosed(
                f"bench train: mambapy's {here} is off by {distance:.1e} of the largest value of "
                f"ours, beyond {_TOLERANCE:.0e}; nothing is timed"
            )
    return worst


def _timed(
    models: dict[str, nn.Module], batch: int, length: int, device: torch.device
) -> list[Row]:
    work = {name: _step(model, batch, length, device) for name, model in models.items()}
    failures: dict[str, str] = {}
    timings = interleave(work, device, seconds=2.0, launched=set(work), failures=failures)
    work.clear()
    free(device)
    return [
        Row(
            model=name,
            ours=name == "mamba",
            batch=batch,
            length=length,
            step=timings.get(name),
            not_run=failures.get(name),
        )
        for name in models
    ]


def _step(model: nn.Module, batch: int, length: int, device: torch.device) -> Callable[[], object]:
    """One training step; the same tokens each time, and steps too small to change the model."""
    tokens, targets = _batch(batch, length, device)
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.1), lr=1e-9, fused=True)

    def run() -> object:
        loss = _loss(model(tokens), targets)
        optimizer.zero_grad()
        loss.backward()
        return optimizer.step()

    return run


def _batch(batch: int, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(VOCABULARY, (batch, length + 1), generator=generator).to(device)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def _loss(logits_BLV: Tensor, targets_BL: Tensor) -> Tensor:
    return F.cross_entropy(logits_BLV.flatten(0, 1), targets_BL.flatten())


def _mambapy_refusal(batch: int, length: int, device: torch.device) -> str | None:
    if not find_spec("mambapy"):
        return "not installed; the extra seqbench[test] brings it"
    needs = 4 * _WHOLE_STATES * LAYERS * batch * length * 2 * WIDTH * 16
    available = available_memory()
    if device.type == "cpu" and available is not None and needs > available:
        return f"needs about {needs / 1e9:.0f} GB, {available / 1e9:.0f} GB are free"
    return None


_KINDS = ("matrix products", "scan", "convolution")
_REST = "everything else"


def _profile(model: nn.Module, device: torch.device, steps: int = 5) -> dict[str, float]:
    """Share of a training step by operator: the three kinds, then others by size, then the rest."""
    from torch.profiler import ProfilerActivity, profile

    run = _step(model, *_PROFILED, device)
    run()
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities) as found:
        for _ in range(steps):
            run()
    times: dict[str, float] = {}
    for event in found.key_averages():
        taken = event.self_device_time_total if cuda else event.self_cpu_time_total
        kind = _kind(event.key)
        times[kind] = times.get(kind, 0.0) + taken
    whole = sum(times.values())
    shares = {op: taken / whole for op, taken in times.items()}
    named = sorted((op for op in shares if op not in _KINDS), key=lambda op: -shares[op])[:7]
    return {
        **{kind: shares.get(kind, 0.0) for kind in _KINDS},
        **{op: shares[op] for op in named},
        _REST: 1 - sum(shares.get(op, 0.0) for op in (*_KINDS, *named)),
    }


def _kind(operator: str) -> str:
    name = operator.rpartition("::")[2].removesuffix("_")
    if "selective_scan" in operator:
        return "scan"
    if "conv" in operator:
        return "convolution"
    if name in ("mm", "addmm", "bmm", "baddbmm", "matmul", "linear"):
        return "matrix products"
    return operator
