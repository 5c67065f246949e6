"""Models against independent implementations with copied weights."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from mambapy.mamba import Mamba as MambaPy
from mambapy.mamba import MambaConfig as MambaPyConfig
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, MambaConfig, MambaForCausalLM

from seqbench.models.backbone import Backbone
from seqbench.models.build import build_model
from seqbench.models.discovery import layer_class

VOCAB, WIDTH, LAYERS = 13, 24, 2


def mamba() -> Backbone:
    torch.manual_seed(0)
    model = build_model(
        "mamba", vocab_size=VOCAB, d_model=WIDTH, num_layers=LAYERS, d_state=5, dt_rank=3
    ).double()
    for parameter in model.parameters():  # so that no weight is one or zero
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def tokens(length: int = 19) -> Tensor:
    return torch.randint(VOCAB, (2, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_mamba_is_transformers_mamba() -> None:
    ours = mamba()
    config = MambaConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        state_size=5,
        time_step_rank=3,
    )
    theirs = MambaForCausalLM(config).double().eval()
    theirs.backbone.embeddings.weight.copy_(ours.embedding.weight)
    theirs.backbone.norm_f.weight.copy_(ours.final_norm.weight)
    for residual, layer in zip(ours.layers, theirs.backbone.layers, strict=True):
        layer.norm.weight.copy_(residual.norm.weight)
        _copy_mixer(residual.block, layer.mixer)
    theirs.tie_weights()
    expected = theirs(tokens(), use_cache=False).logits
    # Both peers keep A and the state in float32.
    torch.testing.assert_close(ours(tokens()), expected.double(), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_mamba_is_mambapys_mamba() -> None:
    ours = mamba()
    config = MambaPyConfig(d_model=WIDTH, n_layers=LAYERS, d_state=5, dt_rank=3)
    theirs = MambaPy(config).double()
    for residual, layer in zip(ours.layers, theirs.layers, strict=True):
        layer.norm.weight.copy_(residual.norm.weight)
        _copy_mixer(residual.block, layer.mixer)
    x = theirs(ours.embedding(tokens()))
    x = F.rms_norm(x, (WIDTH,), ours.final_norm.weight, 1e-5)
    expected = x @ ours.embedding.weight.T
    # Both peers keep A and the state in float32.
    torch.testing.assert_close(ours(tokens()), expected.double(), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_transformer_plus_plus_is_llama() -> None:
    torch.manual_seed(0)
    ours = build_model(
        "transformer++", vocab_size=VOCAB, d_model=24, num_layers=LAYERS, num_heads=3
    ).double()
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=24,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=3,
        num_key_value_heads=3,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        pad_token_id=None,
    )
    theirs = LlamaForCausalLM(config).double().eval()
    theirs.model.embed_tokens.weight.copy_(ours.embedding.weight)
    theirs.model.norm.weight.copy_(ours.final_norm.weight)
    for residual, layer in zip(ours.layers, theirs.model.layers, strict=True):
        attention, mlp = residual.block.layer, residual.block.mlp
        layer.input_layernorm.weight.copy_(residual.norm.weight)
        layer.post_attention_layernorm.weight.copy_(residual.mlp_norm.weight)
        names = ("q_proj", "k_proj", "v_proj")
        for name, weight in zip(names, attention.in_proj.weight.chunk(3), strict=True):
            getattr(layer.self_attn, name).weight.copy_(weight)
        layer.self_attn.o_proj.weight.copy_(attention.out_proj.weight)
        layer.mlp.gate_proj.weight.copy_(mlp.gate.weight)
        layer.mlp.up_proj.weight.copy_(mlp.up.weight)
        layer.mlp.down_proj.weight.copy_(mlp.down.weight)
    theirs.tie_weights()
    expected = theirs(tokens(), use_cache=False).logits
    # Llama keeps its norms in float32.
    torch.testing.assert_close(ours(tokens()), expected.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*")  # at its import
@torch.no_grad()
def test_s5_is_s5_pytorchs() -> None:
    from s5.s5_model import S5SSM

    torch.manual_seed(0)
    layer_type = layer_class("s5")
    ours = layer_type(6, layer_type.Config(d_state=8), d_model=6).double()
    A = torch.complex(-ours.A_log.exp(), ours.A_imag)
    eye = torch.eye(4, dtype=torch.complex64)
    theirs = S5SSM(A, eye, eye, 6, 4, 1e-3, 0.1, bcInit="dense")
    theirs.Lambda = torch.nn.Parameter(A)
    theirs.B = torch.nn.Parameter(torch.stack(ours.B.chunk(2), -1))
    # They keep no conjugates and take the real part; we count each pair once, and twice.
    theirs.C = torch.nn.Parameter(2 * torch.complex(*ours.C.chunk(2, 1)))
    theirs.D = torch.nn.Parameter(ours.D)
    theirs.log_step = torch.nn.Parameter(ours.log_dt)
    x = torch.randn(50, 6, dtype=torch.float64)
    torch.testing.assert_close(ours(x[None])[0], theirs(x).real, rtol=1e-9, atol=1e-9)


def _copy_mixer(block, mixer) -> None:
    mixer.in_proj.weight.copy_(block.in_proj.weight)
    mixer.conv1d.weight.copy_(block.conv_weight[:, None])
    mixer.conv1d.bias.copy_(block.conv_bias)
    mixer.x_proj.weight.copy_(block.layer.x_proj.weight)
    mixer.dt_proj.weight.copy_(block.layer.dt_proj.weight)
    mixer.dt_proj.bias.copy_(block.layer.dt_bias)
    mixer.A_log.copy_(block.layer.A_log)
    mixer.D.copy_(block.layer.D)
    mixer.out_proj.weight.copy_(block.out_proj.weight)
