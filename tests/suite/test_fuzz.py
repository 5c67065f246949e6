"""Whatever is in a record, a config or a grid file: it loads, or it is one line for the user."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from seqbench.models.base import ModelError
from seqbench.suite.configuration import parse_assignment, resolve
from seqbench.suite.experiment import Cell, Request, TrainConfig, UserError
from seqbench.suite.gridfile import parse
from seqbench.suite.records import Record, from_dict, load, to_dict
from seqbench.tasks.base import TaskError

LINE = (UserError, TaskError, ModelError)  # the command line shows each as one line, status 2
fuzz = settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

numbers = st.one_of(
    st.integers(-3, 300), st.sampled_from([2**31, 2**63, -(2**64)]), st.floats(), st.booleans()
)
scalars = st.one_of(st.none(), numbers, st.text(max_size=8), st.sampled_from(["none", "NaN", ""]))
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=6,
)  # fmt: skip


def survives(call: Callable[[], Any]) -> None:
    """It returns, or raises what the command line shows as one line."""
    try:
        call()
    except LINE as error:
        assert str(error)


def record() -> dict[str, Any]:
    cell = Cell(
        task="induction-heads", model="mamba", seed=0, scale="cpu", scale_note="A note.",
        task_config={"length": 64}, model_config={"d_model": 16}, train=TrainConfig(steps=4),
    )  # fmt: skip
    filled = Record(
        cell=cell, digest=cell.digest, status="done", headline="accuracy", test={"accuracy": 0.5},
        variants={"length=64": {"accuracy": 0.5}}, baselines={"order-0": 0.1}, chance=0.1,
    )  # fmt: skip
    return to_dict(filled)


def mutated(data: st.DataObject, node: Any) -> Any:
    """The tree with one node, anywhere in it, replaced, taken out or given a neighbour."""
    if isinstance(node, dict | list) and node and data.draw(st.booleans()):
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        key = data.draw(st.sampled_from(keys))
        changed = node.copy()
        act = data.draw(st.sampled_from(["into", "into", "out", "beside"]))
        if act == "out":
            del changed[key]
        elif act == "beside" and isinstance(changed, dict):
            changed[data.draw(st.text(max_size=6))] = data.draw(values)
        else:
            changed[key] = mutated(data, node[key])
        return changed
    return data.draw(values)


@fuzz
@given(data=st.data())
def test_any_record(data: st.DataObject) -> None:
    survives(lambda: from_dict(mutated(data, record())))


@fuzz
@given(data=st.data())
def test_any_bytes_of_a_record(data: st.DataObject, tmp_path: Path) -> None:
    whole = json.dumps(record()).encode()
    start = data.draw(st.integers(0, len(whole)))
    end = data.draw(st.integers(start, min(len(whole), start + 20)))
    path = tmp_path / f"{record()['digest']}.json"
    path.write_bytes(whole[:start] + data.draw(st.binary(max_size=8)) + whole[end:])
    survives(lambda: load(path))


GRID = {
    "description": "A grid.",
    "seeds": [0, 1],
    "cells": [
        {
            "tasks": ["induction-heads"],
            "models": ["s4", "lstm"],
            "same_size_as": "lstm",
            "set": {"train.steps": 5, "model.d_model": 16, "task.length": 32},
        }
    ],
}


@fuzz
@given(data=st.data())
def test_any_grid(data: st.DataObject) -> None:
    """JSON is YAML: the mutated tree as a text."""
    survives(lambda: parse(json.dumps(mutated(data, GRID)), "grid"))


@fuzz
@given(text=st.text(alphabet="abc019:-[]{}&*!|>?%@'\"#,. \n\t", max_size=60))
@example("cells: &a [*a]")
@example("[" * 400 + "]" * 400)
@example("seeds: 2020-13-45")
@example("? [1]\n: 2")
@example("!!python/object:os.system x")
@example("<<: 3")
@example("a: !!binary x")
@example("a: !!set {b, c}")
@example("a: 1:60:99\n")
@example("\x00")
def test_any_text_of_a_grid(text: str) -> None:
    survives(lambda: parse(text, "grid"))


@fuzz
@given(text=st.text(max_size=20) | st.builds("{}.{}={}".format, st.sampled_from(["task", "train", "x"]), st.text(max_size=5), st.text(max_size=12)))  # fmt: skip
@example("train.steps=" + "9" * 5000)
@example("train.steps=" + "[" * 5000)
def test_any_assignment(text: str) -> None:
    survives(lambda: parse_assignment(text))


TRAIN_KEYS = [f"train.{name}" for name in TrainConfig.__dataclass_fields__]
TASK_KEYS = ["task.length", "task.vocab_size", "task.mix", "task.stages", "task.test_lengths"]
MODEL_KEYS = ["model.d_model", "model.d_state", "model.init", "model.dropout", "model.dt_min"]
KEYS = [*TRAIN_KEYS, *TASK_KEYS, *MODEL_KEYS, "task.lenght", "model.", "train.x.y"]


@settings(parent=fuzz, max_examples=40)
@given(changes=st.dictionaries(st.sampled_from(KEYS), values, min_size=1, max_size=2))
@example({"train.lr": float("nan")})
@example({"model.d_model": 2**63})
@example({"task.stages": [[]]})
def test_any_config(changes: dict[str, Any]) -> None:
    request = Request(task="induction-heads", model="s4")
    survives(lambda: resolve(request, 0, list(changes.items())).digest)


@pytest.mark.parametrize("text", ["", "null", "[]", "3", '"x"', "{", "\ufeff{}"])
def test_a_file_that_is_no_record(text: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match="record"):
        load(tmp_path / "x.json")
