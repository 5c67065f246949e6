"""Mamba checkpoints in Hugging Face's format: config.json and safetensors, read and written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from seqbench.models.backbone import Backbone
from seqbench.models.base import ModelError
from seqbench.models.blocks.mamba import MambaBlock
from seqbench.models.build import build_model
from seqbench.models.layers.s6 import S6

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"

# Ours within a layer -> theirs.
_LAYER = {
    "norm.weight": "norm.weight",
    "block.in_proj.weight": "mixer.in_proj.weight",
    "block.in_proj.bias": "mixer.in_proj.bias",
    "block.conv_weight": "mixer.conv1d.weight",
    "block.conv_bias": "mixer.conv1d.bias",
    "block.layer.x_proj.weight": "mixer.x_proj.weight",
    "block.layer.dt_proj.weight": "mixer.dt_proj.weight",
    "block.layer.dt_bias": "mixer.dt_proj.bias",
    "block.layer.A_log": "mixer.A_log",
    "block.layer.D": "mixer.D",
    "block.out_proj.weight": "mixer.out_proj.weight",
    "block.out_proj.bias": "mixer.out_proj.bias",
}
_OUTSIDE = {
    "embedding.weight": "backbone.embeddings.weight",
    "final_norm.weight": "backbone.norm_f.weight",
    "head.weight": "lm_head.weight",
}


def load_pretrained(folder_or_repo: str | Path, *, revision: str | None = None) -> Backbone:
    """A float32 Mamba from a local folder, or from a Hugging Face repository (the `hub` extra).

    Raises ModelError, one line, for a folder that is not a Mamba checkpoint.
    """
    folder = local_folder(folder_or_repo, revision=revision)
    config = _read_config(folder)
    with torch.device("meta"):  # nothing is initialised only to be overwritten
        model = build_model("mamba", **config)
    tensors = _read_tensors(folder)
    state: dict[str, Tensor] = {}
    for ours, parameter in model.state_dict().items():
        theirs = _their_name(ours)
        if ours == "head.weight" and config["tie_embeddings"]:
            theirs = _their_name("embedding.weight")
        if theirs not in tensors:
            raise ModelError(f"{folder}: the weights lack the tensor {theirs!r}")
        value = tensors[theirs].float()
        if ours.endswith("conv_weight"):
            value = value.squeeze(1)
        if value.shape != parameter.shape:
            raise ModelError(
                f"{folder}: tensor {theirs!r} has shape {list(value.shape)}, "
                f"config.json says {list(parameter.shape)}"
            )
        state[ours] = value
    marks = {n: getattr(p, "_no_weight_decay", False) for n, p in model.named_parameters()}
    model.load_state_dict(state, assign=True)
    if config["tie_embeddings"]:
        model.head.weight = model.embedding.weight
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(True)
        if marks[name]:
            parameter._no_weight_decay = True
    return model


def local_folder(folder_or_repo: str | Path, *, revision: str | None = None) -> Path:
    """The folder itself, or the one that the repository's checkpoint and tokenizer come into."""
    folder = Path(folder_or_repo)
    return folder if folder.is_dir() else _download(str(folder_or_repo), revision)


def save_pretrained(model: Backbone, folder: str | Path) -> None:
    """Write a Mamba as a folder that transformers' MambaForCausalLM loads.

    Raises ModelError for a model that is not a stock Mamba.
    """
    config = _their_config(model)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for ours, value in model.state_dict().items():
        if ours == "head.weight" and config["tie_word_embeddings"]:
            continue
        value = value.detach().cpu()
        tensors[_their_name(ours)] = (
            value[:, None] if ours.endswith("conv_weight") else value
        ).contiguous()
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _their_name(ours: str) -> str:
    if ours in _OUTSIDE:
        return _OUTSIDE[ours]
    _, number, inner = ours.split(".", 2)
    return f"backbone.layers.{number}.{_LAYER[inner]}"


def _download(repo: str, revision: str | None) -> Path:
    if repo.count("/") != 1:
        raise ModelError(f"no folder {repo!r}: give a folder, or a repository as OWNER/NAME")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ModelError(
            f"no folder {repo!r}; to fetch it as a repository, install the extra: seqbench[hub]"
        ) from None
    try:
        path = snapshot_download(
            repo,
            revision=revision,
            allow_patterns=["config.json", "tokenizer.json", "*.safetensors", INDEX],
        )
    except Exception as error:  # network, authorisation, no such repository: all for the user
        reason = str(error).strip().split("\n")[0]
        raise ModelError(
            f"no folder {repo!r}, and as a repository: {type(error).__name__}: {reason}"
        ) from error
    return Path(path)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        theirs = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"no {path}: a checkpoint is a folder with it and {WEIGHTS}") from None
    except ValueError as error:
        raise ModelError(f"{path} is not JSON: {error}") from None
    kind = theirs.get("model_type") if isinstance(theirs, dict) else None
    if kind != "mamba":
        raise ModelError(f"{path}: model_type is {kind!r}, only 'mamba' can be loaded")
    if theirs.get("hidden_act", "silu") != "silu":
        raise ModelError(f"{path}: hidden_act is {theirs['hidden_act']!r}, only 'silu' is known")
    try:
        width, expand = theirs["hidden_size"], theirs.get("expand", 2)
        config = {
            "vocab_size": theirs["vocab_size"],
            "d_model": width,
            "num_layers": theirs["num_hidden_layers"],
            "d_state": theirs.get("state_size", 16),
            "dt_rank": theirs.get("time_step_rank", "auto"),
            "expand": expand,
            "d_conv": theirs.get("conv_kernel", 4),
            "bias": theirs.get("use_bias", False),
            "conv_bias": theirs.get("use_conv_bias", True),
            "norm_eps": theirs.get("layer_norm_epsilon", 1e-5),
            "tie_embeddings": theirs.get("tie_word_embeddings", True),
        }
    except KeyError as error:
        raise ModelError(f"{path} lacks {error}") from None
    inner = theirs.get("intermediate_size", expand * width)
    if inner != expand * width:
        raise ModelError(f"{path}: intermediate_size {inner} is not expand {expand} x {width}")
    return config


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    files = [folder / WEIGHTS]
    if (folder / INDEX).is_file():
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        files = [folder / name for name in sorted(set(index["weight_map"].values()))]
    tensors = {}
    for file in files:
        if not file.is_file():
            raise ModelError(f"no {file}: only weights in safetensors can be loaded")
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - not a mapping
                    tensors[name] = opened.get_tensor(name)
        except SafetensorError as error:
            raise ModelError(f"{file} is damaged: {error}") from error
    return tensors


def _their_config(model: Backbone) -> dict[str, Any]:
    block = getattr(model.layers[0], "block", None)  # a U-Net has none
    layer = block.layer if isinstance(block, MambaBlock) else None
    stock = (
        isinstance(block, MambaBlock)
        and isinstance(layer, S6)
        and layer.config.selective_dt
        and layer.config.selective_B
        and layer.config.selective_C
        and not layer.complex
        and layer.config.discretisation == "euler"
        and model.config.norm == "rms"
        and model.config.positions == "none"
    )
    if not stock:
        raise ModelError(
            "only a stock Mamba can be saved for transformers: the mamba block with s6, all "
            "switches selective, real A, Euler, RMSNorm, no positions"
        )
    assert isinstance(block, MambaBlock) and isinstance(layer, S6)
    return {
        "architectures": ["MambaForCausalLM"],
        "model_type": "mamba",
        "vocab_size": model.embedding.num_embeddings,
        "hidden_size": model.d_model,
        "intermediate_size": block.width,
        "num_hidden_layers": len(model.layers),
        "state_size": layer.config.d_state,
        "time_step_rank": layer.rank,
        "time_step_min": layer.config.dt_min,
        "time_step_max": layer.config.dt_max,
        "time_step_floor": layer.config.dt_floor,
        "expand": block.width // model.d_model,
        "conv_kernel": block.conv_weight.shape[1],
        "use_bias": block.in_proj.bias is not None,
        "use_conv_bias": block.conv_bias is not None,
        "hidden_act": "silu",
        "layer_norm_epsilon": model.config.norm_eps,
        "tie_word_embeddings": model.config.tie_embeddings,
        "residual_in_fp32": True,
        "torch_dtype": str(model.embedding.weight.dtype).removeprefix("torch."),
    }
