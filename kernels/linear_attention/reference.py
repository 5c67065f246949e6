"""Linear recurrences as plain loops over time: the oracles. Shapes as in the package."""

from __future__ import annotations

import torch
from torch import Tensor


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y and the last state S, step by step."""
    B, L, H, K = q.shape
    S = q.new_zeros(B, H, K, v.shape[-1]) if state is None else state
    decay = None if log_decay is None else log_decay.expand(B, L, H, log_decay.shape[-1]).exp()
    ys = []
    for t in range(L):
        if decay is not None:
            S = decay[:, t, :, :, None] * S
        S = S + k[:, t, :, :, None] * v[:, t, :, None]
        ys.append((q[:, t, :, None] @ S)[:, :, 0])
    return (torch.stack(ys, 1) if ys else torch.zeros_like(v)), S


def diagonal_recurrence(log_a_P: Tensor, x_BLP: Tensor, state_BP: Tensor | None = None) -> Tensor:
    """Every h (B, L, P), step by step."""
    h = torch.zeros_like(x_BLP[:, 0]) if state_BP is None else state_BP
    hs = []
    for x_BP in x_BLP.unbind(1):
        h = torch.exp(log_a_P) * h + x_BP
        hs.append(h)
    return torch.stack(hs, 1)
