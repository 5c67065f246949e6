"""The local launcher: N worker processes; one that dies costs its cell alone."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from seqbench.suite import lock
from seqbench.suite.environment import environment, resident_bytes
from seqbench.suite.execution import Execution
from seqbench.suite.experiment import Cell
from seqbench.suite.launchers import worker
from seqbench.suite.records import Record, StorageError, load, path_of, write

OnEvent = Callable[[int, Cell, Mapping[str, Any]], None]
Ended = Literal["recorded", "busy", "paused", "died"]

LOG_LINES = 10  # of a dead worker's output, kept in the record
LOOK_SECONDS = 0.2
BUSY_SECONDS = 1.0  # between looks at a cell that another runner has
GRACE_SECONDS = 60.0  # from asking a cell to pause until its worker is killed


def run(
    cells: Sequence[Cell],
    results: Path,
    execution: Execution,
    *,
    on_event: OnEvent = lambda worker, cell, event: None,
) -> list[Record]:
    """Runs the cells and returns their records in the order they finished.

    A cell that another runner has is waited for. Ctrl-C, or the end of `execution.budget`, makes
    the cells in work write their checkpoints; then KeyboardInterrupt is raised, or the records so
    far are returned. A second Ctrl-C kills. Raises StorageError when the results folder takes no
    more.
    """
    return _Launch(cells, results, execution, on_event).run()


@dataclass(eq=False)
class _Worker:
    """A worker process and the cell it has."""

    index: int
    process: subprocess.Popen[str]
    log: Path
    cell: Cell | None = None
    since: float | None = None  # when the cell began
    asked: float | None = None  # when it was asked to pause
    reason: str | None = None  # why it was ended by the launcher
    mutex: threading.Lock = field(default_factory=threading.Lock)

    def send(self, line: str) -> None:
        assert self.process.stdin is not None
        with self.mutex, contextlib.suppress(OSError):  # a dead worker shows on its other pipe
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()

    def pause(self) -> None:
        if self.asked is None:
            self.asked = time.monotonic()
            self.send(worker.STOP)


class _Launch:
    def __init__(
        self, cells: Sequence[Cell], results: Path, execution: Execution, on_event: OnEvent
    ) -> None:
        self.results, self.execution, self.on_event = results, execution, on_event
        self.pending = deque(cells)
        self.waiting: deque[tuple[float, Cell]] = deque()  # others' cells, and when to look again
        self.told: set[str] = set()  # cells that the user knows to be others'
        self.finished: list[Record] = []
        self.mutex = threading.Lock()
        self.workers: dict[int, _Worker] = {}
        self.stopping = threading.Event()
        self.trouble: BaseException | None = None

    def run(self) -> list[Record]:
        count = min(self.execution.workers, len(self.pending))
        servers = [
            threading.Thread(target=self._serve, args=(i,), daemon=True) for i in range(count)
        ]
        began, interrupted = time.monotonic(), False
        try:
            for server in servers:
                server.start()
            while any(server.is_alive() for server in servers):
                try:
                    time.sleep(LOOK_SECONDS)
                    self._enforce_limits()
                    budget = self.execution.budget
                    if self.trouble or (budget and time.monotonic() - began > budget):
                        self._stop()
                except KeyboardInterrupt:
                    if interrupted:
                        raise
                    interrupted = True
                    self._stop()
        finally:
            self.stopping.set()
            for one in list(self.workers.values()):
                one.process.kill()  # its checkpoint is written whole or not at all
            for server in servers:
                server.join()
        if self.trouble:
            raise self.trouble
        if interrupted:
            raise KeyboardInterrupt
        return self.finished

    def _stop(self) -> None:
        self.stopping.set()
        for one in list(self.workers.values()):
            if one.since is None:
                one.process.kill()  # still starting: there is nothing to keep
            else:
                one.pause()

    def _serve(self, index: int) -> None:
        try:
            while (cell := self._next()) is not None:
                self._serve_one(index, cell)
        except BaseException as error:
            self.trouble = self.trouble or error
        finally:
            if index in self.workers:
                _close(self.workers.pop(index))

    def _next(self) -> Cell | None:
        """The next cell to run; waits while all that are left are other runners'."""
        while not self.stopping.is_set():
            with self.mutex:
                if self.pending:
                    return self.pending.popleft()
                if not self.waiting:
                    return None
                if self.waiting[0][0] <= time.monotonic():
                    return self.waiting.popleft()[1]
            time.sleep(LOOK_SECONDS)
        return None

    def _serve_one(self, index: int, cell: Cell) -> None:
        if path_of(self.results, cell).exists():
            self._done(index, cell)
        elif lock.busy(self.results, cell):
            if cell.digest not in self.told:
                self.told.add(cell.digest)
                message = f"{cell.label}: another runner has it; waiting"
                self.on_event(index, cell, {"event": "log", "level": "INFO", "message": message})
            self._put_off(cell)
        else:
            if index not in self.workers:
                self.workers[index] = self._start(index)
            one = self.workers[index]
            ended = self._run_one(one, cell)
            if ended == "recorded":
                self._done(index, cell)
            elif ended == "busy":
                self._put_off(cell)
            elif ended == "paused":
                # A worker that was told to stop takes no more cells.
                _close(self.workers.pop(index))
                if one.reason is not None:
                    self._record_end(cell, index, one.reason, _last_lines(one.log))
                else:
                    self._put_off(cell)
            else:
                code = _close(self.workers.pop(index))
                if one.reason is not None or not self.stopping.is_set():
                    self._record_end(cell, index, one.reason or _how(code), _last_lines(one.log))

    def _start(self, index: int) -> _Worker:
        execution = self.execution
        log = self.results / "logs" / f"worker-{socket.gethostname()}-{os.getpid()}-{index}.log"
        threads = str(execution.threads)
        env = os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        env |= gpus_of(index, execution)
        try:
            log.parent.mkdir(parents=True, exist_ok=True)
            with log.open("w") as errors:
                process = subprocess.Popen(
                    [*worker.command(), str(self.results), json.dumps(asdict(execution))],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    text=True,
                    env=env,
                    start_new_session=True,  # a signal to the whole group is the launcher's to pass
                )
        except OSError as error:
            raise StorageError(
                f"{log}: cannot be written ({os.strerror(error.errno or 0)}); free or open the "
                "place, or name another with --results, and run the same command again"
            ) from error
        return _Worker(index=index, process=process, log=log)

    def _run_one(self, one: _Worker, cell: Cell) -> Ended:
        """Sends a cell and passes events on until it ended."""
        assert one.process.stdout is not None
        one.cell, one.since = cell, None
        one.send(json.dumps(asdict(cell)))
        if self.stopping.is_set():
            one.pause()
        self.on_event(one.index, cell, {"event": "start"})
        for line in one.process.stdout:
            event = json.loads(line)
            match event["event"]:
                case "recorded" | "busy" | "paused" as ended:
                    one.cell = None
                    return ended
                case "storage":
                    raise StorageError(event["message"])
                case "running":
                    one.since = time.monotonic()
            self.on_event(one.index, cell, event)
        return "died"

    def _enforce_limits(self) -> None:
        """Pauses a cell over its time and kills one over its memory, or that does not pause."""
        now, execution = time.monotonic(), self.execution
        for one in list(self.workers.values()):
            if one.cell is None:
                continue
            if one.asked is not None and now - one.asked > GRACE_SECONDS:
                one.process.kill()
            if one.since is None:
                continue
            seconds, limit = execution.cell_seconds, execution.cell_memory
            if seconds is not None and one.reason is None and now - one.since > seconds:
                one.reason = f"timeout: not done after --cell-seconds {seconds:g}"
                one.pause()
            if limit is not None and (held := resident_bytes(one.process.pid)) > limit:
                one.reason = (
                    f"out of memory: its processes held {held / 2**30:.2f} GiB, "
                    f"more than --cell-memory {limit / 2**30:.2f} GiB"
                )
                one.process.kill()

    def _record_end(self, cell: Cell, index: int, error: str, log: tuple[str, ...]) -> None:
        """Records a cell whose worker could not, unless another runner has taken it over."""
        held = lock.acquire(self.results, cell)
        if held is None:
            self._put_off(cell)
            return
        with held:
            if not path_of(self.results, cell).exists():
                failed = Record(cell=cell, digest=cell.digest, status="failed", error=error)
                surroundings = environment(torch.device("cpu"), {})
                write(self.results, replace(failed, log=log, environment=surroundings))
        self._done(index, cell)

    def _put_off(self, cell: Cell) -> None:
        with self.mutex:
            self.waiting.append((time.monotonic() + BUSY_SECONDS, cell))

    def _done(self, index: int, cell: Cell) -> None:
        record = load(path_of(self.results, cell))
        with self.mutex:
            self.finished.append(record)
        event = {"event": "done", "status": record.status, "error": record.error}
        self.on_event(index, cell, event)


def gpus_of(index: int, execution: Execution) -> dict[str, str]:
    """The GPUs of a worker, as an environment variable; several workers may share one."""
    gpus, each = execution.gpus, execution.devices
    if not gpus:
        return {}
    places = [gpus[i : i + each] for i in range(0, len(gpus) - each + 1, each)]
    return {"CUDA_VISIBLE_DEVICES": ",".join(places[index % len(places)])}


def _close(one: _Worker) -> int:
    """Ends a worker that is idle or dead and returns its exit status."""
    process = one.process
    assert process.stdin is not None and process.stdout is not None
    with one.mutex, contextlib.suppress(OSError):
        process.stdin.close()
    try:
        code = process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        process.kill()
        code = process.wait()
    process.stdout.close()
    with contextlib.suppress(OSError):
        if code == 0 and not one.log.stat().st_size:
            one.log.unlink()
    return code


def _how(code: int) -> str:
    if code >= 0:
        return f"the worker process ended with exit status {code}"
    name = signal.Signals(-code).name
    hint = ", by hand or for want of memory" if name == "SIGKILL" else ""
    return f"the worker process was killed by {name}{hint}"


def _last_lines(log: Path) -> tuple[str, ...]:
    lines = log.read_text(errors="replace").splitlines()
    return tuple(line.rstrip() for line in lines if line.strip())[-LOG_LINES:]
