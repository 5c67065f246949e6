"""The model contract, over every preset and every block + layer pair that is found."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from seqbench.models.build import build_model, describe, options_of, parameter_groups, presets
from seqbench.models.discovery import block_names, layer_names
from seqbench.suite.contract import Rule, apply, name_of
from seqbench.suite.contract.models import RULES, VOCAB, Subject, config_keys_live

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
    ("sashimi", {"pool": 2}),
    ("sashimi", {"backbone": "stack"}),
    ("mamba", {"backbone": "unet", "pool": 2, "init": "complex"}),
    ("mamba", {"backbone": "unet", "pool": 3, "pools": 1, "widen": 1, "positions": "sinusoidal"}),
    ("h3+hyena", {"backbone": "unet", "pool": 2}),
    ("transformer++", {"backbone": "unet", "pool": 5, "pools": 1, "center": "mamba"}),
    (
        "mamba",
        {
            "backbone": "unet",
            "pool": 2,
            "center": "transformer+attention",
            "center_options": {"mlp_expand": 1.0},
        },
    ),
]
IDS = ["-".join([name, *(f"{k}={v}" for k, v in o.items())]) for name, o in VARIANTS]
every_model = pytest.mark.parametrize(("name", "options"), VARIANTS, ids=IDS)


@pytest.mark.parametrize("rule", [r for r in RULES if r is not config_keys_live], ids=name_of)
@every_model
def test_it_keeps(name: str, options: dict[str, Any], rule: Rule[Subject]) -> None:
    finding = apply(rule, Subject(name, options))
    assert finding.status == "ok", finding.note


@pytest.mark.parametrize("name", presets())
def test_every_option_changes_something(name: str) -> None:
    finding = apply(config_keys_live, Subject(name))
    assert finding.status == "ok", finding.note


@pytest.mark.parametrize("name", presets())
def test_weight_decay_spares_what_it_must(name: str) -> None:
    model = Subject(name).model()
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
