"""Chunked linear recurrences against their plain loops, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from seqbench.kernels.linear_attention import (
    diagonal_recurrence,
    linear_attention,
    linear_attention_step,
    reference,
)


def noise(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def decays(kind: str, B: int, L: int, H: int, K: int) -> Tensor | None:
    generator = torch.Generator().manual_seed(L)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    return {
        "none": None,
        "head": -uniform(H, 1),
        "key": -uniform(B, L, H, K),
        "strong": -5 * uniform(B, L, H, K),
    }[kind]


@pytest.mark.parametrize("length", [1, 2, 3, 63, 64, 65, 130])
@pytest.mark.parametrize("decay", ["none", "head", "key", "strong"])
def test_chunked_linear_attention_is_the_loop(length: int, decay: str) -> None:
    B, H, K, V = 2, 3, 4, 5
    q, k = noise(B, length, H, K), noise(B, length, H, K) + 1
    v, state = noise(B, length, H, V), noise(B, H, K, V)
    log_decay = decays(decay, B, length, H, K)
    inputs = [t.requires_grad_() for t in (q, k, v, state)]
    results = []
    for function, chunk in (
        (linear_attention, {"chunk": 16}),
        (reference.linear_attention, {}),
    ):
        y, end = function(q, k, v, log_decay, state, **chunk)
        gradients = torch.autograd.grad((y * y.sin()).sum() + end.cos().sum(), inputs)
        results.append((y, end, *gradients))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("decay", ["none", "head", "key"])
def test_steps_are_the_loop(decay: str) -> None:
    B, L, H, K, V = 2, 7, 3, 4, 5
    q, k, v, state = noise(B, L, H, K), noise(B, L, H, K), noise(B, L, H, V), noise(B, H, K, V)
    log_decay = decays(decay, B, L, H, K)
    y, end = reference.linear_attention(q, k, v, log_decay, state)
    for t in range(L):
        now = log_decay[:, t] if log_decay is not None and log_decay.ndim == 4 else log_decay
        y_t, state = linear_attention_step(q[:, t], k[:, t], v[:, t], now, state)
        torch.testing.assert_close(y_t, y[:, t], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state, end, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("length", [1, 31, 32, 33, 100])
def test_chunked_diagonal_recurrence_is_the_loop(length: int) -> None:
    log_a = torch.complex(-noise(6).abs(), 3 * noise(6))
    x = torch.complex(noise(2, length, 6), noise(3, length, 6)[:2])
    state = torch.complex(noise(2, 6), noise(2, 6))
    for start in (state, None):
        torch.testing.assert_close(
            diagonal_recurrence(log_a, x, start),
            reference.diagonal_recurrence(log_a, x, start),
            rtol=1e-9,
            atol=1e-9,
        )
