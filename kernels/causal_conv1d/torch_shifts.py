"""The short convolution in plain PyTorch, on any device: one fused multiply-add a tap.

Depthwise conv1d itself wants (B, D, L), and its backward is slow on a CPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def refuse(**call: Any) -> str | None:
    """Takes every call."""
    return None


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """y (B, L, D) and the final state (B, K-1, D), both in x's dtype."""
    length = x.shape[1]
    inputs = _inputs(x, weight, initial_state)
    y = _sum(inputs, weight, bias, length)
    if activation == "silu":
        y = F.silu(y)
    return y.to(x.dtype), inputs[:, length:].to(x.dtype, copy=True).contiguous()


def backward(
    dy: Tensor,
    dfinal_state: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    initial_state: Tensor | None,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Gradients of x, weight, bias, initial_state; None if not needed."""
    needs_x, needs_weight, needs_bias, needs_initial = needs
    length, taps = x.shape[1], weight.shape[1]
    inputs = _inputs(x, weight, initial_state)
    dy = dy.to(weight.dtype)
    if activation == "silu":
        y = _sum(inputs, weight, bias, length)
        gate = torch.sigmoid(y)
        dy = dy * gate * (1 + y * (1 - gate))
    dx = dweight = dbias = dinitial = None
    if needs_x or needs_initial:
        dinputs = torch.zeros_like(inputs)
        for k in range(taps):
            dinputs[:, k : k + length].addcmul_(dy, weight[:, k])
        if dfinal_state is not None:
            dinputs[:, length:] += dfinal_state
        dinputs = dinputs.to(x.dtype)
        dx = dinputs[:, taps - 1 :].contiguous() if needs_x else None
        dinitial = dinputs[:, : taps - 1].clone() if needs_initial else None
    if needs_weight:
        sums = [(dy * inputs[:, k : k + length]).sum((0, 1)) for k in range(taps)]
        dweight = torch.stack(sums, 1)
    if needs_bias:
        dbias = dy.sum((0, 1))
    return dx, dweight, dbias, dinitial


def _inputs(x: Tensor, weight: Tensor, initial_state: Tensor | None) -> Tensor:
    """The initial state and x behind each other (B, K-1+L, D), in the precision of the sums."""
    x = x.to(weight.dtype)
    if initial_state is None:
        return F.pad(x, (0, 0, weight.shape[1] - 1, 0))
    return torch.cat([initial_state.to(weight.dtype), x], 1)


def _sum(inputs: Tensor, weight: Tensor, bias: Tensor | None, length: int) -> Tensor:
    y = inputs[:, :length] * weight[:, 0]
    for k in range(1, weight.shape[1]):
        y.addcmul_(inputs[:, k : k + length], weight[:, k])
    return y if bias is None else y.add_(bias)
