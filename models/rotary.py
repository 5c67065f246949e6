"""Rotary positions, in the form that turns the two halves of a head (RoPE: Su et al. 2021)."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(x_BLHW: Tensor, position: Tensor, base: float = 10000.0) -> Tensor:
    """Turn pair (i, i + W/2) of each head by position * base^(-2i/W); position (L) or (B, L)."""
    half = x_BLHW.shape[-1] // 2
    rate = torch.arange(half, device=x_BLHW.device, dtype=torch.float32) / half
    # Whatever the dtype of x: bfloat16 positions would be wrong from 256 on.
    angle = position[..., None] * base**-rate
    cos, sin = (f(angle)[..., None, :].to(x_BLHW.dtype) for f in (torch.cos, torch.sin))
    first, second = x_BLHW.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
