"""The Triton kernels of the selective scan; `triton.py` beside this launches them.

A program, one warp, owns a block of channels, all N states of each in registers, and walks through
time. State tiles are (N, channels), one channel a lane, so that a sum over N stays in a lane; the
compiler follows the layout of loads, and spreads one it knows to be aligned four numbers a lane:
it is told nothing of the alignment of pointers to states. Complex numbers are pairs of tiles; of a
real one the second is never used.

A chunk of time is what one program scans. It divides into blocks of EVERY steps, at whose starts
forward keeps the state, and these into groups of STEPS, unrolled. Past the end Δ is 0, which leaves
a state as it is.
"""

# mypy: ignore-errors
# ruff: noqa: RUF005  (Triton unpacks no tuples into tuples)
from __future__ import annotations

import functools

import triton
import triton.language as tl

_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)

# log1p(e) / e on [0, 1], constant term 1; relative error 3e-8.
_P1 = tl.constexpr(-0.4999964793592981)
_P2 = tl.constexpr(0.3332132195942414)
_P3 = tl.constexpr(-0.24857158201806928)
_P4 = tl.constexpr(0.19153633157872457)
_P5 = tl.constexpr(-0.1375375557833884)
_P6 = tl.constexpr(0.07920398133009593)
_P7 = tl.constexpr(-0.030065450811041186)
_P8 = tl.constexpr(0.005364738930505639)

_jit = functools.partial(
    triton.jit,
    do_not_specialize=["length", "chunk", "chunks"],
    do_not_specialize_on_alignment=[
        "A", "initial", "starts", "ends", "edge", "checkpoints", "scratch", "dfinal", "dA"
    ],
)  # fmt: skip


@_jit()
def forward(
    u, delta, z, A, B, C, D, bias, initial, starts, reset,
    y, final, checkpoints,
    u_b, u_l, delta_b, delta_l, z_b, z_l, B_b, B_l, C_b, C_l,
    length, width, chunk, chunks,
    STATE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    EVERY: tl.constexpr, STEPS: tl.constexpr,
    SOFTPLUS: tl.constexpr, COMPLEX: tl.constexpr,
    SELECTIVE_B: tl.constexpr, SELECTIVE_C: tl.constexpr,
):  # fmt: skip
    """y, the states every EVERY steps, and the final state, from `starts` or `initial`."""
    b, k, block, d, inside, n, state, tile = _place(width, chunks, STATE, ROWS, BLOCK)
    begin, end = k * chunk, tl.minimum((k + 1) * chunk, length)
    Ar, Ai = _load_A(A, d, n, state, width, STATE, COMPLEX)
    Br, Bi = _load_constant(B, d, n, state, width, STATE, COMPLEX, SELECTIVE_B)
    Cr, Ci = _load_constant(C, d, n, state, width, STATE, COMPLEX, SELECTIVE_C)
    hr, hi = _first_state(initial, starts, b, b * chunks + k, block, d, n, state, tile, width,
                          STATE, ROWS, BLOCK, COMPLEX)  # fmt: skip
    bias_d = _load_vector(bias, d, inside, BLOCK)
    D_d = _load_vector(D, d, inside, BLOCK)
    checkpoint = b * tl.cdiv(length, EVERY) + begin // EVERY
    y += b * length * width
    us = _rows(u + b * u_b, u_l, begin, end, d, inside, STEPS)
    deltas = _rows(delta + b * delta_b, delta_l, begin, end, d, inside, STEPS)
    for t in range(begin, end, STEPS):
        if t % EVERY == 0:
            kept = _tile(checkpoints, checkpoint, block, width, STATE, BLOCK, COMPLEX)
            _store_tile(kept, tile, hr, hi, n, STATE, BLOCK, COMPLEX)
            checkpoint += 1
        us_next = _rows(u + b * u_b, u_l, t + STEPS, end, d, inside, STEPS)
        deltas_next = _rows(delta + b * delta_b, delta_l, t + STEPS, end, d, inside, STEPS)
        if z is not None:
            zs = _rows(z + b * z_b, z_l, t, end, d, inside, STEPS)
        ys = ()
        for i in tl.static_range(STEPS):
            u_d = us[i].to(tl.float32)
            delta_d = _delta(deltas[i], bias_d, t + i, end, SOFTPLUS)
            ar, ai = _decay(delta_d, Ar, Ai, COMPLEX)
            ar, ai = _cut(ar, ai, reset, b * length + t + i, t + i < end, COMPLEX)
            if SELECTIVE_B:
                Br, Bi = _load_projection(B + b * B_b, B_l, t + i, end, n, STATE, COMPLEX)
            hr, hi = _advance(hr, hi, ar, ai, (delta_d * u_d)[None, :], Br, Bi, COMPLEX)
            if SELECTIVE_C:
                Cr, Ci = _load_projection(C + b * C_b, C_l, t + i, end, n, STATE, COMPLEX)
            y_d = _read(hr, hi, Cr, Ci, COMPLEX)
            if D is not None:
                y_d += D_d * u_d
            if z is not None:
                z_d = zs[i].to(tl.float32)
                y_d *= z_d * _sigmoid(z_d)
            ys = ys + (y_d,)
        first_y = y + tl.cast(t, tl.int64) * width
        for i in tl.static_range(STEPS):
            row = first_y + (i * width + d)
            tl.store(row, ys[i].to(y.dtype.element_ty), mask=inside & (t + i < end))
        us, deltas = us_next, deltas_next
    if end == length:
        _store_state(final, _contract_offsets(b, d, n, width, STATE), hr, hi, state, COMPLEX)


@_jit()
def chunk_states(
    u, delta, A, B, bias, reset, ends, sums,
    u_b, u_l, delta_b, delta_l, B_b, B_l,
    length, width, chunk, chunks,
    STATE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr,
    SOFTPLUS: tl.constexpr, COMPLEX: tl.constexpr, SELECTIVE_B: tl.constexpr,
):  # fmt: skip
    """Every chunk's final state from the zero state; its sum of Δ, and 0 after it if reset."""
    b, k, block, d, inside, n, state, tile = _place(width, chunks, STATE, ROWS, BLOCK)
    begin, end = k * chunk, tl.minimum((k + 1) * chunk, length)
    Ar, Ai = _load_A(A, d, n, state, width, STATE, COMPLEX)
    Br, Bi = _load_constant(B, d, n, state, width, STATE, COMPLEX, SELECTIVE_B)
    bias_d = _load_vector(bias, d, inside, BLOCK)
    hr = tl.zeros((ROWS, BLOCK), tl.float32)
    hi = hr
    sum_d = tl.zeros((BLOCK,), tl.float32)
    uncut_d = tl.full((BLOCK,), 1.0, tl.float32)
    us = _rows(u + b * u_b, u_l, begin, end, d, inside, STEPS)
    deltas = _rows(delta + b * delta_b, delta_l, begin, end, d, inside, STEPS)
    for t in range(begin, end, STEPS):
        us_next = _rows(u + b * u_b, u_l, t + STEPS, end, d, inside, STEPS)
        deltas_next = _rows(delta + b * delta_b, delta_l, t + STEPS, end, d, inside, STEPS)
        for i in tl.static_range(STEPS):
            delta_d = _delta(deltas[i], bias_d, t + i, end, SOFTPLUS)
            sum_d += delta_d
            ar, ai = _decay(delta_d, Ar, Ai, COMPLEX)
            ar, ai = _cut(ar, ai, reset, b * length + t + i, t + i < end, COMPLEX)
            uncut_d = _keep(uncut_d, reset, b * length + t + i, t + i < end)
            if SELECTIVE_B:
                Br, Bi = _load_projection(B + b * B_b, B_l, t + i, end, n, STATE, COMPLEX)
            drive_d = delta_d * us[i].to(tl.float32)
            hr, hi = _advance(hr, hi, ar, ai, drive_d[None, :], Br, Bi, COMPLEX)
        us, deltas = us_next, deltas_next
    chunk_number = b * chunks + k
    end_tile = _tile(ends, chunk_number, block, width, STATE, BLOCK, COMPLEX)
    _store_tile(end_tile, tile, hr, hi, n, STATE, BLOCK, COMPLEX)
    tl.store(sums + (2 * chunk_number) * width + d, sum_d, mask=inside)
    tl.store(sums + (2 * chunk_number + 1) * width + d, uncut_d, mask=inside)


@_jit()
def chunk_starts(
    ends, sums, A, edge,
    width, chunks,
    STATE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr,
    COMPLEX: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """In place of every chunk's own final state, the state it starts from; the first's is `edge`.

    REVERSE: likewise of the adjoint, from the last chunk on.
    """
    b, _, block, d, inside, n, state, tile = _place(width, 1, STATE, ROWS, BLOCK)
    Ar, Ai = _load_A(A, d, n, state, width, STATE, COMPLEX)
    if REVERSE:
        Ai = -Ai
    if edge is not None:
        hr, hi = _load_planes(edge, b, d, n, state, width, STATE, COMPLEX)
    else:
        hr = tl.zeros((ROWS, BLOCK), tl.float32)
        hi = hr
    for first in range(0, chunks, STEPS):
        own = ()
        for i in tl.static_range(STEPS):  # all loads before the first store
            j = tl.minimum(first + i, chunks - 1)
            number = b * chunks + (chunks - 1 - j if REVERSE else j)
            end = _tile(ends, number, block, width, STATE, BLOCK, COMPLEX)
            er, ei = _load_tile(end, tile, n, STATE, BLOCK, COMPLEX)
            row = sums + 2 * number * width + d
            sum_d = tl.load(row, mask=inside, other=0.0)
            own = own + ((er, ei, sum_d, tl.load(row + width, mask=inside, other=0.0)),)
        for i in tl.static_range(STEPS):
            if first + i < chunks:
                number = b * chunks + (chunks - 1 - first - i if REVERSE else first + i)
                start = _tile(ends, number, block, width, STATE, BLOCK, COMPLEX)
                _store_tile(start, tile, hr, hi, n, STATE, BLOCK, COMPLEX)
                er, ei, sum_d, uncut_d = own[i]
                ar, ai = _decay(sum_d, Ar, Ai, COMPLEX)
                nr, ni = _multiply(ar, ai, hr, hi, COMPLEX)
                hr = uncut_d[None, :] * nr + er
                hi = uncut_d[None, :] * ni + ei


@_jit()
def chunk_adjoints(
    dy, z, delta, A, C, bias, reset, ends, sums,
    dy_b, dy_l, z_b, z_l, delta_b, delta_l, C_b, C_l,
    length, width, chunk, chunks,
    STATE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr,
    SOFTPLUS: tl.constexpr, COMPLEX: tl.constexpr, SELECTIVE_C: tl.constexpr,
):  # fmt: skip
    """The adjoint each chunk hands to the one before it, from a zero adjoint at its end."""
    b, k, block, d, inside, n, state, tile = _place(width, chunks, STATE, ROWS, BLOCK)
    begin, end = k * chunk, tl.minimum((k + 1) * chunk, length)
    Ar, Ai = _load_A(A, d, n, state, width, STATE, COMPLEX)
    Cr, Ci = _load_constant(C, d, n, state, width, STATE, COMPLEX, SELECTIVE_C)
    bias_d = _load_vector(bias, d, inside, BLOCK)
    gr = tl.zeros((ROWS, BLOCK), tl.float32)
    gi = gr
    sum_d = tl.zeros((BLOCK,), tl.float32)
    uncut_d = tl.full((BLOCK,), 1.0, tl.float32)
    for group in range(0, tl.cdiv(end - begin, STEPS)):
        t = begin + (tl.cdiv(end - begin, STEPS) - 1 - group) * STEPS
        dys = _rows(dy + b * dy_b, dy_l, t, end, d, inside, STEPS)
        deltas = _rows(delta + b * delta_b, delta_l, t, end, d, inside, STEPS)
        if z is not None:
            zs = _rows(z + b * z_b, z_l, t, end, d, inside, STEPS)
        for i in tl.static_range(STEPS - 1, -1, -1):
            delta_d = _delta(deltas[i], bias_d, t + i, end, SOFTPLUS)
            sum_d += delta_d
            dout_d = dys[i].to(tl.float32)
            if z is not None:
                z_d = zs[i].to(tl.float32)
                dout_d *= z_d * _sigmoid(z_d)
            if SELECTIVE_C:
                Cr, Ci = _load_projection(C + b * C_b, C_l, t + i, end, n, STATE, COMPLEX)
            gr, gi = _feed(gr, gi, dout_d[None, :], Cr, Ci, COMPLEX)
            ar, ai = _decay(delta_d, Ar, Ai, COMPLEX)
            ar, ai = _cut(ar, ai, reset, b * length + t + i, t + i < end, COMPLEX)
            uncut_d = _keep(uncut_d, reset, b * length + t + i, t + i < end)
            gr, gi = _multiply(ar, -ai, gr, gi, COMPLEX)
    chunk_number = b * chunks + k
    end_tile = _tile(ends, chunk_number, block, width, STATE, BLOCK, COMPLEX)
    _store_tile(end_tile, tile, gr, gi, n, STATE, BLOCK, COMPLEX)
    tl.store(sums + (2 * chunk_number) * width + d, sum_d, mask=inside)
    tl.store(sums + (2 * chunk_number + 1) * width + d, uncut_d, mask=inside)


@_jit()
def backward(
    dy, dfinal, ends, u, delta, z, A, B, C, D, bias, reset, checkpoints, scratch,
    du, ddelta, dz, dA, dB, dC, dD, dbias, dinitial,
    dy_b, dy_l, u_b, u_l, delta_b, delta_l, z_b, z_l, B_b, B_l, C_b, C_l,
    length, width, chunk, chunks,
    STATE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    EVERY: tl.constexpr, STEPS: tl.constexpr,
    SOFTPLUS: tl.constexpr, COMPLEX: tl.constexpr,
    SELECTIVE_B: tl.constexpr, SELECTIVE_C: tl.constexpr,
):  # fmt: skip
    """Gradients; those summed over channels or time as one partial sum a program.

    Of each block of EVERY steps, the last first: the states at its groups' starts are recomputed
    into `scratch`, then group by group, the last first, its states and decays, which stay in
    registers while the adjoint goes back through the group.
    """
    b, k, block, d, inside, n, state, tile = _place(width, chunks, STATE, ROWS, BLOCK)
    begin, end = k * chunk, tl.minimum((k + 1) * chunk, length)
    Ar, Ai = _load_A(A, d, n, state, width, STATE, COMPLEX)
    Br, Bi = _load_constant(B, d, n, state, width, STATE, COMPLEX, SELECTIVE_B)
    Cr, Ci = _load_constant(C, d, n, state, width, STATE, COMPLEX, SELECTIVE_C)
    bias_d = _load_vector(bias, d, inside, BLOCK)
    D_d = _load_vector(D, d, inside, BLOCK)
    gr, gi = _first_state(dfinal, ends, b, b * chunks + k, block, d, n, state, tile, width,
                          STATE, ROWS, BLOCK, COMPLEX)  # fmt: skip
    zero = tl.zeros((ROWS, BLOCK), tl.float32)
    dAr, dAi, dBr, dBi, dCr, dCi = zero, zero, zero, zero, zero, zero
    dD_d = tl.zeros((BLOCK,), tl.float32)
    dbias_d = tl.zeros((BLOCK,), tl.float32)

    u += b * u_b
    delta += b * delta_b
    B_row = B + b * B_b
    C_row = C + b * C_b
    wide_b = b * length * width
    first_slot = tl.program_id(0).to(tl.int64) * (EVERY // STEPS)
    # Partial sums of selective B and C: one (B, L, N) for each block of channels.
    blocks = tl.cdiv(width, BLOCK)
    narrow = ((tl.program_id(0) % blocks) * _batches(blocks, chunks) + b) * length * STATE

    for back_segment in range(0, tl.cdiv(end - begin, EVERY)):
        first = begin + (tl.cdiv(end - begin, EVERY) - 1 - back_segment) * EVERY
        number = b * tl.cdiv(length, EVERY) + first // EVERY
        kept = _tile(checkpoints, number, block, width, STATE, BLOCK, COMPLEX)
        hr, hi = _load_tile(kept, tile, n, STATE, BLOCK, COMPLEX)
        groups = tl.cdiv(tl.minimum(end - first, EVERY), STEPS)
        for group in range(0, groups):
            t = first + group * STEPS
            slot = _tile(scratch, first_slot + group, 0, BLOCK, STATE, BLOCK, COMPLEX)
            _store_tile(slot, tile, hr, hi, n, STATE, BLOCK, COMPLEX)
            us = _rows(u, u_l, t, end, d, inside, STEPS)
            deltas = _rows(delta, delta_l, t, end, d, inside, STEPS)
            for i in tl.static_range(STEPS):
                delta_d = _delta(deltas[i], bias_d, t + i, end, SOFTPLUS)
                ar, ai = _decay(delta_d, Ar, Ai, COMPLEX)
                ar, ai = _cut(ar, ai, reset, b * length + t + i, t + i < end, COMPLEX)
                if SELECTIVE_B:
                    Br, Bi = _load_projection(B_row, B_l, t + i, end, n, STATE, COMPLEX)
                drive_d = delta_d * us[i].to(tl.float32)
                hr, hi = _advance(hr, hi, ar, ai, drive_d[None, :], Br, Bi, COMPLEX)
        tl.debug_barrier()  # between what lanes wrote to scratch and what they read back
        for back_group in range(0, groups):
            group = groups - 1 - back_group
            t = first + group * STEPS
            slot = _tile(scratch, first_slot + group, 0, BLOCK, STATE, BLOCK, COMPLEX)
            hr, hi = _load_tile(slot, tile, n, STATE, BLOCK, COMPLEX)
            us = _rows(u, u_l, t, end, d, inside, STEPS)
            deltas = _rows(delta, delta_l, t, end, d, inside, STEPS)
            dys = _rows(dy + b * dy_b, dy_l, t, end, d, inside, STEPS)
            if z is not None:
                zs = _rows(z + b * z_b, z_l, t, end, d, inside, STEPS)
            hrs, his, ars, ais = (hr,), (hi,), (), ()
            for i in tl.static_range(STEPS):
                delta_d = _delta(deltas[i], bias_d, t + i, end, SOFTPLUS)
                ar, ai = _decay(delta_d, Ar, Ai, COMPLEX)
                ar, ai = _cut(ar, ai, reset, b * length + t + i, t + i < end, COMPLEX)
                if SELECTIVE_B:
                    Br, Bi = _load_projection(B_row, B_l, t + i, end, n, STATE, COMPLEX)
                drive_d = delta_d * us[i].to(tl.float32)
                hr, hi = _advance(hr, hi, ar, ai, drive_d[None, :], Br, Bi, COMPLEX)
                hrs, his = hrs + (hr,), his + (hi,)
                ars, ais = ars + (ar,), ais + (ai,)
            tl.debug_barrier()  # else loads of the way back are started before, into registers
            for i in tl.static_range(STEPS - 1, -1, -1):
                now = t + i < end
                row = wide_b + tl.cast(t + i, tl.int64) * width + d
                u_d = us[i].to(tl.float32)
                raw_d = deltas[i].to(tl.float32) + bias_d
                delta_d = _delta(deltas[i], bias_d, t + i, end, SOFTPLUS)
                dy_d = dys[i].to(tl.float32)
                if SELECTIVE_C:
                    Cr, Ci = _load_projection(C_row, C_l, t + i, end, n, STATE, COMPLEX)
                dout_d = dy_d
                if z is not None:
                    z_d = zs[i].to(tl.float32)
                    sigmoid_d = _sigmoid(z_d)
                    dout_d = dy_d * z_d * sigmoid_d
                    if dz is not None:
                        out_d = _read(hrs[i + 1], his[i + 1], Cr, Ci, COMPLEX) + D_d * u_d
                        dz_d = dy_d * out_d * sigmoid_d * (1.0 + z_d * (1.0 - sigmoid_d))
                        tl.store(dz + row, dz_d.to(dz.dtype.element_ty), mask=inside & now)
                weighted_d = dout_d[None, :] * (2.0 if COMPLEX else 1.0)
                if dC is not None:
                    if SELECTIVE_C:
                        _store_summed(dC, narrow, t + i, now, n, weighted_d * hrs[i + 1],
                                      -weighted_d * his[i + 1], STATE, BLOCK, COMPLEX)  # fmt: skip
                    else:
                        dCr += weighted_d * hrs[i + 1]
                        dCi -= weighted_d * his[i + 1]
                gr, gi = _feed(gr, gi, dout_d[None, :], Cr, Ci, COMPLEX)
                if SELECTIVE_B:
                    Br, Bi = _load_projection(B_row, B_l, t + i, end, n, STATE, COMPLEX)
                drive_d = (delta_d * u_d)[None, :]
                if dB is not None:
                    if SELECTIVE_B:
                        _store_summed(dB, narrow, t + i, now, n, drive_d * gr, drive_d * gi,
                                      STATE, BLOCK, COMPLEX)  # fmt: skip
                    else:
                        dBr += drive_d * gr
                        dBi += drive_d * gi
                if COMPLEX:
                    Bg_d = tl.sum(Br * gr + Bi * gi, 0)
                else:
                    Bg_d = tl.sum(Br * gr, 0)
                gr, gi = _multiply(ars[i], -ais[i], gr, gi, COMPLEX)
                qr, qi = _multiply(hrs[i], -his[i], gr, gi, COMPLEX)
                dAr += delta_d[None, :] * qr
                dAi += delta_d[None, :] * qi
                ddelta_d = tl.sum(Ar * qr, 0) * _LN2 + u_d * Bg_d
                if COMPLEX:
                    ddelta_d += tl.sum(Ai * qi, 0)
                if SOFTPLUS:
                    ddelta_d *= _sigmoid(raw_d)
                if ddelta is not None:
                    stored = ddelta_d.to(ddelta.dtype.element_ty)
                    tl.store(ddelta + row, stored, mask=inside & now)
                dbias_d += tl.where(now, ddelta_d, 0.0)
                dD_d += dout_d * u_d
                if du is not None:
                    du_d = delta_d * Bg_d + D_d * dout_d
                    tl.store(du + row, du_d.to(du.dtype.element_ty), mask=inside & now)
        tl.debug_barrier()
    chunk_number = b * chunks + k
    if dA is not None:
        part = _tile(dA, chunk_number, block, width, STATE, BLOCK, COMPLEX)
        _store_tile(part, tile, dAr, dAi, n, STATE, BLOCK, COMPLEX)
    if dB is not None and not SELECTIVE_B:
        part = _tile(dB, chunk_number, block, width, STATE, BLOCK, COMPLEX)
        _store_tile(part, tile, dBr, dBi, n, STATE, BLOCK, COMPLEX)
    if dC is not None and not SELECTIVE_C:
        part = _tile(dC, chunk_number, block, width, STATE, BLOCK, COMPLEX)
        _store_tile(part, tile, dCr, dCi, n, STATE, BLOCK, COMPLEX)
    if dD is not None:
        tl.store(dD + chunk_number * width + d, dD_d, mask=inside)
    if dbias is not None:
        tl.store(dbias + chunk_number * width + d, dbias_d, mask=inside)
    if dinitial is not None:  # noqa: SIM102  (known to the compiler; the next is not)
        if begin == 0:
            origin = _contract_offsets(b, d, n, width, STATE)
            _store_state(dinitial, origin, gr, gi, state, COMPLEX)


@triton.jit
def _place(width, chunks, STATE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Batch, chunk and channels of a program, and the offsets in a state tile that is stored."""
    blocks = tl.cdiv(width, BLOCK)
    program = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    block = program % blocks
    d = block * BLOCK + lane
    k = (program // blocks) % chunks
    b = (program // blocks // chunks).to(tl.int64)
    n = tl.arange(0, ROWS)
    inside = d < width
    state = (n < STATE)[:, None] & inside[None, :]
    return b, k, block, d, inside, n, state, n[:, None] * BLOCK + lane[None, :]


@triton.jit
def _tile(x, number, block, width, STATE: tl.constexpr, BLOCK: tl.constexpr, COMPLEX: tl.constexpr):
    """Where the tile of a channel block lies in state `number` of x."""
    size: tl.constexpr = STATE * BLOCK * (2 if COMPLEX else 1)
    return x + (number * tl.cdiv(width, BLOCK) + block) * size


@triton.jit
def _batches(blocks, chunks):
    return tl.num_programs(0) // (blocks * chunks)


@triton.jit
def _contract_offsets(b, d, n, width, STATE: tl.constexpr):
    """Where a state tile lies in (B, D, N)."""
    return (b * width + d)[None, :] * STATE + n[:, None]


@triton.jit
def _load_planes(x, b, d, n, state, width, STATE: tl.constexpr, COMPLEX: tl.constexpr):
    """A state tile of (B, N, D), or (B, 2, N, D) if complex."""
    x += b * STATE * width * (2 if COMPLEX else 1)
    offsets = n[:, None] * width + d[None, :]
    real = tl.load(x + offsets, mask=state, other=0.0)
    if COMPLEX:
        return real, tl.load(x + STATE * width + offsets, mask=state, other=0.0)
    else:
        return real, real


@triton.jit
def _first_state(
    edge, starts, b, number, block, d, n, state, tile, width,
    STATE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, COMPLEX: tl.constexpr,
):  # fmt: skip
    """A chunk's from `starts`, or the whole sequence's from `edge`, or zero."""
    if starts is not None:
        start = _tile(starts, number, block, width, STATE, BLOCK, COMPLEX)
        return _load_tile(start, tile, n, STATE, BLOCK, COMPLEX)
    elif edge is not None:
        return _load_planes(edge, b, d, n, state, width, STATE, COMPLEX)
    else:
        zero = tl.zeros((ROWS, BLOCK), tl.float32)
        return zero, zero


@triton.jit
def _load_tile(x, tile, n, STATE: tl.constexpr, BLOCK: tl.constexpr, COMPLEX: tl.constexpr):
    mask = (n < STATE)[:, None]
    real = tl.load(x + tile, mask=mask, other=0.0)
    if COMPLEX:
        return real, tl.load(x + STATE * BLOCK + tile, mask=mask, other=0.0)
    else:
        return real, real


@triton.jit
def _store_tile(
    x, tile, real, imaginary, n, STATE: tl.constexpr, BLOCK: tl.constexpr, COMPLEX: tl.constexpr
):
    mask = (n < STATE)[:, None]
    tl.store(x + tile, real, mask=mask)
    if COMPLEX:
        tl.store(x + STATE * BLOCK + tile, imaginary, mask=mask)


@triton.jit
def _store_state(x, offsets, real, imaginary, mask, COMPLEX: tl.constexpr):
    if COMPLEX:
        tl.store(x + 2 * offsets, real, mask=mask)
        tl.store(x + 2 * offsets + 1, imaginary, mask=mask)
    else:
        tl.store(x + offsets, real, mask=mask)


@triton.jit
def _load_A(A, d, n, state, width, STATE: tl.constexpr, COMPLEX: tl.constexpr):
    """A, its real part in units of ln 2: e^x is taken as 2^(x log2 e)."""
    real, imaginary = _load_planes(A, 0, d, n, state, width, STATE, COMPLEX)
    return real * _LOG2E, imaginary


@triton.jit
def _load_constant(
    x, d, n, state, width, STATE: tl.constexpr, COMPLEX: tl.constexpr, SELECTIVE: tl.constexpr
):
    """Constant B or C, or a stand-in for one that changes in time."""
    if SELECTIVE:
        zero = tl.zeros((n.shape[0], 1), tl.float32)
        return zero, zero
    else:
        return _load_planes(x, 0, d, n, state, width, STATE, COMPLEX)


@triton.jit
def _load_projection(x, stride, t, end, n, STATE: tl.constexpr, COMPLEX: tl.constexpr):
    """B or C of one step (N, 1), past the end of time the last step's, which then meets zeros."""
    row = x + tl.cast(tl.minimum(t, end - 1), tl.int64) * stride
    if COMPLEX:
        real = _load_row(row, 2 * n, n, STATE)
        return real, _load_row(row, 2 * n + 1, n, STATE)
    else:
        real = _load_row(row, n, n, STATE)
        return real, real


@triton.jit
def _load_row(row, offsets, n, STATE: tl.constexpr):
    if n.shape[0] == STATE:
        return tl.load(row + offsets)[:, None]
    else:
        return tl.load(row + offsets, mask=n < STATE, other=0.0)[:, None]


@triton.jit
def _load_vector(x, d, inside, BLOCK: tl.constexpr):
    if x is None:
        return tl.zeros((BLOCK,), tl.float32)
    else:
        return tl.load(x + d, mask=inside, other=0.0)


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
def _delta(raw, bias_d, t, end, SOFTPLUS: tl.constexpr):
    delta_d = raw.to(tl.float32) + bias_d
    if SOFTPLUS:
        delta_d = _softplus(delta_d)
    return tl.where(t < end, delta_d, 0.0)


@triton.jit
def _softplus(x):
    """max(x, 0) + log1p(e^-|x|)."""
    e = tl.exp2(-tl.abs(x) * _LOG2E)
    p = e * _P8 + _P7
    p = p * e + _P6
    p = p * e + _P5
    p = p * e + _P4
    p = p * e + _P3
    p = p * e + _P2
    p = p * e + _P1
    p = p * e + 1.0
    return tl.maximum(x, 0.0) + e * p


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp2(-x * _LOG2E))


@triton.jit
def _decay(delta_d, Ar, Ai, COMPLEX: tl.constexpr):
    """exp(Δ A)."""
    size = tl.exp2(delta_d[None, :] * Ar)
    if COMPLEX:
        angle = delta_d[None, :] * Ai
        return size * tl.cos(angle), size * tl.sin(angle)
    else:
        return size, size


@triton.jit
def _cut(ar, ai, reset, offset, now, COMPLEX: tl.constexpr):
    """The decay, 0 at a reset."""
    if reset is not None:
        cut = tl.load(reset + offset, mask=now, other=0) != 0
        ar = tl.where(cut, 0.0, ar)
        if COMPLEX:
            ai = tl.where(cut, 0.0, ai)
    return ar, ai


@triton.jit
def _keep(uncut_d, reset, offset, now):
    """0 from a reset on."""
    if reset is not None:
        cut = tl.load(reset + offset, mask=now, other=0) != 0
        uncut_d = tl.where(cut, 0.0, uncut_d)
    return uncut_d


@triton.jit
def _multiply(ar, ai, hr, hi, COMPLEX: tl.constexpr):
    if COMPLEX:
        return ar * hr - ai * hi, ar * hi + ai * hr
    else:
        real = ar * hr
        return real, real


@triton.jit
def _advance(hr, hi, ar, ai, drive, Br, Bi, COMPLEX: tl.constexpr):
    """exp(Δ A) h + Δ u B."""
    if COMPLEX:
        return ar * hr - ai * hi + drive * Br, ar * hi + ai * hr + drive * Bi
    else:
        real = ar * hr + drive * Br
        return real, real


@triton.jit
def _feed(gr, gi, dout, Cr, Ci, COMPLEX: tl.constexpr):
    """The adjoint and what a step's output adds to it."""
    if COMPLEX:
        return gr + 2.0 * dout * Cr, gi - 2.0 * dout * Ci
    else:
        real = gr + dout * Cr
        return real, real


@triton.jit
def _read(hr, hi, Cr, Ci, COMPLEX: tl.constexpr):
    """C·h, of a complex state twice the real part."""
    if COMPLEX:
        return 2.0 * tl.sum(hr * Cr - hi * Ci, 0)
    else:
        return tl.sum(hr * Cr, 0)


@triton.jit
def _store_summed(
    x, narrow, t, now, n, real, imaginary,
    STATE: tl.constexpr, BLOCK: tl.constexpr, COMPLEX: tl.constexpr,
):  # fmt: skip
    """Stores the sums over channels (N,) of a step."""
    row = narrow + tl.cast(t, tl.int64) * STATE
    mask = (n < STATE) & now
    if COMPLEX:
        tl.store(x + 2 * (row + n), _over_channels(real), mask=mask)
        tl.store(x + 2 * (row + n) + 1, _over_channels(imaginary), mask=mask)
    else:
        tl.store(x + row + n, _over_channels(real), mask=mask)


@triton.jit
def _over_channels(x):
    """The sum over the lanes of a (N, channels) tile, halving what each lane has left to add.

    tl.sum would exchange all N numbers of a lane five times over; a split exchanges half of them.
    """
    rows: tl.constexpr = x.shape[0]
    block: tl.constexpr = x.shape[1]
    if block == 1:
        return tl.reshape(x, (rows,))
    else:
        low, high = tl.split(tl.reshape(x, (rows, block // 2, 2)))
        return _over_channels(low + high)
