"""The SLURM launcher, through submitit: one job a cell, in an array.

In its job a cell is run by the local launcher, so limits and deaths are treated alike. A job that
SLURM preempts or ends for its time is queued again and goes on from the cell's last checkpoint.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from seqbench.suite.environment import environment, gpus
from seqbench.suite.execution import Execution
from seqbench.suite.experiment import Cell, UserError
from seqbench.suite.launchers import local, worker
from seqbench.suite.records import Record, load, path_of, write

LOOK_SECONDS = 0.5
LOG_LINES = 10


def run(
    cells: Sequence[Cell],
    results: Path,
    execution: Execution,
    *,
    parameters: Mapping[str, str] | None = None,
    on_event: local.OnEvent = lambda worker, cell, event: None,
) -> list[Record]:
    """As `local.run`; the results folder must be shared with the nodes.

    `parameters` are sbatch's (partition, account, time in minutes, ...), and `cluster`, which is
    submitit's: slurm, local (processes here) or debug (this process).
    """
    executor = _executor(results, execution, dict(parameters or {}))
    job = _Job(results.resolve(), replace(execution, workers=1, budget=None, gpus=()))
    waiting = list(cells)
    running: list[tuple[Any, Cell]] = []
    finished: list[Record] = []
    began = time.monotonic()
    # An array queues all its cells at once; elsewhere nothing but this loop holds them back.
    at_once = len(waiting) if executor.cluster == "slurm" else execution.workers
    try:
        while waiting or running:
            now, waiting = waiting[: at_once - len(running)], waiting[at_once - len(running) :]
            if now:
                running += zip(executor.map_array(job, [asdict(c) for c in now]), now, strict=True)
            for one in [pair for pair in running if pair[0].done()]:
                running.remove(one)
                record = _collect(*one, results)
                finished.append(record)
                event = {"event": "done", "status": record.status, "error": record.error}
                on_event(0, one[1], event)
            if execution.budget and time.monotonic() - began > execution.budget:
                break
            time.sleep(LOOK_SECONDS)
    finally:
        for left, _ in running:
            left.cancel()
    return finished


class _Job:
    """What runs in a job; submitit pickles it into a file that only its own job reads."""

    def __init__(self, results: Path, execution: Execution) -> None:
        self.results, self.execution = results, execution

    def __call__(self, plain: Mapping[str, Any]) -> None:
        here = replace(self.execution, gpus=gpus())
        local.run([worker.cell_of(plain)], self.results, here)

    def checkpoint(self, plain: Mapping[str, Any]) -> Any:
        """What submitit queues when SLURM takes the node away: the same again."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, plain)


def _collect(job: Any, cell: Cell, results: Path) -> Record:
    path = path_of(results, cell)
    error = job.exception()
    if path.exists():
        return load(path)
    state = " ".join(str(job.state).split())
    message = f"SLURM job {job.job_id} ended without a record, in state {state}"
    if error is not None:
        lines = str(error).strip().splitlines()
        message += f": {lines[-1] if lines else type(error).__name__}"
    log = tuple((job.stderr() or "").rstrip().splitlines()[-LOG_LINES:])
    record = Record(
        cell=cell,
        digest=cell.digest,
        status="failed",
        error=message,
        log=log,
        environment=environment(torch.device("cpu"), {}),
    )
    write(results, record)
    return record


def _executor(results: Path, execution: Execution, parameters: dict[str, str]) -> Any:
    try:
        import submitit
    except ImportError as error:
        raise UserError(
            f"--launcher slurm: {error}; install the extra: pip install 'seqbench[cluster]'"
        ) from error
    cluster = parameters.pop("cluster", "slurm")
    try:
        executor = submitit.AutoExecutor(folder=results / "logs" / "slurm", cluster=cluster)
        on_gpu = execution.device == "cuda" or bool(execution.gpus)
        executor.update_parameters(
            name="seqbench",
            cpus_per_task=execution.threads * execution.devices,
            gpus_per_node=execution.devices if on_gpu else 0,
            timeout_min=int(parameters.pop("time", "1440")),
            slurm_array_parallelism=execution.workers,
            **{f"slurm_{key}": value for key, value in parameters.items()},
        )
    except (RuntimeError, ValueError, TypeError, NameError) as error:
        raise UserError(
            f"--launcher slurm: {' '.join(str(error).split())}; --slurm takes sbatch's names, "
            "as in partition=gpu, and time in minutes; cluster=local runs here, without SLURM"
        ) from error
    return executor
