"""From text to configs: `--set` assignments and scales become a frozen, checked Cell.

A misspelt key is an error with its path and the close matches; a wrong type names the key, the
value and what is valid.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from functools import lru_cache
from typing import Any, TypeVar, cast, get_type_hints

import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError

from seqbench.models import plugins
from seqbench.models.base import ModelError
from seqbench.models.build import build_model, code_hash, match_parameters, options_of
from seqbench.suite.discovery import is_plugin, task_class, unknown
from seqbench.suite.experiment import Cell, Request, TrainConfig, UserError
from seqbench.suite.initial import with_fingerprint
from seqbench.suite.recipes import recipe_settings
from seqbench.tasks.base import Task, TaskError

C = TypeVar("C")
SECTIONS = ("task", "model", "train")


def parse_assignment(text: str) -> tuple[str, Any]:
    """`train.steps=500` -> ("train.steps", 500); JSON where it parses, else text."""
    key, equals, value = text.partition("=")
    if not equals or "." not in key:
        raise UserError(
            f"--set {text!r}: write SECTION.KEY=VALUE with SECTION one of {', '.join(SECTIONS)}, "
            "as in train.steps=500"
        )
    if key.split(".")[0] not in SECTIONS:
        raise unknown(f"section in --set {text!r}:", key.split(".")[0], SECTIONS)
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, None if value.lower() == "none" else value
    except (ValueError, RecursionError) as error:
        raise UserError(f"--set {text[:60]}...: cannot be read as JSON: {error}") from None


def build_config(cls: type[C], values: Mapping[str, Any], where: str) -> C:
    """A config dataclass from plain values; raises UserError for unknown keys and wrong types."""
    names = [f.name for f in fields(cls)]  # type: ignore[arg-type]
    for key, value in values.items():
        if key not in names:
            raise unknown(f"key {where}.{key}:", key, names)
        if isinstance(value, bool) and get_type_hints(cls)[key] in (int, float):
            raise UserError(f"{where}.{key}={json.dumps(value)}: must be a number")
    try:
        checked: C = _adapter(cast(Any, cls)).validate_python(dict(values))
        return checked
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in (where, *first["loc"]))
        raise UserError(f"{key}={first['input']!r}: {_uncapitalised(first['msg'])}") from None


def prepared_task(name: str, config: Mapping[str, Any]) -> Task:
    """The task with that config, its data ready; opened once for every distinct config."""
    return _prepared(name, json.dumps(dict(config), sort_keys=True))


def resolve(request: Request, seed: int, assignments: Sequence[tuple[str, Any]] = ()) -> Cell:
    """The cell of a request: the task's scale, then the grid's own settings, then `--set`.

    A recipe, wherever it is named, stands above the scale and below the other two.
    """
    cls = task_class(request.task)
    if request.scale not in cls.scales:
        raise unknown(f"scale of task {request.task}:", request.scale, cls.scales)
    scale = cls.scales[request.scale]
    values: dict[str, dict[str, Any]] = {
        "task": dict(scale.task),
        "model": dict(scale.model),
        "train": dict(scale.train),
    }
    for path, value in [*request.settings.items(), *assignments]:
        section, _, key = path.partition(".")
        if section not in values:
            raise unknown(f"section of the setting {path}:", section, SECTIONS)
        values[section][key] = value
    if request.init_from is not None:
        # Its task may be another, with other settings.
        same = request.init_from.task == request.task
        shared = [(k, v) for k, v in assignments if same or not k.startswith("task.")]
        source = resolve(request.init_from, 0, shared)
        values["train"]["init_from"] = f"{source.digest}@seed"
    config: Any = build_config(cls.Config, values["task"], "task")
    train = build_config(TrainConfig, values["train"], "train")
    _check_train(train)
    train = with_fingerprint(train)
    task_config = _plain(_settled(config))
    task = prepared_task(request.task, task_config)
    if request.same_size_as is not None and "model.d_model" not in dict(assignments):
        values["model"] |= _matched_width(request, task.vocab_size, values["model"])
    parameters = check_model(request.model, task.vocab_size, values["model"])
    changed = sorted({*request.settings, *(path for path, _ in assignments)})
    if train.recipe is not None:
        filled = recipe_settings(train.recipe, parameters=parameters, steps=train.steps)
        train = replace(train, **{k: v for k, v in filled.items() if f"train.{k}" not in changed})
    model_config = _model_config(request.model, values["model"])
    return Cell(
        task=request.task,
        model=request.model,
        seed=seed,
        scale=request.scale,
        scale_note=scale.note + (f" Changed: {', '.join(changed)}." if changed else ""),
        task_config=task_config,
        model_config=model_config,
        train=train,
        data_fingerprint=task.fingerprint(),
        code=code_of(request.task, request.model, model_config),
    )


def code_of(task: str, model: str, options: Mapping[str, Any]) -> dict[str, str]:
    """Hashes of the source of a task and a model from elsewhere, for a cell's identity."""
    found = {
        "task": plugins.source_hash([("task", task)]) if is_plugin("task", task) else None,
        "model": code_hash(model, options),
    }
    return {part: digest for part, digest in found.items() if digest is not None}


def _settled(config: Any) -> dict[str, Any]:
    """A task's config, without the late fields (tasks.base.LATE) that have their default."""
    values = asdict(config)
    for f in fields(config):
        if f.metadata.get("late") and values[f.name] == f.default:
            del values[f.name]
    return values


def _model_config(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Every option with its value; the plain stack's are the same whether it is named or not."""
    config = {**options_of(name, values.get("backbone")), **values}
    if config.get("backbone") == "stack" and "backbone" not in options_of(name):
        del config["backbone"]
    return cast(dict[str, Any], _plain(config))


def check_model(name: str, vocab_size: int, config: Mapping[str, Any]) -> int:
    """Builds the model on the meta device: a wrong name or option shows before the grid starts.

    Returns the number of its parameters.
    """
    try:
        with torch.device("meta"):
            model = build_model(name, vocab_size=vocab_size, **config)
    except ModelError:
        raise
    except Exception as error:  # a plugin's own, or a size that torch cannot count in
        raise UserError(
            f"model {name!r} with {dict(config)}: {type(error).__name__}: {error}"
        ) from error
    if _has_plugin(name, model):
        _check_plugin_model(name, vocab_size, json.dumps(dict(config), sort_keys=True))
    return sum(parameter.numel() for parameter in model.parameters())


def _matched_width(request: Request, vocab_size: int, config: Mapping[str, Any]) -> dict[str, Any]:
    """The width, a multiple of 8, that brings the model nearest to the size of `same_size_as`."""
    if request.model == request.same_size_as:
        return {}
    depth = config["num_layers"]
    check_model(request.model, vocab_size, config)  # its own mistakes first
    with torch.device("meta"):
        other = build_model(
            str(request.same_size_as),
            vocab_size=vocab_size,
            d_model=config["d_model"],
            num_layers=depth,
        )
    width = match_parameters(
        request.model,
        parameters=other.num_parameters,
        vocab_size=vocab_size,
        num_layers=depth,
        multiple_of=8,
    )
    return {"d_model": width}


# The least value of each, whether it may be that value itself, and the most.
_RANGES: dict[str, tuple[float, bool, float]] = {
    "steps": (1, True, math.inf),
    "batch_size": (1, True, math.inf),
    "eval_every": (1, True, math.inf),
    "eval_batches": (1, True, math.inf),
    "test_batches": (1, True, math.inf),
    "lr": (0, False, math.inf),
    "min_lr": (0, True, math.inf),
    "warmup_steps": (0, True, math.inf),
    "weight_decay": (0, True, math.inf),
    "clip": (0, True, math.inf),
    "beta1": (0, True, 1),
    "beta2": (0, True, 1),
    "patience": (1, True, math.inf),
    "curriculum_pass": (0, True, 1),
    "curriculum_until": (0, True, 1),
    "micro_tokens": (1, True, math.inf),
    "segment_length": (1, True, math.inf),
}


def _check_train(train: TrainConfig) -> None:
    for key, (least, included, most) in _RANGES.items():
        value = getattr(train, key)
        if value is None or (least < value <= most or (included and value == least)):
            continue
        bound = "at least" if included else "above"
        more = f" and at most {most:g}" if most < math.inf else ""
        raise UserError(f"train.{key}={value}: must be {bound} {least:g}{more}")
    for key in ("beta1", "beta2"):
        if getattr(train, key) == 1:
            raise UserError(f"train.{key}=1: must be below 1")
    truncated = train.segment_gradients == "truncated"
    if truncated and train.segment_length is None:
        raise UserError(
            "train.segment_gradients='truncated': they are cut between segments; give "
            "train.segment_length too, as in train.segment_length=4096"
        )
    if train.precision == "16-mixed" and (truncated or train.micro_tokens is not None):
        key = "segment_gradients='truncated'" if truncated else f"micro_tokens={train.micro_tokens}"
        raise UserError(
            f"train.{key} with train.precision='16-mixed': gradients of parts are taken before the "
            "loss is scaled; take bf16-mixed or 32-true"
        )


@lru_cache(maxsize=64)
def _prepared(name: str, config: str) -> Task:
    cls = task_class(name)
    try:
        task = cls(build_config(cls.Config, json.loads(config), "task"))
        task.prepare()
    except (UserError, TaskError):
        raise
    except Exception as error:
        if not is_plugin("task", name):
            raise
        problem = f"it fails with {type(error).__name__}: {error}"
        raise UserError(str(plugins.broken("task", name, "prepare", problem))) from error
    if is_plugin("task", name):
        _check_plugin_task(name, task)
    return task


def _check_plugin_task(name: str, task: Task) -> None:
    """The quick rules of the contract: a broken plugin is named before anything is trained."""
    from seqbench.suite.contract import apply
    from seqbench.suite.contract.tasks import BEFORE_A_RUN, Subject

    subject = Subject(name, type(task))
    subject.task = task
    for rule in BEFORE_A_RUN:
        finding = apply(rule, subject)
        if finding.status == "broken":
            raise UserError(str(plugins.broken("task", name, finding.rule, finding.note)))


def _has_plugin(name: str, model: Any) -> bool:
    """Whether any part of the model is code from elsewhere."""
    parts = [type(module).__module__ for module in model.modules()]
    return not all(
        part.startswith(("seqbench.models.", "seqbench.kernels.", "torch.")) for part in parts
    )


@lru_cache(maxsize=256)
def _check_plugin_model(name: str, vocab_size: int, config: str) -> None:
    """One real forward pass of a few tokens: wrong shapes are named before anything is trained."""
    from seqbench.suite.contract import Broken
    from seqbench.suite.contract.models import logits_of

    try:
        logits_of(build_model(name, vocab_size=vocab_size, **json.loads(config)), vocab_size)
    except Broken as problem:
        raise UserError(f"model {name!r} breaks the rule shapes: {problem}") from problem
    except ModelError:
        raise
    except Exception as error:
        raise UserError(
            f"model {name!r} breaks the rule shapes: forward fails with {type(error).__name__}: "
            f"{error} (seqbench check-plugin says more)"
        ) from error


@lru_cache(maxsize=64)
def _adapter(cls: Any) -> TypeAdapter[Any]:
    if not hasattr(cls, "__pydantic_config__"):
        cls.__pydantic_config__ = ConfigDict(allow_inf_nan=False, extra="forbid")
    return TypeAdapter(cls)


def _plain(value: Any) -> Any:
    """Tuples to lists and so on: what comes back from JSON is what went in."""
    return json.loads(json.dumps(value))


def _uncapitalised(text: str) -> str:
    return text[:1].lower() + text[1:]
