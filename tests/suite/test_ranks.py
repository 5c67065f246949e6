"""Several processes on one cell: their gradients are those of one process, and one of them writes."""

from __future__ import annotations

import json
import os
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
from seqbench.suite.training import run_cell

ONE_STEP = """
import json, sys
from pathlib import Path
import torch
from seqbench.suite import ranks
from seqbench.suite.launchers.worker import cell_of
from seqbench.suite.training import run_cell

torch.set_num_threads(1)
line, results = sys.argv[1:]
again = [sys.executable, "-c", Path(results, "script.py").read_text(), line, results]
with ranks.group(2 if ranks.first() else 1, again, ""):
    record = run_cell(
        cell_of(json.loads(line)), Path(results), device="cpu", devices=2, strategy="ddp",
        stop_after=1,
    )
    ranks.part()
assert record is None
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_two_processes_have_the_gradients_of_one(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "task.length": 32,
        "task.test_lengths": [],
        "model.d_model": 16,
        "model.num_layers": 1,
        "train.batch_size": 8,
        "train.clip": 0.0,
        "train.curriculum": True,
    }
    cell = resolve(Request(task="induction-heads", model="mamba", settings=settings), seed=0)
    two = tmp_path / "two"
    two.mkdir()
    (two / "script.py").write_text(ONE_STEP)
    done = subprocess.run(
        [sys.executable, "-c", ONE_STEP, json.dumps(asdict(cell)), str(two)],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert run_cell(cell, tmp_path / "one", device="cpu", stop_after=1) is None

    def moments(results: Path) -> dict[str, torch.Tensor]:
        """AdamW's first moments after one step, which are the gradients but for a factor."""
        tensors, state = checkpoint.read(results / "checkpoints" / f"{cell.digest}.safetensors")
        assert state["step"] == 1 and state["tokens"] == 8 * 8  # whole batches, of the first stage
        return {k: v for k, v in tensors.items() if k.endswith("exp_avg") or k == "accuracy"}

    ours, theirs = moments(tmp_path / "one"), moments(two)
    assert ours.keys() == theirs.keys() and len(ours) > 10
    for name, value in ours.items():
        torch.testing.assert_close(theirs[name], value, rtol=1e-4, atol=1e-7, msg=name)
