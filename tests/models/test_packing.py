"""Packed documents: a reset makes the whole model forget, and models that cannot say so."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from seqbench.models.base import ModelError, cannot_reset
from seqbench.models.build import build_model, presets

VOCAB = 11
LENGTHS = ((5, 1, 9, 2, 13), (17, 13), (30,), (1, 1, 1, 3, 24))  # of the documents in each row
ABLE: list[tuple[str, dict[str, Any]]] = [
    ("mamba", {}),
    ("mamba", {"init": "complex"}),
    ("mamba", {"discretisation": "zoh"}),
    ("mamba", {"selective_B": False, "d_conv": 1}),
    ("s6", {}),
    ("h3+s6", {"head_dim": 2}),
    ("transformer+s6", {"mlp": "swiglu"}),
    ("mamba+attention", {}),
    ("transformer", {}),
    ("transformer++", {"window": 4}),
    ("transformer-absolute", {}),
    ("transformer-xpos", {}),
]
able = pytest.mark.parametrize(("name", "options"), ABLE)
# Rotations count from the window's start, in float32: their differences are right to its rounding.
ROTATES = {"transformer", "transformer++", "transformer-xpos", "mamba+attention"}


def made(name: str, options: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    model = build_model(name, vocab_size=VOCAB, d_model=32, num_layers=2, **options)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model.double()


def packed() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    tokens_BL = torch.randint(VOCAB, (len(LENGTHS), 30))
    reset_BL = torch.zeros(tokens_BL.shape, dtype=torch.bool)
    for row, lengths in zip(reset_BL, LENGTHS, strict=True):
        row[torch.tensor([0, *lengths]).cumsum(0)[:-1]] = True
    return tokens_BL, reset_BL


def alone(model: Any, tokens_BL: Tensor) -> Tensor:
    """Every document by itself, put back where it was."""
    rows = [
        torch.cat([model(document[None])[0] for document in row.split(lengths)])
        for row, lengths in zip(tokens_BL, LENGTHS, strict=True)
    ]
    return torch.stack(rows)


@able
def test_packed_with_reset_is_each_document_alone(name: str, options: dict[str, Any]) -> None:
    model, (tokens, reset) = made(name, options), packed()
    assert cannot_reset(model) is None
    together, apart = model(tokens, reset=reset), alone(model, tokens)
    near = 1e-5 if name in ROTATES else 1e-9
    torch.testing.assert_close(together, apart, rtol=near, atol=near)
    assert not torch.allclose(model(tokens), apart, atol=1e-3)  # without it they do mix
    at = torch.rand(tokens.shape) < 0.5
    torch.testing.assert_close(model(tokens, at=at, reset=reset), together[at])


@able
def test_gradients_are_those_of_the_documents_alone(name: str, options: dict[str, Any]) -> None:
    model, (tokens, reset) = made(name, options), packed()
    weight = torch.randn(*tokens.shape, VOCAB, dtype=torch.float64)

    def gradients(logits: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad((logits * weight).sum(), list(model.parameters())))

    for one, other in zip(
        gradients(model(tokens, reset=reset)), gradients(alone(model, tokens)), strict=True
    ):
        near = 1e-4 if name in ROTATES else 1e-8
        torch.testing.assert_close(one, other, rtol=near, atol=near)


@pytest.mark.parametrize(("name", "options"), ABLE[:6])
def test_pieces_that_carry_the_state_reset_too(name: str, options: dict[str, Any]) -> None:
    model, (tokens, reset) = made(name, options), packed()
    state, pieces = model.initial_state(len(tokens)), []
    for some in torch.arange(30).split([1, 2, 9, 18]):
        logits, state = model(tokens[:, some], state, reset=reset[:, some])
        pieces.append(logits)
    torch.testing.assert_close(torch.cat(pieces, 1), alone(model, tokens), rtol=1e-9, atol=1e-9)


def test_counted_positions_start_anew_and_are_carried() -> None:
    model, (tokens, reset) = made("mamba", {"positions": "sinusoidal"}), packed()
    state = model.initial_state(len(tokens))
    _, state = model(tokens, state, reset=reset)
    assert state["position"].tolist() == [lengths[-1] for lengths in LENGTHS]
    torch.testing.assert_close(
        model(tokens, reset=reset), alone(model, tokens), rtol=1e-9, atol=1e-9
    )


def test_attention_with_a_state_says_that_it_cannot() -> None:
    model, (tokens, reset) = made("transformer", {}), packed()
    with pytest.raises(ModelError, match="within a whole sequence alone"):
        model(tokens, model.initial_state(len(tokens)), reset=reset)


@pytest.mark.parametrize("name", presets())
def test_every_preset_can_or_says_what_cannot(name: str) -> None:
    reason = cannot_reset(build_model(name, vocab_size=VOCAB, d_model=32, num_layers=1))
    able = {"mamba", "s6", "h3+s6"} | {n for n in presets() if n.startswith("transformer")}
    assert (reason is None) == (name in able)
    assert reason is None or "cannot forget in the middle of a sequence" in reason
