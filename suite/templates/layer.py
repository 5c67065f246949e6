"""new-layer: an exponential moving average with a learned decay per channel."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from seqbench.kernels.linear_attention import diagonal_recurrence
from seqbench.models.base import SequenceLayer, State, no_weight_decay, require


@dataclass(frozen=True, kw_only=True)
class NewLayerConfig:
    """Every field can be set on the command line, as --set model.longest_memory=100."""

    longest_memory: float = 32.0  # in tokens: of the last channel; the first forgets at once

    def __post_init__(self) -> None:
        require(self.longest_memory > 1, "longest_memory", self.longest_memory, "above 1")


class NewLayer(SequenceLayer):
    """h[t] = a h[t-1] + x[t]; y[t] = w h[t], channel by channel, 0 < a < 1; the state is h."""

    Config = NewLayerConfig
    complexity = "O(L), O(1)"

    def __init__(self, width: int, config: NewLayerConfig, *, d_model: int) -> None:
        super().__init__(width, config, d_model=d_model)
        self.width = width
        memory = torch.linspace(0, math.log(config.longest_memory), width).exp()
        self.log_rate = no_weight_decay(nn.Parameter(-memory.log()))  # a = exp(-exp(log_rate))
        self.weight = no_weight_decay(nn.Parameter(torch.ones(width)))

    def forward(self, x_BLD: Tensor, state: State | None = None) -> Any:
        h_BLD = diagonal_recurrence(-self.log_rate.exp(), x_BLD, state)
        y_BLD = self.weight * h_BLD
        return y_BLD if state is None else (y_BLD, h_BLD[:, -1])

    def initial_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> State:
        return torch.zeros(batch_size, self.width, device=device, dtype=dtype)

    def step(self, x_BD: Tensor, state: State) -> tuple[Tensor, State]:
        h_BD = torch.exp(-self.log_rate.exp()) * state + x_BD
        return self.weight * h_BD, h_BD

    def state_size(self, length: int) -> int:
        return self.width
