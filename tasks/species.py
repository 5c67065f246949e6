"""Species: which great ape a stretch of DNA comes from (Gu & Dao 2023, 4.3.3; from HyenaDNA).

The default data is a sample of four species that comes with the package; data/species/README.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from seqbench.tasks.base import IGNORE, SPLITS, Batch, Scale, Split, Task, TaskError
from seqbench.tasks.baselines import cached
from seqbench.tasks.dna import LETTERS, Genome, doubling, open_genome
from seqbench.tasks.streams import Windows, digest, generator

READER = "species, reader 1"  # raised when the same files give other windows or splits
SAMPLE = "apes-sample"  # the data set that comes with the package
# HyenaDNA's split by chromosome; the rest is for training.
VALIDATION = ("1", "3", "12", "13")
TEST = ("5", "7", "9", "10", "11")
KMER = 6
FIT_WINDOWS, SCORE_WINDOWS = 2048, 1024  # of the k-mer baseline


@dataclass(frozen=True, kw_only=True)
class SpeciesConfig:
    """The genomes and the window."""

    length: int = 1024  # bases of a window
    # NAME=FASTA for each species, in place of the sample; split by chromosome as in HyenaDNA.
    genomes: tuple[str, ...] = ()
    validation_chromosomes: tuple[str, ...] = VALIDATION  # of `genomes`, with or without "chr"
    test_chromosomes: tuple[str, ...] = TEST
    eval_windows: int = 512  # of validation and of test, at most; as many of every species
    # Sequence-length warm-up: the curriculum's first stage has windows of this length, and the
    # length doubles from stage to stage, at the same number of windows a batch.
    warmup_from: int | None = None


class Species(Task):
    """Name the species of a window, at its last base.

        Inputs   G A T T A C A      (A C G T N are 0 1 2 3 4)
        Targets  - - - - - - 7      (5 + the species; - is not scored)

    Every species is as likely as any other, then every chromosome, then every place. The sample has
    the same stretches of chromosome 22 in all four species, so nothing but the letters tells them
    apart; it is split by position on the human chromosome, 80 % train, 10 % validation, 10 % test,
    in that order, so that no locus of one split is in another. Guessing scores 1 / species.
    """

    Config = SpeciesConfig
    config: SpeciesConfig
    headline = "accuracy"
    difficulty = ("length",)
    scales: ClassVar[Mapping[str, Scale]] = {
        "cpu": Scale(
            note="four species instead of five and 3 Mbp of each, windows of 1024, a thousand "
            "steps; not the paper's setting.",
            task={"length": 1024},
            model={"d_model": 64, "num_layers": 2},
            train={
                "steps": 1000,
                "batch_size": 16,
                "lr": 1e-3,
                "warmup_steps": 100,
                "eval_every": 100,
                "eval_batches": 16,
                "test_batches": 64,
            },
        ),
        "paper": Scale(
            note="ten epochs of 1024 steps at batch 64, fine-tuned from a model pretrained at the "
            "same length; the five genomes have to be given.",
            task={"length": 1024, "genomes": ("",)},
            model={"d_model": 128, "num_layers": 12},
            train={
                "steps": 10_240,
                "batch_size": 64,
                "lr": 1e-4,
                "min_lr": 1e-6,
                "warmup_steps": 5120,
                "weight_decay": 0.1,
                "beta2": 0.95,
                "eval_every": 1024,
            },
        ),
    }

    @property
    def vocab_size(self) -> int:
        return len(LETTERS) + len(self._names())

    def prepare(self) -> None:
        c = self.config
        if c.length < 1:
            raise TaskError(f"task.length={c.length}: a window has at least 1 base")
        if c.eval_windows < 1:
            raise TaskError(f"task.eval_windows={c.eval_windows}: give at least 1")
        if c.warmup_from is not None and not 2 <= c.warmup_from < c.length:
            raise TaskError(
                f"task.warmup_from={c.warmup_from}: give 2 or more, and less than "
                f"task.length={c.length}; or none"
            )
        self._genomes = self._open()
        # Species -> split -> windows of each chromosome (or of all of the sample's stretches).
        self._windows: list[dict[Split, list[Windows]]] = []
        for name, (genome, regions) in self._genomes.items():
            cut = {split: _windows(regions[split], c.length) for split in SPLITS}
            for split, found in cut.items():
                if not found:
                    raise TaskError(
                        f"{genome.where}: the {split} split of {name!r} has no stretch of "
                        f"task.length={c.length} bases; give more sequence or a shorter length"
                    )
            self._windows.append(cut)
        # Stage -> species -> train windows of each chromosome.
        self._stages = [
            [_windows(regions["train"], length) for _, regions in self._genomes.values()]
            for length in doubling(c.warmup_from, c.length)
        ]

    def fingerprint(self) -> str:
        parts = [
            (name, genome.sha256, regions) for name, (genome, regions) in self._genomes.items()
        ]
        return digest(READER, parts)

    def batch(
        self, split: Split, index: int, batch_size: int, *, seed: int = 0, stage: int | None = None
    ) -> Batch:
        species = len(self._windows)
        if split == "train":
            rng = generator("species", seed, index)
            labels = rng.integers(0, species, batch_size)
            rows = []
            for label in labels:
                if stage is None:
                    chromosomes = self._windows[label][split]
                else:
                    chromosomes = self._stages[stage][label]
                windows = chromosomes[rng.integers(len(chromosomes))]
                rows.append(self._read(int(label), windows, windows.random(1, rng)))
        else:
            first, last = index * batch_size, min((index + 1) * batch_size, self._held_out(split))
            if first >= last:
                raise IndexError(f"species: split {split} has no batch {index} of {batch_size}")
            which = np.arange(first, last)
            labels = which % species  # the species in turn: every batch is balanced
            rows = [
                self._fixed(int(label), split, int(place))
                for label, place in zip(labels, which // species, strict=True)
            ]
        inputs = np.concatenate(rows)
        targets = np.full_like(inputs, IGNORE)
        targets[:, -1] = len(LETTERS) + labels
        return Batch(torch.from_numpy(inputs), torch.from_numpy(targets))

    def num_batches(self, split: Split, batch_size: int) -> int | None:
        return None if split == "train" else -(-self._held_out(split) // batch_size)

    @property
    def num_stages(self) -> int:
        return len(doubling(self.config.warmup_from, self.config.length))

    def chance(self) -> float:
        return 1 / len(self._names())

    def baselines(self) -> dict[str, float]:
        """A logistic regression on how often each 6-mer occurs, fitted on train windows."""
        return cached(READER, self.fingerprint(), self.config.length, compute=self._kmer_regression)

    def _names(self) -> tuple[str, ...]:
        if self.config.genomes:
            return tuple(entry.partition("=")[0] for entry in self.config.genomes)
        return ("human", "chimpanzee", "gorilla", "orangutan")

    def _open(self) -> dict[str, tuple[Genome, dict[Split, list[list[tuple[int, int]]]]]]:
        """Species -> its genome, and for every split the stretches of each chromosome."""
        c = self.config
        if not c.genomes:
            genome = open_genome(SAMPLE, None)
            return {name: (genome, _by_position(genome, name)) for name in self._names()}
        owner: dict[str, Split] = {_bare(name): "validation" for name in c.validation_chromosomes}
        for chromosome in map(_bare, c.test_chromosomes):
            if chromosome in owner:
                raise TaskError(
                    f"task.test_chromosomes: {chromosome!r} is a validation chromosome too; a "
                    "chromosome has one split"
                )
            owner[chromosome] = "test"
        found: dict[str, tuple[Genome, dict[Split, list[list[tuple[int, int]]]]]] = {}
        for entry in c.genomes:
            name, equals, path = entry.partition("=")
            if not (equals and name and path) or name in found or len(c.genomes) < 2:
                raise TaskError(
                    f"task.genomes={list(c.genomes)}: {entry!r}: give NAME=FASTA for each of two "
                    "or more species, as in --set task.genomes='[\"human=hg38.fa\", ...]'"
                )
            genome = open_genome("", path, f"task.genomes: {entry!r}")
            regions: dict[Split, list[list[tuple[int, int]]]] = {split: [] for split in SPLITS}
            for record, interval in genome.records.items():
                gaps = [run for run in genome.gaps if run[1] - run[0] >= c.length]
                split = owner.get(_bare(record), "train")
                regions[split].append(genome.without(interval, gaps))
            found[name] = (genome, regions)
        return found

    def _held_out(self, split: Split) -> int:
        """Rows of validation or test: as many of every species."""
        fewest = min(sum(map(len, cut[split])) for cut in self._windows)
        species = len(self._windows)
        return min(fewest, max(1, self.config.eval_windows // species)) * species

    def _fixed(self, label: int, split: Split, place: int) -> np.ndarray:
        """Row `place` of a species, its chromosomes in turn as long as they last."""
        chromosomes = self._windows[label][split]
        rounds = 0
        while True:
            left = [windows for windows in chromosomes if len(windows) > rounds]
            if place < len(left):
                return self._read(label, left[place], left[place].fixed(rounds, 1))
            place -= len(left)
            rounds += 1

    def _read(self, label: int, windows: Windows, starts: np.ndarray) -> np.ndarray:
        genome = list(self._genomes.values())[label][0]
        # A window is of one base more than its length, but where a single base is asked for.
        return genome.read(windows, starts)[:, : windows.length + (self.config.length > 1)]

    def _kmer_regression(self) -> dict[str, float]:
        fit = [self.batch("train", i, 64) for i in range(FIT_WINDOWS // 64)]
        score = [
            self.batch("test", i, 64)
            for i in range(min(SCORE_WINDOWS // 64, self.num_batches("test", 64) or 0))
        ]
        x, y = _kmers(fit)
        mean, spread = x.mean(0), x.std(0) + 1e-6
        x = (x - mean) / spread
        weight = torch.zeros(x.shape[1], len(self._names()), requires_grad=True)
        bias = torch.zeros(len(self._names()), requires_grad=True)
        optimizer = torch.optim.LBFGS([weight, bias], max_iter=10, line_search_fn="strong_wolfe")

        def loss() -> torch.Tensor:
            optimizer.zero_grad()
            nats = torch.nn.functional.cross_entropy(x @ weight + bias, y)
            total = nats + 1e-2 * weight.square().sum()
            total.backward()
            return total

        optimizer.step(loss)
        tested, answers = _kmers(score)
        with torch.no_grad():
            found = ((tested - mean) / spread @ weight + bias).argmax(1)
        return {f"{KMER}-mer regression": float((found == answers).double().mean())}


def _by_position(genome: Genome, name: str) -> dict[Split, list[list[tuple[int, int]]]]:
    """The sample's stretches of a species, cut in three by the place on the human chromosome."""
    stretches = [
        (int(record.rpartition(":")[2]), interval)
        for record, interval in genome.records.items()
        if record.startswith(f"{name}|")
    ]
    stretches.sort()
    count = len(stretches)
    cuts = [0, count * 8 // 10, count * 9 // 10, count]
    return {
        split: [[interval for _, interval in stretches[low:high]]]
        for split, low, high in zip(SPLITS, cuts, cuts[1:], strict=False)
    }


def _windows(regions: list[list[tuple[int, int]]], length: int) -> list[Windows]:
    """Of `length` bases, for each chromosome that holds one."""
    made = (Windows(stretches, max(length - 1, 1)) for stretches in regions)
    return [windows for windows in made if len(windows)]


def _bare(chromosome: str) -> str:
    return chromosome.removeprefix("chr")


def _kmers(batches: list[Batch]) -> tuple[torch.Tensor, torch.Tensor]:
    """Counts of the 4^6 k-mers without N in each window (rows, 4096), and the species."""
    inputs = np.concatenate([batch.inputs.numpy() for batch in batches])
    rows, places = len(inputs), max(inputs.shape[1] - KMER + 1, 0)
    codes = np.zeros((rows, places), dtype=np.int64)
    whole = np.ones((rows, places), dtype=bool)
    for k in range(KMER if places else 0):
        letters = inputs[:, k : k + places]
        codes = 4 * codes + letters
        whole &= letters < 4
    codes += np.arange(rows)[:, None] * 4**KMER
    counts = np.bincount(codes[whole], minlength=rows * 4**KMER).reshape(rows, -1)
    answers = torch.cat([batch.targets[:, -1] for batch in batches]) - len(LETTERS)
    return torch.from_numpy(counts.astype(np.float32)), answers
