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
    """Letters of the paper in brackets; the defaults are Mamba's."""

    d_state: int = 16  # real numbers of state a channel; complex ones count twice [N]
    dt_rank: int | Literal["auto"] = "auto"  # of the map to Δ [R]; auto: d_model / 16, rounded up
    dt_min: float = 1e-3  # Δ starts log-uniform in [dt_min, dt_max]
    dt_max: float = 0.1
    dt_floor: float = 1e-4
    selective_dt: bool = True  # Δ depends on the input, or is one constant a channel
    selective_B: bool = True  # B depends on the input, or is a constant matrix (D, N)
    selective_C: bool = True
    init: Literal["real", "half", "random", "complex"] = "real"  # of A, see _A_init
    discretisation: Literal["euler", "zoh"] = "euler"  # of B: Δ B, or exact, by a slow plain loop

    def __post_init__(self) -> None:
        require(1 <= self.d_state <= 256, "d_state", self.d_state, "1 to 256")
        even = self.init != "complex" or self.d_state % 2 == 0
        require(even, "d_state", self.d_state, "even, as complex states come in pairs")
        if self.dt_rank != "auto":
            require(self.dt_rank >= 1, "dt_rank", self.dt_rank, "1 or more, or 'auto'")
        require(0 < self.dt_min <= self.dt_max, "dt_min", self.dt_min, "in (0, dt_max]")


class S6(SequenceLayer):
    """h[t] = exp(Δ[t] A) h[t-1] + Δ[t] B[t] x[t]; y[t] = (C[t]·h[t] + D x[t]) silu(z[t]).

    The state is h, (B, D, M) float32, M = N; with a complex A M = N / 2 complex numbers that stand
    for conjugate pairs, and y takes 2 Re(C·h).
    """

    Config = S6Config
    complexity = "O(L), O(1)"
    fuses_gate = True
    resets = True

    def __init__(self, width: int, config: S6Config, *, d_model: int) -> None:
        super().__init__(width, config, d_model=d_model)
        self.config, self.width = config, width
        self.complex = config.init == "complex"
        N = config.d_state
        modes = N // 2 if self.complex else N
        rank = math.ceil(d_model / 16) if config.dt_rank == "auto" else config.dt_rank
        self.rank = rank if config.selective_dt else 0
        widths = self.rank + N * (config.selective_B + config.selective_C)
        if widths:
            self.x_proj = nn.Linear(width, widths, bias=False)
        if config.selective_dt:
            self.dt_proj = nn.Linear(rank, width, bias=False)
            nn.init.uniform_(self.dt_proj.weight, -(rank**-0.5), rank**-0.5)
        self.dt_bias = no_weight_decay(nn.Parameter(_dt_bias(width, config)))
        log_decay, frequency = _A_init(width, modes, config)
        self.A_log = no_weight_decay(nn.Parameter(log_decay))
        if self.complex:
            self.A_imag = no_weight_decay(nn.Parameter(frequency))
        if not config.selective_B:
            ones = torch.ones(width, modes)
            B = torch.stack([ones, torch.zeros_like(ones)], -1) if self.complex else ones
            self.B = no_weight_decay(nn.Parameter(B))
        if not config.selective_C:
            C = torch.randn(width, modes, 2) / 2**0.5 if self.complex else torch.randn(width, modes)
            self.C = no_weight_decay(nn.Parameter(C))
        self.D = no_weight_decay(nn.Parameter(torch.ones(width)))

    def forward(
        self,
        x_BLD: Tensor,
        state: State | None = None,
        z_BLD: Tensor | None = None,
        *,
        reset: Tensor | None = None,
    ) -> Any:
        delta_BLD, B, C = self._select(x_BLD)
        if self.config.discretisation == "zoh":
            start = state
            if start is None:
                start = self.initial_state(x_BLD.shape[0], x_BLD.device, x_BLD.dtype)
            y, end = self._exact(x_BLD, delta_BLD, B, C, z_BLD, start, reset)
            return y if state is None else (y, end)
        return selective_scan(
            x_BLD,
            delta_BLD,
            self._A(),
            B,
            C,
            self.D,
            z_BLD,
            delta_bias=self.dt_bias,
            delta_softplus=True,
            initial_state=state,
            return_final_state=state is not None,
            reset=reset,
        )

    def initial_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> State:
        kind = torch.promote_types(self.A_log.dtype, torch.float32)
        if self.complex:
            kind = kind.to_complex()
        return torch.zeros(batch_size, *self.A_log.shape, device=device, dtype=kind)

    def step(self, x_BD: Tensor, state: State, z_BD: Tensor | None = None) -> tuple[Tensor, State]:
        delta, B, C = self._select(x_BD[:, None])
        if self.config.discretisation == "zoh":
            z = None if z_BD is None else z_BD[:, None]
            y, state = self._exact(x_BD[:, None], delta, B, C, z, state)
            return y[:, 0], state
        return selective_scan_step(
            state,
            x_BD,
            delta[:, 0],
            self._A(),
            B,
            C,
            self.D,
            z_BD,
            delta_bias=self.dt_bias,
            delta_softplus=True,
        )

    def state_size(self, length: int) -> int:
        return self.width * self.config.d_state

    def dynamics(self, x_BLD: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Δ (B, L, D) as it acts; B and C, (B, L, M) or constant (D, M); A (D, M)."""
        delta_BLD, B, C = self._select(x_BLD)
        return F.softplus(delta_BLD + self.dt_bias), B, C, self._A()

    def _A(self) -> Tensor:
        decay = torch.exp(self.A_log)
        return torch.complex(-decay, self.A_imag) if self.complex else -decay

    def _select(self, x_BLD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Δ before bias and softplus (B, L, D); B and C, (B, L, M) or constant (D, M)."""
        config = self.config
        N_B, N_C = config.d_state * config.selective_B, config.d_state * config.selective_C
        if self.rank + N_B + N_C:
            r, B, C = self.x_proj(x_BLD).split([self.rank, N_B, N_C], -1)
        if config.selective_dt and x_BLD.device.type == "cpu":
            # The transpose in memory: with the weight as it lies, the CPU's products for the
            # gradients of so thin a map cost as much as all of in_proj's.
            delta_BLD = r @ self.dt_proj.weight.T.contiguous()
        elif config.selective_dt:
            delta_BLD = self.dt_proj(r)
        else:
            delta_BLD = torch.zeros_like(x_BLD)
        B = self._paired(B) if config.selective_B else self._constant(self.B)
        C = self._paired(C) if config.selective_C else self._constant(self.C)
        return delta_BLD, B, C

    def _paired(self, x: Tensor) -> Tensor:
        """Real numbers (..., N) as M complex ones, if A is complex."""
        if not self.complex:
            return x
        pairs = x.to(self.A_log.dtype).unflatten(-1, (-1, 2)).contiguous()
        if pairs.storage_offset() % 2:  # a single position's, which lie as they have to already
            pairs = pairs.clone()
        return torch.view_as_complex(pairs)

    def _constant(self, x: Tensor) -> Tensor:
        return torch.view_as_complex(x) if self.complex else x

    def _exact(
        self,
        x: Tensor,
        delta: Tensor,
        B: Tensor,
        C: Tensor,
        z: Tensor | None,
        h: Tensor,
        reset: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The recurrence with zero-order hold for B too: (exp(ΔA) - 1) / A B in place of Δ B."""
        A, dtype = self._A(), self.dt_bias.dtype
        dt_BLD = F.softplus(delta.to(dtype) + self.dt_bias)
        B = B.expand(*x.shape[:2], *B.shape) if B.ndim == 2 else B[:, :, None]
        C = C.expand(*x.shape[:2], *C.shape) if C.ndim == 2 else C[:, :, None]
        ys = []
        for t in range(x.shape[1]):
            if reset is not None:
                h = h.masked_fill(reset[:, t, None, None], 0)
            Abar = torch.exp(dt_BLD[:, t, :, None] * A)
            h = Abar * h + (Abar - 1) / A * B[:, t] * x[:, t, :, None]
            y = (C[:, t] * h).sum(-1)
            ys.append((2 * y.real if self.complex else y) + self.D * x[:, t])
        y_BLD = torch.stack(ys, 1).to(x.dtype)
        return (y_BLD if z is None else y_BLD * F.silu(z)), h


def _dt_bias(width: int, config: S6Config) -> Tensor:
    """softplus^-1 of a log-uniform draw."""
    log_min, log_max = math.log(config.dt_min), math.log(config.dt_max)
    dt = torch.exp(torch.rand(width) * (log_max - log_min) + log_min).clamp(min=config.dt_floor)
    return dt + torch.log(-torch.expm1(-dt))


def _A_init(width: int, modes: int, config: S6Config) -> tuple[Tensor, Tensor]:
    """log of -Re A, and Im A: -(n+1), -1/2, -exp(N(0, 1)) or -1/2 + ni (Table 8)."""
    n = torch.arange(modes, dtype=torch.float32).repeat(width, 1)
    if config.init == "real":
        return (n + 1).log(), n
    if config.init == "random":
        return torch.randn_like(n), n
    return torch.full_like(n, 0.5).log(), n
