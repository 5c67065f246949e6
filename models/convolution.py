"""Long causal convolution by FFT, for layers whose filter spans the whole sequence."""

from __future__ import annotations

import torch
from torch import Tensor


def long_convolution(x_BLD: Tensor, filter_DL: Tensor) -> Tensor:
    """y[t] = sum over s <= t of filter[t - s] x[s], per channel, in O(L log L)."""
    L = x_BLD.shape[1]
    size = _fast_size(L + filter_DL.shape[1] - 1)
    dtype = x_BLD.dtype
    x_BDL = x_BLD.transpose(1, 2).to(filter_DL.dtype)
    spectrum = torch.fft.rfft(x_BDL, n=size) * torch.fft.rfft(filter_DL, n=size)
    return torch.fft.irfft(spectrum, n=size)[..., :L].transpose(1, 2).to(dtype)


def _fast_size(length: int) -> int:
    """The next power of two, or three quarters of it."""
    power = 1 << max(length - 1, 1).bit_length()
    return power * 3 // 4 if power >= 4 and length <= power * 3 // 4 else power
