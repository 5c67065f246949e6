"""One HTML page with everything: tables that sort and filter, plots, provenance; no server."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from string import Template

from seqbench.suite.experiment import Cell
from seqbench.suite.records import Record, to_plain
from seqbench.suite.report.aggregate import Group, Row, rows, scale_notes, slug
from seqbench.suite.report.plots import Plot
from seqbench.suite.report.tables import (
    NOTHING,
    Column,
    Entry,
    Table,
    backends,
    devices,
    metric_label,
    metric_text,
    varying,
)


def page(
    records: Sequence[Record],
    tables: Sequence[Table],
    plots: Sequence[Plot],
    *,
    grid: str | None = None,
    cells: Sequence[Cell] | None = None,
) -> str:
    """The page, self-contained: styles, script and pictures are in it."""
    found = rows(records, cells)
    by_name = {t.name: t for t in tables}
    sections = [
        ("verdict", "Verdict", _verdicts(tables, plots)),
        ("figures", "Figures", _figures(tables, plots)),
        ("results", "Results", _results(by_name["headline"], plots)),
        ("tasks", "By task", _tasks(found, tables, plots)),
        ("cost", "Cost", _table(by_name["cost"])),
        ("paper", "Beside the paper", _table(by_name["paper"]) if "paper" in by_name else ""),
        ("failures", "Cells that are not done", _table(by_name["status"])),
        ("cells", "All cells", _table(_cells(found), tall=True, ids=True)),
        ("provenance", "Provenance", _provenance(records, found)),
    ]
    sections = [s for s in sections if s[2]]
    title = f"seqbench: {f'grid {grid}' if grid else 'all records'}"
    template = files("seqbench.suite.report").joinpath("page.html").read_text(encoding="utf-8")
    return Template(template).substitute(
        title=escape(title),
        chips=_chips(records, by_name["status"]),
        links="".join(f'<a href="#{key}">{escape(name)}</a>' for key, name, _ in sections),
        body="\n".join(
            f'<section id="{key}">\n<h2>{escape(name)}</h2>\n{content}\n</section>'
            for key, name, content in sections
        ),
    )


def _chips(records: Sequence[Record], status: Table) -> str:
    chips = []
    for scale in dict.fromkeys(r.cell.scale for r in records):
        chips.append(
            ("", "paper scale") if scale == "paper" else ("warn", f"{scale} scale: not the paper's")
        )
    done = sum(r.status == "done" for r in records)
    chips += [
        ("", _count(len({r.cell.task for r in records}), "task")),
        ("", _count(len({r.cell.model for r in records}), "model")),
        ("", f"{_count(done, 'cell')} done"),
    ]
    if status.rows:
        chips.append(("bad", f"{_count(len(status.rows), 'cell')} not done"))
    return "".join(f'<span class="chip {kind}">{escape(text)}</span>' for kind, text in chips)


def _results(headline: Table, plots: Sequence[Plot]) -> str:
    pictures = "".join(_figure(p) for p in plots if p.name == "overview")
    return _table(headline, open_notes=True) + pictures


def _verdicts(tables: Sequence[Table], plots: Sequence[Plot]) -> str:
    """Each grid's rows against its bands, as a table and, where one was drawn, as a picture."""
    parts = []
    for table in tables:
        if table.name.startswith("verdict-"):
            tall = len(table.rows) > 30
            parts.append(_table(table, titled=True, open_notes=True, tall=tall))
            parts += [_figure(p) for p in plots if p.name == table.name]
    return "\n".join(parts)


def _figures(tables: Sequence[Table], plots: Sequence[Plot]) -> str:
    """What grids declare to be drawn, each with its table."""
    parts = []
    for plot in plots:
        if plot.name.startswith("figure-"):
            parts.append(f"<h3>{escape(plot.title)}</h3>{_figure(plot)}")
            parts += [_table(t, tall=len(t.rows) > 30) for t in tables if t.name == plot.name]
    return "\n".join(parts)


def _tasks(found: Sequence[Row], tables: Sequence[Table], plots: Sequence[Plot]) -> str:
    """For every task its plots and its tables of other test sets."""
    parts = []
    digests: dict[tuple[str, str], set[str]] = {}
    notes: dict[tuple[str, str], list[Record]] = {}
    for row in found:
        key = (row.task, row.scale)
        digests.setdefault(key, set()).update(r.digest for r in row.records)
        notes.setdefault(key, []).extend(row.records)
    for (task, scale), own in digests.items():
        pictures = [
            p
            for p in plots
            if p.name != "overview"
            and not p.name.startswith(("verdict-", "figure-"))
            and own.issuperset(p.digests)
        ]
        kinds = ("variants-", "perplexity-")
        others = [t for t in tables if t.name.startswith(kinds) and own.issuperset(t.digests)]
        if not pictures and not others:
            continue
        parts.append(
            f'<h3 id="task-{slug(task, scale)}">{escape(task)}, {escape(scale)} scale</h3>'
        )
        parts.append(_notes(scale_notes(notes[task, scale])))
        parts += [_figure(p) for p in pictures]
        parts += [_table(t, titled=True) for t in others]
    return "\n".join(parts)


def _figure(plot: Plot) -> str:
    data = base64.b64encode(plot.svg).decode()
    return (
        f'<figure id="plot-{escape(plot.name)}"><img loading="lazy" alt="{escape(plot.title)}" '
        f'src="data:image/svg+xml;base64,{data}"><figcaption>{escape(plot.caption)}</figcaption>'
        "</figure>"
    )


def _table(
    table: Table,
    *,
    open_notes: bool = False,
    tall: bool = False,
    titled: bool = False,
    ids: bool = False,
) -> str:
    """A table with its notes; where each came from stands in a fold."""
    told = [n for n in table.notes if not n.startswith("Drawn from ")]
    origin = [n for n in table.notes if n.startswith("Drawn from ")]
    if not open_notes:  # the tasks' own notes stand once on the page already
        origin = [n for n in told if " scale: " in n and "not the paper's." not in n] + origin
        told = [n for n in told if n not in origin]
    title = f"<h3>{escape(table.title)}</h3>" if titled else ""
    fold = f"<details><summary>Drawn from</summary>{_notes(origin)}</details>" if origin else ""
    if not table.rows:
        return f"{title}{_notes(told)}{fold}"
    shown = list(range(len(table.columns)))
    if len(shown) > 10:  # a wide table says once what is the same in every row
        shown = varying(table)
        same = [
            f"{c.heading} {table.rows[0][i].text}"
            for i, c in enumerate(table.columns)
            if i not in shown and table.rows[0][i].text
        ]
        told = [f"In every row: {'; '.join(same)}.", *told] if same else told
    columns = [table.columns[i] for i in shown]
    heads = "".join(
        f'<th scope="col"{_class(c)}><button type="button">{escape(c.heading)}</button></th>'
        for c in columns
    )
    lines = "\n".join(
        _row([row[i] for i in shown], columns, f"cell-{row[-1].text}" if ids else None)
        for row in table.rows
    )
    return (
        f'{title}<div class="block"><div class="scroll{" tall" if tall else ""}">'
        f'<table id="table-{escape(table.name)}"><thead><tr>{heads}</tr></thead>\n'
        f"<tbody>\n{lines}\n</tbody></table></div></div>{_notes(told)}{fold}"
    )


def _row(row: Sequence[Entry], columns: Sequence[Column], own_id: str | None) -> str:
    own = f' id="{escape(own_id)}"' if own_id else ""
    cells = []
    for i, (entry, column) in enumerate(zip(row, columns, strict=True)):
        kinds = ["n"] if column.numeric else []
        kinds += ["strong"] if entry.strong else []
        kinds += ["first"] if i == 0 else []
        kinds += ["w"] if column.wide else []
        kinds += ["m"] if column.heading.endswith("metric") else []
        kinds += ["digest"] if column.heading == "cell" else []
        kinds += [f"status-{entry.text}"] if column.heading == "status" else []
        if column.heading == "verdict" and entry.text[:1] in "✓✗":
            kinds.append("good" if entry.text.startswith("✓") else "bad")
        kind = f' class="{escape(" ".join(kinds))}"' if kinds else ""
        value = f' data-v="{entry.value!r}"' if isinstance(entry.value, int | float) else ""
        detail = f" <small>{escape(entry.detail)}</small>" if entry.detail else ""
        cells.append(f"<td{kind}{value}>{escape(entry.text)}{detail}</td>")
    return f"<tr{own}>{''.join(cells)}</tr>"


def _class(column: Column) -> str:
    return ' class="n"' if column.numeric else ""


def _notes(notes: Iterable[str]) -> str:
    items = "".join(f"<li>{escape(n)}</li>" for n in notes)
    return f'<ul class="notes">{items}</ul>' if items else ""


def _cells(found: Sequence[Row]) -> Table:
    """Every record once."""
    lines = []
    for row in found:
        for group in row.groups.values():
            for record in group.records:
                lines.append(_cell(row, group, record))
    numeric = {"seed", "test", "steps", "solved at", "train s"}
    headings = (
        "task",
        "scale",
        "setting",
        "model",
        "seed",
        "status",
        "metric",
        "test",
        "steps",
        "solved at",
        "train s",
        "backend",
        "device",
        "commit",
        "cell",
    )
    return Table(
        name="cells",
        title="All cells",
        columns=tuple(Column(heading=h, numeric=h in numeric) for h in headings),
        rows=tuple(lines),
    )


def _cell(row: Row, group: Group, record: Record) -> tuple[Entry, ...]:
    metric = record.headline
    value = record.test.get(metric)
    seconds = record.cost.train_seconds if record.cost else None
    return (
        Entry(text=row.task),
        Entry(text=row.scale),
        Entry(text=row.setting),
        Entry(text=group.model),
        Entry(text=str(record.cell.seed), value=record.cell.seed),
        Entry(text=record.status),
        Entry(text=metric_label(metric, record.higher_is_better) if metric else NOTHING),
        Entry(text=NOTHING if value is None else metric_text(value, metric), value=value),
        Entry(text=str(record.steps_done), value=record.steps_done),
        Entry(
            text=NOTHING if record.solved_at is None else str(record.solved_at),
            value=record.solved_at,
        ),
        Entry(text=NOTHING if seconds is None else f"{seconds:.1f}", value=seconds),
        Entry(text=backends([record])),
        Entry(text=devices([record])),
        Entry(text=_commit(record.environment)),
        Entry(text=record.digest),
    )


def _commit(environment: Mapping[str, object]) -> str:
    commit = environment.get("commit")
    return (
        f"{str(commit)[:10]}{' + changes' if environment.get('dirty') else ''}"
        if commit
        else NOTHING
    )


def _provenance(records: Sequence[Record], found: Sequence[Row]) -> str:
    """The environments that the records name, and every group's full config."""
    environments: dict[str, list[Record]] = {}
    for record in records:
        text = json.dumps(to_plain(record.environment), indent=1, sort_keys=True)
        environments.setdefault(text, []).append(record)
    parts = ["<h3>Environments</h3>"]
    for text, members in environments.items():
        env = members[0].environment
        versions = env.get("versions")
        torch = versions.get("torch") if isinstance(versions, Mapping) else None
        facts = [
            _count(len(members), "cell"),
            f"commit {_commit(env)}",
            devices(members[:1]),
            f"backend {backends(members[:1])}",
            f"torch {torch}" if torch else "",
            f"determinism: {env['determinism']}" if "determinism" in env else "",
        ]
        summary = " · ".join(f for f in facts if f)
        parts.append(_fold(summary, text))
    parts.append("<h3>Configurations</h3>")
    for row in found:
        for group in row.groups.values():
            config = to_plain(group.records[0].cell)
            del config["seed"], config["scale_note"]
            digests = {str(r.cell.seed): r.digest for r in group.records}
            text = json.dumps({**config, "digest_by_seed": digests}, indent=1)
            seeds = _count(len(group.records), "seed")
            parts.append(_fold(f"{row.title} · {group.model} · {row.scale} scale · {seeds}", text))
    return "\n".join(parts)


def _fold(summary: str, text: str) -> str:
    return f"<details><summary>{escape(summary)}</summary><pre>{escape(text)}</pre></details>"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
