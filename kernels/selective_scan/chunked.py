"""An exact scan of a very long sequence: segment by segment, keeping one state for each.

The gradients are those of the whole: backward walks the segments from the last to the first, scans
each again from the state it began with, and hands the state's gradient on. With segments of about
sqrt(32 L) steps, what is held beside inputs, outputs and their gradients grows with sqrt(L).

Shapes: B batch, L length, D width (channels), N state.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from seqbench.kernels import selective_scan as package

_LEAST = 1024  # steps of a segment, unless asked for: fewer do not pay for the call
_SEQUENCES = ("u", "delta", "z", "reset")  # always (B, L, ...); B and C may be


def chunked_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    *,
    segment: int | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    reset: Tensor | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """`selective_scan` in segments of `segment` steps: the same values and gradients, less memory.

    Beside inputs, outputs and gradients it holds a state (B, D, N) for each segment and what one
    segment's own scan needs. Backward scans forward once more: about a quarter more time.

    Raises ValueError for a segment below 1, and what `selective_scan` raises.
    """
    tensors: dict[str, Any] = dict(
        u=u, delta=delta, A=A, B=B, C=C, D=D, z=z, delta_bias=delta_bias,
        initial_state=initial_state, reset=reset,
    )  # fmt: skip
    package.check(**tensors)
    length = u.shape[1]
    if segment is None:
        segment = max(_LEAST, math.isqrt(32 * length))
    if segment < 1:
        raise ValueError(f"chunked_scan: segment is {segment}; it must be at least 1 step")
    options: dict[str, Any] = {"delta_softplus": delta_softplus, "backend": backend}
    if length <= segment:
        return package.selective_scan(**tensors, **options, return_final_state=return_final_state)
    y, final_state = _Segments.apply(segment, options, tuple(tensors), *tensors.values())
    return (y, final_state) if return_final_state else y


class _Segments(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        segment: int,
        options: dict[str, Any],
        names: tuple[str, ...],
        *tensors: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        call = dict(zip(names, tensors))
        u = tensors[0]
        assert u is not None
        y_BLD = torch.empty_like(u, memory_format=torch.contiguous_format)
        state, starts = call["initial_state"], []
        for first in range(0, u.shape[1], segment):
            starts.append(state)
            piece = {**_piece(call, first, segment), "initial_state": state}
            y_BLD[:, first : first + segment], state = package.selective_scan(
                **piece, **options, return_final_state=True
            )
        ctx.segment, ctx.options, ctx.names = segment, options, names
        ctx.save_for_backward(*tensors, *starts[1:])
        ctx.set_materialize_grads(False)
        assert state is not None
        return y_BLD, state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dstate: Tensor | None) -> Any:
        if dy is None and dstate is None:
            return (None,) * (3 + len(ctx.names))
        count = len(ctx.names)
        call = dict(zip(ctx.names, ctx.saved_tensors[:count]))
        starts = [call["initial_state"], *ctx.saved_tensors[count:]]
        wanted = [name for name, need in zip(ctx.names, ctx.needs_input_grad[3:]) if need]
        gradients: dict[str, Tensor] = {}
        for i in reversed(range(len(starts))):
            first = i * ctx.segment
            piece = {**_piece(call, first, ctx.segment), "initial_state": starts[i]}
            # A state in between always needs its gradient: the segment before goes on from it.
            leaves = {
                name: x.detach().requires_grad_()
                for name, x in piece.items()
                if x is not None and (name in wanted or (name == "initial_state" and i > 0))
            }
            with torch.enable_grad():
                y, state = package.selective_scan(
                    **{**piece, **leaves}, **ctx.options, return_final_state=True
                )
            dy_piece = None if dy is None else dy[:, first : first + ctx.segment]
            given = [(x, dx) for x, dx in ((y, dy_piece), (state, dstate)) if dx is not None]
            found = torch.autograd.grad(
                [x for x, _ in given],
                list(leaves.values()),
                [dx for _, dx in given],
                materialize_grads=True,
            )
            dstate = None
            for name, gradient in zip(leaves, found):
                if name == "initial_state":
                    dstate = gradient
                elif _in_pieces(name, call[name]):
                    if name not in gradients:
                        gradients[name] = torch.empty_like(call[name])
                    gradients[name][:, first : first + ctx.segment] = gradient
                elif name in gradients:
                    gradients[name] += gradient
                else:
                    gradients[name] = gradient
        if dstate is not None:
            gradients["initial_state"] = dstate
        return None, None, None, *(gradients.get(name) for name in ctx.names)


def _piece(call: dict[str, Any], first: int, segment: int) -> dict[str, Any]:
    """The call's tensors with the segment's steps only."""
    return {
        name: x[:, first : first + segment] if x is not None and _in_pieces(name, x) else x
        for name, x in call.items()
    }


def _in_pieces(name: str, x: Tensor) -> bool:
    return name in _SEQUENCES or (name in "BC" and x.ndim == 3)
