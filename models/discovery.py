"""Name -> block or layer class: by file name, entry point, or path/to/file.py, lazily."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import sys
from collections.abc import Iterable
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from seqbench.models.base import Block, ModelError, SequenceLayer

_HERE = Path(__file__).parent


def layer_class(name: str) -> type[SequenceLayer]:
    """The sequence layer `name`: a file of models/layers, an entry point, or a path/to/file.py."""
    return _find(name, "layer", SequenceLayer)


def block_class(name: str) -> type[Block]:
    """The block `name`: a file of models/blocks, an entry point, or a path/to/file.py."""
    return _find(name, "block", Block)


def layer_names() -> list[str]:
    """Names of the layers, without importing them."""
    return _names("layer")


def block_names() -> list[str]:
    """Names of the blocks, without importing them."""
    return _names("block")


def suggestion(name: str, valid: Iterable[str]) -> str:
    """ " (did you mean 'x'?)" for a close match, else nothing."""
    close = difflib.get_close_matches(name, list(valid), n=3, cutoff=0.6)
    return f" (did you mean {' or '.join(map(repr, close))}?)" if close else ""


def _find(name: str, kind: str, base: Any) -> Any:
    if name.endswith(".py"):
        return _only_class(_import_file(Path(name)), kind, base)
    if name in _file_names(kind):
        module = importlib.import_module(f"seqbench.models.{kind}s.{name.replace('-', '_')}")
        return _only_class(module, kind, base)
    for entry in entry_points(group=f"seqbench.{kind}s", name=name):
        found = entry.load()
        if not (isinstance(found, type) and issubclass(found, base)):
            raise ModelError(f"entry point {entry.value!r} is not a {base.__name__} class")
        return found
    valid = _names(kind)
    raise ModelError(
        f"unknown {kind} {name!r}{suggestion(name, valid)}; "
        f"valid: {', '.join(valid)}, or a path/to/file.py"
    )


def _names(kind: str) -> list[str]:
    return sorted({*_file_names(kind), *(e.name for e in entry_points(group=f"seqbench.{kind}s"))})


def _file_names(kind: str) -> set[str]:
    files = (_HERE / f"{kind}s").glob("[!_]*.py")
    return {file.stem.replace("_", "-") for file in files}


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise ModelError(f"no file {str(path)!r}: give the path of a Python file with the class")
    name = f"seqbench_plugin_{path.resolve().as_posix().replace('/', '_')[:-3]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up while it runs
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise ModelError(
            f"{str(path)!r} fails at import: {type(error).__name__}: {error}"
        ) from error
    return module


def _only_class(module: ModuleType, kind: str, base: Any) -> Any:
    found = [
        value
        for name, value in vars(module).items()
        if isinstance(value, type)
        and issubclass(value, base)
        and value.__module__ == module.__name__
        and not name.startswith("_")
    ]
    if len(found) != 1:
        names = ", ".join(c.__name__ for c in found) or "none"
        raise ModelError(
            f"{module.__file__}: a {kind} file needs exactly one public {base.__name__} class, "
            f"has {names}"
        )
    return found[0]
