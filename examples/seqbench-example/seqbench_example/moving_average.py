"""A causal moving average of the last few tokens, channel by channel, with learned weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seqbench.models.base import SequenceLayer, State, require
from seqbench.models.build import Preset


@dataclass(frozen=True, kw_only=True)
class MovingAverageConfig:
    """How far it looks back."""

    span: int = 32  # tokens

    def __post_init__(self) -> None:
        require(self.span >= 1, "span", self.span, "1 or more")


class MovingAverage(SequenceLayer):
    """y[t] = sum over i < span of w[i] x[t - i]; the state is the last span - 1 inputs."""

    Config = MovingAverageConfig
    complexity = "O(L), O(1)"

    def __init__(self, width: int, config: MovingAverageConfig, *, d_model: int) -> None:
        super().__init__(width, config, d_model=d_model)
        self.width, self.span = width, config.span
        # [d, i] weighs the input of span - 1 - i tokens ago.
        self.weight = nn.Parameter(torch.full((width, config.span), 1 / config.span))

    def forward(self, x_BLD: Tensor, state: State | None = None) -> Any:
        before = self._zeros(x_BLD) if state is None else state
        padded = torch.cat([before, x_BLD], 1)
        weight = self.weight.to(x_BLD.dtype)[:, None]
        y_BLD = F.conv1d(padded.mT, weight, groups=self.width).mT
        return y_BLD if state is None else (y_BLD, padded[:, x_BLD.shape[1] :])

    def initial_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> State:
        return torch.zeros(batch_size, self.span - 1, self.width, device=device, dtype=dtype)

    def step(self, x_BD: Tensor, state: State) -> tuple[Tensor, State]:
        y_BLD, state = self.forward(x_BD[:, None], state)
        return y_BLD[:, 0], state

    def state_size(self, length: int) -> int:
        return (self.span - 1) * self.width

    def _zeros(self, like: Tensor) -> Tensor:
        return self.initial_state(like.shape[0], like.device, like.dtype)


SMOOTHIE = Preset(
    block="mamba",
    layer="moving-average",
    summary="a moving average in the Mamba block",
    options={"span": 8},
)
