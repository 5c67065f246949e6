"""A worker process of the local launcher: cells in on stdin, events out on stdout, as JSON."""

from __future__ import annotations

import json
import logging
import os
import queue
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from seqbench.suite.execution import Execution
    from seqbench.suite.experiment import Cell

STOP = "stop"  # instead of a cell: end this sitting at the next step
Tell = Callable[[Mapping[str, Any]], None]


def main() -> None:
    """Runs cells until stdin closes; if that is within one, the launcher died: so does this."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the launcher's to handle
    # Whatever a library prints must not mix with the events.
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    mutex = threading.Lock()

    def tell(event: Mapping[str, Any]) -> None:
        with mutex:
            channel.write(json.dumps(event) + "\n")

    busy, stop = threading.Event(), threading.Event()
    cells: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    # A process forked while the thread below waits in sys.stdin would find it locked, and wait for
    # ever where multiprocessing closes it: the pipe gets an object of its own.
    pipe = os.fdopen(os.dup(0))
    sys.stdin = open(os.devnull)  # noqa: SIM115
    listening = threading.Thread(target=_listen, args=(pipe, cells, busy, stop), daemon=True)
    listening.start()

    import torch

    from seqbench.suite.configuration import build_config
    from seqbench.suite.environment import keep_freed_memory
    from seqbench.suite.execution import Execution
    from seqbench.suite.records import StorageError

    results = Path(sys.argv[1])
    execution = build_config(Execution, json.loads(sys.argv[2]), "execution")
    keep_freed_memory()
    torch.set_num_threads(execution.threads)
    logger = logging.getLogger("seqbench")
    logger.setLevel(logging.INFO)
    logger.addHandler(_Forward(tell))

    while (line := cells.get()) is not None:
        cell = cell_of(json.loads(line))
        try:
            if stop.is_set():
                ended: Mapping[str, Any] = {"event": "paused"}
            else:
                ended = run_locked(cell, results, execution, line, tell, stop.is_set)
        except StorageError as error:
            ended = {"event": "storage", "message": str(error)}
        busy.clear()
        tell(ended)


def run_locked(
    cell: Cell,
    results: Path,
    execution: Execution,
    line: str,
    tell: Tell,
    pause: Callable[[], bool],
) -> Mapping[str, Any]:
    """Runs a cell under its lock and writes its record; says how it ended.

    recorded: there is a record; busy: another process has the lock; paused: a checkpoint waits.
    """
    from seqbench.suite import lock, ranks
    from seqbench.suite.records import Record, StorageError, path_of, write
    from seqbench.suite.training import run_cell

    run = partial(
        run_cell,
        cell,
        results,
        device=execution.device,
        devices=execution.devices,
        strategy=execution.strategy,
        compile=execution.compile,
        prefetch=execution.prefetch,
        conclude=execution.conclude,
        listener=tell,
        pause=pause,
    )
    if not ranks.first():
        run()
        ranks.part()
        return {"event": "shared"}
    held = lock.acquire(results, cell)
    if held is None:
        return {"event": "busy"}
    with held:
        if path_of(results, cell).exists():  # written since the launcher looked
            return {"event": "recorded"}
        tell({"event": "running"})
        try:
            with ranks.group(execution.devices, [*command(), *sys.argv[1:]], line):
                record = run()
                ranks.part()
        except StorageError:
            raise
        except ValueError as error:  # a user's mistake that only shows while running
            record = Record(cell=cell, digest=cell.digest, status="failed", error=str(error))
        if record is None:
            return {"event": "paused"}
        if held.held:
            write(results, record)
        return {"event": "recorded"}


def cell_of(plain: Mapping[str, Any]) -> Cell:
    """The cell of `dataclasses.asdict`'s result."""
    from seqbench.suite.configuration import build_config
    from seqbench.suite.experiment import Cell, TrainConfig

    return Cell(**{**plain, "train": build_config(TrainConfig, plain["train"], "train")})


def command() -> list[str]:
    """What starts a worker, but for its arguments: the results folder and the Execution as JSON."""
    safe = ["-P"] if sys.flags.safe_path else []
    return [sys.executable, *safe, "-m", "seqbench.suite.launchers.worker"]


class _Forward(logging.Handler):
    """Passes log lines on to the launcher."""

    def __init__(self, tell: Tell) -> None:
        super().__init__()
        self.tell = tell

    def emit(self, record: logging.LogRecord) -> None:
        self.tell({"event": "log", "level": record.levelname, "message": record.getMessage()})


def _listen(
    pipe: TextIO,
    cells: queue.SimpleQueue[str | None],
    busy: threading.Event,
    stop: threading.Event,
) -> None:
    for line in pipe:
        if line.strip() == STOP:
            stop.set()
            continue
        busy.set()
        cells.put(line.rstrip("\n"))
    if busy.is_set():
        os._exit(3)
    cells.put(None)


if __name__ == "__main__":
    main()
