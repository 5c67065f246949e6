"""Training recipes by name: the paper's "gpt3" and "improved" (Gu & Dao 2023, E.2).

A recipe fills the fields of TrainConfig that the grid and `--set` leave alone; the cell, and so the
record, holds its name and every value. What else the paper's improved recipe asks, no linear biases
and RMSNorm, belongs to models: the presets mamba, h3, transformer++, retnet and gla have both;
hyena, transformer and linear-attention are GPT-3's, and `--set model.norm=rms` with
`--set model.bias=false` changes that.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any, Literal

Recipe = Literal["gpt3", "improved"]

# Parameters -> peak rate: Brown et al. 2020, Table 2.1, as the paper's Table 12 has it.
GPT3_RATES = {125e6: 6e-4, 350e6: 3e-4, 760e6: 2.5e-4, 1.3e9: 2e-4}
IMPROVED_PEAK = 5  # times GPT-3's
WARMUP = 0.1  # of the steps; the paper says "linear" alone


def gpt3_rate(parameters: int) -> float:
    """GPT-3's peak rate for a model of that size: its table, joined by lines over log size.

    Below the smallest size by the rule that Kaplan et al. 2020 (D.6) fitted, 0.003239 - 0.0001395
    ln N; above the largest its rate.
    """
    sizes = list(GPT3_RATES)
    if parameters < sizes[0]:
        return 0.003239 - 0.0001395 * math.log(parameters)
    for low, high in pairwise(sizes):
        if parameters <= high:
            share = math.log(parameters / low) / math.log(high / low)
            return GPT3_RATES[low] + share * (GPT3_RATES[high] - GPT3_RATES[low])
    return GPT3_RATES[sizes[-1]]


def recipe_settings(recipe: Recipe, *, parameters: int, steps: int) -> dict[str, Any]:
    """The fields of TrainConfig that a recipe sets, for a model of that size and so many steps.

    gpt3: Adam's betas are torch's, the cosine ends at a tenth of the peak. improved: five times the
    peak, down to 1e-5, betas (0.9, 0.95). Both: weight decay 0.1, gradients clipped at norm 1.
    """
    peak = gpt3_rate(parameters) * (IMPROVED_PEAK if recipe == "improved" else 1)
    peak = float(f"{peak:.3g}")
    return {
        "lr": peak,
        "min_lr": 1e-5 if recipe == "improved" else float(f"{peak / 10:.3g}"),
        "schedule": "cosine",
        "warmup_steps": round(WARMUP * steps),
        "weight_decay": 0.1,
        "beta1": 0.9,
        "beta2": 0.95 if recipe == "improved" else 0.999,
        "clip": 1.0,
    }
