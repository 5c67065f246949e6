"""The mean log Δ of a model's S6 layers, as a term of the loss that makes selection sparse.

Of the logarithm, because Δ's own gradient, through the softplus, fades with it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from seqbench.models.layers.s6 import S6

FLOOR = 1e-9  # a Δ below it is as good as 0 over a million tokens, and is pushed no further


class Deltas:
    """Watches the S6 layers of a model in training."""

    def __init__(self, model: nn.Module) -> None:
        self._seen: list[tuple[S6, Tensor]] = []
        for layer in model.modules():
            if isinstance(layer, S6):
                layer.register_forward_pre_hook(self._see)

    def mean_log(self) -> Tensor:
        """The mean of log Δ in the last forward pass, added over layers, with its gradient, once.

        0 for a model without S6.
        """
        means = [
            layer.dynamics(x_BLD)[0].clamp(min=FLOOR).log().mean() for layer, x_BLD in self._seen
        ]
        self._seen.clear()
        return torch.stack(means).sum() if means else torch.zeros(())

    def _see(self, layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        if layer.training:
            assert isinstance(layer, S6)
            self._seen.append((layer, inputs[0]))
