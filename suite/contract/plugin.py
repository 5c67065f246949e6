"""Which contracts a name or a path comes under, and what check-plugin finds there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from seqbench.models import plugins
from seqbench.models.base import Block, ModelError, SequenceLayer, SequenceModel
from seqbench.models.build import PRESETS, Preset, config_of
from seqbench.models.discovery import block_class, block_names, layer_class, layer_names
from seqbench.suite import discovery
from seqbench.suite.contract import Finding, grids, models, tasks
from seqbench.suite.experiment import UserError
from seqbench.tasks.base import Task


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What can be plugged in: its names, how it is loaded, and its contract."""

    names: Callable[[], list[str]]
    load: Callable[[str], Any]
    check: Callable[[str], list[Finding]]


KINDS = {
    "task": Kind(names=discovery.task_names, load=discovery.task_class, check=tasks.check),
    "grid": Kind(names=discovery.grid_names, load=discovery.grid_module, check=grids.check),
    "model": Kind(
        names=lambda: [*PRESETS, *plugins.names("model")],
        load=config_of,
        check=models.check_model,
    ),
    "layer": Kind(names=layer_names, load=layer_class, check=models.check_layer),
    "block": Kind(names=block_names, load=block_class, check=models.check_block),
}


@dataclass(frozen=True, kw_only=True)
class Report:
    """The findings on one plugin under one contract."""

    kind: str
    name: str
    origin: str
    findings: list[Finding]

    @property
    def broken(self) -> list[Finding]:
        """The rules that do not hold."""
        return [f for f in self.findings if f.status == "broken"]


def check_plugin(name: str, kind: str | None = None) -> list[Report]:
    """The contract's findings on a name or a path, one report for every kind it is a name of.

    Raises UserError for a name that nothing has, and for a file that is not there.
    """
    if kind is not None and kind not in KINDS:
        raise discovery.unknown("kind", kind, KINDS)
    kinds = [kind] if kind is not None else _kinds(name)
    return [_report(k, name) for k in kinds]


def _report(kind: str, name: str) -> Report:
    origin = plugins.origin(kind, name)
    origin = "a file" if name.endswith(discovery.YAML) else origin
    try:
        KINDS[kind].load(name)
    except (UserError, ModelError) as error:
        if str(error).startswith("unknown ") or "no such file" in str(error):
            raise
        findings = [Finding(rule="loads", status="broken", note=str(error))]
    else:
        loaded = Finding(rule="loads", status="ok", note=origin)
        findings = [loaded, *KINDS[kind].check(name)]
    return Report(kind=kind, name=name, origin=origin, findings=findings)


def _kinds(name: str) -> list[str]:
    """The kinds that have such a name; of a file, what it defines."""
    if name.endswith(discovery.YAML):
        return ["grid"]
    if plugins.is_path(name) and "+" not in name:
        return _kinds_of_file(name)
    if "+" in name and name not in PRESETS:
        return ["model"]
    found = [kind for kind, one in KINDS.items() if name in one.names()]
    if not found:
        valid = {n for one in KINDS.values() for n in one.names()}
        raise discovery.unknown("plugin", name, valid, "(or the path of a file)")
    return found


def _kinds_of_file(name: str) -> list[str]:
    try:
        module: ModuleType = plugins.load_file("plugin", name)
    except plugins.PluginError as error:
        raise UserError(str(error)) from error
    bases = {"task": Task, "model": SequenceModel, "layer": SequenceLayer, "block": Block}
    found = [kind for kind, base in bases.items() if plugins.classes_of(module, base)]
    if isinstance(getattr(module, "PRESET", None), Preset):
        found.append("model")
    if callable(getattr(module, "requests", None)):
        found.append("grid")
    if not found:
        raise UserError(
            f"plugin {name!r} (a file) breaks the rule one-class: it defines no Task, "
            "SequenceLayer, Block, SequenceModel, PRESET or requests(scale)"
        )
    return found
