"""S5: one diagonal state space shared by all channels (Smith, Warrington & Linderman 2023)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from seqbench.kernels.linear_attention import diagonal_recurrence
from seqbench.models.base import SequenceLayer, State, no_weight_decay, require
from seqbench.models.hippo import normal_legs


@dataclass(frozen=True, kw_only=True)
class S5Config:
    """Letters of the paper in brackets."""

    d_state: int = 64  # real numbers of state in all, for half as many complex ones [P]
    dt_min: float = 1e-3  # Δ starts log-uniform in [dt_min, dt_max], one a state
    dt_max: float = 0.1

    def __post_init__(self) -> None:
        require(self.d_state >= 2, "d_state", self.d_state, "2 or more")
        require(self.d_state % 2 == 0, "d_state", self.d_state, "even")
        require(0 < self.dt_min <= self.dt_max, "dt_min", self.dt_min, "in (0, dt_max]")


class S5(SequenceLayer):
    """h[t] = Ā h[t-1] + B̄ x[t]; y[t] = 2 Re(C h[t]) + D x[t]; A diagonal, B and C full matrices.

    A starts as the eigenvalues of HiPPO-LegS's normal part, zero-order hold. The state is h, (B, P)
    complex, P = d_state / 2.
    """

    Config = S5Config
    complexity = "O(L), O(1)"

    def __init__(self, width: int, config: S5Config, *, d_model: int) -> None:
        super().__init__(width, config, d_model=d_model)
        self.d_state = config.d_state
        modes = config.d_state // 2
        eigenvalues, vectors = normal_legs(config.d_state)
        basis = torch.tensor(vectors, dtype=torch.complex64)  # (2 P, P)
        B = basis.mH @ (torch.randn(config.d_state, width) / math.sqrt(width)).to(basis.dtype)
        C = (torch.randn(width, config.d_state) / math.sqrt(config.d_state)).to(basis.dtype) @ basis
        log_min, log_max = math.log(config.dt_min), math.log(config.dt_max)
        decay = torch.tensor(-eigenvalues.real, dtype=torch.float32)
        frequency = torch.tensor(eigenvalues.imag, dtype=torch.float32)
        self.A_log = no_weight_decay(nn.Parameter(decay.log()))  # log of -Re A
        self.A_imag = no_weight_decay(nn.Parameter(frequency))
        self.log_dt = no_weight_decay(
            nn.Parameter(torch.rand(modes) * (log_max - log_min) + log_min)
        )
        self.B = no_weight_decay(nn.Parameter(torch.cat([B.real, B.imag])))  # (2 P, D)
        self.C = no_weight_decay(nn.Parameter(torch.cat([C.real, C.imag], 1)))  # (D, 2 P)
        self.D = no_weight_decay(nn.Parameter(torch.randn(width)))

    def forward(self, x_BLD: Tensor, state: State | None = None) -> Any:
        with torch.autocast(x_BLD.device.type, enabled=False):  # dynamics need float32
            log_Abar, u_BLP = self._input(x_BLD)
            h_BLP = diagonal_recurrence(log_Abar, u_BLP, state)
            y_BLD = self._output(h_BLP, x_BLD)
        return y_BLD if state is None else (y_BLD, h_BLP[:, -1])

    def initial_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> State:
        kind = self.D.dtype.to_complex()
        return torch.zeros(batch_size, self.d_state // 2, device=device, dtype=kind)

    def step(self, x_BD: Tensor, state: State) -> tuple[Tensor, State]:
        log_Abar, u_BP = self._input(x_BD)
        state = torch.exp(log_Abar) * state + u_BP
        return self._output(state, x_BD), state

    def state_size(self, length: int) -> int:
        return self.d_state

    def _input(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """log Ā (P) and B̄ x (..., P)."""
        A = torch.complex(-torch.exp(self.A_log), self.A_imag)
        log_Abar = A * torch.exp(self.log_dt)
        Bx = torch.complex(*(x.to(self.B.dtype) @ self.B.T).chunk(2, -1))
        return log_Abar, (torch.exp(log_Abar) - 1) / A * Bx

    def _output(self, h: Tensor, x: Tensor) -> Tensor:
        # Re(C h) = Re C Re h - Im C Im h, one real product.
        y = 2 * torch.cat([h.real, -h.imag], -1) @ self.C.T
        return (y + self.D * x).to(x.dtype)
