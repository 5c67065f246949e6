"""The short convolution over packed documents: no tap reaches across a reset.

Shapes: B batch, L length, D width, K taps. Plain PyTorch, on any device, with gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def convolve(
    x_BLD: Tensor,
    weight_DK: Tensor,
    bias_D: Tensor | None,
    activation: str | None,
    initial_state: Tensor | None,
    reset_BL: Tensor,
) -> tuple[Tensor, Tensor]:
    """y and the final state (B, K-1, D), in x's dtype; inputs before a reset count as zeros."""
    length, taps = x_BLD.shape[1], weight_DK.shape[1]
    before = taps - 1
    if initial_state is None:
        initial_state = x_BLD.new_zeros(len(x_BLD), before, x_BLD.shape[2])
    inputs = torch.cat([initial_state, x_BLD], 1)
    document = F.pad(reset_BL.cumsum(1), (before, 0))  # of each input: 0 is the state's own
    y = torch.zeros_like(x_BLD, dtype=weight_DK.dtype)
    for k in range(taps):
        other = document[:, k : k + length] != document[:, before:]
        y = y + (inputs[:, k : k + length] * weight_DK[:, k]).masked_fill(other[..., None], 0)
    if bias_D is not None:
        y = y + bias_D
    if activation == "silu":
        y = F.silu(y)
    gone = document[:, length:] != document[:, -1:]
    return y.to(x_BLD.dtype), inputs[:, length:].masked_fill(gone[..., None], 0)
