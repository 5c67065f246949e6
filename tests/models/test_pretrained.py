"""Checkpoints written by transformers load here, and the other way round; damaged ones are one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import MambaConfig, MambaForCausalLM

from seqbench.models.backbone import Backbone
from seqbench.models.base import ModelError, parameter_groups
from seqbench.models.build import build_model
from seqbench.models.pretrained import load_pretrained, save_pretrained

OPTIONS: list[dict[str, Any]] = [
    {},
    {"tie_word_embeddings": False, "use_bias": True, "use_conv_bias": False},
    {
        "state_size": 5,
        "conv_kernel": 3,
        "expand": 3,
        "time_step_rank": 7,
        "layer_norm_epsilon": 0.1,
    },
]


def tokens() -> torch.Tensor:
    return torch.randint(40, (2, 19), generator=torch.Generator().manual_seed(1))


def theirs(**options: Any) -> MambaForCausalLM:
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=40, hidden_size=24, num_hidden_layers=2, **options)
    model = MambaForCausalLM(config).eval()
    for parameter in model.parameters():  # so that no weight is one or zero
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def ours(**options: Any) -> Backbone:
    torch.manual_seed(0)
    model = build_model("mamba", vocab_size=40, d_model=24, num_layers=2, **options)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("options", OPTIONS, ids=["stock", "untied", "odd"])
@torch.no_grad()
def test_we_load_what_transformers_saves(tmp_path: Path, options: dict[str, Any]) -> None:
    saved = theirs(**options)
    saved.save_pretrained(tmp_path)
    model = load_pretrained(tmp_path)
    logits = saved(tokens(), use_cache=False).logits
    torch.testing.assert_close(model(tokens()), logits, rtol=1e-4, atol=1e-4)
    assert model.num_parameters == sum(p.numel() for p in saved.parameters())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tie_embeddings": False, "bias": True, "conv_bias": False},
        {"d_state": 5, "d_conv": 3, "expand": 3, "dt_rank": 7, "norm_eps": 0.1},
    ],
    ids=["stock", "untied", "odd"],
)
@torch.no_grad()
def test_transformers_loads_what_we_save(tmp_path: Path, options: dict[str, Any]) -> None:
    saved = ours(**options)
    save_pretrained(saved, tmp_path)
    model, report = MambaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    logits = model.eval()(tokens(), use_cache=False).logits
    torch.testing.assert_close(saved(tokens()), logits, rtol=1e-4, atol=1e-4)
    again = load_pretrained(tmp_path)
    torch.testing.assert_close(again(tokens()), saved(tokens()), rtol=0, atol=0)


def test_a_loaded_model_trains_on(tmp_path: Path) -> None:
    saved = ours()
    save_pretrained(saved, tmp_path)
    model = load_pretrained(tmp_path)
    sizes, expected = (
        [len(group["params"]) for group in parameter_groups(m, 0.1)] for m in (model, saved)
    )
    assert sizes == expected
    model(tokens()).logsumexp(-1).mean().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert model.head.weight is model.embedding.weight


@torch.no_grad()
def test_shards_and_half_precision_are_read(tmp_path: Path) -> None:
    saved = theirs()
    saved.bfloat16().save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    model = load_pretrained(tmp_path)
    logits = saved.float()(tokens(), use_cache=False).logits
    torch.testing.assert_close(model(tokens()), logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("no config", ["config.json", "model.safetensors"]),
        ("not json", ["config.json is not JSON"]),
        ("wrong type", ["model_type is 'llama'", "'mamba'"]),
        ("no width", ["config.json lacks 'hidden_size'"]),
        ("wrong width", ["shape", "config.json says"]),
        ("no weights", ["model.safetensors", "safetensors can be loaded"]),
        ("cut weights", ["model.safetensors is damaged"]),
        ("lost tensor", ["lack the tensor 'backbone.layers.1.mixer.D'"]),
    ],
)
def test_damaged_checkpoints_are_one_line(tmp_path: Path, damage: str, words: list[str]) -> None:
    save_pretrained(ours(), tmp_path)
    config, weights = tmp_path / "config.json", tmp_path / "model.safetensors"
    values = json.loads(config.read_text())
    if damage == "no config":
        config.unlink()
    elif damage == "not json":
        config.write_text(config.read_text()[:100])
    elif damage == "wrong type":
        config.write_text(json.dumps({**values, "model_type": "llama"}))
    elif damage == "no width":
        del values["hidden_size"]
        config.write_text(json.dumps(values))
    elif damage == "wrong width":
        config.write_text(json.dumps({**values, "hidden_size": 48, "intermediate_size": 96}))
    elif damage == "no weights":
        weights.unlink()
    elif damage == "cut weights":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif damage == "lost tensor":
        tensors = load_file(weights)
        del tensors["backbone.layers.1.mixer.D"]
        save_file(tensors, weights)
    with pytest.raises(ModelError) as error:
        load_pretrained(tmp_path)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_no_folder_and_no_repository_is_one_line() -> None:
    with pytest.raises(ModelError, match=r"no folder 'nowhere'.*OWNER/NAME"):
        load_pretrained("nowhere")


@pytest.mark.parametrize(
    ("name", "options"),
    [("s4", {}), ("mamba+s4", {}), ("mamba", {"selective_B": False}), ("mamba", {"norm": "layer"})],
)
def test_only_a_stock_mamba_is_saved(tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    model = build_model(name, vocab_size=5, d_model=8, num_layers=1, **options)
    with pytest.raises(ModelError, match="stock Mamba"):
        save_pretrained(model, tmp_path)
    assert not list(tmp_path.iterdir())
