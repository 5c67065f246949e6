"""Which cells a grid has, and which of them have a record."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from seqbench.suite.discovery import grid_requests
from seqbench.suite.experiment import Cell, Request, UserError
from seqbench.suite.records import Record, load, path_of


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A grid split into what has a record and what has none."""

    cells: tuple[Cell, ...]
    finished: tuple[Record, ...]
    missing: tuple[Cell, ...]


def grid_cells(
    name: str,
    *,
    scale: str,
    seeds: Sequence[int] | None,
    assignments: Sequence[tuple[str, object]] = (),
) -> list[Cell]:
    """The cells of a named grid, in its order; `seeds` instead of the grid's own where given."""
    from seqbench.suite.configuration import resolve  # late: a report needs neither it nor torch

    own_seeds, requests = grid_requests(name, scale)
    wanted = tuple(seeds) if seeds is not None else own_seeds
    return _distinct([resolve(r, seed, assignments) for seed in wanted for r in requests])


def product_cells(
    tasks: Sequence[str],
    models: Sequence[str],
    *,
    scale: str,
    seeds: Sequence[int],
    assignments: Sequence[tuple[str, object]] = (),
) -> list[Cell]:
    """Every task with every model and seed."""
    from seqbench.suite.configuration import resolve

    return _distinct(
        [
            resolve(Request(task=t, model=m, scale=scale), seed, assignments)
            for seed in seeds
            for t in tasks
            for m in models
        ]
    )


def plan(cells: Sequence[Cell], results: Path) -> Plan:
    """What is there and what is to run. A record that cannot be read raises UserError."""
    finished, missing = [], []
    for cell in cells:
        path = path_of(results, cell)
        if path.exists():
            finished.append(load(path))
        else:
            missing.append(cell)
    return Plan(cells=tuple(cells), finished=tuple(finished), missing=tuple(missing))


def waves(cells: Sequence[Cell]) -> list[list[Cell]]:
    """The cells in groups, each to be run after those whose weights it begins from."""
    found, left = [], list(cells)
    while left:
        wave = startable(left, left)
        found.append(wave)
        left = [cell for cell in left if cell not in wave]
    return found


def startable(cells: Sequence[Cell], unfinished: Sequence[Cell]) -> list[Cell]:
    """Those that do not begin from the weights of an unfinished cell."""
    return [
        cell
        for cell in cells
        if cell.train.init_from is None or not any(map(cell.begins_from, unfinished))
    ]


def check_writable(results: Path) -> None:
    """UserError unless files can be made in the results folder (it is created)."""
    try:
        results.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=results, prefix=".write-test-"):
            pass
    except OSError as error:
        raise UserError(
            f"results folder {results}: cannot write there ({os.strerror(error.errno or 0)}); "
            "make it writable or name another with --results"
        ) from error


def _distinct(cells: list[Cell]) -> list[Cell]:
    return list({cell.digest: cell for cell in cells}.values())


def forget(cells: Sequence[Cell], results: Path, status: str) -> None:
    """Deletes the records of cells that ended so, for another try."""
    for record in plan(cells, results).finished:
        if record.status == status:
            path_of(results, record.cell).unlink()
