"""The scan bench: our backends beside other scans and mixers, timed once all are right."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from seqbench.suite.bench.entrants import Entrant, Size, entrants
from seqbench.suite.bench.peaks import Floor, Peaks, measure_peaks, scan_floor
from seqbench.suite.bench.result import (
    COLOURS,
    MARKERS,
    PAPER,
    GateClosed,
    Result,
    conditions,
    length_axis,
)
from seqbench.suite.bench.timing import (
    CAPTURED_BELOW,
    Timing,
    available_memory,
    free,
    interleave,
    peak_extra_memory,
    reason,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.table import Table

HEADLINE = Size(batch=8, length=1024, width=128, state=16)
# From 256 to 65536 steps, of 8192 tokens as long as a batch can be halved; and a wider one.
SIZES = (
    *(
        Size(batch=max(1, 8192 // length), length=length, width=128, state=16)
        for length in (256, 1024, 4096, 16384, 65536)
    ),
    Size(batch=4, length=4096, width=256, state=16),
)
# On a GPU: the setting of the paper's figure 8, and two shapes of training.
CUDA_HEADLINE = Size(batch=1, length=32768, width=1024, state=16)
CUDA_SIZES = (
    *(Size(batch=1, length=2**k, width=1024, state=16) for k in range(9, 20)),
    Size(batch=8, length=2048, width=2048, state=16),
    Size(batch=1, length=2**20, width=512, state=16),
)

YARDSTICK = "mambapy pscan"  # the peer that remarks and memory shares compare with

# The paper's milliseconds, read off its figure 8: forward, A100, batch 1, D 1024, N 16, bfloat16.
PAPER_LENGTHS = tuple(2**k for k in range(9, 20))
PAPER_MS: dict[str, tuple[float, ...]] = {
    "scan": (0.040, 0.060, 0.110, 0.226, 0.445, 1.07, 2.11, 4.25, 8.50, 17.1, 34.6),
    "FlashAttention-2": (0.066, 0.060, 0.108, 0.327, 1.04, 3.91, 15.0, 59.1, 242, 1022, 4213),
    "convolution": (0.120, 0.147, 0.248, 0.602, 1.17, 2.76, 5.65, 12.4, 29.0, 55.2),
    "PyTorch scan": (1.40, 2.44, 4.58, 9.03, 18.4, 38.0, 78.5, 158, 300),
}

# Largest error of y and of each gradient, over the largest value of that tensor. Float32 sums of
# as many terms as the batch has steps (dA) are good to about 1e-5; a wrong term shows at 1e-2. A
# bfloat16 result is rounded by up to 2e-3 once, and attention rounds its weights as well.
_TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 2e-2}
_GATE = Size(batch=2, length=257, width=72, state=16)  # no power of two, no multiple of a chunk
_LOOP_LENGTH = 4096  # up to here the float64 loop is the judge at the timed size too
# Beyond so many numbers in u only this many channels are judged at the timed size, and not dB and
# dC, which sum over all: the float64 judge would take longer than everything it judges.
_JUDGED_WHOLE, _JUDGED_CHANNELS = 2**20, 32
_WHOLE_STATES = 10  # (B, L, D, N) tensors that an entrant which expands holds, at most
_PATIENCE = {"cpu": 20.0, "cuda": 6.0}  # seconds; a pass that would take longer is left out
_SECONDS = {"cpu": 0.6, "cuda": 0.4}  # of timing for each, at least one run


@dataclass(frozen=True, kw_only=True)
class Row:
    """One entrant at one size."""

    entrant: str
    ours: bool
    compiled: bool = False
    size: Size
    dtype: str = "float32"  # of the sequences
    error: float | None = None  # the largest at this size; None: judged at _GATE only
    forward: Timing | None = None  # without gradients; None: did not run
    both: Timing | None = None  # forward and backward
    extra_memory: int | None = None  # peak bytes of forward + backward, beside tensors in and out
    compile_seconds: float | None = None
    floor: Floor | None = None  # for ours
    not_run: str | None = None

    @property
    def label(self) -> str:
        """The entrant, with its dtype where that is not float32."""
        return self.entrant + ("" if self.dtype == "float32" else f" {self.dtype}")


@dataclass(frozen=True, kw_only=True)
class ScanBench(Result):
    """What `bench_scan` found."""

    name: ClassVar[str] = "scan"
    gate: dict[str, float]  # entrant -> largest error at the gate's size
    peaks: list[Peaks]
    rows: list[Row]
    headline: Size = HEADLINE
    tolerance: dict[str, float] = field(
        default_factory=lambda: {_short(dtype): limit for dtype, limit in _TOLERANCE.items()}
    )

    def row(self, label: str, size: Size | None = None) -> Row | None:
        """The figures of an entrant, by label, at a size (by default the headline)."""
        size = size or self.headline
        found = [row for row in self.rows if row.label == label and row.size == size]
        return found[0] if found else None

    def ours(self, size: Size | None = None) -> Row | None:
        """Our fastest backend at a size, by forward + backward, in the peers' dtype."""
        size = size or self.headline
        timed = [row for row in self.rows if row.ours and row.size == size and row.both]
        timed = [row for row in timed if row.dtype == timed[0].dtype]
        return min(timed, key=lambda row: row.both.median if row.both else 0.0, default=None)

    def facts(self) -> dict[str, Any]:
        """Everything, as plain data."""
        return {
            **super().facts(),
            "gate_size": asdict(_GATE),
            "ratios": [self._ratios(row) for row in self.rows if row.forward],
            "paper_ms": {"lengths": PAPER_LENGTHS, **PAPER_MS} if self._on_gpu else None,
        }

    def title(self) -> str:
        """What the table shows."""
        dtype = "bfloat16" if self._on_gpu else "float32"
        return f"Selective scan, {dtype}, medians, {self.machine()}; checked against float64 first"

    def table(self) -> Table:
        """For a terminal; ratios are to our fastest backend at the same size."""
        from rich.table import Table

        dtype = "bfloat16" if self._on_gpu else "float32"
        table = Table(box=None, header_style="bold")
        for name in ("(B, L, D, N)", ""):
            table.add_column(name, justify="left")
        heads = ("fwd ms", "x", "fwd+bwd ms", "x", "of floor", "extra MB", "of pscan's", "error")
        for name in heads:
            table.add_column(name, justify="right")
        previous = None
        for row in self.rows:
            if previous not in (None, row.size):
                table.add_section()
            first = str(row.size) if row.size != previous else ""
            previous = row.size
            label = row.entrant if row.dtype == dtype else row.label
            if row.forward is None:
                table.add_row(first, f"{label}: not run, {row.not_run}", style="dim")
                continue
            ratios = self._ratios(row)
            share, fraction = ratios["extra_memory_of_yardstick"], ratios["of_floor"]
            percents = (None if fraction is None else fraction[k] for k in ("forward", "both"))
            table.add_row(
                first,
                label,
                *_timed(row, row.forward, ratios["forward"]),
                *_timed(row, row.both, ratios["both"]),
                "" if fraction is None else ", ".join(map(_percent, percents)),
                "" if row.extra_memory is None else f"{row.extra_memory / 2**20:.1f}",
                "" if share is None else f"{100 * share:.1f} %",
                "" if row.error is None else f"{row.error:.0e}",
                style="bold" if row.ours else None,
            )
        return table

    def plot(self) -> Figure:
        """Time against length, log-log; forward left, forward and backward right."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(12, 4.8), layout="constrained")
        panels = figure.subplots(1, 2, sharey=True)
        sizes = dict.fromkeys(row.size for row in self.rows)
        width = statistics.mode(size.width for size in sizes)  # of the series over lengths
        rows = [row for row in self.rows if row.size.width == width]
        labels = list(dict.fromkeys(row.label for row in rows))
        suffix = " bfloat16" if self._on_gpu else ""  # all of them: the title says so
        styles = {
            label: (COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)], "-" if i < 8 else "--")
            for i, label in enumerate(labels)
        }
        lengths = sorted({row.size.length for row in rows})
        for axes, measure in zip(panels, ("forward", "both")):
            for label in labels:
                colour, marker, dash = styles[label]
                timed = [r for r in rows if r.label == label and getattr(r, measure)]
                axes.plot(
                    [r.size.length for r in timed],
                    [getattr(r, measure).median * self._unit(r.size) for r in timed],
                    label=label.removesuffix(suffix) + ("" if timed else " (not run)"),
                    color=colour,
                    marker=marker,
                    linestyle=dash,
                    markersize=5,
                    linewidth=2.4 if any(r.ours for r in timed) else 1.4,
                )
            self._draw_floor(axes, rows, measure)
            length_axis(axes, lengths)
            axes.set(
                yscale="log", title="forward" if measure == "forward" else "forward + backward"
            )
        if self._on_gpu:
            for (name, values), dash in zip(PAPER_MS.items(), ("-", "--", ":", "-.")):
                panels[0].plot(
                    PAPER_LENGTHS[: len(values)],
                    values,
                    label=f"paper, A100: {name}",
                    color=PAPER,
                    linestyle=dash,
                    linewidth=1,
                )
        panels[0].set_ylabel("time (ms)" if self._on_gpu else "time a token (ns)")
        handles, names = panels[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside right center", frameon=False, fontsize=9)
        dtype = "bfloat16" if self._on_gpu else "float32"
        figure.suptitle(
            f"Mixing a sequence of width {width} (scan state {self.headline.state}), {dtype}, "
            f"{self.machine()}",
            fontsize=11,
        )
        return figure

    def remarks(self) -> list[str]:
        """What to read beside the table: our distance to the peers and the floor, and the noise."""
        lines = []
        for peaks in self.peaks:
            fma = peaks.multiply_add
            adds = "" if fma is None else f"{fma / 1e9:.0f} G multiply-adds/s, "
            lines.append(
                f"peaks ({peaks.instructions}): {peaks.exp2 / 1e9:.1f} G exp2/s, {adds}"
                f"{peaks.bandwidth / 1e9:.0f} GB/s"
            )
        sizes = list(dict.fromkeys(row.size for row in self.rows))
        for size in sizes:
            lines += self._remarks_at(size)
        lines += self._ahead()
        if any(t and t.captured for row in self.rows for t in (row.forward, row.both)):
            limit = f"{CAPTURED_BELOW * 1e3:.0f} ms"
            lines.append(
                f"runs under {limit} are replayed as CUDA graphs, ours and the peers' alike"
            )
        return lines + self.noise()

    def _remarks_at(self, size: Size) -> list[str]:
        ours, lines = self.ours(size), []
        if ours is None:
            return []
        fraction = self._ratios(ours)["of_floor"]
        if fraction:
            lines.append(
                f"{ours.entrant} at {size}: {_percent(fraction['forward'])} of the floor forward, "
                f"{_percent(fraction['backward'])} backward, {_percent(fraction['both'])} in all"
            )
        peer = self.row(YARDSTICK, size)
        if peer and peer.both:
            ratios = self._ratios(peer)
            memory = ratios.get("our_extra_memory_over_its")
            share = "" if memory is None else f", in {memory:.1%} of its extra memory"
            lines.append(
                f"{ours.entrant} over {YARDSTICK} at {size}: {ratios['forward']:.0f}x forward, "
                f"{ratios['both']:.0f}x forward and backward{share}"
            )
            if ours.floor and peer.forward:
                lines.append(
                    f"{YARDSTICK} over the floor at {size}, the most any scan here can be ahead: "
                    f"{peer.forward.median / ours.floor.forward:.0f}x forward, "
                    f"{peer.both.median / ours.floor.both:.0f}x forward and backward"
                )
        return lines

    def _ahead(self) -> list[str]:
        """Whether we are ahead of everything everywhere, and by how much of the compiled peer."""
        if not any(self.ours(row.size) for row in self.rows):
            return []
        behind = []
        for row in self.rows:
            if not row.ours and row.forward:
                ratios = self._ratios(row)
                for measure in ("forward", "both"):
                    if ratios[measure] is not None and ratios[measure] < 1:
                        behind.append(f"{row.entrant} {measure} at {row.size}")
        lines = [f"behind: {'; '.join(behind)}" if behind else "ahead of every peer at every size"]
        compiled = [self._ratios(row) for row in self.rows if row.compiled and row.both]
        if compiled:
            least = {k: min(ratios[k] for ratios in compiled) for k in ("forward", "both")}
            lines.append(
                f"over the compiled peer: at least {least['forward']:.0f}x forward, "
                f"{least['both']:.0f}x forward and backward"
            )
        return lines

    def _ratios(self, row: Row) -> dict[str, Any]:
        """Of one row to our fastest at the same size, of its memory, of its floor."""
        ours, peer = self.ours(row.size), self.row(YARDSTICK, row.size)

        def ratio(measure: str) -> float | None:
            mine = getattr(ours, measure, None)
            its = getattr(row, measure)
            return its.median / mine.median if mine and its else None

        found: dict[str, Any] = {
            "entrant": row.label,
            "size": asdict(row.size),
            "ours": ours.label if ours else None,
            "forward": ratio("forward"),
            "both": ratio("both"),
            "extra_memory_of_yardstick": None,
            "of_floor": None,
        }
        if row.extra_memory is not None and peer and peer.extra_memory:
            found["extra_memory_of_yardstick"] = row.extra_memory / peer.extra_memory
        if row.extra_memory and ours and ours.extra_memory is not None:
            found["our_extra_memory_over_its"] = ours.extra_memory / row.extra_memory
        if row.floor and row.forward:
            both = row.both.median if row.both else None
            backward = None if both is None else max(both - row.forward.median, 1e-12)
            found["of_floor"] = {
                "forward": row.floor.forward / row.forward.median,
                "backward": None if backward is None else row.floor.backward / backward,
                "both": None if both is None else row.floor.both / both,
            }
        return found

    def _draw_floor(self, axes: Axes, rows: Sequence[Row], measure: str) -> None:
        floors = {r.size: r.floor for r in rows if r.floor}
        if floors:
            axes.plot(
                [size.length for size in floors],
                [getattr(floor, measure) * self._unit(size) for size, floor in floors.items()],
                label="floor of the scan here",
                color=COLOURS[0],
                linestyle=":",
                linewidth=1.2,
            )

    def _unit(self, size: Size) -> float:
        """Seconds to what is drawn: ms on a GPU (batch 1), else ns a token."""
        return 1e3 if self._on_gpu else 1e9 / (size.batch * size.length)

    @property
    def _on_gpu(self) -> bool:
        return self.environment.get("device", "cpu") != "cpu"


def bench_scan(
    *,
    sizes: Sequence[Size] | None = None,
    device: str = "cpu",
    threads: int | None = None,
    rounds: int = 9,
    memory_sizes: Sequence[Size] | None = None,
    progress: Callable[[str], None] = lambda line: None,
    so_far: Callable[[ScanBench], object] = lambda found: None,
) -> ScanBench:
    """Checks every entrant, then times all of them together, size by size.

    `threads` are torch's, as they are if None. Peak memory is measured at `memory_sizes` among the
    sizes (on a CPU by default the headline, on a GPU all). `progress` is told what begins, `so_far`
    given what was found, after every size. Raises GateClosed, before anything is timed at that
    size, if a result is wrong.
    """
    place = torch.device(device)
    cuda = place.type == "cuda"
    sizes = (CUDA_SIZES if cuda else SIZES) if sizes is None else sizes
    if memory_sizes is None:
        memory_sizes = sizes if cuda else (HEADLINE,)
    present = entrants(place)
    with conditions(place, threads, [e.package for e in present if e.package]) as facts:
        gate = dict[str, float]()
        present = [_at_the_gate(entrant, place, gate, progress) for entrant in present]
        progress("measuring what this machine can do at most")
        found = ScanBench(
            gate=gate,
            peaks=measure_peaks(place),
            rows=[],
            headline=CUDA_HEADLINE if cuda else HEADLINE,
            environment=facts,
        )
        slow: dict[str, tuple[Size, float]] = {}
        for size in sizes:
            some = _at_size(present, size, place, rounds, size in memory_sizes, slow, progress)
            found.rows.extend(_with_floor(row, found.peaks) for row in some)
            so_far(found)
    return found


def _at_the_gate(
    entrant: Entrant,
    device: torch.device,
    gate: dict[str, float],
    progress: Callable[[str], None],
) -> Entrant:
    """The entrant, its errors put into `gate`; a peer that cannot run here is marked so."""
    # What is compiled for each size is judged at each size, and has been judged uncompiled.
    if entrant.missing or entrant.compiled:
        return entrant
    progress(f"checking {entrant.name} at {_GATE}")
    try:
        for dtype in entrant.dtypes:
            gate[f"{entrant.name} {_short(dtype)}"] = _judge(entrant, _GATE, device, dtype)
    except GateClosed:
        raise
    except Exception as error:
        if entrant.ours:
            raise
        return replace(entrant, missing=reason(error))
    return entrant


def _at_size(
    present: Sequence[Entrant],
    size: Size,
    device: torch.device,
    rounds: int,
    measure_memory: bool,
    slow: dict[str, tuple[Size, float]],
    progress: Callable[[str], None],
) -> list[Row]:
    """Rows of one size; `slow` remembers each one's last pass, to foresee the next."""
    _exact.cache_clear()
    torch._dynamo.reset()
    free(device)
    reasons = {e.name: e.missing or _too_much(e, size, slow, device) for e in present}
    todo = [(e, dtype) for e in present for dtype in e.dtypes if reasons[e.name] is None]
    errors, compiling, memory = {}, {}, {}
    for entrant, dtype in sorted(todo, key=lambda pair: pair[1] != torch.float32):
        if entrant.computes == "scan" and (entrant.ours or not _is_large(size)):
            progress(f"checking {entrant.name} at {size}")
            began = time.perf_counter()
            try:
                errors[entrant.name, dtype] = _judge(entrant, size, device, dtype)
            except (RuntimeError, MemoryError) as error:
                if entrant.ours or isinstance(error, GateClosed):
                    raise
                free(device)  # its timing says why
            if entrant.compiled:
                compiling[entrant.name, dtype] = time.perf_counter() - began
    _exact.cache_clear()
    progress(f"timing {len(todo)} at {size}")
    drawn: dict[tuple[str, bool, torch.dtype], dict[str, Tensor]] = {}
    work: dict[tuple[str, torch.dtype, str], Callable[[], object]] = {}
    for entrant, dtype in todo:
        key = (entrant.computes, entrant.time_last, dtype)
        inputs = drawn[key] = drawn.get(key) or entrant.draw(size, device, dtype)
        work[entrant.name, dtype, "forward"] = _forward(entrant, inputs)
        work[entrant.name, dtype, "both"] = _both(entrant, inputs)
        if entrant.ours:  # a GPU's kernels of a call without gradients are compiled at the first
            work[entrant.name, dtype, "forward"]()
        if entrant.compiled:
            began = time.perf_counter()
            for measure in ("forward", "both"):
                work[entrant.name, dtype, measure]()
            compiling.setdefault((entrant.name, dtype), 0.0)
            compiling[entrant.name, dtype] += time.perf_counter() - began
    failures: dict[tuple[str, torch.dtype, str], str] = {}
    timings = interleave(
        work,
        device,
        rounds=rounds,
        seconds=_SECONDS[device.type],
        launched={key for key in work if key[0] in {e.name for e in present if e.launched}},
        failures=failures,
    )
    work.clear()
    drawn.clear()
    for entrant, dtype in todo:
        if both := timings.get((entrant.name, dtype, "both")):
            slow[entrant.name] = (size, both.median)
            if measure_memory and entrant.computes == "scan" and not entrant.compiled:
                progress(f"peak memory of {entrant.name} at {size}")
                arguments = (entrant.name, size, dtype, str(device))
                try:
                    memory[entrant.name, dtype] = peak_extra_memory(
                        _memory_job, arguments, torch.get_num_threads()
                    )
                except (RuntimeError, MemoryError):
                    free(device)
    return [
        Row(
            entrant=entrant.name,
            ours=entrant.ours,
            compiled=entrant.compiled,
            size=size,
            dtype=_short(dtype),
            error=errors.get((entrant.name, dtype)),
            forward=timings.get((entrant.name, dtype, "forward")),
            both=timings.get((entrant.name, dtype, "both")),
            extra_memory=memory.get((entrant.name, dtype)),
            compile_seconds=compiling.get((entrant.name, dtype)),
            not_run=reasons[entrant.name] or failures.get((entrant.name, dtype, "both")),
        )
        for entrant in present
        for dtype in entrant.dtypes
    ]


def _with_floor(row: Row, peaks: Sequence[Peaks]) -> Row:
    if not (row.ours and row.forward and peaks):
        return row
    floor = scan_floor(row.size, getattr(torch, row.dtype), peaks[0])
    return replace(row, floor=floor)


def _forward(entrant: Entrant, inputs: dict[str, Tensor]) -> Callable[[], object]:
    def run() -> object:
        with torch.no_grad():
            return entrant.run(**inputs)

    return run


def _both(entrant: Entrant, inputs: dict[str, Tensor]) -> Callable[[], list[Tensor]]:
    dy_BLD = _weights(next(iter(inputs.values())))

    def run() -> list[Tensor]:
        y_BLD = entrant.run(**inputs)
        return [y_BLD, *torch.autograd.grad(y_BLD, list(inputs.values()), dy_BLD)]

    return run


def _weights(like: Tensor) -> Tensor:
    """The output's gradient, the same for every entrant."""
    generator = torch.Generator(like.device).manual_seed(1)
    return torch.randn(like.shape, generator=generator, device=like.device).to(like.dtype)


def _judge(
    entrant: Entrant, size: Size, device: torch.device, dtype: torch.dtype = torch.float32
) -> float:
    """The largest error of the output and of every gradient; raises GateClosed beyond tolerance."""
    inputs = entrant.draw(size, device, dtype)
    found = dict(zip(("y", *inputs), _both(entrant, inputs)()))
    worst = 0.0
    for name, expected in _exact(entrant.computes, size, device, dtype).items():
        x = _judged(name, found[name].detach(), size)
        distance = ((x.double() - expected).abs().max() / expected.abs().max()).item()
        worst = max(worst, distance)
        if not distance <= _TOLERANCE[dtype]:  # NaN too
            tensor = "y" if name == "y" else f"the gradient of {name}"
            raise GateClosed(
                f"bench scan: {entrant.name} at {size}: {tensor} is off by {distance:.1e} "
                f"of its largest value, beyond {_TOLERANCE[dtype]:.0e}; nothing is timed"
            )
    return worst


@functools.lru_cache(maxsize=1)
def _exact(
    computes: str, size: Size, device: torch.device, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Output and gradients in float64: by definition or, for a long scan, by our torch backend.

    That backend has by then passed the gate itself. Of a large scan some channels alone, without
    the gradients of B and C.
    """
    judge = next(entrant for entrant in entrants(device) if entrant.computes == computes)
    drawn = judge.draw(size, device, dtype)
    weights = _judged("y", _weights(next(iter(drawn.values()))), size).double()
    inputs = {
        name: _judged(name, x.detach(), size).double().requires_grad_() for name, x in drawn.items()
    }
    if computes == "scan" and size.length > _LOOP_LENGTH:
        y_BLD = next(e for e in entrants(device) if e.name == "seqbench torch").run(**inputs)
    else:
        y_BLD = judge.exact(inputs)
    gradients = torch.autograd.grad(y_BLD, list(inputs.values()), weights)
    whole = {"y": y_BLD.detach(), **dict(zip(inputs, gradients))}
    if _is_large(size):
        del whole["B"], whole["C"]
    return whole


def _judged(name: str, x: Tensor, size: Size) -> Tensor:
    """The channels that are compared, of a scan's tensor."""
    if not _is_large(size) or name in ("B", "C"):
        return x
    return x[:_JUDGED_CHANNELS] if x.ndim < 3 else x[..., :_JUDGED_CHANNELS]


def _is_large(size: Size) -> bool:
    return size.batch * size.length * size.width > _JUDGED_WHOLE


def _memory_job(
    name: str, size: Size, dtype: torch.dtype, device: str
) -> tuple[Callable[[], list[Tensor]], torch.device]:
    """For `peak_extra_memory`: warmed up on a small size, the inputs made."""
    place = torch.device(device)
    entrant = next(entrant for entrant in entrants(place) if entrant.name == name)
    small = Size(batch=1, length=64, width=size.width, state=size.state)
    _both(entrant, entrant.draw(small, place, dtype))()
    return _both(entrant, entrant.draw(size, place, dtype)), place


def _too_much(
    entrant: Entrant, size: Size, slow: dict[str, tuple[Size, float]], device: torch.device
) -> str | None:
    """Why this machine or our patience does not allow the run."""
    if entrant.expands and device.type == "cpu":
        needs = 4 * _WHOLE_STATES * size.batch * size.length * size.width * size.state
        if (free := available_memory()) is not None and needs > free:
            return f"needs about {needs / 2**30:.0f} GiB, {free / 2**30:.0f} GiB are free"
    if entrant.name in slow:
        last, seconds = slow[entrant.name]
        expected = seconds * size.batch * size.length / (last.batch * last.length)
        if entrant.computes == "attention":
            expected *= size.length / last.length
        if entrant.loops:  # a pass of the interpreter a step, however wide
            expected = max(expected, seconds * size.length / last.length)
        if expected > _PATIENCE[device.type]:
            return f"a pass would take about {expected:.0f} s"
    return None


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _timed(row: Row, timing: Timing | None, ratio: float | None) -> tuple[str, str]:
    """Milliseconds and ratio, as cells."""
    if timing is None:
        return str(row.not_run), ""
    text = "" if ratio is None else f"{ratio:.{2 if row.ours else 1}f}"
    return f"{timing.median * 1e3:.2f}", text


def _percent(x: float | None) -> str:
    return "-" if x is None else f"{100 * x:.0f} %"
