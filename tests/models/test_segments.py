"""A sequence in pieces gives the outputs and the gradients of the whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from seqbench.models.base import CausalModule
from seqbench.models.build import build_model
from seqbench.models.segments import cannot_carry, segmented, segmented_loss

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


def test_the_gradients_that_are_handed_in_stay_as_they_are() -> None:
    """Pieces reuse each other's memory, not the caller's."""
    block = _block("mamba")
    x = torch.randn(2, LENGTH, WIDTH, requires_grad=True)
    start = tuple(s.requires_grad_() for s in block.initial_state(2, x.device, x.dtype))
    y, ends = segmented(block, x, start, segment=7)
    outputs = [y, *ends]
    given = [torch.randn_like(out) for out in outputs]
    before = [g.clone() for g in given]
    torch.autograd.grad(outputs, [x, *start], given)
    assert all(map(torch.equal, given, before))


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


RECURRENT = ["mamba", "h3", "s4", "s6", "s5", "gla", "retnet", "linear-attention", "lstm"]


def _model(name: str, **options: Any) -> Any:
    torch.manual_seed(0)
    return build_model(name, vocab_size=5, d_model=WIDTH, num_layers=2, **options)


def _losses(
    model: Any, segment: int, gradients: Any, **by_position: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """Of random tokens and answers, and the gradients of the parameters."""
    generator = torch.Generator().manual_seed(1)
    tokens, answers = torch.randint(0, 5, (2, 2, LENGTH), generator=generator)

    def loss_of(logits_BLV: Tensor, some: slice) -> Tensor:
        return F.cross_entropy(
            logits_BLV.flatten(0, 1), answers[:, some].flatten(), reduction="sum"
        )

    if gradients == "whole":
        loss = loss_of(model(tokens, **by_position), slice(0, LENGTH))
    else:
        loss = segmented_loss(
            model, loss_of, tokens, segment=segment, gradients=gradients, **by_position
        )
    # As the loss scaling of half precision does: what comes from above is not 1.
    return loss, list(torch.autograd.grad(3 * loss, list(model.parameters())))


@pytest.mark.parametrize("name", RECURRENT)
@pytest.mark.parametrize("segment", [7, 25])
def test_a_whole_models_gradients_are_those_of_the_whole_sequence(name: str, segment: int) -> None:
    model = _model(name)
    assert cannot_carry(model, LENGTH) is None
    wanted, expected = _losses(model, LENGTH, "whole")
    loss, found = _losses(model, segment, "exact")
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-4)
    for one, other in zip(found, expected, strict=True):
        scale = other.abs().max().item()
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * max(1.0, scale))


@pytest.mark.parametrize("gradients", ["exact", "truncated"])
def test_packed_documents_stay_apart_in_pieces(gradients: Any) -> None:
    """Where every piece begins a document, gradients cut between pieces are exact too."""
    model = _model("mamba")
    reset = torch.zeros(2, LENGTH, dtype=torch.bool)
    reset[:, ::10] = True
    whole, expected = _losses(model, LENGTH, "whole", reset=reset)
    loss, found = _losses(model, 10, gradients, reset=reset)
    assert (whole - _losses(model, LENGTH, "whole")[0]).abs() > 1e-3
    torch.testing.assert_close(loss, whole)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_a_complex_state_and_positions_are_carried_too() -> None:
    model = _model("mamba", init="complex", positions="sinusoidal")
    _, expected = _losses(model, LENGTH, "whole")
    for one, other in zip(_losses(model, 16, "exact")[1], expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["mamba", "lstm", "h3"])
def test_truncated_gradients_stop_between_pieces(name: str) -> None:
    """Of pieces that begin from the carried state as from a constant; the loss stays the same."""
    model = _model(name)
    wanted, whole = _losses(model, LENGTH, "whole")
    loss, found = _losses(model, 10, "truncated")
    torch.testing.assert_close(loss, wanted)
    assert any((a - b).abs().max() > 1e-3 * b.abs().max() for a, b in zip(found, whole))

    generator = torch.Generator().manual_seed(1)
    tokens, answers = torch.randint(0, 5, (2, 2, LENGTH), generator=generator)
    for first in range(0, LENGTH, 10):
        state = model.initial_state(2)
        if first:
            with torch.no_grad():
                state = model(tokens[:, :first], state)[1]
        logits, _ = model(tokens[:, first : first + 10], state)
        piece = answers[:, first : first + 10].flatten()
        (3 * F.cross_entropy(logits.flatten(0, 1), piece, reduction="sum")).backward()
    for one, parameter in zip(found, model.parameters(), strict=True):
        torch.testing.assert_close(one, parameter.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("gradients", ["exact", "truncated"])
def test_a_whole_models_pieces_keep_their_autocast(gradients: Any) -> None:
    model = _model("s6")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, found = _losses(model, 10, gradients)
    _, exact = _losses(model, 10, gradients)
    for one, other in zip(found, exact, strict=True):
        assert 0 < (one - other).abs().max() < 0.2 * other.abs().max()


@pytest.mark.parametrize("name", ["transformer", "hyena"])
def test_a_model_whose_state_grows_says_that_pieces_gain_nothing(name: str) -> None:
    reason = cannot_carry(_model(name), 64)
    assert reason is not None and "grows with the length" in reason


def test_attention_over_a_window_can_carry() -> None:
    model = _model("transformer", window=8)
    assert cannot_carry(model, 64) is None
    _, expected = _losses(model, LENGTH, "whole")
    for one, other in zip(_losses(model, 16, "exact")[1], expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
