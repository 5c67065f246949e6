"""The floor: operations over measured peaks, or bytes over bandwidth, whichever takes longer."""

from __future__ import annotations

import pytest
import torch

from seqbench.kernels import native
from seqbench.suite.bench import peaks as peaks_module
from seqbench.suite.bench.entrants import Size
from seqbench.suite.bench.peaks import Peaks, measure_peaks, scan_floor

SIZE = Size(batch=2, length=100, width=32, state=16)
ELEMENTS = 2 * 100 * 32 * 16


def test_a_cpu_adds_up_exponentials_and_multiply_adds() -> None:
    peaks = Peaks(instructions="any", exp2=1e9, multiply_add=1e10, bandwidth=1e12)
    floor = scan_floor(SIZE, torch.float32, peaks)
    assert floor.forward == pytest.approx(ELEMENTS * (1e-9 + 4e-10))
    assert floor.backward == pytest.approx(ELEMENTS * (1e-9 + 13e-10))
    assert floor.both == pytest.approx(floor.forward + floor.backward)


def test_bytes_decide_where_memory_is_slow() -> None:
    peaks = Peaks(instructions="any", exp2=1e15, multiply_add=None, bandwidth=1e6)
    steps = 2 * 100
    whole = scan_floor(SIZE, torch.float32, peaks)
    assert whole.forward == pytest.approx(steps * 4 * (4 * 32 + 2 * 16) / 1e6)
    half = scan_floor(SIZE, torch.bfloat16, peaks)
    assert half.both == pytest.approx(whole.both / 2)


def test_the_peaks_of_this_machine_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peaks_module, "_SAMPLES", 3)
    found = measure_peaks(torch.device("cpu"))
    if not found:
        pytest.skip("no C++ compiler")
    assert [peaks.instructions for peaks in found] == list(native.instruction_sets())
    for peaks in found:
        assert peaks.multiply_add is not None
        # An exponential is made of several multiply-adds; no core does a million a cycle.
        assert 1e7 < peaks.exp2 < peaks.multiply_add < 1e15
        assert 1e7 < peaks.bandwidth < 1e14
