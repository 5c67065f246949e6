"""The memory bench: pieces are judged first, and take less memory than the whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from seqbench.models.segments import segmented
from seqbench.suite.bench import memory
from seqbench.suite.bench.result import GateClosed


def test_pieces_with_other_gradients_close_the_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    assert memory._judge("cpu") < 1e-4

    def larger(module: Any, x_BLD: Tensor, *, segment: int) -> Tensor:
        return 1.01 * segmented(module, x_BLD, segment=segment)

    monkeypatch.setattr(memory, "segmented", larger)
    with pytest.raises(GateClosed, match="in pieces a gradient is off"):
        memory._judge("cpu")


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory needs Linux")
def test_pieces_take_less_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through a layer, whose input and output stand whole, and much less through a model."""
    monkeypatch.setattr(memory, "_WAYS", ("whole", "in pieces"))
    monkeypatch.setattr(memory, "_MODEL_WAYS", ("plain", "exact"))
    length = 8 * memory.SEGMENT
    result = memory.bench_memory(lengths=(length,), threads=1)
    whole, pieces, plain, exact = (row.peak for row in result.rows)
    assert whole and pieces and 1.5 * pieces.run < whole.run
    assert pieces.run > 2 * 4 * memory.WIDTH * length  # input and output are counted
    assert plain and exact and 3 * exact.run < plain.run
    found = json.loads(result.write(tmp_path)[0].read_text())
    assert found["rows"][1]["peak"]["run"] == pieces.run
    assert (tmp_path / "memory.png").stat().st_size > 10_000


def test_flatness_is_said_of_lengths_beyond_a_segment() -> None:
    def row(way: str, segments: int, run: int) -> memory.Row:
        peak = memory.Peak(run=run, process=run, seconds=1.0)
        return memory.Row(way=way, length=segments * memory.SEGMENT, peak=peak)

    rows = [row("exact", 1, 10**7), row("exact", 4, 2 * 10**7), row("exact", 256, 3 * 10**7)]
    result = memory.MemoryBench(gate=0.0, parameters=1, rows=rows)
    assert (
        "Two layers, exact: 20 MB at 16K, 30 MB at 1M, 1.50 times, for 64 times the length"
        in result.remarks()
    )


def test_what_would_not_fit_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    peak = memory.Peak(run=10**9, process=10**9, seconds=1.0)
    before = [memory.Row(way="whole", length=100, peak=peak)]
    monkeypatch.setattr(memory, "available_memory", lambda: 4 * 10**9)
    row = memory._measured("whole", 400, "cpu", before)
    assert row.peak is None and row.not_run == "needs about 4 GB, 4 GB are free"
