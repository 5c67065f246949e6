"""The piano task: encoding, splits, windows, the cache, baselines, and files that are wrong."""

import importlib.util
import json
import sys
import zipfile
from pathlib import Path
from types import ModuleType
from typing import get_args

import mido
import numpy as np
import pytest
import soundfile
import torch
from numpy.typing import NDArray

from seqbench.tasks import piano
from seqbench.tasks.base import SPLITS, TaskError
from seqbench.tasks.fetch import fetch, registry
from seqbench.tasks.piano import RATE, Piano, PianoConfig

ROOT = Path(__file__).resolve().parents[2]
Wave = NDArray[np.float32]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Piano:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SEQBENCH_DATA", str(tmp_path_factory.mktemp("cache")))
        task = Piano()
        task.prepare()
    return task


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder for audio, with a cache of its own elsewhere."""
    monkeypatch.setenv("SEQBENCH_DATA", str(tmp_path / "cache"))
    (tmp_path / "audio").mkdir()
    return tmp_path / "audio"


def tone(hertz: float, seconds: float = 1.0, rate: int = RATE, gain: float = 0.5) -> Wave:
    t = np.arange(round(seconds * rate)) / rate
    return (gain * np.sin(2 * np.pi * hertz * t)).astype(np.float32)


def noise(count: int, seed: int = 0) -> Wave:
    return (np.random.default_rng(seed).uniform(-0.9, 0.9, count)).astype(np.float32)


def prepared(path: Path, length: int = 256, **changes: str) -> Piano:
    task = Piano(PianoConfig(path=str(path), length=length, **changes))  # type: ignore[arg-type]
    task.prepare()
    return task


def test_targets_are_the_inputs_one_sample_later(embedded: Piano) -> None:
    for split in SPLITS:
        inputs, targets = embedded.batch(split, 0, 4)
        assert inputs.shape == targets.shape == (4, 1024)
        assert inputs.dtype == targets.dtype == torch.int64
        assert torch.equal(inputs[:, 1:], targets[:, :-1])
        assert targets.min() >= 0 and targets.max() < embedded.vocab_size
        assert targets.unique().numel() > 100  # sound, not silence


def test_the_seed_moves_the_train_stream_alone(embedded: Piano) -> None:
    def targets(split: str, seed: int, index: int = 0) -> torch.Tensor:
        return embedded.batch(split, index, 4, seed=seed).targets  # type: ignore[arg-type]

    assert torch.equal(targets("train", 0), targets("train", 0))
    assert not torch.equal(targets("train", 0), targets("train", 1))
    assert not torch.equal(targets("train", 0, 0), targets("train", 0, 1))
    for split in ("validation", "test"):
        assert torch.equal(targets(split, 0), targets(split, 1))
        assert not torch.equal(targets(split, 0, 0), targets(split, 0, 1))


def test_the_embedded_set_is_split_by_piece(embedded: Piano) -> None:
    pieces = {split: [c.name for c in embedded._clips if c.split == split] for split in SPLITS}
    assert pieces["validation"] == ["peacherine-rag.flac"]
    assert pieces["test"] == ["the-easy-winners.flac"]
    assert len(pieces["train"]) == 8
    end = 0
    for clip in embedded._clips:  # end to end, none inside another
        assert clip.start == end and clip.length == 60 * RATE
        end += clip.length
    assert len(embedded._codes) == end


def test_evaluation_visits_every_window_once(folder: Path) -> None:
    soundfile.write(folder / "one.wav", noise(40_000), RATE)
    task = prepared(folder, length=100)
    for split in ("validation", "test"):  # 2400 samples each; the first is no target
        count = task.num_batches(split, 7)  # type: ignore[arg-type]
        rows = [task.batch(split, i, 7).targets for i in range(count or 0)]  # type: ignore[arg-type]
        found = torch.cat(rows)
        assert found.shape == (23, 100)
        assert found.unique(dim=0).shape == found.shape
        with pytest.raises(IndexError):
            task.batch(split, len(rows), 7)  # type: ignore[arg-type]
    assert task.num_batches("train", 7) is None


def test_train_windows_start_anywhere_and_reach_both_ends(folder: Path) -> None:
    soundfile.write(folder / "one.wav", noise(400), RATE)
    task = prepared(folder, length=20)
    windows = torch.from_numpy(np.array(task._codes[:352])).long().unfold(0, 20, 1)
    drawn = torch.cat([task.batch("train", index, 32).inputs for index in range(100)])
    windows = windows[:-1]  # the last has no sample after it
    same = (drawn[:, None] == windows[None]).all(dim=2)
    assert same.any(dim=1).all()
    assert same.any(dim=0).all()


def test_windows_reach_the_papers_longest(embedded: Piano) -> None:
    task = embedded.with_config(length=958_464)  # of a minute's 960,000 samples
    task.prepare()
    for split in SPLITS:
        inputs, targets = task.batch(split, 0, 1)
        assert inputs.shape == targets.shape == (1, 958_464)
        assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert task.num_batches("test", 1) == 1


def test_test_lengths_give_variants_of_the_same_recordings(folder: Path) -> None:
    soundfile.write(folder / "one.wav", noise(100_000), RATE)
    task = Piano(PianoConfig(path=str(folder), length=1000, test_lengths=(500, 5000)))
    task.prepare()
    found = task.test_variants()
    assert list(found) == ["length=500", "length=5000"]
    assert found["length=5000"].batch("test", 0, 9).inputs.shape == (1, 5000)
    assert found["length=500"].fingerprint() == task.fingerprint()
    assert all(variant.test_variants() == {} for variant in found.values())
    task = Piano(PianoConfig(path=str(folder), length=1000, test_lengths=(50_000,)))
    with pytest.raises(TaskError, match=r"split test has 6000 .* of task\.test_lengths=50000"):
        task.prepare()
    with pytest.raises(TaskError, match=r"task\.test_lengths=0"):
        Piano(PianoConfig(path=str(folder), test_lengths=(0,))).prepare()


def test_mu_law_agrees_with_its_formula() -> None:
    wave = np.linspace(-1, 1, 2001)
    companded = np.sign(wave) * np.log1p(255 * np.abs(wave)) / np.log(256)
    expected = np.floor((companded + 1) / 2 * 255 + 0.5)
    codes = piano._encode(torch.from_numpy(wave), "none")
    assert codes.tolist() == expected.astype(int).tolist()
    assert piano._encode(torch.zeros(1), "none")[0] == 128
    decoded = Piano.decode(torch.from_numpy(codes)).numpy()
    assert np.abs(decoded - wave).max() < 0.025  # half the step at full scale
    quiet = np.abs(wave) < 0.01
    assert np.abs(decoded - wave)[quiet].max() < 0.0005
    assert Piano.decode(torch.zeros(2, 3, dtype=torch.long)).dtype == torch.float32


def test_stereo_at_44100_becomes_mono_at_16000(folder: Path) -> None:
    left, right = tone(440, 3, 44_100, 0.6), tone(440, 3, 44_100, 0.2)
    soundfile.write(folder / "stereo.wav", np.stack([left, right], axis=1), 44_100)
    wave = piano._read(folder / "stereo.wav").numpy()
    assert len(wave) == 3 * RATE
    spectrum = np.abs(np.fft.rfft(wave))
    assert np.fft.rfftfreq(len(wave), 1 / RATE)[spectrum.argmax()] == pytest.approx(440, abs=0.5)
    assert np.abs(wave[1000:-1000]).max() == pytest.approx(0.4, abs=0.01)


def test_min_max_stretches_every_file_to_the_full_range(folder: Path) -> None:
    for i, gain in enumerate((0.05, 0.2, 0.6)):
        soundfile.write(folder / f"{i}.wav", tone(440, gain=gain), RATE)
    plain, stretched = prepared(folder), prepared(folder, normalization="min-max")
    assert plain.fingerprint() != stretched.fingerprint()
    for start in (0, RATE, 2 * RATE):
        levels = Piano.decode(torch.from_numpy(np.array(stretched._codes[start : start + RATE])))
        assert levels.min() == pytest.approx(-1, abs=0.03)
        assert levels.max() == pytest.approx(1, abs=0.03)
    quiet = Piano.decode(torch.from_numpy(np.array(plain._codes[:RATE])))
    assert quiet.max() == pytest.approx(0.05, abs=0.003)


def test_youtubemix_splits_as_in_s4() -> None:
    assert piano._split_points(241) == (212, 226)


@pytest.mark.parametrize("count", [3, 4, 10, 17, 100])
def test_every_split_has_a_file(count: int) -> None:
    validation, test = piano._split_points(count)
    assert 0 < validation < test < count


def test_youtubemix_is_read_from_its_archive(folder: Path) -> None:
    for i in range(17):
        soundfile.write(folder / f"out{i}.wav", noise(600, i), RATE)
    archive = folder.parent / "youtube_mix.zip"
    with zipfile.ZipFile(archive, "w") as made:
        for file in folder.iterdir():
            made.write(file, f"youtube_mix/{file.name}")
    fetch("youtubemix", path=archive)  # as downloaded: seqbench data fetch youtubemix --path FILE
    task = Piano(PianoConfig(dataset="youtubemix", length=256, normalization="min-max"))
    task.prepare()
    names = {split: [c.name for c in task._clips if c.split == split] for split in SPLITS}
    assert [len(names[split]) for split in SPLITS] == [14, 1, 2]
    assert names["validation"] == ["youtube_mix/out14.wav"]


def test_maestro_is_read_from_its_folder(folder: Path) -> None:
    whole = folder / "maestro-v3.0.0"
    (whole / "2018").mkdir(parents=True)
    lines = [f"{split},2018/{split}.wav" for split in SPLITS]
    (whole / "maestro-v3.0.0.csv").write_text("\n".join(["split,audio_filename", *lines]))
    for i, split in enumerate(SPLITS):
        soundfile.write(whole / "2018" / f"{split}.wav", noise(44_100, i), 44_100)
    fetch("maestro-v3", path=folder)
    task = Piano(PianoConfig(dataset="maestro-v3", length=1000))
    task.prepare()
    assert {c.name: (c.split, c.length) for c in task._clips} == {
        f"2018/{split}.wav": (split, RATE) for split in SPLITS
    }


def test_files_sort_by_their_numbers(folder: Path) -> None:
    for name in ("out10.wav", "out2.wav", "b/out1.wav", "out1.wav", "notes.txt", "._out3.wav"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    assert list(piano._audio_files(folder, "here")) == [
        "b/out1.wav",
        "out1.wav",
        "out2.wav",
        "out10.wav",
    ]


def test_a_single_file_is_split_by_position(folder: Path) -> None:
    soundfile.write(folder / "one.flac", noise(100_000), RATE)
    for path in (folder, folder / "one.flac"):
        task = prepared(path, length=1000)
        assert {split: len(task._windows[split]) for split in SPLITS} == {
            "train": 87,  # 88,000 samples, the first of which is no target
            "validation": 5,
            "test": 5,
        }


def test_maestro_keeps_its_own_split(folder: Path) -> None:
    rows = [("2018/b.wav", "test"), ("2018/a.wav", "train"), ("2017/c.wav", "validation")]
    lines = [f'"A, B",{split},2018,x.midi,{name},1.0' for name, split in rows]
    header = "canonical_title,split,year,midi_filename,audio_filename,duration"
    (folder / "maestro-v3.0.0.csv").write_text("\n".join([header, *lines]))
    for i, (name, _) in enumerate(rows):
        (folder / name).parent.mkdir(exist_ok=True)
        soundfile.write(folder / name, noise(1000, i), RATE)
    splits = piano._splits(folder, piano._audio_files(folder, "here"), "here")
    assert splits == dict(rows)
    soundfile.write(folder / "other.wav", noise(1000), RATE)
    with pytest.raises(TaskError, match=r"does not name other\.wav"):
        prepared(folder)


def test_files_shorter_than_a_window_are_left_out(folder: Path) -> None:
    for i, count in enumerate((5000, 10, 5000, 5000)):
        soundfile.write(folder / f"{i}.wav", noise(count, i), RATE)
    task = prepared(folder, length=1000)
    assert len(task._windows["train"]) == 4
    train = torch.from_numpy(np.array(task._codes[:5000])).long().unfold(0, 1000, 1)
    for row in task.batch("train", 0, 16).targets:
        assert (train == row).all(dim=1).any()


@pytest.mark.parametrize(
    ("case", "match"),
    [
        ("missing", "no such file or folder"),
        ("empty", "no audio file in that folder"),
        ("text", "no audio file in that folder"),
        ("garbage", r"a\.flac: no readable audio"),
        ("truncated", r"a\.flac: no readable audio"),
        ("mp3 cut short", r"a\.mp3: ends after"),
        ("nan", "no finite numbers"),
        ("tenth of a second", r"split train has 1408 samples \(0\.1 s\)"),
        ("no sample", "split train has 0 samples"),
        ("test too short", "in split test has 100 samples"),
        ("length", "task.length=0"),
    ],
)
def test_wrong_audio_is_one_line(folder: Path, case: str, match: str) -> None:
    path, length = folder, 2048
    if case == "missing":
        path = folder / "nowhere"
    elif case == "text":
        (folder / "a.txt").write_text("no audio")
    elif case == "garbage":
        (folder / "a.flac").write_bytes(b"no audio" * 100)
    elif case in ("truncated", "mp3 cut short"):
        file = folder / ("a.flac" if case == "truncated" else "a.mp3")
        soundfile.write(file, noise(50_000), RATE)
        content = file.read_bytes()
        file.write_bytes(content[: len(content) // 2])
    elif case == "nan":
        soundfile.write(folder / "a.wav", noise(5000) * np.float32("nan"), RATE, subtype="FLOAT")
    elif case in ("tenth of a second", "no sample"):
        soundfile.write(folder / "a.wav", noise(1600 if "tenth" in case else 0), RATE)
    elif case == "test too short":
        for i, count in enumerate((5000, 5000, 100)):
            soundfile.write(folder / f"{i}.wav", noise(count), RATE)
    elif case == "length":
        length = 0
    with pytest.raises(TaskError, match=match) as raised:
        prepared(path, length=length)
    assert "\n" not in str(raised.value)
    if case not in ("tenth of a second", "no sample", "test too short"):
        assert not list((folder.parent / "cache").glob("piano/*/"))  # nothing half-made stays


def test_a_failing_torchaudio_is_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    soundfile.write(folder / "a.wav", noise(5000), RATE)
    monkeypatch.setitem(sys.modules, "torchaudio.functional", None)
    monkeypatch.setitem(sys.modules, "torchaudio", None)
    with pytest.raises(TaskError, match=r"needs torchaudio.*torch 2\.11 to 2\.14") as raised:
        prepared(folder)
    assert "\n" not in str(raised.value)


def test_audio_is_decoded_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(3):
        soundfile.write(folder / f"{i}.wav", noise(2000, i), RATE)
    first = prepared(folder)
    monkeypatch.setattr(piano, "_read", lambda file: pytest.fail(f"decoded {file} again"))
    again = prepared(folder, length=300)
    assert again.fingerprint() == first.fingerprint()
    moved = folder.rename(folder.with_name("moved"))
    assert prepared(moved).fingerprint() == first.fingerprint()


def test_a_damaged_cache_is_made_again(folder: Path) -> None:
    soundfile.write(folder / "a.wav", noise(50_000), RATE)
    task = prepared(folder)
    whole = np.array(task._codes)
    for name in ("codes.u8", "clips.json"):
        (file,) = (folder.parent / "cache").glob(f"piano/*/{name}")
        file.write_bytes(file.read_bytes()[:100])
        assert np.array_equal(prepared(folder)._codes, whole)


def test_changed_audio_changes_the_fingerprint(folder: Path) -> None:
    for i in range(3):
        soundfile.write(folder / f"{i}.wav", noise(2000, i), RATE)
    first = prepared(folder)
    soundfile.write(folder / "1.wav", noise(2000, 7), RATE)
    changed = prepared(folder)
    assert changed.fingerprint() != first.fingerprint()
    assert not np.array_equal(changed._codes, first._codes)


def test_a_cache_that_cannot_be_written_names_the_remedy(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    soundfile.write(folder / "a.wav", noise(5000), RATE)
    (folder / "file").write_text("no folder")
    monkeypatch.setenv("SEQBENCH_DATA", str(folder / "file"))
    with pytest.raises(TaskError, match="SEQBENCH_DATA"):
        prepared(folder)


def test_baselines_see_what_they_should(embedded: Piano) -> None:
    found = embedded.baselines()
    assert list(found) == ["order-0", "order-1", "order-2", "linear-32"]
    assert 0 < found["linear-32"] < found["order-2"] < found["order-1"] - 1 < found["order-0"] - 2
    assert found["order-0"] < embedded.chance() == 8


def test_baselines_of_noise_know_nothing(folder: Path) -> None:
    for i in range(3):  # uniform codes: nothing to learn
        codes = np.random.default_rng(i).integers(0, 256, 300_000)
        soundfile.write(
            folder / f"{i}.wav", Piano.decode(torch.from_numpy(codes)).numpy(), RATE, "FLOAT"
        )
    task = prepared(folder)
    assert np.bincount(task._codes, minlength=256).min() > 0
    assert task.baselines()["order-0"] == pytest.approx(8, abs=0.01)
    assert all(7.9 < value < 8.5 for value in task.baselines().values())


def test_the_linear_prediction_finds_a_recurrence(folder: Path) -> None:
    # A sum of two sines obeys a linear recurrence: what is left is the rounding of the codes.
    soundfile.write(folder / "a.wav", tone(440.7, 8) + tone(1003.3, 8, gain=0.3), RATE)
    found = prepared(folder, length=1000).baselines()
    assert found["linear-32"] < 2 < found["order-1"] < found["order-0"]


def test_the_table_charges_what_its_frequencies_say() -> None:
    contexts = np.zeros(1_000_000, np.uint8)
    targets = np.repeat(np.array([3, 5], np.uint8), 500_000)
    assert piano._table_bits((contexts, targets), (contexts, targets)) == pytest.approx(1, abs=1e-3)


def test_the_embedded_set_is_ten_minutes_at_a_sane_level() -> None:
    folder = registry()["piano-rendered"].path
    files = sorted(folder.glob("*.flac"))
    assert sum(file.stat().st_size for file in files) < 15e6
    seconds = 0.0
    for file in files:
        wave, rate = soundfile.read(file)
        seconds += len(wave) / rate
        level = 20 * np.log10(np.sqrt((wave**2).mean()))
        assert rate == RATE and wave.ndim == 1
        assert 0.85 < np.abs(wave).max() < 0.95 and abs(wave.mean()) < 1e-4
        assert -25 < level < -12
        energy = np.abs(np.fft.rfft(wave)) ** 2
        hertz = np.fft.rfftfreq(len(wave), 1 / rate)
        assert energy[(hertz > 27) & (hertz < 4200)].sum() > 0.99 * energy.sum()
    assert 550 < seconds < 650
    assert "rendered, never recorded" in (folder / "README.md").read_text(encoding="utf-8")


def test_the_data_sets_of_the_config_are_in_the_registry() -> None:
    names = get_args(PianoConfig.__dataclass_fields__["dataset"].type) or (
        "piano-rendered",
        "youtubemix",
        "maestro-v3",
    )
    assert all(registry()[name].task == "piano" for name in names)


@pytest.fixture
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "render_piano", ROOT / "scripts" / "render_piano.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["render_piano"] = module
    spec.loader.exec_module(module)
    return module


def test_the_rendering_script_plays_notes_where_they_stand(
    script: ModuleType, tmp_path: Path
) -> None:
    file = mido.MidiFile(ticks_per_beat=480)
    track = mido.MidiTrack()
    file.tracks.append(track)
    track.append(mido.MetaMessage("set_tempo", tempo=500_000, time=0))  # 960 ticks a second
    for kind, note, velocity, ticks in (
        ("note_on", 60, 127, 480),  # half a second of silence, which is cut
        ("note_off", 60, 0, 960),
        ("note_on", 64, 64, 0),
        ("note_on", 64, 127, 480),  # struck again
        ("note_on", 64, 0, 480),  # a note_off by another name
    ):
        track.append(mido.Message(kind, note=note, velocity=velocity, time=ticks))
    track.append(mido.Message("control_change", control=64, value=127, time=0))
    track.append(mido.Message("note_on", note=67, velocity=100, time=0))
    track.append(mido.Message("note_off", note=67, velocity=0, time=96))
    track.append(mido.Message("control_change", control=64, value=0, time=864))
    file.save(tmp_path / "a.mid")
    notes = script.read_notes(tmp_path / "a.mid")
    assert [(n.key, n.velocity, round(n.start, 6), round(n.end, 6)) for n in notes] == [
        (60, 127, 0.5, 1.5),
        (64, 64, 1.5, 2.0),
        (64, 127, 2.0, 2.5),
        (67, 100, 2.5, 3.5),  # the pedal holds it
    ]
    strings = {key: tone(440, 4, gain=0.1) for key in (60, 64, 67)}
    wave = script.render(notes, strings)
    assert len(wave) == script.SECONDS * RATE
    assert np.abs(wave).max() == pytest.approx(script.PEAK)
    level = [np.abs(wave[round(t * RATE) : round((t + 0.1) * RATE)]).max() for t in (0, 1.35)]
    assert level[1] / level[0] == pytest.approx((64 / 127) ** 2, rel=0.1)
    assert np.abs(wave[4 * RATE :]).max() < 1e-3  # every string is damped


def test_the_embedded_files_are_those_that_the_script_listed() -> None:
    folder = registry()["piano-rendered"].path
    listed = json.loads((folder / "pieces.json").read_text(encoding="utf-8"))
    assert {piece["file"] for piece in listed["pieces"]} == {p.name for p in folder.glob("*.flac")}
    assert {piece["licence"] for piece in listed["pieces"]} == {"public domain"}
    for piece in listed["pieces"]:
        assert soundfile.info(folder / piece["file"]).frames == piece["samples"]
