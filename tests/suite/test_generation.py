"""Generation from cells that were really, if briefly, trained: sound, text, DNA, and what is not."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from seqbench.models.build import build_model
from seqbench.models.pretrained import save_pretrained
from seqbench.suite import checkpoint, cli
from seqbench.suite.configuration import resolve
from seqbench.suite.experiment import Cell, Request, UserError
from seqbench.suite.generation import Sampling, draw, generate, spectrogram, stream
from seqbench.suite.records import write
from seqbench.suite.report import check, write_report
from seqbench.suite.trained import load_trained
from seqbench.suite.training import run_cell
from seqbench.tasks.base import TaskError
from seqbench.tasks.fetch import registry
from seqbench.tasks.piano import RATE, Piano

SMALL = {
    "model.d_model": 16,
    "model.num_layers": 1,
    "train.eval_every": 1000,
    "train.eval_batches": 1,
    "train.test_batches": 1,
    "train.warmup_steps": 1,
}
WHAT: dict[str, tuple[str, dict[str, Any]]] = {
    "piano": (
        "mamba",
        {"task.length": 512, "train.batch_size": 4, "train.steps": 200, "train.lr": 1e-2,
         "model.backbone": "unet", "model.init": "complex", "model.pool": 4},
    ),
    "language": (
        "mamba",
        {"task.length": 64, "train.batch_size": 8, "train.steps": 80, "train.lr": 2e-2},
    ),
    "dna": ("s4", {"task.length": 64, "train.batch_size": 4, "train.steps": 2}),
    "selective-copying": ("s4", {"task.length": 32, "train.batch_size": 2, "train.steps": 1}),
}  # fmt: skip


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Records and weights of a cell for each task."""
    folder = tmp_path_factory.mktemp("results")
    for cell in cells().values():
        record = run_cell(cell, folder, device="cpu")
        assert record is not None and record.status == "done", record
        write(folder, record)
    return folder


def cells() -> dict[str, Cell]:
    return {
        task: resolve(Request(task=task, model=model, settings={**SMALL, **settings}), 0)
        for task, (model, settings) in WHAT.items()
    }


@pytest.fixture(scope="module")
def digest() -> dict[str, str]:
    return {task: cell.digest for task, cell in cells().items()}


def run(*arguments: str, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["seqbench", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def low_share(wave: np.ndarray[Any, Any]) -> float:
    """Of the energy, below 2 kHz: a quarter in white noise, nearly all in a piano's sound."""
    energy = np.abs(np.fft.rfft(wave)) ** 2
    hertz = np.fft.rfftfreq(len(wave), 1 / RATE)
    return float(energy[hertz < 2000].sum() / energy.sum())


def level(wave: np.ndarray[Any, Any]) -> float:
    return float(20 * np.log10(np.sqrt((wave.astype(np.float64) ** 2).mean())))


def test_sound_goes_on_at_the_level_and_spectrum_of_its_prompt(
    results: Path, digest: dict[str, str], tmp_path: Path
) -> None:
    wave, _ = soundfile.read(registry()["piano-rendered"].path / "the-easy-winners.flac")
    given = wave[20 * RATE : 20 * RATE + RATE // 2]
    soundfile.write(tmp_path / "prompt.wav", given, RATE)
    made = generate(
        digest["piano"],
        results,
        length=2400,
        prompt=str(tmp_path / "prompt.wav"),
        out=tmp_path / "on.wav",
    )
    written, rate = soundfile.read(tmp_path / "on.wav")
    assert rate == RATE and len(written) == RATE // 2 + 2400
    assert np.abs(written[: RATE // 2] - given).max() < 0.03  # the prompt, through its codes
    new = written[RATE // 2 :]
    assert abs(level(new) - level(given)) < 12
    assert low_share(new) > 0.6
    assert made.facts["samples"] == len(written) and made.facts["prompt_tokens"] == RATE // 2
    assert made.facts["rms_dbfs"] == pytest.approx(level(written), abs=0.2)

    torch.manual_seed(0)
    untrained = build_model("mamba", vocab_size=256, **cells()["piano"].model_config)
    tokens = stream(untrained, made.codes[: RATE // 2], Sampling())
    noise = Piano.decode(torch.tensor([next(tokens) for _ in range(1000)])).numpy()
    assert low_share(noise) < 0.5  # what the training changed


def test_sound_from_nothing_is_kept_with_its_spectrogram_for_the_report(
    results: Path, digest: dict[str, str], capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    arguments = ["generate", digest["piano"][:8], "--results", str(results), "--length", "1200"]
    assert run(*arguments, "--json", monkeypatch=monkeypatch) == 0
    said = json.loads(capsys.readouterr().out)
    wave, rate = soundfile.read(said["out"])
    assert (len(wave), rate) == (1200, 16_000) and said["new_tokens"] == said["samples"] == 1200
    assert said["digest"] == digest["piano"] and said["task"] == "piano"
    kept = json.loads(Path(said["out"]).with_suffix(".json").read_text())
    assert {len(frame) for frame in kept["mel"]} == {80} and 0 >= max(kept["mel"][0]) >= -80

    drawn = write_report(results)
    name = f"generated-{digest['piano']}-seed0"
    assert {f"{name}.png", f"{name}.svg"} <= {p.name for p in drawn.plots}
    assert f'id="plot-{name}"' in (results / "index.html").read_text()
    assert check(results) == []
    assert run(*arguments, "--temperature", "0.5", monkeypatch=monkeypatch) == 0
    assert f"plots/{name}.png: stale: 1 changed since it was drawn" in check(results)


def test_a_seed_gives_the_same_tokens_again(results: Path, digest: dict[str, str]) -> None:
    one, again, other = (
        generate(digest["language"], results, length=40, sampling=Sampling(seed=s)).text
        for s in (0, 0, 1)
    )
    assert one == again != other and 0 < len(one) <= 40


def test_text_goes_on_from_a_prompt_or_a_file(
    results: Path, digest: dict[str, str], tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    (tmp_path / "a.txt").write_text("The people of ")
    common = ["generate", digest["language"], "--results", str(results), "--length", "30"]
    assert run(*common, "--prompt", "The people of ", monkeypatch=monkeypatch) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("The people of ") and len(printed) > 16
    out = tmp_path / "below" / "b.txt"
    for prompt in (str(tmp_path / "a.txt"), "The people of "):
        assert run(*common, "--prompt", prompt, "--out", str(out), monkeypatch=monkeypatch) == 0
        assert out.read_text() == printed.removesuffix("\n")
    # Few steps teach that a text is letters and spaces; of bytes drawn evenly a fifth is.
    text = generate(digest["language"], results, length=200).text
    assert sum(c.isascii() and (c.isalpha() or c == " ") for c in text) > 0.6 * len(text)


def test_dna_is_fasta(results: Path, digest: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "a.fa").write_text(">one\nacgt\nNRAC\n>two\nTTTT\n")
    for prompt in ("ACGT NNAC", str(tmp_path / "a.fa")):
        made = generate(digest["dna"], results, length=100, prompt=prompt)
        title, *lines = made.text.splitlines()
        assert title.startswith(f">seqbench {digest['dna']} seed=0 prompt=8 bases")
        assert [len(line) for line in lines] == [70, 38]
        assert lines[0].startswith("ACGTNNAC") and set("".join(lines)[8:]) <= set("ACGT")
    assert len(generate(digest["dna"], results).codes) == 1000


def test_a_prompt_of_another_rate_and_two_channels_is_converted(
    results: Path, digest: dict[str, str], tmp_path: Path
) -> None:
    t = np.arange(4410) / 44_100
    both = np.stack([np.sin(2 * np.pi * 440 * t), np.zeros_like(t)], 1) * 0.5
    soundfile.write(tmp_path / "a.wav", both, 44_100)
    made = generate(digest["piano"], results, length=1, prompt=str(tmp_path / "a.wav"))
    assert made.facts["prompt_tokens"] == 1600  # a tenth of a second at 16 kHz


def test_steps_are_what_forward_says(results: Path, digest: dict[str, str]) -> None:
    model = load_trained(digest["piano"], results).model.double()
    prompt = torch.tensor([128, 130, 127])
    greedy = stream(model, prompt, Sampling(temperature=0))
    said = [next(greedy) for _ in range(40)]
    with torch.no_grad():
        logits = model(torch.cat([prompt, torch.tensor(said)])[None])[0]
    assert logits[2:-1].argmax(-1).tolist() == said


def test_temperature_top_k_and_top_p_shape_the_draws() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()

    def drawn(**how: Any) -> list[float]:
        generator = torch.Generator().manual_seed(0)
        counts = np.bincount(
            [draw(logits, Sampling(**how), generator) for _ in range(2000)], minlength=4
        )
        return [float(c) / 2000 for c in counts]

    assert drawn() == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.04)
    assert drawn(top_k=2) == pytest.approx([0.625, 0.375, 0, 0], abs=0.04)
    assert drawn(top_p=0.6) == pytest.approx([0.625, 0.375, 0, 0], abs=0.04)
    assert drawn(top_p=1e-9) == drawn(temperature=0) == [1, 0, 0, 0]
    squares = np.array([0.25, 0.09, 0.0225, 0.0025])
    assert drawn(temperature=0.5) == pytest.approx(list(squares / squares.sum()), abs=0.04)


def test_a_spectrogram_shows_a_tone_where_it_is() -> None:
    t = torch.arange(2 * RATE) / RATE
    frames = spectrogram(0.5 * torch.sin(2 * torch.pi * 1000 * t))
    assert len(frames) <= 400
    band = int(np.argmax(frames[len(frames) // 2]))

    def mel(hertz: float) -> float:
        return float(2595 * np.log10(1 + hertz / 700))

    expected = (mel(1000) - mel(30)) / (mel(8000) - mel(30)) * 81 - 1
    assert band == pytest.approx(expected, abs=1)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"checkpoint": "0123456789abcdef"}, "unknown checkpoint '0123456789abcdef': give a"),
        ({"checkpoint": "nowhere.safetensors"}, "unknown checkpoint 'nowhere.safetensors'"),
        ({"checkpoint": "selective-copying"}, "'selective-copying', which has nothing to read or"),
        ({"prompt": "x" * 5000}, "sound goes on from an audio file"),
        ({"checkpoint": "dna", "prompt": "ACGE"}, "has 'E' at base 4"),
        ({"checkpoint": "language", "prompt": ""}, "--prompt '': is empty"),
        ({"length": 0}, "--length 0: must be at least 1"),
        ({"device": "tpu"}, "--device tpu: valid are cpu, cuda"),
    ],
)
def test_mistakes_are_one_line(
    results: Path, digest: dict[str, str], changes: dict[str, Any], said: str
) -> None:
    given: dict[str, Any] = {"checkpoint": "piano", **changes}
    given["checkpoint"] = digest.get(given["checkpoint"], given["checkpoint"])
    with pytest.raises(UserError, match=re.escape(said)) as raised:
        generate(results=results, **given)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"temperature": -1.0}, "--temperature -1.0: must be 0 or more"),
        ({"temperature": float("nan")}, "--temperature nan"),
        ({"top_k": 0}, "--top-k 0: must be 1 or more"),
        ({"top_p": 0.0}, "--top-p 0.0: must be above 0"),
        ({"seed": -1}, "--seed -1: must be 0 or more"),
    ],
)
def test_wrong_sampling_is_one_line(how: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        Sampling(**how)


def test_wrong_files_are_one_line(
    results: Path, digest: dict[str, str], tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    (tmp_path / "a.wav").write_bytes(b"no sound" * 50)
    with pytest.raises(TaskError, match=r"a\.wav: no readable audio"):
        generate(digest["piano"], results, prompt=str(tmp_path / "a.wav"))
    with pytest.raises(UserError, match="is a folder"):
        generate(digest["piano"], results, out=tmp_path)
    (tmp_path / "b.safetensors").write_bytes(b"no weights")
    with pytest.raises(UserError, match=r"b\.safetensors cannot be read"):
        generate(str(tmp_path / "b.safetensors"), results)
    checkpoint.write(tmp_path / "c.safetensors", {"model/x": torch.zeros(1)}, {"step": 3})
    with pytest.raises(UserError, match="its cell is not finished"):
        generate(str(tmp_path / "c.safetensors"), results)
    (tmp_path / "d").mkdir()
    assert run("generate", str(tmp_path / "d"), monkeypatch=monkeypatch) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_record_without_weights_says_so(
    results: Path, digest: dict[str, str], tmp_path: Path
) -> None:
    from seqbench.suite.records import load_all

    for record in load_all(results):
        write(tmp_path, record)
    with pytest.raises(UserError, match=r"has the record of piano/mamba/seed0 but no weights"):
        generate(digest["piano"], tmp_path)


def test_weights_of_another_model_do_not_fit(
    results: Path, digest: dict[str, str], tmp_path: Path
) -> None:
    tensors, state = checkpoint.read(results / "checkpoints" / f"{digest['dna']}.safetensors")
    state["cell"]["model_config"]["d_model"] = 24
    checkpoint.write(tmp_path / "a.safetensors", tensors, state)
    with pytest.raises(UserError, match="its weights do not fit model 's4'"):
        load_trained(str(tmp_path / "a.safetensors"), results)
    state["cell"]["train"]["colour"] = "red"
    checkpoint.write(tmp_path / "a.safetensors", tensors, state)
    with pytest.raises(UserError, match="of another version of seqbench"):
        load_trained(str(tmp_path / "a.safetensors"), results)


def test_a_model_without_steps_cannot_generate() -> None:
    class Whole(torch.nn.Linear):
        def initial_state(self, *of: Any) -> Any:
            raise NotImplementedError("sees the whole sequence at once")

    with pytest.raises(UserError, match=r"Whole has no recurrent step.*at once\); give"):
        next(stream(Whole(2, 2), torch.tensor([1]), Sampling()))


def test_a_model_that_diverged_says_so() -> None:
    with pytest.raises(UserError, match="it diverged"):
        draw(torch.full((4,), float("nan")), Sampling(), torch.Generator())


def test_a_pretrained_mamba_speaks_through_its_tokenizer(results: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    torch.manual_seed(0)
    save_pretrained(build_model("mamba", vocab_size=16, d_model=16, num_layers=1), tmp_path)
    with pytest.raises(UserError, match=r"has no tokenizer\.json"):
        generate(str(tmp_path), results)
    words = {f"w{i}": i for i in range(12)} | {"<unk>": 12, "<|endoftext|>": 13}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    made = generate(str(tmp_path), results, prompt="w1 w2", length=5)
    assert made.text.startswith("w1 w2 ") and max(made.codes.tolist()) < 14
    big = replace_vocabulary(tmp_path / "tokenizer.json")
    with pytest.raises(UserError, match=r"has the token 99, its model 16"):
        generate(str(tmp_path), results, prompt=big)


def replace_vocabulary(file: Path) -> str:
    """Gives one word of a tokenizer's an id that no model here has; returns the word."""
    content = json.loads(file.read_text())
    content["model"]["vocab"]["w3"] = 99
    file.write_text(json.dumps(content))
    return "w3"


def test_finished_cells_keep_the_weights_of_their_best_validation(
    results: Path, digest: dict[str, str]
) -> None:
    found = load_trained(digest["language"], results)
    assert found.cell is not None and found.cell == replace(cells()["language"])
    by_file = load_trained(found.place, results)
    for a, b in zip(found.model.parameters(), by_file.model.parameters(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(UserError, match="unknown checkpoint ''"):
        load_trained("", results)
