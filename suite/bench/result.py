"""What every bench shares: where it ran, how it is written down and drawn."""

from __future__ import annotations

import contextlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from seqbench.suite.environment import environment
from seqbench.suite.records import write_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.table import Table

# Okabe and Ito's colours, told apart by every kind of eye; ours come first.
COLOURS = ("#0072B2", "#56B4E9", "#000000", "#D55E00", "#E69F00", "#CC79A7", "#009E73", "#999999")
MARKERS = "osDv^P*Xh<>p"
PAPER = "#777777"


class GateClosed(RuntimeError):
    """A result is wrong, so nothing is timed."""


@dataclass(frozen=True, kw_only=True)
class Result(ABC):
    """What a bench found; `environment` says where."""

    name: ClassVar[str]
    environment: dict[str, Any] = field(default_factory=dict)

    @abstractmethod
    def title(self) -> str:
        """What the table shows, and where it was measured."""

    @abstractmethod
    def table(self) -> Table:
        """For a terminal."""

    @abstractmethod
    def remarks(self) -> list[str]:
        """What to read beside the table."""

    @abstractmethod
    def plot(self) -> Figure:
        """The picture."""

    @property
    def busy(self) -> float:
        """CPUs that other processes kept busy as the bench began; 0 where that was little."""
        load: float = self.environment.get("load_before") or 0.0
        return load if load > 0.5 else 0.0

    def noise(self) -> list[str]:
        """A remark for the table, if the machine was not quiet."""
        if not self.busy:
            return []
        return [f"noisy: other processes kept {self.busy:.1f} CPUs busy as this began"]

    def machine(self) -> str:
        """For a title."""
        facts = self.environment
        if facts.get("device", "cpu") != "cpu":
            return str(facts["device"])
        return f"{facts.get('processor', 'cpu')}, {facts.get('threads', '?')} threads"

    def facts(self) -> dict[str, Any]:
        """Everything, as plain data."""
        return {"bench": self.name, **asdict(self), "remarks": self.remarks()}

    def to_json(self) -> str:
        """Everything, as JSON."""
        return json.dumps(self.facts(), indent=1)

    def write(self, folder: Path) -> list[Path]:
        """NAME.json, NAME.png and NAME.svg in `folder`."""
        paths = [folder / f"{self.name}.{suffix}" for suffix in ("json", "png", "svg")]
        write_file(paths[0], f"{self.to_json()}\n".encode())
        figure = self.plot()
        for path in paths[1:]:
            figure.savefig(path, dpi=150, bbox_inches="tight")
        return paths


@contextlib.contextmanager
def conditions(
    device: torch.device, threads: int | None, packages: Sequence[str] = ()
) -> Iterator[dict[str, Any]]:
    """Inside, torch has `threads` threads; the dict it gives has facts, all of them at the end."""
    from seqbench.suite.cost import kernel_backends

    before = torch.get_num_threads()
    load = _load()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        facts = environment(device, kernel_backends()) | {"load_before": load}
        yield facts
        facts |= environment(device, kernel_backends()) | {"load_after": _load()}
        for package in packages:
            with contextlib.suppress(PackageNotFoundError):
                facts["versions"][package] = version(package)
    finally:
        torch.set_num_threads(before)


def out_of_memory(error: BaseException) -> bool:
    """Whether it says that the device, or the host, has no memory left."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def length_axis(axes: Axes, lengths: Sequence[int]) -> None:
    """Logarithmic, a tick a length, thinned out where there are many: 512, 4K, 1M."""
    shown = list(lengths)[:: 1 + (len(lengths) - 1) // 9]
    axes.set(xscale="log", xlabel="length L")
    axes.set_xticks(shown, [binary(n) for n in shown], minor=False)
    plain(axes)


def plain(axes: Axes) -> None:
    """A grid, no frame at the top and right, no names at minor ticks of the x axis."""
    axes.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
    axes.grid(True, which="major", alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def binary(n: int) -> str:
    """65536 as 64K."""
    for unit, size in (("M", 2**20), ("K", 2**10)):
        if n >= size and n % size == 0:
            return f"{n // size}{unit}"
    return str(n)


def _load() -> float | None:
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None
