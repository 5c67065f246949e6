"""Choices of configurations: measured once, kept, and never where they must not be."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from seqbench.kernels import tuning


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("SEQBENCH_AUTOTUNE", "1")
    monkeypatch.setattr(tuning, "kept_in", lambda: tmp_path / "choices.json")
    monkeypatch.setattr(tuning, "_chosen", {})
    yield tmp_path / "choices.json"


def never(candidate: int) -> float:
    raise AssertionError("measured")


def fastest_is(best: int, log: list[int] | None = None) -> Callable[[int], float]:
    def seconds(candidate: int) -> float:
        if log is not None:
            log.append(candidate)
        return abs(candidate - best)

    return seconds


def test_the_fastest_is_chosen_once(file: Path) -> None:
    log: list[int] = []
    assert tuning.choose("a case", (16, 32, 64), fastest_is(32, log)) == 32
    assert tuning.choose("a case", (16, 32, 64), never) == 32
    assert log == [16, 32, 64] and tuning.chosen() == {"a case": 32}
    assert tuning.choose("another", (16,), never) == 16


def test_another_process_reads_the_choice(tmp_path: Path) -> None:
    script = (
        "import sys; from seqbench.kernels import tuning\n"
        "measure = {'measure': lambda x: -x, 'fail': lambda x: 1 / 0}[sys.argv[1]]\n"
        "print(tuning.choose('a case', (16, 32, 64), measure))"
    )
    environment = {**os.environ, "SEQBENCH_AUTOTUNE": "1", "XDG_CACHE_HOME": str(tmp_path)}
    for how in ("measure", "fail"):
        command = [sys.executable, "-P", "-c", script, how]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.stdout == "64\n", done.stderr


def test_of_two_processes_the_first_choice_stands(file: Path) -> None:
    def seconds(candidate: int) -> float:
        file.write_text(json.dumps({"a case": 16}))  # the other has just finished
        return -candidate

    assert tuning.choose("a case", (16, 32), seconds) == 16
    assert json.loads(file.read_text()) == {"a case": 16}


@pytest.mark.parametrize("damaged", ('{"a ca', "[1]", '{"a case": "32"}', '{"a case": 48}', "\xff"))
def test_a_damaged_file_is_measured_anew(damaged: str, file: Path) -> None:
    file.write_bytes(damaged.encode("latin-1"))
    assert tuning.choose("a case", (16, 32), fastest_is(32)) == 32
    assert json.loads(file.read_text()) == {"a case": 32}


def test_a_folder_that_cannot_be_written_is_no_error(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "kept_in", lambda: file / "missing" / "choices.json")
    assert tuning.choose("a case", (16, 32), fastest_is(32)) == 32
    assert tuning.choose("a case", (16, 32), never) == 32


@pytest.mark.parametrize("state", ("off", "deterministic", "traced", "captured"))
def test_the_default_is_taken_where_nothing_may_be_measured(
    state: str, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if state == "off":
        monkeypatch.delenv("SEQBENCH_AUTOTUNE")
    elif state == "deterministic":
        monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    elif state == "traced":
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    else:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert tuning.choose("a case", (16, 32), never) == 16
    assert not tuning.chosen() and not file.exists()
    file.write_text('{"a case": 32}')  # a choice that is known holds while tracing or capturing
    known = state in ("traced", "captured")
    assert tuning.choose("a case", (16, 32), never) == (32 if known else 16)
