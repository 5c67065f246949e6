"""The model contract: what a sequence layer, and a whole model, can be asked.

Shapes: B sequences in a batch, L positions, D model width, V vocabulary. A state is any nest of
tensors (tuple, list, dict) whose leading axis is B; only the layer that made it looks inside.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, overload

import torch
from torch import Tensor, nn

State = Any


class ModelError(ValueError):
    """A mistake in a model's name or options; one line that names the remedy."""


class SequenceLayer(nn.Module, ABC):
    """Maps (B, L, D) to (B, L, D), causally; the part of a block that mixes over time."""

    @overload
    def forward(self, x_BLD: Tensor) -> Tensor: ...
    @overload
    def forward(self, x_BLD: Tensor, state: State) -> tuple[Tensor, State]: ...
    @abstractmethod
    def forward(self, x_BLD: Tensor, state: State | None = None) -> Tensor | tuple[Tensor, State]:
        """From the zero state; or continuing from a state, with the next state returned."""

    @abstractmethod
    def initial_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> State:
        """The state before the first token."""

    @abstractmethod
    def step(self, x_BD: Tensor, state: State) -> tuple[Tensor, State]:
        """One token: equals `forward` over a sequence of one that continues from `state`."""

    @abstractmethod
    def state_size(self, length: int) -> int:
        """Numbers carried per sequence after `length` tokens when decoding."""
