"""The command line as a user meets it: mistakes are one line on stderr, exit status 2, nothing lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from seqbench.suite import cli

TINY = [
    "--set", "train.steps=4", "--set", "train.eval_every=2", "--set", "train.batch_size=4",
    "--set", "train.eval_batches=1", "--set", "train.test_batches=1", "--set", "model.d_model=16",
    "--set", "model.num_layers=1",
]  # fmt: skip


def seqbench(
    *arguments: str, cwd: Path, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-m", "seqbench.suite.cli", *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        env=os.environ | (env or {}),
        timeout=300,
    )


def run_tiny(tmp_path: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return seqbench(
        "run", "--tasks", "induction-heads", "--models", "mamba", *TINY, "--workers", "1", *more,
        cwd=tmp_path,
    )  # fmt: skip


MISTAKES: list[tuple[list[str], list[str]]] = [
    (["run", "quikstart"], ["quikstart", "quickstart"]),
    (["run", "missing.py"], ["missing.py", "no such file"]),
    (["run"], ["grid", "--tasks"]),
    (["run", "--tasks", "dna"], ["--models"]),
    (["run", "--tasks", "dnaa", "--models", "mamba"], ["dnaa", "dna"]),
    (["run", "--tasks", "dna", "--models", "mambo"], ["mambo", "mamba"]),
    (["run", "--tasks", "dna", "--models", "mamba+s44"], ["s44", "s4"]),
    (["run", "--tasks", "dna", "--models", "mamba", "--scale", "papper"], ["papper", "paper"]),
    (["run", "smoke", "--set", "train.stepps=5"], ["stepps", "steps"]),
    (["run", "smoke", "--set", "train.steps=many"], ["train.steps", "many"]),
    (["run", "smoke", "--set", "train.steps=1.5"], ["train.steps", "1.5"]),
    (["run", "smoke", "--set", "train.steps=0"], ["train.steps", "0"]),
    (["run", "smoke", "--set", "train.lr=-1"], ["train.lr", "-1"]),
    (["run", "smoke", "--set", "train.schedule=linear"], ["train.schedule", "linear", "cosine"]),
    (["run", "smoke", "--set", "training.steps=5"], ["training", "train"]),
    (["run", "smoke", "--set", "steps=5"], ["steps=5", "SECTION.KEY=VALUE"]),
    (["run", "smoke", "--set", "model.d_modle=5"], ["d_modle", "d_model"]),
    (["run", "smoke", "--seeds", "one"], ["--seeds", "one"]),
    (["run", "smoke", "--workers", "0"], ["--workers", "0"]),
    (["run", "smoke", "--launcher", "pigeon"], ["pigeon", "local"]),
    (["run", "smoke", "--wrkers", "2"], ["--wrkers"]),
    (["report"], ["results", "run"]),
    (["report", "quikstart", "--published"], ["quikstart", "quickstart"]),
    (["list", "modles"], ["modles", "models"]),
    (["data", "fetch", "txt8"], ["txt8", "text8"]),
    (["run", "--tasks", "language", "--models", "mamba", "--set", "task.path=none.txt"], ["none.txt"]),
    (["run", "--tasks", "language", "--models", "mamba", "--set", "task.path=short.txt"], ["short.txt"]),
    (["run", "--tasks", "dna", "--models", "mamba", "--set", "task.fasta=none.fa"], ["none.fa"]),
    (["run", "--tasks", "dna", "--models", "mamba", "--set", "task.fasta=empty.fa"], ["empty.fa"]),
    (["run", "--tasks", "piano", "--models", "mamba", "--set", "task.path=audio"], ["audio"]),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "words"), MISTAKES, ids=lambda v: " ".join(v)[:60])
def test_a_mistake_is_one_line_that_names_the_value_and_the_remedy(
    arguments: list[str],
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "short.txt").write_text("too short")
    (tmp_path / "empty.fa").write_text("")
    (tmp_path / "audio").mkdir()
    (tmp_path / "audio" / "notes.txt").write_text("no sound")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["seqbench", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    shown = capsys.readouterr().err
    assert stopped.value.code == 2, shown
    assert shown.count("\n") == 1, shown
    for word in words:
        assert word in shown
    assert not (tmp_path / "results" / "records").exists()


def test_a_second_run_skips_and_a_deleted_record_alone_runs_again(tmp_path: Path) -> None:
    first = run_tiny(tmp_path, "--models", "mamba,s4")
    assert first.returncode == 0, first.stderr
    records = sorted((tmp_path / "results" / "records").rglob("*.json"))
    assert len(records) == 2
    before = {path: json.loads(path.read_text()) for path in records}
    times = {path: path.stat().st_mtime_ns for path in records}

    again = run_tiny(tmp_path, "--models", "mamba,s4")
    assert "0 to run" in again.stderr
    assert {path: path.stat().st_mtime_ns for path in records} == times

    records[0].unlink()
    third = run_tiny(tmp_path, "--models", "mamba,s4")
    assert "1 to run" in third.stderr
    assert records[1].stat().st_mtime_ns == times[records[1]]
    old, new = before[records[0]], json.loads(records[0].read_text())
    for record in (old, new):
        record.pop("cost"), record.pop("environment")
        for point in record["curve"]:
            point.pop("seconds")
    assert new == old


def test_a_record_cut_in_half_is_named_with_its_remedy(tmp_path: Path) -> None:
    assert run_tiny(tmp_path).returncode == 0
    (record,) = (tmp_path / "results" / "records").rglob("*.json")
    text = record.read_text()
    record.write_text(text[: len(text) // 2])
    done = run_tiny(tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1, done.stderr
    assert record.name in done.stderr and "delete" in done.stderr


def test_a_results_folder_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "results").write_text("in the way")
    done = run_tiny(tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1, done.stderr
    assert "results" in done.stderr and (tmp_path / "results").read_text() == "in the way"


def test_a_diverging_cell_is_recorded_while_the_grid_goes_on(tmp_path: Path) -> None:
    done = run_tiny(
        tmp_path, "--set", "train.lr=1e30", "--set", "train.clip=0", "--set", "train.steps=12",
        "--models", "mamba,s4",
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    statuses = [
        json.loads(p.read_text())["status"]
        for p in (tmp_path / "results" / "records").rglob("*.json")
    ]
    assert len(statuses) == 2 and "diverged" in statuses


def test_list_as_json_is_what_a_program_can_read(tmp_path: Path) -> None:
    done = seqbench("list", "--json", cwd=tmp_path)
    found = json.loads(done.stdout)
    assert {row["name"] for row in found["tasks"]} >= {
        "selective-copying", "induction-heads", "language", "dna", "piano",
    }  # fmt: skip
    assert {row["name"] for row in found["models"]} >= {"mamba", "s4", "transformer"}
    assert {row["name"] for row in found["grids"]} >= {"quickstart", "smoke"}
