"""The short convolution as a plain sum over its taps: the oracle.

Shapes: B batch, L length, D width, K taps. Autograd works through it, in any precision.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def refuse(**call: Any) -> str | None:
    """Takes every call."""
    return None


def convolve(
    x_BLD: Tensor,
    weight_DK: Tensor,
    bias_D: Tensor | None,
    activation: str | None,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """y and the final state (B, K-1, D), both in x's dtype."""
    batch, length, width = x_BLD.shape
    taps = weight_DK.shape[1]
    if initial_state is None:
        initial_state = x_BLD.new_zeros(batch, taps - 1, width)
    inputs = torch.cat([initial_state, x_BLD], 1).to(weight_DK.dtype)
    y = torch.zeros_like(inputs[:, :length])
    for k in range(taps):
        y = y + inputs[:, k : k + length] * weight_DK[:, k]
    if bias_D is not None:
        y = y + bias_D
    if activation == "silu":
        y = F.silu(y)
    return y.to(x_BLD.dtype), inputs[:, length:].to(x_BLD.dtype)
