"""Downstream tasks for a checkpoint through lm-evaluation-harness (extra `eval`), as in Table 3.

A checkpoint is one of ours, trained on language, or a Mamba of Hugging Face's format, a folder or a
repository, with its tokenizer.json. Shapes: B requests at a time, L tokens, V vocabulary.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table as RichTable
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from seqbench.models.pretrained import local_folder
from seqbench.suite.discovery import unknown
from seqbench.suite.experiment import UserError
from seqbench.suite.records import to_plain, write_file
from seqbench.suite.report.tables import compact
from seqbench.suite.trained import load_trained
from seqbench.tasks.corpora import vocabulary

try:
    import lm_eval
    from lm_eval.api.model import TemplateLM
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise UserError(
        f"seqbench eval needs the extra eval: pip install 'seqbench[eval]' ({error})"
    ) from None

# Table 3's columns in its order: the harness's task, the metric, whether the average counts it.
TABLE_3 = (
    ("lambada_openai", "perplexity", False),
    ("lambada_openai", "acc", True),
    ("hellaswag", "acc_norm", True),
    ("piqa", "acc", True),
    ("arc_easy", "acc", True),
    ("arc_challenge", "acc_norm", True),
    ("winogrande", "acc", True),
)
# The paper's rows, as printed there but for the average, which is that of the six accuracies.
PAPER: dict[str, tuple[float, ...]] = {
    "Pythia-160M": (38.10, 33.0, 30.2, 61.4, 43.2, 24.1, 51.9),
    "Mamba-130M": (16.07, 44.3, 35.3, 64.5, 48.0, 24.3, 51.9),
    "Pythia-410M": (10.84, 51.4, 40.6, 66.9, 52.1, 24.6, 53.8),
    "Mamba-370M": (8.14, 55.6, 46.5, 69.5, 55.1, 28.0, 55.3),
    "Pythia-1B": (7.92, 56.1, 47.2, 70.7, 57.0, 27.1, 53.5),
    "Mamba-790M": (6.02, 62.7, 55.1, 72.1, 61.2, 29.5, 56.1),
    "Pythia-1.4B": (6.08, 61.7, 52.1, 71.0, 60.5, 28.5, 57.2),
    "Mamba-1.4B": (5.04, 64.9, 59.1, 74.2, 65.5, 32.8, 61.5),
    "Pythia-2.8B": (5.04, 64.7, 59.3, 74.0, 64.1, 32.9, 59.7),
    "Mamba-2.8B": (4.23, 69.2, 66.1, 75.2, 69.7, 36.3, 63.5),
}
BOOTSTRAPS = 1000  # samples for the standard error of a metric that has no formula
MOST_PADDING = 128  # a model's vocabulary is rounded up by less than this


@dataclass(frozen=True, eq=False)
class Words:
    """Text to tokens and back; `end` is the token that stands before a text without a context."""

    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]
    end: int
    size: int
    name: str


@dataclass(frozen=True, kw_only=True)
class Score:
    """One metric of one task."""

    task: str
    metric: str
    value: float
    stderr: float | None
    higher_is_better: bool | None


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What a checkpoint scored, and how it was asked."""

    checkpoint: str
    model: str
    parameters: int
    tokenizer: str
    scores: tuple[Score, ...]
    average: float | None  # of Table 3's six accuracies, where all are there
    examples: dict[str, int]
    limit: int | None
    few_shot: int | None
    max_length: int
    versions: dict[str, str]

    def write(self, results: Path) -> Path:
        """Writes <results>/eval/NAME.json; returns where."""
        name = "".join(c if c.isalnum() or c in "-._" else "-" for c in Path(self.checkpoint).name)
        path = results / "eval" / f"{name.removesuffix('.safetensors')}.json"
        write_file(path, f"{json.dumps(to_plain(asdict(self)), indent=1)}\n".encode())
        return path


def evaluate_checkpoint(
    name: str,
    tasks: Sequence[str],
    *,
    results: Path,
    tokenizer: str | None = None,
    include: Path | None = None,
    limit: int | None = None,
    few_shot: int | None = None,
    batch_size: int = 8,
    max_length: int = 2048,
    device: torch.device | str = "cpu",
) -> Evaluation:
    """Scores of a checkpoint on the harness's tasks; "table3" stands for Table 3's six.

    `include` is a folder of the harness's YAML tasks; `limit` examples of each task are asked.
    Raises UserError.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    if include is not None and not include.is_dir():
        raise UserError(f"--include {include}: no such folder; give one with YAML tasks in it")
    asked: list[str] = []
    for task in tasks:
        asked += dict.fromkeys(t for t, _, _ in TABLE_3) if task == "table3" else [task]
    manager = _manager(asked, include)
    model, words, kind = open_checkpoint(name, results, tokenizer)
    adapter = Adapter(
        model.to(device), words, batch_size=batch_size, max_length=max_length, device=device
    )
    wanted = list(dict.fromkeys(asked))
    # Its bootstrap would fork this process into a pool, which hangs where a thread held a lock.
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    with contextlib.redirect_stdout(sys.stderr):  # where the harness tells how far it is
        try:
            manager.load(wanted)  # and the data sets, which it keeps
        except Exception as error:  # the libraries raise whatever their backends do
            said = " ".join(str(error).split())[:200]
            raise UserError(
                f"--tasks {','.join(tasks)}: cannot be loaded ({type(error).__name__}: {said}); "
                "their data sets are downloaded at first use; local tasks: --include FOLDER"
            ) from error
        found = lm_eval.simple_evaluate(
            model=adapter,
            tasks=wanted,
            num_fewshot=few_shot,
            limit=limit,
            task_manager=manager,
            log_samples=False,
            bootstrap_iters=BOOTSTRAPS,
        )
    assert found is not None
    scores = tuple(_scores(found))
    return Evaluation(
        checkpoint=name,
        model=kind,
        parameters=sum(p.numel() for p in model.parameters()),
        tokenizer=words.name,
        scores=scores,
        average=table_3_average({(s.task, s.metric): s.value for s in scores}),
        examples={task: int(n["effective"]) for task, n in found["n-samples"].items()},
        limit=limit,
        few_shot=few_shot,
        max_length=max_length,
        versions={"lm_eval": lm_eval.__version__}
        | {task: str(version) for task, version in found["versions"].items()},
    )


def tables(found: Evaluation) -> list[RichTable]:
    """The scores; and beside Table 3's metrics, apart, what the paper printed for its models."""
    made = RichTable(title=f"{found.checkpoint}: {compact(found.parameters)} parameters", box=None)
    for heading in ("task", "metric", "value", "± stderr", "examples"):
        made.add_column(heading, justify="left" if heading in ("task", "metric") else "right")
    for s in found.scores:
        arrow = {True: " ↑", False: " ↓", None: ""}[s.higher_is_better]
        stderr = "" if s.stderr is None or s.stderr != s.stderr else f"{s.stderr:.4f}"
        count = str(found.examples.get(s.task, ""))
        made.add_row(s.task, s.metric + arrow, f"{s.value:.4f}", stderr, count)
    if found.average is not None:
        made.add_row("average", "of Table 3's six accuracies", f"{found.average:.4f}", "", "")
    if {s.task for s in found.scores}.isdisjoint(task for task, _, _ in TABLE_3):
        return [made]
    theirs = RichTable(title="The paper's own (Table 3): its models, trained on the Pile", box=None)
    theirs.add_column("model")
    for task, metric, _ in TABLE_3:
        theirs.add_column(f"{task} {metric}", justify="right")
    theirs.add_column("average", justify="right")
    for model, values in PAPER.items():
        average = sum(values[1:]) / len(values[1:])
        theirs.add_row(
            model, f"{values[0]:.2f}", *(f"{v:.1f}" for v in values[1:]), f"{average:.1f}"
        )
    return [made, theirs]


def _manager(tasks: Sequence[str], include: Path | None) -> TaskManager:
    """Knows the tasks; the harness's own thousands of files are read only if it has to."""
    if include is not None:
        manager = TaskManager(include_path=str(include), include_defaults=False)
        if set(tasks) <= set(manager.all_tasks):
            return manager
    manager = TaskManager(include_path=None if include is None else str(include))
    for task in tasks:
        if task not in manager.all_tasks:
            raise unknown("task in --tasks:", task, ["table3", *manager.all_tasks])
    return manager


def table_3_average(values: dict[tuple[str, str], float]) -> float | None:
    """The mean of Table 3's six accuracies; None if one is not there."""
    wanted = [(task, metric) for task, metric, counts in TABLE_3 if counts]
    if any(key not in values for key in wanted):
        return None
    return sum(values[key] for key in wanted) / len(wanted)


def open_checkpoint(name: str, results: Path, tokenizer: str | None) -> tuple[Any, Words, str]:
    """The model of a checkpoint, its tokenizer and what it is; UserError or ModelError."""
    trained = load_trained(name, results)
    if trained.cell is None:
        own = local_folder(trained.place) / "tokenizer.json"
        if tokenizer is None and not own.is_file():
            raise UserError(f"{own}: no such file; give the tokenizer with --tokenizer PATH")
        words = _words(tokenizer if tokenizer is not None else str(own))
        known = trained.model.embedding.num_embeddings
        if not 0 <= known - words.size < MOST_PADDING:
            raise UserError(
                f"{words.name}: {words.size} tokens, and {name} was trained with {known}; give "
                "its own with --tokenizer PATH/tokenizer.json"
            )
        return trained.model, words, "mamba"
    if trained.cell.task != "language":
        raise UserError(
            f"{name}: trained on {trained.cell.task}; the harness asks for text, give a "
            "checkpoint of the task language"
        )
    own_name = trained.cell.task_config["tokenizer"]
    if tokenizer is not None:
        raise UserError(
            f"--tokenizer {tokenizer}: this checkpoint has its own, {own_name}; leave the option "
            "out"
        )
    words = _words(own_name)
    if words.size != trained.model.embedding.num_embeddings:
        raise UserError(
            f"{own_name}: {words.size} tokens, and {name} was trained with "
            f"{trained.model.embedding.num_embeddings}; put back the tokenizer it was trained with"
        )
    return trained.model, words, trained.cell.label


def _words(name: str) -> Words:
    words = vocabulary(name)
    return Words(
        encode=lambda text: words.encode(text.encode(), "a request").tolist(),
        decode=lambda tokens: words.decode(tokens).decode(errors="replace"),
        end=words.end,
        size=words.size,
        name=name,
    )


class Adapter(TemplateLM):
    """A model of ours as the harness asks it; requests above `max_length` lose their start."""

    def __init__(
        self,
        model: nn.Module,
        words: Words,
        *,
        batch_size: int = 8,
        max_length: int = 2048,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        self.model, self.words = model, words
        self.batch_size, self.max_length = batch_size, max_length
        self._device = torch.device(device)

    @property
    def eot_token_id(self) -> int:
        return self.words.end

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        return self.words.encode(string)

    @torch.no_grad()
    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        answers: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        # Longest first: what does not fit in memory shows at once, and a batch's are alike.
        order = sorted(range(len(requests)), key=lambda i: -sum(map(len, requests[i][1:])))
        for first in range(0, len(order), self.batch_size):
            some = order[first : first + self.batch_size]
            whole, counts = [], []
            for i in some:
                _, context, continuation = requests[i]
                kept = (context + continuation)[-(self.max_length + 1) :]
                whole.append(torch.tensor(kept))
                counts.append(min(len(continuation), len(kept) - 1))
            tokens_BL = pad_sequence(whole, batch_first=True, padding_value=self.words.end)
            place_L = torch.arange(tokens_BL.shape[1] - 1)
            ends_B = torch.tensor([len(w) - 1 for w in whole])
            asked_BL = (place_L < ends_B[:, None]) & (
                place_L >= ends_B[:, None] - torch.tensor(counts)[:, None]
            )
            for i, logits_KV, wanted_K in zip(some, *self._logits(tokens_BL, asked_BL, counts)):
                chances = logits_KV.log_softmax(-1).gather(-1, wanted_K[:, None])
                answers[i] = (
                    float(chances.sum()),
                    bool((logits_KV.argmax(-1) == wanted_K).all()),
                )
        return answers

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Of whole texts, in windows that stand end to end, each after one token."""
        windows: list[tuple[Any, list[int], list[int]]] = []
        owners: list[int] = []
        for i, request in enumerate(requests):
            (text,) = request.args
            for window in get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.words.end,
                max_seq_len=self.max_length,
                context_len=1,
            ):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(i)
        totals = [0.0] * len(requests)
        for i, (value, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[i] += value
        return totals

    @torch.no_grad()
    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """The likeliest token again and again, by recurrent steps, up to one of the endings."""
        answers = []
        for request in requests:
            context, options = request.args
            endings = options.get("until") or []
            endings = [endings] if isinstance(endings, str) else list(endings)
            tokens = (self.tok_encode(context) or [self.words.end])[-self.max_length :]
            state = self.model.initial_state(1, self._device)  # type: ignore[operator]
            logits, state = self.model(torch.tensor([tokens], device=self._device), state)
            logits_BV, said, text = logits[:, -1], [], ""
            for _ in range(int(options.get("max_gen_toks", 256))):
                token_B = logits_BV.argmax(-1)
                if int(token_B) == self.words.end:
                    break
                said.append(int(token_B))
                text = self.words.decode(said)
                if any(ending in text for ending in endings):
                    break
                logits_BV, state = self.model.step(token_B, state)  # type: ignore[operator]
            cut = min((text.index(e) for e in endings if e in text), default=len(text))
            answers.append(text[:cut])
        return answers

    def _logits(
        self, tokens_BL: Tensor, asked_BL: Tensor, counts: list[int]
    ) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Of each request the logits (K, V) where it is scored, and the tokens wanted there (K)."""
        tokens_BL, asked_BL = tokens_BL.to(self._device), asked_BL.to(self._device)
        logits = self.model(tokens_BL[:, :-1], at=asked_BL).float()
        return logits.split(counts), tokens_BL[:, 1:][asked_BL].split(counts)


def _scores(found: Any) -> list[Score]:
    """The harness's results as a flat list: "acc,none" and "acc_stderr,none" are one score."""
    scores = []
    for task, metrics in found["results"].items():
        higher = found.get("higher_is_better", {}).get(task, {})
        for key, value in metrics.items():
            metric, comma, filtered = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = metrics.get(f"{metric}_stderr,{filtered}")
            scores.append(
                Score(
                    task=task,
                    metric=metric if filtered == "none" else f"{metric} ({filtered})",
                    value=float(value),
                    stderr=float(stderr) if isinstance(stderr, int | float) else None,
                    higher_is_better=higher.get(metric),
                )
            )
    return scores
