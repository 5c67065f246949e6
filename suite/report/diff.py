"""What two records differ in: configuration, environment, metrics and cost."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seqbench.suite.experiment import UserError
from seqbench.suite.records import Record, load, record_files, to_plain

MISSING = "(absent)"


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One value that is not the same in both records; numbers also by how much."""

    section: str  # config, environment, metrics or cost
    key: str
    a: Any
    b: Any

    @property
    def change(self) -> float | None:
        """b - a of two numbers."""
        numbers = [v for v in (self.a, self.b) if isinstance(v, int | float)]
        if len(numbers) < 2 or isinstance(self.a, bool) or isinstance(self.b, bool):
            return None
        return float(self.b) - float(self.a)


def find(results: Path, name: str) -> Record:
    """A record by its file's path, its digest or the beginning of one; UserError else."""
    if name.endswith(".json") or "/" in name:
        if not Path(name).is_file():
            raise UserError(f"record {name!r}: no such file; give a record's file or its digest")
        return load(Path(name))
    files = record_files(results)
    found = [path for path in files if path.stem.startswith(name)] if name else []
    if len(found) == 1:
        return load(found[0])
    if not found:
        raise UserError(
            f"record {name!r}: none of the {len(files)} records in {results / 'records'} begins "
            "so; give a record's file, its digest or the beginning of one, or another --results"
        )
    shown = ", ".join(path.stem for path in found[:3])
    raise UserError(
        f"record {name!r}: {len(found)} records begin so ({shown}{', ...' if found[3:] else ''}); "
        "give more of the digest"
    )


def differences(a: Record, b: Record) -> list[Difference]:
    """Everything that differs, by section; the curve is left out, as its end is in the metrics."""
    found = []
    sections = {name: (part(a), part(b)) for name, part in _SECTIONS.items()}
    for section, (left, right) in sections.items():
        for key in dict.fromkeys([*left, *right]):
            one, other = left.get(key, MISSING), right.get(key, MISSING)
            if one != other and not _both_nan(one, other):
                found.append(Difference(section=section, key=key, a=one, b=other))
    return found


def to_json(a: Record, b: Record) -> str:
    """The differences for a program."""
    plain = [{**vars(d), "change": d.change} for d in differences(a, b)]
    return json.dumps({"a": a.digest, "b": b.digest, "differences": to_plain(plain)}, indent=2)


def _config(record: Record) -> dict[str, Any]:
    flat = _flat(to_plain(record.cell))
    return {k: v for k, v in flat.items() if k != "scale_note"}


def _metrics(record: Record) -> dict[str, Any]:
    found = {
        "status": record.status,
        "error": record.error,
        "steps_done": record.steps_done,
        "solved_at": record.solved_at,
    }
    parts = {"test": record.test, "variants": record.variants, "stopped": record.stopped}
    return found | _flat(parts)


def _cost(record: Record) -> dict[str, Any]:
    return {} if record.cost is None else _flat(to_plain(record.cost))


_SECTIONS = {
    "config": _config,
    "environment": lambda record: _flat(record.environment),
    "metrics": _metrics,
    "cost": _cost,
}


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one: {"versions": {"torch": ...}} -> {"versions.torch": ...}."""
    found: dict[str, Any] = {}
    for key, inner in value.items():
        if isinstance(inner, Mapping):
            found |= _flat(inner, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = inner
    return found


def _both_nan(a: Any, b: Any) -> bool:
    return isinstance(a, float) and isinstance(b, float) and math.isnan(a) and math.isnan(b)
