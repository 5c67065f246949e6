"""Verdicts: which records answer to which row, what is inside a band, and what the paper had."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from synthetic import record

from seqbench.suite.expectation import declare, declared_files, family, load_declared
from seqbench.suite.experiment import UserError
from seqbench.suite.records import Record, write
from seqbench.suite.report import check, write_report
from seqbench.suite.report.tables import Table
from seqbench.suite.report.verdict import table, verdicts
from seqbench.suite.runner import grid_cells


def _row(name: str, of: Record, **given: Any) -> dict[str, Any]:
    plain = {"variant": "", "metric": "accuracy", "low": None, "high": None, "paper": None}
    return {"name": name, "cell": family(of.cell), **plain, "source": "", **given}


OFF = {"d_model": 64, "num_layers": 2, "selective_B": False}
ROPE = {"task": "induction-heads", "model": "transformer-rope"}


def _declare(results: Path, high: float = 0.75) -> None:
    rows = [
        _row("Mamba", record(stop_at=0.98), low=0.95, paper=0.998, source="Table 1, length 4096"),
        _row("without B", record(model_config=OFF, stop_at=0.98), high=high),
        _row("S4", record(model="s4"), low=0.2, high=0.5, paper=0.183),
        _row("the same S4", record(model="s4", seed=7), high=0.5),
        _row("LSTM", record(model="lstm"), paper="8.71 on the Pile"),
        _row("RoPE", record(**ROPE), variant="length=512", low=0.9, paper=0.836),
        _row("RoPE", record(**ROPE), variant="length=32768", high=0.1, paper="oom"),
        _row("Hyena", record(model="hyena"), high=0.5),
    ]
    (results / "grids").mkdir(exist_ok=True)
    declared = {"grid": "bands", "title": "Table 1: copying", "scale": "cpu", "rows": rows}
    (results / "grids/bands-cpu.json").write_text(json.dumps(declared))


def _records() -> list[Record]:
    made = [
        record(seed=s, score=v, stop_at=0.98, solved_at=300) for s, v in enumerate((0.99, 0.98))
    ]
    made += [record(seed=2, score=0.5, stop_at=0.98)]
    made += [record(seed=s, score=0.8, model_config=OFF, stop_at=0.98) for s in range(3)]
    made += [record(model="s4", score=0.1), record(model="s4", seed=1, status="failed", error="x")]
    made += [record(model="lstm", score=0.3)]
    made += [
        record(
            **ROPE,
            variants={"length=512": {"accuracy": 0.836}},
            stopped={"length=32768": "out of memory: 32 GB"},
        )
    ]
    return made


@pytest.fixture()
def drawn(tmp_path: Path) -> Table:
    _declare(tmp_path)
    (found,) = verdicts(tmp_path, _records())
    return table(found)


def _column(drawn: Table, heading: str) -> list[str]:
    at = [c.heading for c in drawn.columns].index(heading)
    assert {len(row) for row in drawn.rows} == {len(drawn.columns)}
    return [row[at].full for row in drawn.rows]


def test_rows_against_their_bands(drawn: Table) -> None:
    s4 = "10.0 (1 of 2 failed)"
    assert _column(drawn, "our median") == ["98.0", "80.0", s4, s4, "30.0", "83.6", "–", "–"]
    assert _column(drawn, "verdict") == [
        "✓ inside", "✗ above", "✗ below", "✓ inside", "no band", "✗ below", "stopped", "not run",
    ]  # fmt: skip
    in_band = ["2 of 3", "0 of 3", "0 of 2", "1 of 2", "–", "0 of 1", "–", "–"]
    assert _column(drawn, "seeds in band") == in_band
    assert _column(drawn, "solved")[:3] == ["2 of 3", "0 of 3", "–"]
    assert _column(drawn, "band")[:5] == ["≥ 95.0", "≤ 75.0", "20.0 to 50.0", "≤ 50.0", "–"]
    assert _column(drawn, "paper's")[2:7] == ["18.3", "–", "8.71 on the Pile", "83.6", "oom"]


def test_mean_and_interval_by_hand(drawn: Table) -> None:
    # 0.99, 0.98, 0.5: mean 0.8233, s = 0.2801, half = 4.303 * 0.2801 / sqrt(3) = 0.6957: 0.1277 to 1.5190
    assert _column(drawn, "our mean")[0] == "82.3 (12.8 to 100.0)"
    assert any("Student's t" in note for note in drawn.notes)


def test_title_says_the_scale_and_notes_say_why_a_model_stopped(drawn: Table) -> None:
    assert drawn.title.startswith("Table 1: copying: verdict at cpu scale (not the paper's)")
    assert drawn.notes[0] == "2 of 7 banded rows inside their band, 2 without results."
    assert any(
        "RoPE stopped at length=32768: out of memory: 32 GB." in note for note in drawn.notes
    )
    assert any("no part of the verdict): Table 1, length 4096" in note for note in drawn.notes)
    assert [line["verdict"] for line in drawn.tidy][-2:] == ["stopped", "not run"]


def test_the_report_draws_verdicts_and_knows_when_bands_moved(tmp_path: Path) -> None:
    for made in _records():
        write(tmp_path, made)
    assert write_report(tmp_path).verdicts == ()
    _declare(tmp_path)
    assert verdicts(tmp_path, _records(), "other") == []
    (drawn,) = write_report(tmp_path, grid="bands").verdicts
    assert drawn.name == "verdict-bands-cpu"
    assert (tmp_path / f"tables/{drawn.name}.md").exists()
    picture = (tmp_path / f"plots/{drawn.name}.svg").read_text()
    assert "inside" in picture and "not run" in picture  # a row without results has its place too
    assert "✗ above" in (tmp_path / "index.html").read_text()
    assert check(tmp_path) == []

    _declare(tmp_path, high=0.9)
    stale = check(tmp_path)
    why = "stale: the grid's bands changed since it was drawn"
    assert f"tables/verdict-bands-cpu.csv: {why}" in stale and f"index.html: {why}" in stale
    assert not any("headline" in line for line in stale)


def test_a_torn_declaration_is_named(tmp_path: Path) -> None:
    _declare(tmp_path)
    path = tmp_path / "grids/bands-cpu.json"
    path.write_text(path.read_text()[:100])
    with pytest.raises(UserError, match=re.escape(str(path))):
        verdicts(tmp_path, _records())


GRID = '''"""Two rows of one cell: for a test."""
from seqbench.suite.expectation import Expected
from seqbench.suite.experiment import Request

SEEDS = (0,)
SMALL = {"task.length": 64, "model.d_model": 16, "train.steps": 4}


def requests(scale):
    return [Request(task="selective-copying", model="mamba", scale=scale, settings=SMALL)]


def expected(scale):
    other = Request(
        task="selective-copying", model="mamba", scale=scale,
        settings={**SMALL, "model.selective_B": False},
    )
    length = Request(task="induction-heads", model="transformer-rope", scale=scale)
    return [
        Expected(name="N = 16", request=requests(scale)[0], low=0.95),
        Expected(name="all", request=requests(scale)[0], low=0.9, metric="sequence_accuracy"),
        Expected(name="other", request=other),
        Expected(name="RoPE", request=length, variant="length=512"),
        Expected(name="RoPE", request=length, variant="length=65536"),
    ]
'''


def test_what_a_grid_declares_is_resolved_and_looked_up(tmp_path: Path) -> None:
    path = tmp_path / "two.py"
    path.write_text(GRID)
    declare(tmp_path, str(path), "cpu")
    (file,) = declared_files(tmp_path)
    assert file.name == "two-cpu.json"
    found = load_declared(file)
    assert found.title == "Two rows of one cell: for a test"
    (cell,) = grid_cells(str(path), scale="cpu", seeds=[5])
    assert [r.cell == family(cell) for r in found.rows] == [True, True, False, False, False]
    # Table 1 has token accuracy alone; a model with other options is not the paper's.
    assert [r.paper for r in found.rows] == [pytest.approx(0.998), None, None, 0.836, "oom"]
    assert [r.metric for r in found.rows[:2]] == ["accuracy", "sequence_accuracy"]

    declare(tmp_path, str(path), "cpu", [("train.steps", 5)])
    assert len(declared_files(tmp_path)) == 2  # another grid in all but name
