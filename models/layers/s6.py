"""S6, the selective state space layer: Δ, B, C depend on the input (Gu & Dao 2023, 3.2)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seqbench.kernels.selective_scan import selective_scan, selective_scan_step
from seqbench.models.base import SequenceLayer, State, no_weight_decay, require


@dataclass(frozen=True, kw_only=True)
class S6Config:
    """Letters of the paper in brackets."""

    d_state: int = 16  # [N]
    dt_rank: int | Literal["auto"] = "auto"  # of the map to Δ [R]; auto: d_model / 16, rounded up
    dt_min: float = 1e-3  # Δ starts log-uniform in [dt_min, dt_max]
    dt_max: float = 0.1
    dt_floor: float = 1e-4

    def __post_init__(self) -> None:
        require(1 <= self.d_state <= 256, "d_state", self.d_state, "1 to 256")
        if self.dt_rank != "auto":
            require(self.dt_rank >= 1, "dt_rank", self.dt_rank, "1 or more, or 'auto'")
        require(0 < self.dt_min <= self.dt_max, "dt_min", self.dt_min, "in (0, dt_max]")


class S6(SequenceLayer):
    """h[t] = exp(Δ[t] A) h[t-1] + Δ[t] B[t] x[t]; y[t] = (C[t]·h[t] + D x[t]) silu(z[t]).

    The state is h, (B, D, N) float32.
    """

    Config = S6Config
    complexity = "O(L), O(1)"
    fuses_gate = True

    def __init__(self, width: int, config: S6Config, *, d_model: int, num_layers: int) -> None:
        super().__init__(width, config, d_model=d_model, num_layers=num_layers)
        self.width, self.d_state = width, config.d_state
        self.rank = math.ceil(d_model / 16) if config.dt_rank == "auto" else config.dt_rank
        self.x_proj = nn.Linear(width, self.rank + 2 * config.d_state, bias=False)
        self.dt_proj = nn.Linear(self.rank, width)
        nn.init.uniform_(self.dt_proj.weight, -(self.rank**-0.5), self.rank**-0.5)
        self.dt_proj.bias = no_weight_decay(nn.Parameter(_dt_bias(width, config)))
        n = torch.arange(1, config.d_state + 1, dtype=torch.float32)
        self.A_log = no_weight_decay(nn.Parameter(n.log().repeat(width, 1)))
        self.D = no_weight_decay(nn.Parameter(torch.ones(width)))

    def forward(
        self, x_BLD: Tensor, state: State | None = None, z_BLD: Tensor | None = None
    ) -> Any:
        delta_BLD, B_BLN, C_BLN = self._select(x_BLD)
        return selective_scan(
            x_BLD,
            delta_BLD,
            self._A(),
            B_BLN,
            C_BLN,
            self.D,
            z_BLD,
            delta_bias=self.dt_proj.bias,
            delta_softplus=True,
            initial_state=state,
            return_final_state=state is not None,
        )

    def initial_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> State:
        dtype = torch.promote_types(self.A_log.dtype, torch.float32)
        return torch.zeros(batch_size, self.width, self.d_state, device=device, dtype=dtype)

    def step(self, x_BD: Tensor, state: State, z_BD: Tensor | None = None) -> tuple[Tensor, State]:
        delta_BD, B_BN, C_BN = self._select(x_BD)
        return selective_scan_step(
            state,
            x_BD,
            delta_BD,
            self._A(),
            B_BN[:, None],
            C_BN[:, None],
            self.D,
            z_BD,
            delta_bias=self.dt_proj.bias,
            delta_softplus=True,
        )

    def state_size(self, length: int) -> int:
        return self.width * self.d_state

    def _A(self) -> Tensor:
        return -torch.exp(self.A_log)

    def _select(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Δ before bias and softplus (..., D), B and C (..., N)."""
        r, B, C = self.x_proj(x).split([self.rank, self.d_state, self.d_state], -1)
        return F.linear(r, self.dt_proj.weight), B, C


def _dt_bias(width: int, config: S6Config) -> Tensor:
    """softplus^-1 of a log-uniform draw."""
    log_min, log_max = math.log(config.dt_min), math.log(config.dt_max)
    dt = torch.exp(torch.rand(width) * (log_max - log_min) + log_min).clamp(min=config.dt_floor)
    return dt + torch.log(-torch.expm1(-dt))
