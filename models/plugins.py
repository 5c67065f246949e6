"""Code from elsewhere: a Python file by its path, or an entry point of an installed package.

Nothing is imported before it is asked for, and whatever goes wrong then is one line that names the
plugin, where it comes from, and the rule it broke. Standard library only: the suite uses it too.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Collection, Iterable
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any


class PluginError(ValueError):
    """A plugin that breaks a rule: one line."""


def broken(kind: str, name: str, rule: str, problem: str) -> PluginError:
    """The error of a plugin that breaks a rule, with where the plugin comes from."""
    return PluginError(f"{kind} {name!r} ({origin(kind, name)}) breaks the rule {rule}: {problem}")


def names(kind: str) -> list[str]:
    """Names that installed packages add in the group `seqbench.<kind>s`; imports none of them."""
    return sorted({point.name for point in _points(kind)})


def is_path(name: str) -> bool:
    """Whether a name is the path of a Python file."""
    return name.endswith(".py")


def origin(kind: str, name: str) -> str:
    """Where a plugin comes from: "a file", or its entry points and their distributions."""
    if is_path(name):
        return "a file"
    points = _points(kind, name)
    return " and ".join(_told(point) for point in points) or "built in"


def load(kind: str, name: str, built_in: Collection[str]) -> Any:
    """The module of a path, or what an entry point names; None if there is no such plugin.

    Raises PluginError for a file that is not there, a name that is taken, a failing import.
    """
    if is_path(name):
        return load_file(kind, name)
    points = _points(kind, name)
    if not points:
        return None
    if len(points) > 1 or name in built_in:
        taken = "seqbench has one of this name" if name in built_in else "two plugins share it"
        raise broken(
            kind, name, "unique-name", f"{taken}; rename the entry point or uninstall the package"
        )
    try:
        return points[0].load()
    except (Exception, SystemExit) as error:
        raise broken(kind, name, "loads", _failure(error)) from error


def load_file(kind: str, name: str) -> ModuleType:
    """The module of a Python file; the same one as long as the file stays as it is."""
    path = Path(name)
    try:
        source = path.read_bytes()
    except FileNotFoundError:
        raise PluginError(
            f"{kind} {name!r}: no such file; give a name or the path of a Python file"
        ) from None
    except OSError as error:
        raise PluginError(
            f"{kind} {name!r}: cannot be read ({os.strerror(error.errno or 0)}); "
            "give a name or the path of a Python file"
        ) from error
    place = hashlib.sha256(str(path.resolve()).encode() + b"\0" + source).hexdigest()[:16]
    key = f"seqbench_plugin_{path.stem.replace('.', '_')}_{place}"
    if key in sys.modules:
        return sys.modules[key]
    spec = importlib.util.spec_from_file_location(key, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[key] = module  # dataclasses look their module up while it runs
    try:
        exec(compile(source, str(path), "exec", dont_inherit=True), vars(module))
    except (Exception, SystemExit) as error:
        del sys.modules[key]
        raise broken(kind, name, "loads", _failure(error)) from error
    return module


def source_hash(parts: Iterable[tuple[str, str]]) -> str | None:
    """A hash of the code from elsewhere among (kind, name) parts; None where there is none.

    It covers the files that define them and, of their own package or folder, those they import.
    """
    found: dict[str, bytes] = {}
    for kind, name in parts:
        if is_path(name):
            path = Path(name).resolve()
            found |= _sources(path, path.parent, None)
        else:
            for point in _points(kind, name):
                found |= _sources_of_module(point.module)
    if not found:
        return None
    whole = hashlib.sha256()
    for place, source in sorted(found.items()):
        whole.update(f"{place}\0{len(source)}\0".encode() + source)
    return whole.hexdigest()[:16]


def one_class(kind: str, name: str, found: Any, base: type) -> Any:
    """`found`, if it is a class of that base; or the one public such class of a module."""
    wanted = f"{base.__name__} class (seqbench.{base.__module__.partition('.')[2]})"
    if not isinstance(found, ModuleType):
        if not (isinstance(found, type) and issubclass(found, base)):
            raise broken(kind, name, "one-class", f"{found!r} is no {wanted}")
        classes = [found]
    else:
        classes = classes_of(found, base)
    if len(classes) != 1:
        shown = ", ".join(c.__name__ for c in classes) or "none"
        raise broken(
            kind, name, "one-class", f"it defines exactly one public {wanted}; found {shown}"
        )
    missing = sorted(getattr(classes[0], "__abstractmethods__", ()))
    if missing:
        raise broken(
            kind, name, "one-class", f"{classes[0].__name__} does not define {', '.join(missing)}"
        )
    return classes[0]


def classes_of(module: ModuleType, base: type) -> list[type]:
    """The public classes of that base that a module defines, not those it imports."""
    return [
        value
        for name, value in vars(module).items()
        if inspect.isclass(value)
        and issubclass(value, base)
        and value.__module__ == module.__name__
        and not name.startswith("_")
    ]


def _sources_of_module(name: str) -> dict[str, bytes]:
    module, top = importlib.import_module(name), importlib.import_module(name.partition(".")[0])
    file = getattr(module, "__file__", None)
    if file is None:
        return {}
    path = Path(file).resolve()
    if hasattr(top, "__path__"):
        return _sources(path, Path(next(iter(top.__path__))).resolve().parent, top.__name__)
    return {path.name: _source(path)}  # its neighbours are other distributions


def _sources(path: Path, base: Path, top: str | None) -> dict[str, bytes]:
    """Files by their place below `base`: this one and what it imports below top, or base."""
    found: dict[str, bytes] = {}
    waiting = [path]
    while waiting:
        file = waiting.pop()
        place = file.relative_to(base).as_posix() if file.is_relative_to(base) else file.name
        if place in found or not file.is_file():
            continue
        found[place] = _source(file)
        package = list(Path(place).parent.parts)
        for name in _imported(found[place], package):
            parts = name.split(".")
            if top in (None, parts[0]):
                for end in range(1, len(parts) + 1):
                    inside = base.joinpath(*parts[:end])
                    waiting += [inside.with_suffix(".py"), inside / "__init__.py"]
    return found


def _source(path: Path) -> bytes:
    return path.read_bytes().replace(b"\r\n", b"\n")


def _imported(source: bytes, package: list[str]) -> list[str]:
    """The full names of all modules, and of what is taken from them, that a source imports."""
    names = []
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return []  # no module after all, only a file of such a name
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            start = ".".join([*above, *([node.module] if node.module else [])])
            names += [start, *(f"{start}.{alias.name}" for alias in node.names)]
    return [name for name in names if name and not name.startswith(".")]


def _points(kind: str, name: str | None = None) -> list[EntryPoint]:
    """The entry points of a kind, in the order of the path; of one name, where one is given."""
    every = _installed(kind, tuple((place, _changed(place)) for place in sys.path))
    return [point for point in every if name in (None, point.name)]


@lru_cache(maxsize=16)
def _installed(kind: str, path: tuple[tuple[str, int], ...]) -> list[EntryPoint]:
    """Looked up again where the path, or what lies in one of its folders, has changed."""
    return list(entry_points(group=f"seqbench.{kind}s"))


def _changed(place: str) -> int:
    try:
        return os.stat(place or ".").st_mtime_ns
    except OSError:
        return 0


def _told(point: EntryPoint) -> str:
    package = f" of {point.dist.name} {point.dist.version}" if point.dist is not None else ""
    return f"entry point {point.value}{package}"


def _failure(error: BaseException) -> str:
    absent = isinstance(error, ModuleNotFoundError) and not str(error.name).startswith("seqbench.")
    remedy = "; install it" if absent else ""
    text = " ".join(str(error).split())
    return f"its import fails with {type(error).__name__}: {text}{remedy}"
