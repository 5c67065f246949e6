"""The command line in this process, and cells trained in it: starting others is mostly imports."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from seqbench.suite import cli
from seqbench.suite.execution import Execution
from seqbench.suite.experiment import Cell
from seqbench.suite.launchers import local, worker
from seqbench.suite.records import Record, load, path_of

Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def seqbench(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs `seqbench ARGUMENTS` in this process and gives what a process of its own would."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["seqbench", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        shown = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return subprocess.CompletedProcess(arguments, ended.value.code, shown.out, shown.err)

    return run


@pytest.fixture
def inline(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The local launcher without workers: each cell under its lock in this process."""
    import torch

    def run(
        cells: Sequence[Cell], results: Path, execution: Execution, *, on_event: local.OnEvent
    ) -> list[Record]:
        torch.set_num_threads(execution.threads)
        records = []
        for cell in cells:
            on_event(0, cell, {"event": "start"})

            def tell(event: Mapping[str, Any], cell: Cell = cell) -> None:
                on_event(0, cell, event)

            worker.run_locked(cell, results, execution, "", tell, lambda: False)
            records.append(load(path_of(results, cell)))
            status, error = records[-1].status, records[-1].error
            on_event(0, cell, {"event": "done", "status": status, "error": error})
        return records

    threads = torch.get_num_threads()
    monkeypatch.setattr(local, "run", run)
    yield
    torch.set_num_threads(threads)
