"""Verdicts: which records answer to which row, what is inside a band, and what the paper had."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
from synthetic import record

from seqbench.suite.records import Record, write
from seqbench.suite.report import check, write_report
from seqbench.suite.report.verdict import table, verdicts

GRID = '''"""A grid with bands: for the test.

Cost: none.
"""

from seqbench.suite.expectation import Expected
from seqbench.suite.experiment import Request

SEEDS = (0, 1, 2)
TITLE = "Table 1: selective copying"
OFF = {"model.selective_B": False}


def _request(scale, model="mamba", task="selective-copying", **settings):
    return Request(task=task, model=model, scale=scale, settings=settings)


def requests(scale):
    return [e.request for e in expected(scale)]


def expected(scale):
    induction = _request(scale, "transformer-rope", "induction-heads")
    return [
        Expected(name="Mamba", request=_request(scale), low=0.95),
        Expected(name="without B", request=_request(scale, **OFF), high=LIMIT),
        Expected(name="S4", request=_request(scale, "s4"), low=0.2, high=0.5),
        Expected(name="lr", request=_request(scale, "lstm"), paper="8.71 on the Pile"),
        Expected(name="RoPE", request=induction, variant="length=512", low=0.9),
        Expected(name="RoPE", request=induction, variant="length=32768", high=0.1),
    ]
'''


@pytest.fixture()
def grid(tmp_path: Path) -> str:
    path = tmp_path / "bands.py"
    path.write_text(GRID.replace("LIMIT", "0.75"))
    return str(path)


def _records() -> list[Record]:
    made = [record(seed=s, score=v, stop_at=0.98, solved_at=300) for s, v in enumerate((0.99, 0.98))]
    made += [record(seed=2, score=0.5, stop_at=0.98)]
    off = {"d_model": 64, "num_layers": 2, "selective_B": False}
    made += [record(seed=s, score=0.8, model_config=off, stop_at=0.98) for s in range(3)]
    made += [record(model="s4", score=0.1), record(model="s4", seed=1, status="failed", error="x")]
    made += [record(model="lstm", score=0.3)]
    made += [
        record(
            "induction-heads",
            "transformer-rope",
            variants={"length=512": {"accuracy": 0.836}},
            stopped={"length=32768": "out of memory: 32 GB"},
        )
    ]
    return made


def _texts(made: list[Record], grid: str) -> dict[str, list[str]]:
    (found,) = verdicts(made, grid)
    drawn = table(found)
    names = [c.heading for c in drawn.columns]
    assert len({len(row) for row in drawn.rows} | {len(names)}) == 1
    return {
        name: [row[names.index(name)].full for row in drawn.rows]
        for name in ("row", "our median", "seeds in band", "solved", "band", "verdict", "paper's")
    }


def test_rows_against_their_bands(grid: str) -> None:
    told = _texts(_records(), grid)
    assert told["our median"] == ["98.0", "80.0", "10.0 (1 of 2 failed)", "30.0", "83.6", "–"]
    assert told["verdict"] == ["✓ inside", "✗ above", "✗ below", "no band", "✗ below", "stopped"]
    assert told["seeds in band"] == ["2 of 3", "0 of 3", "0 of 2", "–", "0 of 1", "–"]
    assert told["solved"][:2] == ["2 of 3", "0 of 3"]
    assert told["band"][:4] == ["≥ 95.0", "≤ 75.0", "20.0 to 50.0", "–"]
    # The paper's own: Table 1 whatever our length, Table 2 by the test length, words as given, and
    # nothing for a model that is not the paper's.
    assert told["paper's"] == ["99.8", "–", "18.3", "8.71 on the Pile", "83.6", "oom"]


def test_title_says_the_scale_and_notes_say_why_a_model_stopped(grid: str) -> None:
    (found,) = verdicts(_records(), grid)
    drawn = table(found)
    assert drawn.title.startswith("Table 1: selective copying: verdict at cpu scale (not the paper")
    assert drawn.notes[0] == "1 of 5 banded rows inside their band, 1 without results."
    assert any("RoPE at length=32768: out of memory: 32 GB" in note for note in drawn.notes)
    assert [line["verdict"] for line in drawn.tidy][-1] == "stopped"


def test_a_row_without_records_is_not_run(grid: str) -> None:
    assert _texts(_records()[:3], grid)["verdict"] == ["✓ inside", *["not run"] * 5]
    assert verdicts([record("dna")], grid) == []


def test_the_report_draws_verdicts_and_knows_when_bands_moved(grid: str, tmp_path: Path) -> None:
    for made in _records():
        write(tmp_path, made)
    paths = write_report(tmp_path, grid=grid)
    (drawn,) = paths.verdicts
    assert (tmp_path / f"tables/{drawn.name}.md").exists()
    assert (tmp_path / f"plots/{drawn.name}.svg").exists()
    assert "✗ above" in (tmp_path / "index.html").read_text()
    assert check(tmp_path) == []


def test_every_grid_with_bands_is_found_without_being_named(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("bands")
    exec(GRID.replace("LIMIT", "0.75"), module.__dict__)
    monkeypatch.setattr("seqbench.suite.discovery.grid_names", lambda: ["bands", "smoke"])
    smoke = ModuleType("smoke")
    known = {"bands": module, "smoke": smoke}
    monkeypatch.setattr("seqbench.suite.discovery.grid_module", known.__getitem__)
    (found,) = verdicts(_records())
    assert found.grid == "bands" and found.name == "verdict-bands-cpu"
