"""A grid written as a YAML file: groups of tasks x models with what they change.

description: Does selection pay on longer sequences? About 20 minutes on 2 cores.
seeds: [0, 1]
cells:
  - tasks: [selective-copying]
    models: [mamba, mamba+s4]
    same_size_as: mamba
    set: {task.length: 128, train.steps: 2000}
"""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, ClassVar

import yaml
from pydantic import ConfigDict, Field, JsonValue, TypeAdapter, ValidationError

from seqbench.suite.discovery import unknown
from seqbench.suite.experiment import Request, UserError

_UNKNOWN_KEY = "unexpected_keyword_argument"
SECTIONS = ("task", "model", "train")
_CLOSED = ConfigDict(extra="forbid", allow_inf_nan=False)

Name = Annotated[str, Field(min_length=1)]
Names = Annotated[list[Name], Field(min_length=1)]
Seed = Annotated[int, Field(ge=0, strict=True)]


@dataclass(frozen=True, kw_only=True)
class Group:
    """Every task of the group with every model."""

    __pydantic_config__: ClassVar[ConfigDict] = _CLOSED

    tasks: Names
    models: Names
    same_size_as: Name | None = None  # a model whose parameter count the widths are chosen to match
    set: dict[str, JsonValue] = field(default_factory=dict)  # train.steps: 500


@dataclass(frozen=True, kw_only=True)
class GridFile:
    """What the file holds."""

    __pydantic_config__: ClassVar[ConfigDict] = _CLOSED

    cells: Annotated[list[Group], Field(min_length=1)]
    description: str = ""  # what it asks, what it costs, what is expected
    seeds: Annotated[list[Seed], Field(min_length=1)] = field(default_factory=lambda: [0])


def load_grid(path: Path) -> ModuleType:
    """The file as a grid module: docstring, SEEDS, requests(scale); UserError names the place."""
    grid = parse(_read(path), f"grid {str(path)!r}")
    module = ModuleType(path.stem, grid.description or None)

    def requests(scale: str) -> list[Request]:
        return [
            Request(
                task=task,
                model=model,
                scale=scale,
                settings=group.set,
                same_size_as=group.same_size_as,
            )
            for group in grid.cells
            for task in group.tasks
            for model in group.models
        ]

    vars(module).update(SEEDS=tuple(grid.seeds), requests=requests)
    return module


def parse(text: str, where: str) -> GridFile:
    """The grid in a YAML text; UserError names `where`, the place in it, and what is valid."""
    try:
        # An alias may repeat without end, or hold itself.
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, _Loader)):
            raise UserError(f"{where}: YAML aliases (*name) are not read; write the values out")
        data = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"line {mark.line + 1}: " if mark is not None else ""
        problem = getattr(error, "problem", None) or str(error)
        raise UserError(f"{where}: {place}no valid YAML: {problem}") from error
    except (ValueError, OverflowError, RecursionError, TypeError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{where}: no valid YAML: {error}") from error
    try:
        grid = TypeAdapter(GridFile).validate_python(data)
    except ValidationError as error:
        errors = error.errors(include_url=False, include_context=False)
        # A misspelt key is also a missing one: the first says more.
        first = next((e for e in errors if e["type"] == _UNKNOWN_KEY), errors[0])
        raise _invalid(where, first) from None
    for index, group in enumerate(grid.cells):
        for key, value in group.set.items():
            section, dot, name = key.partition(".")
            if section not in SECTIONS or not dot or not name:
                raise UserError(
                    f"{where}: cells.{index}.set.{key}: write SECTION.KEY with SECTION one of "
                    f"{', '.join(SECTIONS)}, as in train.steps"
                )
            if not _finite(value):
                raise UserError(f"{where}: cells.{index}.set.{key}={value!r}: must be finite")
    return grid


class _Loader(yaml.SafeLoader):
    """YAML with 1e-3 as the number it looks like, and no key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen and isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} stands twice", key.start_mark
                )
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else id(key))
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(
            f"grid {str(path)!r}: no such file; give a name (seqbench list grids) or the path of "
            "a YAML or Python file"
        ) from None
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise UserError(f"grid {str(path)!r}: cannot be read ({reason})") from error
    except ValueError as error:
        raise UserError(f"grid {str(path)!r}: no valid YAML: not UTF-8 text") from error


def _invalid(where: str, error: Any) -> UserError:
    place = ".".join(str(part) for part in error["loc"]) or "the file"
    if error["type"] == _UNKNOWN_KEY:
        keys = fields(GridFile if len(error["loc"]) == 1 else Group)
        return unknown(
            f"key {place} in {where}:", str(error["loc"][-1]), [key.name for key in keys]
        )
    if error["type"] in ("missing", "missing_argument"):
        return UserError(f"{where}: {place} is missing")
    shown = repr(error["input"])
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    message = error["msg"][:1].lower() + error["msg"][1:]
    return UserError(f"{where}: {place}={shown}: {message}")


def _finite(value: JsonValue) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, dict):
        return all(_finite(v) for v in value.values())
    if isinstance(value, list):
        return all(_finite(v) for v in value)
    return True
