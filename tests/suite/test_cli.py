"""The command line as a user meets it: mistakes are one line on stderr, exit status 2, nothing lost."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from seqbench.models.build import build_model
from seqbench.suite import cli
from seqbench.suite.new import TEMPLATES

Command = Callable[..., subprocess.CompletedProcess[str]]  # the fixture `seqbench`
# The command runs elsewhere: a relative PYTHONPATH must still lead to this checkout.
PATHS = ":".join(str(Path(p).absolute()) for p in os.environ.get("PYTHONPATH", "").split(":") if p)
TINY = [
    "--set", "train.steps=4", "--set", "train.eval_every=2", "--set", "train.batch_size=4",
    "--set", "train.eval_batches=1", "--set", "train.test_batches=1", "--set", "model.d_model=16",
    "--set", "model.num_layers=1",
]  # fmt: skip


SMALL_RUN = [
    "run", "--tasks", "induction-heads", "--models", "mamba,s4", *TINY, "--workers", "1", "--threads", "1",
]  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the results of two cells, made by the command as a user types it."""
    folder = tmp_path_factory.mktemp("finished")
    done = subprocess.run(
        [sys.executable, "-P", "-m", "seqbench.suite.cli", *SMALL_RUN],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"PYTHONPATH": PATHS},
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def mine(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it to work in."""
    shutil.copytree(finished, tmp_path / "mine")
    monkeypatch.chdir(tmp_path / "mine")
    return tmp_path / "mine"


SYNTHETIC = ["run", "--tasks", "selective-copying", "--models", "mamba"]
LANGUAGE = ["run", "--tasks", "language", "--models", "mamba"]
DNA = ["run", "--tasks", "dna", "--models", "mamba"]
PIANO = ["run", "--tasks", "piano", "--models", "mamba"]

# What is typed, and what the one line has to say.
MISTAKES: list[tuple[list[str], list[str]]] = [
    # Names
    (["run", "quikstart"], ["quikstart", "quickstart"]),
    (["run", "missing.py"], ["missing.py", "no such file"]),
    (["run", "--tasks", "dnaa", "--models", "mamba"], ["dnaa", "dna"]),
    (["run", "--tasks", "missing.py", "--models", "mamba"], ["missing.py", "no such file"]),
    (["run", "--tasks", "dna", "--models", "mambo"], ["mambo", "mamba"]),
    (["run", "--tasks", "dna", "--models", "mamba+s44"], ["s44", "s4"]),
    (["run", "--tasks", "dna", "--models", "mamba+missing.py"], ["missing.py", "no such file"]),
    (["run", "--tasks", "dna", "--models", "manba+s4"], ["manba", "mamba"]),
    (["run", "--tasks", "dna", "--models", "mamba", "--scale", "papper"], ["papper", "paper"]),
    (["report", "quikstart", "--published"], ["quikstart", "quickstart"]),
    (["list", "modles"], ["modles", "models"]),
    (["data", "fetch", "txt8"], ["txt8", "text8"]),
    (["data", "verify", "txt8"], ["txt8", "text8"]),
    (["rum"], ["rum"]),
    (["check-plugin", "induction-head"], ["induction-head", "induction-heads"]),
    (["check-plugin", "missing.py"], ["missing.py", "no such file"]),
    (["check-plugin", "dna", "--kind", "taks"], ["taks", "task"]),
    # Options of the command line
    (["run"], ["grid", "--tasks"]),
    (["run", "--tasks", "dna"], ["--models"]),
    (["run", "smoke", "--tasks", "dna", "--models", "mamba"], ["not both"]),
    (["run", "--tasks", "", "--models", "mamba"], ["--tasks", "names"]),
    (["run", "--tasks", "dna", "--models", ","], ["--models", "names"]),
    (["run", "smoke", "--seeds", "one"], ["--seeds", "one", "0,1,2"]),
    (["run", "smoke", "--seeds", "-1"], ["--seeds", "-1", "from 0 on"]),
    (["run", "smoke", "--seeds", ""], ["--seeds", "0,1,2"]),
    (["run", "smoke", "--seeds", "1.5"], ["--seeds", "1.5"]),
    (["run", "smoke", "--workers", "0"], ["--workers", "0"]),
    (["run", "smoke", "--workers", "many"], ["--workers", "integer"]),
    (["run", "smoke", "--threads", "-2"], ["--threads", "-2"]),
    (["run", "smoke", "--launcher", "pigeon"], ["pigeon", "local"]),
    (["run", "smoke", "--device", "tpu"], ["tpu", "cpu"]),
    (["run", "smoke", "--retry", "done"], ["done", "failed"]),
    (["run", "smoke", "--wrkers", "2"], ["--wrkers"]),
    (["run", "smoke", "--results", "short.txt"], ["short.txt", "--results"]),
    (["run", "smoke", "--results", "/dev/null/results"], ["/dev/null/results", "--results"]),
    (["report"], ["results", "run"]),
    # --set
    (["run", "smoke", "--set", "train.stepps=5"], ["stepps", "steps"]),
    (["run", "smoke", "--set", "train.steps=many"], ["train.steps", "many"]),
    (["run", "smoke", "--set", "train.steps=1.5"], ["train.steps", "1.5"]),
    (["run", "smoke", "--set", "train.steps=true"], ["train.steps", "true"]),
    (["run", "smoke", "--set", "train.steps=0"], ["train.steps", "0"]),
    (["run", "smoke", "--set", "train.lr=-1"], ["train.lr", "-1"]),
    (["run", "smoke", "--set", "train.lr=NaN"], ["train.lr", "nan", "finite"]),
    (["run", "smoke", "--set", "train.lr=Infinity"], ["train.lr", "inf", "finite"]),
    (["run", "smoke", "--set", "train.clip=-0.5"], ["train.clip", "-0.5"]),
    (["run", "smoke", "--set", "train.beta2=1.0"], ["train.beta2", "1"]),
    (["run", "smoke", "--set", "train.patience=0"], ["train.patience", "0"]),
    (["run", "smoke", "--set", "train.schedule=linear"], ["train.schedule", "linear", "cosine"]),
    (["run", "smoke", "--set", "training.steps=5"], ["training", "train"]),
    (["run", "smoke", "--set", "steps=5"], ["steps=5", "SECTION.KEY=VALUE"]),
    (["run", "smoke", "--set", "train.steps"], ["train.steps", "SECTION.KEY=VALUE"]),
    (["run", "smoke", "--set", f"train.steps={'9' * 5000}"], ["train.steps", "digits"]),
    (["run", "smoke", "--set", "model.d_modle=5"], ["d_modle", "d_model"]),
    ([*SYNTHETIC, "--set", "model.d_model=-8"], ["d_model", "-8"]),
    ([*SYNTHETIC, "--set", "model.d_model=wide"], ["d_model", "wide"]),
    ([*SYNTHETIC, "--set", "model.num_layers=0"], ["num_layers", "0"]),
    ([*SYNTHETIC, "--set", "model.dropout=1.5"], ["dropout", "1.5"]),
    (["run", "--tasks", "dna", "--models", "transformer", "--set", "model.num_heads=7"], ["num_heads", "7"]),
    (["run", "--tasks", "dna", "--models", "transformer", "--set", "model.mlp=relu"], ["mlp", "relu", "gelu"]),
    # Tasks and their data
    ([*SYNTHETIC, "--set", "task.length=3"], ["task.length", "3"]),
    ([*SYNTHETIC, "--set", "task.vocab_size=2"], ["task.vocab_size", "2", "3"]),
    ([*SYNTHETIC, "--set", "task.mix=-0.1"], ["task.mix", "-0.1"]),
    ([*SYNTHETIC, "--set", "task.stages=[[8]]"], ["task.stages"]),
    ([*LANGUAGE, "--set", "task.path=none.txt"], ["none.txt"]),
    ([*LANGUAGE, "--set", "task.path=short.txt"], ["short.txt"]),
    ([*LANGUAGE, "--set", "task.path=audio", "--set", "task.length=100000"], ["audio"]),
    ([*LANGUAGE, "--set", "task.dataset=sotus"], ["task.dataset", "sotus", "sotu"]),
    ([*DNA, "--set", "task.fasta=none.fa"], ["none.fa"]),
    ([*DNA, "--set", "task.fasta=empty.fa"], ["empty.fa"]),
    ([*DNA, "--set", "task.fasta=short.txt"], ["short.txt"]),
    ([*DNA, "--set", "task.bed=short.txt"], ["short.txt"]),
    ([*PIANO, "--set", "task.path=audio"], ["audio"]),
    ([*PIANO, "--set", "task.path=nowhere"], ["nowhere"]),
    # Grid files
    (["run", "none.yaml"], ["none.yaml", "no such file"]),
    (["run", "torn.yaml"], ["torn.yaml", "line 2"]),
    (["run", "empty.yaml"], ["empty.yaml"]),
    (["run", "key.yaml"], ["key.yaml", "modles", "models"]),
    (["run", "twice.yaml"], ["twice.yaml", "seeds", "twice"]),
    (["run", "seed.yaml"], ["seed.yaml", "seeds.0", "-1"]),
    (["run", "set.yaml"], ["set.yaml", "steps", "SECTION.KEY"]),
    (["run", "size.yaml"], ["mambaa", "mamba"]),
    (["run", "value.yaml"], ["train.steps", "few"]),
    (["run", "audio.yaml"], ["audio.yaml"]),
    (["run", "grid_empty.py"], ["grid_empty.py", "requests"]),
    (["run", "grid_seeds.py"], ["grid_seeds.py", "SEEDS"]),
    (["run", "grid_fails.py"], ["grid_fails.py", "ZeroDivisionError"]),
    # Plugins
    (["run", "--tasks", "raises.py", "--models", "mamba"], ["raises.py", "loads", "boom"]),
    (["run", "--tasks", "imports.py", "--models", "mamba"], ["imports.py", "not_installed", "install"]),
    (["run", "--tasks", "exits.py", "--models", "mamba"], ["exits.py", "loads", "SystemExit"]),
    (["run", "--tasks", "nothing.py", "--models", "mamba"], ["nothing.py", "one-class", "none"]),
    (["run", "--tasks", "abstract.py", "--models", "mamba"], ["abstract.py", "one-class", "chance"]),
    (["run", "--tasks", "shape.py", "--models", "mamba"], ["shape.py", "shapes", "(4, 32)"]),
    (["run", "--tasks", "dtype.py", "--models", "mamba"], ["dtype.py", "dtypes", "int32"]),
    (["run", "--tasks", "range.py", "--models", "mamba"], ["range.py", "vocabulary", "16"]),
    (["run", "--tasks", "mask.py", "--models", "mamba"], ["mask.py", "mask"]),
    (["run", "--tasks", "prepare.py", "--models", "mamba"], ["prepare.py", "prepare", "boom"]),
    ([*SYNTHETIC[:-1], "mamba+raises.py"], ["raises.py", "loads", "boom"]),
    ([*SYNTHETIC[:-1], "mamba+imports.py"], ["imports.py", "not_installed"]),
    ([*SYNTHETIC[:-1], "mamba+nothing.py"], ["nothing.py", "one-class"]),
    ([*SYNTHETIC[:-1], "none+narrow.py"], ["narrow.py", "shapes", "Narrow maps"]),
    ([*SYNTHETIC[:-1], "none+fails.py"], ["fails.py", "boom"]),
    ([*SYNTHETIC[:-1], "narrow.py"], ["narrow.py", "one-class", "mamba+narrow.py"]),
    (["check-plugin", "nothing.py"], ["nothing.py", "one-class"]),
    (["new", "task", "My_Task"], ["My_Task", "my-task"]),
    (["new", "task", "dna"], ["dna", "take another"]),
    (["new", "model", "s4"], ["s4", "take another"]),
    (["new", "task", "raises"], ["raises.py", "is there already"]),
    (["new", "model", "fine", "--into", "short.txt"], ["short.txt", "--into"]),
]  # fmt: skip

GOOD_TASK = (TEMPLATES / "task.py").read_text()
GOOD_LAYER = (TEMPLATES / "layer.py").read_text()
GROUP = "cells:\n  - tasks: [dna]\n    models: [mamba]\n"
FILES = {
    "short.txt": "too short",
    "empty.fa": "",
    "audio/notes.txt": "no sound",
    "audio.yaml/notes.txt": "a folder",
    "torn.yaml": "seeds: [0]\ncells: [{tasks: [dna]",
    "empty.yaml": "",
    "key.yaml": GROUP.replace("models", "modles"),
    "twice.yaml": f"seeds: [0]\nseeds: [1]\n{GROUP}",
    "seed.yaml": f"seeds: [-1]\n{GROUP}",
    "set.yaml": f"{GROUP}    set: {{steps: 5}}\n",
    "size.yaml": f"{GROUP}    same_size_as: mambaa\n",
    "value.yaml": f"{GROUP}    set: {{train.steps: few}}\n",
    "grid_empty.py": "SEEDS = (0,)\n",
    "grid_seeds.py": "SEEDS = (0, -1)\ndef requests(scale): return []\n",
    "grid_fails.py": "SEEDS = (0,)\ndef requests(scale): return 1 / 0\n",
    "raises.py": "raise RuntimeError('boom')\n",
    "imports.py": "import not_installed_anywhere\n",
    "exits.py": "import sys\nsys.exit('gone')\n",
    "nothing.py": "x = 1\n",
    "abstract.py": GOOD_TASK.replace("def chance", "def chances"),
    "shape.py": GOOD_TASK.replace("Batch(torch.from_numpy(inputs)", "Batch(torch.from_numpy(inputs[:, :32])"),
    "dtype.py": GOOD_TASK.replace("torch.from_numpy(inputs)", "torch.from_numpy(inputs).int()"),
    "range.py": GOOD_TASK.replace("inputs[:, : -c.delay]", "inputs[:, : -c.delay] + 1"),
    "mask.py": GOOD_TASK.replace("targets[:, c.delay :] = ", "_ = "),
    "prepare.py": GOOD_TASK.replace("c = self.config\n        if not 1", "raise KeyError('boom')\n        if not 1"),
    "narrow.py": GOOD_LAYER.replace("self.weight * h_BLD", "h_BLD[..., :4]").replace("NewLayer", "Narrow"),
    "fails.py": GOOD_LAYER.replace("h_BLD = ", "raise OSError('boom')\n        h_BLD = "),
}  # fmt: skip


def test_sixty_mistakes_and_more_are_tried() -> None:
    assert len(MISTAKES) >= 60


@pytest.mark.parametrize(("arguments", "words"), MISTAKES, ids=lambda v: " ".join(v)[:60])
def test_a_mistake_is_one_line_that_names_the_value_and_the_remedy(
    arguments: list[str],
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["seqbench", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    shown = capsys.readouterr().err
    assert stopped.value.code == 2, shown
    assert shown.count("\n") == 1, shown
    for word in words:
        assert word in shown
    for name, text in FILES.items():
        assert (tmp_path / name).read_text() == text
    left = {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()}
    assert left == set(FILES)


def test_a_second_run_skips_and_a_deleted_record_alone_runs_again(
    mine: Path, seqbench: Command, inline: None
) -> None:
    records = sorted((mine / "results" / "records").rglob("*.json"))
    assert len(records) == 2
    before = {path: json.loads(path.read_text()) for path in records}
    times = {path: path.stat().st_mtime_ns for path in records}

    again = seqbench(*SMALL_RUN)
    assert again.returncode == 0 and "0 to run" in again.stderr
    assert {path: path.stat().st_mtime_ns for path in records} == times

    records[0].unlink()
    third = seqbench(*SMALL_RUN)
    assert third.returncode == 0 and "1 to run" in third.stderr
    assert records[1].stat().st_mtime_ns == times[records[1]]
    old, new = before[records[0]], json.loads(records[0].read_text())
    for record in (old, new):
        record.pop("cost"), record.pop("environment")
        for point in record["curve"]:
            point.pop("seconds")
    assert new == old


def test_a_record_cut_in_half_is_named_with_its_remedy(mine: Path, seqbench: Command) -> None:
    record = min((mine / "results" / "records").rglob("*.json"))
    text = record.read_text()
    record.write_text(text[: len(text) // 2])
    done = seqbench(*SMALL_RUN)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1, done.stderr
    assert record.name in done.stderr and "delete" in done.stderr


def test_a_results_folder_that_is_a_file_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seqbench: Command
) -> None:
    (tmp_path / "results").write_text("in the way")
    monkeypatch.chdir(tmp_path)
    done = seqbench(*SMALL_RUN)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1, done.stderr
    assert "results" in done.stderr and (tmp_path / "results").read_text() == "in the way"


def test_a_diverging_cell_is_recorded_while_the_grid_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seqbench: Command, inline: None
) -> None:
    monkeypatch.chdir(tmp_path)
    changed = ["train.lr=1e30", "train.clip=0", "train.steps=12"]
    done = seqbench(*SMALL_RUN, *(part for value in changed for part in ("--set", value)))
    assert done.returncode == 1, done.stderr
    statuses = [
        json.loads(p.read_text())["status"]
        for p in (tmp_path / "results" / "records").rglob("*.json")
    ]
    assert len(statuses) == 2 and "diverged" in statuses


def test_list_as_json_is_what_a_program_can_read(seqbench: Command) -> None:
    done = seqbench("list", "--json")
    found = json.loads(done.stdout)
    assert {row["name"] for row in found["tasks"]} >= {
        "selective-copying", "induction-heads", "language", "dna", "piano",
    }  # fmt: skip
    models = {row["name"]: row for row in found["models"]}
    assert models["mamba"]["block"] == "mamba" and models["mamba"]["layer"] == "s6"
    assert models["mamba"]["complexity"] == "O(L), O(1)"
    size = models["mamba"]["size"]
    built = build_model("transformer", **size)
    assert models["transformer"]["parameters"] == built.num_parameters
    for name, grows in (("mamba", False), ("s4", False), ("transformer", True)):
        carried = models[name]["state_size"]
        assert (carried["65536"] > 30 * carried["1024"]) is grows, name
    assert {row["name"] for row in found["grids"]} >= {"quickstart", "smoke"}
