"""Hyena: a long convolution whose filter a small network writes (Poli et al. 2023)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from seqbench.kernels.causal_conv1d import causal_conv1d
from seqbench.kernels.long_conv import long_conv
from seqbench.models.base import SequenceLayer, State, no_weight_decay, require


@dataclass(frozen=True, kw_only=True)
class HyenaConfig:
    """The operator and its filter network."""

    order: int = (
        1  # 1: the convolution alone; n: projections, n multiplicative gates, n - 1 filters
    )
    short_conv: int = 3  # taps of the convolution after the projections, for order 2 and more
    filter_width: int = 64  # of the network's hidden layers
    filter_depth: int = 2  # hidden layers
    filter_bands: int = 1  # sine and cosine pairs that tell the network the lag
    filter_length: int = 1024  # lag at which its clock has made one turn
    sine_frequency: float = 10.0  # of the network's activation
    decay_fast: float = 0.3  # share of filter_length after which a channel has fallen to 1 %,
    decay_slow: float = 1.5  # from the first channel to the last

    def __post_init__(self) -> None:
        for name in ("order", "short_conv", "filter_width", "filter_depth", "filter_bands"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        require(self.filter_length >= 1, "filter_length", self.filter_length, "1 or more")
        require(self.sine_frequency > 0, "sine_frequency", self.sine_frequency, "above 0")
        ordered = 0 < self.decay_fast <= self.decay_slow
        require(ordered, "decay_fast", self.decay_fast, "in (0, decay_slow]")


class Hyena(SequenceLayer):
    """Order 1: y = h * x + D x, h the implicit filter. Order 2: out(q (h * (k v) + D k v)).

    The filter is a function of the lag alone, so any length works. Decoding has no shortcut: the
    state is every input of every filter (B, T, D), and the last inputs of the short convolution.
    """

    Config = HyenaConfig
    complexity = "O(L log L), O(L)"

    def __init__(self, width: int, config: HyenaConfig, *, d_model: int) -> None:
        super().__init__(width, config, d_model=d_model)
        self.config = config
        self.width = width
        self.filters = max(config.order - 1, 1)
        self.filter = _Filter(width * self.filters, config)
        self.D = no_weight_decay(nn.Parameter(torch.randn(self.filters, width)))
        if config.order > 1:
            inner = (config.order + 1) * width
            self.in_proj = nn.Linear(width, inner)
            bound = config.short_conv**-0.5
            self.short_weight = nn.Parameter(
                torch.empty(inner, config.short_conv).uniform_(-bound, bound)
            )
            self.out_proj = nn.Linear(width, width)

    def forward(self, x_BLD: Tensor, state: State | None = None) -> Any:
        L = x_BLD.shape[1]
        if state is None:
            return self._operate(x_BLD, None, L)[0]
        return self._operate(x_BLD, state, state[0].shape[1] + L)

    def initial_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> State:
        def zeros(length: int, width: int) -> Tensor:
            return torch.zeros(batch_size, length, width, device=device, dtype=dtype)

        past = [zeros(0, self.width) for _ in range(self.filters)]
        if self.config.order > 1:
            taps, inner = self.config.short_conv - 1, (self.config.order + 1) * self.width
            past.append(zeros(taps, inner))
        return tuple(past)

    def step(self, x_BD: Tensor, state: State) -> tuple[Tensor, State]:
        y_BLD, state = self.forward(x_BD[:, None], state)
        return y_BLD[:, 0], state

    def state_size(self, length: int) -> int:
        size = self.filters * self.width * length
        if self.config.order > 1:
            size += (self.config.short_conv - 1) * (self.config.order + 1) * self.width
        return size

    def _operate(self, x: Tensor, state: State | None, total: int) -> tuple[Tensor, State]:
        filters_FDT = self.filter(total).unflatten(0, (self.filters, self.width))
        past = [None] * self.filters if state is None else list(state[: self.filters])
        if self.config.order == 1:
            y, seen = self._convolve(x, past[0], filters_FDT[0], self.D[0])
            return y, (seen,)
        short_state = None if state is None else state[-1]
        projected, short_state = causal_conv1d(
            self.in_proj(x), self.short_weight, initial_state=short_state, return_final_state=True
        )
        first, *gates, v = projected.chunk(self.config.order + 1, -1)
        new_state = []
        for i, gate in enumerate(gates):
            v, seen = self._convolve(v * gate, past[i], filters_FDT[i], self.D[i])
            new_state.append(seen)
        return self.out_proj(first * v), (*new_state, short_state)

    def _convolve(
        self, x: Tensor, past: Tensor | None, filter_DT: Tensor, skip_D: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The filter over everything seen, read at the positions of x; and everything seen."""
        L = x.shape[1]
        seen = x if past is None else torch.cat([past.to(x.dtype), x], 1)
        with torch.autocast(x.device.type, enabled=False):
            # D x[t] is one more tap at lag 0.
            filter_DT = torch.cat([filter_DT[:, :1] + skip_D[:, None], filter_DT[:, 1:]], 1)
            wide = seen.to(filter_DT.dtype)
            if L == 1:
                y = torch.einsum("btd,dt->bd", wide, filter_DT.flip(1))[:, None]
            else:
                y = long_conv(wide, filter_DT)[:, -L:]
        return y.to(x.dtype), seen


class _Filter(nn.Module):
    """Lag -> (width) through sines: features, hidden layers, a linear map, exponential decay."""

    def __init__(self, width: int, config: HyenaConfig) -> None:
        super().__init__()
        self.config = config
        sizes = [1 + 2 * config.filter_bands, *[config.filter_width] * config.filter_depth]
        self.hidden = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        self.frequency = nn.Parameter(torch.full((config.filter_width,), config.sine_frequency))
        self.output = nn.Linear(config.filter_width, width, bias=False)
        # A channel's filter has fallen to 1 % after its share of filter_length.
        shares = torch.linspace(config.decay_fast, config.decay_slow, width)
        self.decay: Tensor
        self.register_buffer("decay", math.log(100) / shares, persistent=False)

    def forward(self, length: int) -> Tensor:
        weight = self.output.weight
        with torch.autocast(weight.device.type, enabled=False):
            time = torch.arange(length, device=weight.device)[:, None] / self.config.filter_length
            time = time.to(weight.dtype)
            band = torch.arange(1, self.config.filter_bands + 1, device=weight.device)
            angle = 2 * math.pi * time * band
            x = torch.cat([time, angle.cos(), angle.sin()], -1)
            for linear in self.hidden:
                x = torch.sin(self.frequency * linear(x))
            filter_DT = weight @ x.T
            return filter_DT * torch.exp(-self.decay.to(weight.dtype)[:, None] * time[:, 0])
