"""Selection as a small file: Δ along one test sequence, and which answer reads which position.

<results>/selection/DIGEST.json is made when a cell is finished, where its task asks for it
(`shows_selection`), since reports never run a model.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seqbench.models.backbone import Backbone
from seqbench.models.base import ModelError
from seqbench.models.build import build_model
from seqbench.models.selection import trace
from seqbench.suite import checkpoint
from seqbench.suite.configuration import prepared_task
from seqbench.suite.experiment import Cell
from seqbench.suite.records import load_all, write_atomically
from seqbench.tasks.base import IGNORE, Task

LONGEST = 1024  # positions that a picture can still show


def write_selection(results: Path, cell: Cell, task: Task, model: Backbone) -> Path | None:
    """Writes a finished cell's file; None where there is nothing to show."""
    if not task.shows_selection:
        return None
    batch = task.batch("test", 0, 1)
    tokens_L, targets_L = batch.inputs[0], batch.targets[0]
    if len(tokens_L) > LONGEST:
        return None
    answers = (targets_L != IGNORE).nonzero()[:, 0]
    device = next(model.parameters()).device
    try:
        traces = trace(model, tokens_L.to(device), answers.to(device))
    except ModelError:
        return None  # attention, Hyena, ...: no Δ
    with torch.no_grad():
        predicted = model(tokens_L[None].to(device))[0].argmax(-1).cpu()
    found = {
        "digest": cell.digest,
        "tokens": tokens_L.tolist(),
        "answers": answers.tolist(),
        "targets": targets_L[answers].tolist(),
        "predicted": predicted[answers].tolist(),
        "layers": [
            {
                "delta": _rounded(layer.delta_LD.mean(-1)),  # mean over the channels
                # Thousandths of what an answer reads, over the positions.
                "reads": (1000 * layer.attention_RL()).round().int().tolist(),
            }
            for layer in traces
        ],
    }
    path = results / "selection" / f"{cell.digest}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, f"{json.dumps(found, separators=(',', ':'))}\n".encode())
    return path


def write_missing(results: Path) -> list[Path]:
    """The files of cells that finished without one, from their checkpoints where these are kept."""
    made = []
    for record in load_all(results):
        cell = record.cell
        saved = results / "checkpoints" / f"{cell.digest}.safetensors"
        done = (results / "selection" / f"{cell.digest}.json").exists()
        if record.status != "done" or done or not saved.exists():
            continue
        task = prepared_task(cell.task, cell.task_config)
        if task.shows_selection:
            model = build_model(cell.model, vocab_size=task.vocab_size, **cell.model_config)
            tensors, _ = checkpoint.read(saved)
            weights = {k.removeprefix("model/"): v for k, v in tensors.items()}
            model.load_state_dict({k: v for k, v in weights.items() if k in model.state_dict()})
            path = write_selection(results, cell, task, model)
            made += [path] if path is not None else []
    return made


def _rounded(values: Tensor) -> list[Any]:
    return [float(f"{v:.3g}") for v in values.tolist()]
