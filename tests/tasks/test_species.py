"""Species: balanced classes, loci that no two splits share, own genomes, clear errors."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from seqbench.tasks.base import IGNORE, SPLITS, TaskError
from seqbench.tasks.dna import LETTERS
from seqbench.tasks.species import Species, SpeciesConfig

RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEQBENCH_DATA", str(tmp_path_factory.getbasetemp() / "cache"))


def _task(**config: Any) -> Species:
    task = Species(SpeciesConfig(**config))
    task.prepare()
    return task


def _genome(path: Path, letters: str, chromosomes: tuple[str, ...]) -> Path:
    text = "".join(f">chr{c}\n{''.join(RNG.choice(list(letters), 300))}\n" for c in chromosomes)
    path.write_text(text)
    return path


def test_only_the_last_base_is_scored_and_classes_are_balanced() -> None:
    task = _task(length=64)
    inputs, targets = task.batch("test", 0, 32)
    assert inputs.shape == (32, 64) and (targets[:, :-1] == IGNORE).all()
    assert torch.bincount(targets[:, -1] - len(LETTERS)).tolist() == [8, 8, 8, 8]
    seen = torch.cat([task.batch("train", i, 64).targets[:, -1] for i in range(8)])
    assert torch.bincount(seen - len(LETTERS)).min() > 90


def test_no_locus_of_the_sample_is_in_two_splits() -> None:
    task = _task(length=64)
    genome, _ = task._genomes["human"]
    place = {interval: int(name.rpartition(":")[2]) for name, interval in genome.records.items()}
    ranges = []
    for split in SPLITS:
        places = {
            place[interval]
            for _, regions in task._genomes.values()
            for stretches in regions[split]
            for interval in stretches
        }
        ranges.append((min(places), max(places)))
    assert ranges[0][1] < ranges[1][0] and ranges[1][1] < ranges[2][0]


def test_own_genomes_are_split_by_chromosome(tmp_path: Path) -> None:
    chromosomes = ("2", "4", "1", "5", "X")
    one = _genome(tmp_path / "one.fa", "AC", chromosomes)
    two = _genome(tmp_path / "two.fa", "GT", chromosomes)
    task = _task(length=16, genomes=(f"one={one}", f"two={two}"))
    assert task.vocab_size == len(LETTERS) + 2 and task.chance() == 0.5
    for split, names in (("train", "24X"), ("validation", "1"), ("test", "5")):
        text = one.read_text()
        allowed = "".join(f">{r}" for r in text.split(">") if r and r.split("\n")[0][3:] in names)
        for row, target in zip(*task.batch(split, 0, 16)):  # type: ignore[arg-type]
            letters = "".join(LETTERS[i] for i in row)
            assert (set(letters) <= set("AC")) == (target[-1] == len(LETTERS))
            if target[-1] == len(LETTERS):
                assert letters in allowed
    assert task.baselines()["6-mer regression"] == 1.0


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"genomes": ("human",)}, "give NAME=FASTA"),
        ({"genomes": ("human=none.fa", "gorilla=none.fa")}, "none.fa"),
        ({"genomes": ("a=x", "b=y"), "test_chromosomes": ("1",)}, "'1' is a validation chromosome"),
        ({"length": 10**6}, "no stretch of task.length=1000000"),
        ({"length": 0}, "task.length=0"),
        ({"eval_windows": 0}, "task.eval_windows=0"),
    ],
)
def test_a_config_that_cannot_be_is_one_line(config: Any, said: str) -> None:
    with pytest.raises(TaskError, match=said) as error:
        _task(**config)
    assert "\n" not in str(error.value)


def test_the_warm_up_doubles_the_length_at_the_same_number_of_windows() -> None:
    task = _task(length=256, warmup_from=64)
    shapes = [tuple(task.batch("train", 0, 4, stage=s).inputs.shape) for s in (0, 1, None)]
    assert shapes == [(4, 64), (4, 128), (4, 256)] and task.num_stages == 2
    assert (task.batch("train", 0, 4, stage=0).targets[:, -1] >= len(LETTERS)).all()
    with pytest.raises(TaskError, match="warmup_from=256"):
        _task(length=256, warmup_from=256)
