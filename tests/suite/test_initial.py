"""Weights to begin from: another cell's, checked, in order, whatever the seed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from seqbench.suite import checkpoint, runner
from seqbench.suite.configuration import resolve
from seqbench.suite.experiment import Cell, Request, UserError
from seqbench.suite.records import Record
from seqbench.suite.training import run_cell

SETTINGS: dict[str, Any] = {
    "task.length": 32,
    "model.d_model": 16,
    "model.num_layers": 1,
    "train.steps": 3,
    "train.batch_size": 4,
    "train.eval_every": 3,
    "train.eval_batches": 1,
    "train.test_batches": 1,
    "train.warmup_steps": 1,
}
PRETRAINED = Request(task="dna", model="mamba", settings=SETTINGS)
TUNED = Request(task="species", model="mamba", settings=SETTINGS, init_from=PRETRAINED)


def run(cell: Cell, results: Path) -> Record:
    record = run_cell(cell, results, device="cpu")
    assert record is not None and record.status == "done", record
    return record


def weights(cell: Cell, results: Path) -> dict[str, torch.Tensor]:
    path = results / "checkpoints" / f"{cell.digest}.safetensors"
    tensors, state = checkpoint.read(path)
    assert state["finished"]
    return tensors


def begun_from(cell: Cell, results: Path) -> dict[str, Any]:
    """The weights before the first step: those after steps at a rate of next to nothing."""
    still = replace(cell, train=replace(cell.train, lr=1e-30, weight_decay=0.0))
    run(still, results)
    return weights(still, results)


@pytest.mark.parametrize("seed", [0, 2])
def test_a_cell_begins_from_the_weights_of_its_own_seed(seed: int, tmp_path: Path) -> None:
    """A larger vocabulary keeps the rows of the letters and draws the species' anew."""
    sources = [resolve(PRETRAINED, s) for s in (seed, 1)]
    for source in sources:
        run(source, tmp_path)
    cell = resolve(TUNED, seed)
    assert cell.train.init_from == f"{resolve(PRETRAINED, 0).digest}@seed"
    assert cell.begins_from(sources[0]) and not cell.begins_from(sources[1])
    first = begun_from(cell, tmp_path)
    scratch = begun_from(resolve(replace(TUNED, init_from=None), seed), tmp_path)
    for key, wanted in weights(sources[0], tmp_path).items():
        torch.testing.assert_close(first[key][: len(wanted)], wanted)
    key = "model/embedding.weight"
    torch.testing.assert_close(first[key][5:], scratch[key][5:])
    record = run(cell, tmp_path)
    assert len(record.environment["initial_weights_sha256"]) == 64


def test_a_file_is_known_by_its_weights_wherever_it_lies(tmp_path: Path) -> None:
    source = resolve(PRETRAINED, 0)
    run(source, tmp_path)
    file = tmp_path / "checkpoints" / f"{source.digest}.safetensors"
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(file.read_bytes())
    plain = replace(TUNED, init_from=None)
    one, other = (resolve(plain, 1, [("train.init_from", str(p))]) for p in (file, copy))
    assert one.digest == other.digest != resolve(plain, 1).digest
    record = run(other, tmp_path)
    assert record.environment["initial_weights_sha256"] == other.train.init_sha256
    tensors, state = checkpoint.read(copy)
    tensors["model/final_norm.weight"] += 1
    checkpoint.write(copy, tensors, state)
    assert resolve(plain, 1, [("train.init_from", str(copy))]).digest != one.digest
    with pytest.raises(UserError, match="changed since the cell was resolved"):
        run_cell(other, tmp_path, device="cpu")


def test_weights_that_are_not_there_or_do_not_fit_are_one_line(tmp_path: Path) -> None:
    source = resolve(PRETRAINED, 0)
    with pytest.raises(UserError, match="no weights at"):
        run_cell(resolve(TUNED, 0), tmp_path, device="cpu")
    with pytest.raises(UserError, match="no weights at nowhere"):
        resolve(TUNED, 0, [("train.init_from", "nowhere")])
    assert run_cell(source, tmp_path, device="cpu", stop_after=1) is None
    with pytest.raises(UserError, match="its cell is not finished"):
        run_cell(resolve(TUNED, 0), tmp_path, device="cpu")
    run(source, tmp_path)
    wider = resolve(replace(TUNED, init_from=None), 0, [("train.init_from", source.digest)])
    wider = replace(wider, model_config={**wider.model_config, "d_model": 24})
    with pytest.raises(UserError, match="do not fit the model: ") as caught:
        run_cell(wider, tmp_path, device="cpu")
    assert "\n" not in str(caught.value)


def test_cells_wait_for_those_they_begin_from() -> None:
    sources = [resolve(PRETRAINED, seed) for seed in (0, 1)]
    tuned = [resolve(TUNED, seed) for seed in (0, 1)]
    again = resolve(replace(TUNED, init_from=TUNED), 1)
    mixed = [again, *tuned, *sources]
    assert runner.waves(mixed) == [sources, tuned, [again]]
    assert runner.startable(tuned, [sources[1]]) == [tuned[0]]
    assert runner.waves(sources) == [sources]


def test_seeds_of_a_fine_tuned_cell_are_one_group() -> None:
    a, b = resolve(TUNED, 0), resolve(TUNED, 1)
    assert a.train == b.train and a.family == b.family and a.digest != b.digest
