"""Synthetic records for the report tests: made by a formula, of no model that was ever trained."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from seqbench.suite.experiment import Cell, TrainConfig
from seqbench.suite.records import Cost, CurvePoint, Record

# Task -> headline, whether higher is better, chance, baselines, lengths of the test variants.
TASKS: dict[str, tuple[str, bool, float, dict[str, float], tuple[int, ...]]] = {
    "selective-copying": ("accuracy", True, 1 / 14, {}, (64, 128, 512)),
    "induction-heads": ("accuracy", True, 1 / 15, {}, (64, 512, 1024, 4096)),
    "language": ("bits_per_byte", False, 8.0, {"order-0": 4.4, "order-3": 2.6, "xz": 2.4}, ()),
    "dna": ("bits_per_base", False, 2.0, {"order-0": 1.97, "order-8": 1.92}, ()),
    "piano": ("bits_per_sample", False, 8.0, {"order-0": 5.1, "repeat last": 4.2}, ()),
}


def record(
    task: str = "selective-copying",
    model: str = "mamba",
    seed: int = 0,
    *,
    score: float = 0.9,
    scale: str = "cpu",
    status: Any = "done",
    error: str | None = None,
    steps: int = 500,
    stop_at: float | None = None,
    solved_at: int | None = None,
    task_config: Mapping[str, Any] | None = None,
    model_config: Mapping[str, Any] | None = None,
    train: Mapping[str, Any] | None = None,
    points: int = 10,
    variants: Mapping[str, Mapping[str, float]] | None = None,
    stopped: Mapping[str, str] | None = None,
    parameters: int = 70_000,
    train_seconds: float = 60.0,
) -> Record:
    """One record whose test headline is `score`."""
    headline, higher, chance, baselines, _ = TASKS[task]
    cell = Cell(
        task=task,
        model=model,
        seed=seed,
        scale=scale,
        scale_note=f"Synthetic {task}, length 256; the paper's is 4096.",
        task_config={"length": 256} if task_config is None else dict(task_config),
        model_config={"d_model": 64, "num_layers": 2}
        if model_config is None
        else dict(model_config),
        train=TrainConfig(steps=steps, stop_at=stop_at, **dict(train or {})),
        data_fingerprint="synthetic",
    )
    made = Record(
        cell=cell,
        digest=cell.digest,
        status=status,
        error=error,
        environment={
            "commit": "0" * 40,
            "dirty": False,
            "python": "3.11.7",
            "versions": {"torch": "2.14.0", "seqbench": "0.1.0"},
            "processor": "synthetic processor",
            "device": "cpu",
            "threads": 1,
            "backends": {"selective_scan": "cpu", "causal_conv1d": "cpu"},
            "determinism": "bitwise, at the same number of threads",
        },
    )
    if status != "done":
        return made
    return replace(
        made,
        headline=headline,
        higher_is_better=higher,
        test={headline: score, "loss": 1.0},
        variants=dict(variants or {}),
        stopped=dict(stopped or {}),
        chance=chance,
        baselines=baselines,
        curve=tuple(_curve(headline, score, chance, steps, points, train_seconds)),
        steps_done=steps,
        solved_at=solved_at,
        cost=Cost(
            parameters=parameters,
            state_numbers=4096,
            flops_per_token=1.5e5,
            tokens_per_second=steps * 32 * 256 / train_seconds,
            peak_memory_bytes=600_000_000,
            train_seconds=train_seconds,
            wall_seconds=train_seconds * 1.2,
        ),
    )


def quickstart(
    models: tuple[str, ...] = ("mamba", "s4", "transformer"), seeds: int = 1
) -> list[Record]:
    """Five tasks with every model and seed, scores by a formula."""
    made = []
    for t, (task, (_, higher, chance, _, lengths)) in enumerate(TASKS.items()):
        for m, model in enumerate(models):
            for seed in range(seeds):
                gain = 0.97 - 0.22 * m / max(1, len(models) - 1) - 0.013 * ((seed * 7 + t) % 5)
                score = gain if higher else chance * (1.0 - 0.6 * gain)
                variants = {
                    f"length={n}": {
                        "accuracy": chance + (score - chance) / (1 + m * abs(math.log2(n / 256)))
                    }
                    for n in lengths
                }
                made.append(
                    record(
                        task,
                        model,
                        seed,
                        score=score,
                        variants=variants,
                        stop_at=0.95 if higher else None,
                        solved_at=400 if higher and score >= 0.95 else None,
                        parameters=70_000 + 9_000 * m,
                        train_seconds=60.0 + 40 * m + 10 * t + seed,
                    )
                )
    return made


def _curve(
    headline: str, score: float, chance: float, steps: int, points: int, seconds: float
) -> list[CurvePoint]:
    made = []
    for i in range(1, points + 1):
        part = i / points
        value = chance + (score - chance) * (1 - math.exp(-4 * part)) / (1 - math.exp(-4))
        made.append(
            CurvePoint(
                step=round(steps * part),
                seconds=seconds * part,
                tokens=round(steps * part) * 32 * 256,
                lr=3e-3,
                train_loss=2.0 - part,
                stage=None,
                validation={headline: value, "loss": 2.0 - part},
            )
        )
    return made
