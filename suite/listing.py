"""What `seqbench list` shows: tasks, models, grids and backends as plain rows."""

from __future__ import annotations

from typing import Any

from seqbench.suite import discovery

Row = dict[str, Any]


def tasks() -> list[Row]:
    """Every task with its headline metric, scales and difficulty axes."""
    rows = []
    for name in discovery.task_names():
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
    """Every named preset; block+layer is valid too."""
    from seqbench.models.build import presets

    return [{"name": name, "summary": summary} for name, summary in presets().items()]


def grids() -> list[Row]:
    """Every named grid with its docstring."""
    rows = []
    for name in discovery.grid_names():
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


def _first_line(doc: str | None) -> str:
    return (doc or "").strip().split("\n")[0]


LISTINGS = {"tasks": tasks, "models": models, "grids": grids, "backends": backends}
