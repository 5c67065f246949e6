"""Name -> class: by file name, by entry point, or as path/to/file.py; always lazily.

A built-in is named by its file (`tasks/induction_heads.py` is `induction-heads`); nothing is
imported before it is asked for. Another package adds its own through the groups `seqbench.tasks`
and `seqbench.grids`; anybody can name a Python file, or a grid written as a YAML file.
"""

from __future__ import annotations

import ast
import difflib
import importlib
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from seqbench.models import plugins
from seqbench.suite.experiment import Request, UserError

if TYPE_CHECKING:
    from seqbench.tasks.base import Task

SUITE = Path(__file__).resolve().parent
YAML = (".yaml", ".yml")


def task_names() -> list[str]:
    """The names of all tasks found, built-in and from entry points, without importing any."""
    return sorted({*_task_files(), *plugins.names("task")})


def grid_names() -> list[str]:
    """The names of all grids found, without importing any."""
    return sorted({*_grid_files(), *plugins.names("grid")})


def is_plugin(kind: str, name: str) -> bool:
    """Whether that task or grid comes from elsewhere: a path, or an entry point."""
    built_in = _task_files() if kind == "task" else _grid_files()
    return name not in built_in or name in plugins.names(kind)


def task_class(name: str) -> type[Task]:
    """The task class of that name, or of a file `path/to/file.py`."""
    from seqbench.tasks.base import Task

    built_in = {n: f"seqbench.tasks.{p.stem}" for n, p in _task_files().items()}
    try:
        one: type[Task] = plugins.one_class("task", name, _found("task", name, built_in), Task)
    except plugins.PluginError as error:
        raise UserError(str(error)) from error
    return one


def grid_module(name: str) -> ModuleType:
    """The grid of that name, or of a file (Python or YAML): docstring, SEEDS, requests(scale)."""
    if name.endswith(YAML):
        from seqbench.suite.gridfile import load_grid

        return load_grid(Path(name))
    module = _found(
        "grid", name, {n: f"seqbench.suite.grids.{p.stem}" for n, p in _grid_files().items()}
    )
    if not isinstance(module, ModuleType):
        raise _broken(name, "grid", f"{module!r} is no module with SEEDS and requests(scale)")
    if not callable(getattr(module, "requests", None)):
        raise _broken(name, "grid", "the file defines no function requests(scale)")
    seeds = getattr(module, "SEEDS", None)
    whole = isinstance(seeds, tuple | list | range) and all(
        type(s) is int and s >= 0 for s in seeds
    )
    if not (whole and seeds):
        raise _broken(name, "grid", f"SEEDS={seeds!r}: must be integers, 0 or more")
    return module


def grid_requests(name: str, scale: str) -> tuple[tuple[int, ...], list[Request]]:
    """The seeds of a grid and what it asks for at that scale."""
    module = grid_module(name)
    try:
        requests = list(module.requests(scale))
    except UserError:
        raise
    except Exception as error:
        if not is_plugin("grid", name):
            raise
        problem = f"requests({scale!r}) fails with {type(error).__name__}: {error}"
        raise _broken(name, "grid", problem) from error
    strays = [r for r in requests if not isinstance(r, Request)]
    if strays or not requests:
        shown = repr(strays[0]) if strays else "nothing"
        problem = f"requests({scale!r}) gives {shown}: must be seqbench.suite.experiment.Request"
        raise _broken(name, "grid", problem)
    return tuple(module.SEEDS), requests


def unknown(kind: str, name: str, valid: Iterable[str], remedy: str = "") -> UserError:
    """The error for a name that is not there: with the close matches, else all that is valid."""
    valid = sorted(valid)
    close = difflib.get_close_matches(name, valid, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}?" if close else f"valid: {', '.join(valid)}"
    return UserError(f"unknown {kind} {name!r}: {hint}{' ' + remedy if remedy else ''}")


def _found(kind: str, name: str, built_in: Mapping[str, str]) -> Any:
    """A module, or whatever an entry point names."""
    try:
        found = plugins.load(kind, name, built_in)
    except plugins.PluginError as error:
        raise UserError(str(error)) from error
    if found is not None:
        return found
    if name in built_in:
        return importlib.import_module(built_in[name])
    valid = {*built_in, *plugins.names(kind)}
    raise unknown(kind, name, valid, f"(seqbench list {kind}s shows all)")


def _broken(name: str, rule: str, problem: str) -> UserError:
    return UserError(str(plugins.broken("grid", name, rule, problem)))


def _task_files() -> dict[str, Path]:
    """Files of the tasks folder that define a Task, told by their syntax tree: no import needed."""
    folder = SUITE.parent / "tasks"
    files = (p for p in sorted(folder.glob("*.py")) if p.name not in ("base.py", "generated.py"))
    return {_dashed(p.stem): p for p in files if _defines_a_task(p, p.stat().st_mtime_ns)}


@lru_cache(maxsize=256)
def _defines_a_task(path: Path, changed: int) -> bool:
    """`changed` is the file's time: one that was edited is read again."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return any(
        isinstance(node, ast.ClassDef)
        and any(isinstance(b, ast.Name) and b.id in ("Task", "GeneratedTask") for b in node.bases)
        for node in tree.body
    )


def _grid_files() -> dict[str, Path]:
    return {
        _dashed(p.stem): p for p in sorted((SUITE / "grids").glob("*.py")) if p.stem != "__init__"
    }


def _dashed(stem: str) -> str:
    return stem.replace("_", "-")
