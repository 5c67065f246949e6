"""The contracts as rules, one function each: `check-plugin` reports them, the tests assert them."""

from __future__ import annotations

import dataclasses
import itertools
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

Status = Literal["ok", "broken", "not checked"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What became of one rule."""

    rule: str
    status: Status
    note: str  # what was seen, what is wrong, or why it was not checked


class Broken(Exception):
    """The rule does not hold: what was seen instead."""


class NotChecked(Exception):
    """The rule says nothing about this subject: why."""


S = TypeVar("S")
Rule = Callable[[S], str]  # returns what was seen; its docstring is the rule


def name_of(rule: Callable[..., str]) -> str:
    """The rule's name, from its function's."""
    return rule.__name__.replace("_", "-")


def need(condition: bool, problem: str) -> None:
    """Raises Broken with that problem unless the condition holds."""
    if not condition:
        raise Broken(problem)


def apply(rule: Rule[S], subject: S) -> Finding:
    """The finding of one rule; an exception that the subject raises breaks the rule."""
    try:
        return Finding(rule=name_of(rule), status="ok", note=rule(subject))
    except NotChecked as why:
        return Finding(rule=name_of(rule), status="not checked", note=str(why))
    except Broken as problem:
        return Finding(rule=name_of(rule), status="broken", note=str(problem))
    except Exception as error:
        return Finding(rule=name_of(rule), status="broken", note=_raised(error))


def apply_all(
    rules: Sequence[Rule[S]], subjects: Sequence[tuple[str, S]], gates: Iterable[Rule[S]]
) -> list[Finding]:
    """Every rule on every labelled subject; after a broken gate the rest cannot be checked."""
    findings: list[Finding] = []
    closed = ""
    for rule in rules:
        if closed:
            note = f"{closed} has to hold first"
            findings.append(Finding(rule=name_of(rule), status="not checked", note=note))
            continue
        finding = _worst([(label, apply(rule, subject)) for label, subject in subjects])
        findings.append(finding)
        if finding.status == "broken" and rule in set(gates):
            closed = finding.rule
    return findings


def frozen_config(config: Any) -> None:
    """Raises Broken unless it is a frozen, keyword-only dataclass that has a default everywhere."""
    need(dataclasses.is_dataclass(config), f"Config={config!r} is no dataclass")
    name = config.__name__
    need(config.__dataclass_params__.frozen, f"{name} is not frozen: @dataclass(frozen=True, ...)")
    for field in dataclasses.fields(config):
        need(
            bool(field.kw_only),
            f"{name}.{field.name} is not keyword-only: @dataclass(kw_only=True)",
        )
        missing = dataclasses.MISSING
        given = field.default is not missing or field.default_factory is not missing
        need(bool(given), f"{name}.{field.name} has no default")
    get_type_hints(config)


def alternatives(hint: Any, value: Any) -> list[Any]:
    """Other values for a config field of that type, the likeliest to be valid first; maybe none."""
    kind, arguments = get_origin(hint), get_args(hint)
    if kind in (Union, UnionType):
        found = list(itertools.chain.from_iterable(alternatives(a, value) for a in arguments))
    elif kind is Literal:
        found = list(arguments)
    elif hint is bool:
        found = [True, False]
    elif hint is int:
        is_int = isinstance(value, int)
        found = [value + 1, value * 2, value // 2, value - 1] if is_int else []
        found += [1, 2, 4, 8, 16]
    elif hint is float:
        found = [value * 2, value / 2, value + 1] if isinstance(value, float) else []
        found += [0.5, 0.25, 1.0, 2.0]
    elif hint is NoneType:
        found = [None]
    elif kind is tuple and arguments[-1] is Ellipsis and arguments[0] is not str:
        short = list(value[:-1]) if isinstance(value, tuple | list) and value else []
        found = [(), tuple(short)]
        if arguments[0] is int:
            found += [(16,), (32,), (64,), (512,)]
    else:
        found = []
    distinct: list[Any] = []
    for other in found:
        same = [d for d in [value, *distinct] if d == other and type(d) is type(other)]
        if not same:
            distinct.append(other)
    return distinct


def _worst(findings: list[tuple[str, Finding]]) -> Finding:
    """The first broken finding, with its subject's label; else the first that was checked."""
    for label, finding in findings:
        if finding.status == "broken":
            where = f"{label}: " if label else ""
            return dataclasses.replace(finding, note=f"{where}{finding.note}")
    return min((f for _, f in findings), key=lambda f: f.status != "ok")


def _raised(error: Exception) -> str:
    where = traceback.extract_tb(error.__traceback__)[-1]
    text = " ".join(str(error).split())
    return f"raised {type(error).__name__}: {text} ({Path(where.filename).name}:{where.lineno})"
