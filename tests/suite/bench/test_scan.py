"""The scan bench: nothing is timed that is wrong, everything that could not run says why."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from seqbench.suite.bench import peaks, scan
from seqbench.suite.bench.entrants import Entrant, Size, entrants
from seqbench.suite.bench.peaks import Floor
from seqbench.suite.bench.result import GateClosed
from seqbench.suite.bench.timing import Timing

CPU = torch.device("cpu")
SMALL = Size(batch=1, length=40, width=8, state=4)
# What is compiled is the reference above it, and takes ten seconds to compile.
EAGER = [entrant for entrant in entrants(CPU) if not entrant.compiled]


@pytest.mark.parametrize("entrant", EAGER, ids=lambda entrant: entrant.name)
def test_every_entrant_passes_the_gate(entrant: Entrant) -> None:
    if entrant.missing is not None:
        pytest.skip(entrant.missing)
    for dtype in entrant.dtypes:
        error = scan._judge(entrant, SMALL, CPU, dtype)
        assert error < (1e-5 if dtype == torch.float32 else 1e-2)


def test_a_wrong_gradient_closes_the_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    def without_gradient_through_z(**inputs: Tensor) -> Tensor:
        return right.run(**{**inputs, "z": inputs["z"].detach() + 0 * inputs["z"]})

    right = next(entrant for entrant in EAGER if entrant.name == "seqbench torch")
    wrong = replace(right, name="wrong", run=without_gradient_through_z)
    monkeypatch.setattr(scan, "entrants", lambda device: [right, wrong])
    with pytest.raises(GateClosed, match=r"wrong .* the gradient of z is off by 1\.0e\+00"):
        scan.bench_scan(sizes=(SMALL,), memory_sizes=())


@pytest.mark.parametrize("whole", [True, False], ids=["all channels", "some channels"])
def test_the_timed_size_is_judged_too(whole: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a large size some channels: an error in one of those must show."""
    right = next(entrant for entrant in EAGER if entrant.name == "seqbench torch")

    def wrong_in_channel_one(**inputs: Tensor) -> Tensor:
        return right.run(**inputs) * torch.tensor([1.0, 1.1, *[1.0] * (SMALL.width - 2)])

    wrong = replace(right, name="wrong", run=wrong_in_channel_one)
    if not whole:
        monkeypatch.setattr(scan, "_JUDGED_WHOLE", 0)
        monkeypatch.setattr(scan, "_JUDGED_CHANNELS", 2)
    scan._exact.cache_clear()
    assert scan._judge(right, SMALL, CPU) < 1e-5
    with pytest.raises(GateClosed, match=r"wrong at \(1, 40, 8, 4\): y is off"):
        scan._judge(wrong, SMALL, CPU)
    scan._exact.cache_clear()


def test_bench_reports_every_entrant_as_table_json_and_plot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    absent = replace(EAGER[-1], name="absent", missing="not installed")

    def fail(**inputs: Tensor) -> Tensor:
        raise RuntimeError("no such kernel\nand a long trace")

    failing = replace(EAGER[-1], name="failing", run=fail)
    present = [*EAGER, absent, failing]
    monkeypatch.setattr(scan, "entrants", lambda device: present)
    monkeypatch.setattr(peaks, "_SAMPLES", 3)
    monkeypatch.setitem(scan._SECONDS, "cpu", 0.05)
    threads, lines = torch.get_num_threads(), []
    parts: list[dict[str, Any]] = []  # what a bench that is ended would leave behind

    def so_far(found: scan.ScanBench) -> None:
        parts.append(json.loads(found.write(tmp_path)[0].read_text()))

    result = scan.bench_scan(
        sizes=(SMALL, replace(SMALL, length=80)),
        threads=1,
        rounds=1,
        memory_sizes=(),
        progress=lines.append,
        so_far=so_far,
    )
    first, last = parts
    assert {row["size"]["length"] for row in first["rows"]} == {40}
    assert first["rows"] == last["rows"][: len(first["rows"])] and first["environment"]["threads"]
    assert torch.get_num_threads() == threads and result.environment["threads"] == 1
    assert len(result.rows) == 2 * sum(len(e.dtypes) for e in present) and lines
    ours = result.ours(SMALL)
    assert ours is not None and ours.ours and ours.dtype == "float32"
    for row in result.rows:
        assert (row.forward is None) == (row.both is None) == (row.not_run is not None)
        assert (row.floor is not None) == row.ours
    found = json.loads(result.write(tmp_path)[0].read_text())
    fastest = [
        r for r in found["ratios"] if r["size"]["length"] == 40 and r["entrant"] == ours.label
    ]
    assert fastest[0]["both"] == 1.0 and fastest[0]["of_floor"]["both"] < 1
    assert found["peaks"][0]["exp2"] > 1e6 and found["environment"]["load_before"] is not None
    assert (tmp_path / "scan.png").stat().st_size > 10_000
    assert "<svg" in (tmp_path / "scan.svg").read_text()
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(result.table())
    text = console.export_text()
    assert "absent: not run, not installed" in text
    assert "failing: not run, fails: no such kernel" in text
    assert all(entrant.name in text for entrant in present)


def test_remarks_say_who_is_ahead_and_how_near_the_floor_is() -> None:
    def timing(seconds: float) -> Timing:
        return Timing(median=seconds, fastest=seconds, slowest=seconds, samples=1)

    ours = scan.Row(
        entrant="seqbench cpu",
        ours=True,
        size=SMALL,
        forward=timing(2e-3),
        both=timing(8e-3),
        extra_memory=5,
        floor=Floor(forward=1e-3, backward=3e-3),
    )
    peer = scan.Row(
        entrant=scan.YARDSTICK,
        ours=False,
        size=SMALL,
        forward=timing(1e-3),
        both=timing(0.8),
        extra_memory=100,
    )
    compiled = replace(peer, entrant="compiled", compiled=True, forward=timing(0.02))
    bench = scan.ScanBench(gate={}, peaks=[], rows=[ours, peer, compiled], headline=SMALL)
    text = "\n".join(bench.remarks())
    assert "50 % of the floor forward, 50 % backward, 50 % in all" in text
    assert "100x forward and backward, in 5.0% of its extra memory" in text
    assert "the most any scan here can be ahead: 1x forward, 200x forward and backward" in text
    assert "behind: mambapy pscan forward at (1, 40, 8, 4)" in text
    assert "over the compiled peer: at least 10x forward, 100x forward and backward" in text


def test_what_would_take_too_long_or_too_much_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    attention = next(e for e in EAGER if e.computes == "attention")
    loop = next(e for e in EAGER if e.name == "plain loop")
    long = replace(SMALL, length=400)
    slow = {attention.name: (SMALL, 1.0), loop.name: (SMALL, 1.0)}
    assert scan._too_much(attention, long, slow, CPU) == "a pass would take about 100 s"
    assert scan._too_much(loop, long, slow, CPU) is None
    monkeypatch.setattr(scan, "available_memory", lambda: 2**30)
    huge = Size(batch=8, length=2**20, width=128, state=16)
    assert scan._too_much(loop, huge, {}, CPU) == "needs about 640 GiB, 1 GiB are free"
