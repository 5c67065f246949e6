"""The scan bench: our backends beside other scans and mixers, timed once all are right."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from seqbench.suite.bench.entrants import Entrant, Size, entrants
from seqbench.suite.bench.timing import (
    Timing,
    available_memory,
    interleave,
    peak_extra_memory,
)
from seqbench.suite.environment import environment

if TYPE_CHECKING:
    from rich.table import Table

HEADLINE = Size(batch=8, length=1024, width=128, state=16)
# From 256 to 65536 steps, of 8192 tokens as long as a batch can be halved.
SIZES = tuple(
    Size(batch=max(1, 8192 // length), length=length, width=128, state=16)
    for length in (256, 1024, 4096, 16384, 65536)
)

YARDSTICK = "mambapy pscan"  # the peer that remarks compare with

# Largest error of y and of each gradient, over the largest value of that tensor. Float32 sums of
# as many terms as the batch has steps (dA) are good to about 1e-5; a wrong term shows at 1e-2.
_TOLERANCE = 2e-4
_GATE = Size(batch=2, length=257, width=72, state=16)  # no power of two, no multiple of a chunk
_LOOP_LENGTH = 4096  # up to here the float64 loop is the judge at the timed size too
_PATIENCE = 15.0  # seconds; a pass that would take longer is left out
_WHOLE_STATES = 10  # (B, L, D, N) tensors that an entrant which expands holds, at most


class GateClosed(RuntimeError):
    """An entrant's result is wrong, so nothing is timed."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One entrant at one size."""

    entrant: str
    ours: bool
    size: Size
    error: float | None = (
        None  # the largest at this size, beside float64; None: judged at _GATE only
    )
    forward: Timing | None = None  # without gradients
    both: Timing | None = None  # forward and backward
    extra_memory: int | None = None  # peak bytes of forward + backward, beside tensors in and out
    not_run: str | None = None


@dataclass(frozen=True, kw_only=True)
class ScanBench:
    """What `bench_scan` found."""

    gate: dict[str, float]  # entrant -> largest error at the gate's size
    rows: list[Row]
    environment: dict[str, Any] = field(default_factory=dict)

    @property
    def busy(self) -> float:
        """CPUs that other processes kept busy as the bench began; 0 where that was little."""
        load: float = self.environment.get("load_before") or 0.0
        return load if load > 0.5 else 0.0

    def row(self, entrant: str, size: Size = HEADLINE) -> Row | None:
        """The entrant's figures at a size."""
        found = [row for row in self.rows if row.entrant == entrant and row.size == size]
        return found[0] if found else None

    def ours(self, size: Size = HEADLINE) -> Row | None:
        """Our fastest backend at a size, by forward + backward."""
        timed = [row for row in self.rows if row.ours and row.size == size and row.both]
        return min(timed, key=lambda row: row.both.median if row.both else 0.0, default=None)

    def to_json(self) -> str:
        """Everything, as JSON."""
        return json.dumps(
            {
                "bench": "scan",
                "tolerance": _TOLERANCE,
                "gate_size": asdict(_GATE),
                **asdict(self),
                "ratios": [self._ratios(row) for row in self.rows if row.both],
            },
            indent=1,
        )

    def table(self) -> Table:
        """For a terminal; ratios are to our fastest backend at the same size."""
        from rich.table import Table

        title = "Selective scan, float32, medians; every result checked against float64 first"
        table = Table(title=title, title_justify="left", box=None, header_style="bold")
        for name in ("(B, L, D, N)", "", "fwd ms", "x", "fwd+bwd ms", "x", "extra MB", "max error"):
            table.add_column(name, justify="left" if name in ("(B, L, D, N)", "") else "right")
        table.caption, table.caption_justify = "\n".join(self._remarks()), "left"
        previous = None
        for row in self.rows:
            if previous not in (None, row.size):
                table.add_section()
            first = str(row.size) if row.size != previous else ""
            previous = row.size
            if row.forward is None or row.both is None:
                table.add_row(first, f"{row.entrant}: not run, {row.not_run}", style="dim")
                continue
            ratios = self._ratios(row)
            table.add_row(
                first,
                row.entrant,
                f"{row.forward.median * 1e3:.2f}",
                f"{ratios['forward']:.2f}" if row.ours else f"{ratios['forward']:.1f}",
                f"{row.both.median * 1e3:.2f}",
                f"{ratios['both']:.2f}" if row.ours else f"{ratios['both']:.1f}",
                "" if row.extra_memory is None else f"{row.extra_memory / 2**20:.1f}",
                "" if row.error is None else f"{row.error:.0e}",
                style="bold" if row.ours else None,
            )
        return table

    def write(self, folder: Path) -> list[Path]:
        """scan.json, scan.png and scan.svg in `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / f"scan.{suffix}" for suffix in ("json", "png", "svg")]
        paths[0].write_text(self.to_json() + "\n")
        figure = self.plot()
        for path in paths[1:]:
            figure.savefig(path, dpi=150, bbox_inches="tight")
        return paths

    def plot(self) -> Any:
        """Time a token against length, log-log; forward left, forward and backward right."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(11, 4.4), layout="constrained")
        panels = figure.subplots(1, 2, sharey=True)
        names = list(dict.fromkeys(row.entrant for row in self.rows))
        styles = dict(zip(names, zip(_COLOURS, _MARKERS)))
        for axes, measure, title in zip(
            panels, ("forward", "both"), ("forward", "forward + backward")
        ):
            for name in names:
                rows = [row for row in self.rows if row.entrant == name and getattr(row, measure)]
                colour, marker = styles[name]
                tokens = [row.size.batch * row.size.length for row in rows]
                axes.plot(
                    [row.size.length for row in rows],
                    [getattr(row, measure).median / n * 1e9 for row, n in zip(rows, tokens)],
                    label=name if rows else f"{name} (not run)",
                    color=colour,
                    marker=marker,
                    markersize=5,
                    linewidth=2.4 if any(row.ours for row in rows) else 1.4,
                )
            axes.set(xscale="log", yscale="log", xlabel="length L", title=title)
            lengths = sorted({row.size.length for row in self.rows})
            axes.set_xticks(lengths, [f"{n:,}" for n in lengths], minor=False)
            axes.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
            axes.grid(True, which="major", alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)
        panels[0].set_ylabel("time a token (ns)")
        figure.legend(
            *panels[0].get_legend_handles_labels(), loc="outside right center", frameon=False
        )
        size, machine = self.rows[0].size, self.environment
        figure.suptitle(
            f"Mixing a sequence of width {size.width} (scan state {size.state}), float32, "
            f"{machine.get('processor', '')}, {machine.get('threads', '?')} threads",
            fontsize=11,
        )
        return figure

    def _remarks(self) -> list[str]:
        """What to read beside the table: our distance to the yardstick, and the noise."""
        lines = []
        for size in dict.fromkeys(row.size for row in self.rows):
            ours, peer = self.ours(size), self.row(YARDSTICK, size)
            if ours and peer and peer.both:
                ratios = self._ratios(peer)
                memory = ratios.get("our_extra_memory_over_its")
                share = "" if memory is None else f", in {memory:.1%} of its extra memory"
                lines.append(
                    f"{ours.entrant} over {YARDSTICK} at {size}: {ratios['forward']:.0f}x forward, "
                    f"{ratios['both']:.0f}x forward and backward{share}"
                )
        if self.busy:
            lines.append(f"noisy: other processes kept {self.busy:.1f} CPUs busy as this began")
        return lines

    def _ratios(self, row: Row) -> dict[str, Any]:
        """Of one row to our fastest at the same size, and of our memory to the row's."""
        ours = self.ours(row.size)
        assert ours and ours.forward and ours.both and row.forward and row.both
        found = {
            "entrant": row.entrant,
            "size": asdict(row.size),
            "ours": ours.entrant,
            "forward": row.forward.median / ours.forward.median,
            "both": row.both.median / ours.both.median,
        }
        if row.extra_memory and ours.extra_memory is not None:
            found["our_extra_memory_over_its"] = ours.extra_memory / row.extra_memory
        return found


def bench_scan(
    *,
    sizes: Sequence[Size] = SIZES,
    device: str = "cpu",
    threads: int | None = None,
    rounds: int = 9,
    memory_sizes: Sequence[Size] = (HEADLINE,),
    progress: Callable[[str], None] = lambda line: None,
) -> ScanBench:
    """Checks every entrant, then times all of them together, size by size.

    `threads` are torch's, as they are if None. Peak memory is measured at `memory_sizes` among the
    sizes. `progress` is told what begins. Raises GateClosed, before anything is timed at that size,
    if a result is wrong.
    """
    place = torch.device(device)
    before = torch.get_num_threads()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        gate = {}
        present = entrants(place)
        for entrant in present:
            if entrant.missing is None:
                progress(f"checking {entrant.name} at {_GATE}")
                gate[entrant.name] = _judge(entrant, _GATE, place)
        rows: list[Row] = []
        slow: dict[str, tuple[Size, float]] = {}
        for size in sizes:
            measure = size in memory_sizes
            rows += _at_size(present, size, place, rounds, measure, slow, progress)
        ours = [entrant.name for entrant in present if entrant.ours and entrant.missing is None]
        facts = environment(place, {"selective_scan": ", ".join(ours)})
        facts["load_before"] = load
        facts["versions"] |= {
            e.package: version(e.package) for e in present if e.package and not e.missing
        }
        return ScanBench(gate=gate, rows=rows, environment=facts)
    finally:
        torch.set_num_threads(before)


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
    reasons = {e.name: e.missing or _too_much(e, size, slow, device) for e in present}
    running = [entrant for entrant in present if reasons[entrant.name] is None]
    errors = {}
    for entrant in running:
        if entrant.computes == "scan":
            progress(f"checking {entrant.name} at {size}")
            errors[entrant.name] = _judge(entrant, size, device)
    _exact.cache_clear()
    progress(f"timing {len(running)} at {size}")
    work: dict[tuple[str, str], Callable[[], object]] = {}
    for entrant in running:
        inputs = entrant.draw(size, device)
        work[entrant.name, "forward"] = _forward(entrant, inputs)
        work[entrant.name, "both"] = _both(entrant, inputs)
    timings = interleave(work, device, rounds=rounds)
    work.clear()
    memory = {}
    for entrant in running:
        if measure_memory:
            progress(f"peak memory of {entrant.name} at {size}")
            arguments = (entrant.name, size, str(device))
            memory[entrant.name] = peak_extra_memory(
                _memory_job, arguments, torch.get_num_threads()
            )
        slow[entrant.name] = (size, timings[entrant.name, "both"].median)
    return [
        Row(
            entrant=entrant.name,
            ours=entrant.ours,
            size=size,
            error=errors.get(entrant.name),
            forward=timings.get((entrant.name, "forward")),
            both=timings.get((entrant.name, "both")),
            extra_memory=memory.get(entrant.name),
            not_run=reasons[entrant.name],
        )
        for entrant in present
    ]


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
    weights = torch.randn(like.shape, generator=torch.Generator().manual_seed(1))
    return weights.to(like.device, like.dtype)


def _judge(entrant: Entrant, size: Size, device: torch.device) -> float:
    """The largest error of the output and of every gradient; raises GateClosed beyond tolerance."""
    inputs = entrant.draw(size, device)
    found = _both(entrant, inputs)()
    exact = _exact(entrant.computes, size, device)
    worst = 0.0
    for name, x, expected in zip(("y", *inputs), found, exact):
        distance = (x.detach().double() - expected).abs().max() / expected.abs().max()
        worst = max(worst, distance.item())
        if not distance <= _TOLERANCE:  # NaN too
            tensor = "y" if name == "y" else f"the gradient of {name}"
            raise GateClosed(
                f"bench scan: {entrant.name} at {size}: {tensor} is off by {distance.item():.1e} "
                f"of its largest value, beyond {_TOLERANCE:.0e}; nothing is timed"
            )
    return worst


@functools.lru_cache(maxsize=1)
def _exact(computes: str, size: Size, device: torch.device) -> list[Tensor]:
    """Output and gradients in float64: by definition or, for a long scan, by our torch backend.

    That backend has by then passed the gate itself.
    """
    judge = next(entrant for entrant in entrants(device) if entrant.computes == computes)
    inputs = {
        name: x.detach().double().requires_grad_() for name, x in judge.draw(size, device).items()
    }
    if computes == "scan" and size.length > _LOOP_LENGTH:
        y_BLD = next(e for e in entrants(device) if e.name == "seqbench torch").run(**inputs)
    else:
        y_BLD = judge.exact(inputs)
    weights = _weights(next(iter(judge.draw(size, device).values()))).double()
    return [
        x.detach() for x in (y_BLD, *torch.autograd.grad(y_BLD, list(inputs.values()), weights))
    ]


def _memory_job(
    name: str, size: Size, device: str
) -> tuple[Callable[[], list[Tensor]], torch.device]:
    """For `peak_extra_memory`: warmed up on a small size, the inputs made."""
    place = torch.device(device)
    entrant = next(entrant for entrant in entrants(place) if entrant.name == name)
    small = Size(batch=1, length=64, width=size.width, state=size.state)
    _both(entrant, entrant.draw(small, place))()
    return _both(entrant, entrant.draw(size, place)), place


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
        if expected > _PATIENCE:
            return f"a pass would take about {expected:.0f} s"
    return None


# Okabe and Ito's colours, told apart by every kind of eye; ours are the first.
_COLOURS = ("#0072B2", "#56B4E9", "#000000", "#D55E00", "#E69F00", "#CC79A7", "#009E73", "#999999")
_MARKERS = "osDv^P*X"
