"""Figures that grids declare: their points, power laws, table, plot and page."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from synthetic import record

from seqbench.suite.expectation import declare, declared_files, load_declared
from seqbench.suite.experiment import UserError
from seqbench.suite.records import Record, write
from seqbench.suite.report import check, write_report
from seqbench.suite.report.figures import figures, power_law, table
from seqbench.suite.report.plots import against_x
from seqbench.suite.runner import grid_cells

GRID = '''"""Two lengths of piano: for a test."""
from seqbench.suite.experiment import Request
from seqbench.suite.figures import Figure, Line, paper_lines

SEEDS = (0, 1)
LENGTHS = (64, 128)


def request(length, scale):
    small = {"task.length": length, "model.d_model": 16, "train.steps": 4}
    return Request(task="piano", model="mamba", scale=scale, settings=small)


def requests(scale):
    return [request(n, scale) for n in LENGTHS]


def figures(scale):
    lines = (Line(name="ours", requests=tuple(requests(scale))),)
    theirs = paper_lines("Figure 7", {"Mamba (complex)": "ours"})
    perplexity = paper_lines("Figure 4")
    return [
        Figure(name="length", title="Bits against length", x="task.length", lines=lines,
               paper=theirs, fit=True),
        Figure(name="cost", title="Bits against cost", x="train_flops", lines=lines,
               paper=perplexity),
    ]
'''


@pytest.fixture()
def grid(tmp_path: Path) -> Path:
    path = tmp_path / "lengths.py"
    path.write_text(GRID)
    declare(tmp_path, str(path), "cpu")
    return path


def _records(grid: Path, scores: dict[int, tuple[float, float]]) -> list[Record]:
    """A record for every cell of the grid that has a score, by length and seed."""
    made = []
    for cell in grid_cells(str(grid), scale="cpu", seeds=None):
        like = record("piano", score=scores[cell.task_config["length"]][cell.seed])
        made.append(replace(like, cell=cell, digest=cell.digest))
    return made


SCORES = {64: (2.0, 2.2), 128: (1.5, 1.6)}


def test_a_grid_without_bands_declares_its_figures(tmp_path: Path, grid: Path) -> None:
    (file,) = declared_files(tmp_path)
    declared = load_declared(file)
    assert declared.rows == () and [f.name for f in declared.figures] == ["length", "cost"]
    assert len(set(declared.figures[0].lines[0].cells)) == 2  # one for both seeds
    theirs = {line.name: dict(line.points) for line in declared.figures[0].paper}
    assert theirs["Mamba (complex)"][958464.0] == 1.311  # Figure 7, through JSON


def test_points_are_means_over_seeds_at_the_settings_value(tmp_path: Path, grid: Path) -> None:
    length, cost = figures(tmp_path, _records(grid, SCORES))
    (curve,) = length.curves
    assert [p.x for p in curve.points] == [64, 128]
    assert [p.score.mean for p in curve.points] == pytest.approx([2.1, 1.55])
    # Forward FLOPs a token, three times for training, on the tokens of the curve's last point.
    assert cost.curves[0].points[0].x == pytest.approx(3 * 1.5e5 * 500 * 32 * 256)


def test_a_figure_reads_a_test_variant(tmp_path: Path, grid: Path) -> None:
    (file,) = declared_files(tmp_path)
    file.write_text(file.read_text().replace('"variant": ""', '"variant": "length=256"'))
    made = [
        replace(r, variants={"length=256": {"bits_per_sample": 1.25}})
        for r in _records(grid, SCORES)
    ]
    assert [p.score.mean for p in figures(tmp_path, made)[0].curves[0].points] == [1.25, 1.25]
    assert figures(tmp_path, _records(grid, SCORES)) == []  # no record has the variant


def test_the_power_law_is_found_with_its_uncertainty() -> None:
    exact = power_law([(x, 3 * x**-0.5) for x in (1.0, 10.0, 100.0)])
    assert exact is not None and exact.c == pytest.approx(3) and exact.k == pytest.approx(0.5)
    assert exact.half_width == pytest.approx(0, abs=1e-6)
    # By hand: ln x = 0, 1, 2 and ln y = 0, -1.3, -2: slope -1, residuals 0.1, -0.2, 0.1, so
    # s = sqrt(0.06 / 1), over a spread of 2, times t(1) = 12.706.
    rough = power_law([(1.0, 1.0), (math.e, math.exp(-1.3)), (math.e**2, math.exp(-2))])
    assert rough is not None and rough.k == pytest.approx(1.0)
    assert rough.half_width == pytest.approx(12.706 * math.sqrt(0.06 / 2), rel=1e-3)
    assert power_law([(2.0, 1.0), (2.0, 1.1)]) is None


def test_the_table_keeps_ours_and_the_papers_apart(tmp_path: Path, grid: Path) -> None:
    length, cost = figures(tmp_path, _records(grid, SCORES))
    drawn = table(length)
    assert [c.heading for c in drawn.columns][:4] == ["series", "length", "ours", "paper's"]
    ours = [row for row in drawn.rows if not row[0].text.startswith("paper: ")]
    assert [[e.text for e in row[:4]] for row in ours] == [
        ["ours", "64", "2.100 ± 1.271", "–"],
        ["ours", "128", "1.550 ± 0.635", "–"],
    ]
    theirs = [row for row in drawn.rows if row[0].text == "paper: Mamba (complex)"]
    assert all(row[2].text == "–" for row in theirs) and theirs[0][3].text == "1.432"
    assert any("k with half its 95 % interval: ours: 0.437" in note for note in drawn.notes)
    assert {line["whose"] for line in drawn.tidy} == {"ours", "paper"}
    assert table(cost).columns[3].heading == "paper's (perplexity)"


@pytest.mark.parametrize(
    ("scores", "panels"),
    [({64: (1.5, 1.6), 128: (1.3, 1.4)}, 1), ({64: (7.0, 7.1), 128: (6.9, 7.0)}, 2)],
)
def test_the_papers_points_far_off_get_a_panel_of_their_own(
    tmp_path: Path, grid: Path, scores: Any, panels: int
) -> None:
    plot = against_x(figures(tmp_path, _records(grid, scores))[0])
    assert plot.svg.count(b'<g id="axes_') == panels
    assert plot.png[:4] == b"\x89PNG" and "Figure 7" in plot.caption


def test_another_metric_of_the_papers_is_a_panel_of_its_own(tmp_path: Path, grid: Path) -> None:
    plot = against_x(figures(tmp_path, _records(grid, SCORES))[1])
    assert plot.svg.count(b'<g id="axes_') == 2


def test_the_report_draws_figures_and_knows_when_they_changed(tmp_path: Path, grid: Path) -> None:
    for made in _records(grid, SCORES):
        write(tmp_path, made)
    drawn = write_report(tmp_path)
    names = {p.name for p in (*drawn.tables, *drawn.plots)}
    assert {"figure-length-cpu.csv", "figure-length-cpu.svg", "figure-cost-cpu.png"} <= names
    assert 'id="plot-figure-length-cpu"' in (tmp_path / "index.html").read_text()
    assert check(tmp_path) == []
    (file,) = declared_files(tmp_path)
    file.write_text(file.read_text().replace("Bits against length", "Something else"))
    assert any(line.startswith("plots/figure-length-cpu.png: stale") for line in check(tmp_path))


def test_an_axis_that_is_no_number_is_named(tmp_path: Path, grid: Path) -> None:
    (file,) = declared_files(tmp_path)
    file.write_text(file.read_text().replace('"x": "task.length"', '"x": "task.dataset"'))
    with pytest.raises(UserError, match=re.escape("'task.dataset' is 'piano-rendered'")):
        figures(tmp_path, _records(grid, SCORES))
