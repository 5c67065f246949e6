"""Tables from records: headline, variants, cost, status; as Markdown, CSV, LaTeX or on a terminal.

A Table is what people read; its `tidy` is the same in long form with every digit, for programs.
"""

from __future__ import annotations

import csv
import hashlib
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, get_args

from seqbench.suite.experiment import Cell
from seqbench.suite.records import Record, Status
from seqbench.suite.report.aggregate import (
    T_SEEDS,
    Estimate,
    Group,
    Row,
    best,
    device_of,
    estimate,
    is_share,
    models_of,
    rows,
    scale_notes,
    slug,
)

if TYPE_CHECKING:
    from rich.table import Table as RichTable
    from rich.text import Text

NOTHING = "–"
DIGESTS_SHOWN = 20
STATE_BYTES = 4  # of a number in a state: float32


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One cell of a table: its text, what it sorts by, whether it stands out."""

    text: str
    value: float | None = None
    strong: bool = False
    detail: str = ""  # said after the text: seeds solved, seeds failed

    @property
    def full(self) -> str:
        """Text and detail on one line."""
        return f"{self.text} ({self.detail})" if self.detail else self.text


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column's heading, and whether it holds numbers or sentences."""

    heading: str
    numeric: bool = False
    wide: bool = False


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table with its notes and the digests of the records that it was drawn from."""

    name: str  # of its files
    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Entry, ...], ...]
    notes: tuple[str, ...] = ()
    digests: tuple[str, ...] = ()
    tidy: tuple[Mapping[str, Any], ...] = field(default=(), repr=False)


def headline(
    records: Sequence[Record], cells: Sequence[Cell] | None = None, grid: str | None = None
) -> Table:
    """Tasks x models: the test headline over seeds, beside chance and baselines."""
    models = models_of(records, cells)
    found = rows(records, cells)
    settings = any(row.setting for row in found)
    columns = [
        Column(heading="task"),
        *([Column(heading="setting")] if settings else []),
        Column(heading="scale"),
        Column(heading="test metric"),
        *(Column(heading=m, numeric=True) for m in models),
        Column(heading="chance", numeric=True),
        Column(heading="baselines"),
    ]
    lines, tidy = [], []
    for row in found:
        winner, example = best(row), row.example
        metric = example.headline if example else ""
        lines.append(
            (
                Entry(text=row.task),
                *([Entry(text=row.setting)] if settings else []),
                Entry(text=row.scale),
                Entry(text=metric_label(metric, example.higher_is_better) if example else NOTHING),
                *(_score(row.groups.get(m), metric, m == winner) for m in models),
                _number(example.chance if example else None, metric),
                Entry(text=_baselines(example)),
            )
        )
        tidy += [_tidy_score(row, group) for group in row.groups.values()]
    return Table(
        name="headline",
        title=f"Test results{f' of grid {grid}' if grid else ''}",
        columns=tuple(columns),
        rows=tuple(lines),
        notes=(*scale_notes(records), *_legend(found), provenance(records)),
        digests=_digests(records),
        tidy=tuple(tidy),
    )


def by_variant(
    records: Sequence[Record], cells: Sequence[Cell] | None = None, grid: str | None = None
) -> list[Table]:
    """For each row with test variants (other lengths, say): models x variants of the headline."""
    made = []
    for row in rows(records, cells):
        labels = sorted(
            {v for r in row.records for v in (*r.variants, *r.stopped)}, key=_variant_key
        )
        example = row.example
        if example is None or not labels:
            continue
        lines, tidy = [], []
        for model, group in row.groups.items():
            scores = {v: variant_score(group, v) for v in labels}
            lines.append(
                (
                    Entry(text=model),
                    _estimated(group.score, example.headline),
                    *(_of_variant(group, v, scores[v], example.headline) for v in labels),
                )
            )
            tidy += [
                {
                    **_identity(row, group),
                    "variant": v,
                    "metric": example.headline,
                    **_tidy_estimate(s),
                    "chance": example.chance,
                    "stopped": next((r.stopped[v] for r in group.done if v in r.stopped), ""),
                    "digests": " ".join(_digests(group.records)),
                }
                for v, s in {"": group.score, **scores}.items()
            ]
        made.append(
            Table(
                name=f"variants-{row.slug}",
                title=f"{row.title}: {metric_label(example.headline, example.higher_is_better)} "
                "on other test sets",
                columns=(
                    Column(heading="model"),
                    Column(heading="test", numeric=True),
                    *(Column(heading=v, numeric=True) for v in labels),
                ),
                rows=tuple(lines),
                notes=(
                    *scale_notes(row.records),
                    f"Chance at the task's own setting: "
                    f"{_number(example.chance, example.headline).text}.",
                    *_legend([row], bold=False),
                    *_stops(row),
                    provenance(row.records),
                ),
                digests=_digests(row.records),
                tidy=tuple(tidy),
            )
        )
    return made


def perplexity(
    records: Sequence[Record], cells: Sequence[Cell] | None = None, grid: str | None = None
) -> list[Table]:
    """Where the headline counts bits: beside it perplexity a token, in all and by position."""
    together: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows(records, cells):
        together.setdefault((row.task, row.scale, row.task_setting), []).append(row)
    made = []
    for (task, scale, setting), of_task in together.items():
        example = next((row.example for row in of_task if row.example is not None), None)
        if example is None or not example.headline.startswith("bits_per_"):
            continue
        groups = [(row, g) for row in of_task for g in row.groups.values() if g.score is not None]
        settings = len({row.setting for row, _ in groups}) > 1
        by_position = [perplexity_by_position(group) for _, group in groups]
        starts = sorted({start for points in by_position for start in points})
        lines, tidy = [], []
        for (row, group), points in zip(groups, by_position, strict=True):
            whole = estimate([r.test["perplexity"] for r in group.done if "perplexity" in r.test])
            lines.append(
                (
                    Entry(text=group.model),
                    *([Entry(text=row.setting)] if settings else []),
                    _estimated(group.score, example.headline),
                    _estimated(whole, "perplexity"),
                    *(_estimated(points.get(start), "perplexity") for start in starts),
                )
            )
            everywhere: list[tuple[int | str, Estimate | None]] = [("", whole), *points.items()]
            tidy += [
                {
                    **_identity(row, group),
                    "position": at,
                    "metric": "perplexity",
                    **_tidy_estimate(value),
                    "digests": " ".join(_digests(group.records)),
                }
                for at, value in everywhere
            ]
        of = [r for row in of_task for r in row.records]
        made.append(
            Table(
                name=f"perplexity-{slug(task, scale, setting)}",
                title=f"{task}{f' ({setting})' if setting else ''}: perplexity per token ↓",
                columns=(
                    Column(heading="model"),
                    *([Column(heading="setting")] if settings else []),
                    Column(
                        heading=metric_label(example.headline, example.higher_is_better),
                        numeric=True,
                    ),
                    Column(heading="perplexity ↓", numeric=True),
                    *(Column(heading=f"from {start}", numeric=True) for start in starts),
                ),
                rows=tuple(lines),
                notes=(
                    *scale_notes(of),
                    "Perplexity is exp of the loss per token, of whatever the task's tokens are; "
                    "bits are per unit of the data, and compare between tokenisers.",
                    *(
                        ["From n: of tokens with n to 2n - 1 tokens before them in their sequence."]
                        if starts
                        else []
                    ),
                    *_legend(of_task, bold=False),
                    provenance(of),
                ),
                digests=_digests(of),
                tidy=tuple(tidy),
            )
        )
    return made


def perplexity_by_position(group: Group) -> dict[int, Estimate]:
    """First position of a bucket -> test perplexity of its tokens, over the seeds that have it."""
    starts = sorted({int(start) for r in group.done for start in r.by_position})
    found = {
        start: estimate(
            [
                math.exp(min(r.by_position[str(start)], 700.0))
                for r in group.done
                if str(start) in r.by_position
            ]
        )
        for start in starts
    }
    return {start: value for start, value in found.items() if value is not None}


def cost(
    records: Sequence[Record], cells: Sequence[Cell] | None = None, grid: str | None = None
) -> Table:
    """What every group took, means over its seeds, and where it ran."""
    found = rows(records, cells)
    settings = any(row.setting for row in found)
    numeric = (
        "parameters",
        "state bytes",
        "FLOPs/token",
        "tokens seen",
        "tokens/s",
        "peak memory",
        "train s",
        "steps",
        "solved at step",
    )
    lines, tidy = [], []
    for row in found:
        for group in row.groups.values():
            if not group.done:
                continue
            measured = _measured(group)
            lines.append(
                (
                    Entry(text=row.task),
                    *([Entry(text=row.setting)] if settings else []),
                    Entry(text=row.scale),
                    Entry(text=group.model),
                    Entry(text=str(len(group.done)), value=len(group.done)),
                    *(Entry(text=_COST_TEXT[k](v), value=v) for k, v in measured.items()),
                    Entry(text=backends(group.done)),
                    Entry(text=devices(group.done)),
                )
            )
            tidy.append(
                {
                    **_identity(row, group),
                    "seeds": len(group.done),
                    **{k.replace(" ", "_").replace("/", "_per_"): v for k, v in measured.items()},
                    "backend": backends(group.done),
                    "device": devices(group.done),
                    "digests": " ".join(_digests(group.done)),
                }
            )
    done = [r for r in records if r.has_results]
    return Table(
        name="cost",
        title=f"What it took{f' in grid {grid}' if grid else ''}",
        columns=(
            Column(heading="task"),
            *([Column(heading="setting")] if settings else []),
            Column(heading="scale"),
            Column(heading="model"),
            Column(heading="seeds", numeric=True),
            *(Column(heading=h, numeric=True) for h in numeric),
            Column(heading="backend"),
            Column(heading="device"),
        ),
        rows=tuple(lines),
        notes=(
            *scale_notes(records),
            "Means over the seeds that are done. State bytes: carried per sequence when decoding, "
            "after one training length, in float32. FLOPs: forward. Tokens/s and train s: "
            "training, evaluation left out. Timings of different devices or loads do not compare.",
            provenance(done),
        ),
        digests=_digests(done),
        tidy=tuple(tidy),
    )


def status(
    records: Sequence[Record], cells: Sequence[Cell] | None = None, grid: str | None = None
) -> Table:
    """The cells that are not done: those with the reason in their record, and those without one."""
    have = {r.digest for r in records}
    missing = [c for c in cells or () if c.digest not in have]
    bad = [r for r in records if r.status != "done"]
    lines: list[tuple[Cell, str, str, str]] = [
        (r.cell, r.digest, r.status, r.error or "no reason recorded") for r in bad
    ]
    lines += [(c, c.digest, "missing", "has no record: not run yet") for c in missing]
    counts = {s: sum(r.status == s for r in records) for s in get_args(Status)}
    total = len(records) + len(missing)
    parts = [f"{n} {s}" for s, n in {**counts, "missing": len(missing)}.items() if n]
    return Table(
        name="status",
        title=f"Cells that are not done{f' in grid {grid}' if grid else ''}",
        columns=(
            Column(heading="task"),
            Column(heading="scale"),
            Column(heading="model"),
            Column(heading="seed", numeric=True),
            Column(heading="status"),
            Column(heading="reason"),
            Column(heading="cell"),
        ),
        rows=tuple(
            (
                Entry(text=cell.task),
                Entry(text=cell.scale),
                Entry(text=cell.model),
                Entry(text=str(cell.seed), value=cell.seed),
                Entry(text=what),
                Entry(text=reason),
                Entry(text=digest),
            )
            for cell, digest, what, reason in lines
        ),
        notes=(
            f"{total} cells: {', '.join(parts)}.",
            *scale_notes(records),
            provenance(records),
        ),
        digests=_digests(records),
        tidy=tuple(
            {
                "task": cell.task,
                "scale": cell.scale,
                "model": cell.model,
                "seed": cell.seed,
                "status": what,
                "reason": reason,
                "digest": digest,
            }
            for cell, digest, what, reason in lines
        ),
    )


def variant_score(group: Group, label: str) -> Estimate | None:
    """The headline on a test variant over the seeds that have it."""
    metrics = [(r.headline, r.variants[label]) for r in group.done if label in r.variants]
    found = [values[name] for name, values in metrics if name in values]
    return estimate(found, metrics[0][0] if metrics else "")


# -- text -------------------------------------------------------------------------------------


def metric_label(metric: str, higher_is_better: bool | None = None) -> str:
    """accuracy -> "accuracy, % ↑": the unit the tables print, and where better lies."""
    arrow = "" if higher_is_better is None else " ↑" if higher_is_better else " ↓"
    unit = ", %" if is_share(metric) else ""
    return metric.replace("_", " ") + unit + arrow


def metric_text(value: float, metric: str) -> str:
    """A metric in the digits that the tables print."""
    return f"{100 * value:.1f}" if is_share(metric) else f"{value:.3f}"


def compact(value: float) -> str:
    """1234567 -> 1.23M, at most three digits."""
    if not math.isfinite(value):
        return str(value)
    units = (("Z", 1e21), ("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("K", 1e3))
    for unit, size in units:
        if abs(value) >= 0.9995 * size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def backends(records: Iterable[Record]) -> str:
    """The kernels that really ran: one name if all are the same, else kernel=name."""
    found: dict[str, set[str]] = {}
    for record in records:
        ran = record.environment.get("backends") or {}
        for kernel, name in ran.items() if isinstance(ran, Mapping) else ():
            found.setdefault(str(kernel), set()).add(str(name))
    names = {kernel: "/".join(sorted(values)) for kernel, values in sorted(found.items())}
    if len(set(names.values())) == 1:
        return next(iter(names.values()))
    return ", ".join(f"{k}={v}" for k, v in names.items()) or NOTHING


def devices(records: Iterable[Record]) -> str:
    """Where the cells ran: device, processor and threads, of every sitting."""
    found = set()
    for record in records:
        sittings: Any = record.environment.get("sittings", ())
        found |= {device_of(environment) for environment in (record.environment, *sittings)}
    return "; ".join(sorted(found)) or NOTHING


def provenance(records: Sequence[Record]) -> str:
    """Which records a table was drawn from: how many, a hash over their digests, the first few."""
    digests = _digests(records)
    if not digests:
        return "Drawn from no record."
    shown = " ".join(digests[:DIGESTS_SHOWN])
    more = len(digests) - DIGESTS_SHOWN
    rest = f" and {more} more (all in manifest.json)" if more > 0 else ""
    of = hashlib.sha256("\n".join(digests).encode()).hexdigest()[:12]
    plural = "s" if len(digests) > 1 else ""
    return f"Drawn from {len(digests)} record{plural} (sha256 {of}): {shown}{rest}."


# -- formats ----------------------------------------------------------------------------------


def markdown(table: Table) -> str:
    """The table as Markdown, with its title and notes."""
    lines = [f"# {table.title}", ""]
    if table.rows:
        lines.append("| " + " | ".join(_md(c.heading) for c in table.columns) + " |")
        lines.append("|" + "|".join("---:" if c.numeric else "---" for c in table.columns) + "|")
        for row in table.rows:
            texts = [f"**{_md(e.full)}**" if e.strong else _md(e.full) for e in row]
            lines.append("| " + " | ".join(texts) + " |")
        lines.append("")
    lines += [f"- {_md(note)}" for note in table.notes]
    return "\n".join(lines) + "\n"


def csv_text(table: Table) -> str:
    """The table in long form with raw values, one line a group."""
    names = list(dict.fromkeys(name for row in table.tidy for name in row))
    file = io.StringIO()
    writer = csv.DictWriter(file, names or ["task"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(table.tidy)
    return file.getvalue()


def latex(table: Table) -> str:
    """The table for a paper; needs booktabs."""
    spec = "".join("r" if c.numeric else "l" for c in table.columns)
    lines = [
        "% needs \\usepackage{booktabs}",
        "\\begin{table}",
        "\\centering",
        f"\\caption{{{_tex(table.title)}.}}",
        f"\\label{{tab:{table.name}}}",
        f"\\begin{{tabular}}{{{spec}}}",
        "\\toprule",
        " & ".join(_tex(c.heading) for c in table.columns) + " \\\\",
        "\\midrule",
    ]
    for row in table.rows:
        texts = [f"\\textbf{{{_tex(e.full)}}}" if e.strong else _tex(e.full) for e in row]
        lines.append(" & ".join(texts) + " \\\\")
    lines += ["\\bottomrule", "\\end{tabular}"]
    lines += [f"\\par\\footnotesize {_tex(note)}" for note in table.notes]
    lines.append("\\end{table}")
    return "\n".join(lines) + "\n"


def varying(table: Table) -> list[int]:
    """The columns but for those of words that say the same in every row."""
    return [
        i
        for i, column in enumerate(table.columns)
        if column.numeric or i == 0 or len({row[i].full for row in table.rows}) != 1
    ]


def to_rich(table: Table) -> RichTable:
    """The table as a rich renderable, narrow: columns that say the same in every row go, the metric
    stands under the task, and the notes but for the provenance become the caption."""
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    made = RichTable(
        title=Text(table.title, style="bold"),
        title_justify="left",
        caption=Text("\n".join(n for n in table.notes if not n.startswith("Drawn from "))),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    headings = [c.heading for c in table.columns]
    metric = headings.index("test metric") if "test metric" in headings else None
    shown = [i for i in varying(table) if i != metric]
    for i in shown:
        column = table.columns[i]
        made.add_column(
            Text(column.heading),
            justify="right" if column.numeric else "left",
            no_wrap=i == 0,
            min_width=max((len(row[i].text) for row in table.rows), default=0)
            if column.numeric
            else None,
        )
    for row in table.rows:
        first = row[0] if metric is None else replace(row[0], detail=row[metric].text)
        rest = [
            # A list of baselines reads best one a line.
            replace(row[i], text=row[i].text.replace(", ", "\n"))
            if headings[i] == "baselines"
            else row[i]
            for i in shown[1:]
        ]
        made.add_row(_stacked(first), *(_stacked(e) for e in rest))
    return made


# -- details ----------------------------------------------------------------------------------


def _stacked(entry: Entry) -> Text:
    from rich.text import Text

    text = Text(entry.text, style="bold" if entry.strong else "")
    return text.append(f"\n{entry.detail}", style="dim not bold") if entry.detail else text


def _score(group: Group | None, metric: str, strong: bool) -> Entry:
    if group is None:
        return Entry(text=NOTHING)
    bad = [r.status for r in group.records if r.status != "done"]
    if group.score is None:
        return Entry(text="/".join(dict.fromkeys(bad)) or NOTHING)
    entry = _estimated(group.score, metric)
    details = []
    if group.solved is not None:
        details.append(f"{group.solved[0]} of {group.solved[1]} solved")
    if bad:
        details.append(f"{len(bad)} of {len(group.records)} {'/'.join(dict.fromkeys(bad))}")
    return replace(entry, strong=strong, detail=", ".join(details))


def _estimated(score: Estimate | None, metric: str) -> Entry:
    if score is None:
        return Entry(text=NOTHING)
    return Entry(text=score_text(score, metric), value=score.mean)


def score_text(score: Estimate, metric: str) -> str:
    """The mean, and its interval: as ± its half, or by both ends where one was cut."""
    mean, half = metric_text(score.mean, metric), score.half_width
    if half is None or score.low is None or score.high is None:
        return mean
    if score.cut:
        return f"{mean} ({metric_text(score.low, metric)} to {metric_text(score.high, metric)})"
    return f"{mean} ± {metric_text(half, metric)}"


def _of_variant(group: Group, label: str, score: Estimate | None, metric: str) -> Entry:
    """The score, or that the model stopped before."""
    if score is None and any(label in r.stopped for r in group.done):
        return Entry(text="stopped")
    return _estimated(score, metric)


def _stops(row: Row) -> list[str]:
    """A note for each model that stopped: where first, and why."""
    notes = []
    for model, group in row.groups.items():
        found = {v: why for r in group.done for v, why in r.stopped.items()}
        if found:
            first = min(found, key=_variant_key)
            notes.append(f"{model} stopped at {first}: {found[first]}.")
    return notes


def _number(value: float | None, metric: str) -> Entry:
    return (
        Entry(text=NOTHING)
        if value is None
        else Entry(text=metric_text(value, metric), value=value)
    )


def _baselines(example: Record | None) -> str:
    if example is None or not example.baselines:
        return NOTHING
    texts = [f"{k} {metric_text(v, example.headline)}" for k, v in example.baselines.items()]
    return ", ".join(texts)


def _legend(found: Sequence[Row], bold: bool = True) -> list[str]:
    groups = [g for row in found for g in row.groups.values()]
    counts = {g.score.count for g in groups if g.score is not None}
    notes = []
    if counts - {1}:
        several = sorted(counts - {1})
        how = []
        if several[0] <= T_SEEDS:
            how.append("Student's t")
        if several[-1] > T_SEEDS:
            how.append(f"the percentile bootstrap above {T_SEEDS} seeds")
        seeds = "/".join(map(str, several))
        shares = any(is_share(r.headline) for g in groups for r in g.done)
        ends = ", its ends in brackets where one stops at 0 or 100 %" if shares else ""
        notes.append(f"Mean over {seeds} seeds ± half the 95 % interval ({', '.join(how)}){ends}.")
        if bold and any(best(row) for row in found):
            notes.append("Bold: best, and its interval overlaps no other's.")
    if 1 in counts:
        unmarked = ", so nothing beside it is bold" if bold else ""
        notes.append(f"A number without ± is from one seed: no interval{unmarked}.")
    if any(g.solved is not None for g in groups):
        notes.append(
            "Solved: the validation headline reached train.stop_at, where training stopped."
        )
    if any(len(row.groups) < max(len(r.groups) for r in found) for row in found):
        notes.append(f"{NOTHING} not run.")
    return notes


def _identity(row: Row, group: Group) -> dict[str, Any]:
    cell = group.records[0].cell
    return {
        "task": row.task,
        "scale": row.scale,
        "scale_note": cell.scale_note,
        "setting": row.setting,
        "model": group.model,
    }


def _tidy_score(row: Row, group: Group) -> dict[str, Any]:
    example = row.example
    solved = group.solved
    return {
        **_identity(row, group),
        "metric": example.headline if example else None,
        "higher_is_better": example.higher_is_better if example else None,
        **_tidy_estimate(group.score),
        "seeds_run": len(group.records),
        "solved": None if solved is None else solved[0],
        "chance": example.chance if example else None,
        "baselines": "; ".join(f"{k}={v!r}" for k, v in example.baselines.items())
        if example
        else "",
        "digests": " ".join(_digests(group.records)),
    }


def _tidy_estimate(score: Estimate | None) -> dict[str, Any]:
    return {
        "mean": None if score is None else score.mean,
        "low": None if score is None else score.low,
        "high": None if score is None else score.high,
        "seeds": 0 if score is None else score.count,
    }


def _measured(group: Group) -> dict[str, float | None]:
    tokens = [r.curve[-1].tokens for r in group.done if r.curve]
    solved = [r.solved_at for r in group.done if r.solved_at is not None]
    state = group.cost("state_numbers")
    return {
        "parameters": group.cost("parameters"),
        "state bytes": None if state is None else STATE_BYTES * state,
        "FLOPs/token": group.cost("flops_per_token"),
        "tokens seen": sum(tokens) / len(tokens) if tokens else None,
        "tokens/s": group.cost("tokens_per_second"),
        "peak memory": group.cost("peak_memory_bytes"),
        "train s": group.cost("train_seconds"),
        "steps": sum(r.steps_done for r in group.done) / len(group.done),
        "solved at step": sum(solved) / len(solved) if solved else None,
    }


def _count_text(value: float | None) -> str:
    return NOTHING if value is None else compact(value)


def _bytes_text(value: float | None) -> str:
    return NOTHING if value is None else f"{_bytes(value)}B"


def _bytes(value: float) -> str:
    text = compact(value)  # 600M -> 600 M
    return f"{text[:-1]} {text[-1]}" if text[-1].isalpha() else f"{text} "


def _plain_text(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.0f}"


def _seconds_text(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.3g}" if value < 999.5 else f"{value:.0f}"


_COST_TEXT = {
    "parameters": _count_text,
    "state bytes": _bytes_text,
    "FLOPs/token": _count_text,
    "tokens seen": _count_text,
    "tokens/s": _count_text,
    "peak memory": _bytes_text,
    "train s": _seconds_text,
    "steps": _plain_text,
    "solved at step": _plain_text,
}


def _digests(records: Iterable[Record]) -> tuple[str, ...]:
    return tuple(sorted({r.digest for r in records}))


def _variant_key(label: str) -> tuple[str, float, str]:
    """length=512 before length=4096."""
    key, _, value = label.partition("=")
    try:
        return key, float(value), ""
    except ValueError:
        return key, math.inf, value


def _md(text: str) -> str:
    text = " ".join(text.split())
    for character in "\\|*_`<>[]":
        text = text.replace(character, "\\" + character)
    return text


_TEX = {
    "\\": "\\textbackslash{}",
    **{c: "\\" + c for c in "&%$#_{}"},
    "~": "\\textasciitilde{}",
    "^": "\\textasciicircum{}",
    "<": "$<$",
    ">": "$>$",
    "|": "$|$",
    "±": "$\\pm$",
    "×": "$\\times$",
    "↑": "$\\uparrow$",
    "↓": "$\\downarrow$",
    "–": "--",
    "Δ": "$\\Delta$",
    "≥": "$\\geq$",
    "≤": "$\\leq$",
}


def _tex(text: str) -> str:
    return "".join(_TEX.get(c, c) for c in " ".join(text.split()))
