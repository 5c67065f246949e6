"""Multi-scale retention: linear attention that decays at a rate a head (Sun et al. 2023)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seqbench.kernels.linear_attention import linear_attention, linear_attention_step
from seqbench.models.base import SequenceLayer, State, require
from seqbench.models.rotary import rotate


@dataclass(frozen=True, kw_only=True)
class RetNetConfig:
    """Heads and widths."""

    num_heads: int = 4
    expand_v: int = 2  # width of the values over that of the layer

    def __post_init__(self) -> None:
        require(self.num_heads >= 1, "num_heads", self.num_heads, "1 or more")
        require(self.expand_v >= 1, "expand_v", self.expand_v, "1 or more")


class RetNet(SequenceLayer):
    """y[t] = Σ γ^(t-s) (q[t]·k[s]) v[s], normed in each head, times silu(gate); γ = 1 - 2^(-5-h).

    Queries and keys are rotated by their position. The state is the sum of γ^(t-s) k[s] v[s]ᵀ,
    (B, H, K, V), and the number of tokens seen (B,).
    """

    Config = RetNetConfig
    complexity = "O(L), O(1)"

    def __init__(self, width: int, config: RetNetConfig, *, d_model: int) -> None:
        super().__init__(width, config, d_model=d_model)
        self.heads, self.width, self.value_width = config.num_heads, width, width * config.expand_v
        fits = width % (2 * self.heads) == 0
        require(
            fits, "num_heads", self.heads, f"such that {width} / num_heads is a whole even number"
        )
        self.in_proj = nn.Linear(width, 2 * width + 2 * self.value_width, bias=False)
        self.out_proj = nn.Linear(self.value_width, width, bias=False)
        self.scale = math.sqrt(self.heads / width)

    def forward(self, x_BLD: Tensor, state: State | None = None) -> Any:
        position = torch.arange(x_BLD.shape[1], device=x_BLD.device)
        if state is None:
            q, k, v, gate = self._project(x_BLD, position)
            y, _ = linear_attention(q, k, v, self._log_decay(q))
            return self._output(y, gate)
        sums, seen_B = state
        q, k, v, gate = self._project(x_BLD, seen_B[:, None] + position)
        y, sums = linear_attention(q, k, v, self._log_decay(q), sums)
        return self._output(y, gate), (sums, seen_B + x_BLD.shape[1])

    def initial_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> State:
        key, value = self.width // self.heads, self.value_width // self.heads
        sums = torch.zeros(batch_size, self.heads, key, value, device=device, dtype=dtype)
        return sums, torch.zeros(batch_size, dtype=torch.int64, device=device)

    def step(self, x_BD: Tensor, state: State) -> tuple[Tensor, State]:
        sums, seen_B = state
        q, k, v, gate = (t[:, 0] for t in self._project(x_BD[:, None], seen_B[:, None]))
        y, sums = linear_attention_step(q, k, v, self._log_decay(q), sums)
        return self._output(y, gate), (sums, seen_B + 1)

    def state_size(self, length: int) -> int:
        return self.width * self.value_width // self.heads + 1

    def _project(self, x_BLD: Tensor, position: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        widths = [2 * self.width, self.value_width, self.value_width]
        qk, v, gate = self.in_proj(x_BLD).split(widths, -1)
        q, k = rotate(qk.unflatten(-1, (2 * self.heads, -1)), position).chunk(2, -2)
        return q, k * self.scale, v.unflatten(-1, (self.heads, -1)), gate

    def _log_decay(self, like: Tensor) -> Tensor:
        head = torch.arange(self.heads, device=like.device, dtype=torch.float64)
        return torch.log1p(-(2.0 ** (-5 - head)))[:, None].to(like.dtype)

    def _output(self, y: Tensor, gate: Tensor) -> Tensor:
        y = F.rms_norm(y, y.shape[-1:], eps=1e-5).flatten(-2)
        return self.out_proj(y.to(gate.dtype) * F.silu(gate))
