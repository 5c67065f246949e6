"""Evaluation in bounded memory: cutting changes no score, and what cannot be tested says why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from seqbench.models.build import build_model
from seqbench.suite import evaluation
from seqbench.suite.configuration import resolve
from seqbench.suite.evaluation import add_up, evaluate, tokens_within_reach
from seqbench.suite.experiment import Cell, Request
from seqbench.suite.training import run_cell
from seqbench.tasks.induction_heads import InductionHeads, InductionHeadsConfig
from seqbench.tasks.language import Language, LanguageConfig
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


def _language(tmp_path: Path, **config: Any) -> Language:
    rng = np.random.default_rng(0)
    for i in range(40):
        words = rng.integers(1, 16, 60, dtype=np.uint8) if i % 2 else rng.permutation(15) + 1
        (tmp_path / f"{i:02}.txt").write_bytes(words.astype(np.uint8).tobytes() * 2)
    task = Language(LanguageConfig(path=str(tmp_path), length=24, **config))
    task.prepare()
    return task


def _bytes_model(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return build_model(name, vocab_size=256, d_model=16, num_layers=1).double()


@pytest.mark.parametrize("packing", ["stream", "reset"])
def test_losses_by_position_are_of_each_bucket(
    packing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, of = _language(tmp_path, packing=packing), _bytes_model("mamba")
    monkeypatch.setattr(evaluation, "MAX_TOKENS", 70)
    sums = add_up(of, task, "test", batch_size=4, max_tokens=192, device=CPU, positions=True)
    inputs, targets = task.batch("test", 0, 8)
    resets = task.resets(inputs)
    logits = of(inputs) if resets is None else of(inputs, reset=resets)
    nats = torch.nn.functional.cross_entropy(logits.mT, targets, reduction="none")
    edges = {"0": (0, 1), "1": (1, 2), "2": (2, 4), "4": (4, 8), "8": (8, 16), "16": (16, 24)}
    wanted = {name: nats[:, a:b].mean().item() for name, (a, b) in edges.items()}
    assert sums.losses_by_position() == pytest.approx(wanted, rel=1e-6)
    assert sums.metrics(task, "test")["loss"] == pytest.approx(nats.mean().item(), rel=1e-6)
    assert sums.metrics(task, "test")["perplexity"] == pytest.approx(nats.mean().exp().item())


def test_packed_documents_stream_through_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, of = _language(tmp_path, packing="reset"), _bytes_model("mamba")
    whole = add_up(of, task, "test", batch_size=4, max_tokens=192, device=CPU, positions=True)
    monkeypatch.setattr(evaluation, "MAX_TOKENS", 20)
    pieces = add_up(of, task, "test", batch_size=4, max_tokens=192, device=CPU, positions=True)
    assert pieces.metrics(task, "test") == pytest.approx(whole.metrics(task, "test"))
    assert pieces.losses_by_position() == pytest.approx(whole.losses_by_position())


def test_a_large_vocabulary_bounds_the_logits_of_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "MAX_LOGITS", 2 * 120 * 16)
    of, seen = model("mamba"), []
    of.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    score(of)
    assert set(seen[1:]) == {(2, 120)}


def _packed_cell(tmp_path: Path, name: str, **changes: Any) -> Cell:
    _language(tmp_path)
    settings = {
        "task.path": str(tmp_path),
        "task.length": 24,
        "task.packing": "reset",
        "model.d_model": 16,
        "model.num_layers": 1,
        "train.steps": 4,
        "train.eval_every": 2,
        "train.batch_size": 4,
        "train.eval_batches": 1,
        "train.test_batches": 2,
    } | {k.replace("__", "."): v for k, v in changes.items()}
    return resolve(Request(task="language", model=name, settings=settings), 0)


def test_a_cell_trains_on_packed_documents_and_records_the_loss_by_position(
    tmp_path: Path,
) -> None:
    cell = _packed_cell(tmp_path, "mamba")
    assert cell.task_config["packing"] == "reset"
    record = run_cell(cell, tmp_path / "results", device="cpu")
    assert record is not None and record.status == "done", record
    assert list(record.by_position) == ["0", "1", "2", "4", "8", "16"]
    stream = run_cell(_packed_cell(tmp_path, "mamba", task__packing="stream"), tmp_path / "r")
    assert stream is not None and stream.test["loss"] != record.test["loss"]
    assert "packing" not in stream.cell.task_config


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        (
            "h3",
            {},
            "its part S4 cannot forget in the middle of a sequence; set task.packing=stream",
        ),
        ("mamba", {"train__segment_length": 8}, "pieces carry the state through the documents"),
    ],
)
def test_a_cell_that_cannot_keep_documents_apart_is_skipped_with_the_reason(
    name: str, changes: Any, said: str, tmp_path: Path
) -> None:
    record = run_cell(_packed_cell(tmp_path, name, **changes), tmp_path / "results")
    assert record is not None and record.status == "skipped" and said in str(record.error)
