"""Name -> class: by file name, by entry point, or as path/to/file.py; always lazily.

A built-in is named by its file (`tasks/induction_heads.py` is `induction-heads`); nothing is
imported before it is asked for. Another package adds its own through the groups `seqbench.tasks`
and `seqbench.grids`; anybody can name a Python file.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Iterable
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from seqbench.suite.experiment import UserError

if TYPE_CHECKING:
    from seqbench.tasks.base import Task

SUITE = Path(__file__).resolve().parent


def task_names() -> list[str]:
    """The names of all tasks found, built-in and from entry points, without importing any."""
    built_in = [_dashed(p.stem) for p in _task_files().values()]
    return sorted({*built_in, *(e.name for e in _entry_points("tasks"))})


def grid_names() -> list[str]:
    """The names of all grids found, without importing any."""
    return sorted({*_grid_files(), *(e.name for e in _entry_points("grids"))})


def task_class(name: str) -> type[Task]:
    """The task class of that name, or of a file `path/to/file.py`."""
    from seqbench.tasks.base import Task

    module = _module(
        "task", name, {n: f"seqbench.tasks.{p.stem}" for n, p in _task_files().items()}
    )
    if inspect.isclass(module):
        found = [module]
    else:
        found = [
            c
            for c in vars(module).values()
            if inspect.isclass(c)
            and issubclass(c, Task)
            and c.__module__ == module.__name__
            and not inspect.isabstract(c)
        ]
    if len(found) != 1 or not issubclass(found[0], Task):
        raise UserError(
            f"task {name!r}: a task file defines exactly one subclass of seqbench.tasks.base.Task, "
            f"found {len(found)}"
        )
    return found[0]


def grid_module(name: str) -> ModuleType:
    """The grid file of that name, or `path/to/file.py`: docstring, SEEDS, requests(scale)."""
    module = _module(
        "grid", name, {n: f"seqbench.suite.grids.{p.stem}" for n, p in _grid_files().items()}
    )
    if not callable(getattr(module, "requests", None)):
        raise UserError(f"grid {name!r}: the file defines no function requests(scale)")
    assert isinstance(module, ModuleType)
    return module


def unknown(kind: str, name: str, valid: Iterable[str], remedy: str = "") -> UserError:
    """The error for a name that is not there: with the close matches, else all that is valid."""
    valid = sorted(valid)
    close = difflib.get_close_matches(name, valid, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}?" if close else f"valid: {', '.join(valid)}"
    return UserError(f"unknown {kind} {name!r}: {hint}{' ' + remedy if remedy else ''}")


def _module(kind: str, name: str, built_in: dict[str, str]) -> ModuleType | type:
    if name.endswith(".py"):
        return _load_file(kind, Path(name))
    if name in built_in:
        return importlib.import_module(built_in[name])
    points = {e.name: e for e in _entry_points(kind + "s")}
    if name in points:
        try:
            return points[name].load()
        except Exception as error:
            raise UserError(
                f"{kind} {name!r}, the plugin {points[name].value}: {type(error).__name__}: {error}"
            ) from error
    raise unknown(kind, name, {*built_in, *points}, f"(seqbench list {kind}s shows all)")


def _load_file(kind: str, path: Path) -> ModuleType:
    if not path.is_file():
        raise UserError(
            f"{kind} {str(path)!r}: no such file; give a name or the path of a Python file"
        )
    key = f"seqbench_plugin_{path.resolve().as_posix().replace('/', '_').removesuffix('.py')}"
    if key in sys.modules:
        return sys.modules[key]
    spec = importlib.util.spec_from_file_location(key, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[key] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[key]
        raise UserError(f"{kind} file {path}: {type(error).__name__}: {error}") from error
    return module


def _task_files() -> dict[str, Path]:
    """Files of the tasks folder that define a Task, told by their syntax tree: no import needed."""
    folder = SUITE.parent / "tasks"
    files = (p for p in sorted(folder.glob("*.py")) if p.name != "base.py")
    return {_dashed(p.stem): p for p in files if _defines_a_task(p)}


def _defines_a_task(path: Path) -> bool:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return any(
        isinstance(node, ast.ClassDef)
        and any(isinstance(b, ast.Name) and b.id == "Task" for b in node.bases)
        for node in tree.body
    )


def _grid_files() -> dict[str, Path]:
    return {
        _dashed(p.stem): p for p in sorted((SUITE / "grids").glob("*.py")) if p.stem != "__init__"
    }


def _entry_points(group: str) -> Iterable[EntryPoint]:
    return entry_points(group=f"seqbench.{group}")


def _dashed(stem: str) -> str:
    return stem.replace("_", "-")
