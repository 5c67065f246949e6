"""What `seqbench list` shows: tasks, models, grids and backends as plain rows."""

from __future__ import annotations

from typing import Any

from seqbench.models import plugins
from seqbench.suite import discovery

Row = dict[str, Any]

# What models are measured at, and the lengths at which they say what they carry when decoding.
SIZE = {"vocab_size": 256, "d_model": 64, "num_layers": 2}
LENGTHS = (256, 1024, 4096, 16384, 65536)
_UNKNOWN: Row = {
    **dict.fromkeys(("block", "layer", "complexity", "size", "parameters")),
    "state_size": {},
}


def tasks() -> list[Row]:
    """Every task with its headline metric, scales and difficulty axes; plugins are not imported."""
    rows = []
    for name in discovery.task_names():
        if discovery.is_plugin("task", name):
            rows.append(_plugin("task", name))
            continue
        cls = discovery.task_class(name)
        rows.append(
            {
                "name": name,
                "summary": f"{_first_line(cls.__doc__)} [{cls.headline}]",
                "headline": cls.headline,
                "scales": {k: s.note for k, s in cls.scales.items()},
                "difficulty": list(cls.difficulty),
                "config": list(cls.config_fields()),
            }
        )
    return rows


def models() -> list[Row]:
    """Every named preset: its parts, and its cost at SIZE; block+layer is valid too.

    `state_size` is numbers a sequence by length, `complexity` the time to train on L tokens and to
    decode one. Plugins are not imported.
    """
    from seqbench.models.base import ModelError
    from seqbench.models.build import describe, presets

    rows: list[Row] = []
    for name, summary in presets().items():
        row = {"name": name, "summary": summary, **_UNKNOWN}
        try:
            info = describe(name, **SIZE, lengths=LENGTHS)
        except ModelError as error:  # a plugin has taken the name of a part
            row["summary"] += f" (cannot be built: {error})"
        else:
            row |= {
                "block": info.block,
                "layer": info.layer,
                "complexity": info.complexity,
                "size": SIZE,
                "parameters": info.parameters,
                "state_size": dict(info.state_size),
            }
        rows.append(row)
    rows += [_plugin("model", name) for name in plugins.names("model")]
    for part, form in (("layer", "BLOCK+{}"), ("block", "{}+LAYER")):
        rows += [_plugin(part, name, form.format(name)) for name in plugins.names(part)]
    return rows


def grids() -> list[Row]:
    """Every named grid with its docstring."""
    rows = []
    for name in discovery.grid_names():
        if discovery.is_plugin("grid", name):
            rows.append(_plugin("grid", name))
            continue
        doc = discovery.grid_module(name).__doc__ or ""
        rows.append({"name": name, "summary": _first_line(doc), "doc": doc.strip()})
    return rows


def backends() -> list[Row]:
    """Every kernel backend with the reason it refuses on this machine, if it does."""
    from seqbench.kernels import dispatch

    return [
        {
            "name": name,
            "summary": f"refuses: {reason}" if reason else "available",
            "refusal": reason,
        }
        for name, reason in dispatch.backends().items()
    ]


def _plugin(kind: str, name: str, shown: str | None = None) -> Row:
    """What is known of a plugin without importing it, in the keys of the others."""
    origin = plugins.origin(kind, name)
    row: Row = {"name": shown or name, "summary": f"plugin: {origin}", "plugin": origin}
    if kind == "task":
        row |= {"headline": None, "scales": {}, "difficulty": [], "config": []}
    elif kind != "grid":
        row |= _UNKNOWN
    return row if kind != "grid" else {**row, "doc": ""}


def _first_line(doc: str | None) -> str:
    return (doc or "").strip().split("\n")[0]


LISTINGS = {"tasks": tasks, "models": models, "grids": grids, "backends": backends}
