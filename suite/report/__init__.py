"""Reports: tables, plots and one HTML page, drawn from the records alone. Imports no torch."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seqbench.suite.expectation import declared_files
from seqbench.suite.experiment import Cell, UserError
from seqbench.suite.records import Record, load_all, record_files, write_atomically
from seqbench.suite.report import figures, html, paper, plots, tables, verdict
from seqbench.suite.report.aggregate import rows
from seqbench.suite.report.tables import Table

__all__ = ["ReportPaths", "check", "write_report"]

MANIFEST = "tables/manifest.json"
SELECTION = "selection"  # <results>/selection/DIGEST.json: see suite/selection.py
GENERATED = "generated"  # <results>/generated/DIGEST-NAME.json: see suite/generation.py


@dataclass(frozen=True, kw_only=True)
class ReportPaths:
    """What a report wrote, and its headline table for the terminal (`tables.to_rich`)."""

    index: Path
    tables: tuple[Path, ...]
    plots: tuple[Path, ...]
    manifest: Path
    headline: Table
    status: Table
    verdicts: tuple[Table, ...]


def write_report(
    results: Path, *, grid: str | None = None, cells: Sequence[Cell] | None = None
) -> ReportPaths:
    """Draws <results>/tables, <results>/plots and <results>/index.html from the records.

    `cells` restricts the report to a grid's cells and gives its order; cells without a record are
    listed as missing. Raises UserError where there is nothing to draw or a record is not whole.
    """
    records = load_all(results)
    if cells is not None:
        wanted = {c.digest for c in cells}
        records = [r for r in records if r.digest in wanted]
    if not records:
        which = f" of grid {grid}" if grid else ""
        raise UserError(
            f"report: {results / 'records'} holds no record{which}; run it first "
            f"(seqbench run {grid or 'quickstart'}) or name another folder with --results"
        )
    ordered = tuple(r for row in rows(records, cells) for r in row.records)
    verdicts = verdict.verdicts(results, ordered, grid)
    judged = {v.name: verdict.table(v) for v in verdicts}
    declared = figures.figures(results, ordered, grid)
    shown = {f.name: figures.table(f) for f in declared}
    drawn_tables = [*_tables(ordered, cells, grid), *judged.values(), *shown.values()]
    names = {r.digest: line.row.name for v in verdicts for line in v.lines for r in line.records}
    drawn_plots = [plots.against_x(f) for f in declared]
    drawn_plots += plots.draw_all(ordered, cells, grid, names, results)
    drawn_plots += [p for v in verdicts if (p := plots.against_bands(v)) is not None]
    drawn_plots += plots.generated(ordered, results)
    page = html.page(ordered, drawn_tables, drawn_plots, grid=grid, cells=cells)

    everything = [r.digest for r in ordered]
    grids = {v.name: v.grid for v in verdicts} | {f.name: f.grid for f in declared}
    content: dict[str, tuple[bytes, Iterable[str]]] = {}
    for table in drawn_tables:
        apart = table.name.startswith(("variants-", "perplexity-")) or table.name in judged | shown
        of = table.digests if apart else everything
        content[f"tables/{table.name}.md"] = tables.markdown(table).encode(), of
        content[f"tables/{table.name}.csv"] = tables.csv_text(table).encode(), of
        content[f"tables/{table.name}.tex"] = tables.latex(table).encode(), of
    for plot in drawn_plots:
        content[f"plots/{plot.name}.png"] = plot.png, plot.digests
        content[f"plots/{plot.name}.svg"] = plot.svg, plot.digests
    content["index.html"] = page.encode(), everything

    selection = None if cells is None else sorted(wanted)
    manifest = _manifest(results, content, ordered, grid, selection, grids)
    try:
        _remove_outdated(results, content)
        for name, (data, _) in content.items():
            _put(results / name, data)
        _put(results / MANIFEST, manifest)
    except OSError as error:
        raise UserError(
            f"report: cannot write {error.filename or results} "
            f"({os.strerror(error.errno or 0)}); make {results} writable or free space there"
        ) from error
    return ReportPaths(
        index=results / "index.html",
        tables=tuple(results / n for n in content if n.startswith("tables/")),
        plots=tuple(results / n for n in content if n.startswith("plots/")),
        manifest=results / MANIFEST,
        headline=drawn_tables[0],
        status=next(t for t in drawn_tables if t.name == "status"),
        verdicts=tuple(judged.values()),
    )


def check(results: Path) -> list[str]:
    """What of the report in `results` does not match its records, a line each; empty: all does."""
    try:
        manifest = json.loads((results / MANIFEST).read_bytes())
        files, selection = dict(manifest["files"]), manifest["selection"]
        drawn = {str(k): tuple(v) for k, v in manifest["records"].items()}
    except FileNotFoundError:
        return [f"{MANIFEST}: not there: no report was drawn yet (seqbench report)"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return [f"{MANIFEST}: unreadable; draw the report again (seqbench report)"]
    there, declared = _hashes(results), _declared(results)
    if selection is not None:
        there = {d: there[d] for d in selection if d in there}
    found = []
    for name, entry in files.items():
        try:
            data = (results / name).read_bytes()
        except OSError:
            found.append(f"{name}: not there")
            continue
        if _hash(data) != entry["sha256"]:
            found.append(f"{name}: changed since it was drawn")
            continue
        if any(declared.get(g) != known for g, known in entry.get("grids", {}).items()):
            found.append(f"{name}: stale: the grid's bands changed since it was drawn")
            continue
        before, now = _of_tasks(drawn, entry["tasks"]), _of_tasks(there, entry["tasks"])
        new, gone = len(now.keys() - before.keys()), len(before.keys() - now.keys())
        changed = sum(before[d] != now[d] for d in before.keys() & now.keys())
        counts = {"new": new, "changed": changed, "gone": gone}
        if any(counts.values()):
            parts = ", ".join(f"{n} {what}" for what, n in counts.items() if n)
            found.append(f"{name}: stale: {parts} since it was drawn")
    return found


def _tables(
    records: Sequence[Record], cells: Sequence[Cell] | None, grid: str | None
) -> list[Table]:
    """All tables, the headline first; the paper's only where something corresponds."""
    made = [
        tables.headline(records, cells, grid),
        *tables.by_variant(records, cells, grid),
        *tables.perplexity(records, cells, grid),
        tables.cost(records, cells, grid),
        tables.status(records, cells, grid),
    ]
    beside = paper.beside_ours(records, cells, grid)
    return [*made, beside] if beside.rows else made


def _manifest(
    results: Path,
    content: Mapping[str, tuple[bytes, Iterable[str]]],
    records: Sequence[Record],
    grid: str | None,
    selection: Sequence[str] | None,
    grids: Mapping[str, str],
) -> bytes:
    """What was drawn from what. A file depends on every record of its tasks: `check` reads this."""
    hashes, declared = _hashes(results), _declared(results)
    there = {r.digest: hashes[r.digest] for r in records if r.digest in hashes}
    everything = sorted({task for task, _ in there.values()})
    entries = {}
    for name, (data, digests) in content.items():
        of = sorted({there[d][0] for d in digests if d in there})
        entry: dict[str, Any] = {"sha256": _hash(data), "tasks": None if of == everything else of}
        own = grids.values() if name == "index.html" else {grids.get(Path(name).stem)} - {None}
        if own:
            entry["grids"] = {str(g): declared[str(g)] for g in sorted(map(str, own))}
        entries[name] = entry
    manifest: dict[str, Any] = {
        "grid": grid,
        "selection": selection,
        "records": there,
        "files": entries,
    }
    return (json.dumps(manifest, indent=1, sort_keys=True) + "\n").encode()


def _hashes(results: Path) -> dict[str, tuple[str, str]]:
    """Digest -> the task's folder and a hash of the record's file and of what else is its own."""
    own: dict[str, bytes] = {}
    for folder in (SELECTION, GENERATED):
        for file in sorted((results / folder).glob("*.json")):
            digest = file.stem.partition("-")[0]
            own[digest] = own.get(digest, b"") + file.read_bytes()
    return {
        path.stem: (
            path.parent.parent.name,
            _hash(path.read_bytes() + own.get(path.stem, b"")),
        )
        for path in record_files(results)
    }


def _declared(results: Path) -> dict[str, str]:
    """Grid, with its scale -> a hash of the file that declares its bands."""
    return {path.stem: _hash(path.read_bytes()) for path in declared_files(results)}


def _of_tasks(
    records: Mapping[str, tuple[str, ...]], tasks: Sequence[str] | None
) -> dict[str, tuple[str, ...]]:
    return {d: v for d, v in records.items() if tasks is None or v[0] in tasks}


def _remove_outdated(results: Path, content: Mapping[str, object]) -> None:
    """Deletes what an earlier report drew and this one did not, and nothing else."""
    try:
        earlier = json.loads((results / MANIFEST).read_bytes())["files"]
        names = [str(name) for name in earlier]
    except (OSError, ValueError, KeyError, TypeError):
        return
    for name in names:
        inside = name.startswith(("tables/", "plots/")) and ".." not in name
        if inside and name not in content:
            (results / name).unlink(missing_ok=True)


def _put(path: Path, data: bytes) -> None:
    try:
        if path.read_bytes() == data:
            return
    except OSError:
        pass
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, data)


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
