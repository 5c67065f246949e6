"""The penalty on Δ: the mean log Δ of the S6 layers, and a run that it makes select less."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from seqbench.models.build import build_model
from seqbench.suite.configuration import resolve
from seqbench.suite.experiment import Request
from seqbench.suite.penalty import Deltas
from seqbench.suite.training import run_cell


def test_it_is_the_mean_log_of_delta_as_it_acts_with_its_gradient() -> None:
    torch.manual_seed(0)
    model = build_model("mamba", vocab_size=16, d_model=16, num_layers=2)
    deltas, seen = Deltas(model), []
    for layer in model.layers:
        layer.block.layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(torch.randint(16, (2, 8)))
    wanted = [
        layer.block.layer.dynamics(x)[0].log().mean().item() for layer, x in zip(model.layers, seen)
    ]
    mean = deltas.mean_log()
    assert mean.item() == pytest.approx(sum(wanted))
    mean.backward()
    assert all(layer.block.layer.dt_bias.grad.abs().sum() > 0 for layer in model.layers)


def test_evaluation_and_other_layers_leave_nothing_behind() -> None:
    model = build_model("mamba", vocab_size=16, d_model=16, num_layers=1)
    deltas = Deltas(model)
    with torch.no_grad():
        model.eval()(torch.zeros(1, 4, dtype=torch.long))
    assert deltas.mean_log().item() == 0
    assert Deltas(build_model("s4", vocab_size=16, d_model=16, num_layers=1)).mean_log().item() == 0


def test_a_run_with_it_ends_with_smaller_deltas(tmp_path: Path) -> None:
    def mean_delta(penalty: float) -> float:
        settings = {
            "task.length": 16,
            "task.test_lengths": (),
            "model.d_model": 16,
            "train.steps": 30,
            "train.batch_size": 4,
            "train.delta_penalty": penalty,
        }
        cell = resolve(Request(task="induction-heads", model="mamba", settings=settings), seed=0)
        assert run_cell(cell, tmp_path, device="cpu").status == "done"  # type: ignore[union-attr]
        from seqbench.suite import checkpoint

        tensors, _ = checkpoint.read(tmp_path / "checkpoints" / f"{cell.digest}.safetensors")
        biases = [v for k, v in tensors.items() if k.endswith("dt_bias")]
        return torch.cat(biases).mean().item()

    assert mean_delta(1.0) < mean_delta(0.0) - 0.01
