"""The launchers for clusters: a Ray node is lost and the grid completes; SLURM jobs through submitit's local executor."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from seqbench.suite.configuration import resolve
from seqbench.suite.execution import Execution
from seqbench.suite.experiment import Cell, Request, UserError
from seqbench.suite.records import load_all


def cell(seed: int, **changes: Any) -> Cell:
    settings: dict[str, Any] = {
        "task.length": 32,
        "task.test_lengths": [],
        "model.d_model": 16,
        "model.num_layers": 1,
        "train.steps": 10,
        "train.eval_every": 5,
        "train.batch_size": 4,
        "train.eval_batches": 1,
        "train.test_batches": 1,
        "train.stop_at": None,
    }
    settings |= {k.replace("__", "."): v for k, v in changes.items()}
    return resolve(Request(task="induction-heads", model="s4", settings=settings), seed)


@pytest.fixture
def ray_cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A Ray cluster of two nodes on this machine, each for one cell at a time."""
    ray = pytest.importorskip("ray", reason="needs the extra cluster")
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_worker_niceness", "0")  # on a busy machine they would never get on
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray's own
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
        try:
            cluster.add_node(num_cpus=1)
            yield cluster
        finally:
            ray.shutdown()
            cluster.shutdown()


@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_the_cells_of_a_lost_ray_node_run_on_another(ray_cluster: Any, tmp_path: Path) -> None:
    from seqbench.suite.launchers import ray as launcher

    (doomed,) = ray_cluster.worker_nodes
    cells = [cell(seed, train__steps=600) for seed in (0, 1)]

    def lose_a_node() -> None:
        while len(list((tmp_path / "locks").glob("*.lock"))) < 2:  # until both nodes have a cell
            if over.wait(0.05):
                return
        ray_cluster.remove_node(doomed, allow_graceful=False)

    over = threading.Event()
    killer = threading.Thread(target=lose_a_node)
    killer.start()
    try:
        records = launcher.run(
            cells, tmp_path, Execution(device="cpu"), address=ray_cluster.address
        )
    finally:
        over.set()
        killer.join()
    assert [r.status for r in records] == ["done"] * 2
    assert sorted(r.digest for r in load_all(tmp_path)) == sorted(c.digest for c in cells)
    assert len(ray_cluster.list_all_nodes()) == 1


@pytest.mark.filterwarnings("ignore")  # submitit leaves files to the collector
def test_a_slurm_job_runs_its_cell(tmp_path: Path) -> None:
    """In submitit's local executor, which starts a job's process here."""
    pytest.importorskip("submitit", reason="needs the extra cluster")
    from seqbench.suite.launchers import slurm as launcher

    options = {"cluster": "local", "partition": "gpu", "time": "5"}
    (record,) = launcher.run([cell(0)], tmp_path, Execution(device="cpu"), parameters=options)
    assert record.status == "done" and load_all(tmp_path) == [record]


def test_a_slurm_job_that_ends_without_a_record_gets_one(tmp_path: Path) -> None:
    from seqbench.suite.launchers import slurm as launcher

    class Lost:
        job_id, state = "7_0", "NODE_FAIL"

        def exception(self) -> Exception:
            return RuntimeError("Traceback\nRuntimeError: the node caught fire")

        def stderr(self) -> str:
            return "smoke\n"

    record = launcher._collect(Lost(), cell(0), tmp_path)
    assert record.status == "failed" and record.log == ("smoke",)
    assert record.error == (
        "SLURM job 7_0 ended without a record, in state NODE_FAIL: RuntimeError: the node caught fire"
    )
    assert load_all(tmp_path) == [record]


def test_slurm_options_reach_sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    submitit = pytest.importorskip("submitit", reason="needs the extra cluster")
    from seqbench.suite.launchers import slurm as launcher

    monkeypatch.setattr(submitit.SlurmExecutor, "affinity", classmethod(lambda cls: 2))
    options = {"partition": "gpu", "time": "90", "account": "lab"}
    execution = Execution(workers=3, threads=4, devices=2, device="cuda")
    executor = launcher._executor(tmp_path, execution, options)
    parameters = executor._executor.parameters
    assert parameters["partition"] == "gpu" and parameters["account"] == "lab"
    assert parameters["time"] == 90 and parameters["gpus_per_node"] == 2
    assert parameters["cpus_per_task"] == 8 and parameters["array_parallelism"] == 3


def test_wrong_slurm_options_are_one_line(tmp_path: Path) -> None:
    pytest.importorskip("submitit", reason="needs the extra cluster")
    from seqbench.suite.launchers import slurm as launcher

    for options in ({"cluster": "moon"}, {"cluster": "local", "time": "soon"}):
        with pytest.raises(UserError, match="--launcher slurm") as caught:
            launcher._executor(tmp_path, Execution(), dict(options))
        assert "\n" not in str(caught.value)
