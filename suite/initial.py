"""Weights that training begins from: those of a finished cell, or of a checkpoint file."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from seqbench.suite import checkpoint
from seqbench.suite.experiment import Cell, TrainConfig, UserError

DIGEST = re.compile(r"[0-9a-f]{16}(@seed)?")
# Their first axis is the vocabulary: a task with more tokens finds those it shares in the first.
BY_TOKEN = ("embedding", "head")


def with_fingerprint(train: TrainConfig) -> TrainConfig:
    """The recipe with the SHA-256 of the weights in the file that it names, if it names one."""
    if train.init_from is None or DIGEST.fullmatch(train.init_from):
        return train
    found = fingerprint(_weights(Path(train.init_from).expanduser(), train.init_from))
    return replace(train, init_sha256=found)


def load_initial(model: nn.Module, cell: Cell, results: Path) -> str:
    """Puts the weights that `train.init_from` names into the model; returns their SHA-256.

    Where the model's vocabulary is larger than theirs, the tokens beyond it keep what they have.
    """
    train, name = cell.train, str(cell.train.init_from)
    path = Path(name).expanduser()
    if DIGEST.fullmatch(name):
        path = _checkpoint_of(cell, results)
    weights = _weights(path, name)
    found = fingerprint(weights)
    if train.init_sha256 and found != train.init_sha256:
        raise UserError(
            f"train.init_from={name}: the weights changed since the cell was resolved; run the "
            "command again"
        )
    own = dict(model.state_dict())
    if weights.keys() != own.keys():
        odd = sorted(weights.keys() ^ own.keys())
        raise _no_fit(name, f"{odd[0]} is in one of them alone")
    with torch.no_grad():
        for key, value in weights.items():
            rows = len(own[key]) if own[key].ndim else 0
            by_token = key.split(".")[0] in BY_TOKEN and value.ndim and len(value) < rows
            into = own[key][: len(value)] if by_token else own[key]
            if into.shape != value.shape:
                shapes = f"{tuple(value.shape)} there, {tuple(own[key].shape)} here"
                raise _no_fit(name, f"{key} is {shapes}")
            into.copy_(value)
    return found


def _checkpoint_of(cell: Cell, results: Path) -> Path:
    """The file of the cell whose digest `cell` names, with its own seed if that says so."""
    digest, _, seed = str(cell.train.init_from).partition("@")
    folder = results / "checkpoints"
    if not seed or cell.seed == 0:
        return folder / f"{digest}.safetensors"
    for path in sorted(folder.glob("*.safetensors")):
        other = checkpoint.finished_cell(path)
        if other is not None and cell.begins_from(other):
            return path
    return folder / f"{digest} with seed {cell.seed}"


def fingerprint(weights: Mapping[str, Tensor]) -> str:
    """The SHA-256 of named tensors."""
    sha = hashlib.sha256()
    for key in sorted(weights):
        value = weights[key].contiguous()
        sha.update(f"{key} {value.dtype} {tuple(value.shape)};".encode())
        sha.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def _weights(path: Path, name: str) -> dict[str, Tensor]:
    """Those of a finished cell's checkpoint."""
    if not path.is_file():
        raise UserError(
            f"train.init_from={name}: no weights at {path}; give the digest of a finished cell "
            "whose checkpoint is in the results folder, or a checkpoint's file"
        )
    try:
        return checkpoint.read_finished(path)[0]
    except UserError as error:
        raise UserError(f"train.init_from={name}: {error}") from error


def _no_fit(name: str, why: str) -> UserError:
    return UserError(
        f"train.init_from={name}: its weights do not fit the model: {why}; give both the same "
        "model and model options"
    )
