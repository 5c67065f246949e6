"""What a model costs: FLOPs per token, counted operator by operator, and the kernels that ran."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count


def flops_per_token(model: nn.Module, length: int, device: torch.device) -> float:
    """Forward FLOPs of one sequence of `length` tokens, divided by the length.

    Matrix products, convolutions and attention by torch's own formulas, the scan, the short
    convolution and FFTs by `kernel_flops`; elementwise operations and norms are not counted.
    """
    tokens = torch.zeros(1, length, dtype=torch.long, device=device)
    training = model.training
    model.eval()
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=kernel_flops()) as counter:
        model(tokens)
    model.train(training)
    return counter.get_total_flops() / length


def kernel_flops() -> dict[Any, Any]:
    """FLOP formulas of our own operators, real FFTs, and attention on CPU, by operator."""
    import seqbench.kernels.causal_conv1d
    import seqbench.kernels.selective_scan  # noqa: F401  (both register their operators)

    return {
        torch.ops.seqbench.selective_scan: _scan_flops,
        torch.ops.seqbench.causal_conv1d: _short_convolution_flops,
        torch.ops.aten._fft_r2c: _real_fft_flops,
        torch.ops.aten._fft_c2r: _real_inverse_fft_flops,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    }


def _attention_flops(
    query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any
) -> int:
    """As torch counts it on a GPU: the masked half too."""
    return int(sdpa_flop_count(query, key, value))


def _scan_flops(
    u: Sequence[int], delta: Sequence[int], A: Sequence[int], *_: Any, **__: Any
) -> int:
    """Seven for a state element: ΔA, its exp, the decay, Δu B and its sum, C h and its sum."""
    batch, length, width = u
    return 7 * batch * length * width * A[1]


def _short_convolution_flops(x: Sequence[int], weight: Sequence[int], *_: Any, **__: Any) -> int:
    """A product and a sum for a tap."""
    return 2 * math.prod(x) * weight[1]


def _real_fft_flops(x: Sequence[int], dim: Sequence[int], *_: Any, **__: Any) -> int:
    """5/2 n log2 n, the usual count of a transform of n real numbers."""
    size = math.prod(x[i] for i in dim)
    return round(2.5 * math.prod(x) * math.log2(max(size, 1)))


def _real_inverse_fft_flops(
    x: Sequence[int], dim: Sequence[int], normalization: int, last_dim_size: int, **_: Any
) -> int:
    whole = list(x)
    whole[dim[-1]] = last_dim_size
    return _real_fft_flops(whole, dim)


def kernel_backends() -> dict[str, str]:
    """Kernel -> the backend that really ran in this process."""
    from seqbench.kernels import dispatch

    return dict(dispatch.used())
