"""Depthwise causal convolution over (B, L, D), with bias and SiLU, continuing from a state."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Activation = Literal["silu"] | None


def causal_conv1d(
    x_BLD: Tensor,
    weight_DK: Tensor,
    bias_D: Tensor | None = None,
    *,
    activation: Activation = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """y[t] = activation(bias + Σ_k weight[k] x[t-K+1+k]); state: the last inputs (B, K-1, D)."""
    B, L, D = x_BLD.shape
    K = weight_DK.shape[1]
    if initial_state is None:
        initial_state = x_BLD.new_zeros(B, K - 1, D)
    padded = torch.cat([initial_state.to(x_BLD.dtype), x_BLD], 1)
    y = padded[:, :L] * weight_DK[:, 0]
    for k in range(1, K):
        y = y + padded[:, k : k + L] * weight_DK[:, k]
    if bias_D is not None:
        y = y + bias_D
    if activation == "silu":
        y = F.silu(y)
    return (y, padded[:, L:]) if return_final_state else y


def causal_conv1d_step(
    state: Tensor,
    x_BD: Tensor,
    weight_DK: Tensor,
    bias_D: Tensor | None = None,
    *,
    activation: Activation = None,
) -> tuple[Tensor, Tensor]:
    """One time step: y (B, D) and the next state (B, K-1, D)."""
    y, state = causal_conv1d(
        x_BD[:, None],
        weight_DK,
        bias_D,
        activation=activation,
        initial_state=state,
        return_final_state=True,
    )
    return y[:, 0], state
