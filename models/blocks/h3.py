"""The H3 block: shift, multiply, inner layer, multiply (Fu, Dao et al. 2023)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from seqbench.kernels.causal_conv1d import causal_conv1d, causal_conv1d_step
from seqbench.models.base import Block, LayerFactory, State, require


@dataclass(frozen=True, kw_only=True)
class H3Config:
    """Widths of the shift and of the heads."""

    d_conv: int = 4  # taps of the shift SSM, whose state is the last d_conv keys
    head_dim: int = 1  # keys and values meet as an outer product within a head
    bias: bool = False  # of the linear maps

    def __post_init__(self) -> None:
        require(self.d_conv >= 1, "d_conv", self.d_conv, "1 or more")
        require(self.head_dim >= 1, "head_dim", self.head_dim, "1 or more")


class H3Block(Block):
    """q, k, v = in_proj(x); out_proj(q · layer(shift(k) ⊗ v)), ⊗ and · within each head."""

    Config = H3Config
    resets = True

    def __init__(
        self, d_model: int, config: H3Config, *, make_layer: LayerFactory, num_layers: int
    ) -> None:
        super().__init__(d_model, config, make_layer=make_layer, num_layers=num_layers)
        self.d_model, self.head_dim = d_model, config.head_dim
        fits = d_model % config.head_dim == 0
        require(fits, "head_dim", config.head_dim, f"a divisor of d_model={d_model}")
        self.in_proj = nn.Linear(d_model, 3 * d_model, bias=config.bias)
        bound = config.d_conv**-0.5  # as torch's Conv1d draws a depthwise kernel
        self.shift_weight = nn.Parameter(
            torch.empty(d_model, config.d_conv).uniform_(-bound, bound)
        )
        self.layer = make_layer(d_model * config.head_dim)
        self.out_proj = nn.Linear(d_model, d_model, bias=config.bias)
        with torch.no_grad():
            self.out_proj.weight /= math.sqrt(num_layers)
            for linear in (self.in_proj, self.out_proj):
                if linear.bias is not None:
                    linear.bias.zero_()

    def forward(
        self, x_BLD: Tensor, state: State | None = None, *, reset: Tensor | None = None
    ) -> Any:
        k: Any
        apart: Any = {} if reset is None else {"reset": reset}
        q, k, v = self.in_proj(x_BLD).chunk(3, -1)
        if state is None:
            k = causal_conv1d(k, self.shift_weight, reset=reset)
            return self._read(q, self.layer(self._write(k, v), **apart))
        shift_state, layer_state = state
        k, shift_state = causal_conv1d(
            k, self.shift_weight, initial_state=shift_state, return_final_state=True, reset=reset
        )
        y, layer_state = self.layer(self._write(k, v), layer_state, **apart)
        return self._read(q, y), (shift_state, layer_state)

    def initial_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> State:
        taps = self.shift_weight.shape[1] - 1
        shift_state = torch.zeros(batch_size, taps, self.d_model, device=device, dtype=dtype)
        return shift_state, self.layer.initial_state(batch_size, device, dtype)

    def step(self, x_BD: Tensor, state: State) -> tuple[Tensor, State]:
        shift_state, layer_state = state
        q, k, v = self.in_proj(x_BD).chunk(3, -1)
        k, shift_state = causal_conv1d_step(shift_state, k, self.shift_weight)
        y, layer_state = self.layer.step(self._write(k, v), layer_state)
        return self._read(q, y), (shift_state, layer_state)

    def state_size(self, length: int) -> int:
        shift = self.d_model * (self.shift_weight.shape[1] - 1)
        return shift + self.layer.state_size(length)

    def _write(self, k: Tensor, v: Tensor) -> Tensor:
        """k ⊗ v within each head: (..., D) twice -> (..., D head_dim)."""
        if self.head_dim == 1:
            return k * v
        k, v = (t.unflatten(-1, (-1, self.head_dim)) for t in (k, v))
        return (k[..., :, None] * v[..., None, :]).flatten(-3)

    def _read(self, q: Tensor, y: Tensor) -> Tensor:
        """q · y within each head, and out."""
        if self.head_dim == 1:
            return self.out_proj(q * y)
        q = q.unflatten(-1, (-1, 1, self.head_dim))
        y = y.unflatten(-1, (-1, self.head_dim, self.head_dim))
        return self.out_proj((q @ y).flatten(-3))
