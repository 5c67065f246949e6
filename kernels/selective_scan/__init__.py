"""The selective scan, S6's recurrence (Gu & Dao 2023, section 3), on any device, with gradients.

Shapes: B batch, L length, D width (channels), N state. `selective_scan` is the custom op
`seqbench::selective_scan`: it works under autograd, torch.compile, autocast and DDP.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from seqbench.kernels import dispatch
from seqbench.kernels.selective_scan import reference
from seqbench.kernels.selective_scan.chunked import chunked_scan

__all__ = ["check", "chunked_scan", "example", "selective_scan", "selective_scan_step"]


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    *,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    reset: Tensor | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """h[t] = exp(Δ[t] A) h[t-1] + Δ[t] B[t] u[t];  y[t] = (C[t]·h[t] + D u[t]) silu(z[t]).

    Shapes: u, delta, z, y (B, L, D); A (D, N), real or complex (then y takes 2 Re(C·h)); B and C,
    each (B, L, N) selective or (D, N) constant, complex exactly when A is; D and delta_bias (D,);
    initial and final state (B, D, N); reset (B, L) bool, the state is zeroed before that step.
    Δ is softplus(delta + delta_bias) with `delta_softplus`, else delta + delta_bias. The state and
    A, D, delta_bias are float32 or complex64 (float64, complex128 if an input is float64), whatever
    the dtype of the inputs; y has u's. Gradients flow through both states.

    Raises ValueError for shapes that do not fit and BackendRefused if `backend`, a name in
    `dispatch.backends()`, cannot take the call; `auto` picks one that can.
    """
    check(u, delta, A, B, C, D, z, delta_bias, initial_state, reset)
    inputs, real, params = _dtypes(u, A, delta, z, *(x for x in (B, C) if x.ndim == 3))

    def projection(x: Tensor) -> Tensor:
        return _cast(x, inputs if x.ndim == 3 and not x.is_complex() else params)

    arguments = (
        _cast(u, inputs),
        _cast(delta, inputs),
        _cast(A, params),
        projection(B),
        projection(C),
        None if D is None else _cast(D, real),
        None if z is None else _cast(z, inputs),
        None if delta_bias is None else _cast(delta_bias, real),
        delta_softplus,
        None if initial_state is None else _cast(initial_state, params),
        reset,
    )
    if backend == "reference":  # autograd goes through the loop itself
        dispatch.record("selective_scan", "reference")
        y, final_state = reference.scan(*arguments)
    else:
        differentiated = torch.is_grad_enabled() and any(
            [isinstance(x, Tensor) and x.requires_grad for x in arguments]
        )
        y, final_state, _ = _forward(*arguments, backend, differentiated)
    y = _cast(y, u.dtype)
    return (y, final_state) if return_final_state else y


def selective_scan_step(
    state: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    *,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """One time step of `selective_scan`: y (B, D) and the next state (B, D, N).

    Shapes: state (B, D, N); u, delta, z (B, D); B and C each (B, N) or (B, 1, N) selective, or
    (D, N) constant. Where the batch is as large as the width only (B, 1, N) tells them apart.
    `cpu` and `triton` have a step of their own, for a state in single precision without gradients,
    which `auto` takes where it can; every other backend's step is these few operations of PyTorch.
    """
    B, C = (_step_projection(name, x, state) for name, x in (("B", B), ("C", C)))
    inputs = dict(u=u, delta=delta, A=A, B=B, C=C, D=D, z=z, delta_bias=delta_bias)
    fused = dispatch.resolve_step("selective_scan", backend, {"state": state, **inputs})
    if fused is not None:
        y_BD, state = fused.step(state, *inputs.values(), delta_softplus)
        return y_BD.to(u.dtype), state
    params, real = state.dtype, state.real.dtype
    delta_BD, u_BD = delta.to(real), u.to(real)
    if delta_bias is not None:
        delta_BD = delta_BD + delta_bias
    if delta_softplus:
        delta_BD = F.softplus(delta_BD)
    decay_BDN = torch.exp(delta_BD[..., None] * A.to(params))
    state = decay_BDN * state + (delta_BD * u_BD)[..., None] * B.to(params)
    y_BD = (C.to(params) * state).sum(-1)
    if params.is_complex:
        y_BD = 2 * y_BD.real
    if D is not None:
        y_BD = y_BD + D.to(real) * u_BD
    if z is not None:
        y_BD = y_BD * F.silu(z.to(real))
    return y_BD.to(u.dtype), state


def example(device: str) -> dict[str, Any]:
    """A small call's tensors by name, what `dispatch.backends` asks every backend about."""
    u_BLD, A_DN, B_BLN = (
        torch.zeros(shape, device=device) for shape in ((1, 2, 4), (4, 2), (1, 2, 2))
    )
    options = dict.fromkeys(("D", "z", "delta_bias", "initial_state", "reset"))
    return {"u": u_BLD, "delta": u_BLD, "A": A_DN, "B": B_BLN, "C": B_BLN, **options}


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in `dtype`; x.to, which is x where nothing changes, takes a hundredth of a small call."""
    return x if x.dtype == dtype else x.to(dtype)


def _dtypes(u: Tensor, A: Tensor, *others: Tensor | None) -> tuple[torch.dtype, ...]:
    """Dtypes of the inputs, of the real parameters, and of A and the state."""
    inputs = u.dtype
    for x in others:
        if x is not None and not x.is_complex():
            inputs = torch.promote_types(inputs, x.dtype)
    double = inputs == torch.float64
    real = torch.float64 if double else torch.float32
    if not A.is_complex():
        return inputs, real, real
    return inputs, real, torch.complex128 if double else torch.complex64


def check(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    reset: Tensor | None,
) -> None:
    """Raises ValueError, naming what does not fit, for a call that `selective_scan` cannot take."""
    if u.ndim != 3 or A.ndim != 2:
        raise ValueError(
            f"selective_scan: u {tuple(u.shape)} and A {tuple(A.shape)} must be (B, L, D), (D, N)"
        )
    batch, length, width = u.shape
    state = A.shape[1]
    expected: tuple[tuple[str, Tensor | None, tuple[tuple[int, ...], ...]], ...] = (
        ("delta", delta, ((batch, length, width),)),
        ("A", A, ((width, state),)),
        ("B", B, ((batch, length, state), (width, state))),
        ("C", C, ((batch, length, state), (width, state))),
        ("D", D, ((width,),)),
        ("z", z, ((batch, length, width),)),
        ("delta_bias", delta_bias, ((width,),)),
        ("initial_state", initial_state, ((batch, width, state),)),
        ("reset", reset, ((batch, length),)),
    )
    for name, x, shapes in expected:
        if x is not None and x.shape not in shapes:
            raise ValueError(
                f"selective_scan: {name} is {tuple(x.shape)}; u {tuple(u.shape)} and A"
                f" {tuple(A.shape)} ask for {' or '.join(map(str, shapes))}"
            )
    for name, x in (("B", B), ("C", C), ("initial_state", initial_state)):
        if x is not None and x.is_complex() != A.is_complex():
            raise ValueError(
                f"selective_scan: {name} is {x.dtype} but A is {A.dtype}: both complex or both real"
            )
    if reset is not None and reset.dtype != torch.bool:
        raise ValueError(f"selective_scan: reset is {reset.dtype}; it must be torch.bool")


def _step_projection(name: str, x: Tensor, state: Tensor) -> Tensor:
    """B or C of one step, broadcastable to (B, D, N)."""
    batch, width, n = state.shape
    if x.shape == (batch, 1, n):
        return x
    if batch == width and x.shape == (batch, n):
        raise ValueError(
            f"selective_scan_step: {name} {tuple(x.shape)} may be selective or constant, for batch"
            f" and width are {batch}; pass {name}[:, None] (selective) or {name}[None] (constant)"
        )
    if x.shape == (batch, n):
        return x[:, None]
    if x.shape in ((width, n), (1, width, n)):
        return x
    raise ValueError(
        f"selective_scan_step: {name} is {tuple(x.shape)}; the state {tuple(state.shape)} asks for"
        f" {(batch, n)} or {(batch, 1, n)} (selective) or {(width, n)} (constant)"
    )


# The custom op. `backend` may be auto: forward, its fake and backward all resolve it from the same
# devices, dtypes and shapes, and so alike; Dynamo never looks inside.

_INPUTS = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")


@dispatch.operator("seqbench::selective_scan")
def _forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    initial_state: Tensor | None,
    reset: Tensor | None,
    backend: str,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, the final state, and, to `keep` for backward, the checkpoints, else nothing (0,)."""
    call = (u, delta, A, B, C, D, z, delta_bias)
    name, module = _resolve(backend, *call, initial_state, reset)
    dispatch.record("selective_scan", name)
    with _without_autocast(u.device.type):
        return module.forward(*call, delta_softplus, initial_state, reset, keep)


@_forward.register_fake
def _(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    initial_state: Tensor | None,
    reset: Tensor | None,
    backend: str,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    _, module = _resolve(backend, u, delta, A, B, C, D, z, delta_bias, initial_state, reset)
    batch, length, width = u.shape
    checkpoints = module.checkpoints_shape(batch, length, width, A.shape[1]) if keep else (0,)
    y = torch.empty_like(u, memory_format=torch.contiguous_format)
    return y, A.new_empty(batch, *A.shape), A.new_empty(checkpoints)


@dispatch.operator("seqbench::selective_scan_backward")
def _backward(
    dy: Tensor,
    dfinal_state: Tensor | None,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    initial_state: Tensor | None,
    reset: Tensor | None,
    checkpoints: Tensor,
    needs: Sequence[bool],
    backend: str,
) -> list[Tensor]:
    """The gradients that are needed, in order: a custom op cannot return None."""
    call = (u, delta, A, B, C, D, z, delta_bias)
    _, module = _resolve(backend, *call, initial_state, reset)
    with _without_autocast(u.device.type):
        gradients = module.backward(
            dy, dfinal_state, *call, delta_softplus, initial_state, reset, checkpoints, tuple(needs)
        )
    return [gradient for gradient, needed in zip(gradients, needs) if needed]


@_backward.register_fake
def _(
    dy: Tensor,
    dfinal_state: Tensor | None,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    initial_state: Tensor | None,
    reset: Tensor | None,
    checkpoints: Tensor,
    needs: Sequence[bool],
    backend: str,
) -> list[Tensor]:
    inputs = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    return [
        torch.empty_like(x, memory_format=torch.contiguous_format)
        for x, needed in zip(inputs, needs)
        if needed and x is not None
    ]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, delta_softplus, initial_state, reset, backend, _ = inputs
    ctx.delta_softplus, ctx.backend = delta_softplus, backend
    ctx.save_for_backward(*tensors, initial_state, reset, output[2])
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dy: Tensor | None, dfinal_state: Tensor | None, _: None) -> Any:
    *tensors, initial_state, reset, checkpoints = ctx.saved_tensors
    needs = [*ctx.needs_input_grad[:8], ctx.needs_input_grad[9]]
    if dy is None:
        dy = torch.zeros_like(tensors[0])
    gradients = iter(
        _backward(
            dy,
            dfinal_state,
            *tensors,
            ctx.delta_softplus,
            initial_state,
            reset,
            checkpoints,
            needs,
            ctx.backend,
        )
    )
    *inputs, dinitial = (next(gradients) if needed else None for needed in needs)
    return *inputs, None, dinitial, None, None, None


_forward.register_autograd(_differentiate, setup_context=_setup_context)


def _without_autocast(device: str) -> AbstractContextManager[Any]:
    if not torch.is_autocast_enabled(device):  # entering torch.autocast takes a while
        return nullcontext()
    return torch.autocast(device, enabled=False)


def _resolve(backend: str, *tensors: Tensor | None) -> tuple[str, Any]:
    return dispatch.resolve("selective_scan", backend, dict(zip((*_INPUTS, "reset"), tensors)))
