"""Name -> block, layer, or whole model: by file name, entry point, or path/to/file.py, lazily.

Another package adds its own through the groups `seqbench.layers`, `seqbench.blocks` and
`seqbench.models` (a Preset, or a class of a whole model).
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from seqbench.models import plugins
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
    return sorted({*_file_names("layer"), *plugins.names("layer")})


def block_names() -> list[str]:
    """Names of the blocks, without importing them."""
    return sorted({*_file_names("block"), *plugins.names("block")})


def load_plugin(kind: str, name: str, built_in: Collection[str]) -> Any:
    """What the plugin of that name is: a module, or an entry point's object; None: there is none.

    Raises ModelError for one that cannot be loaded.
    """
    try:
        return plugins.load(kind, name, built_in)
    except plugins.PluginError as error:
        raise ModelError(str(error)) from error


def suggestion(name: str, valid: Iterable[str]) -> str:
    """ " (did you mean 'x'?)" for a close match, else nothing."""
    close = difflib.get_close_matches(name, list(valid), n=3, cutoff=0.6)
    return f" (did you mean {' or '.join(map(repr, close))}?)" if close else ""


def _find(name: str, kind: str, base: Any) -> Any:
    built_in = _file_names(kind)
    found = load_plugin(kind, name, built_in)
    if found is None and name in built_in:
        found = importlib.import_module(f"seqbench.models.{kind}s.{name.replace('-', '_')}")
    if found is None:
        valid = sorted({*built_in, *plugins.names(kind)})
        raise ModelError(
            f"unknown {kind} {name!r}{suggestion(name, valid)}; "
            f"valid: {', '.join(valid)}, or a path/to/file.py"
        )
    try:
        return plugins.one_class(kind, name, found, base)
    except plugins.PluginError as error:
        raise ModelError(str(error)) from error


def _file_names(kind: str) -> set[str]:
    files = (_HERE / f"{kind}s").glob("[!_]*.py")
    return {file.stem.replace("_", "-") for file in files}
