"""A sequence in pieces gives the outputs and the gradients of the whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from seqbench.models.base import CausalModule
from seqbench.models.build import build_model
from seqbench.models.segments import segmented

WIDTH, LENGTH = 8, 50


def _block(name: str) -> CausalModule:
    torch.manual_seed(0)
    block = build_model(name, vocab_size=4, d_model=WIDTH, num_layers=1).layers[0].block
    assert isinstance(block, CausalModule)
    return block


def _gradients(block: CausalModule, outputs: Any, *inputs: Tensor) -> list[Tensor]:
    """Of a fixed random weighting of all outputs, by inputs and parameters."""
    generator = torch.Generator().manual_seed(1)
    loss = sum(
        (y * torch.randn(y.shape, generator=generator)).sum() for y in outputs if y.requires_grad
    )
    assert isinstance(loss, Tensor)
    wanted = [*inputs, *block.parameters()]
    return list(
        torch.autograd.grad(loss, wanted, materialize_grads=True)
    )  # a block may have an MLP


@pytest.mark.parametrize("name", ["mamba", "h3", "s4", "s5", "gla", "transformer"])
@pytest.mark.parametrize("segment", [7, 49, 64])
def test_gradients_are_those_of_the_whole(name: str, segment: int) -> None:
    block = _block(name)
    x = torch.randn(2, LENGTH, WIDTH, requires_grad=True)
    whole, pieces = block(x), segmented(block, x, segment=segment)
    torch.testing.assert_close(pieces, whole, rtol=1e-4, atol=1e-5)
    expected = _gradients(block, [whole], x)
    for found, wanted in zip(_gradients(block, [pieces], x), expected, strict=True):
        scale = wanted.abs().max().item()
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5 * max(1.0, scale))


def test_gradients_flow_through_the_states_at_both_ends() -> None:
    block = _block("mamba")
    x = torch.randn(2, LENGTH, WIDTH, requires_grad=True)
    conv, h = block.initial_state(2, x.device, x.dtype)
    start = (torch.randn_like(conv).requires_grad_(), torch.randn_like(h).requires_grad_())
    whole, (conv_end, h_end) = block(x, start)
    expected = _gradients(block, [whole, conv_end, h_end], x, *start)
    pieces, (conv_end, h_end) = segmented(block, x, start, segment=16)
    found = _gradients(block, [pieces, conv_end, h_end], x, *start)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_activations_of_one_piece_are_kept_at_a_time() -> None:
    """What autograd saves between forward and backward grows with the states alone."""
    block = _block("mamba")
    x = torch.randn(1, 4096, WIDTH, requires_grad=True)

    def saved(run: Any) -> int:
        sizes: list[int] = []

        def note(tensor: Tensor) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            run()
        return sum(sizes)

    whole = saved(lambda: block(x))
    pieces = saved(lambda: segmented(block, x, segment=256))
    assert pieces < whole / 10


def test_a_segment_must_have_a_position() -> None:
    with pytest.raises(ValueError, match="segment=0"):
        segmented(_block("mamba"), torch.zeros(1, 4, WIDTH), segment=0)
