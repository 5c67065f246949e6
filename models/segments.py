"""Very long sequences in pieces: exact gradients, with the activations of one piece in memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from seqbench.models.base import CausalModule, State


@overload
def segmented(module: CausalModule, x_BLD: Tensor, *, segment: int) -> Tensor: ...
@overload
def segmented(
    module: CausalModule, x_BLD: Tensor, state: State, *, segment: int
) -> tuple[Tensor, State]: ...
def segmented(
    module: CausalModule, x_BLD: Tensor, state: State | None = None, *, segment: int
) -> Tensor | tuple[Tensor, State]:
    """`module(x_BLD)`, or `module(x_BLD, state)`, `segment` positions at a time.

    Each piece continues from the state that the one before left. Beside x and y, and their
    gradients, only these states are kept: backward runs each piece again, from the last to the
    first, and hands the gradient of its first state on to the piece before. So the gradients are
    those of the whole sequence, and memory grows with L only as x, y and L / segment states do.
    The module must draw no random numbers, as a second run would draw others.

    Raises ValueError if `segment` is less than 1.
    """
    if segment < 1:
        raise ValueError(f"segmented: segment={segment}; it must be 1 or more")
    if x_BLD.shape[1] <= segment:
        return module(x_BLD) if state is None else module(x_BLD, state)
    carried = state
    if carried is None:
        carried = module.initial_state(len(x_BLD), x_BLD.device, x_BLD.dtype)
    starts = list(leaves(carried))
    parameters = [p for p in module.parameters() if p.requires_grad]
    y_BLD, *ends = _Segmented.apply(
        module, segment, carried, len(starts), x_BLD, *starts, *parameters
    )
    return y_BLD if state is None else (y_BLD, with_leaves(carried, ends))


def leaves(state: State) -> Iterator[Tensor]:
    """The tensors of a state, in a fixed order."""
    if isinstance(state, Tensor):
        yield state
    else:
        for part in state.values() if isinstance(state, dict) else state:
            yield from leaves(part)


def with_leaves(state: State, tensors: Iterable[Tensor]) -> State:
    """The same nest of other tensors."""
    remaining = iter(tensors)

    def rebuilt(part: State) -> State:
        if isinstance(part, Tensor):
            return next(remaining)
        if isinstance(part, dict):
            return {name: rebuilt(inner) for name, inner in part.items()}
        return type(part)(rebuilt(inner) for inner in part)

    return rebuilt(state)


class _Segmented(torch.autograd.Function):
    """(x, leaves of the first state, parameters) -> (y, leaves of the last state).

    Whole tensors are allocated once and filled piece by piece: pieces kept for a joining at the end
    would double them, and leave the heap full of holes.
    """

    @staticmethod
    def forward(
        ctx: Any,
        module: nn.Module,
        segment: int,
        state: State,
        count: int,
        x_BLD: Tensor,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        y_BLD: Tensor | None = None
        starts: list[Tensor] = []
        for first in range(0, x_BLD.shape[1], segment):
            starts += leaves(state)
            y, state = module(x_BLD[:, first : first + segment], state)
            if y_BLD is None:
                y_BLD = y.new_empty(*x_BLD.shape[:2], *y.shape[2:])
            y_BLD[:, first : first + segment] = y
        assert y_BLD is not None
        ctx.module, ctx.segment, ctx.count = module, segment, count
        ctx.save_for_backward(x_BLD, *tensors[count:], *starts)
        device = x_BLD.device.type
        ctx.autocast = {
            "device_type": device,
            "enabled": torch.is_autocast_enabled(device),
            "dtype": torch.get_autocast_dtype(device),
        }
        ctx.set_materialize_grads(False)
        ends = list(leaves(state))
        ctx.mark_non_differentiable(*(x for x in ends if not _differentiable(x)))
        # The nest is kept for its form; its tensors are outputs, which a context must not hold.
        ctx.state = with_leaves(state, [x.new_empty(0) for x in ends])
        return y_BLD, *ends

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        dy_BLD, *dstate = gradients
        x_BLD, *saved = ctx.saved_tensors
        parameters = saved[: len(ctx.needs_input_grad) - 5 - ctx.count]
        starts = saved[len(parameters) :]
        needs_x, needs_state = ctx.needs_input_grad[4], ctx.needs_input_grad[5 : 5 + ctx.count]
        dx_BLD = torch.empty_like(x_BLD) if needs_x else None
        totals: list[Tensor | None] = [None] * len(parameters)
        for first in reversed(range(0, x_BLD.shape[1], ctx.segment)):
            some = slice(first, first + ctx.segment)
            piece = first // ctx.segment
            x = x_BLD[:, some].detach().requires_grad_(needs_x)
            start = [
                s.detach().requires_grad_(_differentiable(s))
                for s in starts[piece * ctx.count : (piece + 1) * ctx.count]
            ]
            with torch.enable_grad(), torch.autocast(**ctx.autocast):
                y, state = ctx.module(x, with_leaves(ctx.state, start))
            known = [(y, None if dy_BLD is None else dy_BLD[:, some])]
            known += zip(leaves(state), dstate)
            known = [(out, g) for out, g in known if g is not None and out.requires_grad]
            wanted = [*([x] if needs_x else []), *filter(_differentiable, start), *parameters]
            found: Iterator[Tensor | None] = iter([None] * len(wanted))
            if known:
                outputs, given = zip(*known)
                found = iter(torch.autograd.grad(outputs, wanted, given, allow_unused=True))
            if dx_BLD is not None:
                dx = next(found)
                dx_BLD[:, some] = 0 if dx is None else dx
            dstate = [next(found) if _differentiable(s) else None for s in start]
            for i, gradient in enumerate(found):
                if gradient is not None:
                    total = totals[i]
                    totals[i] = gradient if total is None else total + gradient
        first_state = (g if needed else None for g, needed in zip(dstate, needs_state))
        return None, None, None, None, dx_BLD, *first_state, *totals


def _differentiable(x: Tensor) -> bool:
    return x.is_floating_point() or x.is_complex()
