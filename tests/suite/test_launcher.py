"""The local launcher: a worker that dies costs its cell alone, and a dead launcher takes its workers along."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from seqbench.suite.configuration import resolve
from seqbench.suite.execution import Execution
from seqbench.suite.experiment import Cell, Request
from seqbench.suite.launchers import local
from seqbench.suite.new import TEMPLATES
from seqbench.suite.records import load_all
from seqbench.suite.training import run_cell

Command = Callable[..., subprocess.CompletedProcess[str]]  # the fixture `seqbench`
# The command runs elsewhere: a relative PYTHONPATH must still lead to this checkout.
PATHS = ":".join(str(Path(p).absolute()) for p in os.environ.get("PYTHONPATH", "").split(":") if p)
pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")


def cell(steps: int, seed: int = 0) -> Cell:
    settings: dict[str, Any] = {
        "task.length": 32,
        "task.test_lengths": [],
        "model.d_model": 16,
        "model.num_layers": 1,
        "train.steps": steps,
        "train.eval_every": 5,
        "train.batch_size": 4,
        "train.eval_batches": 1,
        "train.test_batches": 1,
        "train.stop_at": None,
    }
    return resolve(Request(task="induction-heads", model="s4", settings=settings), seed)


def test_a_killed_worker_costs_its_cell_alone(tmp_path: Path) -> None:
    doomed, fine = cell(100_000), cell(10)
    killed: list[int] = []

    def kill_once(worker: int, running: Cell, event: Any) -> None:
        if event["event"] == "step" and running == doomed and not killed:
            (pid,) = children()
            killed.append(pid)
            os.kill(pid, signal.SIGKILL)

    records = local.run([doomed, fine], tmp_path, Execution(), on_event=kill_once)
    assert [r.status for r in records] == ["failed", "done"]
    assert records[0].error is not None and "SIGKILL" in records[0].error
    assert len(load_all(tmp_path)) == 2


def test_a_worker_whose_batches_are_made_ahead_finishes(tmp_path: Path) -> None:
    """Its forked processes do not wait for the pipe that it listens to."""
    ahead = local.run([cell(10)], tmp_path / "ahead", Execution(prefetch=2))
    plain = run_cell(cell(10), tmp_path / "plain", device="cpu")
    assert plain is not None and [r.status for r in ahead] == ["done"]
    assert ahead[0].test == plain.test


def children() -> list[int]:
    """Workers whose parent is this process."""
    return [pid for pid, parent, _ in every_worker() if parent == os.getpid()]


def test_workers_end_with_a_launcher_that_is_killed_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seqbench: Command
) -> None:
    """kill -9 in the middle: no worker is left behind, no record is torn, the same cells finish."""
    command = [
        "run", "--tasks", "induction-heads", "--models", "s4", "--workers", "1", "--threads", "1",
        "--set", "task.test_lengths=[]",
        "--set", "task.length=32", "--set", "train.steps=150", "--set", "train.eval_every=50",
        "--set", "model.d_model=16", "--set", "train.eval_batches=1", "--set", "train.test_batches=1",
    ]  # fmt: skip
    first = subprocess.Popen(
        [sys.executable, "-P", "-m", "seqbench.suite.cli", *command],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": PATHS},
    )
    log = tmp_path / "results" / "logs"
    deadline = time.monotonic() + 60
    while not list(log.glob("*.csv")) and time.monotonic() < deadline and first.poll() is None:
        time.sleep(0.05)
    first.kill()
    first.communicate()
    deadline = time.monotonic() + 60
    while str(tmp_path) in [folder for _, _, folder in every_worker()]:
        assert time.monotonic() < deadline, "a worker outlives its launcher"
        time.sleep(0.1)
    monkeypatch.chdir(tmp_path)
    done = seqbench(*command)
    assert done.returncode == 0, done.stderr
    (record,) = (tmp_path / "results" / "records").rglob("*.json")
    assert json.loads(record.read_text())["status"] == "done"


NOTED = """

_plain = NewTask.batch


def _noted(self, split, index, batch_size, *, seed=0, stage=None):
    if split == "train" and index == 0 and seed >= 10:  # the contract's own are below
        with open("notes.txt", "a") as file:
            file.write(f"{seed}\\n")
    return _plain(self, split, index, batch_size, seed=seed, stage=stage)


NewTask.batch = _noted
"""


def test_two_commands_at_once_on_one_folder_run_no_cell_twice(tmp_path: Path) -> None:
    """The task notes the seed of every training that takes its first step."""
    (tmp_path / "noted.py").write_text((TEMPLATES / "task.py").read_text() + NOTED)
    seeds = [10, 11, 12, 13, 14, 15]
    command = [
        sys.executable, "-P", "-m", "seqbench.suite.cli", "run", "--tasks", "noted.py",
        "--models", "s4", "--seeds", ",".join(map(str, seeds)), "--workers", "1", "--threads", "1",
        "--set", "train.steps=40", "--set", "train.eval_every=20", "--set", "model.d_model=16",
    ]  # fmt: skip
    both = [
        subprocess.Popen(
            command,
            cwd=tmp_path,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": PATHS},
        )
        for _ in range(2)
    ]
    said = [one.communicate(timeout=400)[1] for one in both]
    assert [one.returncode for one in both] == [0, 0], said
    assert sorted(map(int, (tmp_path / "notes.txt").read_text().split())) == seeds
    records = load_all(tmp_path / "results")
    assert [r.cell.seed for r in records] == seeds and {r.status for r in records} == {"done"}
    assert list((tmp_path / "results" / "locks").iterdir()) == []


def every_worker() -> list[tuple[int, int, str]]:
    """(pid, parent, working directory) of every worker process of this machine."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if b"launchers.worker" in (entry / "cmdline").read_bytes():
                parent = (entry / "stat").read_text().rsplit(")", 1)[1].split()[1]
                found.append((int(entry.name), int(parent), os.readlink(entry / "cwd")))
        except OSError:
            continue
    return found
