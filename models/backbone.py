"""The residual skeleton around every block: embedding, pre-norm residual stack, norm, head.

In place of the stack there may be a U-Net: see models/unet.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seqbench.kernels.rms_norm import RMSNorm
from seqbench.models.base import Block, State, require


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """What every model can set, whatever its block and layer."""

    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-5
    tie_embeddings: bool = True  # the head reads the embedding's weights
    positions: Literal["none", "sinusoidal"] = "none"  # added to the embedding
    dropout: float = 0.0  # on what each branch adds to the residual stream

    def __post_init__(self) -> None:
        require(self.norm_eps > 0, "norm_eps", self.norm_eps, "a positive number")
        require(0 <= self.dropout < 1, "dropout", self.dropout, "in [0, 1)")


class Backbone(nn.Module):
    """tokens (B, L) -> logits (B, L, V), for training; `step` decodes one token at a time.

    `make_layers()` gives the residual layers between embedding and final norm: each a block, or a
    whole U-Net. A state is {"blocks": one state a layer} and, with positions, {"position": (B,)
    int64}.
    """

    resets = True  # as far as its block and layer do: see base.cannot_reset

    def __init__(
        self,
        make_layers: Callable[[], Iterable[nn.Module]],
        config: BackboneConfig,
        *,
        vocab_size: int,
        d_model: int,
    ) -> None:
        super().__init__()
        self.config = config
        self.d_model = d_model
        self.embedding = nn.Embedding(vocab_size, d_model)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.layers = nn.ModuleList(make_layers())
        self.final_norm = _norm(config, d_model)
        self.head = nn.Linear(d_model, vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight

    @overload
    def forward(
        self, tokens_BL: Tensor, *, at: Tensor | None = None, reset: Tensor | None = None
    ) -> Tensor: ...
    @overload
    def forward(
        self,
        tokens_BL: Tensor,
        state: State,
        *,
        at: Tensor | None = None,
        reset: Tensor | None = None,
    ) -> tuple[Tensor, State]: ...
    def forward(
        self,
        tokens_BL: Tensor,
        state: State | None = None,
        *,
        at: Tensor | None = None,
        reset: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, State]:
        """Logits (B, L, V); with a state, continues from it and returns (logits, next state).

        With `at`, a mask (B, L), only the logits (K, V) of its K positions, row by row: where few
        are asked for, the head costs next to nothing. With `reset`, a mask (B, L), what is said
        from such a position on is what would be said if the sequence began there.
        """
        x_BLD = self.embedding(tokens_BL)
        apart: Any = {} if reset is None else {"reset": reset}
        if self.config.positions == "sinusoidal":
            x_BLD = x_BLD + self._positions(self._count(tokens_BL, state, reset))
        if state is None:
            for layer in self.layers:
                x_BLD = layer(x_BLD, **apart)
            return self.head(self.final_norm(x_BLD if at is None else x_BLD[at]))
        states = []
        for layer, layer_state in zip(self._layers(), state["blocks"], strict=True):
            x_BLD, layer_state = layer(x_BLD, layer_state, **apart)
            states.append(layer_state)
        next_state = self._state(states, state, tokens_BL, reset)
        return self.head(self.final_norm(x_BLD if at is None else x_BLD[at])), next_state

    def step(self, tokens_B: Tensor, state: State) -> tuple[Tensor, State]:
        """Logits (B, V) of the token after this one, and the next state."""
        x_BD = self.embedding(tokens_B)
        if self.config.positions == "sinusoidal":
            x_BD = x_BD + self._positions(self._count(tokens_B[:, None], state))[:, 0]
        states = []
        for layer, layer_state in zip(self._layers(), state["blocks"], strict=True):
            x_BD, layer_state = layer.step(x_BD, layer_state)
            states.append(layer_state)
        return self.head(self.final_norm(x_BD)), self._state(states, state, tokens_B[:, None])

    def initial_state(
        self,
        batch_size: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> State:
        """The state before the first token; by default on the model's device, in its dtype."""
        weight = self.embedding.weight
        device = torch.device(device) if device is not None else weight.device
        dtype = dtype if dtype is not None else weight.dtype
        blocks = tuple(layer.initial_state(batch_size, device, dtype) for layer in self._layers())
        state: dict[str, Any] = {"blocks": blocks}
        if self.config.positions != "none":
            state["position"] = torch.zeros(batch_size, dtype=torch.int64, device=device)
        return state

    def state_size(self, length: int) -> int:
        """Numbers carried per sequence after `length` tokens when decoding."""
        position = int(self.config.positions != "none")
        return position + sum(layer.state_size(length) for layer in self._layers())

    @property
    def full_length(self) -> int:
        """The fewest tokens of which the last one hears every block: 1, but for a U-Net."""
        return max(layer.full_length for layer in self._layers())

    @property
    def num_parameters(self) -> int:
        """Trainable and frozen parameters, a tied weight counted once."""
        return sum(p.numel() for p in self.parameters())

    def _layers(self) -> Iterator[ResidualLayer]:
        return iter(self.layers)  # type: ignore[arg-type]

    def _count(self, tokens_BL: Tensor, state: State | None, reset: Tensor | None = None) -> Tensor:
        """Each token's place (B, L) or (1, L), from the sequence's start or its document's."""
        place = torch.arange(tokens_BL.shape[1], device=tokens_BL.device)[None]
        start = 0 if state is None else -state["position"][:, None]
        if reset is not None:
            begun = torch.where(reset, place, -1).cummax(1).values
            start = torch.where(begun < 0, start, begun)
        return place - start

    def _positions(self, place_BL: Tensor) -> Tensor:
        return sinusoids(place_BL, self.d_model).to(self.embedding.weight.dtype)

    def _state(
        self, blocks: list[State], before: State, tokens_BL: Tensor, reset: Tensor | None = None
    ) -> State:
        state: dict[str, Any] = {"blocks": tuple(blocks)}
        if "position" in before:
            place_BL = self._count(tokens_BL, before, reset)
            state["position"] = place_BL[:, -1] + 1 if place_BL.shape[1] else before["position"]
        return state


class ResidualLayer(nn.Module):
    """x + block(norm(x)), then, for a block with an MLP, x + mlp(norm(x))."""

    def __init__(self, block: Block, config: BackboneConfig, d_model: int) -> None:
        super().__init__()
        self.norm = _norm(config, d_model)
        self.block = block
        self.mlp_norm = _norm(config, d_model) if block.mlp is not None else None
        self.dropout = config.dropout

    def forward(self, x_BLD: Tensor, state: State | None = None, **apart: Any) -> Any:
        if state is None:
            return self._mlp(x_BLD + self._drop(self.block(self.norm(x_BLD), **apart)))
        y_BLD, state = self.block(self.norm(x_BLD), state, **apart)
        return self._mlp(x_BLD + self._drop(y_BLD)), state

    def step(self, x_BD: Tensor, state: State) -> tuple[Tensor, State]:
        y_BD, state = self.block.step(self.norm(x_BD), state)
        return self._mlp(x_BD + self._drop(y_BD)), state

    def initial_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> State:
        return self.block.initial_state(batch_size, device, dtype)

    def state_size(self, length: int) -> int:
        return self.block.state_size(length)

    full_length = 1

    def _mlp(self, x: Tensor) -> Tensor:
        if self.block.mlp is None or self.mlp_norm is None:
            return x
        return x + self._drop(self.block.mlp(self.mlp_norm(x)))

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training) if self.dropout else x


def sinusoids(position: Tensor, width: int) -> Tensor:
    """Sines and cosines of positions (...) -> (..., width) (Vaswani et al. 2017, 3.5)."""
    half = (width + 1) // 2
    rate = torch.exp(
        torch.arange(half, device=position.device) * (-math.log(10000.0) / max(half, 1))
    )
    angle = position[..., None].float() * rate
    return torch.cat([angle.sin(), angle.cos()], -1)[..., :width]


def _norm(config: BackboneConfig, width: int) -> nn.Module:
    if config.norm == "layer":
        return nn.LayerNorm(width, eps=config.norm_eps)
    return RMSNorm(width, config.norm_eps)
