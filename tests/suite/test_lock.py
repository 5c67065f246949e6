"""The lock of a cell: one holder, the dead are followed at once, the living and the distant are respected."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from seqbench.suite import lock
from seqbench.suite.experiment import Cell
from seqbench.suite.lock import Owner, acquire, busy, path_of_lock
from seqbench.suite.records import StorageError

CELL = Cell(task="dna", model="s4", seed=0, scale="cpu", scale_note="")


def leave(results: Path, **changes: Any) -> Path:
    """A lock that somebody else left."""
    path = path_of_lock(results, CELL)
    path.parent.mkdir(parents=True, exist_ok=True)
    owner = Owner(token="theirs", pid=os.getpid(), host=lock._host(), started=lock._started())
    path.write_text(json.dumps(asdict(owner) | changes))
    return path


def test_one_holder_at_a_time(tmp_path: Path) -> None:
    held = acquire(tmp_path, CELL)
    assert held is not None and held.held and busy(tmp_path, CELL)
    assert acquire(tmp_path, CELL) is None
    held.release()
    assert not busy(tmp_path, CELL)
    again = acquire(tmp_path, CELL)
    assert again is not None
    again.release()
    assert list((tmp_path / "locks").iterdir()) == []


def test_the_lock_of_a_dead_process_is_taken_over_at_once(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    leave(tmp_path, pid=dead.pid)
    assert not busy(tmp_path, CELL)
    held = acquire(tmp_path, CELL)
    assert held is not None
    held.release()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
def test_a_pid_that_another_process_has_by_now_is_no_owner(tmp_path: Path) -> None:
    leave(tmp_path, started="long ago")
    assert not busy(tmp_path, CELL)


def test_another_machines_lock_counts_while_it_is_touched(tmp_path: Path) -> None:
    path = leave(tmp_path, host="elsewhere", pid=1)
    assert busy(tmp_path, CELL) and acquire(tmp_path, CELL) is None
    os.utime(path, (0, 0))
    assert not busy(tmp_path, CELL)
    held = acquire(tmp_path, CELL)
    assert held is not None
    held.release()


def test_a_holder_touches_its_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.01)
    touched = threading.Event()
    plain = os.utime

    def utime(path: Any, *rest: Any) -> None:
        plain(path, *rest)
        touched.set()

    monkeypatch.setattr(os, "utime", utime)
    with acquire(tmp_path, CELL):  # type: ignore[union-attr]
        assert touched.wait(30)


def test_a_lock_that_another_took_over_stays_theirs(tmp_path: Path) -> None:
    held = acquire(tmp_path, CELL)
    assert held is not None
    path = leave(tmp_path)
    assert not held.held
    held.release()
    assert path.exists()


@pytest.mark.parametrize("links", [True, False])
def test_of_many_that_follow_a_dead_owner_one_gets_the_lock(
    links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not links:

        def refuse(*_: Any) -> None:
            raise PermissionError(1, "no links here")

        monkeypatch.setattr(os, "link", refuse)
    for _ in range(20):
        leave(tmp_path, started="long ago")
        start, got = threading.Barrier(8), []

        def take(start: threading.Barrier = start, got: list[lock.Lock] = got) -> None:
            start.wait()
            held = acquire(tmp_path, CELL)
            if held is not None:
                got.append(held)

        takers = [threading.Thread(target=take) for _ in range(8)]
        for taker in takers:
            taker.start()
        for taker in takers:
            taker.join()
        assert len(got) == 1
        got[0].release()


def test_a_folder_that_takes_no_lock_is_named(tmp_path: Path) -> None:
    (tmp_path / "locks").write_text("in the way")
    with pytest.raises(StorageError, match="locks"):
        acquire(tmp_path, CELL)
