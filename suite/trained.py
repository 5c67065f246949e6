"""Finished models by name: a checkpoint file, the digest of a cell, or a pretrained Mamba."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seqbench.models.build import build_model
from seqbench.models.pretrained import load_pretrained
from seqbench.suite import checkpoint
from seqbench.suite.configuration import prepared_task
from seqbench.suite.experiment import Cell, UserError
from seqbench.suite.records import load, record_files

SHOWN = 5  # finished cells that an error names


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A model in evaluation mode, and the cell that trained it; None: pretrained elsewhere."""

    model: Any
    cell: Cell | None
    place: str  # the file, folder or repository


def load_trained(name: str, results: Path) -> Trained:
    """The model of a checkpoint file, of a digest (or its beginning) in `results`, of a folder or
    Hugging Face repository with a Mamba.

    A finished cell leaves its weights in <results>/checkpoints/DIGEST.safetensors, those of its
    best validation. Raises UserError or ModelError, one line, for a name of none of these.
    """
    path = Path(name).expanduser()
    if name and path.is_dir():
        return Trained(model=load_pretrained(path).eval(), cell=None, place=name)
    repository = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) and path.suffix != ".safetensors"
    if repository and not path.is_file():
        return Trained(model=load_pretrained(name).eval(), cell=None, place=name)
    if not path.is_file():
        path = _of_digest(name, results)
    weights, cell = checkpoint.read_finished(path)
    vocab_size = _vocab_size(weights, cell)
    model = build_model(cell.model, vocab_size=vocab_size, **cell.model_config)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(
            f"checkpoint {path}: its weights do not fit model {cell.model!r} as it is now "
            f"({' '.join(str(error).split())[:200]}); run the cell again"
        ) from error
    return Trained(model=model.eval(), cell=cell, place=str(path))


def _of_digest(name: str, results: Path) -> Path:
    kept = sorted((results / "checkpoints").glob("*.safetensors"))
    found = [p for p in kept if re.fullmatch(r"[0-9a-f]{4,16}", name) and p.stem.startswith(name)]
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(
            f"checkpoint {name!r}: {', '.join(p.stem for p in found)} begin so; give more digits"
        )
    for file in record_files(results):
        if re.fullmatch(r"[0-9a-f]{4,16}", name) and file.stem.startswith(name):
            raise UserError(
                f"checkpoint {name!r}: {results} has the record of {load(file).cell.label} but no "
                f"weights ({results / 'checkpoints' / file.stem}.safetensors); they stay where the "
                "cell ran: run it again"
            )
    some = ", ".join(p.stem for p in kept[:SHOWN]) or "none"
    more = f" and {len(kept) - SHOWN} more" if len(kept) > SHOWN else ""
    raise UserError(
        f"unknown checkpoint {name!r}: give a .safetensors file of a finished cell, its digest "
        f"({results}/checkpoints has {some}{more}), or a folder with a pretrained Mamba's "
        "config.json"
    )


def _vocab_size(weights: Mapping[str, Any], cell: Cell) -> int:
    """The rows of the embedding, so that no data is needed; a plugin's model asks its task."""
    table = weights.get("embedding.weight")
    if table is not None:
        return int(table.shape[0])
    return prepared_task(cell.task, cell.task_config).vocab_size
