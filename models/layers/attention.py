"""Causal softmax attention: rotary positions, xPos, sliding window (Vaswani et al. 2017)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seqbench.models.base import ModelError, SequenceLayer, State, require
from seqbench.models.rotary import rotate

XPOS_SCALE = 512  # positions over which xPos decays by its base (Sun et al. 2022)


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Heads and positions."""

    num_heads: int = 4
    position: Literal["rope", "xpos", "none"] = "rope"
    rope_base: float = 10000.0
    window: int | None = None  # a position sees the last `window` ones, itself included
    bias: bool = False  # of the linear maps

    def __post_init__(self) -> None:
        require(self.num_heads >= 1, "num_heads", self.num_heads, "1 or more")
        require(self.rope_base > 1, "rope_base", self.rope_base, "above 1")
        require(self.window is None or self.window >= 1, "window", self.window, "1 or more")


class Attention(SequenceLayer):
    """Multi-head attention through torch's scaled_dot_product_attention.

    The state is (keys, values), each (B, T, H, W), W the width of a head, and the number of tokens
    seen (B,). Keys are kept rotated; with a window only those that can still be seen are.
    """

    Config = AttentionConfig
    complexity = "O(L²), O(L)"
    resets = True

    def __init__(self, width: int, config: AttentionConfig, *, d_model: int) -> None:
        super().__init__(width, config, d_model=d_model)
        heads = config.num_heads
        require(width % heads == 0, "num_heads", heads, f"a divisor of the width {width}")
        if config.position != "none":
            even = width // heads % 2 == 0
            require(
                even, "num_heads", heads, f"such that {width} / num_heads is even, for rotation"
            )
        self.config = config
        self.width = width
        self.in_proj = nn.Linear(width, 3 * width, bias=config.bias)
        self.out_proj = nn.Linear(width, width, bias=config.bias)
        if config.bias:
            nn.init.zeros_(self.in_proj.bias)
            nn.init.zeros_(self.out_proj.bias)

    def forward(
        self, x_BLD: Tensor, state: State | None = None, *, reset: Tensor | None = None
    ) -> Any:
        position_L = torch.arange(x_BLD.shape[1], device=x_BLD.device)
        if state is None:
            return self._attend(*self._project(x_BLD, position_L), reset)
        if reset is not None:
            raise ModelError("attention keeps packed documents apart within a whole sequence alone")
        keys, values, seen_B = state
        q, k, v = self._project(x_BLD, seen_B[:, None] + position_L)
        k, v = _append(keys, k), _append(values, v)
        y_BLD = self._attend(q, k, v)
        if self.config.window is not None:
            start = max(k.shape[1] - self.config.window + 1, 0)
            k, v = k[:, start:], v[:, start:]
        return y_BLD, (k, v, seen_B + x_BLD.shape[1])

    def initial_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> State:
        heads = self.config.num_heads
        empty = torch.zeros(batch_size, 0, heads, self.width // heads, device=device, dtype=dtype)
        return empty, empty, torch.zeros(batch_size, dtype=torch.int64, device=device)

    def step(self, x_BD: Tensor, state: State) -> tuple[Tensor, State]:
        y_BLD, state = self.forward(x_BD[:, None], state)
        return y_BLD[:, 0], state

    def state_size(self, length: int) -> int:
        window = self.config.window
        kept = length if window is None else min(length, window - 1)
        return 2 * self.width * kept + 1

    def _project(self, x_BLD: Tensor, position: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys, rotated by their position (L) or (B, L), and values: (B, L, H, W)."""
        heads = self.config.num_heads
        qk, v = self.in_proj(x_BLD).split([2 * self.width, self.width], -1)
        qk, v = qk.unflatten(-1, (2 * heads, -1)), v.unflatten(-1, (heads, -1))
        if self.config.position != "none":
            qk = rotate(qk, position, self.config.rope_base)
        return qk[:, :, :heads], qk[:, :, heads:], v

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, reset: Tensor | None = None) -> Tensor:
        """Query i of L stands at place T - L + i among the T keys; with `reset` L is T."""
        L, T = q.shape[1], k.shape[1]
        if self.config.position == "xpos":
            q, k = _decay(q, k)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        plain = self.config.window is None or self.config.window >= T
        if reset is None and plain and L == 1:
            y = F.scaled_dot_product_attention(q, k, v)
        elif reset is None and plain and L == T:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            mask = torch.ones(L, T, dtype=torch.bool, device=q.device).tril(T - L)
            if not plain:
                mask = mask.triu(T - L - self.config.window + 1)  # type: ignore[operator]
            if reset is not None:
                document_BL = reset.cumsum(1)
                mask = mask & (document_BL[:, None, :, None] == document_BL[:, None, None])
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out_proj(y.transpose(1, 2).flatten(2))


def _append(kept_BTHW: Tensor, new_BLHW: Tensor) -> Tensor:
    """Both behind each other. While decoding into spare room behind the kept ones: a token's cost
    is its own then, not a copy of all before it.

    `filled` says how much of a room is taken: a state that is continued twice finds its room taken
    the second time, and is copied, so no state ever changes.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return torch.cat([kept_BTHW, new_BLHW], 1)
    T, L = kept_BTHW.shape[1], new_BLHW.shape[1]
    room = kept_BTHW._base
    if (
        room is None
        or getattr(room, "filled", None) != T
        or room.dtype != new_BLHW.dtype
        or room.data_ptr() != kept_BTHW.data_ptr()
        or room.shape[1] < T + L
        or (room.shape[0], *room.shape[2:]) != (new_BLHW.shape[0], *new_BLHW.shape[2:])
    ):
        shape = list(new_BLHW.shape)
        shape[1] = T + L + max((T + L) // 4, 64)
        room = new_BLHW.new_empty(shape)
        room[:, :T] = kept_BTHW
    room[:, T : T + L] = new_BLHW
    room.filled = T + L  # type: ignore[attr-defined]
    return room[:, : T + L]


def _decay(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """xPos: scores fall off with distance, ζ^(distance / 512) in each pair of channels.

    Places are counted from the middle of the queries, so that neither factor overflows.
    """
    L, T, half = q.shape[1], k.shape[1], q.shape[-1] // 2
    dtype = torch.promote_types(q.dtype, torch.float32)
    pair = torch.arange(half, device=q.device, dtype=dtype) / half
    log_zeta = torch.log((pair + 0.4) / 1.4)
    place = (torch.arange(T, device=q.device) - (T - L) - L // 2) / XPOS_SCALE
    scale = torch.exp(place[:, None, None] * torch.cat([log_zeta, log_zeta]))
    return q * scale[T - L :].to(q.dtype), k / scale.to(k.dtype)
