"""Plots from records: curves, score against cost, score against length, and all tasks at a glance.

Colours and markers are the model's own in every plot of a report; the palette is Okabe & Ito's,
safe for the colour-blind. The same records give the same bytes.
"""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from seqbench.suite.experiment import Cell
from seqbench.suite.records import Record
from seqbench.suite.report.aggregate import (
    CONFIDENCE,
    Estimate,
    Group,
    Row,
    models_of,
    rows,
    scale_notes,
    slug,
)
from seqbench.suite.report.tables import (
    compact,
    is_share,
    metric_label,
    metric_text,
    variant_score,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe & Ito (2008), without the yellow that white paper swallows.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", "--", ":", "-.")
INK = "#24292f"
MUTED = "#6e7781"
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
    records: Sequence[Record], cells: Sequence[Cell] | None = None, grid: str | None = None
) -> Iterator[Plot]:
    """Every plot that the records allow, the overview first."""
    style = styles(models_of(records, cells))
    found = [row for row in rows(records, cells) if row.example is not None]
    if not found:
        return
    yield overview(found, style, grid)
    for row in found:
        if any(len(r.curve) > 1 for r in row.records):
            yield curves(row, style)
        for key in _variant_keys(row):
            yield against_variant(row, key, style)
    for panel in _panels(found):
        if len([g for row in panel for g in row.groups.values() if g.score and g.done]) > 1:
            yield against_cost(panel, style)


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


def overview(found: Sequence[Row], style: Mapping[str, Style], grid: str | None) -> Plot:
    """One panel a row: each model's test score with its interval, above chance and baselines."""
    columns = min(2, len(found))
    entries = [len(row.groups) + len(_references(row.example)) for row in found]
    most = [max(entries[i : i + columns]) for i in range(0, len(found), columns)]
    height = 0.4 + sum(0.85 + 0.22 * n for n in most)
    title = f"Test results{f' of grid {grid}' if grid else ''}"
    with _figure(title, height, [r for row in found for r in row.records]) as page:
        named = [*style, *(name for row in found for name, _ in _references(row.example))]
        label = min(3.0, 0.3 + 0.072 * max(len(name) for name in named))  # inches for the names
        gap = label + 1.1  # and for the numbers of the panel before
        panel = (WIDTH * 0.89 - label - (columns - 1) * gap) / columns
        axes = page.grid(
            len(most), columns, wspace=gap / panel, left=label / WIDTH, right=0.89, ratios=most
        )
        for i, (row, axis) in enumerate(zip(found, axes, strict=False)):
            _overview_panel(axis, row, style, most[i // columns])
        for axis in axes[len(found) :]:
            axis.set_axis_off()
    digests = [r.digest for row in found for r in row.records]
    caption = f"Each model's test score, above chance and baselines (dashed); {_bars_note()}"
    return page.plot("overview", caption, digests)


def curves(row: Row, style: Mapping[str, Style]) -> Plot:
    """The validation headline against steps and against seconds of training, one line a model."""
    example = row.example
    assert example is not None
    scale = _scale_of(example.headline)
    title = f"{row.title}: validation while training"
    lines = {m: line for m, g in row.groups.items() if (line := _curve(g)) is not None}
    names = {m: f"{m} ({n.seeds} seeds)" if n.seeds > 1 else m for m, n in lines.items()}
    with _figure(title, 3.7, row.records, list(names.values())) as page:
        axes = page.grid(1, 2)
        for model, line in lines.items():
            mean, low, high = (
                [scale * v for v in values] for values in (line.mean, line.low, line.high)
            )
            for axis, xs in zip(axes, (line.steps, line.seconds), strict=True):
                s = style[model]
                marker = s.marker if len(xs) <= 30 else ""
                axis.plot(
                    xs,
                    mean,
                    color=s.color,
                    linestyle=s.dash,
                    label=names[model],
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
        "keeps its last value."
    )
    return page.plot(f"curves-{row.slug}", caption, [r.digest for r in row.records])


def against_variant(row: Row, key: str, style: Mapping[str, Style]) -> Plot:
    """The test headline against a numeric test variant, the length above all."""
    example = row.example
    assert example is not None
    scale = _scale_of(example.headline)
    trained = example.cell.task_config.get(key)
    name = {"length": "sequence length (tokens)"}.get(key, key.replace("_", " "))
    title = f"{row.title}: test score against {key.replace('_', ' ')}"
    with _figure(title, 4.0, row.records, list(row.groups)) as page:
        (axis,) = page.grid(1, 1)
        values = set()
        for model, group in row.groups.items():
            points = dict(_variant_points(group, key))
            if isinstance(trained, int | float) and trained not in points and group.score:
                points[float(trained)] = group.score
            xs = sorted(points)
            values |= set(xs)
            _line_with_bars(axis, xs, [points[x] for x in xs], scale, style[model], model)
        if min(values) > 0:
            axis.set_xscale("log", base=2)
        _ticks(axis, sorted(values))
        axis.set_xlabel(name)
        axis.set_ylabel(metric_label(example.headline, example.higher_is_better))
        if is_share(example.headline):
            axis.set_ylim(-3, 104)
        _reference_lines(axis, _references(example)[:1] if example.chance is not None else [])
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
    caption = f"Test headline on other values of {key}; {_bars_note()}"
    return page.plot(f"{slug(key)}-{row.slug}", caption, [r.digest for r in row.records])


def against_cost(panel: Sequence[Row], style: Mapping[str, Style]) -> Plot:
    """The test headline against training seconds and parameters, with the Pareto front."""
    example = panel[0].example
    assert example is not None
    scale = _scale_of(example.headline)
    first = panel[0]
    task = f"{first.task} ({first.task_setting})" if first.task_setting else first.task
    title = f"{task}: score against cost"
    costs = {"train_seconds": "seconds of training", "parameters": "parameters"}
    records = [r for row in panel for r in row.records]
    names = ["Pareto front", *dict.fromkeys(m for row in panel for m in row.groups)]
    with _figure(title, 3.9, records, names) as page:
        axes = page.grid(1, 2)
        for axis, (cost, heading) in zip(axes, costs.items(), strict=True):
            by_model: dict[str, list[tuple[float, float, str]]] = {}
            for row in panel:
                for model, group in row.groups.items():
                    x = group.cost(cost)
                    if group.score is None or x is None:
                        continue
                    _line_with_bars(axis, [x], [group.score], scale, style[model], model)
                    at = (x, scale * group.score.mean, _own_setting(row))
                    by_model.setdefault(model, []).append(at)
            points = [(x, y) for found in by_model.values() for x, y, _ in found]
            axis.set_xscale("log")
            _log_ticks(axis, [p[0] for p in points])
            for model, found in by_model.items():
                line = sorted(found)  # a model's settings, by rising cost
                xs, ys = [p[0] for p in line], [p[1] for p in line]
                axis.plot(xs, ys, color=style[model].color, linewidth=1, alpha=0.5)
                for x, y, setting in line:
                    _name_point(axis, x, y, setting)
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
    name = f"cost-{slug(first.task, first.scale, first.task_setting)}"
    return page.plot(name, caption, [r.digest for r in records])


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


def _overview_panel(axis: Axes, row: Row, style: Mapping[str, Style], most: int) -> None:
    example = row.example
    assert example is not None
    scale = _scale_of(example.headline)
    references = _references(example)
    names = [*row.groups, *(name for name, _ in references)]
    means = [scale * g.score.mean for g in row.groups.values() if g.score is not None]
    low, high = _limits(example, means, [value for _, value in references])
    axis.set_xlim(low, high)
    for y, (model, group) in enumerate(row.groups.items()):
        score, s = group.score, style[model]
        if score is None:
            statuses = "/".join(sorted({r.status for r in group.records}))
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
        half = score.half_width
        text = metric_text(score.mean, example.headline)
        text += "" if half is None else f" ± {metric_text(half, example.headline)}"
        _beside(axis, y, text, s.color)
    for y, (_, value) in enumerate(references, len(row.groups)):
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
    for tick in axis.get_yticklabels()[len(row.groups) :]:
        tick.set_color(MUTED)
    axis.set_ylim(most - 0.4, -0.6)
    axis.grid(visible=False, axis="y")
    axis.set_title(row.title, fontsize=10, fontweight="bold", loc="left", pad=6)
    axis.set_xlabel(metric_label(example.headline, example.higher_is_better), fontsize=9)


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


def _reference_lines(axis: Axes, references: Sequence[tuple[str, float]]) -> None:
    """Dashed lines, each named near the right end, side by side where lines lie close.

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
            (1.0, value),
            xycoords=("axes fraction", "data"),
            xytext=(x, 2),
            textcoords="offset points",
            ha="right",
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
        capsize=3,
        label=label,
    )


def _own_setting(row: Row) -> str:
    """What tells a row from the others of its panel: d_model=64."""
    own = [p for p in row.setting.split(", ") if p not in row.task_setting.split(", ")]
    return ", ".join(p.removeprefix("model.").removeprefix("train.") for p in own)


def _name_point(axis: Axes, x: float, y: float, name: str) -> None:
    low, high = (math.log(v) for v in axis.get_xlim())
    right = math.log(x) - low > 0.8 * (high - low)  # there the name would leave the panel
    axis.annotate(
        name,
        (x, y),
        xytext=(-6 if right else 6, 5),
        textcoords="offset points",
        ha="right" if right else "left",
        fontsize=7.5,
        color=MUTED,
    )


def _errors(scores: Sequence[Estimate], scale: float) -> list[list[float]] | None:
    if all(s.low is None for s in scores):
        return None
    below = [0.0 if s.low is None else scale * (s.mean - s.low) for s in scores]
    above = [0.0 if s.high is None else scale * (s.high - s.mean) for s in scores]
    return [below, above]


def _variant_keys(row: Row) -> list[str]:
    """The keys of labels such as length=512 that at least two variants name."""
    counts: dict[str, set[float]] = {}
    for group in row.groups.values():
        for label in dict.fromkeys(v for r in group.done for v in r.variants):
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


def _parsed(label: str) -> tuple[str, float | None]:
    key, _, value = label.partition("=")
    try:
        return key, float(value)
    except ValueError:
        return label, None


def _panels(found: Sequence[Row]) -> list[list[Row]]:
    """Rows whose task, scale and task setting are the same: their scores compare."""
    panels: dict[tuple[str, str, str], list[Row]] = {}
    for row in found:
        panels.setdefault((row.task, row.scale, row.task_setting), []).append(row)
    return list(panels.values())


# -- how it is drawn --------------------------------------------------------------------------


class _Page:
    """A figure with a title above, the scale's notes below and the panels between."""

    def __init__(
        self, figure: Figure, title: str, records: Sequence[Record], labels: Sequence[str]
    ) -> None:
        self.figure, self.title = figure, title
        # What a line of the legend holds, from the width of its longest entry.
        widest = max((0.55 + 0.075 * len(label) for label in labels), default=1.0)
        self.legend_columns = max(1, min(len(labels), int((WIDTH - 0.1) / widest)))
        self.legend_lines = math.ceil(len(labels) / self.legend_columns)
        self.scales = list(dict.fromkeys(r.cell.scale for r in records))
        notes = scale_notes(records)
        tasks = {r.cell.task for r in records}
        if len(tasks) > 1:  # a task's own note stands with its tables and plots
            notes = [n for n in notes if n.endswith("scale: not the paper's.")]
        self.footer = textwrap.wrap(" ".join(notes), 150)[:4]
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
    ) -> list[Axes]:
        """Panels between title and footer, with room for their labels."""
        height = self.figure.get_figheight()
        self.bottom = (0.55 + 0.17 * len(self.footer)) / height
        spec = self.figure.add_gridspec(
            lines,
            columns,
            left=left,
            right=right,
            top=1 - (0.62 + 0.2 * max(0, self.legend_lines - 0.5)) / height,
            bottom=self.bottom,
            wspace=wspace,
            # Inches between lines of panels, as matplotlib wants it: in panel heights.
            hspace=0.8 * lines / max(0.1, height - 1.2 - 0.8 * (lines - 1)),
            height_ratios=ratios,
        )
        return [
            self.figure.add_subplot(spec[line, column])
            for line in range(lines)
            for column in range(columns)
        ]

    def legend(self, axis: Axes) -> None:
        """One legend for all panels, under the title."""
        handles, labels = axis.get_legend_handles_labels()
        unique = dict(zip(labels, handles, strict=True))
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

    def finish(self) -> None:
        """Title and footer; the scale stands in both."""
        height = self.figure.get_figheight()
        self.figure.text(
            0.008, 1 - 0.1 / height, self.title, va="top", fontsize=12, fontweight="bold", color=INK
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
    step = math.ceil(len(values) / 14)
    shown = list(values)[::step]
    axis.set_xticks(shown, [_binary(v) for v in shown])
    axis.set_xticks([], minor=True)


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
    axis.set_xticks(found, [compact(v) for v in found])
    axis.set_xticks([], minor=True)


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
