"""Name -> model: presets and the free form BLOCK+LAYER; options are checked first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, get_type_hints

import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError
from torch import nn

from seqbench.models import plugins
from seqbench.models.backbone import Backbone, BackboneConfig, ResidualLayer
from seqbench.models.base import (
    Block,
    ModelError,
    SequenceLayer,
    SequenceModel,
    parameter_groups,
    require,
)
from seqbench.models.discovery import (
    block_class,
    block_names,
    layer_class,
    layer_names,
    load_plugin,
    suggestion,
)
from seqbench.models.unet import UNet, UNetConfig

__all__ = [
    "ModelInfo",
    "build_model",
    "config_of",
    "describe",
    "match_parameters",
    "options_of",
    "parameter_groups",
    "presets",
]


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A named pair of block and layer, with the options that make it what its name says."""

    block: str
    layer: str
    summary: str
    options: Mapping[str, Any] = field(default_factory=dict)


_GPT = {"norm": "layer", "bias": True}
# Table 2 of the Mamba paper: attention alone, 8 heads, no MLP.
_TABLE_2 = {**_GPT, "mlp": "none", "num_heads": 8}

PRESETS: dict[str, Preset] = {
    "mamba": Preset(block="mamba", layer="s6", summary="Mamba: selective state space (2023)"),
    "mamba+s4": Preset(block="mamba", layer="s4", summary="S4D in the Mamba block: no selection"),
    "mamba+hyena": Preset(
        block="mamba", layer="hyena", summary="Hyena's long convolution in the Mamba block"
    ),
    "h3": Preset(block="h3", layer="s4", summary="H3: shift and S4D between two gates (2023)"),
    "h3+hyena": Preset(
        block="h3", layer="hyena", summary="Hyena's long convolution in the H3 block"
    ),
    "h3+s6": Preset(block="h3", layer="s6", summary="selective state space in the H3 block"),
    "s4": Preset(block="none", layer="s4", summary="S4D in the block without a gate (2022)"),
    "s6": Preset(
        block="none", layer="s6", summary="selective state space in the block without a gate"
    ),
    "hyena": Preset(
        block="transformer",
        layer="hyena",
        summary="Hyena: operator of order 2 and MLP (2023)",
        options={**_GPT, "order": 2},
    ),
    "transformer": Preset(
        block="transformer",
        layer="attention",
        summary="Transformer: attention with RoPE, GELU MLP, LayerNorm, biases",
        options=_GPT,
    ),
    "transformer-absolute": Preset(
        block="transformer",
        layer="attention",
        summary="attention without MLP, sinusoidal positions, 8 heads (MHA-Abs)",
        options={**_TABLE_2, "position": "none", "positions": "sinusoidal"},
    ),
    "transformer-rope": Preset(
        block="transformer",
        layer="attention",
        summary="attention without MLP, RoPE, 8 heads (MHA-RoPE)",
        options={**_TABLE_2, "position": "rope"},
    ),
    "transformer-xpos": Preset(
        block="transformer",
        layer="attention",
        summary="attention without MLP, xPos, 8 heads (MHA-xPos)",
        options={**_TABLE_2, "position": "xpos"},
    ),
    "transformer++": Preset(
        block="transformer",
        layer="attention",
        summary="Transformer++: RoPE, SwiGLU, RMSNorm, no biases",
        options={"mlp": "swiglu"},
    ),
    "linear-attention": Preset(
        block="transformer",
        layer="linear-attention",
        summary="linear attention, feature map elu + 1, and MLP (2020)",
        options=_GPT,
    ),
    "retnet": Preset(
        block="transformer", layer="retnet", summary="RetNet: decaying linear attention (2023)"
    ),
    "gla": Preset(
        block="transformer",
        layer="gla",
        summary="gated linear attention and SwiGLU (2024)",
        options={"mlp": "swiglu"},
    ),
    "s5": Preset(
        block="none", layer="s5", summary="S5: one state space for all channels, no gate (2023)"
    ),
    "sashimi": Preset(
        block="sashimi",
        layer="s4",
        summary="SaShiMi: U-Net of S4D and MLP, for raw audio (2022)",
        options={"backbone": "unet", "norm": "layer"},
    ),
    "lstm": Preset(
        block="transformer", layer="lstm", summary="LSTM, residual (1997)", options={"mlp": "none"}
    ),
}


# What `backbone=` may be: a plain stack of blocks, which is no option of its own, or a U-Net.
BACKBONES: dict[str, type[BackboneConfig]] = {"stack": BackboneConfig, "unet": UNetConfig}


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """What a model name stands for."""

    name: str
    block: str
    layer: str
    summary: str
    complexity: str  # time to train on L tokens, time to decode one
    options: Mapping[str, Any]  # with their defaults
    parameters: int  # at the size asked about
    state_size: Mapping[int, int]  # length -> numbers carried per sequence when decoding, likewise


def build_model(
    name: str,
    *,
    vocab_size: int,
    d_model: int,
    num_layers: int,
    layer: type[SequenceLayer] | None = None,
    **options: Any,
) -> Any:
    """The model of a preset's name or of "BLOCK+LAYER"; `layer` replaces its layer by a class.

    With `backbone="unet"` the blocks stand in SaShiMi's U-Net, `num_layers` of them a stage, and
    the options of UNetConfig count too. A Backbone, or the SequenceModel of a plugin. Raises
    ModelError, one line, for an unknown name or option or a value of the wrong type.
    """
    parts = _parts(name, layer, options.get("backbone"))
    given = {**parts.preset_options, **options}
    if isinstance(parts, _Parts) and parts.backbone is BackboneConfig:
        given.pop("backbone", None)  # "stack", by now
    known = parts.options()
    for option, value in given.items():
        if option not in known:
            valid = sorted({"d_model", "num_layers", *known})
            raise ModelError(
                f"model {name!r} has no option {option!r}{suggestion(option, valid)}; "
                f"valid: {', '.join(valid)}"
            )
        for config in parts.configs():
            if option in get_type_hints(config):
                given[option] = _checked(config, option, value)
    for size, value in (
        ("vocab_size", vocab_size),
        ("d_model", d_model),
        ("num_layers", num_layers),
    ):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ModelError(f"model option {size}={value!r} is not valid: an integer, 1 or more")
    configs = [
        config(**{f.name: given[f.name] for f in fields(config) if f.name in given})
        for config in parts.configs()
    ]
    if isinstance(parts, _Whole):
        return parts.model(
            configs[0], vocab_size=vocab_size, d_model=d_model, num_layers=num_layers
        )
    backbone, *own = configs
    if isinstance(backbone, UNetConfig):
        centre, centre_configs = _centre(parts, given, backbone)

        def make_block(width: int, is_centre: bool) -> Block:
            depth = (2 * backbone.pools + 1) * num_layers
            if is_centre:
                return centre.make_block(width, centre_configs, depth)
            return parts.make_block(width, own, depth)

        def make_layers() -> list[nn.Module]:
            return [UNet(make_block, backbone, d_model, num_layers)]

    else:

        def make_layers() -> list[nn.Module]:
            return [
                ResidualLayer(parts.make_block(d_model, own, num_layers), backbone, d_model)
                for _ in range(num_layers)
            ]

    return Backbone(make_layers, backbone, vocab_size=vocab_size, d_model=d_model)


def match_parameters(
    name: str,
    *,
    parameters: int,
    vocab_size: int,
    num_layers: int,
    multiple_of: int = 16,
    **options: Any,
) -> int:
    """The d_model, a multiple of `multiple_of`, whose size is nearest to `parameters`."""

    def size(units: int) -> int:
        with torch.device("meta"):
            model = build_model(
                name,
                vocab_size=vocab_size,
                d_model=units * multiple_of,
                num_layers=num_layers,
                **options,
            )
        return model.num_parameters

    require(parameters >= 1, "parameters", parameters, "1 or more")
    low, high = 1, 1
    while size(high) < parameters:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if size(middle) < parameters else (low, middle)
    return multiple_of * min((low, high), key=lambda units: abs(size(units) - parameters))


def presets() -> dict[str, str]:
    """Preset name -> one line on it; BLOCK+LAYER is valid too."""
    return {name: preset.summary for name, preset in PRESETS.items()}


def options_of(name: str, backbone: str | None = None) -> dict[str, Any]:
    """Option -> default, for the model of that name, on a backbone other than its own if given."""
    parts = _parts(name, None, backbone)
    return {**parts.options(), **parts.preset_options}


def config_of(name: str, backbone: str | None = None) -> tuple[type, ...]:
    """The config dataclasses that the options of that model come from."""
    return _parts(name, None, backbone).configs()


def code_hash(name: str, options: Mapping[str, Any]) -> str | None:
    """A hash of the source of the model's parts that are no part of seqbench; None: all are."""
    parts = []
    for whole in (name, options.get("center")):
        if whole:
            found = _parts(whole, None)
            parts += [("block", found.block_name), ("layer", found.layer_name)]
            # BLOCK+path/to/layer.py ends as a path does, and is none.
            parts += [] if "+" in whole else [("model", whole)]
    return plugins.source_hash((kind, part) for kind, part in parts if part)


def describe(
    name: str,
    *,
    vocab_size: int = 256,
    d_model: int = 64,
    num_layers: int = 2,
    lengths: Sequence[int] = (1024, 65536),
) -> ModelInfo:
    """Block, layer, complexity and options of the model of that name, and its cost at a size."""
    parts = _parts(name, None)
    with torch.device("meta"):
        model = build_model(name, vocab_size=vocab_size, d_model=d_model, num_layers=num_layers)
    return ModelInfo(
        name=name,
        block=parts.block_name,
        layer=parts.layer_name,
        summary=parts.summary,
        complexity=parts.complexity,
        options=options_of(name),
        parameters=model.num_parameters,
        state_size={length: model.state_size(length) for length in lengths},
    )


@dataclass(frozen=True)
class _Parts:
    block_name: str
    layer_name: str
    block: type[Block]
    layer: type[SequenceLayer]
    preset_options: Mapping[str, Any]
    summary: str
    backbone: type[BackboneConfig] = BackboneConfig

    @property
    def complexity(self) -> str:
        return self.layer.complexity

    def configs(self) -> tuple[type, ...]:
        return self.backbone, self.block.Config, self.layer.Config

    def make_block(self, width: int, configs: Sequence[Any], num_layers: int) -> Block:
        """One of `num_layers` blocks in the model, from its own and its layer's config."""
        block_config, layer_config = configs

        def make_layer(inner: int) -> SequenceLayer:
            return self.layer(inner, layer_config, d_model=width)

        return self.block(width, block_config, make_layer=make_layer, num_layers=num_layers)

    def options(self) -> dict[str, Any]:
        """Option -> default. A name that two parts have in common (`bias`) sets both."""
        return {f.name: _default(f) for config in self.configs() for f in fields(config)}


@dataclass(frozen=True)
class _Whole:
    """A plugin's whole model, with nothing to exchange."""

    name: str
    model: type[SequenceModel]
    preset_options: Mapping[str, Any] = field(default_factory=dict)

    block_name = layer_name = ""

    @property
    def summary(self) -> str:
        return (self.model.__doc__ or self.name).strip().split("\n")[0]

    @property
    def complexity(self) -> str:
        return self.model.complexity

    def configs(self) -> tuple[type, ...]:
        return (self.model.Config,)

    def options(self) -> dict[str, Any]:
        return {f.name: _default(f) for f in fields(self.model.Config)}


def _parts(name: str, layer: type[SequenceLayer] | None, backbone: Any = None) -> _Parts | _Whole:
    preset = PRESETS.get(name)
    whole = "+" not in name or not plugins.is_path(name)  # not BLOCK+path/to/layer.py
    found = load_plugin("model", name, PRESETS) if whole else None
    if found is not None:
        one = _preset_or_class(name, found)
        if not isinstance(one, Preset):
            return _Whole(name, one)
        preset = one
    if preset is not None:
        block_name, layer_name, options = preset.block, preset.layer, preset.options
    else:
        block_name, plus, layer_name = name.partition("+")
        options = {}
        if not plus:
            valid = [*PRESETS, *plugins.names("model")]
            raise ModelError(
                f"unknown model {name!r}{suggestion(name, valid)}; valid: {', '.join(valid)}, or "
                f"BLOCK+LAYER, block of {', '.join(block_names())}, "
                f"layer of {', '.join(layer_names())}"
            )
    block = block_class(block_name)
    layer = layer_class(layer_name) if layer is None else layer
    if not (isinstance(layer, type) and issubclass(layer, SequenceLayer)):
        raise ModelError(f"layer={layer!r} is not a subclass of seqbench.models.base.SequenceLayer")
    summary = f"{layer_name} in {name}" if preset is None else preset.summary
    kind = options.get("backbone", "stack") if backbone is None else backbone
    require(kind in BACKBONES, "backbone", kind, f"one of {', '.join(BACKBONES)}")
    if kind == "stack":
        options = {k: v for k, v in options.items() if k != "backbone"}
    return _Parts(block_name, layer_name, block, layer, options, summary, BACKBONES[kind])


def _centre(outer: _Parts, given: Mapping[str, Any], unet: UNetConfig) -> tuple[_Parts, list[Any]]:
    """The parts of a U-Net's centre, and their configs."""
    parts: _Parts | _Whole = outer
    options = dict(given)
    if unet.center:
        parts = _parts(unet.center, None, "stack")
        options = dict(parts.preset_options)
    if isinstance(parts, _Whole):
        raise ModelError(
            f"model option center={unet.center!r} is not valid: a whole model has no block to give"
        )
    block_and_layer = parts.configs()[1:]
    known = {f.name for config in block_and_layer for f in fields(config)}
    for option in unet.center_options:
        if option not in known:
            raise ModelError(
                f"model option center_options has no option {option!r}"
                f"{suggestion(option, known)}; valid: {', '.join(sorted(known))}"
            )
    options |= unet.center_options
    return parts, [
        config(
            **{
                f.name: _checked(config, f.name, options[f.name])
                for f in fields(config)
                if f.name in options
            }
        )
        for config in block_and_layer
    ]


def _preset_or_class(name: str, found: Any) -> Preset | type[SequenceModel]:
    """What a plugin of the group `seqbench.models` is; a file may hold a Preset called PRESET."""
    found = getattr(found, "PRESET", found)
    if isinstance(found, Preset):
        return found
    try:
        one: type[SequenceModel] = plugins.one_class("model", name, found, SequenceModel)
    except plugins.PluginError as error:
        hint = f"; a layer is named with its block, as in mamba+{name}"
        raise ModelError(f"{error}{hint if plugins.is_path(name) else ''}") from error
    return one


def _default(field_: Any) -> Any:
    if field_.default is not MISSING:
        return field_.default
    return field_.default_factory() if field_.default_factory is not MISSING else None


def _checked(config: type, option: str, value: Any) -> Any:
    """The value as the field wants it; an int may stand for a float, nothing else bends."""
    hint = get_type_hints(config)[option]
    try:
        adapter = TypeAdapter(hint, config=ConfigDict(strict=True, allow_inf_nan=False))
        return adapter.validate_python(value)
    except ValidationError as error:
        wanted = "; ".join(
            dict.fromkeys(e["msg"][0].lower() + e["msg"][1:] for e in error.errors())
        )
        raise ModelError(f"model option {option}={value!r} is not valid: {wanted}") from None
