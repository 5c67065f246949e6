"""Evaluation in bounded memory: cutting changes no score, and what cannot be tested says why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from seqbench.models.build import build_model
from seqbench.suite import evaluation
from seqbench.suite.configuration import resolve
from seqbench.suite.evaluation import evaluate, tokens_within_reach
from seqbench.suite.experiment import Request
from seqbench.suite.training import run_cell
from seqbench.tasks.induction_heads import InductionHeads, InductionHeadsConfig
from seqbench.tasks.selective_copying import SelectiveCopying, SelectiveCopyingConfig

CPU = torch.device("cpu")


def model(name: str, **options: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    return build_model(name, vocab_size=16, d_model=16, num_layers=2, **options).double()


def score(of: torch.nn.Module, *, tokens: int = 1200, batch: int = 10) -> dict[str, float]:
    task = SelectiveCopying(SelectiveCopyingConfig(length=120, num_tokens=9))
    return evaluate(of, task, "test", batch_size=batch, max_tokens=tokens, device=CPU)


@pytest.mark.parametrize("name", ["mamba", "s4", "h3", "transformer", "hyena", "sashimi"])
def test_pieces_and_groups_score_what_a_whole_pass_does(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = score(model(name))
    for tokens in (250, 70):  # groups of two rows; rows longer than a pass
        monkeypatch.setattr(evaluation, "MAX_TOKENS", tokens)
        assert score(model(name)) == pytest.approx(whole, rel=1e-6)
    assert whole["sequences"] == 10


def test_long_rows_stream_through_pieces_of_bounded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "MAX_TOKENS", 64)
    of, seen = model("mamba"), []
    of.register_forward_pre_hook(lambda _, args: seen.append(args[0].numel()))
    score(of)
    assert max(seen) <= 64 and sum(seen) == 1200


def test_the_head_reads_scored_positions_alone() -> None:
    of, seen = model("mamba"), []
    of.head.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    score(of)
    assert seen == [(90, 16)]  # nine answers in each of ten sequences


def test_long_rows_come_fewer_to_a_batch() -> None:
    assert score(model("mamba"), tokens=120, batch=32)["sequences"] == evaluation.FEWEST_ROWS
    assert score(model("mamba"), tokens=1200, batch=32)["sequences"] == 10


def test_reach_ends_where_cost_or_memory_does(monkeypatch: pytest.MonkeyPatch) -> None:
    mamba, attention, hyena = model("mamba"), model("transformer"), model("hyena")
    assert isinstance(tokens_within_reach(mamba, 2**20, CPU), int)
    assert isinstance(tokens_within_reach(hyena, 2**17, CPU), int)
    assert "one pass" in str(tokens_within_reach(hyena, 2**18, CPU))
    monkeypatch.setattr(evaluation, "MAX_FLOPS", 2**36)
    near, far = (tokens_within_reach(attention, 2**k, CPU) for k in (10, 16))
    assert isinstance(near, int) and near >= 8 * 2**10
    assert "FLOPs" in str(far) and isinstance(tokens_within_reach(mamba, 2**16, CPU), int)
    # What three short lengths foretell is what a long one costs, FFTs too.
    monkeypatch.setattr(evaluation, "MAX_FLOPS", 2**40)
    unets = model("sashimi"), model("mamba", backbone="unet")
    for each in (attention, mamba, model("h3"), hyena, *unets):
        flops = evaluation.flops_per_token(each, 4096, CPU) * 4096
        reach = tokens_within_reach(each, 4096, CPU)
        assert isinstance(reach, int) and reach == pytest.approx(2**40 / flops * 4096, rel=0.1)


def test_a_record_says_which_lengths_were_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "MAX_ROW", 64)
    settings = {
        "task.length": 16,
        "task.test_lengths": (32, 128),
        "model.d_model": 16,
        "train.steps": 2,
        "train.batch_size": 4,
        "train.test_batches": 1,
    }
    for name, left_out in (("transformer", ["length=128"]), ("mamba", [])):
        cell = resolve(Request(task="induction-heads", model=name, settings=settings), seed=0)
        record = run_cell(cell, tmp_path, device="cpu")
        assert record is not None and record.status == "done", record
        assert list(record.stopped) == left_out
        assert list(record.variants) == [
            n for n in ("length=32", "length=128") if n not in left_out
        ]
        assert record.variants["length=32"]["sequences"] == 4
        assert all("length 128 is too long" in why for why in record.stopped.values())


def test_validation_of_a_short_task_is_whole_batches() -> None:
    task = InductionHeads(InductionHeadsConfig(length=16, eval_sequences=40))
    scores = evaluate(
        model("mamba"), task, "validation", batch_size=32, max_tokens=10**6, device=CPU
    )
    assert scores["sequences"] == 40
