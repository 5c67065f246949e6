"""The Mamba paper's figures (Gu & Dao 2023, arXiv 2312.00752 v2), printed beside ours, never mixed.

Every series is the paper's own, at its own scale. `read` says how a number was had: "stated" in the
paper's text or tables, or "figure": digitised from the vector coordinates of the paper's figure, to
about four digits. Data only; `beside_ours` is the table.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from seqbench.suite.experiment import Cell
from seqbench.suite.records import Record
from seqbench.suite.report.aggregate import Group, Row, estimate, is_share, rows, scale_notes
from seqbench.suite.report.tables import (
    Column,
    Entry,
    Table,
    compact,
    metric_label,
    provenance,
    score_text,
)

OUT_OF_MEMORY = math.nan  # the paper's mark for a length that did not fit

# Our presets that are a plain block + layer, spelled out; the others stand under their own names.
PRESETS = {
    "mamba": "mamba+s6",
    "s4": "none+s4",
    "s6": "none+s6",
    "h3": "h3+s4",
}


@dataclass(frozen=True, kw_only=True)
class Series:
    """One model's numbers on one of the paper's tasks."""

    task: str  # ours, that stands for it
    models: str  # ours that stand for it, presets or spelled block+layer, by spaces
    name: str  # theirs
    metric: str  # a key of tasks.base.METRICS, or "error" text of another unit
    # What the values are listed by: of other models each, or of one model at other test lengths.
    axis: Literal["length", "parameters", "test length"]
    values: Mapping[int, float]
    source: str
    read: Literal["stated", "figure"]
    setting: str
    remark: str = ""  # where their model or data are not quite ours

    @property
    def same_metric(self) -> bool:
        """Whether ours is in the same unit on the same kind of data."""
        return self.task != "language"


_COPYING = (
    "length 4096, 16 data tokens of a vocabulary of 16, 2 layers, D 64, 400K steps; token or "
    "whole-sequence accuracy is not said"
)
_INDUCTION = "trained at length 256, vocabulary 16, 2 layers, Adam, batch 8"
_PILE = "the Pile, GPT-2 tokens, context 2048, perplexity per token"
_DNA = "HG38, length 1024, 10K steps of 2^20 tokens, perplexity per base"
_DNA_LENGTH = "HG38, 6 layers (twice for Mamba), D 128, 20K steps of 2^24 tokens"
_PIANO = "YouTubeMix, 16 kHz, mu-law, 200K steps, 3.5M parameters"
_UNET = "SaShiMi's U-Net with two poolings"
_INDUCTION_LENGTHS = tuple(2**k for k in range(6, 21))


def _copying(models: str, name: str, accuracy: float) -> Series:
    return Series(
        task="selective-copying",
        models=models,
        name=name,
        metric="accuracy",
        values={4096: accuracy / 100},
        axis="length",
        source="Table 1",
        read="stated",
        setting=_COPYING,
    )


def _induction(models: str, name: str, percent: Sequence[float], remark: str = "") -> Series:
    return Series(
        task="induction-heads",
        models=models,
        name=name,
        metric="accuracy",
        axis="test length",
        values=dict(zip(_INDUCTION_LENGTHS, (v / 100 for v in percent), strict=True)),
        source="Tables 2 and 11",
        read="stated",
        setting=_INDUCTION,
        remark=remark,
    )


def _pile(models: str, name: str, perplexity: Sequence[float], remark: str = "") -> Series:
    sizes = (125_000_000, 350_000_000, 760_000_000, 1_300_000_000)
    return Series(
        task="language",
        models=models,
        name=name,
        metric="perplexity",
        axis="parameters",
        values=dict(zip(sizes, perplexity, strict=True)),
        source="Figure 4",
        read="figure",
        setting=_PILE,
        remark=remark,
    )


def _dna_size(models: str, name: str, points: Mapping[int, float], remark: str = "") -> Series:
    return Series(
        task="dna",
        models=models,
        name=name,
        metric="perplexity",
        axis="parameters",
        values=points,
        source="Figure 5, left",
        read="figure",
        setting=_DNA,
        remark=remark,
    )


def _dna_length(models: str, name: str, perplexity: Sequence[float]) -> Series:
    return Series(
        task="dna",
        models=models,
        name=name,
        metric="perplexity",
        axis="length",
        values={4**k: v for k, v in zip(range(5, 11), perplexity, strict=True)},
        source="Figure 5, right",
        read="figure",
        setting=_DNA_LENGTH,
    )


def _piano(models: str, name: str, bits: Sequence[float], remark: str) -> Series:
    lengths = (8192, 16384, 30720, 61440, 120832, 239616, 479232, 958464)
    return Series(
        task="piano",
        models=models,
        name=name,
        metric="bits_per_sample",
        axis="length",
        values=dict(zip(lengths, bits, strict=True)),
        source="Figure 7",
        read="figure",
        setting=_PIANO,
        remark=remark,
    )


def _piano_ablation(models: str, name: str, bits: Sequence[float], remark: str) -> Series:
    return Series(
        task="piano",
        models=models,
        name=name,
        metric="bits_per_sample",
        axis="length",
        values={2**k: v for k, v in zip(range(11, 19), bits, strict=True)},
        source="Figure 10, left",
        read="figure",
        setting="YouTubeMix, 16 kHz, mu-law, 100K steps, 6M parameters",
        remark=remark,
    )


_OK = 100.0  # the paper's check mark

SERIES: tuple[Series, ...] = (
    _copying("none+s4", "S4 (no gate, S4)", 18.3),
    _copying("none+s6", "no gate, S6", 97.0),
    _copying("h3+s4", "H3 (H3, S4)", 57.0),
    _copying("h3+hyena", "Hyena (H3, Hyena)", 30.1),
    _copying("h3+s6", "H3, S6", 99.7),
    _copying("mamba+s4", "Mamba, S4", 56.4),
    _copying("mamba+hyena", "Mamba, Hyena", 28.4),
    _copying("mamba+s6", "Mamba (Mamba, S6)", 99.8),
    _induction(
        "transformer-absolute",
        "MHA-Abs, 137K",
        [_OK, 99.6, 100, 58.6, 26.6, 18.8, 9.8, 10.9, 7.8, *[OUT_OF_MEMORY] * 6],
        "no MLP",
    ),
    _induction(
        "transformer-rope transformer",
        "MHA-RoPE, 137K",
        [_OK, _OK, 100, 83.6, 31.3, 18.4, 8.6, 9.0, 5.5, *[OUT_OF_MEMORY] * 6],
        "no MLP",
    ),
    _induction(
        "transformer-xpos",
        "MHA-xPos, 137K",
        [_OK, _OK, 100, 99.6, 67.6, 25.4, 7.0, 9.0, 7.8, *[OUT_OF_MEMORY] * 6],
        "no MLP",
    ),
    _induction(
        "h3+s4",
        "H3, 153K",
        [_OK, _OK, 100, 80.9, 39.5, 23.8, 14.8, 8.2, 5.9, 6.6, 8.2, 4.7, 8.2, 6.3, 7.4],
    ),
    _induction(
        "h3+hyena",
        "Hyena, 69M",
        [97.7, _OK, 100, _OK, 44.1, 12.5, 6.6, 5.1, 7.0, 5.9, 6.6, 6.6, 5.9, 6.3, 9.8],
        "69M: mostly learnable positional encodings",
    ),
    _induction("mamba+s6", "Mamba, 74K", [_OK] * 15),
    _pile("mamba+s6", "Mamba", [11.60, 8.70, 7.27, 6.50]),
    _pile("transformer++ transformer", "Transformer++", [11.64, 8.68, 7.26, 6.45]),
    _pile("hyena h3+hyena", "Hyena", [16.91, 11.40, 8.99, 7.85], "with an MLP and GPT-3's recipe"),
    _pile("h3+s4", "H3++", [13.49, 9.71, 7.98, 7.08], "head dimension 8, with an MLP"),
    _dna_size(
        "mamba+s6",
        "Mamba",
        {
            263_000: 3.075,
            684_000: 2.991,
            1_400_000: 2.925,
            3_530_000: 2.853,
            7_010_000: 2.804,
            19_300_000: 2.742,
            40_700_000: 2.706,
        },
    ),
    _dna_size(
        "hyena h3+hyena",
        "HyenaDNA",
        {
            254_000: 3.112,
            638_000: 3.017,
            1_300_000: 2.959,
            3_270_000: 2.900,
            6_540_000: 2.851,
            18_100_000: 2.798,
            38_400_000: 2.782,
        },
        "with an MLP",
    ),
    _dna_size(
        "transformer++ transformer",
        "Transformer++",
        {
            201_000: 3.157,
            561_000: 3.054,
            1_190_000: 2.980,
            3_120_000: 2.900,
            6_320_000: 2.846,
            17_800_000: 2.789,
            37_800_000: 2.760,
        },
    ),
    _dna_length("mamba+s6", "Mamba, 1.4M", [2.895, 2.876, 2.866, 2.869, 2.863, 2.862]),
    _dna_length("mamba+s6", "Mamba, 7M", [2.761, 2.739, 2.730, 2.729, 2.725, 2.722]),
    _dna_length("hyena h3+hyena", "HyenaDNA, 1.4M", [2.940, 2.934, 2.938, 2.948, 2.965, 3.007]),
    _piano(
        "mamba+s6",
        "Mamba (complex)",
        [1.432, 1.390, 1.369, 1.339, 1.325, 1.317, 1.307, 1.311],
        f"complex state; {_UNET}",
    ),
    _piano(
        "sashimi none+s4",
        "SaShiMi (S4+MLP)",
        [1.467, 1.425, 1.405, 1.378, 1.368, 1.358, 1.350, 1.351],
        f"with an MLP; {_UNET}",
    ),
    _piano_ablation(
        "mamba+s6",
        "Mamba (S6), real",
        [1.525, 1.467, 1.436, 1.402, 1.376, 1.359, 1.348, 1.358],
        _UNET,
    ),
    _piano_ablation(
        "sashimi none+s4",
        "S4+MLP",
        [1.501, 1.423, 1.370, 1.321, 1.282, 1.261, 1.246, 1.252],
        f"with an MLP; {_UNET}",
    ),
    # Ours under options: they stand in the figure of piano-ablation, and beside no model.
    _piano_ablation(
        "", "+ complex", [1.488, 1.409, 1.358, 1.309, 1.273, 1.251, 1.236, 1.247], _UNET
    ),
    _piano_ablation(
        "", "- selective B/C", [1.482, 1.403, 1.352, 1.303, 1.266, 1.244, 1.228, 1.237], _UNET
    ),
    _piano_ablation(
        "mamba+s4",
        "Mamba-S4 (no selection), complex",
        [1.482, 1.403, 1.351, 1.300, 1.262, 1.238, 1.223, 1.228],
        _UNET,
    ),
)


def series_for(task: str, model: str) -> list[Series]:
    """The paper's series that correspond to one of our tasks and models; often none."""
    spelled = PRESETS.get(model, model)
    return [s for s in SERIES if s.task == task and {model, spelled} & {*s.models.split()}]


def beside_ours(
    records: Sequence[Record], cells: Sequence[Cell] | None = None, grid: str | None = None
) -> Table:
    """Ours and the paper's in separate columns, where task and model correspond."""
    lines: list[tuple[Entry, ...]] = []
    tidy: list[dict[str, Any]] = []
    used: list[Record] = []
    for row in rows(records, cells):
        for model, group in row.groups.items():
            found = series_for(row.task, model)
            if group.score is None or row.example is None:
                continue
            for series in found:
                used += group.done
                lines.append(_line(row, group, series))
                tidy += _tidy(row, group, series)
    return Table(
        name="paper",
        title="Beside the paper: two scales, not one comparison",
        columns=(
            Column(heading="task"),
            Column(heading="our model"),
            Column(heading="ours (our scale)", wide=True),
            Column(heading="paper (their scale)", wide=True),
            Column(heading="their model"),
            Column(heading="source"),
            Column(heading="their setting", wide=True),
        ),
        rows=tuple(lines),
        notes=(
            "The paper's numbers (Gu & Dao 2023, arXiv 2312.00752 v2) are of the paper's scale, "
            "data and code; ours stand beside them for orientation, and no difference of the two "
            "is a result. [fig]: read off the paper's figure, about 4 digits; oom: out of memory; "
            "…: the rest is in paper.csv.",
            "Our s4 is the diagonal S4D.",
            *scale_notes(used),
            provenance(used),
        ),
        digests=tuple(sorted({r.digest for r in used})),
        tidy=tuple(tidy),
    )


def _line(row: Row, group: Group, series: Series) -> tuple[Entry, ...]:
    example = row.example
    assert example is not None
    metric, score = example.headline, group.score
    if series.metric != metric and series.same_metric:
        values = [r.test[series.metric] for r in group.done if series.metric in r.test]
        in_theirs = estimate(values, series.metric)
        if in_theirs is not None:
            metric, score = series.metric, in_theirs
    assert score is not None
    higher = example.higher_is_better if metric == example.headline else None
    ours = (metric_label(metric, higher), f"{row.scale} scale", row.setting)
    theirs = f"{metric_label(series.metric)}, by {series.axis}"
    theirs += "" if series.same_metric else ", on other data"
    return (
        Entry(text=row.task),
        Entry(text=group.model),
        Entry(
            text=score_text(score, metric),
            value=score.mean,
            detail=", ".join(p for p in ours if p),
        ),
        Entry(text=_listed(series), detail=theirs),
        Entry(text=series.name),
        Entry(text=series.source + (" [fig]" if series.read == "figure" else "")),
        Entry(text="; ".join(p for p in (series.setting, series.remark) if p)),
    )


def _listed(series: Series) -> str:
    """83.6 at 512, 31.3 at 1024, ...: equal neighbours together, the middle of many left out."""
    digits = max(len(repr(v).partition(".")[2]) for v in series.values.values())
    parts: list[tuple[str, list[int]]] = []
    for at, value in series.values.items():
        text = "oom" if math.isnan(value) else _value_text(value, series.metric, digits)
        if parts and parts[-1][0] == text:
            parts[-1][1].append(at)
        else:
            parts.append((text, [at]))
    texts = [
        f"{text} at {_at(ats[0], series.axis)}"
        + (f" to {_at(ats[-1], series.axis)}" if len(ats) > 1 else "")
        for text, ats in parts
    ]
    shown = texts if len(texts) <= 6 else [*texts[:4], "…", texts[-1]]
    return ", ".join(shown).replace("…, ", "… ")


def _value_text(value: float, metric: str, digits: int) -> str:
    return f"{100 * value:.1f}" if is_share(metric) else f"{value:.{digits}f}"


def _at(value: int, axis: str) -> str:
    if axis.endswith("length") and value >= 2**20:
        return f"{value // 2**20}M"
    return str(value) if axis.endswith("length") else compact(value).replace("G", "B")


def _tidy(row: Row, group: Group, series: Series) -> list[dict[str, Any]]:
    example, score = row.example, group.score
    assert example is not None and score is not None
    return [
        {
            "whose": "ours",
            "task": row.task,
            "model": group.model,
            "metric": example.headline,
            "axis": "",
            "at": "",
            "value": score.mean,
            "scale": row.scale,
            "setting": row.setting,
            "source": " ".join(r.digest for r in group.done),
            "read": "",
            "remark": example.cell.scale_note,
        },
        *(
            {
                "whose": "paper",
                "task": row.task,
                "model": series.name,
                "metric": series.metric,
                "axis": series.axis,
                "at": at,
                "value": "oom" if math.isnan(value) else value,
                "scale": "the paper's",
                "setting": series.setting,
                "source": series.source,
                "read": series.read,
                "remark": series.remark,
            }
            for at, value in series.values.items()
        ),
    ]
