"""Interleaved medians, what fails among them, and peak memory."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from seqbench.suite.bench.timing import interleave, peak_extra_memory

CPU = torch.device("cpu")


def _sleeper(order: list[str], name: str, seconds: float) -> Callable[[], None]:
    def run() -> None:
        order.append(name)
        time.sleep(seconds)

    return run


def test_interleave_takes_turns_and_lets_the_slow_sit_out() -> None:
    order: list[str] = []
    work = {"slow": _sleeper(order, "slow", 0.5), "quick": _sleeper(order, "quick", 0.03)}
    timings = interleave(work, CPU, rounds=3, seconds=0.4)
    assert timings["slow"].samples == 1 and timings["slow"].median >= 0.5
    assert timings["quick"].samples == 3 and timings["quick"].fastest >= 0.03
    assert order[-4:] == ["slow", "quick", "quick", "quick"]


def test_a_very_slow_run_is_not_repeated() -> None:
    order: list[str] = []
    timings = interleave({"slow": _sleeper(order, "slow", 0.3)}, CPU, rounds=3, seconds=0.05)
    assert order == ["slow"] and timings["slow"].samples == 1


def test_what_fails_says_why_and_the_others_go_on() -> None:
    def fail() -> None:
        raise RuntimeError("no room\nat all")

    def exhaust() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate a lot")

    failures: dict[str, str] = {}
    work: dict[str, Callable[[], object]] = {
        "fails": fail,
        "large": exhaust,
        "right": lambda: time.sleep(0.001),
    }
    timings = interleave(work, CPU, rounds=1, failures=failures)
    assert list(timings) == ["right"]
    assert failures == {"fails": "fails: no room", "large": "out of memory"}
    with pytest.raises(RuntimeError, match="no room"):
        interleave({"fails": fail}, CPU)


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
