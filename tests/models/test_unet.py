"""The U-Net: its size, what each position hears across the poolings, decoding, and its options."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from seqbench.models.backbone import Backbone
from seqbench.models.base import ModelError, cannot_reset
from seqbench.models.build import build_model, options_of
from seqbench.models.layers.attention import Attention
from seqbench.models.layers.s6 import S6
from seqbench.models.pretrained import save_pretrained
from seqbench.models.segments import segmented_loss
from seqbench.models.selection import trace
from seqbench.models.unet import UNet
from seqbench.suite.configuration import resolve
from seqbench.suite.experiment import Request

LENGTH = 16 * 16 * 2 + 39  # two words of the centre's come back, and a group is left open


def unet(name: str = "mamba", **options: Any) -> Backbone:
    torch.manual_seed(0)
    small = {"vocab_size": 11, "d_model": 8, "num_layers": 1, "backbone": "unet", **options}
    model: Backbone = build_model(name, **small)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model.double().eval()


def tokens(length: int = LENGTH) -> torch.Tensor:
    return torch.randint(11, (2, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("name", "options", "millions"),
    [("mamba", {"backbone": "unet", "init": "complex"}, 3.5), ("sashimi", {}, 3.5)],
)
def test_the_papers_settings_give_its_size(
    name: str, options: dict[str, Any], millions: float
) -> None:
    with torch.device("meta"):
        model = build_model(name, vocab_size=256, d_model=64, num_layers=3, **options)
    assert model.num_parameters / 1e6 == pytest.approx(millions, abs=0.15)
    (body,) = model.layers
    stages = []
    while body is not None:
        stages += [(body.width, body.down)] + ([(body.width, body.up)] if body.inner else [])
        body = body.inner
    assert sorted(width for width, _ in stages) == [64, 64, 128, 128, 256]
    assert all(len(blocks) == 3 for _, blocks in stages)


@torch.no_grad()
@pytest.mark.parametrize("name", ["mamba", "sashimi"])
def test_decoding_and_pieces_equal_forward_beyond_the_centres_period(name: str) -> None:
    model = unet(name, **({"init": "complex"} if name == "mamba" else {}))
    whole = model(tokens())
    state, steps = model.initial_state(2), []
    for t in range(LENGTH):
        logits, state = model.step(tokens()[:, t], state)
        steps.append(logits)
    torch.testing.assert_close(torch.stack(steps, 1), whole, rtol=1e-9, atol=1e-9)

    state, pieces = model.initial_state(2), []
    for piece in tokens().split([15, 1, 17, 300, 0, LENGTH - 333], 1):
        logits, state = model(piece, state)
        pieces.append(logits)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-9, atol=1e-9)
    numbers = sum(t[0].numel() * (2 if t.is_complex() else 1) for t in _leaves(state))
    assert model.state_size(LENGTH) == numbers


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 15, 16, 17, 255, 256, 257, 511])
def test_any_length_is_the_beginning_of_a_longer_one(length: int) -> None:
    model = unet()
    torch.testing.assert_close(
        model(tokens()[:, :length]), model(tokens())[:, :length], rtol=1e-9, atol=1e-9
    )


def test_the_centre_is_heard_a_group_later_and_not_before() -> None:
    """Through the centre alone: the outer stages' blocks are taken out, and the paths around it."""
    model = unet(pool=4)
    (outer,) = model.layers
    assert isinstance(outer, UNet) and outer.inner is not None and outer.inner.inner is not None
    seen: list[torch.Tensor] = []
    outer.inner.inner.register_forward_hook(lambda _, x, y: seen.append(y))
    embedded = torch.randn(1, 80, 8, dtype=torch.float64, requires_grad=True)
    outer(embedded)
    (centre,) = seen
    assert centre.shape == (1, 4, 32)  # of the five groups of 16 the last tells nobody
    (gradient,) = torch.autograd.grad(centre[0, 2].sum(), embedded)
    heard = gradient[0].abs().sum(-1)
    assert heard[:48].min() > 0 and heard[48:].max() == 0


@pytest.mark.parametrize("segment", [7, 64])
def test_gradients_through_pieces_are_those_of_the_whole(segment: int) -> None:
    model = unet(pool=4, init="complex")

    def loss_of(logits: torch.Tensor, some: slice) -> torch.Tensor:
        return (logits * targets[:, some]).sum()

    targets = torch.randn(2, 80, 11, dtype=torch.float64)
    whole = torch.autograd.grad(loss_of(model(tokens(80)), slice(0, 80)), list(model.parameters()))
    loss = segmented_loss(model, loss_of, tokens(80), segment=segment)
    pieces = torch.autograd.grad(loss, list(model.parameters()))
    for (name, _), one, other in zip(model.named_parameters(), pieces, whole, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-9, msg=name)


def test_packed_documents_are_refused() -> None:
    assert "UNet cannot forget" in str(cannot_reset(unet()))


def test_the_centre_takes_a_block_and_options_of_its_own() -> None:
    model = unet(center="transformer+attention", center_options={"mlp_expand": 1.0}, pools=1)
    (outer,) = model.layers
    assert isinstance(outer, UNet) and outer.inner is not None
    assert any(isinstance(m, Attention) for m in outer.inner.modules())
    assert outer.inner.down[0].block.mlp.up.out_features == 16  # as wide as the centre itself
    assert not any(isinstance(m, Attention) for m in [*outer.down.modules(), *outer.up.modules()])

    model = unet(init="complex", selective_dt=False, center_options={"selective_dt": True})
    layers = [m for m in model.modules() if isinstance(m, S6)]
    assert [m.config.selective_dt for m in layers] == [False, False, True, False, False]
    assert all(m.complex for m in layers)  # what the centre's options leave out is as outside
    assert layers[2].rank == 2  # of the centre's width, 32


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("mamba", {"backbone": "unett"}, "backbone='unett' is not valid: must be one of stack, un"),
        ("mamba", {"backbone": "unet", "pool": 1}, "pool=1 is not valid: must be 2 or more"),
        ("mamba", {"pool": 4}, "model 'mamba' has no option 'pool'"),
        ("mamba", {"backbone": "unet", "center": "mambo"}, "unknown model 'mambo' (did you mean"),
        (
            "mamba",
            {"backbone": "unet", "center_options": {"d_stat": 8}},
            "center_options has no option 'd_stat' (did you mean 'd_state'",
        ),
        ("mamba", {"backbone": "unet", "center_options": {"d_state": "8"}}, "d_state='8' is not"),
    ],
)
def test_wrong_options_are_one_line(name: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ModelError, match=re.escape(said)) as caught:
        build_model(name, vocab_size=11, d_model=8, num_layers=1, **options)
    assert "\n" not in str(caught.value)


def test_a_stack_is_the_same_cell_whether_it_is_named_or_not() -> None:
    assert "backbone" not in options_of("mamba") and options_of("sashimi")["backbone"] == "unet"

    def cell(model: str, **settings: Any) -> Any:
        named = {f"model.{k}": v for k, v in settings.items()}
        return resolve(Request(task="piano", model=model, settings=named), 0)

    assert cell("mamba", backbone="stack").digest == cell("mamba").digest
    assert cell("mamba", backbone="unet").model_config["pool"] == 16
    assert cell("sashimi", backbone="stack").model_config["backbone"] == "stack"


def test_what_a_unet_cannot_do_is_said(tmp_path: Any) -> None:
    with pytest.raises(ModelError, match="U-Net's layers see pooled positions"):
        trace(unet(), tokens()[0], torch.tensor([3]))
    with pytest.raises(ModelError, match="only a stock Mamba"):
        save_pretrained(unet(), tmp_path)


def _leaves(state: Any) -> list[torch.Tensor]:
    if isinstance(state, torch.Tensor):
        return [state]
    parts = state.values() if isinstance(state, dict) else state
    return [leaf for part in parts for leaf in _leaves(part)]
