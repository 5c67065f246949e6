"""Very long sequences in pieces: exact gradients, with the activations of one piece in memory.

`segmented` is for a layer or a block, `segmented_loss` for a whole model and its loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from seqbench.models.base import CausalModule, State

Gradients = Literal["exact", "truncated"]
LossOf = Callable[[Tensor, slice], Tensor]  # (logits of a piece (B, l, V), its place) -> its loss


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


def segmented_loss(
    model: nn.Module,
    loss_of: LossOf,
    tokens_BL: Tensor,
    *,
    segment: int,
    gradients: Gradients = "exact",
    **by_position: Tensor,
) -> Tensor:
    """The sum of `loss_of` over pieces of `segment` tokens, which carry the model's state.

    `by_position`, (B, L) each, are keywords of the model's forward, such as `reset`.

    exact: the gradients are those of the whole sequence. Forward keeps the states between the
    pieces alone; backward runs each piece again, from the last to the first, and hands the gradient
    of its first state on to the piece before. truncated: no gradient crosses from a piece into the
    one before, which saves the second run. Either way memory holds the activations and logits of
    one piece, so that it grows with L only as the tokens and, for exact, L / segment states do.

    The model is one that `cannot_carry` has nothing to say about. `loss_of` may be called twice for
    a piece.
    """
    if segment < 1:
        raise ValueError(f"segmented_loss: segment={segment}; it must be 1 or more")
    parameters = [p for p in model.parameters() if p.requires_grad]
    if gradients == "exact":
        loss: Tensor = _ExactLoss.apply(
            model, loss_of, segment, tokens_BL, by_position, *parameters
        )
        return loss
    return _truncated(model, loss_of, segment, tokens_BL, by_position, parameters)


def accumulated_loss(
    loss_of_rows: Callable[[slice], Tensor], model: nn.Module, rows: int, *, at_once: int
) -> Tensor:
    """The sum of `loss_of_rows` over groups of `at_once` of the batch's rows, one after another.

    The gradients of a group by the model's parameters are taken before the next one runs, so memory
    holds one group's activations.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    totals = [torch.zeros_like(p) for p in parameters]
    total: Tensor | float = 0.0
    for first in range(0, rows, at_once):
        loss = loss_of_rows(slice(first, min(first + at_once, rows)))
        _add(totals, iter(torch.autograd.grad(loss, parameters, allow_unused=True)))
        total = total + loss.detach()
    return _known(total, parameters, totals)


def cannot_carry(model: nn.Module, length: int) -> str | None:
    """Why a model gains nothing from going through `length` tokens in pieces; None: it can.

    A state that grows with the length holds every token seen, whatever the pieces.
    """
    size: Any = model.state_size
    if size(2 * length) > size(length):
        return (
            f"its state grows with the length ({size(length)} numbers after {length} tokens), so "
            "pieces would hold as much as the whole"
        )
    return None


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

    What outlives a piece lies in memory that was taken once: small tensors left among a piece's
    large ones would leave the heap full of holes, and it would grow.
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
        room: list[Tensor] = []
        places = _places(x_BLD, segment)
        for i, some in enumerate(places):
            starts += leaves(state)
            y, state = module(x_BLD[:, some], state)
            if y_BLD is None:
                y_BLD = y.new_empty(*x_BLD.shape[:2], *y.shape[2:])
                room = [x.new_empty(len(places), *x.shape) for x in leaves(state)]
            y_BLD[:, some] = y
            del y
            state = _moved(state, [x[i] for x in room])
        assert y_BLD is not None
        ctx.module, ctx.segment, ctx.count = module, segment, count
        ctx.save_for_backward(x_BLD, *tensors[count:], *starts)
        ctx.autocast = _autocast(x_BLD.device)
        ctx.set_materialize_grads(False)
        ends = [x.clone() for x in leaves(state)]
        ctx.mark_non_differentiable(*(x for x in ends if not _differentiable(x)))
        # The nest is kept for its form; its tensors are outputs, which a context must not hold.
        ctx.state = with_leaves(state, [x.new_empty(0) for x in ends])
        return y_BLD, *ends

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        dy_BLD, *dends = gradients
        dstate = dends
        x_BLD, *saved = ctx.saved_tensors
        parameters = saved[: len(ctx.needs_input_grad) - 5 - ctx.count]
        starts = saved[len(parameters) :]
        needs_x, needs_state = ctx.needs_input_grad[4], ctx.needs_input_grad[5 : 5 + ctx.count]
        dx_BLD = torch.empty_like(x_BLD) if needs_x else None
        totals = [torch.zeros_like(p) for p in parameters]
        older: list[Tensor | None] = []  # of two pieces on, whose memory is free again
        for piece, some in reversed(list(enumerate(_places(x_BLD, ctx.segment)))):
            x = x_BLD[:, some].detach().requires_grad_(needs_x)
            start = [
                s.detach().requires_grad_(_differentiable(s))
                for s in starts[piece * ctx.count : (piece + 1) * ctx.count]
            ]
            with torch.enable_grad(), ctx.autocast():
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
            kept = _kept_of(start, found, older)
            older, dstate = [] if dstate is dends else dstate, kept  # dends is the caller's memory
            _add(totals, found)
        first_state = (g if needed else None for g, needed in zip(dstate, needs_state))
        return None, None, None, None, dx_BLD, *first_state, *totals


class _ExactLoss(torch.autograd.Function):
    """Parameters -> the loss of a whole sequence.

    What outlives a piece lies in memory that was taken before or between pieces, once: small
    tensors left among a piece's large ones would leave the heap full of holes, and it would grow.
    """

    @staticmethod
    def forward(
        ctx: Any,
        model: Any,
        loss_of: LossOf,
        segment: int,
        tokens_BL: Tensor,
        by_position: Mapping[str, Tensor],
        *parameters: Tensor,
    ) -> Tensor:
        ctx.model, ctx.loss_of, ctx.segment = model, loss_of, segment
        ctx.by_position = by_position
        ctx.autocast = _autocast(tokens_BL.device)
        ctx.save_for_backward(tokens_BL, *parameters)
        places = _places(tokens_BL, segment)
        state = model.initial_state(len(tokens_BL), tokens_BL.device)
        ctx.starts = []  # no output of this function, so a context may hold them
        room: list[Tensor] = []
        total = torch.zeros((), device=tokens_BL.device)
        with ctx.autocast():
            for i, some in enumerate(places):
                ctx.starts.append(state)
                logits_BLV, state = model(tokens_BL[:, some], state, **_piece(by_position, some))
                total += loss_of(logits_BLV, some)
                del logits_BLV
                if not room:
                    room = [x.new_empty(len(places), *x.shape) for x in leaves(state)]
                state = _moved(state, [x[i] for x in room])
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        tokens_BL, *parameters = ctx.saved_tensors
        totals = [torch.zeros_like(p) for p in parameters]
        dstate: list[Tensor | None] = []
        older: list[Tensor | None] = []  # of two pieces on, whose memory is free again
        for some in reversed(_places(tokens_BL, ctx.segment)):
            nest = ctx.starts.pop()
            start = [s.detach().requires_grad_(_differentiable(s)) for s in leaves(nest)]
            with torch.enable_grad(), ctx.autocast():
                logits_BLV, state = ctx.model(
                    tokens_BL[:, some], with_leaves(nest, start), **_piece(ctx.by_position, some)
                )
                loss = ctx.loss_of(logits_BLV, some)
            del logits_BLV
            known = [(loss, gradient.to(loss.dtype))]
            # Behind the last piece there is nothing that its state could matter to.
            known += [(s, g) for s, g in zip(leaves(state), dstate) if g is not None]
            outputs, given = zip(*((out, g) for out, g in known if out.requires_grad))
            wanted = [*filter(_differentiable, start), *parameters]
            found = iter(torch.autograd.grad(outputs, wanted, given, allow_unused=True))
            older, dstate = dstate, _kept_of(start, found, older)
            _add(totals, found)
        return None, None, None, None, None, *totals


def _truncated(
    model: Any,
    loss_of: LossOf,
    segment: int,
    tokens_BL: Tensor,
    by_position: Mapping[str, Tensor],
    parameters: list[nn.Parameter],
) -> Tensor:
    """The loss; none of its gradients crosses from a piece into the one before."""
    totals = [torch.zeros_like(p) for p in parameters]
    state = model.initial_state(len(tokens_BL), tokens_BL.device)
    rooms: list[list[Tensor]] = []  # two, as a state may hold parts of the one before
    total = torch.zeros((), device=tokens_BL.device)
    for i, some in enumerate(_places(tokens_BL, segment)):
        with torch.enable_grad(), _autocast(tokens_BL.device)():
            logits_BLV, state = model(tokens_BL[:, some], state, **_piece(by_position, some))
            loss = loss_of(logits_BLV, some)
        del logits_BLV
        _add(totals, iter(torch.autograd.grad(loss, parameters, allow_unused=True)))
        total += loss.detach()
        if len(rooms) < 2:
            rooms.append([torch.empty_like(x.detach()) for x in leaves(state)])
        state = _moved(state, rooms[i % 2])
    return _known(total, parameters, totals)


def _known(
    total: Tensor | float, parameters: list[nn.Parameter], gradients: list[Tensor]
) -> Tensor:
    """A loss, as a function of the parameters with those gradients."""
    loss: Tensor = _KnownGradients.apply(total, len(gradients), *gradients, *parameters)
    return loss


class _KnownGradients(torch.autograd.Function):
    """A loss whose gradients by the parameters are known already."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, count: int, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors[:count])
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        known = ctx.saved_tensors
        return None, None, *[None] * len(known), *(gradient * g for g in known)


def _places(tokens_BL: Tensor, segment: int) -> list[slice]:
    length = tokens_BL.shape[1]
    return [slice(first, min(first + segment, length)) for first in range(0, length, segment)]


def _piece(by_position: Mapping[str, Tensor], some: slice) -> dict[str, Tensor]:
    return {name: values[:, some] for name, values in by_position.items()}


def _add(totals: list[Tensor], gradients: Iterator[Tensor | None]) -> None:
    for total, gradient in zip(totals, gradients, strict=True):
        if gradient is not None:
            total += gradient


def _moved(state: State, room: list[Tensor]) -> State:
    """The state, detached, in the memory of `room` as far as it fits there."""
    return with_leaves(
        state, [_kept(x.detach(), r) for x, r in zip(leaves(state), room, strict=True)]
    )


def _kept_of(
    start: list[Tensor], found: Iterator[Tensor | None], room: list[Tensor | None]
) -> list[Tensor | None]:
    """The gradients of a piece's first state, the next of `found`, in the memory of `room`."""
    rooms = room or [None] * len(start)
    return [
        _kept(next(found), r) if _differentiable(s) else None
        for s, r in zip(start, rooms, strict=True)
    ]


@overload
def _kept(x: Tensor, room: Tensor | None) -> Tensor: ...
@overload
def _kept(x: Tensor | None, room: Tensor | None) -> Tensor | None: ...
def _kept(x: Tensor | None, room: Tensor | None) -> Tensor | None:
    """What x holds, in the memory of `room` if that has its form, without what x is a view of."""
    if x is None or room is None or (x.shape, x.dtype) != (room.shape, room.dtype):
        return None if x is None else x.clone()
    return room.copy_(x)


def _autocast(device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
    """Makes the autocast that is on now, for a pass outside it.

    Without its cache: a cast of a weight kept from a pass without gradients has none later.
    """
    kind = device.type
    enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    return lambda: torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False)


def _differentiable(x: Tensor) -> bool:
    return x.is_floating_point() or x.is_complex()
