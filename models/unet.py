"""SaShiMi's U-Net for raw audio: stages of blocks, causal pooling between (Goel et al. 2022)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seqbench.models.backbone import BackboneConfig, ResidualLayer
from seqbench.models.base import Block, CausalModule, State, require


@dataclass(frozen=True, kw_only=True)
class UNetConfig(BackboneConfig):
    """A U-Net in place of the plain stack; its `num_layers` are blocks a stage.

    With the defaults there are five stages: two at d_model and the data's own rate, two at
    2 d_model and a 16th of it, and the centre at 4 d_model and a 256th, each of num_layers blocks.
    """

    backbone: Literal["unet"] = "unet"
    pool: int = 16  # positions that become one
    pools: int = 2  # times that this is done
    widen: int = 2  # width over the width of the stage outside
    center: str = ""  # model whose block and layer the centre takes; "": the outer stages' own
    center_options: Mapping[str, Any] = field(default_factory=dict)  # of its block and layer

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.pool >= 2, "pool", self.pool, "2 or more")
        require(self.pools >= 1, "pools", self.pools, "1 or more")
        require(self.widen >= 1, "widen", self.widen, "1 or more")


class UNet(CausalModule):
    """A stage's blocks, what lies inside it, and its blocks again; the centre has blocks alone.

    x (B, L, D) -> x (B, L, D). `pool` positions side by side become one of width `widen` D through
    a linear map, go through the next stage, and come back through another, to be added to what was
    there before. What a group of positions says comes back to the group after it, so no position
    hears a later one, and a group that is not full at the end of a sequence waits.

    A state is {"down", "up": one state a block, "inner": the next stage's, "waiting" (B, pool, D):
    the group that fills up, "held" (B, pool, D): what the group before it says to it, "filled" (B,)
    int64: how many wait, the same in every row, kept on the CPU as it decides what is computed}.
    """

    def __init__(
        self,
        make_block: Callable[[int, bool], Block],
        config: UNetConfig,
        d_model: int,
        num_layers: int,
        *,
        pools: int | None = None,
    ) -> None:
        """`make_block(width, is_centre)`; `pools` are those from here on inwards."""
        super().__init__()
        pools = config.pools if pools is None else pools

        def blocks(centre: bool) -> nn.ModuleList:
            return nn.ModuleList(
                ResidualLayer(make_block(d_model, centre), config, d_model)
                for _ in range(num_layers)
            )

        self.size, self.width = config.pool, d_model
        self.down = blocks(not pools)
        self.inner: UNet | None = None
        if pools:
            width = config.widen * d_model
            self.pool = nn.Linear(config.pool * d_model, width)
            self.inner = UNet(make_block, config, width, num_layers, pools=pools - 1)
            self.unpool = nn.Linear(width, config.pool * d_model)
            self.up = blocks(False)

    def forward(self, x_BLD: Tensor, state: State | None = None) -> Any:
        if state is not None:
            return self._continue(x_BLD, state)
        for layer in self.down:
            x_BLD = layer(x_BLD)
        if self.inner is None:
            return x_BLD
        groups = max(0, x_BLD.shape[1] - 1) // self.size  # the last one tells nobody
        if groups:
            y_BGW = self.inner(self._pooled(x_BLD[:, : groups * self.size]))
            y_BLD = F.pad(self._unpooled(y_BGW), (0, 0, self.size, 0))
            x_BLD = x_BLD + y_BLD[:, : x_BLD.shape[1]]
        for layer in self.up:
            x_BLD = layer(x_BLD)
        return x_BLD

    def step(self, x_BD: Tensor, state: State) -> tuple[Tensor, State]:
        x_BD, down = _step(self.down, x_BD, state["down"])
        if self.inner is None:
            return x_BD, {"down": down}
        at, inner, held = int(state["filled"][0]), state["inner"], state["held"]
        waiting = state["waiting"].clone()
        waiting[:, at] = x_BD
        x_BD = x_BD + held[:, at]
        if at + 1 == self.size:
            y_BW, inner = self.inner.step(self._pooled(waiting)[:, 0], inner)
            held = self._unpooled(y_BW[:, None])
        x_BD, up = _step(self.up, x_BD, state["up"])
        filled = (state["filled"] + 1) % self.size
        return x_BD, _state(down, up, inner, waiting, held, filled)

    def initial_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> State:
        def of(layers: Any) -> tuple[State, ...]:
            return tuple(layer.initial_state(batch_size, device, dtype) for layer in layers)

        if self.inner is None:
            return {"down": of(self.down)}
        empty = torch.zeros(batch_size, self.size, self.width, device=device, dtype=dtype)
        inner = self.inner.initial_state(batch_size, device, dtype)
        filled = torch.zeros(batch_size, dtype=torch.int64, device="cpu")
        return _state(of(self.down), of(self.up), inner, empty, empty.clone(), filled)

    def state_size(self, length: int) -> int:
        """Numbers carried per sequence after `length` positions."""
        total = _size(self.down, length)
        if self.inner is None:
            return total
        groups = 2 * self.size * self.width + 1
        inner = self.inner.state_size(length // self.size)
        return total + groups + inner + _size(self.up, length)

    @property
    def full_length(self) -> int:
        """The fewest positions of which the last one hears every block."""
        return 1 if self.inner is None else self.size * self.inner.full_length + 1

    def _continue(self, x_BLD: Tensor, state: State) -> tuple[Tensor, State]:
        x_BLD, down = _run(self.down, x_BLD, state["down"])
        if self.inner is None:
            return x_BLD, {"down": down}
        L, first, inner, held = (
            x_BLD.shape[1],
            int(state["filled"][0]),
            state["inner"],
            state["held"],
        )
        waiting = torch.cat([state["waiting"][:, :first], x_BLD], 1)
        full = waiting.shape[1] // self.size * self.size
        if full:
            y_BGW, inner = self.inner(self._pooled(waiting[:, :full]), inner)
            held = torch.cat([held, self._unpooled(y_BGW)], 1)
        x_BLD = x_BLD + held[:, first : first + L]
        x_BLD, up = _run(self.up, x_BLD, state["up"])
        waiting = waiting[:, full:]
        filled = torch.full_like(state["filled"], waiting.shape[1])
        waiting = F.pad(waiting, (0, 0, 0, self.size - waiting.shape[1]))
        return x_BLD, _state(down, up, inner, waiting, held[:, -self.size :], filled)

    def _pooled(self, x_BLD: Tensor) -> Tensor:
        """(B, G pool, D) -> (B, G, widen D)."""
        return self.pool(x_BLD.unflatten(1, (-1, self.size)).flatten(2))

    def _unpooled(self, y_BGW: Tensor) -> Tensor:
        """(B, G, widen D) -> (B, G pool, D)."""
        return self.unpool(y_BGW).unflatten(2, (self.size, -1)).flatten(1, 2)


def _run(layers: nn.ModuleList, x_BLD: Tensor, states: State) -> tuple[Tensor, tuple[State, ...]]:
    found = []
    for layer, state in zip(layers, states, strict=True):
        x_BLD, state = layer(x_BLD, state)
        found.append(state)
    return x_BLD, tuple(found)


def _step(layers: nn.ModuleList, x_BD: Tensor, states: State) -> tuple[Tensor, tuple[State, ...]]:
    found = []
    for layer, state in zip(layers, states, strict=True):
        x_BD, state = layer.step(x_BD, state)  # type: ignore[operator]
        found.append(state)
    return x_BD, tuple(found)


def _size(layers: Any, length: int) -> int:
    return sum(layer.state_size(length) for layer in layers)


def _state(
    down: State, up: State, inner: State, waiting: Tensor, held: Tensor, filled: Tensor
) -> State:
    return {
        "down": down,
        "up": up,
        "inner": inner,
        "waiting": waiting,
        "held": held,
        "filled": filled,
    }
