"""Long causal convolution by FFT, for layers whose filter spans the whole sequence."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def long_convolution(x_BLD: Tensor, filter_DT: Tensor) -> Tensor:
    """y[t] = sum over s <= t of filter[t - s] x[s], per channel, in O(L log L)."""
    return _LongConvolution.apply(x_BLD.to(filter_DT.dtype), filter_DT)


class _LongConvolution(torch.autograd.Function):
    """Autograd alone would go back through full complex transforms, at twice the cost."""

    @staticmethod
    def forward(ctx: Any, x_BLD: Tensor, filter_DT: Tensor) -> Tensor:
        L = x_BLD.shape[1]
        size = _fast_size(L + filter_DT.shape[1] - 1)
        X_BDF = torch.fft.rfft(x_BLD.transpose(1, 2), n=size)
        H_DF = torch.fft.rfft(filter_DT, n=size)
        ctx.save_for_backward(X_BDF, H_DF)
        ctx.size, ctx.lengths = size, (L, filter_DT.shape[1])
        return torch.fft.irfft(X_BDF * H_DF, n=size)[..., :L].transpose(1, 2).contiguous()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None]:
        X_BDF, H_DF = ctx.saved_tensors
        L, T = ctx.lengths
        # Correlation with the filter, and with the input: convolution's two transposes.
        G_BDF = torch.fft.rfft(gradients[0].transpose(1, 2), n=ctx.size)
        grad_x = grad_filter = None
        if ctx.needs_input_grad[1]:
            spectrum_DF = (X_BDF.conj() * G_BDF).sum(0)
            grad_filter = torch.fft.irfft(spectrum_DF, n=ctx.size)[..., :T]
        if ctx.needs_input_grad[0]:
            back = torch.fft.irfft(G_BDF.mul_(H_DF.conj()), n=ctx.size)
            grad_x = back[..., :L].transpose(1, 2).contiguous()
        return grad_x, grad_filter


def _fast_size(length: int) -> int:
    """The next power of two, or three quarters of it."""
    power = 1 << max(length - 1, 1).bit_length()
    return power * 3 // 4 if power >= 4 and length <= power * 3 // 4 else power
