"""The whole report: files, plots, page, what is stale, and that none of it needs torch."""

from __future__ import annotations

import base64
import json
import math
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from synthetic import quickstart, record

from seqbench.suite.experiment import UserError
from seqbench.suite.records import Record, path_of, write
from seqbench.suite.report import check, paper, plots, write_report


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    results = tmp_path_factory.mktemp("results")
    for made in (*quickstart(seeds=2), _failed()):
        write(results, made)
    write_report(results, grid="quickstart")
    return results


def _failed() -> Record:
    return record("dna", "hyena", status="failed", error="<script>alert(1)</script> out of memory")


def test_files(drawn: Path) -> None:
    names = {str(p.relative_to(drawn)) for p in drawn.rglob("*") if p.is_file()}
    for table in ("headline", "cost", "status", "paper", "variants-induction-heads-cpu"):
        assert {f"tables/{table}.{kind}" for kind in ("md", "csv", "tex")} <= names
    for plot in ("overview", "curves-dna-cpu", "length-induction-heads-cpu", "cost-piano-cpu"):
        assert {f"plots/{plot}.png", f"plots/{plot}.svg"} <= names
    assert "index.html" in names and not any(n.endswith(".tmp") for n in names)


def test_pictures_are_what_they_say(drawn: Path) -> None:
    for path in (drawn / "plots").iterdir():
        data = path.read_bytes()
        assert data.startswith(b"\x89PNG" if path.suffix == ".png" else b"<?xml"), path
        assert 5_000 < len(data) < 400_000, path


def test_same_records_same_bytes(drawn: Path, tmp_path: Path) -> None:
    shutil.copytree(drawn / "records", tmp_path / "records")
    write_report(tmp_path, grid="quickstart")
    for path in (p for p in drawn.rglob("*") if p.is_file()):
        assert path.read_bytes() == (tmp_path / path.relative_to(drawn)).read_bytes(), path


def test_no_torch(drawn: Path, tmp_path: Path) -> None:
    """The command draws and checks a report without it: it takes seconds to import."""
    shutil.copytree(drawn / "records", tmp_path / "records")
    code = """
import sys
from seqbench.suite import cli, listing
from seqbench.suite.report import diff
for check in ([], ["--check"]):
    sys.argv = ["seqbench", "report", "--results", ".", *check]
    try:
        cli.main()
    except SystemExit as ended:
        assert not ended.code
assert "torch" not in sys.modules and "lightning" not in sys.modules
"""
    paths = [str(Path(p).absolute()) for p in os.environ.get("PYTHONPATH", "").split(":") if p]
    done = subprocess.run(
        [sys.executable, *(["-P"] if sys.flags.safe_path else []), "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": ":".join(paths)},
    )
    assert done.returncode == 0, done.stderr


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.sources: list[str] = []
        self.stack: list[str] = []
        self.rows = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.rows += tag == "tr"
        if "id" in given:
            self.ids.append(given["id"] or "")
        self.sources += [v or "" for k, v in attrs if k in ("src", "href", "srcset")]
        if tag not in ("meta", "img", "input", "br", "link"):
            self.stack.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag


def test_page_has_each_cell_once_and_everything_inside(drawn: Path) -> None:
    text = (drawn / "index.html").read_text()
    page = _Page()
    page.feed(text)
    assert page.stack == []
    assert len(page.ids) == len(set(page.ids))
    cells = sorted(i for i in page.ids if i.startswith("cell-"))
    assert cells == sorted(f"cell-{p.stem}" for p in (drawn / "records").rglob("*.json"))
    assert all(s.startswith(("#", "data:image/svg+xml;base64,")) for s in page.sources)
    pictures = [s for s in page.sources if s.startswith("data:")]
    svgs = {p.read_bytes() for p in (drawn / "plots").glob("*.svg")}
    assert {base64.b64decode(s.split(",", 1)[1]) for s in pictures} == svgs
    assert "<script>alert" not in text and "&lt;script&gt;alert(1)" in text
    assert "cpu scale: not the paper" in text


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
CLICKS = """
<script>
var heads = document.querySelectorAll("#table-cells thead th");
var names = Array.prototype.map.call(heads, function (h) { return h.textContent; });
function column(name) {
  return Array.prototype.map.call(document.querySelectorAll("#table-cells tbody tr"),
    function (r) { return r.hidden ? null : r.cells[names.indexOf(name)].textContent; })
    .filter(function (t) { return t !== null; });
}
var out = {};
heads[names.indexOf("train s")].querySelector("button").click();
out.up = column("train s");
heads[names.indexOf("train s")].querySelector("button").click();
out.down = column("train s");
var input = document.querySelector("#cells .filter input");
input.value = "mamba induction";
input.dispatchEvent(new Event("input"));
out.models = column("model");
out.tasks = column("task");
var pre = document.createElement("pre");
pre.id = "outcome";
pre.textContent = JSON.stringify(out);
document.body.appendChild(pre);
</script></body>
"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_page_sorts_and_filters_in_a_browser(drawn: Path, tmp_path: Path) -> None:
    page = tmp_path / "clicked.html"
    page.write_text((drawn / "index.html").read_text().replace("</body>", CLICKS))
    assert CHROMIUM is not None
    done = subprocess.run(
        [
            CHROMIUM,
            *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
            *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
            f"--user-data-dir={tmp_path / 'profile'}",
            "--dump-dom",
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    match = re.search(r'<pre id="outcome">(.*?)</pre>', done.stdout)
    assert match, done.stderr[-2000:]
    out = json.loads(match[1])
    up = [float(t) for t in out["up"] if t != "–"]
    down = [float(t) for t in out["down"] if t != "–"]
    assert len(up) == 30 and up == sorted(up) and down == sorted(up, reverse=True)
    assert out["up"][-1] == out["down"][-1] == "–"  # the failed cell has no time: last both ways
    assert out["models"] == ["mamba"] * 2 and out["tasks"] == ["induction-heads"] * 2


def test_check_names_what_is_stale(tmp_path: Path) -> None:
    assert check(tmp_path) == [
        "tables/manifest.json: not there: no report was drawn yet (seqbench report)"
    ]
    results = tmp_path / "copy"
    for made in (record(task, model) for task in ("dna", "piano") for model in ("mamba", "s4")):
        write(results, made)
    write_report(results)
    assert check(results) == []

    write(results, record("piano", "mamba", seed=9))
    stale = check(results)
    assert "plots/curves-piano-cpu.png: stale: 1 new since it was drawn" in stale
    assert "tables/headline.md: stale: 1 new since it was drawn" in stale
    assert not any("dna" in line for line in stale)
    write_report(results)
    assert check(results) == []

    dna = next((results / "records/dna/mamba").iterdir())
    dna.write_text(dna.read_text().replace('"steps_done": 500', '"steps_done": 501'))
    assert "plots/curves-dna-cpu.svg: stale: 1 changed since it was drawn" in check(results)
    dna.unlink()
    assert "plots/curves-dna-cpu.svg: stale: 1 gone since it was drawn" in check(results)
    (results / "tables/cost.csv").write_text("edited")
    (results / "plots/overview.png").unlink()
    found = check(results)
    assert "tables/cost.csv: changed since it was drawn" in found
    assert "plots/overview.png: not there" in found
    (results / "tables/manifest.json").write_text("{")
    assert check(results) == [
        "tables/manifest.json: unreadable; draw the report again (seqbench report)"
    ]


def test_a_grids_report_keeps_to_its_cells(tmp_path: Path) -> None:
    mine = [record("dna", m) for m in ("s4", "mamba")]
    missing = record("dna", "hyena")
    write(tmp_path, record("piano", "mamba"))
    for made in mine:
        write(tmp_path, made)
    paths = write_report(tmp_path, grid="mine", cells=[r.cell for r in (*mine, missing)])
    assert [c.heading for c in paths.headline.columns][3:5] == ["s4", "mamba"]  # the grid's order
    assert [r[0].text for r in paths.headline.rows] == ["dna"]
    assert [r[4].text for r in paths.status.rows] == ["missing"]
    write(tmp_path, record("piano", "s4"))  # outside the grid: nothing of the report is stale
    assert check(tmp_path) == []
    write(tmp_path, missing)
    assert "index.html: stale: 1 new since it was drawn" in check(tmp_path)


def test_a_plot_that_no_record_supports_any_more_goes(tmp_path: Path) -> None:
    write(tmp_path, record("dna"))
    kept = write(tmp_path, record("piano"))
    write_report(tmp_path)
    (tmp_path / "plots/mine.png").write_bytes(b"not the report's")
    assert (tmp_path / "plots/curves-dna-cpu.png").exists()
    path_of(tmp_path, record("dna").cell).unlink()
    write_report(tmp_path)
    assert not (tmp_path / "plots/curves-dna-cpu.png").exists()
    assert (tmp_path / "plots/mine.png").exists() and kept.exists()


def test_nothing_to_draw_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no record; run it first"):
        write_report(tmp_path)
    write(tmp_path, record("dna"))
    with pytest.raises(UserError, match=r"no record of grid other; .*seqbench run other"):
        write_report(tmp_path, grid="other", cells=[record("piano").cell])


def test_torn_record_stops_the_report_by_name(tmp_path: Path) -> None:
    path = write(tmp_path, record("dna"))
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UserError, match=re.escape(str(path))):
        write_report(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_unwritable_folder(tmp_path: Path) -> None:
    write(tmp_path, record("dna"))
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(UserError, match="cannot write"):
            write_report(tmp_path)
    finally:
        tmp_path.chmod(0o755)


def test_a_file_where_a_folder_belongs(tmp_path: Path) -> None:
    write(tmp_path, record("dna"))
    (tmp_path / "plots").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        write_report(tmp_path)


def test_only_failures_still_report(tmp_path: Path) -> None:
    write(tmp_path, record("dna", status="failed", error="out of memory"))
    paths = write_report(tmp_path)
    assert paths.plots == () and paths.headline.rows[0][3].text == "failed"


@pytest.mark.parametrize("score", [math.nan, math.inf, 0.0])
def test_odd_scores_are_drawn(tmp_path: Path, score: float) -> None:
    write(tmp_path, record("dna", score=score))
    write(tmp_path, record("dna", "s4", score=1.9))
    assert write_report(tmp_path).plots


def test_thousands_of_records_make_a_bounded_number_of_plots() -> None:
    script = Path(__file__).resolve().parents[3] / "scripts" / "measure_report.py"
    safe = ["-P"] if sys.flags.safe_path else []
    done = subprocess.run(
        [sys.executable, *safe, str(script), "1050"], capture_output=True, text=True, check=True
    )
    figures = json.loads(done.stdout)
    assert figures["records"] == 1050 > plots.MANY_RECORDS and figures["stale"] == []
    assert figures["plots"] <= 2 * (1 + 4 * plots.PANELS_OF_MANY)


def test_many_settings_make_few_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "MANY_RECORDS", 30)
    monkeypatch.setattr(plots, "PANELS_OF_MANY", 2)
    rates = [1e-4 * k for k in range(1, 9)]
    made = [record("dna", m, train={"lr": r}) for m in ("mamba", "s4") for r in rates]
    made += [record(task) for task in ("piano", "language")]
    drawn = list(plots.draw_all(made))
    assert [p.name for p in drawn] == [
        "overview", "curves-dna-cpu", "cost-dna-cpu", "curves-language-cpu", "curves-piano-cpu",
    ]  # fmt: skip
    assert "the best 12" in drawn[0].caption
    made += [record("dna", "mamba", seed=s, train={"lr": 1e-4}) for s in range(1, 20)]
    fewer = list(plots.draw_all(made))
    assert [p.name for p in fewer] == [p.name for p in drawn[:4]]
    assert "2 of 3 settings" in fewer[0].caption


def test_a_task_of_many_settings_leaves_room_for_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(plots, "MOST_PANELS", 3)
    made = [record("dna", task_config={"length": n}) for n in (64, 128, 256, 512)]
    made += [
        record("dna", "s4", task_config={"length": 512}),
        record("piano"),
        record("piano", "s4"),
    ]
    names = [p.name for p in plots.draw_all(made)]
    curves = [name for name in names if name.startswith("curves-")]
    assert len(curves) == 3 and "curves-piano-cpu" in curves
    assert [name for name in curves if "512" in name]  # the one with most models


def test_pareto_front() -> None:
    points = [(1.0, 0.5), (2.0, 0.4), (2.0, 0.7), (3.0, 0.7), (4.0, 0.9)]
    assert plots.pareto(points, True) == [(1.0, 0.5), (2.0, 0.7), (4.0, 0.9)]
    assert plots.pareto(points, False) == [(1.0, 0.5), (2.0, 0.4)]


def test_styles_are_distinct_and_the_models_own() -> None:
    names = [f"m{i}" for i in range(28)]
    made = plots.styles(names)
    assert len(set(made.values())) == 28
    assert plots.styles(names)["m3"] == made["m3"]


def test_paper_corresponds_by_task_and_block_and_layer() -> None:
    def accuracy(model: str) -> float:
        (series,) = paper.series_for("selective-copying", model)
        return series.values[4096]

    assert accuracy("mamba") == accuracy("mamba+s6") == pytest.approx(0.998)
    assert accuracy("s4") == pytest.approx(0.183)
    assert accuracy("h3+hyena") == pytest.approx(0.301)
    assert paper.series_for("selective-copying", "hyena") == []  # with an MLP: not Table 1's
    assert paper.series_for("selective-copying", "transformer") == []
    assert paper.series_for("listops", "mamba") == []


def test_paper_stands_in_columns_of_its_own() -> None:
    made = [record(score=0.5), record(model="transformer")]
    table = paper.beside_ours(made)
    (row,) = table.rows
    assert row[2].text == "50.0" and "cpu scale" in row[2].detail
    assert row[3].text == "99.8 at 4096"
    whose = [(line["whose"], line["value"]) for line in table.tidy]
    assert whose == [("ours", 0.5), ("paper", pytest.approx(0.998))]
    assert all(line["read"] == "" for line in table.tidy if line["whose"] == "ours")
