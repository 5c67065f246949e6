"""Plots from records: curves, score against cost and length, verdicts, and all tasks at a glance.

Colours and markers are the model's own in every plot of a report, but where a model stands in it
under several settings; the palette is Okabe & Ito's, safe for the colour-blind. A plot has a panel:
the rows of one task, scale and task setting, whose scores compare. The same records give the same
bytes.
"""

from __future__ import annotations

import io
import json
import math
import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seqbench.suite.experiment import Cell, UserError
from seqbench.suite.figures import COSTS, PaperLine
from seqbench.suite.records import Record
from seqbench.suite.report import paper
from seqbench.suite.report.aggregate import (
    CONFIDENCE,
    Estimate,
    Group,
    Row,
    is_share,
    models_of,
    rows,
    scale_notes,
    slug,
)
from seqbench.suite.report.figures import Curve, Drawn, notes
from seqbench.suite.report.tables import (
    compact,
    metric_label,
    metric_text,
    perplexity_by_position,
    score_text,
    variant_score,
)
from seqbench.suite.report.verdict import Verdict

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe & Ito (2008), without the yellow that white paper swallows.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", "--", ":", "-.")
INK = "#24292f"
MUTED = "#6e7781"
GOOD, BAD = "#116329", "#b3261e"
# A plot holds so many lines, the best ones; a report draws so many panels, every task's largest
# first, and fewer where there are thousands of records: a panel takes two seconds.
MOST_LINES = 12
MOST_PANELS = 20
MANY_RECORDS = 1000
PANELS_OF_MANY = 5
FAR = 30.0  # times our largest cost: from there on the paper's panel has its own x axis
LONGEST_NAME = 55  # characters, of a row of the overview
WIDTH = 10.0  # inches; at 100 dots per inch what a README shows
DPI = 100


@dataclass(frozen=True, kw_only=True)
class Plot:
    """A drawn plot: its file name without ending, what it shows, its bytes and its records."""

    name: str
    title: str
    caption: str
    png: bytes
    svg: bytes
    digests: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Style:
    """How a model is drawn, everywhere."""

    color: str
    marker: str
    dash: str


def draw_all(
    records: Sequence[Record],
    cells: Sequence[Cell] | None = None,
    grid: str | None = None,
    names: Mapping[str, str] | None = None,
    results: Path | None = None,
) -> Iterator[Plot]:
    """Every plot that the records allow, the overview first.

    `names`, by digest, stands for the settings where a model stands under several in one plot;
    `results` is the folder where cells leave what they select.
    """
    style = styles(models_of(records, cells))
    found = [row for row in rows(records, cells) if row.example is not None]
    everything = _panels(found, style, names or {})
    if not everything:
        return
    room = MOST_PANELS if len(records) <= MANY_RECORDS else PANELS_OF_MANY
    panels = _foremost(everything, room)
    yield overview(panels, style, grid, len(everything))
    for panel in panels:
        if any(len(r.curve) > 1 for r in panel.records):
            yield curves(panel)
        for key in _variant_keys(panel):
            yield against_variant(panel, key)
        if any(r.by_position for r in panel.records):
            yield against_position(panel)
        if len([e for e in panel.entries if e.group.score]) > 1:
            yield against_cost(panel, style)
        if results is not None and (plot := selection(panel, results)) is not None:
            yield plot


def styles(models: Sequence[str]) -> dict[str, Style]:
    """A colour, marker and dash for each model: distinct for 196 of them."""
    n = len(PALETTE)
    return {
        model: Style(
            color=PALETTE[i % n],
            marker=MARKERS[(i + i // n) % len(MARKERS)],
            dash=DASHES[i // n % len(DASHES)],
        )
        for i, model in enumerate(models)
    }


def overview(
    panels: Sequence[Panel], style: Mapping[str, Style], grid: str | None, of: int
) -> Plot:
    """One panel each: every model's test score with its interval, above chance and baselines."""
    named = [_shortened(e.label) for p in panels for e in p.shown]
    named += [name for p in panels for name, _ in _references(p.example)]
    label = 0.3 + 0.072 * max(len(name) for name in named)  # inches for the names
    scores = [
        score_text(e.group.score, p.example.headline)
        for p in panels
        for e in p.shown
        if e.group.score is not None
    ]
    number = 0.3 + 0.062 * max((len(text) for text in scores), default=5)  # and for the numbers
    columns = min(2 if label < 2.2 else 1, len(panels))
    counts = [len(p.shown) + len(_references(p.example)) for p in panels]
    most = [max(counts[i : i + columns]) for i in range(0, len(panels), columns)]
    height = 0.4 + sum(0.85 + 0.22 * n for n in most)
    title = f"Test results{f' of grid {grid}' if grid else ''}"
    with _figure(title, height, [r for panel in panels for r in panel.records]) as page:
        panel = (WIDTH - columns * (label + number)) / columns
        axes = page.grid(
            len(most),
            columns,
            wspace=(label + number) / panel,
            left=label / WIDTH,
            right=1 - number / WIDTH,
            ratios=most,
        )
        for i, (drawn, axis) in enumerate(zip(panels, axes, strict=False)):
            _overview_panel(axis, drawn, most[i // columns])
        for axis in axes[len(panels) :]:
            axis.set_axis_off()
    digests = [r.digest for p in panels for r in p.records]
    caption = f"Each model's test score, above chance and baselines (dashed); {_bars_note()}"
    cut = [p for p in panels if len(p.shown) < len(p.entries)]
    if cut:
        caption += f" Where there are more than {MOST_LINES}, the best {MOST_LINES}."
    if of > len(panels):
        caption += f" {len(panels)} of {of} settings, of every task those with most models first;"
        caption += " the tables have all."
    return page.plot("overview", caption, digests)


def curves(panel: Panel) -> Plot:
    """The validation headline against steps and against seconds of training, one line a model."""
    example = panel.example
    scale = _scale_of(example.headline)
    title = f"{panel.title}: validation while training"
    lines = [(e, line) for e in panel.shown if (line := _curve(e.group)) is not None]
    names = [f"{e.label} ({n.seeds} seeds)" if n.seeds > 1 else e.label for e, n in lines]
    with _figure(title, 3.7, panel.records, names) as page:
        axes = page.grid(1, 2)
        for (entry, line), name in zip(lines, names, strict=True):
            mean, low, high = (
                [scale * v for v in values] for values in (line.mean, line.low, line.high)
            )
            for axis, xs in zip(axes, (line.steps, line.seconds), strict=True):
                s = entry.style
                marker = s.marker if len(xs) <= 30 else ""
                axis.plot(
                    xs,
                    mean,
                    color=s.color,
                    linestyle=s.dash,
                    label=name,
                    marker=marker,
                    markersize=4.5,
                )
                if line.seeds > 1:
                    axis.fill_between(xs, low, high, color=s.color, alpha=0.18, linewidth=0)
        for axis, heading in zip(axes, ("training step", "seconds of training"), strict=True):
            axis.set_xlabel(heading)
            axis.set_ylabel(metric_label(example.headline, example.higher_is_better))
            axis.set_xlim(left=0)
            _reference_lines(axis, _references(example))
        page.legend(axes[0])
    caption = (
        "Validation headline against steps and against training seconds (evaluation left out). "
        "Line: mean over seeds; band: the lowest to the highest seed; a seed that stopped early "
        f"keeps its last value.{panel.cut}"
    )
    return page.plot(f"curves-{panel.slug}", caption, [r.digest for r in panel.records])


def against_variant(panel: Panel, key: str) -> Plot:
    """The test headline against a numeric test variant, the length above all.

    Beside ours, hollow and dashed, the paper's series at other test lengths where there is one.
    """
    example = panel.example
    scale = _scale_of(example.headline)
    trained = example.cell.task_config.get(key)
    name = {"length": "test length (tokens)"}.get(key, key.replace("_", " "))
    title = f"{panel.title}: test score against {key.replace('_', ' ')}"
    theirs = _papers(panel, key)
    labels = [e.label for e in panel.shown] + [f"paper: {s.name}" for s, _ in theirs]
    stopped = False
    with _figure(title, 4.4, panel.records, labels) as page:
        (axis,) = page.grid(1, 1)
        values: set[float] = set()
        for entry in panel.shown:
            points = dict(_variant_points(entry.group, key))
            if isinstance(trained, int | float) and trained not in points and entry.group.score:
                points[float(trained)] = entry.group.score
            xs = sorted(points)
            values |= set(xs)
            scores = [points[x] for x in xs]
            _line_with_bars(axis, xs, scores, scale, entry.style, entry.label)
            ends = [n for r in entry.group.done for v in r.stopped if (n := _at(v, key))]
            if ends and xs and min(ends) > xs[-1]:
                stopped = True
                axis.plot(
                    [xs[-1]],
                    [scale * scores[-1].mean],
                    marker="x",
                    markersize=13,
                    markeredgewidth=2,
                    color=entry.style.color,
                    zorder=4,
                )
        for series, s in theirs:
            at = {x: v for x, v in series.values.items() if not math.isnan(v)}
            values |= set(map(float, at))
            axis.plot(
                list(at),
                [scale * v for v in at.values()],
                color=s.color,
                marker=s.marker,
                markerfacecolor="white",
                markersize=5.5,
                linestyle=(0, (4, 2)),
                linewidth=1.1,
                alpha=0.75,
                label=f"paper: {series.name}",
                zorder=1.8,
            )
        if min(values) > 0:
            axis.set_xscale("log", base=2)
        _ticks(axis, sorted(values))
        axis.set_xlabel(name)
        axis.set_ylabel(metric_label(example.headline, example.higher_is_better))
        if is_share(example.headline):
            axis.set_ylim(-3, 104)
        known = _references(example)[:1] if example.chance is not None else []
        _reference_lines(axis, known, left=True)
        if isinstance(trained, int | float):
            axis.axvline(float(trained), color=MUTED, linewidth=1, linestyle=(0, (1, 2)))
            axis.annotate(
                f"trained at {trained}",
                (float(trained), 1.0),
                xycoords=("data", "axes fraction"),
                xytext=(4, 3),
                textcoords="offset points",
                color=MUTED,
                fontsize=8.5,
            )
        page.legend(axis)
    caption = f"Test headline on other values of {key}; {_bars_note()}{panel.cut}"
    if stopped:
        caption += " ×: a model stopped there; the table says why."
    if theirs:
        sources = ", ".join(dict.fromkeys(s.source for s, _ in theirs))
        caption += f" Hollow and dashed: the paper's own numbers ({sources}; {series.setting})."
    return page.plot(f"{slug(key)}-{panel.slug}", caption, [r.digest for r in panel.records])


def against_position(panel: Panel) -> Plot:
    """Test perplexity a token against the tokens before it in its sequence: what context is worth.

    A bucket of positions stands at its first; buckets double.
    """
    title = f"{panel.title}: perplexity by position"
    found = [(e, p) for e in panel.shown if (p := perplexity_by_position(e.group))]
    with _figure(title, 4.2, panel.records, [e.label for e, _ in found]) as page:
        (axis,) = page.grid(1, 1)
        starts = sorted({start for _, points in found for start in points})
        for entry, points in found:
            xs = [max(float(start), 0.5) for start in points]  # none before: left of 1
            _line_with_bars(axis, xs, list(points.values()), 1.0, entry.style, entry.label)
        axis.set_xscale("log", base=2)
        axis.set_xticks([max(n, 0.5) for n in starts], [_binary(n) for n in starts])
        axis.set_xticks([], minor=True)
        _log_height(axis)
        axis.set_xlabel("tokens before it in the sequence, from here to twice as many")
        axis.set_ylabel("perplexity per token ↓")
        page.legend(axis)
    caption = (
        "exp of the mean test loss of the tokens in each bucket of positions; "
        f"{_bars_note()}{panel.cut}"
    )
    return page.plot(f"position-{panel.slug}", caption, [r.digest for r in panel.records])


def against_cost(panel: Panel, style: Mapping[str, Style]) -> Plot:
    """The test headline against training seconds, parameters, FLOPs; with the Pareto front."""
    example = panel.example
    scale = _scale_of(example.headline)
    title = f"{panel.title}: score against size and cost"
    costs = {
        "train_seconds": "seconds of training",
        "parameters": "parameters",
        "flops_per_token": "FLOPs per token",
    }
    # Each setting is a point of its own; too many of them are a line for each model.
    by_model = len(panel.entries) > MOST_LINES
    lines: dict[str, list[Entry]] = {}
    for entry in panel.entries:
        lines.setdefault(entry.group.model if by_model else entry.label, []).append(entry)
    with _figure(title, 3.9, panel.records, ["Pareto front", *lines]) as page:
        axes = page.grid(1, 3)
        for axis, (cost, heading) in zip(axes, costs.items(), strict=True):
            points: list[tuple[float, float]] = []
            for name, entries in lines.items():
                found = [
                    (x, e.group.score)
                    for e in entries
                    if e.group.score is not None and (x := e.group.cost(cost)) is not None
                ]
                if not found:
                    continue
                found.sort(key=lambda p: p[0])
                s = replace(style[name] if by_model else entries[0].style, dash="")
                if not by_model:
                    xs, scores = [p[0] for p in found], [p[1] for p in found]
                    _line_with_bars(axis, xs, scores, scale, s, name)
                else:
                    axis.plot(
                        [p[0] for p in found],
                        [scale * p[1].mean for p in found],
                        color=s.color,
                        marker=s.marker,
                        markersize=4.5,
                        linestyle="none",
                        label=name,
                    )
                points += [(x, scale * score.mean) for x, score in found]
            axis.set_xscale("log")
            _log_ticks(axis, [p[0] for p in points])
            front = pareto(points, example.higher_is_better)
            front.append((axis.get_xlim()[1], front[-1][1]))
            axis.plot(
                [p[0] for p in front],
                [p[1] for p in front],
                drawstyle="steps-post",
                color=MUTED,
                linewidth=1.2,
                zorder=1,
                label="Pareto front",
            )
            axis.set_xlabel(heading)
            if axis is axes[0]:  # the others say the same
                axis.set_ylabel(metric_label(example.headline, example.higher_is_better))
            means = [p[1] for p in points]
            near = _limits(example, means, [value for _, value in _references(example)])
            shown = [(n, v) for n, v in _references(example) if near[0] <= v <= near[1]]
            _reference_lines(axis, shown)
        page.legend(axes[0])
    caption = (
        f"Test headline against cost; {_bars_note()} Grey steps: the Pareto front, where no model "
        "is both cheaper and better. Chance and baselines are left out where they lie far off."
    )
    if by_model:
        caption += f" A mark is one of {len(panel.entries)} settings, without its interval."
    return page.plot(f"cost-{panel.slug}", caption, [r.digest for r in panel.records])


def against_x(drawn: Drawn) -> Plot:
    """A figure that a grid declares: its lines against a setting or a cost, the paper's beside.

    The paper's series stand hollow and dashed in the same panel, or in one of their own where they
    are of another metric or would squeeze ours to a third of the height: above the same x, but for
    costs that lie far from ours. A figure with power laws is logarithmic in both.
    """
    figure, records = drawn.figure, drawn.records
    style = styles([line.name for line in figure.lines])
    lone = styles([*style, *(line.name for line in figure.paper)])
    theirs = [(line, style.get(line.beside, lone[line.name])) for line in figure.paper]
    same = [p for p in theirs if (p[0].metric or figure.metric) == figure.metric]
    scale = _scale_of(figure.metric)
    ends = [y for c in drawn.curves for p in c.points for _, y in p.seeds]
    low, high = min(ends), max(ends)
    of_theirs = [y for line, _ in same for _, y in line.points]
    room = max([high, *of_theirs]) - min([low, *of_theirs])
    if len(same) < len(theirs) or 3 * (high - low) < room:
        same = []
    apart = [p for p in theirs if p not in same]
    labels = [c.name for c in drawn.curves] + [f"paper: {line.name}" for line, _ in theirs]
    on = f", on {figure.variant}" if figure.variant else ""
    with _figure(f"{figure.title}{on}", 7.0 if apart else 4.6, records, labels) as page:
        axes = page.grid(2 if apart else 1, 1, gap=0.55)
        axis = axes[0]
        for curve in drawn.curves:
            xs = [p.x for p in curve.points]
            scores = [p.score for p in curve.points]
            _line_with_bars(axis, xs, scores, scale, style[curve.name], curve.name)
            if figure.fit:
                _law(axis, curve, scale, style[curve.name])
        for line, s in same:
            _paper_line(axis, line, scale, s)
        for line, s in apart:
            _paper_line(axes[1], line, _scale_of(line.metric or figure.metric), s)
        ours = [p.x for c in drawn.curves for p in c.points]
        values = [*ours, *(x for line, _ in theirs for x, _ in line.points)]
        beyond = [x for line, _ in apart for x, _ in line.points]
        far = bool(beyond) and min(beyond) > FAR * max(ours)
        for panel in axes:
            if figure.fit:
                _log_height(panel)
            if figure.x in COSTS:
                panel.set_xscale("log")
                _log_ticks(panel, values if not far else ours if panel is axis else beyond)
            elif min(values) > 0:
                panel.set_xscale("log", base=2)
                _ticks(panel, _apart(values))
                panel.set_xlim(min(values) / 1.25, max(values) * 1.25)
        example = records[0]
        higher = example.higher_is_better if figure.metric == example.headline else None
        axis.set_ylabel(metric_label(figure.metric, higher))
        if figure.metric == example.headline:
            near = axis.get_ylim()  # a reference may double the panel, not more
            known = [
                (n, v)
                for n, v in _references(example)
                if 2 * near[0] - near[1] <= v <= 2 * near[1] - near[0]
            ]
            _reference_lines(axis, known)
        if apart:
            metrics = dict.fromkeys(line.metric or figure.metric for line, _ in apart)
            axes[1].set_ylabel("; ".join(metric_label(m) for m in metrics))
            axes[1].set_title(
                "The paper's, of its own scale and data", fontsize=9.5, loc="left", pad=4
            )
        axes[-1].set_xlabel(drawn.label)
        page.legend(*axes)
    caption = f"Test score against {drawn.label}{on}; {_bars_note()}"
    if theirs:
        caption += " Hollow and dashed: the paper's own."
    caption = " ".join([caption, *notes(drawn)])
    return page.plot(drawn.name, caption, [r.digest for r in records])


def against_bands(verdict: Verdict) -> Plot | None:
    """Our seeds and median of every row beside its band and the paper's number.

    None where the rows are of test variants (those lie on the plot against length), too many, or
    all without results.
    """
    lines = [line for line in verdict.lines if not line.row.variant]
    if len(lines) > 40 or len({line.row.metric for line in lines}) > 1:
        return None
    if not any(line.values for line in lines):
        return None
    metric = lines[0].row.metric
    scale = _scale_of(metric)
    records = [r for line in lines for r in line.records]
    labels = ["a seed", "our median", "band", "paper (its own scale)"]
    with _figure(f"{verdict.title}: verdict", 1.0 + 0.3 * len(lines), records, labels) as page:
        widest = max(len(line.row.name) for line in lines)
        left = min(0.4, (0.3 + 0.075 * widest) / WIDTH)
        (axis,) = page.grid(1, 1, left=left, right=0.84)
        numbers = [scale * v for line in lines for v in line.values]
        papers = {
            i: scale * line.row.paper
            for i, line in enumerate(lines)
            if isinstance(line.row.paper, float)
        }
        bands = [e for line in lines for e in (line.row.low, line.row.high)]
        ends = [scale * e for e in bands if e is not None]
        low, high = _frame([*numbers, *papers.values(), *ends], 0.08)
        if is_share(metric):
            low, high = -4.0, 104.0
        axis.set_xlim(low, high)
        for y, line in enumerate(lines):
            s = Style(color={"inside": GOOD}.get(line.verdict, BAD), marker="o", dash="-")
            if not line.banded:
                s = replace(s, color=INK)
            else:
                start = low if line.row.low is None else scale * line.row.low
                end = high if line.row.high is None else scale * line.row.high
                axis.barh(
                    [y], [end - start], left=[start], height=0.72, color="#cfe3f5", label="band"
                )
            axis.plot(
                [scale * v for v in line.values],
                [y] * len(line.values),
                marker="o",
                markersize=4,
                linestyle="none",
                color=INK,
                alpha=0.55,
                label="a seed",
            )
            if line.median is None:
                _beside(axis, y, line.verdict, MUTED)
            else:
                axis.plot(
                    [scale * line.median],
                    [y],
                    marker="|",
                    markersize=15,
                    markeredgewidth=3,
                    linestyle="none",
                    color=s.color,
                    label="our median",
                )
                _beside(axis, y, f"{metric_text(line.median, metric)}  {line.verdict}", s.color)
            if y in papers:
                axis.plot(
                    [papers[y]],
                    [y],
                    marker="D",
                    markersize=6,
                    markerfacecolor="none",
                    markeredgecolor=PALETTE[1],
                    linestyle="none",
                    label="paper (its own scale)",
                )
        axis.set_yticks(range(len(lines)), [line.row.name for line in lines])
        axis.set_ylim(len(lines) - 0.4, -0.6)
        axis.grid(visible=False, axis="y")
        higher = records[0].higher_is_better if records[0].headline == metric else None
        axis.set_xlabel(metric_label(metric, higher))
        page.legend(axis)
    caption = (
        "Blue: the band that the grid declares for our median over seeds. Hollow: the paper's own "
        "number, of its scale, data and code; no part of the verdict."
    )
    return page.plot(verdict.name, caption, [r.digest for r in records])


def selection(panel: Panel, results: Path) -> Plot | None:
    """What models select of a test sequence: Δ along it, and which answer reads which position.

    A column for each of up to two models that left a file, mamba first; None without such.
    """
    found = [(e, f) for e in panel.entries if (f := _selection_of(e.group, results)) is not None]
    found.sort(key=lambda p: (p[0].group.model != "mamba", p[0].group.model != "mamba+s4"))
    found = found[:2]
    if not found:
        return None
    depth = max(len(f["layers"]) for _, f in found)
    records = [r for e, f in found for r in e.group.done if r.digest == f["digest"]]
    title = f"{panel.title}: what is selected of one test sequence"
    labels = ["data token", "noise", "marker", "the position to read"]
    with _figure(title, 0.6 + 3.3 * depth, records, labels) as page:
        ratios = [1.0, 1.6] * depth
        axes = page.grid(2 * depth, len(found), wspace=0.16, ratios=ratios, gap=0.5, above=0.1)
        for column, (entry, file) in enumerate(found):
            kinds = _kinds(file)
            for i, layer in enumerate(file["layers"]):
                top, bottom = (
                    axes[2 * i * len(found) + column],
                    axes[(2 * i + 1) * len(found) + column],
                )
                _delta_panel(top, layer["delta"], kinds)
                name = f"{entry.label}, layer {i + 1}: Δ, mean over the channels"
                top.set_title(name, fontsize=9.5, fontweight="bold", loc="left", pad=4)
                _reads_panel(bottom, layer["reads"], file, kinds)
                if i + 1 == depth:
                    bottom.set_xlabel("position")
                if column == 0:
                    bottom.set_ylabel("answer")
        page.legend(axes[0], axes[len(found)])
    said = "; ".join(
        f"{e.label}: {sum(p == t for p, t in zip(f['predicted'], f['targets'], strict=True))} of "
        f"{len(f['targets'])} answers right"
        for e, f in found
    )
    caption = (
        "Top: the step size Δ at each position of the first test sequence: constant where it is "
        "not selective. Below: the layer's recurrence unrolled into its matrix, mean size over "
        "the channels, every row over its own largest: dark where an answer (row) reads an input "
        "(column); circles: the token to recall, whose trace a block's short convolution moves up "
        f"to three positions on. First seed. {said}."
    )
    return page.plot(f"selection-{panel.slug}", caption, [r.digest for r in records])


def generated(records: Sequence[Record], results: Path) -> list[Plot]:
    """The mel spectrograms of what cells of piano generated; see suite/generation.py."""
    by_digest = {r.digest: r for r in records}
    made = []
    for path in sorted((results / "generated").glob("*.json")):
        record = by_digest.get(path.stem.partition("-")[0])
        if record is not None:
            try:
                made.append(_spectrogram(path.stem, json.loads(path.read_bytes()), record))
            except (ValueError, KeyError, TypeError):
                raise UserError(
                    f"{path}: no generation; delete the file and make it again: seqbench generate "
                    f"{record.digest}"
                ) from None
    return made


def _spectrogram(name: str, said: Mapping[str, Any], record: Record) -> Plot:
    cell = record.cell
    prompt = said["prompt_tokens"] / said["rate"]
    title = f"Sound of {cell.model}, trained at {said['length_trained_at']} samples"
    title += f": {said['seconds']:.1f} s, " + (
        f"the first {prompt:.1f} s given" if prompt else "from nothing"
    )
    with _figure(title, 3.6, [record]) as page:
        (axis,) = page.grid(1, 1)
        bands = len(said["mel"][0])
        image = axis.imshow(
            [[frame[band] for frame in said["mel"]] for band in range(bands)],
            origin="lower",
            aspect="auto",
            cmap="magma",
            vmax=0,
            interpolation="nearest",
            extent=(0, said["seconds"], -0.5, bands - 0.5),
        )
        ticks = [hertz for hertz in (100, 250, 500, 1000, 2000, 4000) if hertz < said["rate"] / 2]
        axis.set_yticks(
            [_band(hertz, bands, said["rate"]) for hertz in ticks], [f"{h:g} Hz" for h in ticks]
        )
        axis.set_xlabel("seconds")
        axis.grid(visible=False)
        if prompt:
            axis.axvline(prompt, color="white", linewidth=1.2, linestyle=(0, (4, 2)))
        page.figure.colorbar(image, ax=axis, label="dB below the loudest", pad=0.01)
    sampling = said["sampling"]
    how = f"temperature {sampling['temperature']:g}, seed {sampling['seed']}"
    how += f", top-k {sampling['top_k']}" if sampling["top_k"] else ""
    how += f", top-p {sampling['top_p']:g}" if sampling["top_p"] < 1 else ""
    caption = (
        f"Mel spectrogram of what cell {record.digest} says, sample by sample by its recurrent "
        f"steps ({how}); {said['rms_dbfs']:.1f} dBFS, peak {said['peak']:.2f}."
    )
    if prompt:
        caption += " Left of the dashed line: the recording that it went on from."
    return page.plot(f"generated-{name}", caption, [record.digest])


def _band(hertz: float, bands: int, rate: int) -> float:
    """Where a frequency lies among the mel bands, which begin at 30 Hz: HTK's scale."""

    def mel(f: float) -> float:
        return 2595 * math.log10(1 + f / 700)

    return (mel(hertz) - mel(30)) / (mel(rate / 2) - mel(30)) * (bands + 1) - 1


def pareto(
    points: Sequence[tuple[float, float]], higher_is_better: bool
) -> list[tuple[float, float]]:
    """The points (cost, score) that no other beats in both, by rising cost."""
    sign = 1 if higher_is_better else -1
    front: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda p: (p[0], -sign * p[1])):
        if not front or sign * y > sign * front[-1][1]:
            front.append((x, y))
    return front


# -- what is drawn ----------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A model under one setting in a panel, as it is named and drawn there."""

    label: str
    group: Group
    style: Style


@dataclass(frozen=True, kw_only=True)
class Panel:
    """The rows of one task, scale and task setting: their scores compare."""

    rows: tuple[Row, ...]
    entries: tuple[Entry, ...]

    @property
    def example(self) -> Record:
        """A record that is done: its headline, chance and baselines are the whole panel's."""
        return next(row.example for row in self.rows if row.example is not None)

    @cached_property
    def records(self) -> list[Record]:
        return [r for row in self.rows for r in row.records]

    @cached_property
    def shown(self) -> list[Entry]:
        """The entries that a plot has room for: the best ones, in the panel's order."""
        if len(self.entries) <= MOST_LINES:
            return list(self.entries)
        sign = 1 if self.example.higher_is_better else -1
        best = sorted(
            (e for e in self.entries if e.group.score is not None),
            key=lambda e: -sign * e.group.score.mean if e.group.score else 0.0,
        )[:MOST_LINES]
        return [e for e in self.entries if e in best]

    @property
    def cut(self) -> str:
        """What a caption says of entries left out."""
        if len(self.shown) == len(self.entries):
            return ""
        return f" The best {len(self.shown)} of {len(self.entries)}; the tables have all."

    @property
    def title(self) -> str:
        first = self.rows[0]
        setting = first.task_setting.replace("task.", "")
        return f"{first.task} ({setting})" if setting else first.task

    @property
    def slug(self) -> str:
        first = self.rows[0]
        return slug(first.task, first.scale, first.task_setting)


@dataclass(frozen=True, kw_only=True)
class _Curve:
    steps: list[float]
    seconds: list[float]
    mean: list[float]
    low: list[float]
    high: list[float]
    seeds: int


def _curve(group: Group) -> _Curve | None:
    """The validation headline over seeds at every step that any of them validated."""
    runs = [(r.headline, r.curve) for r in group.done if r.curve]
    if not runs:
        return None
    steps = sorted({float(p.step) for _, curve in runs for p in curve})
    values: list[list[float]] = [[] for _ in steps]
    seconds: list[list[float]] = [[] for _ in steps]
    for name, curve in runs:
        at = 0
        for i, step in enumerate(steps):
            while at + 1 < len(curve) and curve[at + 1].step <= step:
                at += 1
            if curve[at].step <= step:
                values[i].append(curve[at].validation.get(name, math.nan))
                seconds[i].append(curve[at].seconds)
    return _Curve(
        steps=steps,
        seconds=[sum(s) / len(s) for s in seconds],
        mean=[sum(v) / len(v) for v in values],
        low=[min(v) for v in values],
        high=[max(v) for v in values],
        seeds=len(runs),
    )


def _selection_of(group: Group, results: Path) -> dict[str, Any] | None:
    """The file of the first seed that left one; see suite/selection.py."""
    for record in group.done:
        path = results / "selection" / f"{record.digest}.json"
        if path.exists():
            try:
                found: dict[str, Any] = json.loads(path.read_bytes())
            except ValueError:
                raise UserError(
                    f"{path}: no JSON; delete the file and make it again: seqbench select"
                ) from None
            return found
    return None


def _kinds(file: Mapping[str, Any]) -> dict[str, list[int]]:
    """The positions of data, noise and markers: what is asked for is the data."""
    tokens, answers = file["tokens"], set(file["answers"])
    noise = Counter(t for i, t in enumerate(tokens) if i not in answers).most_common(1)[0][0]
    at = range(len(tokens))
    return {
        "data token": [i for i in at if i not in answers and tokens[i] != noise],
        "noise": [i for i in at if i not in answers and tokens[i] == noise],
        "marker": sorted(answers),
    }


_KIND_COLORS = {"noise": "#b6bec7", "data token": PALETTE[1], "marker": PALETTE[0]}


def _delta_panel(axis: Axes, delta: Sequence[float], kinds: Mapping[str, Sequence[int]]) -> None:
    for kind, color in _KIND_COLORS.items():
        places = kinds[kind]
        axis.vlines(places, 0, [delta[i] for i in places], color=color, linewidth=0.9)
        axis.plot(
            places,
            [delta[i] for i in places],
            marker="o",
            markersize=3,
            linestyle="none",
            color=color,
            label=kind,
        )
    axis.set_xlim(-1, len(delta))
    axis.set_ylim(0, 1.12 * max(delta))
    axis.tick_params(labelbottom=False)


def _reads_panel(
    axis: Axes,
    reads: Sequence[Sequence[int]],
    file: Mapping[str, Any],
    kinds: Mapping[str, Sequence[int]],
) -> None:
    length = len(file["tokens"])
    axis.imshow(
        [[v / max(1, *row) for v in row] for row in reads],
        aspect="auto",
        cmap="Greys",
        vmin=0,
        vmax=1,
        interpolation="nearest",
        extent=(-0.5, length - 0.5, len(reads) + 0.5, 0.5),
    )
    wanted = kinds["data token"][: len(reads)]
    axis.plot(
        wanted,
        range(1, len(wanted) + 1),
        marker="o",
        markersize=6,
        markerfacecolor="none",
        markeredgecolor=PALETTE[1],
        markeredgewidth=0.9,
        linestyle="none",
        label="the position to read",
    )
    axis.set_xlim(-1, length)
    axis.grid(visible=False)


def _overview_panel(axis: Axes, panel: Panel, most: int) -> None:
    example, shown = panel.example, panel.shown
    scale = _scale_of(example.headline)
    references = _references(example)
    names = [*(_shortened(e.label) for e in shown), *(name for name, _ in references)]
    means = [scale * e.group.score.mean for e in shown if e.group.score is not None]
    low, high = _limits(example, means, [value for _, value in references])
    axis.set_xlim(low, high)
    for y, entry in enumerate(shown):
        score, s = entry.group.score, entry.style
        if score is None:
            statuses = "/".join(sorted({r.status for r in entry.group.records}))
            _beside(axis, y, statuses, MUTED)
            continue
        axis.errorbar(
            [scale * score.mean],
            [y],
            xerr=_errors([score], scale),
            color=s.color,
            marker=s.marker,
            markersize=7,
            capsize=3,
            linestyle="none",
            zorder=3,
        )
        text = score_text(score, example.headline)
        _beside(axis, y, text, s.color)
    for y, (_, value) in enumerate(references, len(shown)):
        _beside(axis, y, f"{value:.1f}" if is_share(example.headline) else f"{value:.3f}", MUTED)
        if low <= value <= high:
            axis.plot([value, value], [-0.6, y], color=MUTED, linewidth=1, linestyle=(0, (4, 2)))
            axis.plot([value], [y], marker="|", markersize=8, color=MUTED)
        else:  # beyond the panel, which would else squeeze the models together
            axis.plot(
                [1.0 if value > high else 0.0],
                [y],
                marker=">" if value > high else "<",
                transform=axis.get_yaxis_transform(),
                color=MUTED,
                markersize=6,
                clip_on=False,
            )
    axis.set_yticks(range(len(names)), names)
    for tick in axis.get_yticklabels()[len(shown) :]:
        tick.set_color(MUTED)
    axis.set_ylim(most - 0.4, -0.6)
    axis.grid(visible=False, axis="y")
    axis.set_title(panel.title, fontsize=10, fontweight="bold", loc="left", pad=6)
    axis.set_xlabel(metric_label(example.headline, example.higher_is_better), fontsize=9)


def _shortened(name: str) -> str:
    """With its middle left out, if there is no room for all of it."""
    return name if len(name) <= LONGEST_NAME else f"{name[:34]} … {name[-18:]}"


def _limits(
    example: Record, means: Sequence[float], references: Sequence[float]
) -> tuple[float, float]:
    """The span of a panel: the models, and every reference that leaves them an eighth of it."""
    if is_share(example.headline):
        return -4.0, 104.0
    low, high = _frame(means, 0.0)
    widest = 8 * max(high - low, 0.05 * abs(high))
    for value in sorted(references, key=lambda v: max(low - v, v - high)):
        if max(high, value) - min(low, value) <= widest:
            low, high = min(low, value), max(high, value)
    return _frame([low, high], 0.1)


def _beside(axis: Axes, y: float, text: str, color: str) -> None:
    axis.annotate(
        text,
        (1.0, y),
        xycoords=("axes fraction", "data"),
        xytext=(8, 0),
        textcoords="offset points",
        va="center",
        fontsize=8.5,
        color=color,
        annotation_clip=False,
    )


def _references(example: Record | None) -> list[tuple[str, float]]:
    """Chance and baselines in the unit that is drawn."""
    if example is None:
        return []
    scale = _scale_of(example.headline)
    found = [] if example.chance is None else [("chance", scale * example.chance)]
    return found + [(name, scale * value) for name, value in example.baselines.items()]


def _reference_lines(
    axis: Axes, references: Sequence[tuple[str, float]], *, left: bool = False
) -> None:
    """Dashed lines, each named near the right end, side by side where lines lie close.

    With `left` near the other end, where a falling line has not come down yet.

    To be called last: where the names go depends on the panel's limits.
    """
    low, high = axis.get_ylim()
    for _, value in references:
        axis.axhline(value, color=MUTED, linewidth=1, linestyle=(0, (4, 2)), zorder=1)
        room = 0.05 * (high - low)  # for the line's name
        low, high = min(low, value - room), max(high, value + room)
    axis.set_ylim(low, high)
    height = axis.get_window_extent().height * 72 / axis.figure.dpi  # in points, as the offsets
    placed: list[tuple[float, float]] = []  # height and left edge of the names so far
    for name, value in references:
        y = height * (value - low) / (high - low)
        x = min([-3.0, *(left - 8 for at, left in placed if abs(at - y) < 10)])
        axis.annotate(
            name,
            (0.0 if left else 1.0, value),
            xycoords=("axes fraction", "data"),
            xytext=(-x if left else x, 2),
            textcoords="offset points",
            ha="left" if left else "right",
            fontsize=8,
            color=MUTED,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6, "alpha": 0.85},
            zorder=1.5,  # above its line, below the data
        )
        placed.append((y, x - 4.7 * len(name)))


def _line_with_bars(
    axis: Axes,
    xs: Sequence[float],
    scores: Sequence[Estimate],
    scale: float,
    s: Style,
    label: str,
) -> None:
    axis.errorbar(
        xs,
        [scale * score.mean for score in scores],
        yerr=_errors(scores, scale),
        color=s.color,
        marker=s.marker,
        markersize=6,
        linestyle=s.dash,
        capsize=2.5,
        elinewidth=1.1,
        label=label,
    )


def _log_height(axis: Axes) -> None:
    """A logarithmic y axis with round ticks, of one that has its limits."""
    low, high = axis.get_ylim()
    lines: Any = axis.get_lines()  # whose data has no better type
    drawn = [float(y) for line in lines for y in line.get_ydata()]
    low = max(low, min(y for y in drawn if y > 0) / 1.1)
    axis.set_yscale("log")
    axis.set_ylim(low, high)
    fine = (1, 1.2, 1.4, 1.6, 1.8, 2, 2.2, 2.5, 2.8, 3.2, 3.6, 4, 5, 6, 7, 8, 9)
    for steps in ((1, 2, 5), (1, 1.5, 2, 3, 5, 7), fine):
        ticks = [m * 10.0**e for e in range(-6, 9) for m in steps]
        shown = [t for t in ticks if low <= t <= high]
        if len(shown) >= 4:
            break
    axis.set_yticks(shown, [f"{t:g}" for t in shown])
    axis.set_yticks([], minor=True)


def _paper_line(axis: Axes, line: PaperLine, scale: float, s: Style) -> None:
    axis.plot(
        [x for x, _ in line.points],
        [scale * y for _, y in line.points],
        color=s.color,
        marker=s.marker,
        markerfacecolor="white",
        markersize=5.5,
        linestyle=(0, (4, 2)),
        linewidth=1.1,
        alpha=0.8,
        label=f"paper: {line.name}",
        zorder=1.8,
    )


def _law(axis: Axes, curve: Curve, scale: float, s: Style) -> None:
    """The power law over the span of its points, thin."""
    if curve.law is None:
        return
    low, high = math.log(curve.points[0].x), math.log(curve.points[-1].x)
    xs = [math.exp(low + (high - low) * i / 40) for i in range(41)]
    ys = [scale * curve.law.at(x) for x in xs]
    axis.plot(xs, ys, color=s.color, linewidth=0.9, alpha=0.7, zorder=1.6)


def _errors(scores: Sequence[Estimate], scale: float) -> list[list[float]] | None:
    if all(s.low is None for s in scores):
        return None
    below = [0.0 if s.low is None else scale * (s.mean - s.low) for s in scores]
    above = [0.0 if s.high is None else scale * (s.high - s.mean) for s in scores]
    return [below, above]


def _papers(panel: Panel, key: str) -> list[tuple[paper.Series, Style]]:
    """The paper's series at other test lengths for the models shown, in the models' colours."""
    found: dict[str, tuple[paper.Series, Style]] = {}
    for entry in panel.shown if key == "length" else ():
        for series in paper.series_for(entry.group.task, entry.group.model):
            if series.axis == "test length" and series.metric == panel.example.headline:
                found.setdefault(series.name, (series, entry.style))
    return list(found.values())


def _variant_keys(panel: Panel) -> list[str]:
    """The keys of labels such as length=512 that at least two variants name."""
    counts: dict[str, set[float]] = {}
    for entry in panel.entries:
        for label in dict.fromkeys(v for r in entry.group.done for v in r.variants):
            key, value = _parsed(label)
            if value is not None:
                counts.setdefault(key, set()).add(value)
    return [key for key, values in counts.items() if len(values) > 1]


def _variant_points(group: Group, key: str) -> Iterator[tuple[float, Estimate]]:
    for label in dict.fromkeys(v for r in group.done for v in r.variants):
        name, value = _parsed(label)
        score = variant_score(group, label)
        if name == key and value is not None and score is not None:
            yield value, score


def _at(label: str, key: str) -> float | None:
    name, value = _parsed(label)
    return value if name == key else None


def _parsed(label: str) -> tuple[str, float | None]:
    key, _, value = label.partition("=")
    try:
        return key, float(value)
    except ValueError:
        return label, None


def _panels(
    found: Sequence[Row], style: Mapping[str, Style], names: Mapping[str, str]
) -> list[Panel]:
    together: dict[tuple[str, str, str], list[Row]] = {}
    for row in found:
        together.setdefault((row.task, row.scale, row.task_setting), []).append(row)
    return [_panel(row_list, style, names) for row_list in together.values()]


def _foremost(panels: Sequence[Panel], room: int) -> list[Panel]:
    """So many panels, in their order: from every task in turn the one with most entries left."""
    of_task: dict[str, list[int]] = {}
    for i in sorted(range(len(panels)), key=lambda i: -len(panels[i].entries)):
        of_task.setdefault(panels[i].example.cell.task, []).append(i)
    turns = zip_longest(*of_task.values())
    taken = [i for turn in turns for i in turn if i is not None][:room]
    return [panels[i] for i in sorted(taken)]


def _panel(found: Sequence[Row], style: Mapping[str, Style], names: Mapping[str, str]) -> Panel:
    by_model: dict[str, list[Group]] = {}
    for row in found:
        for model, group in row.groups.items():
            by_model.setdefault(model, []).append(group)
    labelled: dict[str, Group] = {}
    for model, groups in by_model.items():
        for group, label in zip(groups, _labels(model, groups, names), strict=True):
            labelled[label] = group
    if len(labelled) > len(by_model):
        style = styles(list(labelled))
    return Panel(
        rows=tuple(found),
        entries=tuple(Entry(label=k, group=g, style=style[k]) for k, g in labelled.items()),
    )


def _labels(model: str, groups: Sequence[Group], names: Mapping[str, str]) -> list[str]:
    """The model's name; under several settings the grid's own names, or what is unusual in each."""
    if len(groups) == 1:
        return [model]
    given = [names.get(g.records[0].digest, "") for g in groups]
    if all(given) and len(set(given)) == len(given):
        return given
    keys = dict.fromkeys(k for g in groups for k in g.keyed)
    usual = {k: Counter(_at_key(g, k) for g in groups).most_common(1)[0] for k in keys}
    for key, (_, count) in usual.items():
        if count == 1:  # one setting that tells all apart: N, say
            return [f"{model}, {_setting(key, g)}" for g in groups]
    labels = []
    for group in groups:
        unusual = [
            _setting(k, group) for k, (common, _) in usual.items() if _at_key(group, k) != common
        ]
        labels.append(", ".join([model, *unusual]))
    return labels


def _at_key(group: Group, key: str) -> str:
    return group.keyed.get(key, "null")


def _setting(key: str, group: Group) -> str:
    return f"{key.split('.')[-1]}={_at_key(group, key).strip(chr(34))}"


# -- how it is drawn --------------------------------------------------------------------------


class _Page:
    """A figure with a title above, the scale's notes below and the panels between."""

    def __init__(
        self, figure: Figure, title: str, records: Sequence[Record], labels: Sequence[str]
    ) -> None:
        self.figure, self.title, self.labels = figure, title, list(labels)
        # What a line of the legend holds, from the width of its longest entry.
        widest = max((0.55 + 0.075 * len(label) for label in labels), default=1.0)
        self.legend_columns = max(1, min(len(labels), int((WIDTH - 0.1) / widest)))
        self.legend_lines = math.ceil(len(labels) / self.legend_columns)
        self.scales = list(dict.fromkeys(r.cell.scale for r in records))
        notes = scale_notes(records)
        tasks = {r.cell.task for r in records}
        if len(tasks) > 1:  # a task's own note stands with its tables and plots
            notes = [n for n in notes if n.endswith("scale: not the paper's.")]
        # Tables have all of it.
        self.footer = textwrap.wrap(" ".join(notes), 150, max_lines=4, placeholder=" …")
        self.bottom = 0.0

    def grid(
        self,
        lines: int,
        columns: int,
        *,
        wspace: float = 0.24,
        left: float = 0.075,
        right: float = 0.985,
        ratios: Sequence[float] | None = None,
        gap: float = 0.8,
        above: float = 0.0,
    ) -> list[Axes]:
        """Panels between title and footer, with room for their labels.

        `gap` are the inches between lines of panels, `above` more of them over the first line.
        """
        height = self.figure.get_figheight()
        self.bottom = (0.55 + 0.17 * len(self.footer)) / height
        spec = self.figure.add_gridspec(
            lines,
            columns,
            left=left,
            right=right,
            top=1 - (0.62 + above + 0.2 * max(0, self.legend_lines - 0.5)) / height,
            bottom=self.bottom,
            wspace=wspace,
            # As matplotlib wants it: in panel heights.
            hspace=gap * lines / max(0.1, height - 1.2 - gap * (lines - 1)),
            height_ratios=ratios,
        )
        return [
            self.figure.add_subplot(spec[line, column])
            for line in range(lines)
            for column in range(columns)
        ]

    def legend(self, *axes: Axes) -> None:
        """One legend for all panels, under the title, with what these ones hold."""
        found = [axis.get_legend_handles_labels() for axis in axes]
        handles = [handle for handles, _ in found for handle in handles]
        labels = [label for _, labels in found for label in labels]
        unique = dict(sorted(zip(labels, handles, strict=True), key=lambda p: self.rank(p[0])))
        self.figure.legend(
            unique.values(),
            unique.keys(),
            loc="upper left",
            bbox_to_anchor=(0.0, 1 - 0.27 / self.figure.get_figheight()),
            ncols=self.legend_columns,
            frameon=False,
            fontsize=9,
            columnspacing=1.4,
            handletextpad=0.5,
        )

    def rank(self, label: str) -> int:
        """Entries stand in the order of the labels that the page was made with."""
        return self.labels.index(label) if label in self.labels else len(self.labels)

    def finish(self) -> None:
        """Title and footer; the scale stands in both."""
        height = self.figure.get_figheight()
        self.figure.text(
            0.008,
            1 - 0.1 / height,
            self.title,
            va="top",
            fontsize=12 * min(1.0, 70 / len(self.title)),  # leaves the scale its room
            fontweight="bold",
            color=INK,
        )
        scale = ", ".join(
            f"{s} scale" + ("" if s == "paper" else " (not the paper's)") for s in self.scales
        )
        self.figure.text(
            0.992, 1 - 0.12 / height, scale, va="top", ha="right", fontsize=10, color="#9a3b00"
        )
        self.figure.text(
            0.008,
            0.05 / height,
            "\n".join(self.footer),
            va="bottom",
            fontsize=8,
            color=MUTED,
            linespacing=1.3,
        )

    def plot(self, name: str, caption: str, digests: Sequence[str]) -> Plot:
        return Plot(
            name=name,
            title=self.title,
            caption=caption,
            png=self.png,
            svg=self.svg,
            digests=tuple(sorted(set(digests))),
        )

    png: bytes = b""
    svg: bytes = b""


@contextmanager
def _figure(
    title: str, height: float, records: Sequence[Record], labels: Sequence[str] = ()
) -> Iterator[_Page]:
    """A page to draw on; saved as PNG and SVG on leaving, with no date and no random ids."""
    import matplotlib
    from matplotlib.figure import Figure

    settings: Any = {
        "svg.hashsalt": "seqbench",
        "svg.fonttype": "path",
        "font.family": "DejaVu Sans",
        "font.size": 9.5,
        "axes.edgecolor": "#afb8c1",
        "axes.labelcolor": INK,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "grid.color": "#e6e9ec",
        "xtick.color": INK,
        "ytick.color": INK,
        "xtick.labelsize": 8.5,
        "ytick.labelsize": 8.5,
        "text.color": INK,
        "lines.linewidth": 1.8,
    }
    # Whatever a user's matplotlibrc says, the same records give the same picture.
    with matplotlib.rc_context(matplotlib.rcParamsDefault), matplotlib.rc_context(settings):
        page = _Page(Figure(figsize=(WIDTH, height + 0.6), dpi=DPI), title, records, labels)
        page.figure.set_figheight(height + 0.6 + 0.2 * max(0, page.legend_lines - 2))
        yield page
        page.finish()
        page.png = _saved(page.figure, "png", {"Software": None})
        page.svg = _saved(page.figure, "svg", {"Date": None, "Creator": None})


def _saved(figure: Figure, kind: str, metadata: Mapping[str, Any]) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format=kind, metadata=dict(metadata))
    return file.getvalue()


def _ticks(axis: Axes, values: Sequence[float]) -> None:
    """A tick at every value, thinned to what a panel's width holds, 1024 as 1K from there on."""
    step = math.ceil(len(values) / 18)
    shown = list(values)[::step]
    axis.set_xticks(shown, [_binary(v) for v in shown])
    axis.set_xticks([], minor=True)


def _apart(values: Sequence[float]) -> list[float]:
    """The values, the first ones first, less those too near for a label: 30720 beside 32768."""
    shown: list[float] = []
    for value in values:
        if all(max(value / other, other / value) > 1.3 for other in shown):
            shown.append(value)
    return sorted(shown)


def _log_ticks(axis: Axes, values: Sequence[float]) -> None:
    """A few round ticks on a logarithmic axis, also where it spans less than a decade."""
    low, high = _frame([math.log10(v) for v in values if v > 0], 0.12)
    if high - low < 0.3:
        middle = (low + high) / 2
        low, high = middle - 0.15, middle + 0.15
    axis.set_xlim(10**low, 10**high)
    for mantissas in ((1.0,), (1.0, 3.0), (1.0, 2.0, 5.0), (1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9)):
        found = [
            m * 10.0**e
            for e in range(math.floor(low) - 1, math.ceil(high) + 1)
            for m in mantissas
            if low <= math.log10(m * 10.0**e) <= high
        ]
        if len(found) >= 3:
            break
    # Labels side by side, each with its 0.42 inches; the roundest ticks first.
    apart = (high - low) * 0.42 * axis.figure.dpi / axis.get_window_extent().width
    shown: list[float] = []
    for tick in sorted(found, key=lambda v: (_roundness(v), v)):
        if all(abs(math.log10(tick / other)) > apart for other in shown):
            shown.append(tick)
    found = sorted(shown)
    axis.set_xticks(found, [compact(v) for v in found])
    axis.set_xticks([], minor=True)


def _roundness(value: float) -> int:
    """0 for 100, 1 for 300 and 500, 2 for the others."""
    leading = round(value / 10 ** math.floor(math.log10(value)), 6)
    return {1: 0, 2: 1, 3: 1, 5: 1}.get(int(leading), 2) if leading == int(leading) else 2


def _binary(value: float) -> str:
    for unit, size in (("M", 2**20), ("K", 2**10)):
        if value >= size and value % size == 0:
            return f"{value / size:.0f}{unit}"
    return f"{value:g}"


def _frame(values: Sequence[float], margin: float) -> tuple[float, float]:
    finite = [v for v in values if math.isfinite(v)] or [0.0, 1.0]
    low, high = min(finite), max(finite)
    room = margin * (high - low) or 0.05 * abs(high) or 0.5
    return low - room, high + room


def _scale_of(metric: str) -> float:
    return 100.0 if is_share(metric) else 1.0


def _bars_note() -> str:
    return f"bars: the {CONFIDENCE:.0%} interval over seeds, none from one seed."
