"""SaShiMi's pair: the S4 block, then an MLP in its own branch (Goel et al. 2022, 3.2)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from seqbench.models.base import LayerFactory, require
from seqbench.models.blocks.none import NoneBlock, NoneConfig


@dataclass(frozen=True, kw_only=True)
class SashimiConfig(NoneConfig):
    """The S4 block's options, and the MLP's."""

    mlp_expand: float = 2.0  # inner width over model width

    def __post_init__(self) -> None:
        require(self.mlp_expand > 0, "mlp_expand", self.mlp_expand, "a positive number")


class SashimiBlock(NoneBlock):
    """The S4 block; `mlp`, with a GELU, is the second branch of the residual stream."""

    Config = SashimiConfig

    def __init__(
        self, d_model: int, config: SashimiConfig, *, make_layer: LayerFactory, num_layers: int
    ) -> None:
        # Two branches a block write to the residual stream.
        super().__init__(d_model, config, make_layer=make_layer, num_layers=2 * num_layers)
        self.mlp = _MLP(d_model, max(1, round(config.mlp_expand * d_model)), 2 * num_layers)


class _MLP(nn.Module):
    def __init__(self, d_model: int, width: int, branches: int) -> None:
        super().__init__()
        self.up = nn.Linear(d_model, width)
        self.down = nn.Linear(width, d_model)
        nn.init.zeros_(self.down.bias)
        self.down.weight.data /= math.sqrt(branches)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))
