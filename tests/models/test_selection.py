"""The unrolled matrix of a layer gives the layer's own output, and shows what is there to see."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from seqbench.models.base import ModelError
from seqbench.models.build import build_model
from seqbench.models.selection import trace


def build(name: str, **options: Any) -> Any:
    torch.manual_seed(0)
    return build_model(name, vocab_size=7, d_model=8, num_layers=2, **options).double()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("mamba", {}),
        ("mamba", {"init": "complex", "selective_B": False}),
        ("mamba", {"discretisation": "zoh", "selective_dt": False}),
        ("s6", {"selective_C": False}),
        ("mamba+s4", {}),
        ("s4", {"init": "real", "discretisation": "bilinear"}),
        ("h3", {"init": "legs"}),
    ],
)
@torch.no_grad()
def test_the_matrix_times_the_input_is_the_output(name: str, options: dict[str, Any]) -> None:
    model = build(name, **options)
    tokens = torch.randint(7, (30,), generator=torch.Generator().manual_seed(1))
    rows = torch.tensor([0, 3, 17, 29])
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    for residual in model.layers:
        residual.block.layer.register_forward_hook(
            # Without its gate, which the matrix leaves out.
            lambda layer, arguments, _: seen.append((arguments[0], layer.forward(arguments[0])))
        )
    traces = trace(model, tokens, rows)
    assert len(traces) == 2
    for residual, found, (x, y) in zip(model.layers, traces, seen, strict=True):
        expected = torch.einsum("rld,ld->rd", found.weights_RLD, x[0])
        expected = expected + residual.block.layer.D * x[0, rows]
        torch.testing.assert_close(y[0, rows], expected, rtol=1e-8, atol=1e-8)
        weights = found.attention_RL()
        torch.testing.assert_close(weights.sum(-1), torch.ones(4, dtype=torch.float64))
        assert (weights[0, 1:] == 0).all() and (weights[2, 18:] == 0).all()
        assert found.delta_LD.shape == x.shape[1:] and (found.delta_LD > 0).all()


def test_delta_moves_with_the_input_only_where_it_is_selective() -> None:
    tokens, rows = torch.arange(14) % 7, torch.tensor([13])
    for name, spread in (("mamba", True), ("mamba+s4", False)):
        for found in trace(build(name), tokens, rows):
            assert (found.delta_LD.std(0).max() > 1e-5) == spread


def test_a_model_without_state_space_layers_is_refused() -> None:
    with pytest.raises(ModelError, match="no s6 or s4 layer"):
        trace(build("transformer"), torch.arange(5), torch.tensor([4]))
