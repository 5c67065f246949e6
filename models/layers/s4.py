"""S4D, the diagonal linear time-invariant state space layer (Gu, Gupta, Goel & Ré 2022)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from seqbench.models.base import SequenceLayer, State, no_weight_decay, require
from seqbench.models.convolution import long_convolution

CHUNK = 1024  # positions taken at a time when a state is carried: bounds memory


@dataclass(frozen=True, kw_only=True)
class S4Config:
    """Letters of the paper in brackets."""

    d_state: int = 64  # real numbers of state a channel; complex ones count twice [N]
    init: Literal["lin", "real"] = "lin"  # of A: -1/2 + πni, or -(n+1)
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

    def __init__(self, width: int, config: S4Config, *, d_model: int, num_layers: int) -> None:
        super().__init__(width, config, d_model=d_model, num_layers=num_layers)
        self.config = config
        self.width = width
        self.complex = config.init != "real"
        self.modes = config.d_state // 2 if self.complex else config.d_state
        log_min, log_max = math.log(config.dt_min), math.log(config.dt_max)
        self.log_dt = _parameter(torch.rand(width) * (log_max - log_min) + log_min)
        n = torch.arange(self.modes, dtype=torch.float32).repeat(width, 1)
        if self.complex:
            self.A_log = _parameter(torch.full_like(n, 0.5).log())  # log of -Re A
            self.A_imag = _parameter(math.pi * n)
            self.C = _parameter(torch.randn(width, self.modes, 2) * math.sqrt(0.5))
        else:
            self.A_log = _parameter((n + 1).log())
            self.C = _parameter(torch.randn(width, self.modes))
        self.D = _parameter(torch.randn(width))

    def forward(self, x_BLD: Tensor, state: State | None = None) -> Any:
        with torch.autocast(x_BLD.device.type, enabled=False):  # the kernel needs float32
            x = x_BLD.to(self.log_dt.dtype)
            if state is None:
                y = self._convolve(x, self._readout(), None)[0]
            else:
                y, state = self._in_chunks(x, state)
            y = torch.addcmul(y, x, self.D).to(x_BLD.dtype)
        return y if state is None else (y, state)

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
        state = torch.exp(log_Abar) * state + Bbar * x[..., None]
        return ((C * state).sum(-1).real + self.D * x).to(x_BD.dtype), state

    def state_size(self, length: int) -> int:
        return self.width * self.config.d_state

    def _readout(self) -> tuple[Tensor, Tensor, Tensor]:
        """log Ā, B̄ and C, each (D, M); C holds the 2 that stands for the conjugate."""
        dt = torch.exp(self.log_dt)[:, None]
        decay = torch.exp(self.A_log)
        A = torch.complex(-decay, self.A_imag) if self.complex else -decay
        C = 2 * torch.view_as_complex(self.C) if self.complex else self.C
        log_Abar = A * dt
        return log_Abar, (torch.exp(log_Abar) - 1) / A, C

    def _in_chunks(self, x_BLD: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        readout, ys = self._readout(), []
        for x in x_BLD.split(CHUNK, 1):
            y, state = self._convolve(x, readout, state)
            ys.append(y)
        return (torch.cat(ys, 1) if ys else x_BLD), state

    def _convolve(
        self, x_BLD: Tensor, readout: tuple[Tensor, Tensor, Tensor], state: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The output from position 0 on, and the state after it (with a state given)."""
        log_Abar, Bbar, C = readout
        L = x_BLD.shape[1]
        # Ā^l for l = block * i + j is a product of two powers: the kernel is a matrix product over
        # the modes, with 2 sqrt(L) exponentials a mode instead of L.
        block = math.isqrt(max(L - 1, 0)) + 1
        near_DMJ = _powers(log_Abar, torch.arange(block, device=x_BLD.device))
        far_DMI = _powers(log_Abar, block * torch.arange(-(-L // block), device=x_BLD.device))
        rows_DIR = _rows((C * Bbar)[..., None].conj() * far_DMI.conj()).mT
        kernel_DL = (rows_DIR @ _rows(near_DMJ)).flatten(1)[:, :L]
        y_BLD = long_convolution(x_BLD, kernel_DL)
        if state is None:
            return y_BLD, x_BLD
        powers_DML = (far_DMI[..., None] * near_DMJ[:, :, None]).flatten(2)[..., :L]
        Abar = torch.exp(log_Abar)
        seen_DBR = _rows(((C * Abar) * state).conj().transpose(0, 1).mT).mT
        y_BLD = y_BLD + (seen_DBR @ _rows(powers_DML)).permute(1, 2, 0)
        added_DBR = x_BLD.permute(2, 0, 1) @ _rows(powers_DML.flip(-1)).mT
        added_DBM = _from_rows(added_DBR, self.complex)
        state = torch.exp(log_Abar * L) * state + Bbar * added_DBM.transpose(0, 1)
        return y_BLD, state


def _parameter(value: Tensor) -> nn.Parameter:
    return no_weight_decay(nn.Parameter(value))


def _powers(log_base_DM: Tensor, exponent_L: Tensor) -> Tensor:
    """base^exponent (D, M, L); angles in float64, as they grow to thousands of turns."""
    if not log_base_DM.is_complex():
        return torch.exp(log_base_DM[..., None] * exponent_L)
    size = torch.exp(log_base_DM.real[..., None] * exponent_L)
    angle = log_base_DM.imag.double()[..., None] * exponent_L
    return torch.complex(size * angle.cos().to(size.dtype), size * angle.sin().to(size.dtype))


def _rows(z_DMX: Tensor) -> Tensor:
    """Complex (D, M, X) -> real (D, 2 M, X): Re(w·z) over the modes is rows(conj w)·rows(z)."""
    if not z_DMX.is_complex():
        return z_DMX
    return torch.cat([z_DMX.real, z_DMX.imag], 1)


def _from_rows(rows_XR: Tensor, is_complex: bool) -> Tensor:
    """The reverse, over the last axis."""
    return torch.complex(*rows_XR.chunk(2, -1)) if is_complex else rows_XR
