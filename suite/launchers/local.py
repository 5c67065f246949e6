"""The local launcher: N worker processes; one that dies costs its cell alone."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from seqbench.suite.experiment import Cell
from seqbench.suite.records import Record, load, path_of, write

OnEvent = Callable[[int, Cell, Mapping[str, Any]], None]

LOG_LINES = 5  # of a dead worker's output, kept in the record


def run(
    cells: Sequence[Cell],
    results: Path,
    *,
    workers: int,
    threads: int,
    device: str = "auto",
    on_event: OnEvent = lambda worker, cell, event: None,
) -> list[Record]:
    """Runs the cells and returns their records in the order they finished.

    Every worker computes with `threads` CPU threads, so that what runs beside a cell does not
    change its numbers.
    """
    pending: queue.SimpleQueue[Cell] = queue.SimpleQueue()
    for cell in cells:
        pending.put(cell)
    finished: list[Record] = []
    lock = threading.Lock()
    running: dict[int, subprocess.Popen[str]] = {}
    stopping = threading.Event()

    def serve(index: int) -> None:
        while not stopping.is_set():
            try:
                cell = pending.get_nowait()
            except queue.Empty:
                break
            if index not in running:
                running[index] = _start(results, index, threads, device)
            on_event(index, cell, {"event": "start"})
            if not _run_one(running[index], cell, partial(on_event, index, cell)):
                code = _close(running.pop(index))
                if stopping.is_set():
                    break
                write(results, _died(cell, code, _log(results, index)))
            record = load(path_of(results, cell))
            with lock:
                finished.append(record)
            on_event(index, cell, {"event": "done", "status": record.status, "error": record.error})
        if index in running:
            _close(running.pop(index))

    servers = [
        threading.Thread(target=serve, args=(i,), daemon=True)
        for i in range(min(workers, len(cells)))
    ]
    try:
        for server in servers:
            server.start()
        for server in servers:
            while server.is_alive():  # join with a timeout lets Ctrl-C through
                server.join(0.2)
    finally:
        stopping.set()
        for process in list(running.values()):
            process.kill()  # its checkpoint is written whole or not at all
        for server in servers:
            server.join()
    return finished


def _start(results: Path, index: int, threads: int, device: str) -> subprocess.Popen[str]:
    log = _log(results, index)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as errors:
        return subprocess.Popen(
            [
                sys.executable,
                *(["-P"] if sys.flags.safe_path else []),
                "-m",
                "seqbench.suite.launchers.worker",
                str(results),
                device,
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)},
        )


def _run_one(
    process: subprocess.Popen[str], cell: Cell, on_event: Callable[[Mapping[str, Any]], None]
) -> bool:
    """Sends a cell and passes events on until its record is written; False if the worker died."""
    assert process.stdin is not None and process.stdout is not None
    try:
        process.stdin.write(json.dumps(asdict(cell)) + "\n")
        process.stdin.flush()
    except OSError:
        return False
    for line in process.stdout:
        event = json.loads(line)
        if event["event"] == "recorded":
            return True
        on_event(event)
    return False


def _close(process: subprocess.Popen[str]) -> int:
    """Ends a worker that is idle or dead and returns its exit status."""
    assert process.stdin is not None and process.stdout is not None
    with contextlib.suppress(OSError):
        process.stdin.close()
    try:
        code = process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        process.kill()
        code = process.wait()
    process.stdout.close()
    return code


def _died(cell: Cell, code: int, log: Path) -> Record:
    how = (
        f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit status {code}"
    )
    last = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    error = f"the worker process was {how}" if code < 0 else f"the worker process {how}"
    if last:
        error += "; its last lines: " + " | ".join(last[-LOG_LINES:])
    return Record(cell=cell, digest=cell.digest, status="failed", error=error)


def _log(results: Path, index: int) -> Path:
    return results / "logs" / f"worker-{os.getpid()}-{index}.log"
