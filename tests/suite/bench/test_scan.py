"""The scan bench: nothing is timed that is wrong, everything that could not run says why."""

from __future__ import annotations

import importlib
import io
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor

from seqbench.suite.bench import scan
from seqbench.suite.bench.entrants import Entrant, Size, entrants
from seqbench.suite.bench.timing import interleave, peak_extra_memory

CPU = torch.device("cpu")
SMALL = Size(batch=1, length=40, width=8, state=4)


@pytest.mark.parametrize("entrant", entrants(CPU), ids=lambda entrant: entrant.name)
def test_every_entrant_passes_the_gate(entrant: Entrant) -> None:
    if entrant.missing is not None:
        pytest.skip(entrant.missing)
    assert scan._judge(entrant, SMALL, CPU) < 1e-5


def test_a_wrong_gradient_closes_the_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    def without_gradient_through_z(**inputs: Tensor) -> Tensor:
        return right.run(**{**inputs, "z": inputs["z"].detach() + 0 * inputs["z"]})

    right = next(entrant for entrant in entrants(CPU) if entrant.name == "seqbench torch")
    wrong = replace(right, name="wrong", run=without_gradient_through_z)
    monkeypatch.setattr(scan, "entrants", lambda device: [right, wrong])
    with pytest.raises(scan.GateClosed, match=r"wrong .* the gradient of z is off by 1\.0e\+00"):
        scan.bench_scan(sizes=(SMALL,), memory_sizes=())


def test_bench_reports_every_entrant_as_table_json_and_plot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    absent = replace(entrants(CPU)[-1], name="absent", missing="not installed")
    present = [*entrants(CPU), absent]
    monkeypatch.setattr(scan, "entrants", lambda device: present)
    threads, lines = torch.get_num_threads(), []
    result = scan.bench_scan(
        sizes=(SMALL, replace(SMALL, length=80)),
        threads=1,
        rounds=1,
        memory_sizes=(),
        progress=lines.append,
    )
    assert torch.get_num_threads() == threads and result.environment["threads"] == 1
    assert len(result.rows) == 2 * len(present) and lines
    ours = result.ours(SMALL)
    assert ours is not None and ours.ours
    for row in result.rows:
        assert (row.forward is None) == (row.both is None) == (row.not_run is not None)
    found = json.loads(result.write(tmp_path)[0].read_text())
    fastest = [
        r for r in found["ratios"] if r["size"]["length"] == 40 and r["entrant"] == ours.entrant
    ]
    assert fastest[0]["both"] == 1.0
    assert (tmp_path / "scan.png").stat().st_size > 10_000
    assert "<svg" in (tmp_path / "scan.svg").read_text()
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(result.table())
    text = console.export_text()
    assert "absent: not run, not installed" in text
    assert all(entrant.name in text for entrant in present)


def test_what_would_take_too_long_or_too_much_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    attention = next(e for e in entrants(CPU) if e.computes == "attention")
    loop = next(e for e in entrants(CPU) if e.name == "plain loop")
    long = replace(SMALL, length=400)
    slow = {attention.name: (SMALL, 1.0), loop.name: (SMALL, 1.0)}
    assert scan._too_much(attention, long, slow, CPU) == "a pass would take about 100 s"
    assert scan._too_much(loop, long, slow, CPU) is None
    monkeypatch.setattr(scan, "available_memory", lambda: 2**30)
    huge = Size(batch=8, length=2**20, width=128, state=16)
    assert scan._too_much(loop, huge, {}, CPU) == "needs about 640 GiB, 1 GiB are free"


def test_interleave_takes_turns_and_lets_the_slow_sit_out() -> None:
    order: list[str] = []

    def sleeper(name: str, seconds: float) -> Callable[[], None]:
        def run() -> None:
            order.append(name)
            time.sleep(seconds)

        return run

    work = {"slow": sleeper("slow", 0.5), "quick": sleeper("quick", 0.03)}
    timings = interleave(work, CPU, rounds=3, seconds=0.4)
    assert timings["slow"].samples == 1 and timings["slow"].median >= 0.5
    assert timings["quick"].samples == 3 and timings["quick"].fastest >= 0.03
    assert order[-4:] == ["slow", "quick", "quick", "quick"]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory needs Linux")
def test_peak_memory_counts_what_is_neither_given_nor_returned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of three tensors one is returned; the process that measures imports the job by name."""
    (tmp_path / "three_tensors.py").write_text(
        "import torch\n"
        "def job(numbers):\n"
        "    given = torch.ones(numbers)\n"
        "    def run():\n"
        "        first = given + 1\n"
        "        second = first * given\n"
        "        return [first + second]\n"
        "    return run, torch.device('cpu')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    job = importlib.import_module("three_tensors").job
    mebibytes = 64
    measured = peak_extra_memory(job, (mebibytes * 2**18,), 1)
    assert abs(measured - 2 * mebibytes * 2**20) < 8 * 2**20
