"""Models against independent implementations with copied weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from mambapy.mamba import Mamba as MambaPy
from mambapy.mamba import MambaConfig as MambaPyConfig
from torch import Tensor
from transformers import MambaConfig, MambaForCausalLM

from seqbench.models.backbone import Backbone
from seqbench.models.build import build_model

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


def _copy_mixer(block, mixer) -> None:
    mixer.in_proj.weight.copy_(block.in_proj.weight)
    mixer.conv1d.weight.copy_(block.conv_weight[:, None])
    mixer.conv1d.bias.copy_(block.conv_bias)
    mixer.x_proj.weight.copy_(block.layer.x_proj.weight)
    mixer.dt_proj.weight.copy_(block.layer.dt_proj.weight)
    mixer.dt_proj.bias.copy_(block.layer.dt_proj.bias)
    mixer.A_log.copy_(block.layer.A_log)
    mixer.D.copy_(block.layer.D)
    mixer.out_proj.weight.copy_(block.out_proj.weight)
