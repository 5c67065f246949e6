"""The selective scan as a plain loop over time (Gu & Dao 2023, algorithm 2): the oracle.

Shapes: B batch, L length, D width, N state. Autograd works through it, in any precision.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def refuse(**call: Any) -> str | None:
    """Takes every call."""
    return None


def scan(
    u_BLD: Tensor,
    delta_BLD: Tensor,
    A_DN: Tensor,
    B: Tensor,
    C: Tensor,
    D_D: Tensor | None,
    z_BLD: Tensor | None,
    delta_bias_D: Tensor | None,
    delta_softplus: bool,
    initial_state_BDN: Tensor | None,
    reset_BL: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """y and the final state, in the precision of the state."""
    real = A_DN.real.dtype if A_DN.is_complex() else A_DN.dtype
    u, delta = u_BLD.to(real), delta_BLD.to(real)
    if delta_bias_D is not None:
        delta = delta + delta_bias_D
    if delta_softplus:
        delta = F.softplus(delta)
    B_BLDN, C_BLDN = (
        x.to(A_DN.dtype)[:, :, None] if x.ndim == 3 else x[None, None] for x in (B, C)
    )
    h_BDN = initial_state_BDN
    if h_BDN is None:
        h_BDN = A_DN.new_zeros(u.shape[0], *A_DN.shape)
    ys = []
    for t, (u_BD, delta_BD) in enumerate(zip(u.unbind(1), delta.unbind(1))):
        B_BDN, C_BDN = (x[:, t] if x.shape[1] > 1 else x[:, 0] for x in (B_BLDN, C_BLDN))
        if reset_BL is not None:
            h_BDN = torch.where(reset_BL[:, t, None, None], 0, h_BDN)
        decay_BDN = torch.exp(delta_BD[..., None] * A_DN)
        h_BDN = decay_BDN * h_BDN + (delta_BD * u_BD)[..., None] * B_BDN
        y_BD = (C_BDN * h_BDN).sum(-1)
        ys.append(2 * y_BD.real if A_DN.is_complex() else y_BD)
    y_BLD = torch.stack(ys, 1) if ys else torch.zeros_like(u)
    if D_D is not None:
        y_BLD = y_BLD + D_D * u
    if z_BLD is not None:
        y_BLD = y_BLD * F.silu(z_BLD.to(real))
    return y_BLD, h_BDN
