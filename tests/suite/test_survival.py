"""A grid survives: its runner killed at random moments, its workers dying, its limits reached, its user leaving."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from seqbench.suite import cli, lock, runner
from seqbench.suite.execution import Execution
from seqbench.suite.experiment import Cell
from seqbench.suite.launchers import local, worker
from seqbench.suite.records import Record, StorageError, load_all, path_of, write

KILLED_GRID = """
import json, os, random, signal, sys, time
from pathlib import Path
import torch
from seqbench.suite import checkpoint, training
from seqbench.suite.configuration import resolve
from seqbench.suite.execution import Execution
from seqbench.suite.experiment import Request
from seqbench.suite.launchers.worker import run_locked
from seqbench.suite.records import path_of

torch.set_num_threads(1)
training.CHECKPOINT_SECONDS, training.CHECKPOINT_SHARE = 0.05, 0.5
results, kills = Path(sys.argv[1]), int(sys.argv[2])
settings = {
    "task.length": 32, "task.test_lengths": [16], "model.d_model": 16, "model.num_layers": 1,
    "train.steps": 300, "train.eval_every": 50, "train.batch_size": 4, "train.eval_batches": 1,
    "train.test_batches": 2, "train.stop_at": None, "train.curriculum": True,
}
cells = [
    resolve(Request(task="induction-heads", model=model, settings=settings), seed)
    for seed in (0, 1) for model in ("s4", "transformer")
]


def run_grid(folder):
    with open(f"{folder}.runs", "a") as runs:
        for cell in cells:
            if not path_of(folder, cell).exists():
                ended = run_locked(
                    cell, folder, Execution(device="cpu"), "", lambda event: None, lambda: False
                )
                runs.write(ended["event"] + "\\n")
                runs.flush()


def fork(folder):
    child = os.fork()
    if not child:
        try:
            run_grid(folder)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
        finally:
            os._exit(0)
    return child


moments, landed = random.Random(0), 0
while landed < kills:
    child = fork(results / "killed")
    time.sleep(moments.uniform(0.0, float(sys.argv[3])))
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    landed += os.WIFSIGNALED(status)
    if not os.WIFSIGNALED(status):  # the grid was done before the moment came: not yet, then
        path_of(results / "killed", cells[landed % len(cells)]).unlink()
for folder in ("killed", "whole"):
    os.waitpid(fork(results / folder), 0)
print(json.dumps({"kills": landed, "cells": [cell.digest for cell in cells]}))
"""


def timeless(record: Record) -> Record:
    curve = tuple(replace(point, seconds=0.0) for point in record.curve)
    return replace(record, curve=curve, cost=None, environment={})


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks its runners")
def test_a_grid_whose_runner_is_killed_30_times_is_the_undisturbed_one(tmp_path: Path) -> None:
    """Its process is forked from one that has everything imported, so that 30 starts take seconds."""
    done = subprocess.run(
        [sys.executable, "-c", KILLED_GRID, str(tmp_path), "30", "0.2"],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["kills"] == 30, done.stderr
    killed, whole = load_all(tmp_path / "killed"), load_all(tmp_path / "whole")
    assert sorted(r.digest for r in killed) == sorted(told["cells"])
    assert all(record.status == "done" for record in killed)
    assert [timeless(r) for r in killed] == [timeless(r) for r in whole]
    records = [p for p in (tmp_path / "killed" / "records").rglob("*") if p.is_file()]
    assert len([p for p in records if p.suffix == ".json"]) == len(told["cells"])


# A worker that trains nothing: what it does is its cell's `task`. It keeps the launcher's tests
# fast, and lets a cell die or dawdle at a known place.
PRETENDER = """
import json, os, sys, threading, time
from pathlib import Path
from seqbench.suite import lock
from seqbench.suite.experiment import Cell, TrainConfig
from seqbench.suite.records import Record, path_of, write

results = Path(sys.argv[1])
stop = threading.Event()
lines = []


def tell(**event):
    print(json.dumps(event), flush=True)


def listen():
    for line in sys.stdin:
        stop.set() if line.strip() == "stop" else lines.append(line)
    os._exit(3 if lines else 0)


threading.Thread(target=listen, daemon=True).start()
while True:
    while not lines:
        time.sleep(0.01)
    plain = json.loads(lines[0])
    cell = Cell(**{**plain, "train": TrainConfig(**plain["train"])})
    held = lock.acquire(results, cell)
    if held is None:
        lines.clear()
        tell(event="busy")
        continue
    if path_of(results, cell).exists():  # written since the launcher looked
        held.release()
        lines.clear()
        tell(event="recorded")
        continue
    tell(event="running")
    print("a word on stderr", file=sys.stderr, flush=True)
    ended = "recorded"
    if cell.task == "dies":
        os._exit(7)
    if cell.task == "fills":
        tell(event="storage", message="the disk is full")
        time.sleep(60)
    if cell.task in ("dawdles", "deaf"):
        tell(event="step", step=1)
        while cell.task == "deaf" or not stop.wait(0.01):
            time.sleep(0.01)
        ended = "paused"
    if cell.task == "works":
        time.sleep(0.1)
    if ended == "recorded":
        write(results, Record(cell=cell, digest=cell.digest, status="done"))
    held.release()
    lines.clear()
    tell(event=ended)
"""


@pytest.fixture
def pretenders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "command", lambda: [sys.executable, "-c", PRETENDER])


def cell(task: str, seed: int = 0) -> Cell:
    return Cell(task=task, model="s4", seed=seed, scale="cpu", scale_note="")


def run(
    cells: list[Cell], results: Path, on_event: Callable[..., None] | None = None, **options: Any
) -> list[Record]:
    return local.run(
        cells, results, Execution(**options), on_event=on_event or (lambda w, c, event: None)
    )


@pytest.mark.usefixtures("pretenders")
def test_a_worker_that_dies_leaves_its_reason_and_last_words(tmp_path: Path) -> None:
    records = run([cell("dies"), cell("works")], tmp_path)
    assert [r.status for r in records] == ["failed", "done"]
    assert records[0].error is not None and "exit status 7" in records[0].error
    assert records[0].log == ("a word on stderr",)
    assert "commit" in records[0].environment


@pytest.mark.usefixtures("pretenders")
def test_a_cell_over_its_time_is_paused_and_recorded_and_tried_again(tmp_path: Path) -> None:
    cells = [cell("dawdles"), cell("works")]
    records = run(cells, tmp_path, cell_seconds=0.5)
    assert [r.status for r in records] == ["failed", "done"]
    assert records[0].error == "timeout: not done after --cell-seconds 0.5"
    runner.forget(cells, tmp_path, "failed")
    assert not path_of(tmp_path, cells[0]).exists() and path_of(tmp_path, cells[1]).exists()


@pytest.mark.usefixtures("pretenders")
def test_a_cell_that_does_not_pause_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "GRACE_SECONDS", 0.3)
    (record,) = run([cell("deaf")], tmp_path, cell_seconds=0.3)
    assert record.error is not None and record.error.startswith("timeout")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
@pytest.mark.usefixtures("pretenders")
def test_a_cell_over_its_memory_is_killed_and_recorded(tmp_path: Path) -> None:
    (record,) = run([cell("deaf")], tmp_path, cell_memory=2**20)
    assert record.status == "failed" and record.error is not None
    assert record.error.startswith("out of memory") and "--cell-memory 0.00 GiB" in record.error


@pytest.mark.usefixtures("pretenders")
def test_a_full_disk_ends_the_run_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="the disk is full"):
        run([cell("fills"), cell("works")], tmp_path)
    assert load_all(tmp_path) == []


@pytest.fixture
def interruptible() -> Iterator[None]:
    """SIGINT raises, as in a terminal: a shell's background jobs inherit it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("pretenders", "interruptible")
def test_ctrl_c_lets_the_cells_pause(tmp_path: Path) -> None:
    def interrupt(worker: int, running: Cell, event: Mapping[str, Any]) -> None:
        if event["event"] == "step":
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run([cell("dawdles"), cell("works")], tmp_path, interrupt)
    assert load_all(tmp_path) == []
    assert not lock.busy(tmp_path, cell("dawdles"))


@pytest.mark.usefixtures("pretenders", "interruptible")
def test_a_second_ctrl_c_stops_at_once(tmp_path: Path) -> None:
    def interrupt(worker: int, running: Cell, event: Mapping[str, Any]) -> None:
        if event["event"] == "step":
            os.kill(os.getpid(), signal.SIGINT)
            threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT)).start()

    with pytest.raises(KeyboardInterrupt):
        run([cell("deaf")], tmp_path, interrupt)
    assert load_all(tmp_path) == []


@pytest.mark.usefixtures("pretenders")
def test_the_end_of_the_budget_pauses_what_runs_and_starts_no_more(tmp_path: Path) -> None:
    records = run([cell("works"), cell("dawdles"), cell("works", 1)], tmp_path, budget=3.0)
    assert [r.cell.task for r in records] == ["works"]
    assert len(load_all(tmp_path)) == 1


@pytest.mark.usefixtures("pretenders")
def test_two_runners_at_once_run_no_cell_twice_and_both_finish(tmp_path: Path) -> None:
    cells = [cell("works", seed) for seed in range(10)]
    begun: list[str] = []
    records: list[list[Record]] = []

    def note(worker: int, running: Cell, event: Mapping[str, Any]) -> None:
        if event["event"] == "running":
            begun.append(running.digest)

    def start() -> None:
        records.append(run(cells, tmp_path, note, workers=2))

    runners = [threading.Thread(target=start) for _ in range(2)]
    for one in runners:
        one.start()
    for one in runners:
        one.join()
    assert sorted(begun) == sorted(c.digest for c in cells)
    for found in records:
        assert sorted(r.digest for r in found) == sorted(begun)


def test_a_cell_that_another_runner_has_is_waited_for(tmp_path: Path) -> None:
    """No worker is started for it at all."""
    one = cell("works")
    held = lock.acquire(tmp_path, one)
    assert held is not None

    def finish() -> None:
        write(tmp_path, Record(cell=one, digest=one.digest, status="done"))
        held.release()

    events: list[Mapping[str, Any]] = []

    def note(worker: int, running: Cell, event: Mapping[str, Any]) -> None:
        events.append(event)

    threading.Timer(3 * local.BUSY_SECONDS, finish).start()
    (record,) = run([one], tmp_path, note)
    assert record.status == "done"
    assert [e["event"] for e in events] == ["log", "done"]
    assert "another runner has it" in events[0]["message"]


def test_gpus_are_shared_out() -> None:
    def visible(index: int, **options: Any) -> str:
        execution = Execution(gpus=("0", "1", "5", "7"), **options)
        return local.gpus_of(index, execution)["CUDA_VISIBLE_DEVICES"]

    assert [visible(i) for i in range(5)] == ["0", "1", "5", "7", "0"]
    assert [visible(i, devices=2) for i in range(3)] == ["0,1", "5,7", "0,1"]
    assert [visible(i, devices=3) for i in range(2)] == ["0,1,5", "0,1,5"]
    assert local.gpus_of(0, Execution()) == {}


def test_records_of_several_machines_merge_by_copying_files(tmp_path: Path) -> None:
    import shutil

    for machine, seeds in (("a", (0, 1)), ("b", (1, 2))):
        for seed in seeds:
            one = cell("works", seed)
            done = Record(cell=one, digest=one.digest, status="done", environment={"on": machine})
            write(tmp_path / machine, done)
    for machine in ("a", "b"):
        shutil.copytree(tmp_path / machine, tmp_path / "all", dirs_exist_ok=True)
    merged = load_all(tmp_path / "all")
    assert [r.cell.seed for r in merged] == [0, 1, 2]
    plan = runner.plan([cell("works", seed) for seed in range(4)], tmp_path / "all")
    assert [c.seed for c in plan.missing] == [3]


OPTIONS: list[tuple[list[str], list[str]]] = [
    (["--results", "/proc/results"], ["/proc/results", "--results"]),
    (["--device", "gpu"], ["--device", "gpu", "cpu"]),
    (["--devices", "0"], ["--devices", "0"]),
    (["--strategy", "dpp"], ["dpp", "ddp"]),
    (["--compile", "yes"], ["--compile", "yes", "graphs"]),
    (["--cell-memory", "lots"], ["--cell-memory", "lots", "4G"]),
    (["--cell-memory", "-1G"], ["--cell-memory", "-1G"]),
    (["--cell-seconds", "0"], ["--cell-seconds", "0"]),
    (["--budget", "-5"], ["--budget", "-5"]),
    (["--prefetch", "-1"], ["--prefetch", "-1"]),
    (["--retry", "timeout"], ["timeout", "failed"]),
    (["--ray-address", "auto"], ["--ray-address", "--launcher ray"]),
    (["--slurm", "partition=gpu"], ["--slurm", "--launcher slurm"]),
    (["--launcher", "slurm", "--slurm", "partition"], ["partition", "KEY=VALUE"]),
]


@pytest.mark.parametrize(("options", "words"), OPTIONS, ids=lambda v: " ".join(v))
def test_a_wrong_option_is_one_line(
    options: list[str],
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["seqbench", "run", "smoke", *options])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    shown = capsys.readouterr().err
    assert stopped.value.code == 2, shown
    assert shown.count("\n") == 1, shown
    for word in words:
        assert word in shown
