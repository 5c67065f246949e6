"""Selection made visible: Δ along a sequence, and layers unrolled into attention-like matrices."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from seqbench.models.backbone import Backbone
from seqbench.models.base import ModelError
from seqbench.models.layers.s4 import S4
from seqbench.models.layers.s6 import S6
from seqbench.models.unet import UNet


@dataclass(frozen=True, kw_only=True)
class LayerTrace:
    """One layer on one sequence of L tokens; R rows are the positions asked about."""

    delta_LD: Tensor  # the step sizes; constant along L where Δ is not selective
    weights_RLD: Tensor  # y[row] = sum over s of weights[row, s] x[s] + D x[row], per channel

    def attention_RL(self) -> Tensor:
        """How strongly each row reads each position: mean size over channels, rows summing to 1."""
        size_RL = self.weights_RLD.abs().mean(-1)
        return size_RL / size_RL.sum(-1, keepdim=True).clamp(min=1e-30)


@torch.no_grad()
def trace(model: Backbone, tokens_L: Tensor, rows: Tensor) -> list[LayerTrace]:
    """What each S6 or S4 layer of the model does on one sequence (L), at the positions `rows` (R).

    Raises ModelError for a model with neither, and for a U-Net, whose layers see pooled positions.
    """
    if any(isinstance(m, UNet) for m in model.modules()):
        raise ModelError("a U-Net's layers see pooled positions: there is no selection to show")
    layers = [m for m in model.modules() if isinstance(m, S4 | S6)]
    if not layers:
        raise ModelError("this model has no s6 or s4 layer, so there is no selection to show")
    inputs: list[Tensor] = []
    hooks = [
        layer.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0][0]))
        for layer in layers
    ]
    training = model.training
    try:
        model.eval()(tokens_L[None])
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return [
        _trace_s6(layer, x_LD, rows) if isinstance(layer, S6) else _trace_s4(layer, x_LD, rows)
        for layer, x_LD in zip(layers, inputs, strict=True)
    ]


def _trace_s6(layer: S6, x_LD: Tensor, rows: Tensor) -> LayerTrace:
    delta, B, C, A = layer.dynamics(x_LD[None])
    delta_LD = delta[0]
    L = delta_LD.shape[0]
    B = B[0][:, None] if B.ndim == 3 else B[None]  # (L, 1, M) or (1, D, M)
    C = C[0][rows][:, None] if C.ndim == 3 else C[None]
    time_LD = delta_LD.cumsum(0)
    elapsed_RLD = time_LD[rows][:, None] - time_LD
    weights_RLD = torch.zeros_like(elapsed_RLD)
    for n in range(A.shape[1]):  # (R, L, D) at a time, never (R, L, D, M)
        decay = torch.exp(elapsed_RLD.clamp(min=0) * A[:, n])
        if layer.config.discretisation == "zoh":
            write_LD = (torch.exp(delta_LD * A[:, n]) - 1) / A[:, n] * B[..., n]
        else:
            write_LD = delta_LD * B[..., n]
        product = C[..., n][:, None] * decay * write_LD
        weights_RLD += 2 * product.real if layer.complex else product
    return LayerTrace(delta_LD=delta_LD, weights_RLD=_causal(weights_RLD, rows, L))


def _trace_s4(layer: S4, x_LD: Tensor, rows: Tensor) -> LayerTrace:
    L = x_LD.shape[0]
    kernel_LD = layer.kernel(L).T
    lag_RL = (rows[:, None] - torch.arange(L, device=rows.device)).clamp(min=0)
    return LayerTrace(
        delta_LD=torch.exp(layer.log_dt).expand(L, -1),
        weights_RLD=_causal(kernel_LD[lag_RL], rows, L),
    )


def _causal(weights_RLD: Tensor, rows: Tensor, length: int) -> Tensor:
    seen_RL = torch.arange(length, device=rows.device) <= rows[:, None]
    return weights_RLD * seen_RL[..., None]
