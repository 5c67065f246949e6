"""The file that a finished cell leaves for the picture of its selection, and the picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from seqbench.models.build import build_model
from seqbench.suite.configuration import resolve
from seqbench.suite.experiment import Cell, Request, UserError
from seqbench.suite.records import write
from seqbench.suite.report import check, write_report
from seqbench.suite.selection import write_missing, write_selection
from seqbench.suite.training import run_cell
from seqbench.tasks.selective_copying import SelectiveCopying

SMALL = {
    "task.length": 32,
    "task.num_tokens": 4,
    "task.eval_sequences": 8,
    "model.d_model": 16,
    "train.steps": 2,
    "train.eval_every": 1,
    "train.curriculum": False,
}


def _cell(model: str, task: str = "selective-copying") -> Cell:
    settings = {k: v for k, v in SMALL.items() if task == "selective-copying" or "tokens" not in k}
    return resolve(Request(task=task, model=model, settings=settings), 0)


def _finished(results: Path, model: str, task: str = "selective-copying") -> Cell:
    cell = _cell(model, task)
    record = run_cell(cell, results, device="cpu")
    assert record is not None and record.status == "done", record
    write(results, record)
    return cell


def _file(results: Path, cell: Cell) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((results / f"selection/{cell.digest}.json").read_text())
    return found


def test_a_finished_cell_leaves_its_selection_and_the_report_draws_it(tmp_path: Path) -> None:
    mamba, s4 = _finished(tmp_path, "mamba"), _finished(tmp_path, "mamba+s4")
    _finished(tmp_path, "transformer")
    found = _file(tmp_path, mamba)
    assert len(found["tokens"]) == 32 and found["answers"] == [28, 29, 30, 31]
    data = [t for t in found["tokens"][:28] if t != 0]
    assert found["targets"] == data
    for layer in found["layers"]:
        assert len(layer["delta"]) == 32 and min(layer["delta"]) > 0
        for answer, row in zip(found["answers"], layer["reads"], strict=True):
            assert sum(row) == pytest.approx(1000, abs=16)  # thousandths, each rounded
            assert not any(row[answer + 1 :])
    assert len(set(_file(tmp_path, s4)["layers"][0]["delta"])) == 1  # not selective: constant
    assert len(list((tmp_path / "selection").iterdir())) == 2  # attention has no Δ

    paths = write_report(tmp_path)
    (drawn,) = [p for p in paths.plots if p.name.startswith("selection-") and p.suffix == ".png"]
    assert drawn.stat().st_size > 5_000
    assert check(tmp_path) == []

    file = tmp_path / f"selection/{mamba.digest}.json"
    before = file.read_text()
    file.write_text(before.replace('"answers"', '"answers" '))
    assert f"plots/{drawn.name}: stale: 1 changed since it was drawn" in check(tmp_path)
    file.unlink()
    assert write_missing(tmp_path) == [file] and file.read_text() == before  # from its checkpoint
    assert write_missing(tmp_path) == []
    file.write_text(before[:50])
    with pytest.raises(UserError, match=f"{mamba.digest}.json: no JSON"):
        write_report(tmp_path)


def test_only_tasks_that_ask_and_sequences_that_can_be_seen(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build_model("mamba", vocab_size=16, d_model=8, num_layers=1)
    long = SelectiveCopying(SelectiveCopying.Config(length=2048))
    assert write_selection(tmp_path, _cell("mamba"), long, model) is None
    _finished(tmp_path, "mamba", "induction-heads")
    assert not (tmp_path / "selection").exists()
