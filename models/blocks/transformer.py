"""The Transformer block: a layer, then an MLP in its own branch (Vaswani et al. 2017)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seqbench.models.base import Block, LayerFactory, State, require


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """The MLP; without one the block is its layer alone, as in the paper's Table 2."""

    mlp: Literal["gelu", "swiglu", "none"] = "gelu"
    mlp_expand: float = 4.0  # inner width over model width; SwiGLU takes 2/3 of it, for equal size
    bias: bool = False  # of the linear maps

    def __post_init__(self) -> None:
        require(self.mlp_expand > 0, "mlp_expand", self.mlp_expand, "a positive number")


class TransformerBlock(Block):
    """The layer itself; `mlp` is the second branch of the residual stream."""

    Config = TransformerConfig
    resets = True

    def __init__(
        self, d_model: int, config: TransformerConfig, *, make_layer: LayerFactory, num_layers: int
    ) -> None:
        super().__init__(d_model, config, make_layer=make_layer, num_layers=num_layers)
        self.layer = make_layer(d_model)
        output = getattr(self.layer, "out_proj", None)
        if isinstance(output, nn.Linear):
            _scale_output(output, num_layers)
        if config.mlp == "gelu":
            self.mlp = _MLP(d_model, round(config.mlp_expand * d_model), config.bias, num_layers)
        elif config.mlp == "swiglu":
            width = 8 * math.ceil(config.mlp_expand * d_model * 2 / 3 / 8)
            self.mlp = _SwiGLU(d_model, width, config.bias, num_layers)

    def forward(
        self, x_BLD: Tensor, state: State | None = None, *, reset: Tensor | None = None
    ) -> Any:
        apart: Any = {} if reset is None else {"reset": reset}
        return self.layer(x_BLD, **apart) if state is None else self.layer(x_BLD, state, **apart)

    def initial_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> State:
        return self.layer.initial_state(batch_size, device, dtype)

    def step(self, x_BD: Tensor, state: State) -> tuple[Tensor, State]:
        return self.layer.step(x_BD, state)

    def state_size(self, length: int) -> int:
        return self.layer.state_size(length)


class _MLP(nn.Module):
    def __init__(self, d_model: int, width: int, bias: bool, num_layers: int) -> None:
        super().__init__()
        self.up = nn.Linear(d_model, width, bias=bias)
        self.down = nn.Linear(width, d_model, bias=bias)
        _scale_output(self.down, num_layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class _SwiGLU(nn.Module):
    def __init__(self, d_model: int, width: int, bias: bool, num_layers: int) -> None:
        super().__init__()
        self.gate = nn.Linear(d_model, width, bias=bias)
        self.up = nn.Linear(d_model, width, bias=bias)
        self.down = nn.Linear(width, d_model, bias=bias)
        _scale_output(self.down, num_layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


def _scale_output(linear: nn.Linear, num_layers: int) -> None:
    with torch.no_grad():
        # Two branches a block write to the residual stream: the layer's and the MLP's.
        linear.weight /= math.sqrt(2 * num_layers)
        if linear.bias is not None:
            linear.bias.zero_()
