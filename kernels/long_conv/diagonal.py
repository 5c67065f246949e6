"""Convolution with the kernel of a diagonal state space (S4D: Gu, Gupta, Goel & Ré 2022).

Shapes: B batch, L length, D width, M modes. The kernel is Re Σ_m weight[m] a[m]^l, a product with a
Vandermonde matrix; a[m] is given by its logarithm, and real numbers may stand for complex ones.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from seqbench.kernels.long_conv import long_conv

CHUNK = 1024  # positions taken at a time when a state is carried: bounds memory


def diagonal_kernel(log_a_DM: Tensor, weight_DM: Tensor, length: int) -> Tensor:
    """Re Σ_m weight[m] a[m]^l for l = 0 ... length - 1, (D, L)."""
    near_DMJ, far_DMI = _near_and_far(log_a_DM, length, weight_DM.is_complex())
    rows_DIR = _rows(weight_DM[..., None].conj() * far_DMI.conj()).mT
    return (rows_DIR @ _rows(near_DMJ)).flatten(1)[:, :length]


def diagonal_conv(
    x_BLD: Tensor, log_a_DM: Tensor, b_DM: Tensor, c_DM: Tensor, state_BDM: Tensor
) -> tuple[Tensor, Tensor]:
    """h[t] = a h[t-1] + b x[t]; y[t] = Re(c·h[t]), from h[-1] = state: y (B, L, D) and the last h.

    In chunks: a convolution each, and what the state before it still gives out.
    """
    if x_BLD.shape[1] == 0:
        return x_BLD * 0, state_BDM
    is_complex = state_BDM.is_complex()
    kernel_DL = diagonal_kernel(log_a_DM, c_DM * b_DM, min(x_BLD.shape[1], CHUNK))
    ys, powers_DML = [], None
    for x in x_BLD.split(CHUNK, 1):
        L = x.shape[1]
        if powers_DML is None or powers_DML.shape[-1] != L:
            near_DMJ, far_DMI = _near_and_far(log_a_DM, L, is_complex)
            powers_DML = (far_DMI[..., None] * near_DMJ[:, :, None]).flatten(2)[..., :L]
        # What the state still gives out, c a^(l+1) h, and what it becomes.
        a_DM = powers(log_a_DM, 1, is_complex)
        read_DBR = _rows(((c_DM * a_DM) * state_BDM).conj().transpose(0, 1).mT).mT
        y = long_conv(x, kernel_DL[:, :L])
        ys.append(y + (read_DBR @ _rows(powers_DML)).permute(1, 2, 0))
        added_DBR = x.permute(2, 0, 1) @ _rows(powers_DML.flip(-1)).mT
        added_DBM = torch.complex(*added_DBR.chunk(2, -1)) if is_complex else added_DBR
        state_BDM = powers(log_a_DM, L, is_complex) * state_BDM + b_DM * added_DBM.transpose(0, 1)
    return torch.cat(ys, 1), state_BDM


def powers(log_a_DM: Tensor, exponent: Tensor | int, is_complex: bool) -> Tensor:
    """a^exponent, (D, M), or (D, M, L) for exponents (L); its real part unless `is_complex`.

    Angles are float64, as they grow to many turns.
    """
    if isinstance(exponent, Tensor):
        log_a_DM = log_a_DM[..., None]
    if not log_a_DM.is_complex():
        return torch.exp(log_a_DM * exponent)
    size, angle = torch.exp(log_a_DM.real * exponent), log_a_DM.imag.double() * exponent
    real = size * angle.cos().to(size.dtype)
    return torch.complex(real, size * angle.sin().to(size.dtype)) if is_complex else real


def _near_and_far(log_a_DM: Tensor, length: int, is_complex: bool) -> tuple[Tensor, Tensor]:
    """a^j and a^(block i), (D, M, J) and (D, M, I), with l = block i + j.

    So a kernel is a matrix product, with 2 sqrt(L) exponentials a mode in place of L.
    """
    block = math.isqrt(max(length - 1, 0)) + 1
    lag = torch.arange(block, device=log_a_DM.device)
    far = block * torch.arange(-(-length // block), device=log_a_DM.device)
    return powers(log_a_DM, lag, is_complex), powers(log_a_DM, far, is_complex)


def _rows(z_DMX: Tensor) -> Tensor:
    """Complex (D, M, X) -> real (D, 2 M, X): Re(w·z) over the modes is rows(conj w)·rows(z)."""
    if not z_DMX.is_complex():
        return z_DMX
    return torch.cat([z_DMX.real, z_DMX.imag], 1)
