"""Linear attention: softmax replaced by a feature map, elu + 1 (Katharopoulos et al. 2020)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seqbench.kernels.linear_attention import linear_attention, linear_attention_step
from seqbench.models.base import SequenceLayer, State, require


@dataclass(frozen=True, kw_only=True)
class LinearAttentionConfig:
    """Heads."""

    num_heads: int = 4
    bias: bool = False  # of the linear maps

    def __post_init__(self) -> None:
        require(self.num_heads >= 1, "num_heads", self.num_heads, "1 or more")


class LinearAttention(SequenceLayer):
    """y[t] = φ(q[t]) Σ φ(k[s]) v[s]ᵀ / φ(q[t])·Σ φ(k[s]), sums over s <= t.

    The state is both sums, (B, H, W, W + 1), W the width of a head: the last column counts keys.
    """

    Config = LinearAttentionConfig
    complexity = "O(L), O(1)"

    def __init__(self, width: int, config: LinearAttentionConfig, *, d_model: int) -> None:
        super().__init__(width, config, d_model=d_model)
        self.heads = config.num_heads
        fits = width % self.heads == 0
        require(fits, "num_heads", self.heads, f"a divisor of the width {width}")
        self.width = width
        self.in_proj = nn.Linear(width, 3 * width, bias=config.bias)
        self.out_proj = nn.Linear(width, width, bias=config.bias)

    def forward(self, x_BLD: Tensor, state: State | None = None) -> Any:
        y, new_state = linear_attention(*self._project(x_BLD), None, state)
        y = self._normalise(y, x_BLD.dtype)
        return y if state is None else (y, new_state)

    def initial_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> State:
        head = self.width // self.heads
        return torch.zeros(batch_size, self.heads, head, head + 1, device=device, dtype=dtype)

    def step(self, x_BD: Tensor, state: State) -> tuple[Tensor, State]:
        y, state = linear_attention_step(*self._project(x_BD), None, state)
        return self._normalise(y, x_BD.dtype), state

    def state_size(self, length: int) -> int:
        return self.width * (self.width // self.heads + 1)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """φ(q), φ(k) and v with a one behind it, each (..., H, W or W + 1)."""
        q, k, v = self.in_proj(x).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        return F.elu(q) + 1, F.elu(k) + 1, F.pad(v, (0, 1), value=1.0)

    def _normalise(self, y: Tensor, dtype: torch.dtype) -> Tensor:
        return self.out_proj((y[..., :-1] / (y[..., -1:] + 1e-6)).flatten(-2).to(dtype))
