"""Several processes on one cell: their gradients are those of one process, and one of them writes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from seqbench.suite import checkpoint
from seqbench.suite.configuration import resolve
from seqbench.suite.experiment import Request
from seqbench.suite.records import load_all
from seqbench.suite.training import run_cell

SITTING = """
import json, sys
from pathlib import Path
import torch
from seqbench.suite import ranks
from seqbench.suite.launchers.worker import cell_of
from seqbench.suite.records import write
from seqbench.suite.training import run_cell

torch.set_num_threads(1)
line, results, strategy, steps = sys.argv[1], Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
again = [sys.executable, "-c", (results / "script.py").read_text(), *sys.argv[1:]]
with ranks.group(2 if ranks.first() else 1, again, ""):
    record = run_cell(
        cell_of(json.loads(line)),
        results,
        device="cpu",
        devices=2,
        strategy=strategy,
        stop_after=steps or None,
    )
    ranks.part()
if ranks.first():
    assert (record is None) == bool(steps), record
    if record is not None:
        assert record.status == "done", record.log
        write(results, record)
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_have_the_gradients_of_one_and_go_on_as_it_does(
    strategy: str, tmp_path: Path
) -> None:
    """A first step, and from its checkpoint to the end."""
    settings: dict[str, Any] = {
        "task.length": 32,
        "task.test_lengths": [],
        "model.d_model": 16,
        "model.num_layers": 2,
        "train.steps": 4,
        "train.eval_every": 2,
        "train.eval_batches": 1,
        "train.test_batches": 1,
        "train.batch_size": 8,
        "train.clip": 0.1,
        "train.weight_decay": 0.1,
        "train.stop_at": None,
        "train.curriculum": True,
    }
    cell = resolve(Request(task="induction-heads", model="mamba", settings=settings), seed=0)
    two = tmp_path / "two"
    two.mkdir()
    (two / "script.py").write_text(SITTING)
    plain = json.dumps(asdict(cell))
    for steps in (1, 0):
        done = subprocess.run(
            [sys.executable, "-c", SITTING, plain, str(two), strategy, str(steps)],
            capture_output=True,
            text=True,
            timeout=300,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr
        if steps:
            shutil.copytree(two / "checkpoints", two / "first")
    assert run_cell(cell, tmp_path / "one", device="cpu", stop_after=1) is None

    def moments(checkpoints: Path) -> dict[str, torch.Tensor]:
        """AdamW's first moments after one step, which are the gradients but for a factor."""
        tensors, state = checkpoint.read(checkpoints / f"{cell.digest}.safetensors")
        assert state["step"] == 1 and state["tokens"] == 8 * 8  # whole batches, of the first stage
        return {k: v for k, v in tensors.items() if k.endswith("exp_avg") or k == "accuracy"}

    ours, theirs = moments(tmp_path / "one" / "checkpoints"), moments(two / "first")
    assert ours.keys() == theirs.keys() and len(ours) > 10
    for name, value in ours.items():
        torch.testing.assert_close(theirs[name], value, rtol=1e-4, atol=1e-7, msg=name)

    one = run_cell(cell, tmp_path / "one", device="cpu")
    (both,) = load_all(two)
    assert one is not None and [p.step for p in both.curve] == [p.step for p in one.curve] == [2, 4]
    for here, there in zip(one.curve, both.curve, strict=True):
        assert there.train_loss == pytest.approx(here.train_loss, rel=1e-4)
        assert there.validation == pytest.approx(here.validation, rel=1e-3)
    assert both.test == pytest.approx(one.test, rel=1e-3)
    assert both.environment["strategy"] == strategy and both.environment["devices"] == 2
    assert both.cost is not None and one.cost is not None
    assert both.cost.parameters == one.cost.parameters
