"""Records: what is written is read back, and a file that is not whole is named, never half-read."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seqbench.suite import records
from seqbench.suite.experiment import Cell, TrainConfig, UserError
from seqbench.suite.records import (
    Cost,
    CurvePoint,
    Record,
    from_dict,
    load,
    load_all,
    path_of,
    query,
    to_dict,
    write,
)


def make(seed: int = 0, **changes: Any) -> Record:
    cell = Cell(
        task=changes.pop("task", "selective-copying"),
        model=changes.pop("model", "mamba"),
        seed=seed,
        scale="cpu",
        scale_note="Synthetic.",
        task_config={"length": 64, "tokens": [1, 2], "path": None},
        model_config={"d_model": 64},
        train=TrainConfig(steps=20, lr=1e-3),
    )
    filled = Record(
        cell=cell,
        digest=cell.digest,
        status="done",
        headline="accuracy",
        test={"accuracy": 0.5, "loss": 1.0 / 3.0},
        variants={"length=128": {"accuracy": 0.25}},
        chance=1 / 14,
        baselines={"order-0": 0.1},
        curve=(
            CurvePoint(
                step=10,
                seconds=0.1,
                tokens=640,
                lr=1e-3,
                train_loss=2.0,
                stage=1,
                validation={"accuracy": 0.25},
            ),
        ),
        steps_done=20,
        solved_at=10,
        cost=Cost(
            parameters=10,
            state_numbers=20,
            flops_per_token=30.0,
            tokens_per_second=40.0,
            peak_memory_bytes=50,
            train_seconds=60.0,
            wall_seconds=70.0,
        ),
        environment={"threads": 1, "backends": {"selective_scan": "cpu"}, "dirty": None},
    )
    return replace(filled, **changes)


def test_round_trip(tmp_path: Path) -> None:
    record = make()
    path = write(tmp_path, record)
    assert path == tmp_path / "records/selective-copying/mamba" / f"{record.digest}.json"
    assert path == path_of(tmp_path, record.cell)
    assert load(path) == record
    assert load_all(tmp_path) == [record]
    assert from_dict(to_dict(record)) == record


def test_failed_record_round_trip(tmp_path: Path) -> None:
    cell = make().cell
    record = Record(cell=cell, digest=cell.digest, status="failed", error="out of memory")
    assert load(write(tmp_path, record)) == record


def test_non_finite_numbers_are_strict_json(tmp_path: Path) -> None:
    record = make(test={"accuracy": math.nan, "loss": math.inf, "perplexity": -math.inf})
    path = write(tmp_path, record)

    def refuse(name: str) -> float:
        raise AssertionError(f"{name} is no JSON")

    json.loads(path.read_text(), parse_constant=refuse)
    test = load(path).test
    assert math.isnan(test["accuracy"])
    assert test["loss"] == math.inf and test["perplexity"] == -math.inf


@settings(max_examples=50, deadline=None)
@given(
    metrics=st.dictionaries(st.text(), st.floats(allow_nan=False)),
    error=st.none() | st.text(),
    seed=st.integers(min_value=0, max_value=2**63 - 1),
)
def test_any_content_round_trips(metrics: dict[str, float], error: str | None, seed: int) -> None:
    record = make(seed, test=metrics, error=error)
    assert from_dict(json.loads(json.dumps(to_dict(record), allow_nan=False))) == record


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_a_file_cut_or_altered_is_refused_or_whole(data: st.DataObject) -> None:
    whole = json.dumps(to_dict(make())).encode()
    at = data.draw(st.integers(min_value=0, max_value=len(whole) - 1))
    byte = data.draw(st.binary(max_size=1))
    try:
        records._validated(whole[:at] + byte, "file")
    except records._Invalid as error:
        assert str(error).startswith("file: ")
        assert "\n" not in str(error)
    else:
        assert whole[:at] + byte == whole


CHANGES: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (lambda r: r.update(score=1), "score=1: unexpected"),
    (lambda r: r["cell"].update(epochs=1), "cell.epochs=1: unexpected"),
    (lambda r: r["cost"].update(dollars=1), "cost.dollars=1: unexpected"),
    (lambda r: r["curve"][0].update(q=1), "curve.0.q=1: unexpected"),
    (lambda r: r["curve"][0].pop("lr"), "curve.0.lr: field required"),
    (lambda r: r.pop("cell"), "cell: field required"),
    (lambda r: r.update(status="finished"), "status='finished': input should be"),
    (lambda r: r.update(steps_done=1.5), "steps_done=1.5: input should be a valid integer"),
    (lambda r: r.update(steps_done="20"), "steps_done='20': input should be a valid integer"),
    (lambda r: r.update(higher_is_better=1), "higher_is_better=1: input should be a valid boolean"),
    (lambda r: r["test"].update(accuracy="high"), "test.accuracy='high': input should be"),
    (lambda r: r["test"].update(accuracy=None), "test.accuracy=None: input should be"),
    (lambda r: r["cell"].update(seed=7), "(edited, or written by another version"),
    (lambda r: r["cell"]["train"].update(steps=21), "(edited, or written by another version"),
]


@pytest.mark.parametrize(("change", "message"), CHANGES)
def test_invalid_file_names_file_place_and_remedy(
    tmp_path: Path, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    path = write(tmp_path, make())
    plain = json.loads(path.read_text())
    change(plain)
    path.write_text(json.dumps(plain))
    with pytest.raises(UserError) as caught:
        load(path)
    text = str(caught.value)
    assert str(path) in text and message in text and "\n" not in text
    assert text.endswith("delete the file and its cell runs again")


def test_record_under_another_name_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, make())
    path.rename(path.with_name("0123456789abcdef.json"))
    with pytest.raises(UserError, match="not the file's name"):
        load_all(tmp_path)


def test_load_all_names_every_torn_file_in_one_line(tmp_path: Path) -> None:
    paths = [write(tmp_path, make(seed)) for seed in range(6)]
    for path in paths[:2]:
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError) as caught:
        load_all(tmp_path)
    text = str(caught.value)
    assert all(str(path) in text for path in paths[:2])
    assert "cut off" in text and "line" in text and "\n" not in text
    assert text.endswith("delete these files and their cells run again")
    for path in paths[2:5]:
        path.write_bytes(b"")
    with pytest.raises(UserError, match="and 2 more files like these"):
        load_all(tmp_path)


def test_load_all_without_records(tmp_path: Path) -> None:
    assert load_all(tmp_path) == []


def test_write_replaces_and_leaves_nothing_else(tmp_path: Path) -> None:
    write(tmp_path, make(error="first"))
    path = write(tmp_path, make(error="second"))
    assert load(path).error == "second"
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_failing_write_keeps_the_old_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, make(error="first"))

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left on device"):
        write(tmp_path, make(error="second"))
    assert load(path).error == "first"
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("model", ["plugins/my model.py", "../../outside", "..", "/etc/model.py"])
def test_a_plugins_path_stays_inside_the_results(tmp_path: Path, model: str) -> None:
    path = write(tmp_path, make(model=model))
    assert path.resolve().is_relative_to((tmp_path / "records").resolve())
    assert load_all(tmp_path)[0].cell.model == model


def test_query() -> None:
    made = [make(s, task=t) for t in ("dna", "piano") for s in (0, 1)]
    made[3] = replace(made[3], status="failed")
    assert query(made, task="dna") == made[:2]
    assert query(made, task={"dna", "piano"}, seed=0) == [made[0], made[2]]
    assert query(made, status="failed", model="mamba", scale="cpu") == [made[3]]
    assert query(made, digest=made[1].digest) == [made[1]]
    assert query(made, task="language") == []


WRITER = """
import sys
from pathlib import Path
from test_records import make
from seqbench.suite.records import write
point = make().curve[0]
print("ready", flush=True)
for seed in range(1_000_000):
    write(Path(sys.argv[1]), make(seed % 3, curve=(point,) * (2000 + seed)))
    print(seed, flush=True)
"""


def test_sigkill_while_writing_leaves_no_torn_record(tmp_path: Path) -> None:
    moments = random.Random(0)
    paths = [str(Path(__file__).parent), *sys.path]
    for kill in range(8):
        results = tmp_path / str(kill)
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(results)],
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        )
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.stdout.readline()  # the first record is there
        time.sleep(moments.uniform(0, 0.15))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        found = load_all(results)
        assert 1 <= len(found) <= 3
        assert all(len(record.curve) >= 2000 for record in found)
