"""The Triton kernels of the short convolution; `triton.py` beside this launches them.

A program, one warp, owns a block of channels and walks a chunk of time, the last K inputs in
registers, so that each input is read once. Of the K - 1 + L inputs, the first K - 1 are the initial
state; input t + K - 1 is x[t].
"""

# mypy: ignore-errors
# ruff: noqa: RUF005  (Triton unpacks no tuples into tuples)
from __future__ import annotations

import functools

import triton
import triton.language as tl

_LOG2E = tl.constexpr(1.4426950408889634)

_jit = functools.partial(triton.jit, do_not_specialize=["length", "chunk", "chunks"])


@_jit()
def forward(
    x, weight, bias, initial, y, x_b, x_l, initial_b, initial_l,
    length, width, chunk, chunks,
    TAPS: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """y[t] = silu(bias + Σ_k weight[k] input[t + k])."""
    b, d, inside, begin, end = _place(length, width, chunk, chunks, BLOCK)
    weights, bias_d = _load_weights(weight, bias, d, inside, TAPS, BLOCK)
    x += b * x_b
    y += b * length * width
    window = _window(x, x_l, initial, b * initial_b, initial_l, begin, d, inside, TAPS, BLOCK)
    for t in range(begin, end, STEPS):
        rows = _rows(x, x_l, t, end, d, inside, STEPS)
        first = y + tl.cast(t, tl.int64) * width
        ys = ()
        for i in tl.static_range(STEPS):
            window = _shift(window, rows[i].to(tl.float32), TAPS)
            y_d = _weigh(window, weights, bias_d, TAPS)
            if SILU:
                y_d *= _sigmoid(y_d)
            ys = ys + (y_d,)
        for i in tl.static_range(STEPS):
            stored = ys[i].to(y.dtype.element_ty)
            tl.store(first + (i * width + d), stored, mask=inside & (t + i < end))


@_jit()
def backward(
    dy, dfinal, x, weight, bias, initial, dx, dweight, dbias, dinitial,
    dy_b, dy_l, dfinal_b, dfinal_l, x_b, x_l, initial_b, initial_l,
    length, width, chunk, chunks,
    TAPS: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """Gradients of inputs begin to end, and the chunk's part of those of weight and bias.

    Input m is seen by y[m - K + 1] to y[m]: those before the chunk are walked first.
    """
    inputs = length + TAPS - 1
    b, d, inside, begin, end = _place(inputs, width, chunk, chunks, BLOCK)
    weights, bias_d = _load_weights(weight, bias, d, inside, TAPS, BLOCK)
    x += b * x_b
    dy += b * dy_b
    zero = tl.zeros((BLOCK,), tl.float32)
    window = _window(
        x, x_l, initial, b * initial_b, initial_l, begin - (TAPS - 1), d, inside, TAPS, BLOCK
    )
    dpres = ()
    dweights = ()
    for _ in tl.static_range(TAPS):
        dpres = dpres + (zero,)
        dweights = dweights + (zero,)
    for i in tl.static_range(TAPS - 1):
        t = begin - (TAPS - 1) + i
        exists = inside & (t >= 0) & (t < length)
        x_d = _input(x, x_l, initial, b * initial_b, initial_l, t, length, d, inside, TAPS)
        dy_d = tl.load(dy + tl.cast(t, tl.int64) * dy_l + d, mask=exists, other=0.0)
        window = _shift(window, x_d, TAPS)
        dpre_d = _activate(window, weights, bias_d, dy_d.to(tl.float32), TAPS, SILU)
        dpres = _shift(dpres, dpre_d, TAPS)
    dbias_d = zero
    for t in range(begin, end, STEPS):
        last = tl.minimum(end, length)
        x_rows = _rows(x, x_l, t, last, d, inside, STEPS)
        dy_rows = _rows(dy, dy_l, t, last, d, inside, STEPS)
        for i in tl.static_range(STEPS):
            m = t + i
            window = _shift(window, x_rows[i].to(tl.float32), TAPS)
            dpre_d = _activate(window, weights, bias_d, dy_rows[i].to(tl.float32), TAPS, SILU)
            dpres = _shift(dpres, dpre_d, TAPS)
            dbias_d += dpre_d
            sums = ()
            for k in tl.static_range(TAPS):
                sums = sums + (dweights[k] + dpre_d * window[k],)
            dweights = sums
            dinput_d = zero
            for k in tl.static_range(TAPS):
                dinput_d += weights[k] * dpres[TAPS - 1 - k]
            if dfinal is not None:
                row = dfinal + b * dfinal_b + (m - length) * dfinal_l + d
                seen = inside & (m >= length) & (m < end)
                dinput_d += tl.load(row, mask=seen, other=0.0).to(tl.float32)
            if dx is not None:
                row = dx + (b * length + m - (TAPS - 1)) * width + d
                stored = dinput_d.to(dx.dtype.element_ty)
                tl.store(row, stored, mask=inside & (m >= TAPS - 1) & (m < end))
            if dinitial is not None:
                row = dinitial + (b * (TAPS - 1) + m) * width + d
                stored = dinput_d.to(dinitial.dtype.element_ty)
                tl.store(row, stored, mask=inside & (m < TAPS - 1) & (m < end))
    part = b * chunks + begin // chunk
    for k in tl.static_range(TAPS):
        tl.store(dweight + (part * TAPS + k) * width + d, dweights[k], mask=inside)
    tl.store(dbias + part * width + d, dbias_d, mask=inside)


@triton.jit
def step(
    x, weight, bias, before, y, after, x_b, before_b, before_k, width,
    TAPS: tl.constexpr, BLOCK: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """y of one input, and the K - 1 inputs before the next."""
    blocks = tl.cdiv(width, BLOCK)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    d = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = d < width
    total_d = tl.zeros((BLOCK,), tl.float32)
    if bias is not None:
        total_d += tl.load(bias + d, mask=inside, other=0.0).to(tl.float32)
    for k in tl.static_range(TAPS):
        if k < TAPS - 1:
            x_d = tl.load(before + b * before_b + k * before_k + d, mask=inside, other=0.0)
        else:
            x_d = tl.load(x + b * x_b + d, mask=inside, other=0.0)
        weight_d = tl.load(weight + d * TAPS + k, mask=inside, other=0.0).to(tl.float32)
        total_d += weight_d * x_d.to(tl.float32)
        if k > 0:
            row = after + (b * (TAPS - 1) + k - 1) * width + d
            tl.store(row, x_d.to(after.dtype.element_ty), mask=inside)
    if SILU:
        total_d *= _sigmoid(total_d)
    tl.store(y + b * width + d, total_d.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _place(length, width, chunk, chunks, BLOCK: tl.constexpr):
    blocks = tl.cdiv(width, BLOCK)
    program = tl.program_id(0)
    d = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    k = (program // blocks) % chunks
    b = (program // blocks // chunks).to(tl.int64)
    return b, d, d < width, k * chunk, tl.minimum((k + 1) * chunk, length)


@triton.jit
def _load_weights(weight, bias, d, inside, TAPS: tl.constexpr, BLOCK: tl.constexpr):
    weights = ()
    for k in tl.static_range(TAPS):
        weights = weights + (tl.load(weight + d * TAPS + k, mask=inside, other=0.0),)
    if bias is not None:
        return weights, tl.load(bias + d, mask=inside, other=0.0)
    else:
        return weights, tl.zeros((BLOCK,), tl.float32)


@triton.jit
def _window(
    x, stride, initial, initial_offset, initial_stride, t, d, inside,
    TAPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The K inputs before x[t], the oldest of which is never used."""
    window = (tl.zeros((BLOCK,), tl.float32),)
    for i in tl.static_range(TAPS - 1):
        row = _input(
            x, stride, initial, initial_offset, initial_stride, t - (TAPS - 1) + i, t, d, inside,
            TAPS,
        )  # fmt: skip
        window = window + (row,)
    return window


@triton.jit
def _input(
    x, stride, initial, initial_offset, initial_stride, t, end, d, inside, TAPS: tl.constexpr
):  # fmt: skip
    """x[t], before the first from the initial state."""
    row = x + tl.cast(t, tl.int64) * stride + d
    x_d = tl.load(row, mask=inside & (t >= 0) & (t < end), other=0.0).to(tl.float32)
    if initial is not None:
        row = initial + initial_offset + (t + TAPS - 1) * initial_stride + d
        before = inside & (t < 0) & (t + TAPS - 1 >= 0)
        x_d += tl.load(row, mask=before, other=0.0).to(tl.float32)
    return x_d


@triton.jit
def _rows(x, stride, t, end, d, inside, STEPS: tl.constexpr):
    """STEPS rows from t on, zeros past the end."""
    first = x + tl.cast(t, tl.int64) * stride
    rows = ()
    for i in tl.static_range(STEPS):
        row = first + (i * stride + d)
        rows = rows + (tl.load(row, mask=inside & (t + i < end), other=0.0),)
    return rows


@triton.jit
def _shift(window, newest, TAPS: tl.constexpr):
    """The window without its oldest."""
    shifted = ()
    for k in tl.static_range(1, TAPS):
        shifted = shifted + (window[k],)
    return shifted + (newest,)


@triton.jit
def _weigh(window, weights, bias_d, TAPS: tl.constexpr):
    total_d = bias_d
    for k in tl.static_range(TAPS):
        total_d += weights[k] * window[k]
    return total_d


@triton.jit
def _activate(window, weights, bias_d, dy_d, TAPS: tl.constexpr, SILU: tl.constexpr):
    """The gradient before the activation; 0 where dy is, so before the first and past the last."""
    if SILU:
        pre_d = _weigh(window, weights, bias_d, TAPS)
        sigmoid_d = _sigmoid(pre_d)
        dy_d *= sigmoid_d * (1.0 + pre_d * (1.0 - sigmoid_d))
    return dy_d


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp2(-x * _LOG2E))
