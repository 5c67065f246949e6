"""Mid-run checkpoints: one safetensors file a cell, tensors and plain data, written atomically.

No pickle: the state is JSON in the file's header, so opening somebody's checkpoint runs no code.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from seqbench.suite.experiment import Cell, TrainConfig, UserError
from seqbench.suite.records import write_file
from seqbench.suite.sharding import like


def write(path: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Writes tensors and a JSON-able state; the file is there whole or not at all."""
    data = save(
        {name: t.detach().cpu().clone().contiguous() for name, t in tensors.items()},
        metadata={"state": json.dumps(state)},
    )
    write_file(path, data)


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the state of a checkpoint; UserError for a file that is none."""
    try:
        with safe_open(path, framework="pt") as file:
            state = json.loads((file.metadata() or {})["state"])
            return {name: file.get_tensor(name) for name in file.keys()}, state  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise UserError(
            f"checkpoint {path} cannot be read ({error}); delete it and run again"
        ) from error


def read_finished(path: Path) -> tuple[dict[str, Tensor], Cell]:
    """The weights that a finished cell left, and the cell; UserError for any other file."""
    tensors, state = read(path)
    if not state.get("finished"):
        raise UserError(
            f"checkpoint {path}: its cell is not finished; run it to the end first (the command "
            "that began it goes on)"
        )
    try:
        cell = _cell(state)
    except TypeError as error:
        raise UserError(
            f"checkpoint {path}: of another version of seqbench ({error}); run the cell again"
        ) from error
    return {k.removeprefix("model/"): v for k, v in tensors.items()}, cell


def finished_cell(path: Path) -> Cell | None:
    """The cell alone; None for any other file."""
    try:
        with safe_open(path, framework="pt") as file:
            state = json.loads((file.metadata() or {})["state"])
        return _cell(state) if state.get("finished") else None
    except (OSError, SafetensorError, KeyError, ValueError, TypeError):
        return None


def _cell(state: Mapping[str, Any]) -> Cell:
    plain = state["cell"]
    return Cell(**{**plain, "train": TrainConfig(**plain["train"])})


def pack_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's per-parameter tensors by `optimizer/INDEX/NAME`."""
    state = optimizer.state_dict()["state"]
    return {
        f"optimizer/{index}/{name}": torch.as_tensor(value)
        for index, entries in state.items()
        for name, value in entries.items()
    }


def unpack_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Puts back what `pack_optimizer` took; hyperparameters stay the optimizer's own."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer/"):
            _, index, key = name.split("/")
            own = like(tensor.clone(), parameters[int(index)])
            state.setdefault(int(index), {})[key] = own
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def pack_random(device: torch.device) -> dict[str, Tensor]:
    """Torch's random states, of the CPU and of a GPU in use."""
    states = {"random/cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["random/cuda"] = torch.cuda.get_rng_state(device)
    return states


def unpack_random(tensors: Mapping[str, Tensor], device: torch.device) -> None:
    """Puts back what `pack_random` took, where there is such a device."""
    torch.set_rng_state(tensors["random/cpu"])
    if device.type == "cuda" and "random/cuda" in tensors:
        torch.cuda.set_rng_state(tensors["random/cuda"], device)
