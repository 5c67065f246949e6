"""Sequence layers against plain loops and sums, in float64, and against each other."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from seqbench.models.base import SequenceLayer
from seqbench.models.discovery import layer_class
from seqbench.models.hippo import normal_legs
from seqbench.models.rotary import rotate


def make(name: str, width: int = 8, **options: Any) -> Any:
    torch.manual_seed(0)
    kind = layer_class(name)
    layer = kind(width, kind.Config(**options), d_model=width)
    assert isinstance(layer, SequenceLayer)
    return layer.double()


def noise(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def test_hyena_is_the_sum_over_its_filter() -> None:
    layer = make("hyena", filter_length=50)
    x = noise(2, 40, 8)
    h_DL = layer.filter(40)
    expected = layer.D[0] * x
    for t in range(40):
        for s in range(t + 1):
            expected[:, t] += h_DL[:, t - s] * x[:, s]
    torch.testing.assert_close(layer(x), expected, rtol=1e-9, atol=1e-9)
    # A filter is a function of the lag alone, whatever the length.
    torch.testing.assert_close(layer.filter(90)[:, :40], h_DL, rtol=0, atol=1e-12)
    assert h_DL[:, 0].abs().min() > 20 * h_DL[:, -1].abs().min(), "the fast channels decay"


@torch.no_grad()
def test_a_state_of_attention_can_be_continued_twice() -> None:
    """Keys are written into spare room while decoding: never where another state looks."""
    layer = make("attention", num_heads=2)
    _, state = layer(noise(2, 5, 8), layer.initial_state(2, torch.device("cpu"), torch.float64))
    kept = [t.clone() for t in state]
    one, other = noise(3, 2, 8)[:2]
    branches = [layer.step(x, state)[1] for x in (one, other)]
    for x, branch in zip((one, other), branches):
        expected_state = layer.step(x, tuple(kept))[1]
        for _ in range(3):
            y, branch = layer.step(x, branch)
            expected, expected_state = layer.step(x, tuple(t.clone() for t in expected_state))
            torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    assert all(torch.equal(t, k) for t, k in zip(state, kept))
    some = tuple(t[:1] for t in branches[0])
    torch.testing.assert_close(
        layer.step(one[:1], some)[0], layer.step(one, branches[0])[0][:1], rtol=0, atol=1e-12
    )
    # Token after token in one place, not copied each time.
    _, first = layer.step(one, branches[0])
    _, second = layer.step(one, first)
    assert second[0].data_ptr() == first[0].data_ptr()


def test_attention_is_the_softmax_sum() -> None:
    layer = make("attention", num_heads=2, position="none", window=6)
    x = noise(1, 15, 8)
    q, k, v = layer.in_proj(x).view(1, 15, 3, 2, 4).unbind(2)
    expected = torch.zeros(15, 2, 4, dtype=torch.float64)
    for t in range(15):
        start = max(0, t - 5)
        for head in range(2):
            weights = (k[0, start : t + 1, head] @ q[0, t, head] / 2).softmax(0)
            expected[t, head] = weights @ v[0, start : t + 1, head]
    torch.testing.assert_close(
        layer(x)[0], layer.out_proj(expected.flatten(1)), rtol=1e-9, atol=1e-9
    )


def test_rotary_scores_depend_on_distance_alone() -> None:
    x = noise(1, 6, 1, 8)
    near, far = (rotate(x, torch.arange(6) + shift)[0, :, 0] for shift in (0, 9))
    scores = near @ near.T
    torch.testing.assert_close(far @ far.T, scores, rtol=1e-5, atol=1e-5)
    assert (scores - x[0, :, 0] @ x[0, :, 0].T).abs().max() > 0.1


def test_xpos_is_rope_that_falls_off_with_distance() -> None:
    """Each pair's score times ζ^(distance / 512), ζ = (2i/W + 0.4) / 1.4 (Sun et al. 2022)."""
    layer = make("attention", num_heads=1, position="xpos")
    x = noise(1, 700, 8)
    q, k, v = (t[0, :, 0] for t in layer._project(x, torch.arange(700)))
    zeta = ((torch.arange(4) / 4 + 0.4) / 1.4).double().repeat(2)
    place = torch.arange(700)
    weights = zeta ** ((place[:, None] - place)[..., None] / 512)
    scores = torch.einsum("tw,sw,tsw->ts", q, k, weights) / 8**0.5
    scores = scores.masked_fill(place[:, None] < place, -math.inf)
    expected = layer.out_proj(scores.softmax(-1) @ v)
    torch.testing.assert_close(layer(x)[0], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("discretisation", ["zoh", "bilinear"])
@pytest.mark.parametrize("init", ["lin", "inv", "legs", "real"])
def test_s4_modes_agree(init: str, discretisation: str) -> None:
    """Convolution, recurrence, and both at once, against a loop written out with matrices."""
    layer = make("s4", d_state=6, init=init, discretisation=discretisation)
    x = noise(2, 37, 8)
    A = torch.diag_embed(
        torch.complex(-layer.A_log.exp(), layer.A_imag)
        if layer.complex
        else (-layer.A_log.exp()).to(torch.complex128)
    )
    dt = layer.log_dt.exp()[:, None, None]
    eye = torch.eye(A.shape[-1], dtype=A.dtype)
    ones = torch.ones(8, A.shape[-1], 1, dtype=A.dtype)
    if discretisation == "zoh":
        Abar = torch.linalg.matrix_exp(A * dt)
        Bbar = torch.linalg.solve(A, (Abar - eye) @ ones)
    else:
        half = A * dt / 2
        Abar = torch.linalg.solve(eye - half, eye + half)
        Bbar = torch.linalg.solve(eye - half, dt * ones)
    C = 2 * torch.view_as_complex(layer.C) if layer.complex else layer.C.to(A.dtype)
    h, expected = torch.zeros(2, 8, A.shape[-1], 1, dtype=A.dtype), []
    for t in range(37):
        h = Abar @ h + Bbar * x[:, t, :, None, None]
        expected.append((C[:, None] @ h)[..., 0, 0].real + layer.D * x[:, t])
    torch.testing.assert_close(layer(x), torch.stack(expected, 1), rtol=1e-9, atol=1e-9)


def test_s6_without_selection_is_s4() -> None:
    """All switches off, exact zero-order hold, the same A, Δ, C and D: the LTI layer."""
    off = dict.fromkeys(("selective_dt", "selective_B", "selective_C"), False)
    s6 = make("s6", d_state=6, init="complex", discretisation="zoh", **off)
    s4 = make("s4", d_state=6)
    with torch.no_grad():
        s4.A_log.copy_(s6.A_log)
        s4.A_imag.copy_(s6.A_imag)
        s4.C.copy_(s6.C)
        s4.D.copy_(s6.D)
        s4.log_dt.copy_(torch.nn.functional.softplus(s6.dt_bias).log())
    x = noise(2, 50, 8)
    torch.testing.assert_close(s6(x), s4(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("init", ["real", "complex"])
def test_euler_tends_to_the_exact_hold_as_steps_shrink(init: str) -> None:
    errors = []
    for dt in (1e-2, 1e-3):
        options = {"d_state": 4, "init": init, "dt_min": dt, "dt_max": dt, "selective_dt": False}
        x = noise(1, 30, 8)
        euler, exact = (make("s6", discretisation=d, **options)(x) for d in ("euler", "zoh"))
        errors.append((euler - exact).abs().max().item())
    # Δ B differs from the exact hold by a term in Δ², so an error about a hundredth.
    assert errors[1] < errors[0] / 50 and errors[0] > 0


@pytest.mark.parametrize("switch", ["selective_dt", "selective_B", "selective_C"])
def test_each_switch_makes_s6_depend_on_its_input(switch: str) -> None:
    """Superposition holds exactly when nothing is selective."""
    off = dict.fromkeys(("selective_dt", "selective_B", "selective_C"), False)
    a, b = noise(1, 20, 8), noise(1, 21, 8)[:, :20]

    def excess(layer: Any) -> float:
        return (layer(a + b) - layer(a) - layer(b)).abs().max().item()

    assert excess(make("s6", **off)) < 1e-12
    assert excess(make("s6", **{**off, switch: True})) > 1e-4


def test_s6_has_the_ablations_sizes() -> None:
    """Tables 9 and 10: what the rank of Δ and N cost, 48 layers of width 1024 widened to 2048."""

    def parameters(**options: Any) -> int:
        with torch.device("meta"):
            kind = layer_class("s6")
            layer = kind(2048, kind.Config(**options), d_model=1024)
            return sum(p.numel() for p in layer.parameters())

    rank = {r: 48 * parameters(d_state=16, dt_rank=r) for r in (1, 2, 32, 64)}
    assert round((rank[64] - rank[32]) / 1e6, 1) == round(371.5 - 365.2, 1)
    assert round((rank[2] - rank[1]) / 1e6, 1) == round(359.3 - 359.1, 1)
    state = {n: 48 * parameters(d_state=n, dt_rank=64) for n in (1, 16)}
    # The table's 371.5M and 367.1M count the matrices B and C and A.
    assert round((state[16] - state[1]) / 1e6, 1) == round(371.5 - 367.1, 1)


@pytest.mark.parametrize("size", [2, 8, 64])
def test_legs_eigenvalues_are_those_of_the_normal_part(size: int) -> None:
    eigenvalues, vectors = normal_legs(size)
    n = np.arange(size)
    root = np.sqrt(2 * n + 1)
    legs = -np.tril(np.outer(root, root), -1) - np.diag(n + 1)
    p = np.sqrt(n + 0.5)
    normal = legs + np.outer(p, p)
    assert np.allclose(normal @ normal.T, normal.T @ normal)
    assert np.allclose(normal @ vectors, vectors * eigenvalues)
    assert np.allclose(eigenvalues.real, -0.5) and (eigenvalues.imag > 0).all()
    assert len(eigenvalues) == size // 2


def test_lin_and_inv_are_the_papers() -> None:
    n = torch.arange(4, dtype=torch.float64)
    lin, inv = (make("s4", d_state=8, init=i).A_imag[0] for i in ("lin", "inv"))
    torch.testing.assert_close(lin, math.pi * n, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(inv, 8 / math.pi * (8 / (2 * n + 1) - 1), rtol=1e-6, atol=1e-6)


def test_long_memory_survives_float32() -> None:
    """Thousands of steps at the smallest Δ: the kernel against its powers in float64."""
    layer = make("s4", width=4, dt_min=1e-4, dt_max=1e-4, d_state=64)
    x = torch.zeros(1, 20_000, 4, dtype=torch.float64)
    x[:, 0] = 1
    exact = layer(x)
    single = layer.float()(x.float())
    assert (single - exact).abs().max() < 1e-5 * exact.abs().max()
