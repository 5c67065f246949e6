"""Training a cell: a run cut into pieces is the run in one go, stopping looks at validation, failures are recorded."""

from __future__ import annotations

import resource
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from seqbench.models.build import build_model
from seqbench.suite import checkpoint, training
from seqbench.suite.configuration import resolve
from seqbench.suite.experiment import Cell, Request, UserError
from seqbench.suite.records import Record, StorageError, load_all
from seqbench.suite.report.tables import devices
from seqbench.suite.training import run_cell

SETTINGS: dict[str, Any] = {
    "task.length": 32,
    "task.test_lengths": [16],
    "model.d_model": 16,
    "model.num_layers": 1,
    "train.steps": 30,
    "train.batch_size": 8,
    "train.eval_every": 5,
    "train.eval_batches": 1,
    "train.test_batches": 2,
    "train.warmup_steps": 5,
    "train.stop_at": None,
    "train.stop_early": True,
    "train.curriculum": True,
}


def cell(model: str = "mamba", **changes: Any) -> Cell:
    settings = SETTINGS | {k.replace("__", "."): v for k, v in changes.items()}
    return resolve(Request(task="induction-heads", model=model, settings=settings), seed=3)


def timeless(record: Record) -> dict[str, Any]:
    """The record without what a clock or a memory meter wrote."""
    plain = asdict(record)
    for name in ("cost", "environment"):
        plain.pop(name)
    for point in plain["curve"]:
        point.pop("seconds")
    return plain


def run(cell: Cell, results: Path, **options: Any) -> Record:
    record = run_cell(cell, results, device="cpu", **options)
    assert record is not None and record.status == "done", record
    return record


@pytest.mark.parametrize("model", ["mamba", "s4", "transformer"])
def test_a_run_cut_into_pieces_gives_the_record_of_the_whole(model: str, tmp_path: Path) -> None:
    one = cell(model)
    whole = run(one, tmp_path / "whole")
    pieces = tmp_path / "pieces"
    assert run_cell(one, pieces, device="cpu", stop_after=7) is None
    assert run_cell(one, pieces, device="cpu", stop_after=11) is None
    torch.manual_seed(99)  # what the process did in between does not matter
    assert timeless(run(one, pieces)) == timeless(whole)


def test_a_concluded_cell_is_tested_as_it_is_and_can_go_on(tmp_path: Path) -> None:
    one = cell()
    whole = run(one, tmp_path / "whole")
    assert run_cell(one, tmp_path, device="cpu", conclude=True) is None  # nothing to test yet
    assert run_cell(one, tmp_path, device="cpu", stop_after=12) is None
    stopped = run_cell(one, tmp_path, device="cpu", conclude=True)
    assert stopped is not None and stopped.status == "stopped" and stopped.has_results
    assert stopped.error == "concluded at step 12 of 30"
    assert [point.step for point in stopped.curve] == [5, 10] and stopped.steps_done == 12
    assert set(stopped.variants) == {"length=16"} and "accuracy" in stopped.test
    assert timeless(run(one, tmp_path)) == timeless(whole)
    # One that is over is finished, not stopped.
    assert run_cell(one, tmp_path / "whole", device="cpu", conclude=True) is None


def test_a_record_says_where_each_part_of_a_run_ran(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = cell()
    for steps, processor in ((5, "a"), (2, "a"), (6, "b")):
        monkeypatch.setattr("seqbench.suite.environment.processor", lambda name=processor: name)
        assert run_cell(one, tmp_path, device="cpu", stop_after=steps) is None
    monkeypatch.setattr("seqbench.suite.environment.processor", lambda: "c")
    stopped = run_cell(one, tmp_path, device="cpu", conclude=True)
    assert stopped is not None
    monkeypatch.setattr("seqbench.suite.environment.processor", lambda: "b")
    for record, end in ((stopped, 13), (run(one, tmp_path), 30)):
        sittings = record.environment["sittings"]
        assert [(s["to_step"], s["processor"]) for s in sittings] == [(7, "a"), (end, "b")]
    assert [place.split(",")[0] for place in devices([record]).split("; ")] == ["a", "b"]
    # One that stayed in its place says so once.
    assert "sittings" not in run(cell("s4"), tmp_path).environment


class Pause:
    """Says so once, at the look of that number."""

    def __init__(self, at: int) -> None:
        self.at, self.looks = at, 0

    def __call__(self) -> bool:
        self.looks += 1
        return self.looks == self.at


def test_a_run_paused_anywhere_gives_the_record_of_the_whole(tmp_path: Path) -> None:
    """In a step, in a validation, and in the test of a variant."""
    one = cell("s4")
    whole = run(one, tmp_path / "whole")
    for pauses in range(50):
        # Fewer looks than these pass in the test of a variant, which is done as a whole.
        record = run_cell(one, tmp_path, device="cpu", pause=Pause(at=9 + pauses % 3))
        if record is not None:
            break
    assert record is not None and pauses >= 3
    assert timeless(record) == timeless(whole)


def test_a_pause_in_a_validation_leaves_it_to_the_next_sitting(tmp_path: Path) -> None:
    one = cell("s4")
    steps = one.train.eval_every
    # A look after every step, and one before each forward pass of a validation.
    assert run_cell(one, tmp_path, device="cpu", pause=Pause(at=steps + 1)) is None
    _, state = checkpoint.read(tmp_path / "checkpoints" / f"{one.digest}.safetensors")
    assert state["step"] == steps and state["curve"] == []
    assert timeless(run(one, tmp_path)) == timeless(run(one, tmp_path / "whole"))


def test_a_tested_variant_is_not_tested_again(tmp_path: Path) -> None:
    one = cell("s4")
    looks = Pause(at=0)
    run(one, tmp_path / "counted", pause=looks)
    assert run_cell(one, tmp_path, device="cpu", pause=Pause(at=looks.looks)) is None
    _, state = checkpoint.read(tmp_path / "checkpoints" / f"{one.digest}.safetensors")
    assert state["trained"] and list(state["tested"]) == [""]
    assert timeless(run(one, tmp_path)) == timeless(run(one, tmp_path / "whole"))


def test_pieces_of_several_epochs_of_a_finite_task_give_the_curve_of_the_whole(
    tmp_path: Path,
) -> None:
    text = tmp_path / "text.txt"
    text.write_bytes(bytes(range(32, 127)) * 40)
    settings = {k: v for k, v in SETTINGS.items() if k.startswith(("train", "model"))}
    settings |= {"task.path": str(text), "task.length": 128, "train.steps": 40}
    one = resolve(Request(task="language", model="mamba", settings=settings), seed=0)
    whole = run(one, tmp_path / "whole")
    assert whole.curve[-1].tokens > 5 * text.stat().st_size
    for steps in (7, 13, 2):
        assert run_cell(one, tmp_path, device="cpu", stop_after=steps) is None
    assert timeless(run(one, tmp_path)) == timeless(whole)


def test_checkpoints_at_any_step_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = cell("s4")
    whole = run(one, tmp_path / "whole")
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(training, "CHECKPOINT_SHARE", 1e9)
    written: list[int] = []
    plain = checkpoint.write

    def write(path: Path, tensors: Any, state: Any) -> None:
        written.append(state.get("step", -1))
        plain(path, tensors, state)

    monkeypatch.setattr(checkpoint, "write", write)
    assert timeless(run(one, tmp_path)) == timeless(whole)
    assert set(range(1, one.train.steps)) <= set(written)


def test_checkpoints_take_a_bounded_share_of_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slow disk gets fewer checkpoints: after one that took a minute, none for many minutes."""
    now = [0.0]
    monkeypatch.setattr(training.time, "perf_counter", lambda: now[0])
    written: list[float] = []

    def write(path: Path, tensors: Any, state: Any) -> None:
        if "step" in state and not state["trained"]:
            written.append(now[0])
        now[0] += 60.0

    def step() -> bool:
        now[0] += 30.0
        return False

    monkeypatch.setattr(checkpoint, "write", write)
    run(cell("s4", train__steps=120, train__eval_every=120), tmp_path, pause=step)
    assert len(written) == 2 and written[1] - written[0] > 60 / training.CHECKPOINT_SHARE


def test_batches_made_ahead_change_nothing(tmp_path: Path) -> None:
    """Nor do the stages that end while batches of them are waiting."""
    one = cell("s4", train__curriculum_pass=0.0)
    record = run(one, tmp_path / "ahead", prefetch=1)
    assert {point.stage for point in record.curve} == {0, 1, None}
    assert timeless(record) == timeless(run(one, tmp_path, prefetch=0))


def test_a_compiled_step_keeps_the_curve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced as for the compiler, whose C++ would take a minute."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    one = cell("transformer")
    plain = run(one, tmp_path / "plain")
    compiled = run(one, tmp_path / "compiled", compile="default")
    assert compiled.environment["compile"] == "default"
    for a, b in zip(plain.curve, compiled.curve, strict=True):
        assert b.train_loss == pytest.approx(a.train_loss, rel=1e-3)


def test_a_full_disk_is_one_clear_error_and_the_last_checkpoint_stays(tmp_path: Path) -> None:
    one = cell("s4")
    assert run_cell(one, tmp_path, device="cpu", stop_after=3) is None
    (file,) = (tmp_path / "checkpoints").iterdir()
    before = file.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, hard))  # the write itself fails
    try:
        with pytest.raises(StorageError, match="cannot be written") as caught:
            run_cell(one, tmp_path, device="cpu", stop_after=3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(caught.value) and "--results" in str(caught.value)
    assert [f.read_bytes() for f in (tmp_path / "checkpoints").iterdir()] == [before]


def test_running_out_of_memory_is_said_in_words(tmp_path: Path) -> None:
    def greedy(*args: Any, **kwargs: Any) -> None:
        torch.empty(2**60)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "build_model", greedy)
        record = run_cell(cell(), tmp_path, device="cpu")
    assert record is not None and record.error is not None
    assert record.status == "failed" and record.error.startswith("out of memory")
    assert any("greedy" in line for line in record.log)


def test_a_finished_checkpoint_does_not_stand_in_for_a_deleted_record(tmp_path: Path) -> None:
    one = cell()
    assert timeless(run(one, tmp_path)) == timeless(run(one, tmp_path))


def test_a_cell_twice_is_the_same_record_but_for_times_and_says_how_far_that_goes(
    tmp_path: Path,
) -> None:
    a, b = run(cell(), tmp_path / "a"), run(cell(), tmp_path / "b")
    assert a.cost is not None and b.cost is not None
    measured = ("tokens_per_second", "peak_memory_bytes", "train_seconds", "wall_seconds")
    assert replace(a.cost, **dict.fromkeys(measured, 0)) == replace(
        b.cost, **dict.fromkeys(measured, 0)
    )
    assert a.environment == b.environment
    assert timeless(a) == timeless(b)
    assert a.environment["determinism"].startswith("bitwise")


def test_seeds_give_different_runs_and_share_the_test_set(tmp_path: Path) -> None:
    one = cell()
    other = replace(one, seed=4)
    a, b = run(one, tmp_path), run(other, tmp_path)
    assert a.digest != b.digest
    assert a.test["loss"] != b.test["loss"]


def test_stops_at_the_asked_validation_score(tmp_path: Path) -> None:
    record = run(cell(train__stop_at=0.0), tmp_path)  # any accuracy is at least 0
    assert record.solved_at == 5 and record.steps_done == 5


def test_patience_stops_a_run_that_no_longer_gains(tmp_path: Path) -> None:
    record = run(cell(train__lr=1e-12, train__patience=2, train__curriculum=False), tmp_path)
    assert record.steps_done < 30 and record.solved_at is None


def test_the_test_score_is_of_the_best_validated_weights(tmp_path: Path) -> None:
    plain = {
        "train__warmup_steps": 0,
        "train__schedule": "constant",
        "train__curriculum": False,
        "train__eval_batches": 16,  # few ties
    }
    long = run(cell(**plain), tmp_path)
    scores = [point.validation["accuracy"] for point in long.curve]
    best = max(long.curve, key=lambda point: (point.validation["accuracy"], point.step)).step
    assert best < long.steps_done, f"choose a seed whose best validation is not its last: {scores}"
    assert run(cell(**plain, train__steps=best), tmp_path).test == long.test


def test_the_rate_moves_in_the_optimizer_itself(tmp_path: Path) -> None:
    record = run(cell(), tmp_path)
    rates = [point.lr for point in record.curve]
    assert rates[0] > rates[1] > rates[-1] > 0


def test_a_loss_that_is_not_finite_is_recorded_as_diverged(tmp_path: Path) -> None:
    record = run_cell(cell(train__lr=1e30, train__clip=0.0), tmp_path, device="cpu")
    assert record is not None
    assert record.status == "diverged" and record.error is not None and "step" in record.error


def test_an_exception_of_the_model_is_recorded_as_failed(tmp_path: Path) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no such luck\n" + "and more\n" * 10_000)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "build_model", broken)
        record = run_cell(cell(), tmp_path, device="cpu")
    assert record is not None
    assert record.status == "failed" and record.error is not None
    assert "no such luck" in record.error and "test_training.py" in record.error
    assert "\n" not in record.error and len(record.error) < 1000


def test_the_curriculum_goes_through_its_stages_and_ends_in_the_task(tmp_path: Path) -> None:
    # An average that began at 0 never is 1: no stage is passed, only timed out.
    record = run(cell(train__curriculum_pass=1.0), tmp_path)
    stages = [point.stage for point in record.curve]
    assert stages[0] is not None
    known = [s for s in stages if s is not None]
    assert known == sorted(known)
    assert stages[-3:] == [None] * 3  # by half of the steps every stage is over


def test_a_torn_checkpoint_is_named_with_its_remedy(tmp_path: Path) -> None:
    one = cell()
    run_cell(one, tmp_path, device="cpu", stop_after=6)
    (file,) = (tmp_path / "checkpoints").iterdir()
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match="delete it"):
        run_cell(one, tmp_path, device="cpu")


def test_a_checkpoint_keeps_tensors_and_plain_data(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    tied = torch.randn(3)
    checkpoint.write(path, {"a": tied, "b": tied}, {"step": 1, "stage": None})
    tensors, state = checkpoint.read(path)
    assert torch.equal(tensors["a"], tied) and torch.equal(tensors["b"], tied)
    assert state == {"step": 1, "stage": None}
    assert list(tmp_path.iterdir()) == [path]


def test_a_width_is_chosen_to_match_another_model_in_size() -> None:
    request = Request(task="induction-heads", model="s4", same_size_as="mamba")
    own = resolve(Request(task="induction-heads", model="s4"), 0)
    matched = resolve(request, 0)
    by_hand = resolve(request, 0, [("model.d_model", 24)])
    sizes = {
        name: build_model(c.model, vocab_size=16, **c.model_config).num_parameters
        for name, c in (("own", own), ("matched", matched))
    }
    mamba = build_model("mamba", vocab_size=16, d_model=64, num_layers=2).num_parameters
    assert abs(sizes["matched"] - mamba) < 0.15 * mamba < abs(sizes["own"] - mamba)
    assert by_hand.model_config["d_model"] == 24


def _long(model: str = "mamba", **changes: Any) -> Cell:
    """One whose sequences are longer than a segment, in one stage of its curriculum too."""
    return cell(model, train__segment_length=12, train__curriculum=True, **changes)


@pytest.mark.parametrize("model", ["mamba", "s4"])
def test_training_in_segments_gives_the_curve_of_whole_sequences(
    model: str, tmp_path: Path
) -> None:
    """With the penalty on Δ, whose share of every piece adds up too."""
    changes = {"train__delta_penalty": 0.01, "train__steps": 20}
    whole = run(cell(model, **changes), tmp_path / "whole")
    pieces = run(_long(model, **changes), tmp_path / "pieces")
    assert pieces.digest != whole.digest
    for a, b in zip(whole.curve, pieces.curve, strict=True):
        assert a.stage == b.stage and a.tokens == b.tokens
        assert b.train_loss == pytest.approx(a.train_loss, rel=1e-3)
        assert b.validation["loss"] == pytest.approx(a.validation["loss"], rel=1e-3)


@pytest.mark.parametrize("changes", [{}, {"train__segment_length": 12}])
def test_rows_in_groups_give_the_curve_of_the_whole_batch(changes: Any, tmp_path: Path) -> None:
    """Batches of 8 rows of 32 tokens, 3 rows at a time, or 8 of 12 tokens."""
    changes = {"train__delta_penalty": 0.01, "train__steps": 20, **changes}
    whole = run(cell(**changes), tmp_path / "whole")
    groups = run(cell(train__micro_tokens=96, **changes), tmp_path / "groups")
    for a, b in zip(whole.curve, groups.curve, strict=True):
        assert b.train_loss == pytest.approx(a.train_loss, rel=1e-3)
        assert b.validation["loss"] == pytest.approx(a.validation["loss"], rel=1e-3)


@pytest.mark.parametrize("gradients", ["exact", "truncated"])
def test_training_in_segments_goes_on_where_it_was_cut(gradients: str, tmp_path: Path) -> None:
    one = _long(train__segment_gradients=gradients)
    whole = run(one, tmp_path / "whole")
    for steps in (7, 11):
        assert run_cell(one, tmp_path, device="cpu", stop_after=steps) is None
    torch.manual_seed(99)
    assert timeless(run(one, tmp_path)) == timeless(whole)


def test_truncated_gradients_are_another_cell_and_another_curve(tmp_path: Path) -> None:
    exact, truncated = (
        run(_long(), tmp_path),
        run(_long(train__segment_gradients="truncated"), tmp_path),
    )
    assert exact.digest != truncated.digest
    assert exact.curve[-1].train_loss != truncated.curve[-1].train_loss
    assert truncated.cell.train.segment_gradients == "truncated"


@pytest.mark.parametrize(
    ("model", "changes", "said"),
    [
        ("transformer", {}, "transformer cannot: its state grows with the length"),
        ("hyena", {}, "hyena cannot: its state grows with the length"),
        ("mamba", {"model__dropout": 0.1}, "mamba cannot: dropout draws other masks"),
    ],
)
def test_a_model_that_cannot_train_in_segments_is_skipped_with_the_reason(
    model: str, changes: Any, said: str, tmp_path: Path
) -> None:
    record = run_cell(_long(model, **changes), tmp_path, device="cpu")
    assert record is not None and record.status == "skipped"
    assert record.error is not None and said in record.error and "\n" not in record.error


def test_attention_trains_where_no_sequence_is_longer_than_a_segment(tmp_path: Path) -> None:
    one = cell("transformer", train__segment_length=32, train__steps=5)
    plain = run(cell("transformer", train__steps=5), tmp_path)
    assert run(one, tmp_path).test == plain.test


def test_segments_and_a_compiled_step_do_not_go_together(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="in pieces, uncompiled"):
        run_cell(_long(), tmp_path, device="cpu", compile="default")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"train__segment_length": 0}, "train.segment_length=0: must be at least 1"),
        ({"train__segment_gradients": "truncated"}, "give train.segment_length too"),
        (
            {
                "train__segment_gradients": "truncated",
                "train__segment_length": 8,
                "train__precision": "16-mixed",
            },
            "take bf16-mixed or 32-true",
        ),
    ],
)
def test_segments_that_cannot_be_are_refused(changes: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        cell(**changes)


def test_a_field_newer_than_the_first_records_leaves_their_identity() -> None:
    """Those of the quickstart, as they were published."""
    published = Path(__file__).parents[2] / "results" / "published"
    assert load_all(published)
