"""TensorBoard and W&B as mirrors of the curves; the records stay the only truth.

They listen to the events of a run in the process that launched it, so they work with every
launcher, and a run's numbers are the same with and without them.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from seqbench.suite.discovery import unknown
from seqbench.suite.experiment import Cell, UserError
from seqbench.suite.records import CurvePoint, load, path_of

OnEvent = Callable[[int, Cell, Mapping[str, Any]], None]


class Run(Protocol):
    """One cell's place in a logging tool."""

    def log(self, values: Mapping[str, float], step: int) -> None: ...

    def finish(self) -> None: ...


class TensorBoard:
    """<results>/tensorboard/DIGEST, for `tensorboard --logdir <results>/tensorboard`."""

    def __init__(self, cell: Cell, results: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(results / "tensorboard" / cell.digest))
        self.writer.add_text("cell", cell.canonical())

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def finish(self) -> None:
        self.writer.close()


class Wandb:
    """A run of the project seqbench, named by the cell and found again by its digest."""

    def __init__(self, cell: Cell, results: Path) -> None:
        wandb: Any = importlib.import_module("wandb")
        self.run = wandb.init(
            project="seqbench",
            id=cell.digest,
            name=cell.label,
            config=asdict(cell),
            dir=str(results),
            resume="allow",
            reinit="create_new",  # cells run side by side
        )

    def log(self, values: Mapping[str, float], step: int) -> None:
        self.run.log(dict(values), step=step)

    def finish(self) -> None:
        self.run.finish()


# Name -> how a cell's run is made, and the module it needs; each is an extra of that name.
LOGGERS: dict[str, tuple[Callable[[Cell, Path], Run], str]] = {
    "tensorboard": (TensorBoard, "tensorboard"),
    "wandb": (Wandb, "wandb"),
}


@contextmanager
def mirrored(name: str | None, results: Path, on_event: OnEvent) -> Iterator[OnEvent]:
    """`on_event`, and before it each cell's curve into the logger of that name, if there is one.

    A logger that fails is given up with a warning: it costs no cell its result.
    """
    if name is None:
        yield on_event
        return
    mirror = _Mirror(check_logger(name), results)

    def told(worker: int, cell: Cell, event: Mapping[str, Any]) -> None:
        mirror.hear(cell, event)
        on_event(worker, cell, event)

    try:
        yield told
    finally:
        mirror.close()


def check_logger(name: str) -> Callable[[Cell, Path], Run]:
    """What makes a cell's run; UserError for an unknown name or a package that is missing."""
    if name not in LOGGERS:
        raise unknown("logger", name, LOGGERS)
    make, package = LOGGERS[name]
    try:
        importlib.import_module(package)
    except ImportError as error:
        raise UserError(
            f"--logger {name}: the package {package} is missing; "
            f"pip install 'seqbench[{name}]', or leave the option out"
        ) from error
    return make


class _Mirror:
    def __init__(self, make: Callable[[Cell, Path], Run], results: Path) -> None:
        self.make, self.results = make, results
        self.runs: dict[str, Run] = {}
        self.steps: dict[str, int] = {}
        self.broken = False

    def hear(self, cell: Cell, event: Mapping[str, Any]) -> None:
        if self.broken:
            return
        try:
            if event["event"] == "validated":
                self._log(cell, CurvePoint(**event["point"]))
            elif event["event"] == "done":
                self._finish(cell)
        except Exception as error:
            self.broken = True
            logging.getLogger("seqbench").warning(
                "the logger is given up (%s: %s); the records are not touched by it",
                type(error).__name__,
                error,
            )

    def close(self) -> None:
        for run in self.runs.values():
            run.finish()

    def _log(self, cell: Cell, point: CurvePoint) -> None:
        run = self.runs.get(cell.digest)
        if run is None:
            run = self.runs[cell.digest] = self.make(cell, self.results)
        values = {f"validation/{k}": v for k, v in point.validation.items()}
        values |= {
            "train/loss": point.train_loss,
            "train/lr": point.lr,
            "train/tokens": point.tokens,
        }
        run.log(values, point.step)
        self.steps[cell.digest] = point.step

    def _finish(self, cell: Cell) -> None:
        """The rest of the curve, where a launcher sends no events of its own, and the end."""
        path = path_of(self.results, cell)
        record = load(path) if path.exists() else None
        for point in record.curve if record is not None else ():
            if point.step > self.steps.get(cell.digest, -1):
                self._log(cell, point)
        run = self.runs.pop(cell.digest, None)
        if run is not None:
            if record is not None and record.test:
                run.log({f"test/{k}": v for k, v in record.test.items()}, record.steps_done)
            run.finish()
