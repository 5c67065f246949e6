"""The model contract, over every preset and every block + layer pair that is found."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from seqbench.models.backbone import Backbone
from seqbench.models.build import build_model, describe, options_of, parameter_groups, presets
from seqbench.models.discovery import block_class, block_names, layer_class, layer_names

VOCAB = 11
_S4 = ("lin", "inv", "legs", "real")
_SWITCHES = ("selective_dt", "selective_B", "selective_C")
PAIRS = [f"{block}+{layer}" for block in block_names() for layer in layer_names()]
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in dict.fromkeys([*presets(), *PAIRS])),
    *(("s4", {"init": i, "discretisation": d}) for i in _S4 for d in ("zoh", "bilinear")),
    *(("mamba", {"init": init, "selective_B": False}) for init in ("complex", "half", "random")),
    *(("mamba", {**dict.fromkeys(_SWITCHES, False), name: True}) for name in _SWITCHES),
    ("mamba", dict.fromkeys(_SWITCHES, False)),
    ("mamba", {"discretisation": "zoh"}),
    ("mamba", {"discretisation": "zoh", "init": "complex", "selective_C": False}),
    ("mamba", {"d_conv": 1, "conv_bias": False, "bias": True, "expand": 1}),
    ("h3", {"head_dim": 4, "d_conv": 2}),
    ("transformer", {"window": 5, "positions": "sinusoidal", "tie_embeddings": False}),
    ("transformer", {"window": 1}),
    ("transformer-xpos", {"window": 7}),
    ("hyena", {"order": 3, "filter_bands": 2, "filter_depth": 1}),
    ("none+s6", {"output": "linear", "activation": "silu"}),
    ("none+s4", {"activation": "none"}),
]
IDS = ["-".join([name, *(f"{k}={v}" for k, v in o.items())]) for name, o in VARIANTS]
every_model = pytest.mark.parametrize(("name", "options"), VARIANTS, ids=IDS)


def small(name: str, **options: Any) -> Backbone:
    """A float64 model of two layers."""
    torch.manual_seed(0)
    model = build_model(name, vocab_size=VOCAB, d_model=16, num_layers=2, **options)
    # Initialisations that pass nothing on (a zero bias, a tiny embedding) would hide mistakes.
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model.double().eval()


def tokens(batch: int, length: int) -> torch.Tensor:
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(1))


@every_model
@torch.no_grad()
def test_steps_equal_forward(name: str, options: dict[str, Any]) -> None:
    model, inputs = small(name, **options), tokens(3, 21)
    state, steps = model.initial_state(3), []
    for t in range(inputs.shape[1]):
        logits, state = model.step(inputs[:, t], state)
        steps.append(logits)
    torch.testing.assert_close(torch.stack(steps, 1), model(inputs), rtol=1e-9, atol=1e-9)


@every_model
@torch.no_grad()
def test_pieces_with_a_state_equal_the_whole(name: str, options: dict[str, Any]) -> None:
    model, inputs = small(name, **options), tokens(2, 40)
    state, pieces = model.initial_state(2), []
    for piece in inputs.split([1, 2, 17, 19, 1], 1):
        logits, state = model(piece, state)
        pieces.append(logits)
    logits, _ = model.step(inputs[:, 0], state)  # a state of forward is a state of step
    longer = model(torch.cat([inputs, inputs[:, :1]], 1))
    torch.testing.assert_close(torch.cat(pieces, 1), longer[:, :-1], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(logits, longer[:, -1], rtol=1e-9, atol=1e-9)


@every_model
@torch.no_grad()
def test_the_past_does_not_see_the_future(name: str, options: dict[str, Any]) -> None:
    model, inputs = small(name, **options), tokens(2, 24)
    changed = inputs.clone()
    changed[:, 13] = (changed[:, 13] + 1) % VOCAB
    before, after = model(inputs), model(changed)
    # A Fourier transform leaks rounding into the past, nothing more.
    torch.testing.assert_close(before[:, :13], after[:, :13], rtol=0, atol=1e-12)
    later = slice(13, None) if "window" not in options else slice(13, 14)
    difference = (before[:, later] - after[:, later]).abs().amax(-1)
    assert difference.min() > 1e-9, "a later position is deaf"


@every_model
def test_every_parameter_learns(name: str, options: dict[str, Any]) -> None:
    model, inputs = small(name, **options), tokens(2, 12)
    torch.nn.functional.cross_entropy(model(inputs).flatten(0, 1), inputs.flatten()).backward()
    idle = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert not idle


@every_model
@torch.no_grad()
def test_state_size_counts_the_state(name: str, options: dict[str, Any]) -> None:
    model = small(name, **options)
    _, state = model(tokens(2, 9), model.initial_state(2))
    leaves = torch.utils._pytree.tree_leaves(state)
    assert all(leaf.shape[0] == 2 for leaf in leaves)
    numbers = sum(leaf[0].numel() * (2 if leaf.is_complex() else 1) for leaf in leaves)
    assert model.state_size(9) == numbers


@every_model
def test_it_trains_under_bfloat16_autocast(name: str, options: dict[str, Any]) -> None:
    model, inputs = small(name, **options).float(), tokens(2, 12)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(inputs).float().logsumexp(-1).mean()
    loss.backward()
    exact = model(inputs).logsumexp(-1).mean()
    torch.testing.assert_close(loss, exact, rtol=0.03, atol=0.03)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@every_model
def test_it_builds_without_memory(name: str, options: dict[str, Any]) -> None:
    with torch.device("meta"):
        model = build_model(name, vocab_size=50_000, d_model=4096, num_layers=2, **options)
    assert all(p.is_meta for p in model.parameters())


@pytest.mark.parametrize("name", presets())
def test_weight_decay_spares_what_it_must(name: str) -> None:
    model = small(name)
    decay, spared = parameter_groups(model, 0.1)
    assert (decay["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    assert len(decay["params"]) + len(spared["params"]) == len(list(model.parameters()))
    ids = {id(p) for p in spared["params"]}
    for path, parameter in model.named_parameters():
        kept = (
            path.rsplit(".", 1)[-1] in {"bias", "A_log", "D", "log_dt", "A_imag"} or "norm" in path
        )
        assert not kept or id(parameter) in ids, path
        assert not path.endswith(("proj.weight", "embedding.weight")) or id(parameter) not in ids


@pytest.mark.parametrize("name", presets())
def test_descriptions_are_complete(name: str) -> None:
    info = describe(name)
    assert info.summary and len(info.summary) < 100
    assert "O(" in info.complexity
    assert info.block in block_names() and info.layer in layer_names()
    assert info.options == options_of(name)
    assert info.parameters > 0
    grows = info.state_size[65536] > info.state_size[1024]
    assert grows == info.complexity.endswith("O(L)")
    torch.manual_seed(3)
    plain = build_model(name, vocab_size=VOCAB, d_model=16, num_layers=1)
    torch.manual_seed(3)
    spelt = build_model(name, vocab_size=VOCAB, d_model=16, num_layers=1, **info.options)
    for a, b in zip(plain.parameters(), spelt.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["block", "layer"])
def test_configs_are_frozen_and_keyword_only(kind: str) -> None:
    names, find = (block_names(), block_class) if kind == "block" else (layer_names(), layer_class)
    for name in names:
        config = find(name).Config
        assert config.__dataclass_params__.frozen, name  # type: ignore[attr-defined]
        assert all(field.kw_only for field in dataclasses.fields(config)), name
