"""RMSNorm in plain PyTorch, on any device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def refuse(**call: Any) -> str | None:
    """Takes every call."""
    return None


def forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """y in x's dtype, and 1 / sqrt(mean(x²) + eps) of every row (R)."""
    wide = x.to(weight.dtype)
    scale = torch.rsqrt((wide * wide).mean(-1, keepdim=True) + eps)
    return (wide * scale * weight).to(x.dtype).contiguous(), scale.flatten().clone()


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, scale: Tensor, needs: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """Gradients of x and weight; None if not needed."""
    scale = scale.view(*x.shape[:-1], 1)
    normed, dy = x.to(weight.dtype) * scale, dy.to(weight.dtype)
    dx = dweight = None
    if needs[0]:
        dnormed = dy * weight
        along = (dnormed * normed).mean(-1, keepdim=True)
        dx = ((dnormed - normed * along) * scale).to(x.dtype).contiguous()
    if needs[1]:
        dweight = (dy * normed).flatten(0, -2).sum(0) if x.ndim > 1 else dy * normed
    return dx, dweight
