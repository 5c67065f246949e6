"""Text corpora as one array of tokens: documents kept to their split, tokenised once into a file.

A corpus is a file, a folder of text files, a JSONL file, or a data set of the Hugging Face hub that
is streamed. Tokens are bytes, GPT-2's byte pairs, or those of a tokenizer.json.
"""

from __future__ import annotations

import gzip
import json
import logging
import mmap
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from seqbench.tasks.base import SPLITS, Split, TaskError
from seqbench.tasks.fetch import cache_folder, fetch, new_folder
from seqbench.tasks.streams import digest

READER = "language, reader 1"  # raised when the same files give other tokens or splits
SHARE = 10  # one document in so many is for validation, one for test
PACKED = {b"\x1f\x8b": "gzip", b"PK\x03\x04": "zip", b"\xfd7zXZ": "xz", b"BZh": "bzip2"}
PIECE = 2**20  # bytes of text tokenised at once
LOUD = 2**24  # bytes of text from which the reading is announced

# The tokens that end a document in tokenizers of others, the likeliest first.
ENDS = ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>")


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """How text becomes tokens."""

    name: str  # with the hash of its file, if it is one
    size: int
    dtype: Any
    end: int  # ends a document
    encode: Callable[[bytes, str], NDArray[Any]]  # (text, where it is from) -> tokens
    decode: Callable[[list[int]], bytes]  # tokens -> text, as far as they stand for any


@dataclass(frozen=True, eq=False)
class Corpus:
    """The tokens of all splits one after another, memory-mapped where they are many."""

    tokens: NDArray[Any]
    region: dict[Split, tuple[int, int]]
    text_bytes: dict[Split, int]  # that a split's tokens stand for, document ends counted as one
    fingerprint: str
    ends: bool  # whether documents are marked by the vocabulary's end

    def release(self) -> None:
        """Hands pages that were read back to the system's cache: memory stays flat at any size."""
        _release(self.tokens)


@lru_cache(maxsize=4)
def vocabulary(name: str) -> Vocabulary:
    """The bytes themselves (a document ends in 0), "gpt2", or a tokenizer.json by its path.

    Raises TaskError for anything else, and for a file that is no tokenizer.
    """
    if name == "bytes":
        return Vocabulary(
            name="bytes",
            size=256,
            dtype=np.uint8,
            end=0,
            encode=lambda text, where: np.frombuffer(text, dtype=np.uint8),
            decode=bytes,
        )
    if name == "gpt2":
        from tokenizers import ByteLevelBPETokenizer

        folder = Path(__file__).resolve().parent / "data" / "gpt2"
        vocab = json.loads(gzip.decompress((folder / "encoder.json.gz").read_bytes()))
        lines = gzip.decompress((folder / "vocab.bpe.gz").read_bytes()).decode().splitlines()
        merges = [tuple(line.split()) for line in lines if line and not line.startswith("#version")]
        bpe = ByteLevelBPETokenizer(vocab, merges, add_prefix_space=False)
        return _vocabulary(name, name, bpe, len(vocab), vocab["<|endoftext|>"])
    if not name.endswith(".json"):
        raise TaskError(
            f"task.tokenizer={name!r}: no such tokenizer; give bytes, gpt2, or the path of a "
            "tokenizer.json of the library tokenizers"
        )
    return _from_file(name)


def _from_file(name: str) -> Vocabulary:
    from tokenizers import Tokenizer

    try:
        data = Path(name).expanduser().read_bytes()
    except OSError as error:
        raise TaskError(
            f"tokenizer {name}: {error.strerror}; give the path of a tokenizer.json"
        ) from None
    try:
        found = Tokenizer.from_str(data.decode())
    except Exception as error:  # the library has no class of its own
        said = " ".join(str(error).split())[:120]
        raise TaskError(
            f"tokenizer {name}: cannot be read ({said}); give a tokenizer.json of the library "
            "tokenizers"
        ) from None
    found.no_padding()
    found.no_truncation()
    ids = found.get_vocab(with_added_tokens=True)
    ends = [ids[end] for end in ENDS if end in ids]
    if not ends:
        raise TaskError(
            f"tokenizer {name}: none of its {len(ids)} tokens ends a document; add one of "
            f"{', '.join(ENDS)}"
        )
    size = max(ids.values()) + 1
    if size > 2 * len(ids):
        raise TaskError(
            f"tokenizer {name}: {len(ids)} tokens with numbers up to {size - 1}: its vocabulary "
            "has another size than it says; take one whose numbers run from 0 on"
        )
    return _vocabulary(f"{name} {digest(data.decode())[:32]}", name, found, size, ends[0])


def _vocabulary(name: str, where: str, tokenizer: Any, size: int, end: int) -> Vocabulary:
    dtype: Any = np.uint16 if size <= 2**16 else np.uint32

    def encode(text: bytes, place: str) -> NDArray[Any]:
        pieces = []
        for piece in _pieces(text):
            try:
                words = piece.decode()
            except UnicodeDecodeError as error:
                raise TaskError(
                    f"{place}: byte {error.object[error.start]:#04x} is not UTF-8, which "
                    f"task.tokenizer={where!r} reads; convert the text or take tokenizer='bytes'"
                ) from None
            ids = tokenizer.encode(words, add_special_tokens=False).ids
            pieces.append(np.array(ids, dtype=dtype))
        return np.concatenate([np.zeros(0, dtype=dtype), *pieces])

    return Vocabulary(
        name=name,
        size=size,
        dtype=dtype,
        end=end,
        encode=encode,
        decode=lambda tokens: tokenizer.decode(tokens, skip_special_tokens=False).encode(),
    )


def open_corpus(
    dataset: str, path: str | None, hub: str | None, tokenizer: str, field: str
) -> Corpus:
    """The corpus of a data set's name, of a path, or of `hub`'s NAME or NAME:CONFIG; TaskError."""
    if hub is not None:
        return _of_documents(_Hub(hub, field), tokenizer)
    if path == "":
        raise TaskError(
            "task.path is not set, and this scale has no text of its own: give a text file or a "
            "folder of .txt files with --set task.path=PATH"
        )
    where = f"task.dataset={dataset!r}" if path is None else f"task.path={path!r}"
    place = fetch(dataset) if path is None else Path(path).expanduser()
    if place.is_dir():
        return _of_documents(_Folder(place, where, by_year=dataset == "sotu"), tokenizer)
    if not place.is_file():
        raise TaskError(
            f"{where}: no such file or folder; give a text file or a folder of .txt files"
        )
    if place.suffix == ".jsonl":
        return _of_documents(_Jsonl(place, where, field), tokenizer)
    return _of_file(place, where, place.stat().st_mtime_ns, tokenizer)


Text = bytes | NDArray[Any]  # or the bytes of a file, mapped
Document = tuple[Text, str]  # a text, and where it is from


@dataclass(frozen=True)
class _Folder:
    """The text files of a folder; messages of one year stay together.

    Files named after splits, as WikiText's are, keep them.
    """

    place: Path
    where: str
    by_year: bool

    @property
    def identity(self) -> tuple[object, ...]:
        return (
            self.by_year,
            *((str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in self._files()),
        )

    def documents(self) -> Iterator[tuple[Split, Document]]:
        files = self._files()
        own = [_split_named(file) for file in files]
        if all(own) and set(own) == set(SPLITS):
            yield from (
                (split, self._read(f)) for f, split in zip(files, own, strict=True) if split
            )
            return
        groups = [
            list(group)
            for _, group in groupby(files, lambda f: f.name[:4] if self.by_year else str(f))
        ]
        if len(groups) < 3:
            raise TaskError(
                f"{self.where}: {len(groups)} .txt files in that folder, and the three splits need "
                "at least one each; give 3 or more files, or the path of a single file"
            )
        for split, group in zip(split_of(len(groups)), groups, strict=True):
            yield from ((split, self._read(file)) for file in group)

    def _files(self) -> list[Path]:
        files = [f for kind in ("*.txt", "*.raw", "*.tokens") for f in self.place.rglob(kind)]
        return sorted(files, key=lambda file: file.relative_to(self.place).as_posix())

    def _read(self, file: Path) -> Document:
        where = f"{self.where}: {file.name}"
        text = _mapped(file, where) if file.stat().st_size > PIECE else _bytes_of(file, where)
        _check_text(bytes(text[:8]), where)
        return text, where


@dataclass(frozen=True)
class _Jsonl:
    """One document a line, the text of a JSON object's field."""

    place: Path
    where: str
    field: str

    @property
    def identity(self) -> tuple[object, ...]:
        facts = self.place.stat()
        return "jsonl", str(self.place.resolve()), facts.st_size, facts.st_mtime_ns, self.field

    def documents(self) -> Iterator[tuple[Split, Document]]:
        with self.place.open("rb") as file:
            _check_text(file.read(8), self.where)
            file.seek(0)
            count = sum(1 for line in file if line.strip())
        if count < 3:
            raise TaskError(
                f"{self.where}: {count} documents, and the three splits need at least one each; "
                "give a file with 3 or more lines of JSON"
            )
        with self.place.open("rb") as file:
            lines = ((n, line) for n, line in enumerate(file, 1) if line.strip())
            for split, (number, line) in zip(split_of(count), lines, strict=True):
                where = f"{self.where}, line {number}"
                try:
                    text = json.loads(line)[self.field]
                except (ValueError, KeyError, TypeError, RecursionError):
                    text = None
                if not isinstance(text, str):
                    raise TaskError(
                        f"{where}: no JSON object with a text in its field {self.field!r}; name "
                        "the field with --set task.field=NAME"
                    )
                yield split, (text.encode(errors="replace"), where)


@dataclass(frozen=True)
class _Hub:
    """A data set of the Hugging Face hub, streamed once: NAME, NAME:CONFIG, NAME:CONFIG:DOCUMENTS.

    It keeps its own splits; of the train documents (DOCUMENTS of them at most) every tenth is for
    validation, and another for test, where there is no such split.
    """

    name: str
    field: str

    @property
    def identity(self) -> tuple[object, ...]:
        return "hub", self.name, self.field

    def documents(self) -> Iterator[tuple[Split, Document]]:
        try:
            from datasets import load_dataset
        except ImportError:
            raise TaskError(
                f"task.hub={self.name!r} needs the extra hub: pip install 'seqbench[hub]'"
            ) from None
        name, _, rest = self.name.partition(":")
        config, _, limit = rest.partition(":")
        if limit and not limit.isdigit():
            raise TaskError(
                f"task.hub={self.name!r}: {limit!r} is no number of documents; write "
                "NAME:CONFIG:DOCUMENTS"
            )
        try:
            splits = load_dataset(name, config or None, streaming=True)
        except Exception as error:  # the library raises whatever its backends do
            said = " ".join(str(error).split())[:200]
            raise TaskError(
                f"task.hub={self.name!r}: cannot be opened ({said}); give NAME, NAME:CONFIG or "
                "NAME:CONFIG:DOCUMENTS of a data set with text"
            ) from error
        named: dict[str, Split] = {"train": "train", "validation": "validation", "test": "test"}
        own = [split for split in named if split in splits]
        for split in own:
            rows = islice(splits[split], int(limit)) if limit else splits[split]
            for number, row in enumerate(rows):
                where = f"task.hub={self.name!r}, {split} document {number}"
                if not isinstance(row.get(self.field), str):
                    raise TaskError(
                        f"{where}: no text in its field {self.field!r}, it has "
                        f"{', '.join(row)}; name the field with --set task.field=NAME"
                    )
                place = {SHARE // 2 - 1: "validation", SHARE - 1: "test"}.get(number % SHARE, split)
                if split != "train" or place in own:
                    place = split
                yield named[place], (row[self.field].encode(errors="replace"), where)


def split_of(count: int) -> list[Split]:
    """The split of each of `count` documents: held-out ones evenly spread, in turn for each use."""
    held_out = 2 * max(1, round(count / SHARE))
    splits: list[Split] = ["train"] * count
    for i in range(held_out):
        splits[int((i + 0.5) * count / held_out)] = "test" if i % 2 else "validation"
    return splits


@lru_cache(maxsize=4)
def _of_documents(source: _Folder | _Jsonl | _Hub, tokenizer: str) -> Corpus:
    """Documents one after another, each with its end, from a file in the cache."""
    folder = (
        cache_folder() / "tokens" / digest(READER, vocabulary(tokenizer).name, source.identity)[:32]
    )
    if not (folder / "facts.json").is_file():
        try:
            with new_folder(folder) as made:
                _write(source.documents(), vocabulary(tokenizer), made)
        except OSError as error:
            raise TaskError(
                f"tokens cannot be written below {cache_folder()} ({error.strerror or error}); set "
                "SEQBENCH_DATA to a folder with room"
            ) from None
    return _read(folder, vocabulary(tokenizer), ends=True)


@lru_cache(maxsize=4)
def _of_file(file: Path, where: str, changed: int, tokenizer: str) -> Corpus:
    """A single file, cut by position; bytes are read where they lie, through a memory map."""
    text = _mapped(file, where)
    _check_text(bytes(text[:8]), where)
    first, second = len(text) * 9 // 10, len(text) * 19 // 20
    if tokenizer == "bytes":
        return _corpus(text, (first, second), text, {}, ends=False)
    cuts = [0, *(_character_start(text, cut) for cut in (first, second)), len(text)]
    folder = (
        cache_folder()
        / "tokens"
        / digest(READER, vocabulary(tokenizer).name, str(file.resolve()), len(text), changed)[:32]
    )
    if not (folder / "facts.json").is_file():
        parts = (
            (split, (text[low:high], where))
            for split, low, high in zip(SPLITS, cuts, cuts[1:], strict=False)
        )
        with new_folder(folder) as made:
            _write(parts, vocabulary(tokenizer), made, ends=False)
    return _read(folder, vocabulary(tokenizer), ends=False)


def _write(
    documents: Iterable[tuple[Split, Document]],
    words: Vocabulary,
    folder: Path,
    ends: bool = True,
) -> None:
    """Fills a folder: tokens.bin, split by split, and facts.json; a piece of text in memory."""
    counts = dict.fromkeys(SPLITS, 0)
    text_bytes = dict.fromkeys(SPLITS, 0)
    files = {split: (folder / split).open("wb") for split in SPLITS}
    try:
        for split, (text, where) in documents:
            if sum(text_bytes.values()) < LOUD <= sum(text_bytes.values()) + len(text):
                logging.getLogger("seqbench").info(
                    "language: tokenising once, into %s", folder.parent
                )
            for piece in _pieces(text):
                tokens = words.encode(piece, where).astype(words.dtype, copy=False)
                files[split].write(tokens.tobytes())
                counts[split] += len(tokens)
            _release(text)
            if ends:
                files[split].write(np.array([words.end], dtype=words.dtype).tobytes())
            counts[split] += ends
            text_bytes[split] += len(text) + ends
    finally:
        for file in files.values():
            file.close()
    with (folder / "tokens.bin").open("wb") as out:
        for split in SPLITS:
            part = folder / split
            with part.open("rb") as written:
                shutil.copyfileobj(written, out, PIECE)
            part.unlink()
    facts = {"counts": counts, "text_bytes": text_bytes}
    (folder / "facts.json").write_text(json.dumps(facts), encoding="utf-8")


def _read(folder: Path, words: Vocabulary, *, ends: bool) -> Corpus:
    facts = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
    counts = facts["counts"]
    file = folder / "tokens.bin"
    tokens = (
        np.memmap(file, dtype=words.dtype, mode="r")
        if file.stat().st_size
        else np.zeros(0, words.dtype)
    )
    cuts = (counts["train"], counts["train"] + counts["validation"])
    return _corpus(tokens, cuts, tokens.view(np.uint8), facts["text_bytes"], ends=ends)


def _corpus(
    tokens: NDArray[Any],
    cuts: tuple[int, int],
    data: NDArray[Any],
    text_bytes: dict[Split, int],
    *,
    ends: bool,
) -> Corpus:
    edges = [0, *cuts, len(tokens)]
    region = {split: (edges[i], edges[i + 1]) for i, split in enumerate(SPLITS)}
    fingerprint = digest(READER, *cuts, data, release=lambda: _release(tokens))
    return Corpus(
        tokens=tokens,
        region=region,
        text_bytes=text_bytes or {split: end - start for split, (start, end) in region.items()},
        fingerprint=fingerprint,
        ends=ends,
    )


def _pieces(text: Text) -> Iterator[bytes]:
    """The text in pieces that end with a line, or with a character."""
    start = 0
    while start < len(text):
        end = start + PIECE
        piece = bytes(text[start:end])
        if end < len(text):
            line = piece.rfind(b"\n")
            end = start + line if line > 0 else _character_start(text, end)
            piece = bytes(text[start:end])
            _release(text)
        yield piece
        start = end


def _mapped(file: Path, where: str) -> NDArray[Any]:
    """The bytes of a file, through a memory map."""
    try:
        if not file.stat().st_size:
            return np.zeros(0, dtype=np.uint8)
        return np.memmap(file, dtype=np.uint8, mode="r")
    except OSError as error:
        raise TaskError(f"{where}: {error.strerror}; give a readable file") from None


def _bytes_of(file: Path, where: str) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise TaskError(f"{where}: {error.strerror}; give a readable file") from None


def _release(text: Text) -> None:
    """Unmaps the pages of a memory map that were read; they come back when they are read again."""
    while isinstance(text, np.ndarray) and not isinstance(text, np.memmap):
        text = text.base  # type: ignore[assignment]
    if isinstance(text, np.memmap) and hasattr(mmap, "MADV_DONTNEED"):
        text._mmap.madvise(mmap.MADV_DONTNEED)  # type: ignore[attr-defined]


def _character_start(text: Any, place: int) -> int:
    """The first place from there on where a UTF-8 character begins."""
    while place < len(text) and text[place] & 0xC0 == 0x80:
        place += 1
    return place


def _split_named(file: Path) -> Split | None:
    """The split that a file's name tells, as in wiki.valid.raw."""
    words = file.name.lower().replace("_", ".").replace("-", ".").split(".")
    named: dict[str, Split] = {
        "train": "train",
        "valid": "validation",
        "validation": "validation",
        "test": "test",
    }
    found = {named[word] for word in words if word in named}
    return found.pop() if len(found) == 1 else None


def _check_text(start: bytes, where: str) -> None:
    if not start:
        raise TaskError(f"{where}: the file is empty; give a file with text in it")
    for magic, kind in PACKED.items():
        if start.startswith(magic):
            raise TaskError(f"{where}: this is a {kind} file, not text; unpack it first")
