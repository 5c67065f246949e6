"""Causal softmax attention with rotary positions (Vaswani et al. 2017; RoPE: Su et al. 2021)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seqbench.models.base import SequenceLayer, State, require


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Heads and positions."""

    num_heads: int = 4
    position: Literal["rope", "none"] = "rope"
    rope_base: float = 10000.0
    bias: bool = False  # of the linear maps

    def __post_init__(self) -> None:
        require(self.num_heads >= 1, "num_heads", self.num_heads, "1 or more")
        require(self.rope_base > 1, "rope_base", self.rope_base, "a number above 1")


class Attention(SequenceLayer):
    """Multi-head attention through torch's scaled_dot_product_attention.

    The state is (keys, values), each (B, T, H, W), W the width of a head, and the number of tokens
    seen (B,): keys are kept as rotated.
    """

    Config = AttentionConfig
    complexity = "O(L²), O(L)"

    def __init__(
        self, width: int, config: AttentionConfig, *, d_model: int, num_layers: int
    ) -> None:
        super().__init__(width, config, d_model=d_model, num_layers=num_layers)
        heads = config.num_heads
        require(width % heads == 0, "num_heads", heads, f"a divisor of the width {width}")
        require(
            config.position == "none" or width // heads % 2 == 0,
            "num_heads",
            heads,
            f"such that {width} / {heads} is even, for rotary positions",
        )
        self.config = config
        self.width = width
        self.in_proj = nn.Linear(width, 3 * width, bias=config.bias)
        self.out_proj = nn.Linear(width, width, bias=config.bias)
        with torch.no_grad():
            # Two branches a layer write to the residual stream: this one and the MLP's.
            self.out_proj.weight /= math.sqrt(2 * num_layers)
            for linear in (self.in_proj, self.out_proj):
                if linear.bias is not None:
                    linear.bias.zero_()

    def forward(self, x_BLD: Tensor, state: State | None = None) -> Any:
        B, L, _ = x_BLD.shape
        qkv = self.in_proj(x_BLD).view(B, L, 3, self.config.num_heads, -1)
        if state is None:
            return self._attend(*self._rotate(qkv, torch.arange(L, device=x_BLD.device)), None)
        keys, values, seen_B = state
        position_BL = seen_B[:, None] + torch.arange(L, device=x_BLD.device)
        q, k, v = self._rotate(qkv, position_BL)
        k, v = torch.cat([keys, k], 1), torch.cat([values, v], 1)
        T = k.shape[1]
        mask = None
        if L > 1:  # query i stands at T - L + i
            mask = torch.ones(L, T, dtype=torch.bool, device=x_BLD.device).tril(T - L)
        return self._attend(q, k, v, mask, causal=False), (k, v, seen_B + L)

    def initial_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> State:
        heads = self.config.num_heads
        empty = torch.zeros(batch_size, 0, heads, self.width // heads, device=device, dtype=dtype)
        return empty, empty, torch.zeros(batch_size, dtype=torch.int64, device=device)

    def step(self, x_BD: Tensor, state: State) -> tuple[Tensor, State]:
        y_BLD, state = self.forward(x_BD[:, None], state)
        return y_BLD[:, 0], state

    def state_size(self, length: int) -> int:
        return 2 * self.width * length + 1

    def _rotate(self, qkv: Tensor, position: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotate queries and keys by their position (L) or (B, L); each out as (B, L, H, W)."""
        if self.config.position == "none":
            q, k, v = qkv.unbind(2)
            return q, k, v
        half = qkv.shape[-1] // 2
        rate = torch.arange(half, device=qkv.device, dtype=torch.float32) / half
        angle = position[..., None] * self.config.rope_base**-rate
        cos, sin = (f(angle)[..., None, None, :].to(qkv.dtype) for f in (torch.cos, torch.sin))
        first, second = qkv[:, :, :2].chunk(2, -1)
        turned = torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
        q, k = turned.unbind(2)
        return q, k, qkv[:, :, 2]

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool = True
    ) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        return self.out_proj(y.transpose(1, 2).flatten(2))
