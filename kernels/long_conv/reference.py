"""Long convolution and the kernel of a diagonal state space as their sums: the oracles."""

from __future__ import annotations

import torch
from torch import Tensor


def long_conv(x_BLD: Tensor, filter_DT: Tensor) -> Tensor:
    """y[t] = Σ filter[t - s] x[s] over s <= t, in O(L T)."""
    L = x_BLD.shape[1]
    y_BLD = torch.zeros_like(x_BLD)
    for lag in range(min(L, filter_DT.shape[1])):
        late = filter_DT[:, lag] * x_BLD[:, : L - lag]
        y_BLD = y_BLD + torch.cat([torch.zeros_like(x_BLD[:, :lag]), late], 1)
    return y_BLD


def diagonal_kernel(log_a_DM: Tensor, weight_DM: Tensor, length: int) -> Tensor:
    """Re Σ_m weight[m] a[m]^l for l = 0 ... length - 1 (D, L), by the whole Vandermonde matrix."""
    lag = torch.arange(length, device=log_a_DM.device)
    return (weight_DM[..., None] * torch.exp(log_a_DM[..., None] * lag)).real.sum(1)


def diagonal_conv(
    x_BLD: Tensor, log_a_DM: Tensor, b_DM: Tensor, c_DM: Tensor, state_BDM: Tensor
) -> tuple[Tensor, Tensor]:
    """h[t] = a h[t-1] + b x[t]; y[t] = Re(c·h[t]), as a loop over time: y and the last h."""
    ys = []
    for x_BD in x_BLD.unbind(1):
        state_BDM = torch.exp(log_a_DM) * state_BDM + b_DM * x_BD[..., None]
        ys.append((c_DM * state_BDM).sum(-1).real)
    return (torch.stack(ys, 1) if ys else torch.zeros_like(x_BLD)), state_BDM
