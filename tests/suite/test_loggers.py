"""Loggers mirror the curve and touch nothing else; a missing package is one line with its extra."""

from __future__ import annotations

import sys
import warnings
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from seqbench.suite.experiment import Cell, UserError
from seqbench.suite.loggers import check_logger, mirrored
from seqbench.suite.records import CurvePoint, Record, write


def _record() -> Record:
    cell = Cell(task="dna", model="mamba", seed=0, scale="cpu", scale_note="")
    curve = tuple(
        CurvePoint(
            step=step,
            seconds=1.0,
            tokens=10 * step,
            lr=1e-3,
            train_loss=2.0 / step,
            stage=None,
            validation={"bits_per_base": 2.0 - 0.1 * step},
        )
        for step in (1, 2, 3)
    )
    return Record(
        cell=cell,
        digest=cell.digest,
        status="done",
        headline="bits_per_base",
        test={"bits_per_base": 1.5},
        curve=curve,
        steps_done=3,
    )


def _run(name: str | None, results: Path, seen: list[str], live: int) -> None:
    """Events as a launcher sends them: the first points while the cell runs, then its end."""
    record = _record()
    with mirrored(name, results, lambda worker, cell, event: seen.append(event["event"])) as told:
        told(0, record.cell, {"event": "start"})
        for point in record.curve[:live]:
            told(0, record.cell, {"event": "validated", "point": asdict(point)})
        write(results, record)
        told(0, record.cell, {"event": "done", "status": "done", "error": None})


class _Wandb(SimpleNamespace):
    def __init__(self) -> None:
        super().__init__(logged=[], inits=[], ended=0)

    def init(self, **given: Any) -> Any:
        self.inits.append(given)
        return SimpleNamespace(
            log=lambda values, step: self.logged.append((step, values)), finish=self._end
        )

    def _end(self) -> None:
        self.ended += 1


@pytest.mark.parametrize("live", [0, 2, 3])
def test_every_point_once_whatever_the_launcher_tells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, live: int
) -> None:
    fake = _Wandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)  # type: ignore[arg-type]
    seen: list[str] = []
    _run("wandb", tmp_path, seen, live)
    assert seen == ["start", *["validated"] * live, "done"]
    assert [step for step, _ in fake.logged] == [1, 2, 3, 3]
    assert fake.logged[1][1]["validation/bits_per_base"] == 1.8
    assert fake.logged[1][1]["train/loss"] == 1.0
    assert fake.logged[-1][1] == {"test/bits_per_base": 1.5}
    assert fake.ended == 1
    assert fake.inits[0]["id"] == _record().digest and fake.inits[0]["config"]["task"] == "dna"


def test_tensorboard_holds_the_curve(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own dependencies'
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        _run("tensorboard", tmp_path, [], live=2)
        folder = tmp_path / "tensorboard" / _record().digest
        events = EventAccumulator(str(folder)).Reload()
        scalars = events.Scalars("validation/bits_per_base")
        assert [s.step for s in scalars] == [1, 2, 3]
        assert [s.value for s in scalars] == pytest.approx([1.9, 1.8, 1.7])
        assert events.Scalars("test/bits_per_base")[0].value == 1.5


def test_without_a_logger_events_pass_through(tmp_path: Path) -> None:
    seen: list[str] = []
    _run(None, tmp_path, seen, live=1)
    assert seen == ["start", "validated", "done"]


def test_a_logger_that_fails_costs_no_event(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def init(**given: Any) -> Any:
        raise OSError("no network")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))  # type: ignore[arg-type]
    seen: list[str] = []
    _run("wandb", tmp_path, seen, live=3)
    assert seen == ["start", "validated", "validated", "validated", "done"]
    assert [r.message for r in caplog.records].count(caplog.records[0].message) == 1
    assert "no network" in caplog.text and "given up" in caplog.text


def test_a_missing_package_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"--logger wandb: .*seqbench\[wandb\]"):
        check_logger("wandb")
    with pytest.raises(UserError, match=r"unknown logger 'wandbb': did you mean wandb"):
        check_logger("wandbb")
