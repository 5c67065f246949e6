"""DNA: the next base of the human genome (Gu & Dao 2023, 4.3.1; splits and setting of HyenaDNA).

The default data is a slice of chromosome 20 that comes with the package; see data/dna/README.md.
"""

from __future__ import annotations

import difflib
import gzip
import hashlib
import json
import logging
import mmap
import shutil
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch

from seqbench.tasks.base import IGNORE, SPLITS, Batch, Scale, Split, Task, TaskError
from seqbench.tasks.baselines import cached, markov_bits
from seqbench.tasks.fetch import cache_folder, fetch, new_folder, verify
from seqbench.tasks.streams import Windows, digest, generator

READER = "dna, reader 1"  # raised when the same files give other bases or splits
LETTERS = "ACGTN"  # their ids: 0 to 4
N = LETTERS.index("N")
AMBIGUOUS = "RYSWKMBDHV"  # IUPAC codes, read as N
MARKOV_ORDERS = 8
MARKOV_BASES = (2**26, 2**23)  # of train, and of validation and test, at most
CHUNK = 2**22  # bases encoded at once
BGZIP_END = bytes.fromhex("1f8b08040000000000ff0600424302001b0003000000000000000000")
SLICE = "chr20-slice"  # the data set that comes with the package
EMBEDDED = (SLICE, "apes-sample")  # checked whenever they are opened
BASENJI = "basenji-human"  # the data set of the split of Basenji, Enformer and HyenaDNA
BED_SPLITS: dict[str, Split] = {
    "train": "train",
    "valid": "validation",
    "val": "validation",
    "validation": "validation",
    "test": "test",
}

Intervals = list[tuple[int, int]]  # half-open, in the one long array of all records


@dataclass(frozen=True, kw_only=True)
class DnaConfig:
    """The sequence, its split and the window."""

    length: int = 256  # bases of a window
    dataset: Literal["chr20-slice", "chr20", "hg38"] = "chr20-slice"
    fasta: str | None = None  # a file, plain, gzip or bgzip, in place of the data set
    bed: str | None = None  # a file of chromosome, start, end, split; or "basenji-human"
    validation_chromosomes: tuple[str, ...] = ()  # instead of a BED file; the rest is train
    test_chromosomes: tuple[str, ...] = ()
    # anywhere: train windows start at any base. segments: as the paper cuts the segments of its
    # BED file, see _Segments.
    sampling: Literal["anywhere", "segments"] = "anywhere"
    reverse_complement: bool = False  # half of the train windows are read from the other strand
    # Sequence-length warm-up: the curriculum's first stage has windows of this length, and the
    # length doubles from stage to stage, at the same number of bases a batch.
    warmup_from: int | None = None


class Dna(Task):
    """Say the next base of a genome.

        Inputs   G A T T N C A      (A C G T N are 0 1 2 3 4)
        Targets  A T T - C A G      (N, shown as -, is not scored)

    Three ways to split: by a BED file; by chromosome; else every record by position, 80 % train,
    10 % validation, 10 % test, in that order. No window leaves its split's intervals: where those
    of a BED file overlap, test keeps the bases before validation, and that before train. Runs of N
    as long as a window are cut out, so every window has a base to score. Train windows start
    anywhere; validation and test windows stand end to end, so that a base is scored at most once.
    With sampling="segments" all three come from the segments of the BED file as in the paper.
    """

    Config = DnaConfig
    config: DnaConfig
    headline = "bits_per_base"
    difficulty = ("length",)
    scales: ClassVar[Mapping[str, Scale]] = {
        "cpu": Scale(
            note="4 Mbp of chromosome 20 (GRCh37) instead of hg38, windows of 256, two "
            "layers, a few hundred steps; not the paper's setting.",
            task={"length": 256},
            model={"d_model": 64, "num_layers": 2},
            train={
                "steps": 500,
                "batch_size": 32,
                "lr": 4e-3,
                "warmup_steps": 20,
                "weight_decay": 0.1,
                "eval_every": 100,
            },
        ),
        "paper": Scale(
            note="the 1.4M model of the size scaling on hg38 with HyenaDNA's BED split, "
            "which downloads 1 GB; a vocabulary of 5 instead of 16 padded ids.",
            task={"dataset": "hg38", "bed": BASENJI, "length": 1024},
            model={"d_model": 128, "num_layers": 12},
            train={
                "steps": 10_000,
                "batch_size": 1024,
                "lr": 8e-3,
                "warmup_steps": 1000,
                "weight_decay": 0.1,
                "beta2": 0.95,
                "eval_every": 500,
            },
        ),
    }

    @property
    def vocab_size(self) -> int:
        return len(LETTERS)

    def prepare(self) -> None:
        c = self.config
        if c.length < 1:
            raise TaskError(f"task.length={c.length}: a window has at least 1 base")
        if c.warmup_from is not None and not 1 <= c.warmup_from < c.length:
            raise TaskError(
                f"task.warmup_from={c.warmup_from}: a length below task.length={c.length}: give 1 "
                f"to {c.length - 1}, or none"
            )
        self._genome = open_genome(c.dataset, c.fasta)
        self._segments = self._split()
        self._regions = _disjoint(self._segments)
        if c.sampling == "segments" and any(
            self._regions[split] != _merged(self._segments[split]) for split in SPLITS
        ):
            raise TaskError(
                f"task.sampling='segments' with task.bed={c.bed!r}: segments of two splits share "
                "bases; give a BED file whose splits are apart, or sampling='anywhere'"
            )
        self._windows = {split: self._cut(split, c.length) for split in SPLITS}
        self._stages = [self._cut("train", length) for length in self._stage_lengths()]
        for split in SPLITS:
            if not len(self._windows[split]):
                longest = max((end - start for start, end in self._regions[split]), default=0)
                raise TaskError(
                    f"{self._genome.where}: the {split} split has no stretch of bases that holds a "
                    f"window of task.length={c.length} and its next base (longest interval: "
                    f"{longest}); give more sequence or a shorter length"
                )

    def fingerprint(self) -> str:
        return digest(READER, self._genome.sha256, sorted(self._regions.items()))

    @property
    def num_stages(self) -> int:
        return len(self._stage_lengths())

    def batch(
        self, split: Split, index: int, batch_size: int, *, seed: int = 0, stage: int | None = None
    ) -> Batch:
        windows = self._windows[split]
        if split == "train":
            if stage is not None:
                windows = self._stages[stage]
                batch_size = batch_size * self.config.length // windows.length
            rng = generator("dna", seed, index)
            if isinstance(windows, _Segments):
                starts = windows.epochs(index * batch_size, batch_size, seed)
            else:
                starts = windows.random(batch_size, rng)
            tokens = self._genome.read(windows, starts)
            if self.config.reverse_complement:
                other = rng.random(len(tokens)) < 0.5
                tokens[other] = _COMPLEMENT[tokens[other, ::-1]]
        else:
            tokens = self._genome.read(windows, windows.fixed(index * batch_size, batch_size))
        targets = tokens[:, 1:].copy()
        targets[targets == N] = IGNORE
        return Batch(torch.from_numpy(tokens[:, :-1].copy()), torch.from_numpy(targets))

    def _stage_lengths(self) -> list[int]:
        return doubling(self.config.warmup_from, self.config.length)

    def _cut(self, split: Split, length: int) -> Windows | _Segments:
        if self.config.sampling == "segments":
            return _Segments(self._segments[split], self._genome, length)
        gaps = [run for run in self._genome.gaps if run[1] - run[0] >= length]
        return Windows(_without(self._regions[split], gaps), length)

    def num_batches(self, split: Split, batch_size: int) -> int | None:
        return None if split == "train" else -(-len(self._windows[split]) // batch_size)

    def chance(self) -> float:
        return 2.0

    def baselines(self) -> dict[str, float]:
        """Markov models of order 0 (the zero-order baseline: base frequencies) to 8.

        Counted on all of train and scored on all of test, up to a whole chromosome or so.
        """
        blocks = {
            split: [self._genome.bases[start:end] for start, end in self._regions[split]]
            for split in SPLITS
        }
        return cached(
            self.fingerprint(),
            MARKOV_BASES,
            compute=lambda: markov_bits(
                blocks["train"],
                blocks["validation"],
                blocks["test"],
                orders=MARKOV_ORDERS,
                vocab_size=self.vocab_size,
                unscored=N,
                limits=MARKOV_BASES,
            ),
        )

    def _split(self) -> dict[Split, Intervals]:
        c, genome = self.config, self._genome
        by_chromosome = {"validation": c.validation_chromosomes, "test": c.test_chromosomes}
        if not any(by_chromosome.values()):
            return genome.by_position() if c.bed is None else _read_bed(c.bed, genome)
        if c.bed is not None:
            raise TaskError(
                f"task.bed={c.bed!r} beside task.validation_chromosomes or task.test_chromosomes: "
                "the split comes from one of them; leave the other out"
            )
        owner: dict[str, Split] = {}
        for split, names in by_chromosome.items():
            if not names:
                raise TaskError(
                    f"task.{split}_chromosomes is empty while the other split has some; give both"
                )
            for name in names:
                key = f"task.{split}_chromosomes"
                genome.interval(name, key)
                if name in owner:
                    raise TaskError(f"{key}: {name!r} is named twice; a record has one split")
                owner[name] = split  # type: ignore[assignment]
        regions: dict[Split, Intervals] = {split: [] for split in SPLITS}
        for name, interval in genome.records.items():
            regions[owner.get(name, "train")].append(interval)
        return regions


class _Segments(Windows):
    """Windows as the paper cuts segments (App. E.3.1): every one is seen once an epoch.

    Up to the length of a segment, its pieces end to end. Beyond, two windows a segment, one that
    starts with it and one that ends with it: they read on into the bases around, of whatever split,
    as the paper's and HyenaDNA's do. Windows beyond a record's ends, or of N alone, are left out.
    """

    def __init__(self, segments: Intervals, genome: Genome, length: int) -> None:
        super().__init__([], length)
        starts: list[int] = []
        for start, end in segments:
            if end - start > length:
                starts += range(start, end - length, length)
                continue
            first, last = genome.around(start)
            starts += (at for at in (start, end - length - 1) if first <= at < last - length)
        gaps = [run for run in genome.gaps if run[1] - run[0] >= length]
        lows, highs = (np.array([run[i] for run in gaps], dtype=np.int64) for i in (0, 1))
        found = np.unique(np.array(starts, dtype=np.int64))
        if len(lows) and len(found):
            gap = np.maximum(np.searchsorted(lows, found + 1, side="right") - 1, 0)
            found = found[~((lows[gap] <= found + 1) & (found + length + 1 <= highs[gap]))]
        self._cuts = found

    def __len__(self) -> int:
        return len(self._cuts)

    def fixed(self, first: int, count: int) -> np.ndarray:
        if count and not 0 <= first < len(self):
            raise IndexError(f"window {first} of {len(self)}")
        return self._cuts[self._order[first : first + count]]

    def epochs(self, first: int, count: int, seed: int) -> np.ndarray:
        """The windows `first` to `first` + `count` of an endless stream, shuffled every epoch."""
        which = np.arange(first, first + count, dtype=np.int64)
        epoch, place = which // len(self), which % len(self)
        order = {
            e: generator("dna epoch", seed, e).permutation(len(self)) for e in set(epoch.tolist())
        }
        return self._cuts[[order[e][p] for e, p in zip(epoch.tolist(), place, strict=True)]]


@dataclass(frozen=True, eq=False)
class Genome:
    """All records of a FASTA file as one array of ids, memory-mapped from the cache."""

    where: str  # for messages
    bases: np.ndarray  # uint8
    records: dict[str, tuple[int, int]]  # name -> its interval in `bases`
    gaps: Intervals  # the runs of N
    sha256: str  # of the bases

    def read(self, windows: Windows, starts: np.ndarray) -> np.ndarray:
        """The windows at those starts, (count, length + 1), int64.

        What was read stays in the system's cache, not in this process: else all of a genome would
        end up in its memory.
        """
        tokens = windows.read(self.bases, starts)
        if isinstance(self.bases, np.memmap) and hasattr(mmap, "MADV_DONTNEED"):
            self.bases._mmap.madvise(mmap.MADV_DONTNEED)  # type: ignore[attr-defined]
        return tokens

    def interval(self, name: str, where: str) -> tuple[int, int]:
        """The record of that name; `where` it was named, for the message."""
        if name not in self.records:
            close = difflib.get_close_matches(name, self.records, n=3, cutoff=0.4)
            known = close or list(self.records)[:5]
            raise TaskError(
                f"{where}: {name!r} is no record of {self.where}; "
                f"{'did you mean' if close else 'it has'} {', '.join(known)}"
            )
        return self.records[name]

    def without(self, interval: tuple[int, int], gaps: Intervals) -> Intervals:
        """What is left of an interval without some of the gaps."""
        low, high = interval
        return _without([interval], [(s, e) for s, e in gaps if s < high and e > low])

    def around(self, place: int) -> tuple[int, int]:
        """The interval of the record that holds a base."""
        return next((s, e) for s, e in self.records.values() if s <= place < e)

    def by_position(self) -> dict[Split, Intervals]:
        """Every record cut in three, in order."""
        regions: dict[Split, Intervals] = {split: [] for split in SPLITS}
        for start, end in self.records.values():
            size = end - start
            cuts = [start, start + size * 8 // 10, start + size * 9 // 10, end]
            for split, low, high in zip(SPLITS, cuts, cuts[1:], strict=False):
                regions[split].append((low, high))
        return regions


def doubling(first: int | None, length: int) -> list[int]:
    """The lengths of a warm-up from `first` on, doubling, below `length`; none without a first."""
    lengths = []
    while first is not None and first < length:
        lengths.append(first)
        first *= 2
    return lengths


def open_genome(dataset: str, fasta: str | None, where: str | None = None) -> Genome:
    """The bases of a data set, or of a FASTA file that was named at `where`; raises TaskError."""
    if fasta is not None:
        path, where = Path(fasta).expanduser(), where or f"task.fasta={fasta!r}"
    else:
        path, where = fetch(dataset), f"task.dataset={dataset!r}"
        if dataset in EMBEDDED and not (said := verify(dataset)).startswith("ok"):
            raise TaskError(f"{where}: {said}")
    if not path.is_file():
        raise TaskError(f"{where}: no such file; give a FASTA file, plain or gzip")
    try:
        facts = path.stat()
        return _encoded(path, where, facts.st_size, facts.st_mtime_ns)
    except OSError as error:
        raise TaskError(f"{where}: {error.strerror or error}; give a readable file") from None


@lru_cache(maxsize=4)
def _encoded(path: Path, where: str, size: int, changed: int) -> Genome:
    """The file's bases from the cache, encoded into it the first time."""
    with path.open("rb") as file:
        source = hashlib.file_digest(file, "sha256").hexdigest()
    folder = cache_folder() / "dna" / digest(READER, source)[:32]
    if not (folder / "records.json").is_file():
        if size > CHUNK:
            logging.getLogger("seqbench").info("dna: reading %s once, into %s", path, folder)
        _encode(path, where, folder)
    facts = json.loads((folder / "records.json").read_text(encoding="utf-8"))
    return Genome(
        where=where,
        bases=np.memmap(folder / "bases.u1", dtype=np.uint8, mode="r"),
        records={name: (start, end) for name, start, end in facts["records"]},
        gaps=[(int(start), int(end)) for start, end in np.load(folder / "gaps.npy")],
        sha256=facts["sha256"],
    )


def _encode(path: Path, where: str, target: Path) -> None:
    """Fills the folder `target`: the bases as ids, the records, the runs of N."""
    try:
        with new_folder(target) as folder:
            work = folder / "work"  # the unpacked file and its index, never beside the file itself
            work.mkdir()
            _write_bases(_plain(path, where, work), path.name, where, folder)
            shutil.rmtree(work)
    except OSError as error:
        raise TaskError(
            f"{where}: cannot be written below {cache_folder()} ({error.strerror or error}); set "
            "SEQBENCH_DATA to a folder with room"
        ) from None


def _write_bases(path: Path, called: str, where: str, folder: Path) -> None:
    """The bases of a plain file, `called` so in messages."""
    import pyfaidx

    try:
        fasta = pyfaidx.Fasta(
            str(path),
            indexname=str(path.with_name("index.fai")),
            as_raw=True,
            sequence_always_upper=True,
        )
    except (pyfaidx.FastaIndexingError, ValueError, RuntimeError) as error:
        said = str(error).split("Please report")[0]
        said = said.replace(str(path), called).replace(path.name, called)
        raise TaskError(
            f"{where}: not a FASTA file that can be indexed ({' '.join(said.split())}); each "
            "record is a line >NAME and lines of one length without blank ones between"
        ) from None
    sha, offset, records = hashlib.sha256(), 0, []
    gaps: Intervals = []
    with fasta, (folder / "bases.u1").open("wb") as out:
        for name in fasta.keys():  # noqa: SIM118 (iterating a Fasta gives records)
            first = offset
            for at in range(0, len(fasta[name]), CHUNK):
                ids = _ids(fasta[name][at : at + CHUNK], f"{where}: record {name!r}", at)
                gaps += ((start + offset, end + offset) for start, end in _runs(ids == N))
                sha.update(ids.data)
                out.write(ids.data)
                offset += len(ids)
            records.append((name, first, offset))
            out.write(bytes([N]))  # between records: their intervals never touch, nor merge
            offset += 1
    if all(start == end for _, start, end in records):
        raise TaskError(f"{where}: no record has any base; give a FASTA file with a sequence")
    np.save(folder / "gaps.npy", np.array(_merged(gaps), dtype=np.int64).reshape(-1, 2))
    facts = {"records": records, "sha256": sha.hexdigest()}
    (folder / "records.json").write_text(json.dumps(facts), encoding="utf-8")


def _ids(sequence: str, where: str, at: int) -> np.ndarray:
    """The ids of letters, which begin at base `at` of their record."""
    letters = np.frombuffer(sequence.encode("ascii", "replace"), dtype=np.uint8)
    ids = _IDS[letters]
    if (ids == _NO_BASE).any():
        bad = int((ids == _NO_BASE).argmax())
        raise TaskError(
            f"{where} has {chr(letters[bad])!r} at base {at + bad + 1}: DNA has A C G T, N and the "
            f"ambiguity codes {AMBIGUOUS}; give a DNA sequence, not protein or RNA"
        )
    return ids


def _plain(path: Path, where: str, work: Path) -> Path:
    """A plain file of that content: pyfaidx goes by a file's ending, and does not read gzip."""
    plain = work / "plain.fa"
    with path.open("rb") as file:
        head = file.read(18)
        if head[:2] != b"\x1f\x8b":
            plain.symlink_to(path.resolve())
            return plain
        file.seek(-min(len(BGZIP_END), path.stat().st_size), 2)
        tail = file.read()
    # bgzip is gzip with a field of its own; an empty block at the end says that nothing is missing.
    if head[3:4] == b"\x04" and head[12:14] == b"BC" and tail != BGZIP_END:
        raise TaskError(
            f"{where}: the bgzip data is cut short (its end mark is missing); fetch the file again"
        )
    try:
        with gzip.open(path, "rb") as packed, plain.open("wb") as out:
            shutil.copyfileobj(packed, out, CHUNK)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise TaskError(
            f"{where}: the gzip data is cut short or damaged ({error}); fetch the file again"
        ) from None
    return plain


def _read_bed(bed: str, genome: Genome) -> dict[Split, Intervals]:
    """The segments of a BED file with the split in its fourth column."""
    path = fetch(bed) if bed == BASENJI else Path(bed).expanduser()
    found: dict[Split, Intervals] = {split: [] for split in SPLITS}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        said = error.strerror if isinstance(error, OSError) else "not a text file"
        raise TaskError(f"task.bed={bed!r}: {said}; give a readable BED file") from None
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith(("#", "track", "browser")):
            continue
        where = f"task.bed={bed!r}, line {number}"
        columns = line.split()
        if len(columns) < 4 or not (columns[1].isdigit() and columns[2].isdigit()):
            raise TaskError(f"{where}: {line!r}: wants chromosome, start, end, split")
        if columns[3] not in BED_SPLITS:
            raise TaskError(
                f"{where}: split {columns[3]!r}: valid are {', '.join(sorted(BED_SPLITS))}"
            )
        start, end = int(columns[1]), int(columns[2])
        first, last = genome.interval(columns[0], where)
        if not start < end <= last - first:
            raise TaskError(
                f"{where}: {start} to {end} of {columns[0]!r}, which has {last - first} bases: "
                "0 <= start < end <= bases must hold; is the BED file of another assembly?"
            )
        found[BED_SPLITS[columns[3]]].append((first + start, first + end))
    return found


def _disjoint(segments: dict[Split, Intervals]) -> dict[Split, Intervals]:
    """The splits without a base in two of them: test keeps it, then validation."""
    test = _merged(segments["test"])
    validation = _without(_merged(segments["validation"]), test)
    train = _without(_merged(segments["train"]), _merged([*test, *validation]))
    return {"train": train, "validation": validation, "test": test}


_NO_BASE = 255
_IDS = np.full(256, _NO_BASE, dtype=np.uint8)
_IDS[list(LETTERS.encode())] = range(len(LETTERS))
_IDS[list(AMBIGUOUS.encode())] = N
_COMPLEMENT = np.array([LETTERS.index(letter) for letter in "TGCAN"], dtype=np.int64)


def _runs(flags: np.ndarray) -> Iterator[tuple[int, int]]:
    """The half-open intervals where the flags are set."""
    edges = np.flatnonzero(np.diff(flags.astype(np.int8), prepend=0, append=0)).tolist()
    return zip(edges[::2], edges[1::2], strict=True)


def _merged(intervals: Iterable[tuple[int, int]]) -> Intervals:
    """Sorted, those that touch or overlap made one."""
    merged: Intervals = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def _without(intervals: Intervals, holes: Intervals) -> Intervals:
    """The sorted intervals less the sorted, disjoint holes."""
    left: Intervals = []
    at = 0
    for start, end in intervals:
        while at < len(holes) and holes[at][1] <= start:
            at += 1
        while at < len(holes) and holes[at][0] < end:
            low, high = holes[at]
            if low > start:
                left.append((start, low))
            start = high
            if high >= end:  # the next interval may begin in this hole
                break
            at += 1
        if start < end:
            left.append((start, end))
    return left
