"""Depthwise causal convolution over (B, L, D), with bias and SiLU, continuing from a state.

Shapes: B batch, L length, D width (channels), K taps. `causal_conv1d` is the custom op
`seqbench::causal_conv1d`: it works under autograd, torch.compile, autocast and DDP.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from seqbench.kernels import dispatch
from seqbench.kernels.causal_conv1d import reference, resets

__all__ = ["Activation", "causal_conv1d", "causal_conv1d_step", "example"]

Activation = Literal["silu"] | None


def causal_conv1d(
    x_BLD: Tensor,
    weight_DK: Tensor,
    bias_D: Tensor | None = None,
    *,
    activation: Activation = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    reset: Tensor | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """y[t] = activation(bias + Σ_k weight[k] x[t-K+1+k]).

    The states are the K - 1 inputs before the first and up to the last, (B, K-1, D); zeros if not
    given. y and the final state have x's dtype (float32, bfloat16, float16, float64); weight, bias
    and every sum are float32, or float64 where x is. Gradients flow through both states. With
    `reset`, (B, L) bool, inputs before such a position count as zeros from there on; that is plain
    PyTorch, which `auto` and `reference` take.

    Raises ValueError for shapes that do not fit and BackendRefused if `backend`, a name in
    `dispatch.backends("causal_conv1d")`, cannot take the call; `auto` picks one that can.
    """
    _check(x_BLD, weight_DK, bias_D, activation, initial_state)
    params = torch.promote_types(x_BLD.dtype, torch.float32)
    arguments = (
        x_BLD,
        weight_DK.to(params),
        None if bias_D is None else bias_D.to(params),
        activation,
        None if initial_state is None else initial_state.to(x_BLD.dtype),
    )
    if reset is not None:
        if backend not in ("auto", "reference"):
            raise dispatch.BackendRefused(
                f"causal_conv1d: backend {backend!r} refuses: reset is for 'auto' and 'reference'"
            )
        if reset.dtype != torch.bool or reset.shape != x_BLD.shape[:2]:
            raise ValueError(
                f"causal_conv1d: reset is {reset.dtype} {tuple(reset.shape)}; it must be"
                f" torch.bool {tuple(x_BLD.shape[:2])}"
            )
        y, final_state = resets.convolve(*arguments, reset)
    elif backend == "reference":  # autograd goes through the sum itself
        dispatch.record("causal_conv1d", "reference")
        y, final_state = reference.convolve(*arguments)
    else:
        y, final_state = _forward(*arguments, backend)
    return (y, final_state) if return_final_state else y


def causal_conv1d_step(
    state: Tensor,
    x_BD: Tensor,
    weight_DK: Tensor,
    bias_D: Tensor | None = None,
    *,
    activation: Activation = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """One time step: y (B, D) and the next state (B, K-1, D).

    `triton` has a step of its own, without gradients, which `auto` takes where it can; every other
    backend's step is these few operations of PyTorch.
    """
    call = {"state": state, "x": x_BD, "weight": weight_DK, "bias": bias_D}
    fused = dispatch.resolve_step("causal_conv1d", backend, call)
    if fused is not None:
        y_BD, state = fused.step(state, x_BD, weight_DK, bias_D, activation)
        return y_BD, state
    window_BKD = torch.cat([state.to(x_BD.dtype), x_BD[:, None]], 1)
    y_BD = (window_BKD * weight_DK.T).sum(1)
    if bias_D is not None:
        y_BD = y_BD + bias_D
    if activation == "silu":
        y_BD = F.silu(y_BD)
    return y_BD.to(x_BD.dtype), window_BKD[:, 1:]


def example(device: str) -> dict[str, Any]:
    """A small call by argument name, what `dispatch.backends` asks every backend about."""
    return {
        "x": torch.zeros(1, 2, 4, device=device),
        "weight": torch.zeros(4, 3, device=device),
        "bias": None,
        "activation": "silu",
        "initial_state": None,
    }


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    initial_state: Tensor | None,
) -> None:
    if x.ndim != 3 or weight.ndim != 2 or weight.shape[1] == 0:
        raise ValueError(
            f"causal_conv1d: x {tuple(x.shape)} and weight {tuple(weight.shape)} must be (B, L, D)"
            " and (D, K), K at least 1"
        )
    batch, _, width = x.shape
    expected: tuple[tuple[str, Tensor | None, tuple[int, ...]], ...] = (
        ("weight", weight, (width, weight.shape[1])),
        ("bias", bias, (width,)),
        ("initial_state", initial_state, (batch, weight.shape[1] - 1, width)),
    )
    for name, tensor, shape in expected:
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(
                f"causal_conv1d: {name} is {tuple(tensor.shape)}; x {tuple(x.shape)} and weight"
                f" {tuple(weight.shape)} ask for {shape}"
            )
    if activation not in (None, "silu"):
        raise ValueError(f"causal_conv1d: activation is {activation!r}; valid: None, 'silu'")


# The custom op. `backend` may be auto: forward, its fake and backward all resolve it from the same
# devices, dtypes and shapes, and so alike; Dynamo never looks inside.


@dispatch.operator("seqbench::causal_conv1d")
def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    initial_state: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    name, module = _resolve(backend, x, weight, bias, activation, initial_state)
    dispatch.record("causal_conv1d", name)
    with torch.autocast(x.device.type, enabled=False):
        return module.forward(x, weight, bias, activation, initial_state)


@_forward.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    initial_state: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    _resolve(backend, x, weight, bias, activation, initial_state)
    batch, _, width = x.shape
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    return y, x.new_empty(batch, weight.shape[1] - 1, width)


@dispatch.operator("seqbench::causal_conv1d_backward")
def _backward(
    dy: Tensor,
    dfinal_state: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    initial_state: Tensor | None,
    needs: Sequence[bool],
    backend: str,
) -> list[Tensor]:
    """The gradients that are needed, in order: a custom op cannot return None."""
    call = (x, weight, bias, activation, initial_state)
    _, module = _resolve(backend, *call)
    with torch.autocast(x.device.type, enabled=False):
        gradients = module.backward(dy, dfinal_state, *call, tuple(needs))
    return [gradient for gradient, needed in zip(gradients, needs) if needed]


@_backward.register_fake
def _(
    dy: Tensor,
    dfinal_state: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    initial_state: Tensor | None,
    needs: Sequence[bool],
    backend: str,
) -> list[Tensor]:
    return [
        torch.empty_like(tensor, memory_format=torch.contiguous_format)
        for tensor, needed in zip((x, weight, bias, initial_state), needs)
        if needed and tensor is not None
    ]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, ctx.activation, initial_state, ctx.backend = inputs
    ctx.save_for_backward(x, weight, bias, initial_state)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dy: Tensor | None, dfinal_state: Tensor | None) -> Any:
    x, weight, bias, initial_state = ctx.saved_tensors
    needs = [ctx.needs_input_grad[i] for i in (0, 1, 2, 4)]
    if dy is None:
        dy = torch.zeros_like(x)
    gradients = iter(
        _backward(
            dy, dfinal_state, x, weight, bias, ctx.activation, initial_state, needs, ctx.backend
        )
    )
    dx, dweight, dbias, dinitial = (next(gradients) if needed else None for needed in needs)
    return dx, dweight, dbias, None, dinitial, None


_forward.register_autograd(_differentiate, setup_context=_setup_context)


def _resolve(
    backend: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    initial_state: Tensor | None,
) -> tuple[str, Any]:
    call = {
        "x": x,
        "weight": weight,
        "bias": bias,
        "activation": activation,
        "initial_state": initial_state,
    }
    return dispatch.resolve("causal_conv1d", backend, call)
