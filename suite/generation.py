"""Generation by recurrent steps: text, DNA or sound from a trained model, from nothing or a prompt.

What a cell of the task piano says is kept in <results>/generated/ with its mel spectrogram, which
the report draws: reports never run a model.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from torch import Tensor

from seqbench.suite.experiment import UserError
from seqbench.suite.records import write_file
from seqbench.suite.trained import Trained, load_trained
from seqbench.tasks.corpora import vocabulary
from seqbench.tasks.dna import AMBIGUOUS, LETTERS
from seqbench.tasks.piano import RATE, Piano

PROMPT_PIECE = 2**14  # tokens of a prompt that go through the model at once
LINE = 70  # bases on a line of FASTA
DEFAULT_LENGTHS = {"text": 500, "dna": 1000, "sound": 4 * RATE}
MELS = 80  # bands of a spectrogram
FRAMES = 400  # of a spectrogram, at most
FLOOR = -80.0  # decibels below the loudest that a spectrogram still tells apart


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a token is drawn from the model's distribution."""

    temperature: float = 1.0  # 0: always the likeliest
    top_k: int | None = None  # of the k likeliest alone
    top_p: float = 1.0  # of the likeliest that together have this probability
    seed: int = 0

    def __post_init__(self) -> None:
        for option, value, valid, given in (
            ("temperature", self.temperature >= 0, "0 or more", self.temperature),
            ("top-k", self.top_k is None or self.top_k >= 1, "1 or more", self.top_k),
            ("top-p", 0 < self.top_p <= 1, "above 0 and at most 1", self.top_p),
            ("seed", 0 <= self.seed < 2**63, "0 or more", self.seed),
        ):
            if not value or (isinstance(given, float) and not math.isfinite(given)):
                raise UserError(f"--{option} {given}: must be {valid}")


@dataclass(frozen=True, kw_only=True)
class Generation:
    """What was generated, and what `--json` says of it."""

    facts: dict[str, Any]
    text: str  # what is printed or written; "": sound
    codes: Tensor  # the prompt's tokens and the new ones, (L,)


@dataclass(frozen=True, kw_only=True)
class _Medium:
    """How the tokens of a task are read and written."""

    kind: str  # text, dna or sound
    start: int | None  # the token before the first; None: any letter, drawn
    end: int | None  # a token that ends the generation
    encode: Callable[[str], Tensor]  # a prompt, or the file of one -> tokens (L,)
    decode: Callable[[list[int]], str]
    letters: int  # tokens from here on stand for nothing that can be written


def generate(
    checkpoint: str,
    results: Path,
    *,
    length: int | None = None,
    prompt: str | None = None,
    sampling: Sampling | None = None,
    out: Path | None = None,
    device: str = "cpu",
    on_step: Callable[[int, int], None] = lambda done, of: None,
) -> Generation:
    """Draws `length` tokens after the prompt, and writes them to `out` if it is given.

    Text and DNA need no file; sound goes to <results>/generated/ by default. UserError, TaskError
    or ModelError, one line, for what cannot be generated.
    """
    sampling = sampling or Sampling()
    place = _device(device)
    trained = load_trained(checkpoint, results)
    medium = _medium(trained)
    length = DEFAULT_LENGTHS[medium.kind] if length is None else length
    if length < 1:
        raise UserError(f"--length {length}: must be at least 1")
    known = torch.zeros(0, dtype=torch.long) if prompt is None else medium.encode(prompt)
    if prompt is not None and not len(known):
        raise UserError(f"--prompt {prompt!r}: is empty; leave it out to begin from nothing")
    if out is not None:
        _check_out(out)
    began = time.perf_counter()
    new: list[int] = []
    model = trained.model.to(place)
    for token in stream(model, _begun(known, medium, sampling), sampling, allowed=medium.letters):
        if token == medium.end:
            break
        new.append(token)
        on_step(len(new), length)
        if len(new) == length:
            break
    seconds = time.perf_counter() - began
    codes = torch.cat([known, torch.tensor(new, dtype=torch.long)])
    cell = trained.cell
    facts: dict[str, Any] = {
        "checkpoint": trained.place,
        "digest": None if cell is None else cell.digest,
        "task": None if cell is None else cell.task,
        "model": "mamba" if cell is None else cell.model,
        "kind": medium.kind,
        "prompt_tokens": len(known),
        "new_tokens": len(new),
        "tokens_per_second": round(len(new) / seconds, 1),
        "sampling": asdict(sampling),
    }
    if medium.kind == "sound":
        return _sound(trained, facts, codes, results, out)
    text = medium.decode(codes.tolist())
    if medium.kind == "dna":
        title = f">seqbench {facts['digest']} seed={sampling.seed} prompt={len(known)} bases"
        text = "\n".join([title, *(text[i : i + LINE] for i in range(0, len(text), LINE))]) + "\n"
    if out is not None:
        write_file(out, text.encode())
        facts["out"] = str(out)
    else:
        facts["text"] = text
    return Generation(facts=facts, text=text, codes=codes)


@torch.inference_mode()
def stream(
    model: Any, prompt_L: Tensor, sampling: Sampling, *, allowed: int | None = None
) -> Iterator[int]:
    """Tokens after the prompt (L,), without end, by the model's own recurrent steps.

    Of tokens from `allowed` on none is drawn.
    """
    generator = torch.Generator().manual_seed(sampling.seed)
    device = next(model.parameters()).device
    try:
        state = model.initial_state(1, device)
        logits_V = None
        for piece in prompt_L.to(device)[None].split(PROMPT_PIECE, 1):
            logits_BLV, state = model(piece, state)
            logits_V = logits_BLV[0, -1]
        assert logits_V is not None, "a prompt of one token at least"
        while True:
            token = draw(logits_V[:allowed].float().cpu(), sampling, generator)
            yield token
            logits_BV, state = model.step(torch.tensor([token], device=device), state)
            logits_V = logits_BV[0]
    except NotImplementedError as error:
        raise UserError(
            f"model {type(model).__name__} has no recurrent step, so it cannot generate"
            f"{f' ({error})' if str(error) else ''}; give the checkpoint of another model"
        ) from error


def draw(logits_V: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """A token of the distribution that the logits (V,) and the sampling make."""
    if not torch.isfinite(logits_V).any():
        raise UserError("the model's distribution is not finite: it diverged in training")
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    logits, order = (logits_V / sampling.temperature).sort(descending=True)
    if sampling.top_k is not None:
        logits = logits[: sampling.top_k]
    shares = logits.softmax(-1)
    # The ones before which less than top_p is gathered: the likeliest is always among them.
    shares = shares[shares.cumsum(-1) - shares < sampling.top_p]
    return int(order[torch.multinomial(shares, 1, generator=generator)])


def spectrogram(wave_L: Tensor) -> list[list[int]]:
    """Decibels below the loudest, a list of MELS bands for each of at most FRAMES frames."""
    from torchaudio.transforms import MelSpectrogram

    hop = max(256, -(-len(wave_L) // FRAMES))
    mel = MelSpectrogram(
        sample_rate=RATE, n_fft=2048, hop_length=hop, n_mels=MELS, f_min=30.0, f_max=RATE / 2
    )
    power_MT = mel(torch.nn.functional.pad(wave_L, (0, max(0, 2048 - len(wave_L)))))
    level_MT = 10 * torch.log10(power_MT.clamp(min=1e-10))
    level_MT = (level_MT - level_MT.max()).clamp(min=FLOOR).round().int()
    found: list[list[int]] = level_MT.T.tolist()
    return found[:FRAMES]


def _sound(
    trained: Trained, facts: dict[str, Any], codes: Tensor, results: Path, out: Path | None
) -> Generation:
    wave = Piano.decode(codes)
    level = float(wave.square().mean().sqrt())
    facts |= {
        "rate": RATE,
        "samples": len(wave),
        "seconds": round(len(wave) / RATE, 3),
        "rms_dbfs": round(20 * math.log10(max(level, 1e-6)), 1),
        "peak": round(float(wave.abs().max()), 3),
    }
    cell = trained.cell
    assert cell is not None
    name = f"{cell.digest}-seed{facts['sampling']['seed']}"
    name += "-continued" if facts["prompt_tokens"] else ""
    folder = results / "generated"
    file = folder / f"{name}.wav" if out is None else out
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(file, wave.numpy(), RATE, subtype="PCM_16", format=_format(file))
    except (OSError, soundfile.SoundFileError) as error:
        raise UserError(f"--out {file}: cannot be written ({error}); give another place") from error
    facts["out"] = str(file)
    kept = {k: v for k, v in facts.items() if k not in ("checkpoint", "out", "tokens_per_second")}
    kept |= {"length_trained_at": cell.task_config["length"], "mel": spectrogram(wave)}
    write_file(folder / f"{name}.json", f"{json.dumps(kept, separators=(',', ':'))}\n".encode())
    return Generation(facts=facts, text="", codes=codes)


def _format(file: Path) -> str:
    return {".flac": "FLAC"}.get(file.suffix.lower(), "WAV")


def _check_out(out: Path) -> None:
    """That a file can be written there, before minutes go into what it is to hold."""
    if out.is_dir():
        raise UserError(f"--out {out}: is a folder; give a file")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror}; give a file in another folder") from error


def _device(name: str) -> torch.device:
    if name not in ("cpu", "cuda"):
        raise UserError(f"--device {name}: valid are cpu, cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA device here; valid here: cpu")
    return torch.device(name)


def _begun(known: Tensor, medium: _Medium, sampling: Sampling) -> Tensor:
    """The prompt; without one the token that everything of this kind begins after."""
    if len(known):
        return known
    if medium.start is not None:
        return torch.tensor([medium.start])
    chosen = np.random.default_rng(sampling.seed).integers(medium.letters)
    return torch.tensor([int(chosen)])


def _medium(trained: Trained) -> _Medium:
    if trained.cell is None:
        return _pretrained_text(trained)
    cell = trained.cell
    if cell.task == "language":
        words = vocabulary(cell.task_config["tokenizer"])
        return _Medium(
            kind="text",
            start=words.end,
            end=words.end,
            encode=lambda prompt: torch.from_numpy(
                np.array(words.encode(_text(prompt), "--prompt"), dtype=np.int64)
            ),
            decode=lambda tokens: words.decode(tokens).decode("utf-8", "replace"),
            letters=words.size,
        )
    if cell.task == "dna":
        bases = LETTERS.index("N")
        return _Medium(
            kind="dna",
            start=None,
            end=None,
            encode=_bases,
            decode=lambda tokens: "".join(LETTERS[t] for t in tokens),
            letters=bases,  # none is scored at N, so a model knows nothing of it
        )
    if cell.task == "piano":
        return _Medium(
            kind="sound",
            start=128,  # silence
            end=None,
            encode=lambda prompt: _recording(prompt, cell.task_config["normalization"]),
            decode=lambda tokens: "",
            letters=256,
        )
    raise UserError(
        f"checkpoint {trained.place}: is of task {cell.task!r}, which has nothing to read or hear; "
        "give one of language, dna or piano"
    )


def _text(prompt: str) -> bytes:
    """The content of a file of that name, else the text itself."""
    if _is_file(prompt):
        return Path(prompt).read_bytes()
    return prompt.encode()


def _bases(prompt: str) -> Tensor:
    """Letters, or the first record of a FASTA file."""
    text, where = prompt, "--prompt"
    if _is_file(prompt):
        text, where = Path(prompt).read_text(encoding="ascii", errors="replace"), prompt
        lines = text.splitlines()
        if lines and lines[0].startswith(">"):
            ends = [i for i, line in enumerate(lines) if i and line.startswith(">")]
            lines = lines[1 : ends[0] if ends else None]
        text = "".join(lines)
    letters = "".join(text.split()).upper()
    for at, letter in enumerate(letters):
        if letter not in LETTERS + AMBIGUOUS:
            raise UserError(
                f"{where}: has {letter!r} at base {at + 1}; DNA has A C G T, N and the ambiguity "
                f"codes {AMBIGUOUS}; give letters, or a FASTA file that exists"
            )
    n = LETTERS.index("N")
    return torch.tensor([n if x in AMBIGUOUS else LETTERS.index(x) for x in letters]).long()


def _recording(prompt: str, normalization: str) -> Tensor:
    if not _is_file(prompt):
        raise UserError(f"--prompt {prompt!r}: no such file; sound goes on from an audio file")
    return Piano.encode(Path(prompt), normalization)


def _is_file(prompt: str) -> bool:
    try:
        return Path(prompt).is_file()
    except (OSError, ValueError):  # too long or with a zero byte: text, then
        return False


def _pretrained_text(trained: Trained) -> _Medium:
    """By the tokenizer.json beside a pretrained model's weights."""
    from tokenizers import Tokenizer

    try:
        file = Path(trained.place).expanduser() / "tokenizer.json"
        if file.parent.is_dir():
            words = Tokenizer.from_file(str(file))
        else:
            words = Tokenizer.from_pretrained(trained.place)
    except Exception as error:  # the library raises bare Exceptions
        raise UserError(
            f"checkpoint {trained.place}: has no tokenizer.json that can be read ({error}); put "
            "the model's own beside its weights"
        ) from error
    size = trained.model.embedding.num_embeddings
    ends = [words.token_to_id(t) for t in ("<|endoftext|>", "</s>", "<eos>")]
    end = next((e for e in ends if e is not None), None)

    def encode(prompt: str) -> Tensor:
        ids = words.encode(_text(prompt).decode("utf-8", "replace")).ids
        if ids and max(ids) >= size:
            raise UserError(
                f"checkpoint {trained.place}: its tokenizer.json has the token {max(ids)}, its "
                f"model {size}; put the model's own tokenizer there"
            )
        return torch.tensor(ids, dtype=torch.long)

    return _Medium(
        kind="text",
        start=0 if end is None else end,
        end=end,
        encode=encode,
        decode=lambda tokens: words.decode(tokens),
        letters=min(size, words.get_vocab_size()),
    )
