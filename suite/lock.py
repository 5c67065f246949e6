"""One runner a cell: a lock file with its owner in it, touched while the owner lives.

It needs nothing of the file system but exclusive creation and renaming, so a folder shared between
machines will do. The lock of a process that died on this machine is taken over at once, one of
another machine after STALE_SECONDS without a touch.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Self

from seqbench.suite.experiment import Cell
from seqbench.suite.records import StorageError

BEAT_SECONDS = 10.0
STALE_SECONDS = 120.0


@dataclass(frozen=True, kw_only=True)
class Owner:
    """Who holds a lock: `host` tells machines and containers apart, `started` reused pids."""

    token: str
    pid: int
    host: str
    started: str


def path_of_lock(results: Path, cell: Cell) -> Path:
    """<results>/locks/<digest>.lock"""
    return results / "locks" / f"{cell.digest}.lock"


class Lock:
    """A held lock; it is released on leaving the `with` block."""

    def __init__(self, path: Path, owner: Owner) -> None:
        self.path, self.owner = path, owner
        self._over = threading.Event()
        self._beating = threading.Thread(target=self._beat, daemon=True)
        self._beating.start()

    @property
    def held(self) -> bool:
        """Whether it is still ours: another may have taken it while this machine slept."""
        return _read(self.path) == self.owner

    def release(self) -> None:
        """Gives it back; a lock that another took over stays theirs."""
        self._over.set()
        self._beating.join()
        if self.held:
            self.path.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.release()

    def _beat(self) -> None:
        while not self._over.wait(BEAT_SECONDS):
            with contextlib.suppress(OSError):
                if self.held:
                    os.utime(self.path)


def acquire(results: Path, cell: Cell) -> Lock | None:
    """The cell's lock, or None while another process holds it; StorageError if none can be made."""
    path = path_of_lock(results, cell)
    owner = Owner(token=uuid.uuid4().hex, pid=os.getpid(), host=_host(), started=_started())
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return _acquire(path, owner)
    except OSError as error:
        raise StorageError(
            f"{path}: cannot be written ({os.strerror(error.errno or 0)}); free or open the "
            "place, or name another with --results, and run the same command again"
        ) from error


def busy(results: Path, cell: Cell) -> bool:
    """Whether a process that lives, as far as can be told, holds the cell's lock."""
    path = path_of_lock(results, cell)
    return path.exists() and not _stale(path, _read(path))


def _acquire(path: Path, owner: Owner) -> Lock | None:
    # Written whole under a name of its own, then linked: nobody ever reads half an owner.
    mine = path.with_name(f".{path.name}.{owner.token}")
    mine.write_text(json.dumps(asdict(owner)))
    try:
        with contextlib.suppress(FileExistsError):
            _claim(mine, path)
            return Lock(path, owner)
        if _stale(path, _read(path)) and _take_over(path, mine):
            return Lock(path, owner)
        return None
    finally:
        mine.unlink(missing_ok=True)


def _take_over(path: Path, mine: Path) -> bool:
    """Puts a lock in a stale one's place, unless another is about to: one alone may remove it.

    Two that both saw the stale one could else remove each other's new lock.
    """
    turn = path.with_name(f".{path.name}.turn")
    try:
        turn.touch(exist_ok=False)
    except FileExistsError:
        with contextlib.suppress(FileNotFoundError):
            if _folder_time(path.parent) - turn.stat().st_mtime > STALE_SECONDS:
                turn.unlink()  # its owner died within these few lines; the next look goes on
        return False
    try:
        if _stale(path, _read(path)):
            path.unlink(missing_ok=True)
            with contextlib.suppress(FileExistsError):  # one that came just now was faster
                _claim(mine, path)
                return True
        return False
    finally:
        turn.unlink(missing_ok=True)


def _claim(whole: Path, path: Path) -> None:
    """Gives a whole file the name `path` too; FileExistsError if that is taken."""
    try:
        os.link(whole, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without links
        with path.open("x") as file:
            file.write(whole.read_text())


def _stale(path: Path, owner: Owner | None) -> bool:
    if owner is not None and owner.host == _host():
        return owner.started != _started(owner.pid)
    try:
        touched = path.stat().st_mtime
    except FileNotFoundError:
        return False  # it has just gone; the next look decides
    return _folder_time(path.parent) - touched > STALE_SECONDS


def _folder_time(folder: Path) -> float:
    """The clock that stamps files there, which is a server's and not this machine's."""
    probe = folder / f".now.{uuid.uuid4().hex}"
    try:
        probe.touch()
        return probe.stat().st_mtime
    except OSError:
        return time.time()
    finally:
        probe.unlink(missing_ok=True)


def _read(path: Path) -> Owner | None:
    try:
        return Owner(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None


@cache
def _host() -> str:
    """This machine, since its boot, and this container's process numbers."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return "/".join(parts)


def _started(pid: int | None = None) -> str:
    """When a process of this machine started; "" for one that is gone, or is only a zombie."""
    pid = os.getpid() if pid is None else pid
    if not Path("/proc/self/stat").exists():  # not Linux: alive or not is all there is to know
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return ""
        except PermissionError:
            return "alive"
        return "alive"
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]
