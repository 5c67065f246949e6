"""S4D, the diagonal linear time-invariant state space layer (Gu, Gupta, Goel & Ré 2022)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from seqbench.kernels.long_conv import long_conv
from seqbench.kernels.long_conv.diagonal import diagonal_conv, diagonal_kernel, powers
from seqbench.models.base import SequenceLayer, State, no_weight_decay, require
from seqbench.models.hippo import normal_legs


@dataclass(frozen=True, kw_only=True)
class S4Config:
    """Letters of the paper in brackets."""

    d_state: int = 64  # real numbers of state a channel; complex ones count twice [N]
    init: Literal["lin", "inv", "legs", "real"] = "lin"  # of A, see _eigenvalues
    discretisation: Literal["zoh", "bilinear"] = "zoh"
    dt_min: float = 1e-3  # Δ starts log-uniform in [dt_min, dt_max]
    dt_max: float = 0.1

    def __post_init__(self) -> None:
        require(self.d_state >= 1, "d_state", self.d_state, "1 or more")
        even = self.init == "real" or self.d_state % 2 == 0
        require(even, "d_state", self.d_state, "an even number, as complex states come in pairs")
        require(0 < self.dt_min <= self.dt_max, "dt_min", self.dt_min, "in (0, dt_max]")


class S4(SequenceLayer):
    """h[t] = Ā h[t-1] + B̄ x[t]; y[t] = Re(C·h[t]) + D x[t], with B = 1 and zero-order hold.

    Without a state one convolution with the whole kernel C Ā^l B̄; with one the same in chunks, the
    state's own output added; a step is the recurrence. The state is h (B, D, M): M = N / 2 complex
    numbers that stand for conjugate pairs, or M = N real ones.
    """

    Config = S4Config
    complexity = "O(L log L), O(1)"

    def __init__(self, width: int, config: S4Config, *, d_model: int) -> None:
        super().__init__(width, config, d_model=d_model)
        self.config = config
        self.width = width
        self.complex = config.init != "real"
        self.modes = config.d_state // 2 if self.complex else config.d_state
        log_min, log_max = math.log(config.dt_min), math.log(config.dt_max)
        self.log_dt = _parameter(torch.rand(width) * (log_max - log_min) + log_min)
        A = torch.tensor(_eigenvalues(config), dtype=torch.complex64).repeat(width, 1)
        self.A_log = _parameter((-A.real).log())
        if self.complex:
            self.A_imag = _parameter(A.imag.clone())
            self.C = _parameter(torch.randn(width, self.modes, 2) * math.sqrt(0.5))
        else:
            self.C = _parameter(torch.randn(width, self.modes))
        self.D = _parameter(torch.randn(width))

    def forward(self, x_BLD: Tensor, state: State | None = None) -> Any:
        with torch.autocast(x_BLD.device.type, enabled=False):  # the kernel needs float32
            x = x_BLD.to(self.log_dt.dtype)
            if state is None:
                y = self._convolve(x, self.kernel(x.shape[1]))
            else:
                y, state = diagonal_conv(x, *self._readout(), state)
                y = y + self.D * x
        y = y.to(x_BLD.dtype)
        return y if state is None else (y, state)

    def kernel(self, length: int) -> Tensor:
        """C Ā^l B̄ for l = 0 ... length - 1, as real numbers (D, L)."""
        log_Abar, Bbar, C = self._readout()
        return diagonal_kernel(log_Abar, C * Bbar, length)

    def initial_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> State:
        real = self.log_dt.dtype
        return torch.zeros(
            batch_size,
            self.width,
            self.modes,
            device=device,
            dtype=real.to_complex() if self.complex else real,
        )

    def step(self, x_BD: Tensor, state: State) -> tuple[Tensor, State]:
        log_Abar, Bbar, C = self._readout()
        x = x_BD.to(self.log_dt.dtype)
        state = powers(log_Abar, 1, state.is_complex()) * state + Bbar * x[..., None]
        return ((C * state).sum(-1).real + self.D * x).to(x_BD.dtype), state

    def state_size(self, length: int) -> int:
        return self.width * self.config.d_state

    def _readout(self) -> tuple[Tensor, Tensor, Tensor]:
        """log Ā, B̄ and C, each (D, M); C holds the 2 that stands for the conjugate."""
        dt = torch.exp(self.log_dt)[:, None]
        decay = torch.exp(self.A_log)
        A = torch.complex(-decay, self.A_imag) if self.complex else -decay
        C = 2 * torch.view_as_complex(self.C) if self.complex else self.C
        if self.config.discretisation == "zoh":
            log_Abar = A * dt
            return log_Abar, (torch.exp(log_Abar) - 1) / A, C
        # Complex even for a real A: Ā is negative once Δ|A| > 2.
        Abar = (1 + A * dt / 2) / (1 - A * dt / 2)
        return torch.log(Abar.to(dt.dtype.to_complex())), dt / (1 - A * dt / 2), C

    def _convolve(self, x_BLD: Tensor, kernel_DL: Tensor) -> Tensor:
        # D x[t] is one more tap at lag 0: no pass of its own over (B, L, D).
        first, rest = kernel_DL.tensor_split([1], 1)
        return long_conv(x_BLD, torch.cat([first + self.D[:, None], rest], 1))


def _eigenvalues(config: S4Config) -> NDArray[Any]:
    """A's diagonal: one of each conjugate pair, or all of a real one."""
    N = config.d_state
    n = np.arange(N // 2)
    if config.init == "lin":
        return -0.5 + 1j * np.pi * n
    if config.init == "inv":
        return -0.5 + 1j * N / np.pi * (N / (2 * n + 1) - 1)
    if config.init == "legs":
        return normal_legs(N)[0]
    return -(np.arange(N) + 1.0 + 0j)


def _parameter(value: Tensor) -> nn.Parameter:
    return no_weight_decay(nn.Parameter(value))
