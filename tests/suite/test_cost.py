"""FLOPs of a model, against counts by hand."""

from __future__ import annotations

import math

import torch

from seqbench.models.build import build_model
from seqbench.suite.cost import flops_per_token

L, D, V = 64, 16, 11


def flops(name: str, **options: object) -> float:
    model = build_model(name, vocab_size=V, d_model=D, num_layers=1, **options)
    return flops_per_token(model, L, torch.device("cpu"))


def test_mamba_counts_products_scan_and_short_convolution() -> None:
    E, N, R, K = 2 * D, 16, 1, 4
    products = D * 2 * E + E * (R + 2 * N) + R * E + E * D + D * V
    assert flops("mamba") == 2 * products + 7 * E * N + 2 * K * E


def test_s4_counts_its_transforms() -> None:
    size, modes, block = 2 * L, 32, math.isqrt(L - 1) + 1
    transforms = (2 * D + D) * 2.5 * size * math.log2(size)  # of x, its inverse, and the filter's
    kernel = 2 * D * (2 * modes) * block * -(-L // block)
    assert flops("s4") == (transforms + kernel) / L + 2 * (D * 2 * D + D * V)
