"""Piano: predict the next sample of a piano recording, 16 kHz, 8-bit mu-law (Gu & Dao 2023, 4.4.1).

The paper's data is YouTubeMix, cut and encoded as in SaShiMi (Goel et al. 2022). The default here
is a small embedded set, rendered from notes and never recorded: tasks/data/piano/README.md.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pooch
import soundfile
import torch
from numpy.typing import NDArray
from torch import Tensor

from seqbench.tasks.base import SPLITS, Batch, Scale, Split, Task, TaskError
from seqbench.tasks.fetch import cache_folder, fetch, new_folder

RATE = 16_000  # samples a second
LEVELS = 256  # of the mu-law code
SILENCE = 128  # the code of 0.0
VERSION = 1  # raised when decoding, splitting or encoding changes
AUDIO = (".wav", ".flac", ".ogg", ".opus", ".mp3", ".aif", ".aiff", ".au")
TAPS = 32  # of the linear prediction
PRIOR = 16.0  # weight in samples of the zero-order frequencies in a row of a frequency table
FIT_SAMPLES = 2**21  # of train, at most, that the baselines are fitted on
SCORE_SAMPLES = 2**20  # of test, at most, that they are scored on
TAP_SAMPLES = 2**18  # of train that the weights of the linear prediction are fitted on

Codes = NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class PianoConfig:
    """Which audio, and how much of it a model sees at once."""

    window: int = 1024  # samples in a sequence; the paper's lengths are 8192 to 958464
    dataset: Literal["piano-rendered", "youtubemix", "maestro-v3"] = "piano-rendered"
    path: str | None = None  # a folder of audio files, or one file, in place of the data set
    normalization: Literal["none", "min-max"] = "none"  # of every file; S4's loader: min-max to ±1


class Piano(Task):
    """Next-sample prediction of 16 kHz mono piano in 256 mu-law levels.

    A sequence is a window of one recording. The inputs are the targets one sample later: the first
    input is silence (128), so nothing from before the window is known.

        Inputs   128 131 140 152 149 ...
        Targets  131 140 152 149 138 ...

    Train windows start anywhere; validation and test windows do not overlap and come in a fixed
    shuffled order. A folder that says its own split (the embedded set by piece, MAESTRO by its
    table) keeps it; any other is split 88 / 6 / 6 % by sorted file, as S4 splits YouTubeMix, or by
    position if it has one or two files. Files shorter than a window are left out.
    """

    Config = PianoConfig
    config: PianoConfig
    headline = "bits_per_sample"
    difficulty = ("window",)
    scales: ClassVar[Mapping[str, Scale]] = {
        "cpu": Scale(
            note="ten minutes of rendered piano in windows of 1024 samples, not the "
            "paper's four recorded hours in windows of 8192 to 958464.",
            task={"window": 1024},
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
            note="YouTubeMix, 2^20 samples a step in windows of 8192, 200K steps; the "
            "model is a plain stack of 15 blocks where the paper's is a U-Net.",
            task={"dataset": "youtubemix", "window": 8192, "normalization": "min-max"},
            model={"d_model": 64, "num_layers": 15},
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
    _train_clips: NDArray[np.int64]  # (clips, 2): first sample, number of starts before it
    _train_starts: int
    _windows: dict[Split, NDArray[np.int64]]  # first samples of the windows to evaluate

    @property
    def vocab_size(self) -> int:
        return LEVELS

    def prepare(self) -> None:
        if hasattr(self, "_codes"):
            return
        c = self.config
        if c.window < 2:
            raise TaskError(f"task.window={c.window}: a window has at least 2 samples")
        folder = fetch(c.dataset) if c.path is None else Path(c.path).expanduser()
        files = _audio_files(folder)
        splits = _splits(folder, files)
        self._fingerprint = _digest(
            VERSION, c.normalization, [(name, splits[name]) for name in files], _content(files)
        )
        self._codes, clips = _encoded(self._fingerprint, files, splits, c.normalization)
        self._lay_out(clips, folder)

    def _lay_out(self, clips: Sequence[_Clip], folder: Path) -> None:
        """Where the windows of every split start."""
        window = self.config.window
        whole: dict[Split, list[_Clip]] = {"train": [], "validation": [], "test": []}
        for clip in clips:
            if clip.length >= window:
                whole[clip.split].append(clip)
        for split, found in whole.items():
            if not found:
                lengths = Counter[str]()
                for clip in clips:
                    lengths[clip.name] += clip.length
                longest = max(lengths.values())
                raise TaskError(
                    f"task.window={window}: nothing of {folder} in split {split} is that "
                    f"long; the longest recording has {longest} samples ({longest / RATE:.1f} s): "
                    "give longer or more recordings, or a smaller window"
                )
        starts = [clip.length - window + 1 for clip in whole["train"]]
        before = np.concatenate([[0], np.cumsum(starts)])
        first = np.array([clip.start for clip in whole["train"]])
        self._train_clips = np.stack([first, before[:-1]], axis=1)
        self._train_starts = int(before[-1])
        self._windows = {}
        for split, found in whole.items():
            cut = [np.arange(c.start, c.start + c.length - window + 1, window) for c in found]
            # Shuffled, so that the first batches are a fair sample of the whole split.
            self._windows[split] = _generator("piano", "order", split).permutation(
                np.concatenate(cut)
            )

    def fingerprint(self) -> str:
        return self._fingerprint

    def batch(
        self, split: Split, index: int, batch_size: int, *, seed: int = 0, stage: int | None = None
    ) -> Batch:
        if split == "train":
            drawn = _generator(seed, "piano", "train", index).integers(
                self._train_starts, size=batch_size
            )
            first, before = self._train_clips.T
            clip = np.searchsorted(before, drawn, side="right") - 1
            starts = first[clip] + drawn - before[clip]
        else:
            starts = self._windows[split][index * batch_size : (index + 1) * batch_size]
            if not len(starts):
                raise IndexError(f"piano: split {split} has no batch {index} of {batch_size}")
        inputs, targets = self._cut(starts)
        return Batch(torch.from_numpy(inputs).long(), torch.from_numpy(targets).long())

    def _cut(self, starts: NDArray[np.int64]) -> tuple[Codes, Codes]:
        """Inputs and targets (B, L) of the windows at those first samples."""
        window = self.config.window
        targets = np.empty((len(starts), window), np.uint8)
        for row, start in zip(targets, starts, strict=True):
            row[:] = self._codes[start : start + window]
        inputs = np.full_like(targets, SILENCE)
        inputs[:, 1:] = targets[:, :-1]
        return inputs, targets

    def num_batches(self, split: Split, batch_size: int) -> int | None:
        return None if split == "train" else -(-len(self._windows[split]) // batch_size)

    def chance(self) -> float:
        return float(np.log2(LEVELS))

    def baselines(self) -> dict[str, float]:
        """Bits per sample of frequency tables fitted on train, given less and more of the past."""
        window = self.config.window
        train, test = self._windows["train"], self._windows["test"]
        fit = self._cut(train[: -(-FIT_SAMPLES // window)])
        score = self._cut(test[: -(-SCORE_SAMPLES // window)])
        taps = _linear_taps(fit[1][: -(-TAP_SAMPLES // window)])
        contexts: dict[str, Callable[[Codes], Codes]] = {
            "order-0": np.zeros_like,  # nothing
            "order-1": lambda inputs: inputs,  # the sample before
            f"linear-{TAPS}": lambda inputs: _predicted(inputs, taps),  # a linear prediction's code
        }
        return {
            name: _table_bits((context(fit[0]), fit[1]), (context(score[0]), score[1]))
            for name, context in contexts.items()
        }

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


def _audio_files(folder: Path) -> dict[str, Path]:
    """Name -> audio file, in natural order, of a folder and those in it, or of the one file."""
    if folder.is_file():
        return {folder.name: folder}
    if not folder.is_dir():
        raise TaskError(f"task.path={folder}: no such folder; give a folder of audio files")
    found = {
        file.relative_to(folder).as_posix(): file
        for file in folder.rglob("*")
        if file.suffix.lower() in AUDIO and not file.name.startswith(".") and file.is_file()
    }
    if not found:
        raise TaskError(
            f"task.path={folder}: no audio file in it; give a folder with any of {' '.join(AUDIO)}"
        )
    return {name: found[name] for name in sorted(found, key=_natural)}


def _natural(name: str) -> list[tuple[int, str]]:
    parts = re.split(r"(\d+)", name.lower())
    return [(int(part), "") if part.isdigit() else (-1, part) for part in parts] + [(-2, name)]


def _splits(folder: Path, files: Mapping[str, Path]) -> dict[str, Split | None]:
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
            raise TaskError(f"task.path={folder}: its split does not name {missing[0]}")
        return {name: given[name] for name in files}
    if len(files) < len(SPLITS):
        return dict.fromkeys(files)
    validation, test = _split_points(len(files))
    return {
        name: "train" if i < validation else "validation" if i < test else "test"
        for i, name in enumerate(files)
    }


def _split_points(count: int) -> tuple[int, int]:
    """The first of `count` that is validation, and the first that is test; each split gets one."""
    validation, test = int(0.88 * count), int(0.94 * count)
    test = min(test, count - 1)
    return min(validation, test - 1), test


def _content(files: Mapping[str, Path]) -> list[str]:
    """The files' SHA-256, remembered by size and time: hashing hours of audio takes minutes."""
    stats = [(file, file.stat()) for file in (path.resolve() for path in files.values())]
    key = _digest([(str(file), stat.st_size, stat.st_mtime_ns) for file, stat in stats])
    remembered = cache_folder() / "piano" / f"content-{key}.json"
    if not remembered.exists():
        hashes = [pooch.file_hash(str(file)) for file, _ in stats]
        with _caching():
            remembered.parent.mkdir(parents=True, exist_ok=True)
            temporary = remembered.with_name(f".{remembered.name}.{os.getpid()}")
            temporary.write_text(json.dumps(hashes), encoding="utf-8")
            temporary.replace(remembered)
    return list(json.loads(remembered.read_text(encoding="utf-8")))


def _encoded(
    fingerprint: str,
    files: Mapping[str, Path],
    splits: Mapping[str, Split | None],
    normalization: str,
) -> tuple[Codes, list[_Clip]]:
    """The codes of all files, one after the other in a memory-mapped file, and where each lies.

    Made at the first call for this content, then opened.
    """
    place = cache_folder() / "piano" / fingerprint
    if not place.exists():
        with _caching(), new_folder(place) as folder:
            clips: list[_Clip] = []
            with (folder / "codes.u8").open("wb") as out:
                for name, file in files.items():
                    codes = _encode(_read(file), normalization)
                    clips += _clips(name, splits[name], out.tell(), len(codes))
                    out.write(codes.tobytes())
            text = json.dumps([asdict(clip) for clip in clips], indent=1)
            (folder / "clips.json").write_text(text, encoding="utf-8")
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


def _linear_taps(windows_BL: Codes) -> Tensor:
    """Weights of the samples before, earliest first, with the least squared error."""
    wave_BL = Piano.decode(torch.from_numpy(windows_BL)).double()
    taps = min(TAPS, wave_BL.shape[1] - 1)
    frames = wave_BL.unfold(1, taps + 1, 1).flatten(0, 1)
    gram = frames.T @ frames
    gram += 1e-9 * gram.trace() * torch.eye(taps + 1)  # digital silence has no solution of its own
    return torch.linalg.solve(gram[:-1, :-1], gram[:-1, -1]).float()


def _predicted(inputs_BL: Codes, taps: Tensor) -> Codes:
    """The code of the linear prediction of every target, from the inputs up to it."""
    wave_BL = Piano.decode(torch.from_numpy(inputs_BL))
    padded = torch.nn.functional.pad(wave_BL, (len(taps) - 1, 0))
    predicted_BL = torch.zeros_like(wave_BL)
    for k, weight in enumerate(taps):
        predicted_BL += weight * padded[:, k : k + wave_BL.shape[1]]
    return _encode(predicted_BL, "none")


def _table_bits(fit: tuple[Codes, Codes], score: tuple[Codes, Codes]) -> float:
    """Bits per sample of p(target | context) by frequencies in `fit`, smoothed, on `score`."""
    pairs = np.bincount(_joined(*fit), minlength=LEVELS**2).reshape(LEVELS, LEVELS)
    zero_order = (pairs.sum(0) + 1) / (pairs.sum() + LEVELS)
    table = (pairs + PRIOR * zero_order) / (pairs.sum(1, keepdims=True) + PRIOR)
    return float(-np.log2(table).ravel()[_joined(*score)].mean())


def _joined(contexts: Codes, targets: Codes) -> NDArray[np.int32]:
    return (contexts.astype(np.int32) * LEVELS + targets).ravel()


def _digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _generator(*purpose: object) -> np.random.Generator:
    """A stream of random numbers of its own for every purpose."""
    key = hashlib.sha256("/".join(map(str, purpose)).encode()).digest()[:16]
    return np.random.Generator(np.random.Philox(key=np.frombuffer(key, dtype="<u8")))


@contextmanager
def _caching() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise TaskError(
            f"task piano: cannot write below {cache_folder()} ({error}); "
            "set SEQBENCH_DATA to a folder with room"
        ) from error
