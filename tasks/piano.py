"""Piano: predict the next sample of a piano recording, 16 kHz, 8-bit mu-law (Gu & Dao 2023, 4.4.1).

The paper's data is YouTubeMix, cut and encoded as in SaShiMi (Goel et al. 2022). The default here
is a small embedded set, rendered from notes and never recorded: tasks/data/piano/README.md.
"""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np
import pooch
import soundfile
import torch
from numpy.typing import NDArray
from torch import Tensor

from seqbench.tasks.base import LATE, SPLITS, Batch, Scale, Split, Task, TaskError
from seqbench.tasks.baselines import cached, markov_bits
from seqbench.tasks.fetch import cache_folder, fetch, new_folder
from seqbench.tasks.streams import Windows, digest, generator

RATE = 16_000  # samples a second
LEVELS = 256  # of the mu-law code
VERSION = 1  # raised when decoding, splitting or encoding changes
AUDIO = (".wav", ".flac", ".ogg", ".opus", ".mp3", ".aif", ".aiff", ".au")
TAPS = 32  # of the linear prediction
PRIOR = 16.0  # weight in samples of the zero-order frequencies in a row of a frequency table
BLOCK = 992  # samples that it predicts at once, after TAPS that it knows
FIT_SAMPLES = 2**21  # of train, at most, that its frequencies are counted on
SCORE_SAMPLES = 2**20  # of test, at most, that it is scored on
TAP_BLOCKS = 256  # of train that its weights are fitted on
MARKOV_ORDERS = 2

Codes = NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class PianoConfig:
    """Which audio, and how much of it a model sees at once."""

    length: int = 1024  # samples in a window; the paper's lengths are 8192 to 958464
    dataset: Literal["piano-rendered", "youtubemix", "maestro-v3"] = "piano-rendered"
    path: str | None = None  # a folder of audio files, or one file, in place of the data set
    normalization: Literal["none", "min-max"] = "none"  # of every file; S4's loader: min-max to ±1
    # Windows of other lengths to test on too: models trained at several lengths then meet on one.
    test_lengths: tuple[int, ...] = field(default=(), metadata=LATE)


class Piano(Task):
    """Next-sample prediction of 16 kHz mono piano in 256 mu-law levels.

    A sequence is a window of one recording; the first input is the sample before its first target.

        Inputs   128 131 140 152 149 ...     (codes; 128 is silence)
        Targets  131 140 152 149 138 ...     (every sample is scored)

    Train windows start anywhere; validation and test windows stand end to end, in one shuffled
    order. A folder that says its own split (the embedded set by piece, MAESTRO by its table) keeps
    it; any other is split 88 / 6 / 6 % by sorted file, as S4 splits YouTubeMix, or by position if
    it has one or two files. Files shorter than a window are left out.
    """

    Config = PianoConfig
    config: PianoConfig
    headline = "bits_per_sample"
    difficulty = ("length",)
    scales: ClassVar[Mapping[str, Scale]] = {
        "cpu": Scale(
            note="ten minutes of rendered piano in windows of 1024 samples, not the "
            "paper's four recorded hours in windows of 8192 to 958464.",
            task={"length": 1024},
            model={"d_model": 64, "num_layers": 2},
            train={
                "steps": 500,
                "batch_size": 8,
                "lr": 3e-3,
                "warmup_steps": 50,
                "eval_every": 100,
                "eval_batches": 8,
                "test_batches": 64,
            },
        ),
        "paper": Scale(
            note="YouTubeMix, 2^20 samples a step in windows of 8192, 200K steps, the U-Net of 15 "
            "blocks; the paper's state is complex, and its S4 has a structured matrix.",
            task={"dataset": "youtubemix", "length": 8192, "normalization": "min-max"},
            model={"backbone": "unet", "d_model": 64, "num_layers": 3},
            train={
                "steps": 200_000,
                "batch_size": 128,
                "lr": 2e-3,
                "warmup_steps": 20_000,
                "weight_decay": 0.1,
                "eval_every": 2000,
            },
        ),
    }

    _fingerprint: str
    _codes: Codes
    _clips: list[_Clip]
    _windows: dict[Split, Windows]

    @property
    def vocab_size(self) -> int:
        return LEVELS

    def prepare(self) -> None:
        c = self.config
        for key, length in [("length", c.length), *(("test_lengths", n) for n in c.test_lengths)]:
            if length < 1:
                raise TaskError(f"task.{key}={length}: a window has at least 1 sample")
        folder = fetch(c.dataset) if c.path is None else Path(c.path).expanduser()
        where = f"task.dataset={c.dataset!r}" if c.path is None else f"task.path={c.path!r}"
        files = _audio_files(folder, where)
        splits = _splits(folder, files, where)
        content = [(name, splits[name], sha) for name, sha in zip(files, _content(files))]
        self._fingerprint = digest(VERSION, c.normalization, *content)
        self._codes, self._clips = _encoded(self._fingerprint, files, splits, c.normalization)
        self._windows = self._cut()
        wanted = [(split, "length", c.length) for split in SPLITS]
        wanted += [("test", "test_lengths", n) for n in c.test_lengths]
        for split, key, length in wanted:
            longest = max((clip.length for clip in self._clips if clip.split == split), default=0)
            if longest <= length:
                raise TaskError(
                    f"{where}: the longest stretch of audio in split {split} has "
                    f"{longest} samples ({longest / RATE:.1f} s), too few for a window of "
                    f"task.{key}={length} and the sample before it; give longer or more "
                    "recordings, or a shorter length"
                )

    def fingerprint(self) -> str:
        return self._fingerprint

    def batch(
        self, split: Split, index: int, batch_size: int, *, seed: int = 0, stage: int | None = None
    ) -> Batch:
        windows = self._windows[split]
        if split == "train":
            starts = windows.random(batch_size, generator("piano", seed, index))
        else:
            starts = windows.fixed(index * batch_size, batch_size)
            if not len(starts):
                raise IndexError(f"piano: split {split} has no batch {index} of {batch_size}")
        codes = torch.from_numpy(windows.read(self._codes, starts))
        return Batch(codes[:, :-1].contiguous(), codes[:, 1:].contiguous())

    def num_batches(self, split: Split, batch_size: int) -> int | None:
        return None if split == "train" else -(-len(self._windows[split]) // batch_size)

    def test_variants(self) -> dict[str, Self]:
        variants = {
            f"length={n}": self.with_config(length=n, test_lengths=())
            for n in self.config.test_lengths
        }
        for variant in variants.values():  # of the same recordings
            variant._fingerprint = self._fingerprint
            variant._codes, variant._clips = self._codes, self._clips
            variant._windows = variant._cut()
        return variants

    def chance(self) -> float:
        return float(np.log2(LEVELS))

    def baselines(self) -> dict[str, float]:
        """Bits per sample of order-0 to order-2 Markov models and of a linear prediction."""
        return cached(VERSION, self._fingerprint, compute=self._baselines)

    def _cut(self) -> dict[Split, Windows]:
        return {
            split: Windows(
                [clip.region for clip in self._clips if clip.split == split], self.config.length
            )
            for split in SPLITS
        }

    def _baselines(self) -> dict[str, float]:
        blocks = {
            split: [self._codes[slice(*c.region)] for c in self._clips if c.split == split]
            for split in SPLITS
        }
        found = markov_bits(
            blocks["train"],
            blocks["validation"],
            blocks["test"],
            orders=MARKOV_ORDERS,
            vocab_size=LEVELS,
        )
        fit, score = self._sample("train", FIT_SAMPLES), self._sample("test", SCORE_SAMPLES)
        if len(fit) and len(score):  # recordings of a sixteenth of a second and more
            taps = _linear_taps(fit[:TAP_BLOCKS])
            # How often each code came after each code of the prediction.
            found[f"linear-{TAPS}"] = _table_bits(
                (_predicted(fit, taps), fit[:, TAPS:]), (_predicted(score, taps), score[:, TAPS:])
            )
        return found

    def _sample(self, split: Split, samples: int) -> Codes:
        """Blocks (B, TAPS + BLOCK) from all over a split, about so many samples in all."""
        windows = Windows(
            [clip.region for clip in self._clips if clip.split == split], TAPS + BLOCK - 1
        )
        count = min(len(windows), -(-samples // BLOCK))
        return windows.read(self._codes, windows.fixed(0, count)).astype(np.uint8)

    @staticmethod
    def encode(file: Path, normalization: str = "none") -> Tensor:
        """The codes (L,) int64 of an audio file, made mono and 16 kHz; TaskError if it is none."""
        return torch.from_numpy(_encode(_read(file), normalization)).long()

    @staticmethod
    def decode(tokens: Tensor) -> Tensor:
        """Codes of any shape -> float32 samples in [-1, 1] at 16 kHz."""
        return _torchaudio().mu_law_decoding(tokens, LEVELS).float()


@dataclass(frozen=True)
class _Clip:
    """A stretch of one recording in the encoded samples."""

    name: str
    split: Split
    start: int
    length: int

    @property
    def region(self) -> tuple[int, int]:
        return self.start, self.start + self.length


def _audio_files(folder: Path, where: str) -> dict[str, Path]:
    """Name -> audio file, in natural order, of a folder and those in it, or of the one file."""
    if folder.is_file():
        return {folder.name: folder}
    if not folder.is_dir():
        raise TaskError(f"{where}: no such file or folder; give a folder of audio files")
    found = {
        file.relative_to(folder).as_posix(): file
        for file in folder.rglob("*")
        if file.suffix.lower() in AUDIO and not file.name.startswith(".") and file.is_file()
    }
    if not found:
        raise TaskError(
            f"{where}: no audio file in that folder; give one with any of {' '.join(AUDIO)}"
        )
    return {name: found[name] for name in sorted(found, key=_natural)}


def _natural(name: str) -> list[tuple[int, str]]:
    parts = re.split(r"(\d+)", name.lower())
    return [(int(part), "") if part.isdigit() else (-1, part) for part in parts] + [(-2, name)]


def _splits(folder: Path, files: Mapping[str, Path], where: str) -> dict[str, Split | None]:
    """File name -> split; None where there are fewer files than splits: each is cut by position."""
    given: dict[str, Any] = {}
    pieces, maestro = folder / "pieces.json", folder / "maestro-v3.0.0.csv"
    if pieces.is_file():
        listed = json.loads(pieces.read_text(encoding="utf-8"))["pieces"]
        given = {piece["file"]: piece["split"] for piece in listed}
    elif maestro.is_file():
        with maestro.open(encoding="utf-8", newline="") as file:
            given = {row["audio_filename"]: row["split"] for row in csv.DictReader(file)}
    if given:
        missing = [name for name in files if name not in given]
        if missing:
            raise TaskError(
                f"{where}: the folder's own split does not name {missing[0]}; remove one of them"
            )
        return {name: given[name] for name in files}
    if len(files) < len(SPLITS):
        return dict.fromkeys(files)
    validation, test = _split_points(len(files))
    return {
        name: "train" if i < validation else "validation" if i < test else "test"
        for i, name in enumerate(files)
    }


def _split_points(count: int) -> tuple[int, int]:
    """The first of `count` that is validation, and of test; each split of 3 and more gets one."""
    validation, test = int(0.88 * count), int(0.94 * count)
    test = max(0, min(test, count - 1))
    return max(0, min(validation, test - 1)), test


def _content(files: Mapping[str, Path]) -> list[str]:
    """The files' SHA-256, remembered by size and time: hashing hours of audio takes minutes."""
    stats = [(file, file.stat()) for file in (path.resolve() for path in files.values())]
    key = digest(*((str(file), stat.st_size, stat.st_mtime_ns) for file, stat in stats))
    remembered = cache_folder() / "piano" / f"content-{key[:32]}.json"
    if not remembered.exists():
        hashes = [_sha256(file) for file, _ in stats]
        with _caching():
            remembered.parent.mkdir(parents=True, exist_ok=True)
            temporary = remembered.with_name(f".{remembered.name}.{os.getpid()}")
            temporary.write_text(json.dumps(hashes), encoding="utf-8")
            temporary.replace(remembered)
    return list(json.loads(remembered.read_text(encoding="utf-8")))


def _sha256(file: Path) -> str:
    try:
        return str(pooch.file_hash(str(file)))
    except OSError as error:
        raise TaskError(f"{file}: cannot be read ({error.strerror})") from error


def _encoded(
    fingerprint: str,
    files: Mapping[str, Path],
    splits: Mapping[str, Split | None],
    normalization: str,
) -> tuple[Codes, list[_Clip]]:
    """The codes of all files, one after the other in a memory-mapped file, and where each lies.

    Made at the first call for this content, then opened.
    """
    place = cache_folder() / "piano" / fingerprint[:32]
    try:
        return _open(place)
    except (OSError, ValueError):  # not there, or cut short by a crash of the machine
        shutil.rmtree(place, ignore_errors=True)
    with _caching(), new_folder(place) as folder:
        clips: list[_Clip] = []
        with (folder / "codes.u8").open("wb") as out:
            for name, file in files.items():
                codes = _encode(_read(file), normalization)
                clips += _clips(name, splits[name], out.tell(), len(codes))
                out.write(codes.tobytes())
        text = json.dumps([asdict(clip) for clip in clips], indent=1)
        (folder / "clips.json").write_text(text, encoding="utf-8")
    return _open(place)


def _open(place: Path) -> tuple[Codes, list[_Clip]]:
    listed = json.loads((place / "clips.json").read_text(encoding="utf-8"))
    clips = [_Clip(**clip) for clip in listed]
    total = max(clip.start + clip.length for clip in clips)
    if not total:
        return np.empty(0, np.uint8), clips
    return np.memmap(place / "codes.u8", np.uint8, mode="r", shape=(total,)), clips


def _clips(name: str, split: Split | None, start: int, length: int) -> list[_Clip]:
    if split is not None:
        return [_Clip(name=name, split=split, start=start, length=length)]
    edges = (0, *_split_points(length), length)
    return [
        _Clip(name=name, split=part, start=start + first, length=last - first)
        for part, first, last in zip(SPLITS, edges[:-1], edges[1:], strict=True)
    ]


def _read(file: Path) -> Tensor:
    """A file's samples, float32, mono, at RATE."""
    try:
        with soundfile.SoundFile(file) as audio:
            rate, announced = audio.samplerate, audio.frames
            samples = audio.read(dtype="float32", always_2d=True)
    except soundfile.SoundFileError as error:
        raise TaskError(f"{file}: no readable audio ({error}); repair or remove it") from error
    if len(samples) < announced:
        raise TaskError(
            f"{file}: ends after {len(samples)} of {announced} samples; repair or remove it"
        )
    wave = torch.from_numpy(samples).mean(dim=1)
    if not torch.isfinite(wave).all():
        raise TaskError(f"{file}: has samples that are no finite numbers; repair or remove it")
    if rate != RATE and len(wave):
        wave = _torchaudio().resample(wave, rate, RATE)
    return wave


def _encode(wave: Tensor, normalization: str) -> Codes:
    """Samples -> mu-law codes; "min-max" stretches the file to [-1, 1] as S4's loader does."""
    if normalization == "min-max" and len(wave):
        low, high = wave.min(), wave.max()
        wave = 2 * (wave - low) / (high - low + 1e-6) - 1
    codes: Codes = _torchaudio().mu_law_encoding(wave.clamp(-1, 1), LEVELS).to(torch.uint8).numpy()
    return codes


def _torchaudio() -> Any:
    """torchaudio.functional, or one line on why it does not load."""
    try:
        import torchaudio.functional as functional
    except (ImportError, OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise TaskError(
            f"task piano needs torchaudio, which does not load beside torch {torch.__version__} "
            f"({reason}); its last release, 2.11.0, needs one of PyPI's torch 2.11 to 2.14"
        ) from error
    return functional


def _linear_taps(blocks_BL: Codes) -> Tensor:
    """Weights of the TAPS samples before, earliest first, with the least squared error."""
    wave_BL = Piano.decode(torch.from_numpy(blocks_BL)).double()
    frames = wave_BL.unfold(1, TAPS + 1, 1).flatten(0, 1)
    gram = frames.T @ frames
    gram += 1e-9 * gram.trace() * torch.eye(TAPS + 1)  # silence has no solution of its own
    return torch.linalg.solve(gram[:-1, :-1], gram[:-1, -1]).float()


def _predicted(blocks_BL: Codes, taps: Tensor) -> Codes:
    """The code of the linear prediction of every sample that has TAPS before it."""
    wave_BL = Piano.decode(torch.from_numpy(blocks_BL))
    count = wave_BL.shape[1] - TAPS
    predicted = torch.zeros(len(wave_BL), count)
    for k, weight in enumerate(taps):
        predicted += weight * wave_BL[:, k : k + count]
    return _encode(predicted, "none")


def _table_bits(fit: tuple[Codes, Codes], score: tuple[Codes, Codes]) -> float:
    """Bits per sample of p(target | context) by frequencies in `fit`, smoothed, on `score`."""
    pairs = np.bincount(_joined(*fit), minlength=LEVELS**2).reshape(LEVELS, LEVELS)
    zero_order = (pairs.sum(0) + 1) / (pairs.sum() + LEVELS)
    table = (pairs + PRIOR * zero_order) / (pairs.sum(1, keepdims=True) + PRIOR)
    return float(-np.log2(table).ravel()[_joined(*score)].mean())


def _joined(contexts: Codes, targets: Codes) -> NDArray[np.int32]:
    return (contexts.astype(np.int32) * LEVELS + targets).ravel()


@contextmanager
def _caching() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise TaskError(
            f"task piano: cannot write below {cache_folder()} ({error}); "
            "set SEQBENCH_DATA to a folder with room"
        ) from error
