"""RMSNorm as its formula: the oracle. Autograd works through it, in any precision."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def refuse(**call: Any) -> str | None:
    """Takes every call."""
    return None


def normalise(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) * weight, in x's dtype."""
    wide = x.to(weight.dtype)
    mean = (wide * wide).mean(-1, keepdim=True)
    return (wide / torch.sqrt(mean + eps) * weight).to(x.dtype)
