"""What a finished cell leaves to be used: <results>/checkpoints/DIGEST.safetensors."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import TypeAdapter, ValidationError

from seqbench.models.build import build_model
from seqbench.suite import checkpoint
from seqbench.suite.configuration import prepared_task
from seqbench.suite.experiment import Cell, UserError
from seqbench.tasks.base import Task


@dataclass(frozen=True, eq=False)
class Trained:
    """A finished cell with its task, its data ready, and its model in evaluation mode."""

    cell: Cell
    task: Task
    model: torch.nn.Module


def find(results: Path, name: str) -> Path | None:
    """The checkpoint of a file's name, or of a digest or its beginning below `results`."""
    if Path(name).is_file():
        return Path(name)
    digest = name.isalnum()  # no folder, no OWNER/NAME
    found = sorted((results / "checkpoints").glob(f"{name}*.safetensors")) if digest else []
    if len(found) > 1:
        raise UserError(
            f"{name}: {len(found)} checkpoints in {results}/checkpoints begin so; give more of "
            f"one: {', '.join(path.stem for path in found[:4])}"
        )
    return found[0] if found else None


def load(path: Path) -> Trained:
    """UserError for a file that is no checkpoint, or one of a cell that is not finished."""
    tensors, state = checkpoint.read(path)
    if not state.get("finished"):
        raise UserError(
            f"checkpoint {path}: its cell is not finished; run the same grid again to finish it"
        )
    try:
        cell = TypeAdapter(Cell).validate_python(state["cell"])
    except (KeyError, ValidationError) as error:
        raise UserError(
            f"checkpoint {path}: holds no cell that this version knows ({type(error).__name__}); "
            "train it again"
        ) from error
    task = prepared_task(cell.task, cell.task_config)
    model = build_model(cell.model, vocab_size=task.vocab_size, **cell.model_config)
    weights = {k.removeprefix("model/"): v for k, v in tensors.items() if k.startswith("model/")}
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(
            f"checkpoint {path}: its weights do not fit {cell.model} as this version builds it; "
            "train it again"
        ) from error
    return Trained(cell, task, model.eval())
