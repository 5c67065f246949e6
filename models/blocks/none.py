"""No gate: the S4 block, layer -> GELU -> linear map with GLU (Gu, Goel & Ré 2022)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seqbench.models.base import Block, LayerFactory, State


@dataclass(frozen=True, kw_only=True)
class NoneConfig:
    """What follows the layer."""

    activation: Literal["gelu", "silu", "none"] = "gelu"
    output: Literal["glu", "linear"] = "glu"  # glu: a 2 D wide map whose halves gate each other


class NoneBlock(Block):
    """y = layer(x); out(activation(y)): the "No gate" rows of Mamba's Table 1."""

    Config = NoneConfig
    resets = True

    def __init__(
        self, d_model: int, config: NoneConfig, *, make_layer: LayerFactory, num_layers: int
    ) -> None:
        super().__init__(d_model, config, make_layer=make_layer, num_layers=num_layers)
        self.config = config
        self.layer = make_layer(d_model)
        widths = 2 * d_model if config.output == "glu" else d_model
        self.out_proj = nn.Linear(d_model, widths)
        with torch.no_grad():
            self.out_proj.weight /= math.sqrt(num_layers)
            self.out_proj.bias.zero_()

    def forward(
        self, x_BLD: Tensor, state: State | None = None, *, reset: Tensor | None = None
    ) -> Any:
        apart: Any = {} if reset is None else {"reset": reset}
        if state is None:
            return self._mix(self.layer(x_BLD, **apart))
        y_BLD, state = self.layer(x_BLD, state, **apart)
        return self._mix(y_BLD), state

    def initial_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> State:
        return self.layer.initial_state(batch_size, device, dtype)

    def step(self, x_BD: Tensor, state: State) -> tuple[Tensor, State]:
        y_BD, state = self.layer.step(x_BD, state)
        return self._mix(y_BD), state

    def state_size(self, length: int) -> int:
        return self.layer.state_size(length)

    def _mix(self, y: Tensor) -> Tensor:
        if self.config.activation == "gelu":
            y = F.gelu(y)
        elif self.config.activation == "silu":
            y = F.silu(y)
        y = self.out_proj(y)
        return F.glu(y, -1) if self.config.output == "glu" else y
