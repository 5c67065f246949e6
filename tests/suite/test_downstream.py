"""Downstream evaluation: the harness's answers are the model's, offline, for ours and Hugging Face's."""

from __future__ import annotations

import json
import multiprocessing
import shutil
import sys
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from seqbench.models.base import ModelError
from seqbench.models.build import build_model
from seqbench.models.pretrained import save_pretrained
from seqbench.suite.configuration import resolve
from seqbench.suite.experiment import Request, UserError
from seqbench.suite.trained import load_trained
from seqbench.suite.training import run_cell
from seqbench.tasks.base import TaskError

with warnings.catch_warnings():  # of the harness's own imports
    warnings.simplefilter("ignore")
    from seqbench.suite import downstream
    from seqbench.suite.downstream import Adapter, Words, evaluate_checkpoint

BYTES = Words(
    encode=lambda text: list(text.encode()),
    decode=lambda tokens: bytes(tokens).decode(errors="replace"),
    end=0,
    size=256,
    name="bytes",
)
DOCUMENTS = [
    {"question": "Two and two is", "choices": ["four", "a boat", "green"], "answer": 0},
    {"question": "The sky is", "choices": ["seven", "blue"], "answer": 1},
    {"question": "A cat says", "choices": ["miaow", "quack", "moo"], "answer": 0},
]
TASK_FOLDERS = ("lambada", "hellaswag", "piqa", "arc", "winogrande")
pytestmark = pytest.mark.filterwarnings("ignore")  # the harness's and its data sets' own


def model(vocab_size: int = 256) -> Any:
    torch.manual_seed(0)
    made = build_model("mamba", vocab_size=vocab_size, d_model=16, num_layers=1)
    for parameter in made.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return made.eval()


def asked(*arguments: Any) -> Any:
    return SimpleNamespace(args=arguments)


@torch.no_grad()
def by_hand(of: Any, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    chances = of(torch.tensor([context + continuation]))[0].log_softmax(-1)
    rows = chances[len(context) - 1 : -1]
    wanted = torch.tensor(continuation)
    return float(rows.gather(1, wanted[:, None]).sum()), bool((rows.argmax(-1) == wanted).all())


def test_likelihoods_in_batches_are_the_models_own() -> None:
    of = model()
    adapter = Adapter(of, BYTES, batch_size=3)
    likely = BYTES.encode("the")
    with torch.no_grad():
        for _ in range(4):
            likely.append(int(of(torch.tensor([likely]))[0, -1].argmax()))
    greedy = bytes(likely[3:]).decode("latin-1")
    pairs = [("Once upon", " a time"), ("x", "y"), ("", "no context"), ("trailing ", "space")]
    answers = adapter.loglikelihood([asked(*p) for p in pairs], disable_tqdm=True)
    tokens = [
        (list(b"Once upon"), list(b" a time")),
        (list(b"x"), list(b"y")),
        ([0], list(b"no context")),
        (list(b"trailing"), list(b" space")),
    ]
    for (value, is_greedy), (context, continuation) in zip(answers, tokens, strict=True):
        wanted = by_hand(of, context, continuation)
        assert value == pytest.approx(wanted[0], rel=1e-4) and is_greedy == wanted[1]
    ((_, is_greedy),) = adapter._loglikelihood_tokens(
        [(None, list(b"the"), list(map(ord, greedy)))]
    )
    assert is_greedy


def test_requests_beyond_the_longest_lose_their_start() -> None:
    of = model()
    adapter = Adapter(of, BYTES, max_length=10)
    ((value, _),) = adapter.loglikelihood(
        [asked("a long context before", " end")], disable_tqdm=True
    )
    assert value == pytest.approx(by_hand(of, list(b" before"), list(b" end"))[0], rel=1e-4)


def test_whole_texts_are_scored_in_windows_each_token_once() -> None:
    of = model()
    text = "a text of some thirty characters"
    whole = Adapter(of, BYTES).loglikelihood_rolling([asked(text)])
    assert whole == [pytest.approx(by_hand(of, [0], list(text.encode()))[0], rel=1e-4)]
    parts = Adapter(of, BYTES, max_length=16).loglikelihood_rolling([asked(text)])
    first, second = list(text.encode())[:16], list(text.encode())[16:]
    wanted = by_hand(of, [0], first)[0] + by_hand(of, first[-1:], second)[0]
    assert parts == [pytest.approx(wanted, rel=1e-4)]


def test_generation_takes_the_likeliest_token_up_to_an_ending() -> None:
    of = model()
    tokens = list(b"Say: ")
    with torch.no_grad():
        for _ in range(12):
            tokens.append(int(of(torch.tensor([tokens]))[0, -1].argmax()))
    said = BYTES.decode(tokens[5:])
    adapter = Adapter(of, BYTES)
    (text,) = adapter.generate_until([asked("Say: ", {"max_gen_toks": 12, "until": ["\0never"]})])
    assert text == said.split("\0")[0]
    (cut,) = adapter.generate_until([asked("Say: ", {"max_gen_toks": 12, "until": [said[4]]})])
    assert cut == said[: said.index(said[4])]


@pytest.fixture()
def include(tmp_path: Path) -> Path:
    """Local tasks of every kind of question that the harness has."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "q.jsonl").write_text("".join(json.dumps(d) + "\n" for d in DOCUMENTS))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(folder / "q.jsonl")},
            "cache_dir": str(tmp_path / "cache"),
        },
        "test_split": "test",
        "doc_to_text": "{{question}}",
    }
    kinds: dict[str, dict[str, Any]] = {
        "local_choice": {
            "output_type": "multiple_choice",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "{{answer}}",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        },
        "local_last_word": {
            "output_type": "loglikelihood",
            "doc_to_target": "{{' ' + choices[answer]}}",
            "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
        },
    }
    for name, kind in kinds.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **common, **kind}))
    return folder


@pytest.fixture()
def finished(tmp_path: Path) -> tuple[Path, str]:
    """The results folder and digest of a finished language cell."""
    (tmp_path / "a.txt").write_text("Two and two is four. The sky is blue. " * 200)
    settings = {
        "task.path": str(tmp_path / "a.txt"),
        "task.length": 16,
        "model.d_model": 16,
        "model.num_layers": 1,
        "train.steps": 5,
        "train.eval_every": 5,
        "train.batch_size": 4,
        "train.eval_batches": 1,
        "train.test_batches": 1,
    }
    cell = resolve(Request(task="language", model="mamba", settings=settings), 0)
    record = run_cell(cell, tmp_path / "results", device="cpu")
    assert record is not None and record.status == "done", record
    return tmp_path / "results", cell.digest


def test_a_checkpoint_of_ours_is_scored_on_local_tasks(
    include: Path,
    finished: tuple[Path, str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from seqbench.suite.cli import app

    results, digest = finished
    monkeypatch.setattr(multiprocessing, "Pool", None)  # a fork of this process, which could hang
    asked_for = ["eval", digest[:8], "--tasks", "local_choice,local_last_word"]
    app(
        [*asked_for, "--include", str(include), "--results", str(results), "--json"],
        standalone_mode=False,
    )
    found = json.loads(capsys.readouterr().out)
    (written,) = (results / "eval").iterdir()
    assert json.loads(written.read_text())["scores"] == found["scores"]
    values = {(s["task"], s["metric"]): s["value"] for s in found["scores"]}
    of = load_trained(digest, results).model
    right, nats = 0, 0.0
    for document in DOCUMENTS:
        context = list(document["question"].encode())  # type: ignore[attr-defined]
        chances = [by_hand(of, context, list(f" {c}".encode()))[0] for c in document["choices"]]  # type: ignore[attr-defined]
        right += chances.index(max(chances)) == document["answer"]
        nats -= chances[document["answer"]]  # type: ignore[index]
    assert values["local_choice", "acc"] == pytest.approx(right / 3)
    expected = torch.tensor(nats / 3).exp().item()
    assert values["local_last_word", "perplexity"] == pytest.approx(expected, rel=1e-3)
    assert found["examples"] == {"local_choice": 3, "local_last_word": 3}
    assert found["average"] is None and found["tokenizer"] == "bytes"


def _folder(tmp_path: Path, vocab_size: int = 300, words: int = 300) -> Path:
    """A Mamba as Hugging Face keeps it, with a tokenizer of `words` tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocab = {"<|endoftext|>": 0, **{chr(i): i for i in range(33, 127)}}
    vocab |= {f"<{i}>": i for i in range(words) if i not in vocab.values()}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<|endoftext|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    folder = tmp_path / "hf-mamba"
    save_pretrained(model(vocab_size), folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def test_a_hugging_face_mamba_is_scored_with_its_tokenizer(include: Path, tmp_path: Path) -> None:
    found = evaluate_checkpoint(
        str(_folder(tmp_path)), ["local_choice"], results=tmp_path, include=include, limit=2
    )
    values = {s.metric: s.value for s in found.scores}
    assert 0 <= values["acc"] <= 1 and found.examples == {"local_choice": 2}
    assert found.model == "mamba" and found.tokenizer.endswith("tokenizer.json")
    assert [table.title for table in downstream.tables(found)] == [
        f"{tmp_path / 'hf-mamba'}: {downstream.compact(found.parameters)} parameters"
    ]


@pytest.mark.parametrize("words", [301, 100])
def test_a_tokenizer_with_the_wrong_vocabulary_is_named(tmp_path: Path, words: int) -> None:
    folder = _folder(tmp_path, 300, words)
    with pytest.raises(
        UserError, match=f"{max(words, 127)} tokens, and .* with 300; give"
    ) as error:
        downstream.open_checkpoint(str(folder), tmp_path, None)
    assert "\n" not in str(error.value)


def test_a_tokenizer_that_changed_since_the_training_is_named(
    finished: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    results, digest = finished
    other = replace(load_trained(digest, results), model=model(300))
    monkeypatch.setattr(downstream, "load_trained", lambda name, results: other)
    with pytest.raises(
        UserError, match=r"bytes: 256 tokens, and .* was trained with 300; put back"
    ):
        downstream.open_checkpoint(digest, results, None)


def test_the_average_is_of_table_3s_six_accuracies() -> None:
    values = {(task, metric): 0.5 for task, metric, _ in downstream.TABLE_3}
    values["lambada_openai", "perplexity"] = 12.0
    assert downstream.table_3_average(values) == 0.5
    del values["piqa", "acc"]
    assert downstream.table_3_average(values) is None
    mamba = downstream.PAPER["Mamba-130M"][1:]
    assert sum(mamba) / len(mamba) == pytest.approx(44.7, abs=0.05)


def test_the_papers_six_are_known_to_the_harness_and_stand_beside() -> None:
    import lm_eval

    folder = Path(str(lm_eval.__file__)).parent / "tasks"
    known = [f for f in folder.glob("*/*.yaml") if f.parent.name in TASK_FOLDERS]
    named = {line.split()[1] for f in known for line in f.open() if line.startswith("task: ")}
    assert {task for task, _, _ in downstream.TABLE_3} <= named
    scores = tuple(
        downstream.Score(task=t, metric=m, value=0.5, stderr=None, higher_is_better=None)
        for t, m, _ in downstream.TABLE_3
    )
    found = downstream.Evaluation(
        checkpoint="x",
        model="mamba",
        parameters=1,
        tokenizer="bytes",
        scores=scores,
        average=0.5,
        examples={},
        limit=None,
        few_shot=None,
        max_length=2048,
        versions={},
    )
    ours, theirs = downstream.tables(found)
    assert len(ours.rows) == 8 and len(theirs.rows) == len(downstream.PAPER)


def test_mistakes_are_one_line(
    tmp_path: Path, include: Path, finished: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    results, digest = finished
    of_ours = partial(downstream.TaskManager, include_defaults=False)  # not thousands of files
    monkeypatch.setattr(
        downstream, "TaskManager", lambda include_path, **_: of_ours(include_path=include_path)
    )

    def said(name: str, task: str = "local_choice", **options: Any) -> str:
        with pytest.raises((UserError, ModelError, TaskError)) as error:
            evaluate_checkpoint(name, [task], **{"results": results, "include": include} | options)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "did you mean local_choice" in said(digest, "local_choise")
    assert "unknown checkpoint 'nowhere'" in said("nowhere")
    assert "leave the option out" in said(digest, tokenizer="t.json")
    assert "no such folder" in said(digest, include=tmp_path / "none")
    folder = _folder(tmp_path)
    (folder / "tokenizer.json").unlink()
    assert "give the tokenizer with --tokenizer" in said(str(folder))
    (folder / "tokenizer.json").write_text("{")
    assert "tokenizer.json: cannot be read" in said(str(folder))
    (include / "q.jsonl").unlink()
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)
    assert "cannot be loaded (FileNotFoundError" in said(digest)
    torn = tmp_path / "torn.safetensors"
    torn.write_bytes((results / "checkpoints" / f"{digest}.safetensors").read_bytes()[:99])
    assert "cannot be read" in said(str(torn))


def test_the_extra_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "seqbench.suite.downstream")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match=r"pip install 'seqbench\[eval\]'"):
        __import__("seqbench.suite.downstream")
