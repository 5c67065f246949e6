"""Long causal convolution by FFT, for layers whose filter spans the whole sequence.

Shapes: B batch, L length, D width (channels), T taps, F frequencies. A filter that is a sum of
powers (S4D's, of a diagonal state space) has a state as well: see diagonal.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["long_conv"]


def long_conv(x_BLD: Tensor, filter_DT: Tensor) -> Tensor:
    """y[t] = Σ filter[t - s] x[s] over s <= t, per channel, in O(L log L); y has filter's dtype.

    Shapes: x, y (B, L, D); filter (D, T), T of any length; what lies beyond L is not used.
    Raises ValueError if the widths differ.
    """
    if x_BLD.ndim != 3 or filter_DT.ndim != 2 or x_BLD.shape[2] != filter_DT.shape[0]:
        raise ValueError(
            f"long_conv: x {tuple(x_BLD.shape)} and filter {tuple(filter_DT.shape)} must be"
            " (B, L, D) and (D, T)"
        )
    x_BLD, filter_DT = x_BLD.to(filter_DT.dtype), filter_DT[:, : x_BLD.shape[1]]
    if 0 in (*x_BLD.shape, *filter_DT.shape):
        return x_BLD * 0
    return _LongConv.apply(x_BLD, filter_DT)


class _LongConv(torch.autograd.Function):
    """Autograd alone would go back through full complex transforms, at twice the cost.

    Backward convolves too, reversed in time, where it would correlate: no spectrum is conjugated.
    """

    @staticmethod
    def forward(ctx: Any, x_BLD: Tensor, filter_DT: Tensor) -> Tensor:
        L = x_BLD.shape[1]
        ctx.size, ctx.lengths = _fast_size(L + filter_DT.shape[1] - 1), (L, filter_DT.shape[1])
        X_BDF = torch.fft.rfft(x_BLD.transpose(1, 2), n=ctx.size)
        H_DF = torch.fft.rfft(filter_DT, n=ctx.size)
        ctx.save_for_backward(X_BDF, H_DF)
        y_BDL = torch.fft.irfft(X_BDF * H_DF, n=ctx.size)[..., :L]
        return y_BDL.transpose(1, 2).contiguous()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None]:
        X_BDF, H_DF = ctx.saved_tensors
        L, T = ctx.lengths
        G_BDF = torch.fft.rfft(gradients[0].flip(1).transpose(1, 2), n=ctx.size)
        dx_BLD = dfilter_DT = None
        if ctx.needs_input_grad[1]:
            # dfilter[l] = Σ dy[t] x[t - l]: dy reversed, convolved with x, read at L - 1 - l.
            spectrum_DF = (X_BDF * G_BDF).sum(0)
            dfilter_DT = torch.fft.irfft(spectrum_DF, n=ctx.size)[:, L - T : L].flip(1)
        if ctx.needs_input_grad[0]:
            reversed_BDL = torch.fft.irfft(G_BDF.mul_(H_DF), n=ctx.size)[..., :L]
            dx_BLD = reversed_BDL.transpose(1, 2).contiguous().flip(1)
        return dx_BLD, dfilter_DT


def _fast_size(length: int) -> int:
    """The next power of two, or three quarters of it."""
    power = 1 << max(length - 1, 1).bit_length()
    return power * 3 // 4 if power >= 4 and length <= power * 3 // 4 else power
