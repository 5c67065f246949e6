"""Gated linear attention: decay per key channel and input (Yang et al. 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seqbench.kernels.linear_attention import linear_attention, linear_attention_step
from seqbench.models.base import SequenceLayer, State, require


@dataclass(frozen=True, kw_only=True)
class GLAConfig:
    """Heads and gates."""

    num_heads: int = 4
    gate_rank: int = 16  # of the map to the decay
    gate_temperature: float = 16.0  # decay = sigmoid(.)^(1 / temperature)

    def __post_init__(self) -> None:
        require(self.num_heads >= 1, "num_heads", self.num_heads, "1 or more")
        require(self.gate_rank >= 1, "gate_rank", self.gate_rank, "1 or more")
        positive = self.gate_temperature > 0
        require(positive, "gate_temperature", self.gate_temperature, "a positive number")


class GLA(SequenceLayer):
    """S[t] = diag(α[t]) S[t-1] + k[t] v[t]ᵀ; y[t] = norm(q[t] S[t]) silu(gate[t]).

    Keys are half as wide as values. The state is S, (B, H, K, V).
    """

    Config = GLAConfig
    complexity = "O(L), O(1)"

    def __init__(self, width: int, config: GLAConfig, *, d_model: int) -> None:
        super().__init__(width, config, d_model=d_model)
        self.heads, self.width, self.key_width = config.num_heads, width, width // 2
        fits = width % (2 * self.heads) == 0
        require(
            fits, "num_heads", self.heads, f"such that {width} / num_heads is a whole even number"
        )
        self.temperature = config.gate_temperature
        self.in_proj = nn.Linear(width, 2 * self.key_width + 2 * width, bias=False)
        self.decay_in = nn.Linear(width, config.gate_rank, bias=False)
        self.decay_out = nn.Linear(config.gate_rank, self.key_width)
        self.norm_weight = nn.Parameter(torch.ones(width // self.heads))
        self.out_proj = nn.Linear(width, width, bias=False)

    def forward(self, x_BLD: Tensor, state: State | None = None) -> Any:
        q, k, v, log_decay, gate = self._project(x_BLD)
        y, new_state = linear_attention(q, k, v, log_decay, state, chunk=32)
        y = self._output(y, gate)
        return y if state is None else (y, new_state)

    def initial_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> State:
        key, value = self.key_width // self.heads, self.width // self.heads
        return torch.zeros(batch_size, self.heads, key, value, device=device, dtype=dtype)

    def step(self, x_BD: Tensor, state: State) -> tuple[Tensor, State]:
        q, k, v, log_decay, gate = self._project(x_BD)
        y, state = linear_attention_step(q, k, v, log_decay, state)
        return self._output(y, gate), state

    def state_size(self, length: int) -> int:
        return self.key_width * self.width // self.heads

    def _project(self, x: Tensor) -> tuple[Tensor, ...]:
        widths = [self.key_width, self.key_width, self.width, self.width]
        q, k, v, gate = self.in_proj(x).split(widths, -1)
        log_decay = F.logsigmoid(self.decay_out(self.decay_in(x))) / self.temperature
        q, k, v, log_decay = (t.unflatten(-1, (self.heads, -1)) for t in (q, k, v, log_decay))
        return q * k.shape[-1] ** -0.5, k, v, log_decay, gate

    def _output(self, y: Tensor, gate: Tensor) -> Tensor:
        y = F.rms_norm(y, y.shape[-1:], self.norm_weight.to(y.dtype), eps=1e-5).flatten(-2)
        return self.out_proj(y.to(gate.dtype) * F.silu(gate))
