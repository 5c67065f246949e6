"""Very long sequences in pieces: exact gradients, with the activations of one piece in memory."""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

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

    Raises ValueError if `segment` is less than 1.
    """
    if segment < 1:
        raise ValueError(f"segmented: segment={segment}; it must be 1 or more")
    B, L, _ = x_BLD.shape
    if segment >= L:
        return module(x_BLD) if state is None else module(x_BLD, state)
    carried = module.initial_state(B, x_BLD.device, x_BLD.dtype) if state is None else state
    pieces = []
    for x in x_BLD.split(segment, 1):
        y, carried = checkpoint(module, x, carried, use_reentrant=False)
        pieces.append(y)
    y_BLD = torch.cat(pieces, 1)
    return y_BLD if state is None else (y_BLD, carried)
