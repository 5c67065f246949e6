"""The memory bench: peak memory of a training step through Mamba, against its length.

Once through one layer, the whole block (projections, short convolution, scan): the step is forward,
backward from a gradient of the output down to one of the input, as inside a deeper model, and
AdamW. And once through a model of two layers, from tokens to the loss and AdamW: plain, in segments
with exact gradients, and in segments with truncated ones, as `train.segment_length` trains. D = 64
and N = 16, batch 1. Each figure is a process's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from seqbench.kernels.selective_scan import chunked_scan, selective_scan
from seqbench.models.base import CausalModule
from seqbench.models.build import build_model
from seqbench.models.segments import Gradients, segmented, segmented_loss
from seqbench.suite.bench.result import (
    COLOURS,
    MARKERS,
    GateClosed,
    Result,
    binary,
    conditions,
    length_axis,
)
from seqbench.suite.bench.timing import Peak, available_memory, peak_of_process, reason

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

WIDTH, STATE, VOCABULARY = 64, 16, 5
LENGTHS = tuple(2**k for k in range(12, 21, 2))
QUICK = (2**12, 2**16)
SEGMENT = 4096
BAR = 2e9  # bytes that the longest may take in pieces

_TOLERANCE = 1e-3  # of the largest gradient of each tensor, float32
_GATE_LENGTH, _GATE_SEGMENT = 1000, 192
_WAYS = ("whole", "in pieces", "scan alone", "scan alone, in pieces")
# Of the model: its gradients.
_MODEL_WAYS = ("plain", "exact", "truncated")
_UNBOUNDED = ("whole", "plain")  # what would take all of a machine's memory


@dataclass(frozen=True, kw_only=True)
class Row:
    """One way through at one length."""

    way: str
    length: int
    peak: Peak | None = None
    not_run: str | None = None


@dataclass(frozen=True, kw_only=True)
class MemoryBench(Result):
    """What `bench_memory` found."""

    name: ClassVar[str] = "memory"
    segment: int = SEGMENT
    gate: float  # the largest difference of a gradient, in pieces and whole
    parameters: int
    rows: list[Row]

    def title(self) -> str:
        """What the table shows."""
        return (
            f"Peak memory of one training step through one Mamba layer, and through a model of two "
            f"(D {WIDTH}, N {STATE}), batch 1, float32, pieces of {self.segment}, {self.machine()}"
        )

    def table(self) -> Table:
        """For a terminal."""
        from rich.table import Table

        table = Table(box=None, header_style="bold")
        for name in ("L", "", "peak MB", "process MB", "bytes a step", "seconds"):
            table.add_column(name, justify="left" if not name else "right")
        previous = None
        for row in self.rows:
            first = binary(row.length) if row.length != previous else ""
            previous = row.length
            way = f"two layers, {row.way}" if row.way in _MODEL_WAYS else row.way
            if row.peak is None:
                table.add_row(first, f"{way}: not run, {row.not_run}", style="dim")
                continue
            table.add_row(
                first,
                way,
                f"{row.peak.run / 1e6:.0f}",
                f"{row.peak.process / 1e6:.0f}",
                f"{row.peak.run / row.length:.0f}",
                f"{row.peak.seconds:.2f}",
            )
        return table

    def remarks(self) -> list[str]:
        """What the longest takes, in pieces, and how flat the model's memory is."""
        lines = []
        longest = [row for row in self.rows if row.way == "in pieces" and row.peak]
        if longest and (peak := longest[-1].peak):
            held = 4 * WIDTH * longest[-1].length
            lines.append(
                f"One layer, L = {binary(longest[-1].length)} in pieces: {peak.run / 1e9:.2f} GB, "
                f"{peak.process / 1e9:.2f} GB with all the process holds; of which the layer's "
                f"input, output and their gradients, {4 * held / 1e9:.2f} GB"
            )
        for way in ("exact", "truncated"):
            found = [row for row in self.rows if row.way == way and row.peak]
            # A segment's memory is reached by sequences of at least two.
            found = [row for row in found if row.length > self.segment]
            if len(found) > 1 and found[0].peak and found[-1].peak:
                low, high = found[0].peak.run, found[-1].peak.run
                lines.append(
                    f"Two layers, {way}: {low / 1e6:.0f} MB at {binary(found[0].length)}, "
                    f"{high / 1e6:.0f} MB at {binary(found[-1].length)}, {high / low:.2f} times, "
                    f"for {found[-1].length // found[0].length} times the length"
                )
        lines.append(
            "The model's tokens and targets, 16 bytes a position, stand in the process alone: any "
            "way of training needs them."
        )
        return lines + self.noise()

    def plot(self) -> Figure:
        """Peak memory against length: the layer, the model."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(11, 4.4), layout="constrained")
        layer, model = figure.subplots(1, 2, sharey=True)
        lengths = sorted({row.length for row in self.rows})
        for axes, ways in ((layer, _WAYS), (model, _MODEL_WAYS)):
            for i, way in enumerate(ways):
                rows = [row for row in self.rows if row.way == way and row.peak]
                axes.plot(
                    [row.length for row in rows],
                    [row.peak.run / 1e6 for row in rows if row.peak],
                    label=way if rows else f"{way} (not run)",
                    color=COLOURS[(3, 0, 4, 1)[i]],
                    marker=MARKERS[i],
                )
            length_axis(axes, lengths)
            axes.set(yscale="log")
        layer.plot(
            lengths,
            [16 * WIDTH * n / 1e6 for n in lengths],
            color="black",
            linestyle=":",
            linewidth=1,
            label="input, output and their gradients",
        )
        layer.axhline(BAR / 1e6, color="#999999", linestyle="--", linewidth=1)
        layer.annotate("2 GB", (lengths[0], BAR / 1e6), va="bottom", color="#666666", fontsize=9)
        layer.set(ylabel="peak memory (MB)", title="one layer")
        model.set(title=f"two layers, segments of {self.segment}")
        for axes in (layer, model):
            axes.legend(frameon=False, fontsize=9)
        figure.suptitle(
            f"One training step of Mamba, D {WIDTH}, N {STATE}, batch 1; {self.machine()}",
            fontsize=10,
        )
        return figure


def bench_memory(
    *,
    lengths: Sequence[int] = LENGTHS,
    device: str = "cpu",
    threads: int | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> MemoryBench:
    """Checks that pieces give the gradients of the whole, then measures every way and length.

    Raises GateClosed, before anything is measured, if they do not.
    """
    with conditions(torch.device(device), threads) as facts:
        progress("checking the gradients of pieces")
        gate = _judge(device)
        rows: list[Row] = []
        for length in lengths:
            for way in (*_WAYS, *_MODEL_WAYS):
                progress(f"{way} at {length}")
                rows.append(_measured(way, length, device, rows))
        parameters = sum(p.numel() for p in _block("cpu").parameters())
    return MemoryBench(gate=gate, parameters=parameters, rows=rows, environment=facts)


def _measured(way: str, length: int, device: str, before: Sequence[Row]) -> Row:
    job: Callable[..., Callable[[], object]] = _layer_job
    arguments: tuple[object, ...] = (length, way.endswith("pieces"), device)
    if way.startswith("scan"):
        job = _scan_job
    if way in _MODEL_WAYS:
        job, arguments = _model_job, (length, way, device)
    shorter = [row for row in before if row.way == way and row.peak]
    available = available_memory()
    if device == "cpu" and shorter and available is not None:
        last = shorter[-1]
        needs = last.peak.run * length // last.length if last.peak else 0
        if way in _UNBOUNDED and needs > 0.9 * available:
            note = f"needs about {needs / 1e9:.0f} GB, {available / 1e9:.0f} GB are free"
            return Row(way=way, length=length, not_run=note)
    try:
        peak = peak_of_process(job, arguments, torch.get_num_threads(), device)
    except (RuntimeError, MemoryError) as error:
        killed = isinstance(error, BrokenProcessPool)  # by the kernel, when memory runs out
        return Row(way=way, length=length, not_run="out of memory" if killed else reason(error))
    return Row(way=way, length=length, peak=peak)


def _layer_job(length: int, in_pieces: bool, device: str) -> Callable[[], object]:
    block = _block(device)
    optimizer = torch.optim.AdamW(block.parameters(), lr=1e-3)

    def step(length: int) -> None:
        x_BLD = torch.randn(1, length, WIDTH, device=device, requires_grad=True)
        y_BLD = segmented(block, x_BLD, segment=SEGMENT) if in_pieces else block(x_BLD)
        optimizer.zero_grad()
        y_BLD.backward(torch.ones_like(y_BLD))
        optimizer.step()

    step(64)
    return partial(step, length)


def _scan_job(length: int, in_pieces: bool, device: str) -> Callable[[], object]:
    """The scan of that layer alone, its inputs given."""
    width = 2 * WIDTH
    A = -torch.arange(1.0, STATE + 1, device=device).repeat(width, 1).requires_grad_()
    scan: Callable[..., Any] = (
        partial(chunked_scan, segment=SEGMENT) if in_pieces else selective_scan
    )

    def step(length: int) -> None:
        u, delta, z = (
            torch.randn(1, length, width, device=device, requires_grad=True) for _ in range(3)
        )
        B, C = (torch.randn(1, length, STATE, device=device, requires_grad=True) for _ in range(2))
        y_BLD: Tensor = scan(u, delta, A, B, C, None, z, delta_softplus=True)
        y_BLD.backward(torch.ones_like(y_BLD))

    step(64)
    return partial(step, length)


def _model_job(length: int, way: str, device: str) -> Callable[[], object]:
    model = _model(device, num_layers=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def step(tokens_BL: Tensor, targets_BL: Tensor) -> None:
        optimizer.zero_grad()
        _model_loss(model, tokens_BL, targets_BL, way, SEGMENT).backward()
        optimizer.step()

    def batch(length: int) -> tuple[Tensor, Tensor]:
        tokens = torch.randint(0, VOCABULARY, (2, 1, length), device=device)
        return tokens[0], tokens[1]

    step(*batch(64))
    return partial(step, *batch(length))


def _model_loss(model: Any, tokens: Tensor, targets: Tensor, way: str, segment: int) -> Tensor:
    def loss_of(logits_BLV: Tensor, some: slice) -> Tensor:
        wanted = targets[:, some].flatten()
        return F.cross_entropy(logits_BLV.flatten(0, 1), wanted, reduction="sum") / targets.numel()

    if way == "plain":
        return loss_of(model(tokens), slice(0, targets.shape[1]))
    gradients: Gradients = "exact" if way == "exact" else "truncated"
    return segmented_loss(model, loss_of, tokens, segment=segment, gradients=gradients)


def _model(device: str, num_layers: int) -> Any:
    torch.manual_seed(0)
    model = build_model(
        "mamba", vocab_size=VOCABULARY, d_model=WIDTH, num_layers=num_layers, d_state=STATE
    )
    return model.to(device)


def _block(device: str) -> CausalModule:
    block = _model(device, num_layers=1).layers[0].block
    assert isinstance(block, CausalModule)
    return block


def _judge(device: str) -> float:
    """The largest difference of the output and of every gradient, over its largest value.

    Of the layer, and of the model whose segments are to be exact.
    """
    block = _block(device)
    x_BLD = torch.randn(2, _GATE_LENGTH, WIDTH, device=device, requires_grad=True)
    wanted = [x_BLD, *block.parameters()]
    found = []
    for y_BLD in (block(x_BLD), segmented(block, x_BLD, segment=_GATE_SEGMENT)):
        found.append([y_BLD, *torch.autograd.grad(y_BLD.square().mean(), wanted)])
    model = _model(device, num_layers=2)
    tokens = torch.randint(0, VOCABULARY, (2, 2, _GATE_LENGTH), device=device)
    for place, way in enumerate(("plain", "exact")):
        loss = _model_loss(model, tokens[0], tokens[1], way, _GATE_SEGMENT)
        found[place] += [loss, *torch.autograd.grad(loss, list(model.parameters()))]
    worst = max(
        ((pieces - whole).abs().max() / whole.abs().max()).item() for whole, pieces in zip(*found)
    )
    if not worst <= _TOLERANCE:
        raise GateClosed(
            f"bench memory: in pieces a gradient is off by {worst:.1e} of its largest value, "
            f"beyond {_TOLERANCE:.0e}; nothing is measured"
        )
    return worst
