"""Tables: what is averaged, against numbers worked out by hand, and what every format must hold."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from dataclasses import replace

import pytest
from rich.console import Console
from synthetic import quickstart, record

from seqbench.suite.records import Record
from seqbench.suite.report import tables
from seqbench.suite.report.aggregate import best, estimate, rows, scale_notes, slug, t_quantile
from seqbench.suite.report.tables import Table, score_text

# Two-sided 95 % points of Student's t as statistical handbooks print them.
T_TABLE = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 9: 2.262, 10: 2.228, 29: 2.045}


@pytest.mark.parametrize(("freedom", "expected"), T_TABLE.items())
def test_t_quantile(freedom: int, expected: float) -> None:
    assert t_quantile(freedom) == pytest.approx(expected, abs=5e-4)


def test_mean_and_interval_by_hand() -> None:
    # mean 0.9; deviations -0.02, 0, 0.02: s = 0.02; half = 4.303 * 0.02 / sqrt(3) = 0.04968
    score = estimate([0.88, 0.90, 0.92])
    assert score is not None
    assert score.mean == pytest.approx(0.9)
    assert score.half_width == pytest.approx(0.04968, abs=1e-5)


def test_the_interval_of_a_share_ends_where_shares_do() -> None:
    values = [0.99, 0.95, 1.0]
    share, plain = estimate(values, "accuracy"), estimate(values, "bits_per_byte")
    assert share is not None and plain is not None and plain.high is not None
    assert plain.high > 1.0 and not plain.cut
    assert (share.mean, share.low, share.high, share.cut) == (plain.mean, plain.low, 1.0, True)
    assert score_text(share, "accuracy") == "98.0 (91.4 to 100.0)"
    assert score_text(plain, "bits_per_byte") == "0.980 ± 0.066"
    low = estimate([0.0, 0.01, 0.05], "sequence_accuracy")
    assert low is not None and low.low == 0.0 and low.cut
    inside = estimate([0.5, 0.51], "accuracy")
    assert inside is not None and score_text(inside, "accuracy") == "50.5 ± 6.4"


def test_one_seed_has_no_interval() -> None:
    score = estimate([0.5])
    assert score is not None
    assert (score.mean, score.low, score.high, score.count) == (0.5, None, None, 1)
    assert estimate([]) is None


def test_many_seeds_use_the_bootstrap() -> None:
    values = [0.0, 1.0] * 50
    score = estimate(values)
    assert score is not None and score.half_width is not None
    # The normal approximation: 1.96 * 0.5 / 10.
    assert score.half_width == pytest.approx(0.098, rel=0.05)
    assert estimate(values) == score


def test_seeds_share_a_row_and_settings_split_it() -> None:
    made = [record(seed=s) for s in range(3)]
    made += [record(model="s4", seed=s, train={"lr": 1e-4}) for s in range(3)]
    (row,) = rows(made)
    assert {m: len(g.records) for m, g in row.groups.items()} == {"mamba": 3, "s4": 3}
    assert row.setting == ""

    made += [record(steps=20)]
    short, long = rows(made)
    assert (short.setting, long.setting) == ("train.steps=20", "train.steps=500")
    assert list(short.groups) == ["mamba"] and list(long.groups) == ["mamba", "s4"]


def test_another_task_config_never_shares_a_row() -> None:
    made = [record(task_config={"length": 256}), record(model="s4", task_config={"length": 512})]
    assert [(r.setting, list(r.groups)) for r in rows(made)] == [
        ("task.length=256", ["mamba"]),
        ("task.length=512", ["s4"]),
    ]


def test_order_follows_the_grid() -> None:
    made = quickstart()
    cells = [r.cell for r in reversed(made)]
    found = rows(made, cells)
    assert [r.task for r in found] == list(dict.fromkeys(c.task for c in cells))
    assert list(found[0].groups) == ["transformer", "s4", "mamba"]


@pytest.mark.parametrize(
    ("ours", "theirs", "winner"),
    [
        ([0.90, 0.91, 0.92], [0.50, 0.51, 0.52], "mamba"),
        ([0.90, 0.80, 0.95], [0.85, 0.75, 0.90], None),  # the intervals overlap
        ([0.90], [0.10], None),  # one seed: no interval
        ([0.90, 0.91], [0.10], None),
        ([0.50, 0.51, 0.52], [0.90, 0.91, 0.92], "s4"),
    ],
)
def test_best_only_with_a_clear_interval(
    ours: Sequence[float], theirs: Sequence[float], winner: str | None
) -> None:
    made = [record(seed=s, score=v) for s, v in enumerate(ours)]
    made += [record(model="s4", seed=s, score=v) for s, v in enumerate(theirs)]
    (row,) = rows(made)
    assert best(row) == winner
    text = tables.markdown(tables.headline(made))
    assert ("**" in text) == (winner is not None)


def test_lower_is_better_where_the_metric_says_so() -> None:
    made = [record("dna", seed=s, score=1.90 + 0.001 * s) for s in range(3)]
    made += [record("dna", "s4", s, score=1.95 + 0.001 * s) for s in range(3)]
    assert best(rows(made)[0]) == "mamba"


def test_headline_says_solved_failed_chance_and_scale() -> None:
    made = [
        record(seed=0, score=0.97, stop_at=0.95, solved_at=300),
        record(seed=1, score=0.91, stop_at=0.95),
        record(seed=2, stop_at=0.95, status="failed", error="out of memory"),
        record(model="s4", stop_at=0.95, status="diverged", error="loss is nan"),
    ]
    table = tables.headline(made)
    (row,) = table.rows
    by_heading = {c.heading: e for c, e in zip(table.columns, row, strict=True)}
    assert by_heading["mamba"].text == "94.0 (55.9 to 100.0)"
    assert by_heading["mamba"].detail == "1 of 3 solved, 1 of 3 failed"
    assert by_heading["s4"].text == "diverged"
    assert by_heading["chance"].text == "7.1"
    assert "cpu scale: not the paper's." in table.notes
    assert any("the paper's is 4096" in note for note in table.notes)


def test_every_table_carries_scale_and_digests() -> None:
    made = [*quickstart(), record("dna", "hyena", status="failed", error="boom")]
    for table in _all(made):
        text = tables.markdown(table)
        assert "cpu scale: not the paper's." in text, table.name
        match = re.search(r"Drawn from (\d+) record", text)
        assert match and int(match[1]) == len(table.digests), table.name
        assert table.digests[0] in text


def test_paper_scale_is_not_called_another() -> None:
    assert scale_notes([record(scale="paper")]) == [
        "selective-copying, paper scale: Synthetic selective-copying, length 256; the paper's is "
        "4096."
    ]


def test_status_lists_failed_diverged_and_missing() -> None:
    made = [record(seed=0), record(seed=1, status="failed", error="out | of\nmemory")]
    missing = record(seed=2).cell
    table = tables.status(made, [*(r.cell for r in made), missing])
    assert [(r[3].text, r[4].text, r[5].text) for r in table.rows] == [
        ("1", "failed", "out | of\nmemory"),
        ("2", "missing", "has no record: not run yet"),
    ]
    assert table.notes[0] == "3 cells: 1 done, 1 failed, 1 missing."
    assert len(_parsed(tables.markdown(table))) == 3  # the heading and two rows, newline and all


def test_a_model_that_cannot_is_listed_with_its_reason() -> None:
    found = tables.status(
        [record(), record(model="hyena", status="skipped", error="its state grows")]
    )
    assert [e.text for e in found.rows[0]][2:6] == ["hyena", "0", "skipped", "its state grows"]
    assert found.notes[0] == "2 cells: 1 done, 1 skipped."


def test_truncated_gradients_are_said_beside_every_table() -> None:
    train = {"segment_length": 4096, "segment_gradients": "truncated"}
    records = [record(), record(model="s4", train=train), record(model="lstm", train=train)]
    said = "truncated gradients, cut every 4096 tokens: lstm, s4."
    for table in (tables.headline(records), tables.cost(records), tables.status(records)):
        assert [n for n in table.notes if n.endswith(said)]
    exact = record(train={"segment_length": 4096})
    assert not any("truncated" in n for n in tables.headline([exact]).notes)


def test_a_cell_that_was_stopped_has_its_score_and_says_where() -> None:
    full = record(steps=500)
    why = "concluded at step 200 of 500"
    stopped = replace(full, status="stopped", error=why, steps_done=200)
    found = tables.headline([stopped])
    (shown,) = [e for e in found.rows[0] if e.detail]
    assert shown.value == pytest.approx(0.9) and shown.detail == "1 of 1 stopped"
    assert any(
        "stopped, not by solution, and tested there: mamba/seed0 at step 200 of 500." in n
        for n in found.notes
    )
    (row,) = tables.status([stopped]).rows
    assert {"stopped", why} <= {e.text for e in row}


def test_a_cell_that_was_trained_in_several_places_says_where() -> None:
    gpu, cpu = {"device": "GPU"}, {"device": "cpu", "processor": "EPYC", "threads": 1}
    sittings = [{"to_step": step, **place} for step, place in
                ((9, {}), (1000, gpu), (1500, gpu | {"commit": "b"}), (2000, cpu))]  # fmt: skip
    moved = replace(record(), environment=cpu | {"sittings": sittings})
    (note,) = [n for n in tables.cost([moved]).notes if "trained on" in n]
    way = "trained on unknown, then GPU, then EPYC, 1 thread, from step 9 and 1,500 (mamba/seed0);"
    assert way in note
    assert tables.devices([moved]) == "EPYC, 1 thread; GPU; unknown"
    stayed = replace(record(), environment=gpu | {"sittings": sittings[1:3]})
    assert not any("trained on" in n for n in tables.cost([stayed]).notes)


def test_markdown_parses_into_the_table() -> None:
    made = [*quickstart(seeds=2), record("dna", "a|b", seed=0)]
    for table in _all(made):
        parsed = _parsed(tables.markdown(table))
        assert len(parsed) == len(table.rows) + 1, table.name
        assert {len(line) for line in parsed} == {len(table.columns)}, table.name
    headings = _parsed(tables.markdown(tables.headline(made)))[0]
    assert "a\\|b" in headings


def test_csv_holds_the_raw_numbers() -> None:
    made = [record(seed=s, score=v) for s, v in enumerate((0.88, 0.90, 0.92))]
    (line,) = csv.DictReader(io.StringIO(tables.csv_text(tables.headline(made))))
    assert float(line["mean"]) == pytest.approx(0.9)
    assert float(line["high"]) - float(line["low"]) == pytest.approx(2 * 0.04968, abs=1e-4)
    assert line["seeds"] == "3"
    assert line["digests"].split() == sorted(r.digest for r in made)
    assert "the paper's" in line["scale_note"]
    (line,) = csv.DictReader(io.StringIO(tables.csv_text(tables.cost(made))))
    assert float(line["parameters"]) == 70_000
    assert float(line["tokens_per_s"]) == pytest.approx(500 * 32 * 256 / 60)


def test_latex_is_escaped_and_balanced() -> None:
    made = [*quickstart(seeds=2), record("dna", "odd_model&50%", status="failed", error="a_b {c")]
    for table in _all(made):
        text = tables.latex(table)
        assert text.count("\\begin") == text.count("\\end")
        bare = text.replace("\\{", "").replace("\\}", "")
        assert bare.count("{") == bare.count("}")
        body = text.split("\\midrule")[1].split("\\bottomrule")[0]
        for line in filter(None, body.strip().splitlines()):
            assert len(re.findall(r"(?<!\\)&", line)) == len(table.columns) - 1
            assert line.endswith("\\\\")
    assert "odd\\_model\\&50\\%" in tables.latex(tables.headline(made))


def test_variants_table() -> None:
    made = [
        record(seed=s, variants={"length=1024": {"accuracy": 0.5}, "length=512": {"accuracy": v}})
        for s, v in enumerate((0.6, 0.8))
    ]
    (table,) = tables.by_variant(made)
    assert [c.heading for c in table.columns] == ["model", "test", "length=512", "length=1024"]
    assert table.rows[0][2].value == pytest.approx(0.7)


def test_variants_say_where_a_model_stopped_and_why() -> None:
    made = [record(variants={"length=512": {"accuracy": 0.5}, "length=1024": {"accuracy": 0.4}})]
    stopped = {"length=1024": "out of memory: 9 GB of 8"}
    some = {"length=512": {"accuracy": 0.6}}
    made.append(record(model="transformer-rope", variants=some, stopped=stopped))
    (table,) = tables.by_variant(made)
    assert [e.text for e in table.rows[1]] == ["transformer-rope", "90.0", "60.0", "stopped"]
    told = "transformer-rope stopped at length=1024: out of memory: 9 GB of 8."
    assert told in table.notes
    assert [line["stopped"] for line in table.tidy][-1] == "out of memory: 9 GB of 8"


def test_cost_reads_what_ran() -> None:
    (row,) = tables.cost([record(seed=0), record(seed=1, train_seconds=80.0)]).rows
    texts = [e.text for e in row]
    assert "16.4 KB" in texts  # 4096 numbers of a state in float32
    assert "70K" in texts and "600 MB" in texts and "synthetic processor, 1 thread" in texts
    assert "cpu" in texts


def test_rich_table_prints_without_markup(capsys: pytest.CaptureFixture[str]) -> None:
    made = [record(model="[bold]x[/bold]"), record(model="s4")]
    Console(width=140).print(tables.to_rich(tables.headline(made)))
    shown = capsys.readouterr().out
    assert "[bold]x[/bold]" in shown
    assert "not the paper's" in shown and "Drawn from" not in shown


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (7, "7"),
        (999.4, "999"),
        (999.7, "1K"),
        (4096, "4.1K"),
        (999_999, "1M"),
        (1.9e18, "1.9E"),
        (2e16, "20P"),
    ],
)
def test_compact(value: float, text: str) -> None:
    assert tables.compact(value) == text


def test_slug_is_a_file_name_and_distinct() -> None:
    assert slug("dna", "cpu") == "dna-cpu"
    names = {slug("a/b.py", "cpu"), slug("a-b.py", "cpu"), slug("A/b.py", "cpu"), slug("é", "cpu")}
    assert len(names) == 4
    assert all(re.fullmatch(r"[a-z0-9.-]+", n) for n in names)


def _all(made: Sequence[Record]) -> list[Table]:
    return [
        tables.headline(made),
        tables.cost(made),
        tables.status([*made, record("piano", "gru", status="failed", error="x")]),
        *tables.by_variant(made),
    ]


def _parsed(text: str) -> list[list[str]]:
    """The cells of a Markdown table as GitHub reads them, the line of dashes left out."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert re.fullmatch(r"\|(-+:?\|)+", lines[1])
    return [
        [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        for line in (lines[0], *lines[2:])
    ]
