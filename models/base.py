"""The model contract: what a sequence layer, a block, and a whole model can be asked.

Shapes: B sequences in a batch, L positions, D model width, V vocabulary. A state is any nest of
tensors (tuple, list, dict) whose leading axis is B; only the layer that made it looks inside.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, overload

import torch
from torch import Tensor, nn

State = Any


class ModelError(ValueError):
    """A mistake in a model's name or options: one line that names the remedy."""


@dataclass(frozen=True, kw_only=True)
class NoOptions:
    """The config of a part that has nothing to set."""


class CausalModule(nn.Module, ABC):
    """Maps (B, L, D) to (B, L, D), causally: what layers and blocks have in common.

    Where `resets` is True, forward also takes the keyword `reset`, bool (B, L): at such a position
    nothing is known of what came before it, as at the start of a packed document.
    """

    resets: ClassVar[bool] = False

    @overload
    def forward(self, x_BLD: Tensor) -> Tensor: ...
    @overload
    def forward(self, x_BLD: Tensor, state: State) -> tuple[Tensor, State]: ...
    @abstractmethod
    def forward(self, x_BLD: Tensor, state: State | None = None) -> Tensor | tuple[Tensor, State]:
        """Without a state: from the zero state. With one: continues from it, returns the next."""

    @abstractmethod
    def initial_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> State:
        """The state before the first token."""

    @abstractmethod
    def step(self, x_BD: Tensor, state: State) -> tuple[Tensor, State]:
        """One token: equals `forward` over a sequence of one that continues from `state`."""

    @abstractmethod
    def state_size(self, length: int) -> int:
        """Numbers carried per sequence after `length` decoded tokens; a complex one counts 2."""


class SequenceLayer(CausalModule):
    """The part of a block that mixes over time.

    A subclass in `models/layers/NAME.py` is the layer `NAME` (underscores become dashes). Its
    `width` is the D of its input, which a block may have widened; `d_model` is the model's.
    """

    Config: ClassVar[type] = NoOptions  # frozen, keyword-only dataclass
    complexity: ClassVar[str] = ""  # time to train on L tokens, and to decode one; "O(L), O(1)"
    fuses_gate: ClassVar[bool] = False  # forward and step take a gate `z` and return y * silu(z)

    def __init__(self, width: int, config: Any, *, d_model: int) -> None:
        super().__init__()


LayerFactory = Callable[[int], SequenceLayer]  # the width of the layer's input -> the layer


class Block(CausalModule):
    """An architecture: projections, gates and convolutions around one sequence layer.

    A subclass in `models/blocks/NAME.py` is the block `NAME`. It sees the normed residual stream
    and returns what is added to it. `mlp`, where a block has one, is a second branch that acts on
    each position alone; the backbone gives it its own norm and residual connection.
    """

    Config: ClassVar[type] = NoOptions
    mlp: nn.Module | None

    def __init__(
        self, d_model: int, config: Any, *, make_layer: LayerFactory, num_layers: int
    ) -> None:
        super().__init__()
        self.mlp = None


class SequenceModel(nn.Module, ABC):
    """A whole model, tokens (B, L) -> logits (B, L, V), that is no block filled with a layer.

    `Backbone` keeps the same contract; a plugin's model subclasses this.
    """

    Config: ClassVar[type] = NoOptions  # frozen, keyword-only dataclass
    complexity: ClassVar[str] = ""  # time to train on L tokens, and to decode one; "O(L), O(1)"
    resets: ClassVar[bool] = False  # forward takes `reset`, bool (B, L): see CausalModule

    def __init__(self, config: Any, *, vocab_size: int, d_model: int, num_layers: int) -> None:
        super().__init__()

    @overload
    def forward(self, tokens_BL: Tensor) -> Tensor: ...
    @overload
    def forward(self, tokens_BL: Tensor, state: State) -> tuple[Tensor, State]: ...
    @abstractmethod
    def forward(
        self, tokens_BL: Tensor, state: State | None = None
    ) -> Tensor | tuple[Tensor, State]:
        """Without a state: from the start. With one: continues from it, returns the next."""

    @abstractmethod
    def initial_state(
        self,
        batch_size: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> State:
        """The state before the first token; by default on the model's device, in its dtype."""

    @abstractmethod
    def step(self, tokens_B: Tensor, state: State) -> tuple[Tensor, State]:
        """Logits (B, V) of the token after this one, and the next state."""

    @abstractmethod
    def state_size(self, length: int) -> int:
        """Numbers carried per sequence after `length` decoded tokens; a complex one counts 2."""

    @property
    def num_parameters(self) -> int:
        """Trainable and frozen parameters, a tied weight counted once."""
        return sum(p.numel() for p in self.parameters())


def require(condition: bool, name: str, value: object, valid: str) -> None:
    """Raise the one-line ModelError of an option whose value is not valid."""
    if not condition:
        raise ModelError(f"model option {name}={value!r} is not valid: must be {valid}")


def cannot_reset(model: nn.Module) -> str | None:
    """Why a whole model cannot keep packed documents apart; None: it can."""
    if not getattr(model, "resets", False):
        return f"{type(model).__name__}.forward takes no reset"
    unable = [
        type(m).__name__ for m in model.modules() if isinstance(m, CausalModule) and not m.resets
    ]
    return f"its part {unable[0]} cannot forget in the middle of a sequence" if unable else None


def no_weight_decay(parameter: nn.Parameter) -> nn.Parameter:
    """Mark a parameter that weight decay must leave alone (A, D, Δ bias, ...); returns it."""
    parameter._no_weight_decay = True  # type: ignore[attr-defined]
    return parameter


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Optimizer groups: decay for matrices, none for vectors (norms, biases) and marked ones."""
    decay: list[nn.Parameter] = []
    keep: list[nn.Parameter] = []
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        spared = parameter.ndim < 2 or getattr(parameter, "_no_weight_decay", False)
        (keep if spared else decay).append(parameter)
    return [
        {"params": decay, "weight_decay": weight_decay},
        {"params": keep, "weight_decay": 0.0},
    ]
