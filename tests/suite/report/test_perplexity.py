"""Perplexity beside bits, and by position: exp of each seed's loss, then the mean over seeds."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
from synthetic import record

from seqbench.suite.records import Record, from_dict, to_dict, write
from seqbench.suite.report import tables, write_report


def _records() -> list[Record]:
    made = []
    for model, shift in (("mamba", 0.0), ("transformer", 0.3)):
        for seed in (0, 1):
            one = record("language", model, seed, score=2.0 + shift)
            losses = {
                str(n): 3.0 - 0.2 * i + shift + 0.1 * seed for i, n in enumerate((0, 1, 2, 4))
            }
            test = {**one.test, "loss": 1.5 + shift, "perplexity": math.exp(1.5 + shift)}
            made.append(replace(one, test=test, by_position=losses))
    return made


def test_perplexity_stands_beside_bits_and_by_position() -> None:
    (table,) = tables.perplexity(_records())
    headings = [c.heading for c in table.columns]
    assert headings[1:] == [
        "bits per byte ↓",
        "perplexity ↓",
        "from 0",
        "from 1",
        "from 2",
        "from 4",
    ]
    mamba = {h: entry for h, entry in zip(headings, table.rows[0], strict=True)}
    assert mamba["bits per byte ↓"].value == pytest.approx(2.0)
    assert mamba["perplexity ↓"].value == pytest.approx(math.exp(1.5))
    assert mamba["from 2"].value == pytest.approx((math.exp(2.6) + math.exp(2.7)) / 2)
    assert {t["position"] for t in table.tidy} == {"", 0, 1, 2, 4}


def test_tasks_of_another_headline_have_none() -> None:
    assert tables.perplexity([record("selective-copying")]) == []


def test_the_report_draws_it_and_records_keep_it(tmp_path: Path) -> None:
    for one in _records():
        assert from_dict(to_dict(one)) == one
        write(tmp_path, one)
    drawn = write_report(tmp_path)
    assert {"position-language-cpu.png", "position-language-cpu.svg"} <= {
        p.name for p in drawn.plots
    }
    page = drawn.index.read_text()
    assert "language: perplexity by position" in page and "perplexity per token" in page
    assert "from 4" in (tmp_path / "tables" / "perplexity-language-cpu.md").read_text()
