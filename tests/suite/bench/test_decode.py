"""The decode bench: both ways to decode equal `forward`; rates, ratios and what could not run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from seqbench.models.build import build_model
from seqbench.suite.bench import decode
from seqbench.suite.bench.result import GateClosed

TINY = decode.Scale(
    d_model=16,
    num_layers=2,
    vocab_size=8,
    num_heads=2,
    multiple_of=4,
    dtype=torch.float32,
    prompts_at_once=2,
)


@pytest.mark.parametrize(
    "way", [decode.CachedAttention, decode._CachedByMask, decode._CachedByProducts]
)
def test_a_cache_allocated_whole_decodes_as_forward(way: type[decode.CachedAttention]) -> None:
    torch.manual_seed(0)
    model = build_model("transformer", vocab_size=8, d_model=16, num_layers=2, layer=way)
    with torch.no_grad():
        assert decode._judge("transformer", model, TINY) < 1e-5


def test_a_step_that_forgets_closes_the_gate() -> None:
    class Forgetful(decode.CachedAttention):
        def step(self, x_BD, state):  # type: ignore[no-untyped-def]
            return super().step(x_BD, (state[0], state[1], state[2] * 0))

    model = build_model("transformer", vocab_size=8, d_model=16, num_layers=2, layer=Forgetful)
    with torch.no_grad(), pytest.raises(GateClosed, match="transformer: decoding is off"):
        decode._judge("transformer", model, TINY)


def test_bench_times_both_and_counts_their_states(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode, "_ROUNDS", 1)
    parts: list[int] = []  # rows that a bench that is ended would leave behind
    result = decode.bench_decode(
        batches=(3, 20),
        threads=1,
        scale=TINY,
        prompt=40,
        so_far=lambda found: parts.append(len(found.rows)),
    )
    assert parts == [3, 6]
    assert [row.model for row in result.rows] == ["mamba", "transformer", decode.GROWING] * 2
    sizes = result.parameters
    assert abs(sizes["mamba"] - sizes["transformer"]) < 0.25 * sizes["mamba"]
    small, large = (
        {row.model: row for row in result.rows if row.batch == batch} for batch in (3, 20)
    )
    for name in small:
        bytes_small, bytes_large = small[name].state_bytes, large[name].state_bytes
        assert bytes_small and bytes_large and 3 * bytes_large == 20 * bytes_small
    grown, whole = small[decode.GROWING].state_bytes, small["transformer"].state_bytes
    assert grown and whole and grown < whole / 10  # 40 of the places that the other allocates
    row = small["mamba"]
    assert row.prompt_seconds and row.step_seconds and row.rate
    assert row.rate == pytest.approx(3 * 128 / (row.prompt_seconds + 128 * row.step_seconds))
    found = json.loads(result.write(tmp_path)[0].read_text())
    assert found["paper_tokens_per_second"]["Mamba 1.4B"]["128"] == 1814
    rates = {name: small[name].rate or 0.0 for name in small}
    assert found["ratios"]["3"] == pytest.approx(
        rates["mamba"] / max(rates["transformer"], rates[decode.GROWING])
    )
    assert found["ratios_to_growing_cache"]["3"] == pytest.approx(
        rates["mamba"] / rates[decode.GROWING]
    )
    assert (tmp_path / "decode.png").stat().st_size > 10_000


def test_what_does_not_fit_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def exhaust(*arguments: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(decode, "_Session", exhaust)
    rows = decode._at_batch(decode._models(TINY, torch.device("cpu")), 4, 8, TINY)
    assert [row.not_run for row in rows] == ["out of memory"] * 3
    bench = decode.DecodeBench(
        parameters={"mamba": 1}, gate={}, dtype="float32", prompt=8, rows=rows
    )
    assert bench.ratio(4) is None and bench.table().row_count == 3
    timed = [replace(row, not_run=None, prompt_seconds=1.0, step_seconds=0.5) for row in rows]
    assert replace(bench, rows=timed).ratio(4) == 1.0
