"""RMSNorm (Zhang & Sennrich 2019) with a backward of one pass on CPU, where PyTorch's takes ten.

Shapes: R rows (everything before the last axis), D width. On a CPU `rms_norm` is the custom op
`seqbench::rms_norm` while gradients are recorded; anywhere else it is PyTorch's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seqbench.kernels import dispatch
from seqbench.kernels.rms_norm import reference

__all__ = ["RMSNorm", "example", "rms_norm"]


class RMSNorm(nn.RMSNorm):
    """torch.nn.RMSNorm over the last axis, by `rms_norm`."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__(width, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., D) -> (..., D), in x's dtype."""
        return rms_norm(x, self.weight, float(self.eps or 0.0))


def rms_norm(x: Tensor, weight_D: Tensor, eps: float, *, backend: str = "auto") -> Tensor:
    """x / sqrt(mean(x²) + eps) * weight over the last axis of x (..., D), in x's dtype.

    Sums are float32, or float64 where x is. Raises ValueError for shapes that do not fit and
    BackendRefused if `backend`, a name in `dispatch.backends("rms_norm")`, cannot take the call.
    """
    if x.ndim == 0 or tuple(weight_D.shape) != (x.shape[-1],):
        raise ValueError(
            f"rms_norm: weight is {tuple(weight_D.shape)}; x {tuple(x.shape)} asks for one number a"
            " channel of its last axis"
        )
    if backend == "auto" and (x.device.type != "cpu" or not torch.is_grad_enabled()):
        return F.rms_norm(x, weight_D.shape, weight_D.to(x.dtype), eps)
    weight_D = weight_D.to(torch.promote_types(x.dtype, torch.float32))
    if backend == "reference":  # autograd goes through the formula itself
        dispatch.record("rms_norm", "reference")
        return reference.normalise(x, weight_D, eps)
    return _forward(x, weight_D, eps, backend)[0]


def example(device: str) -> dict[str, Any]:
    """A small call by argument name, what `dispatch.backends` asks every backend about."""
    return {"x": torch.zeros(2, 4, device=device), "weight": torch.zeros(4, device=device)}


@dispatch.operator("seqbench::rms_norm")
def _forward(x: Tensor, weight: Tensor, eps: float, backend: str) -> tuple[Tensor, Tensor]:
    """y, and 1 / sqrt(mean(x²) + eps) of every row (R)."""
    name, module = _resolve(backend, x, weight)
    dispatch.record("rms_norm", name)
    return module.forward(x, weight, eps)


@_forward.register_fake
def _(x: Tensor, weight: Tensor, eps: float, backend: str) -> tuple[Tensor, Tensor]:
    _resolve(backend, x, weight)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    return y, weight.new_empty(x.shape[:-1].numel())


@dispatch.operator("seqbench::rms_norm_backward")
def _backward(
    dy: Tensor, x: Tensor, weight: Tensor, scale: Tensor, needs: Sequence[bool], backend: str
) -> list[Tensor]:
    """The gradients that are needed, in order: a custom op cannot return None."""
    _, module = _resolve(backend, x, weight)
    gradients = module.backward(dy, x, weight, scale, tuple(needs))
    return [gradient for gradient, needed in zip(gradients, needs) if needed]


@_backward.register_fake
def _(
    dy: Tensor, x: Tensor, weight: Tensor, scale: Tensor, needs: Sequence[bool], backend: str
) -> list[Tensor]:
    return [
        torch.empty_like(tensor, memory_format=torch.contiguous_format)
        for tensor, needed in zip((x, weight), needs)
        if needed
    ]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, _, ctx.backend = inputs
    ctx.save_for_backward(x, weight, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dy: Tensor | None, _: None) -> Any:
    needs = list(ctx.needs_input_grad[:2])
    if dy is None:
        return None, None, None, None
    gradients = iter(_backward(dy, *ctx.saved_tensors, needs, ctx.backend))
    dx, dweight = (next(gradients) if needed else None for needed in needs)
    return dx, dweight, None, None


_forward.register_autograd(_differentiate, setup_context=_setup_context)


def _resolve(backend: str, x: Tensor, weight: Tensor) -> tuple[str, Any]:
    return dispatch.resolve("rms_norm", backend, {"x": x, "weight": weight})
