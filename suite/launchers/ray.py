"""The Ray launcher: one Ray task a cell, on an existing cluster or on one made here.

On its node a task is the local launcher with that one cell, so limits and deaths are treated alike.
The task of a node that is lost runs again on another, from the cell's last checkpoint if the
results folder is shared; records come back to the driver, so it need not be.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from seqbench.suite.environment import gpus
from seqbench.suite.execution import Execution
from seqbench.suite.experiment import Cell, UserError
from seqbench.suite.launchers import local, worker
from seqbench.suite.records import Record, from_dict, path_of, to_dict, write

LOOK_SECONDS = 0.5


def run(
    cells: Sequence[Cell],
    results: Path,
    execution: Execution,
    *,
    address: str | None = None,
    on_event: local.OnEvent = lambda worker, cell, event: None,
) -> list[Record]:
    """As `local.run`; `address` is a cluster's (auto: the one this machine is part of)."""
    ray = _ray()
    on_gpu = execution.device == "cuda" or bool(execution.gpus)
    mine = not ray.is_initialized()
    if mine:
        _connect(ray, address)
    task = ray.remote(
        num_cpus=execution.threads * execution.devices,
        num_gpus=execution.devices / execution.cells_per_gpu if on_gpu else 0,
        max_retries=-1,  # of lost nodes and workers; a cell's own failure is a result
    )(_run_on_node)
    plain = asdict(replace(execution, workers=1, budget=None, gpus=()))
    running = {task.remote(asdict(c), str(results.resolve()), plain): c for c in cells}
    finished: list[Record] = []
    began, over, interrupted = time.monotonic(), None, False
    try:
        while running:
            try:
                ready, _ = ray.wait(list(running), timeout=LOOK_SECONDS)
                now = time.monotonic()
                if over is None and execution.budget and now - began > execution.budget:
                    over = now
                    _pause(ray, running)
                if over is not None and now - over > local.GRACE_SECONDS:
                    break
                for reference in ready:
                    cell = running.pop(reference)
                    finished += _collect(ray, reference, cell, results, on_event)
            except KeyboardInterrupt:
                if interrupted:
                    raise
                interrupted, over = True, time.monotonic()
                _pause(ray, running)
    finally:
        for reference in running:
            ray.cancel(reference, force=True)
        if mine:
            ray.shutdown()
    if interrupted:
        raise KeyboardInterrupt
    return finished


def _run_on_node(
    plain: Mapping[str, Any], results: str, execution: Mapping[str, Any]
) -> list[dict[str, Any]]:
    here = replace(Execution(**execution), gpus=gpus())
    return [to_dict(r) for r in local.run([worker.cell_of(plain)], Path(results), here)]


def _collect(
    ray: Any, reference: Any, cell: Cell, results: Path, on_event: local.OnEvent
) -> list[Record]:
    """The record a task came back with, written here unless it lies here already."""
    try:
        records = [from_dict(plain) for plain in ray.get(reference)]
    except ray.exceptions.TaskCancelledError:
        return []  # paused: its checkpoint is written
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise error.cause from error
        raise
    for record in records:
        if not path_of(results, cell).exists():
            write(results, record)
        on_event(0, cell, {"event": "done", "status": record.status, "error": record.error})
    return records


def _pause(ray: Any, running: Mapping[Any, Cell]) -> None:
    """Interrupts the tasks as Ctrl-C would: they checkpoint and end."""
    for reference in running:
        ray.cancel(reference)


def _connect(ray: Any, address: str | None) -> None:
    try:
        ray.init(address=address or "local", log_to_driver=False, include_dashboard=False)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise UserError(
            f"--ray-address {address}: no Ray cluster answers there "
            f"({' '.join(str(error).split())[:100]}); start one with `ray start --head`, or leave "
            "the option out for a local one"
        ) from error


def _ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise UserError(
            f"--launcher ray: {error}; install the extra: pip install 'seqbench[cluster]'"
        ) from error
    return ray
