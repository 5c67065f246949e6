"""FFT convolution and the kernels of diagonal state spaces against their sums, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from seqbench.kernels.long_conv import diagonal, long_conv, reference


def noise(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("length", [1, 2, 5, 64, 100])
@pytest.mark.parametrize("taps", [1, 3, 64, 130])
def test_long_conv_and_its_gradients_are_the_sums(length: int, taps: int) -> None:
    x, h = noise(2, length, 3).requires_grad_(), noise(3, taps).requires_grad_()
    results = []
    for function in (long_conv, reference.long_conv):
        y = function(x, h)
        results.append((y, *torch.autograd.grad((y * y.sin()).sum(), (x, h))))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)


def test_long_conv_of_nothing_is_nothing_and_differentiable() -> None:
    for x, h in ((noise(2, 0, 3), noise(3, 4)), (noise(2, 5, 3), noise(3, 0))):
        leaves = [x.requires_grad_(), h.requires_grad_()]
        y = long_conv(*leaves)
        assert y.shape == x.shape and not y.any()
        gradients = torch.autograd.grad(y.sum(), leaves, materialize_grads=True)
        assert not any(gradient.any() for gradient in gradients)


def test_only_the_gradients_needed_are_computed_and_are_the_same() -> None:
    x, h = noise(2, 9, 3), noise(3, 9)
    both = torch.autograd.grad(
        long_conv(x.requires_grad_(), h.requires_grad_()).sin().sum(), (x, h)
    )
    for i, expected in enumerate(both):
        leaves = [x.detach(), h.detach()]
        leaves[i].requires_grad_()
        (alone,) = torch.autograd.grad(long_conv(*leaves).sin().sum(), leaves[i])
        torch.testing.assert_close(alone, expected, rtol=0, atol=1e-12)


def test_widths_that_differ_are_named() -> None:
    with pytest.raises(ValueError, match=r"x \(2, 5, 3\) and filter \(4, 5\)"):
        long_conv(noise(2, 5, 3), noise(4, 5))


def modes(kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """log a, b and c (D, M) of a decaying state space, real or complex."""
    if kind == "real":
        return -noise(3, 4).abs() / 20, noise(3, 4), noise(4, 4)[:3]
    parts = [torch.complex(noise(3, 4 + i), noise(4, 4 + i)[:3])[:, :4] for i in range(2)]
    return torch.complex(-noise(3, 4).abs() / 20, 3 * noise(5, 4)[:3]), *parts


@pytest.mark.parametrize("kind", ["real", "complex"])
@pytest.mark.parametrize("length", [1, 2, 5, 49, 50, 51, 1000])
def test_diagonal_kernel_is_the_vandermonde_product(length: int, kind: str) -> None:
    leaves: list[Any] = [x.requires_grad_() for x in modes(kind)[:2]]
    results = []
    for function in (diagonal.diagonal_kernel, reference.diagonal_kernel):
        kernel = function(*leaves, length)
        results.append((kernel, *torch.autograd.grad(kernel.sin().sum(), leaves)))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("kind", ["real", "complex"])
@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 30])
def test_diagonal_conv_is_the_recurrence(
    length: int, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(diagonal, "CHUNK", 8)
    log_a, b, c = modes(kind)
    state = noise(2, 3, 4) if kind == "real" else torch.complex(noise(2, 3, 4), noise(3, 3, 4)[:2])
    leaves = [t.requires_grad_() for t in (noise(2, length, 3), log_a, b, c, state)]
    results = []
    for function in (diagonal.diagonal_conv, reference.diagonal_conv):
        y, end = function(*leaves)
        loss = y.sin().sum() + (end.real * 2).cos().sum()
        gradients = torch.autograd.grad(loss, leaves, materialize_grads=True)
        results.append((y, end, *gradients))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-8, atol=1e-8)
