"""The Mamba block: widen, short convolution, inner layer, SiLU gate (Gu & Dao 2023, 3.4)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seqbench.kernels.causal_conv1d import causal_conv1d, causal_conv1d_step
from seqbench.models.base import Block, LayerFactory, State, require


@dataclass(frozen=True, kw_only=True)
class MambaConfig:
    """Letters of the paper in brackets."""

    expand: int = 2  # inner width over model width [E]
    d_conv: int = 4  # taps of the short convolution
    conv_bias: bool = True
    bias: bool = False  # of the linear maps

    def __post_init__(self) -> None:
        require(self.expand >= 1, "expand", self.expand, "1 or more")
        require(self.d_conv >= 1, "d_conv", self.d_conv, "1 or more")


class MambaBlock(Block):
    """x -> in_proj -> (x, z); y = layer(silu(conv(x))) * silu(z); out_proj(y)."""

    Config = MambaConfig
    resets = True

    def __init__(
        self, d_model: int, config: MambaConfig, *, make_layer: LayerFactory, num_layers: int
    ) -> None:
        super().__init__(d_model, config, make_layer=make_layer, num_layers=num_layers)
        self.width = config.expand * d_model
        self.in_proj = nn.Linear(d_model, 2 * self.width, bias=config.bias)
        bound = config.d_conv**-0.5  # as torch's Conv1d draws a depthwise kernel
        self.conv_weight = nn.Parameter(
            torch.empty(self.width, config.d_conv).uniform_(-bound, bound)
        )
        self.conv_bias = (
            nn.Parameter(torch.empty(self.width).uniform_(-bound, bound))
            if config.conv_bias
            else None
        )
        self.layer = make_layer(self.width)
        self.out_proj = nn.Linear(self.width, d_model, bias=config.bias)
        with torch.no_grad():
            # A residual stream that adds up num_layers branches starts with the variance of one.
            self.out_proj.weight /= math.sqrt(num_layers)
            for linear in (self.in_proj, self.out_proj):
                if linear.bias is not None:
                    linear.bias.zero_()

    def forward(
        self, x_BLD: Tensor, state: State | None = None, *, reset: Tensor | None = None
    ) -> Any:
        # Two products instead of one and a split: x and z come out contiguous, nothing is copied.
        weight_x, weight_z = self.in_proj.weight.chunk(2)
        bias_x, bias_z = (None, None) if self.in_proj.bias is None else self.in_proj.bias.chunk(2)
        z_BLE = F.linear(x_BLD, weight_z, bias_z)
        x_BLE: Any = F.linear(x_BLD, weight_x, bias_x)
        apart: Any = {} if reset is None else {"reset": reset}
        if state is None:
            x_BLE = causal_conv1d(
                x_BLE, self.conv_weight, self.conv_bias, activation="silu", reset=reset
            )
            if self.layer.fuses_gate:
                return self.out_proj(self.layer(x_BLE, None, z_BLE, **apart))
            return self.out_proj(self.layer(x_BLE, **apart) * F.silu(z_BLE))
        conv_state, layer_state = state
        x_BLE, conv_state = causal_conv1d(
            x_BLE,
            self.conv_weight,
            self.conv_bias,
            activation="silu",
            initial_state=conv_state,
            return_final_state=True,
            reset=reset,
        )
        if self.layer.fuses_gate:
            y_BLE, layer_state = self.layer(x_BLE, layer_state, z_BLE, **apart)
        else:
            y_BLE, layer_state = self.layer(x_BLE, layer_state, **apart)
            y_BLE = y_BLE * F.silu(z_BLE)
        return self.out_proj(y_BLE), (conv_state, layer_state)

    def initial_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> State:
        taps = self.conv_weight.shape[1] - 1
        conv_state = torch.zeros(batch_size, taps, self.width, device=device, dtype=dtype)
        return conv_state, self.layer.initial_state(batch_size, device, dtype)

    def step(self, x_BD: Tensor, state: State) -> tuple[Tensor, State]:
        conv_state, layer_state = state
        x_BE, z_BE = self.in_proj(x_BD).chunk(2, -1)
        x_BE, conv_state = causal_conv1d_step(
            conv_state, x_BE, self.conv_weight, self.conv_bias, activation="silu"
        )
        if self.layer.fuses_gate:
            y_BE, layer_state = self.layer.step(x_BE, layer_state, z_BE)  # type: ignore[call-arg]
        else:
            y_BE, layer_state = self.layer.step(x_BE, layer_state)
            y_BE = y_BE * F.silu(z_BE)
        return self.out_proj(y_BE), (conv_state, layer_state)

    def state_size(self, length: int) -> int:
        return self.width * (self.conv_weight.shape[1] - 1) + self.layer.state_size(length)
