"""LSTM (Hochreiter & Schmidhuber 1997), torch's own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from seqbench.models.base import SequenceLayer, State


class LSTM(SequenceLayer):
    """One LSTM layer as wide as its input; the state is h and c, each (B, 1, D)."""

    complexity = "O(L) in sequence, O(1)"

    def __init__(self, width: int, config: Any, *, d_model: int) -> None:
        super().__init__(width, config, d_model=d_model)
        self.width = width
        self.lstm = nn.LSTM(width, width, batch_first=True)

    def forward(self, x_BLD: Tensor, state: State | None = None) -> Any:
        with torch.autocast(x_BLD.device.type, enabled=False):
            x = x_BLD.to(self._dtype())
            start = None if state is None else tuple(t.transpose(0, 1).contiguous() for t in state)
            y, end = self.lstm(x, start)
        y = y.to(x_BLD.dtype)
        return y if state is None else (y, tuple(t.transpose(0, 1) for t in end))

    def initial_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> State:
        zero = torch.zeros(batch_size, 1, self.width, device=device, dtype=self._dtype())
        return zero, zero

    def step(self, x_BD: Tensor, state: State) -> tuple[Tensor, State]:
        y_BLD, state = self.forward(x_BD[:, None], state)
        return y_BLD[:, 0], state

    def state_size(self, length: int) -> int:
        return 2 * self.width

    def _dtype(self) -> torch.dtype:
        return next(self.lstm.parameters()).dtype
