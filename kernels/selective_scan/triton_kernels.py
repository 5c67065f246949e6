"""The Triton kernels of the selective scan; `triton.py` beside this launches them.

A program, one warp, owns a block of channels and walks through time. Its state tiles are (GROUPS,
N, LANES), channel group * LANES + lane: the compiler spreads the last two over the warp's lanes and
keeps the rest in registers, so that a lane holds a few states of a few channels. What enters the
recurrence is loaded and transformed STEPS at a time, as (STEPS, GROUPS, LANES) tiles spread over
lanes, no lane doing another's work, the next tiles while this one is walked; a step's row of such a
tile is handed to all lanes through shared memory. Complex numbers are pairs of tiles; of a real one
the second is never used.

A chunk of time is what one program scans. It divides into blocks of EVERY steps, at whose starts
forward keeps the state, and these into groups of STEPS, unrolled. Past the end Δ is 0, which leaves
a state as it is.

OVERLAP: a kernel starts while the one before it in the call still runs, and waits for that one's
end where it first reads what was written there; what it loads before that was there before the
call's first kernel.
"""

# mypy: ignore-errors
# ruff: noqa: RUF005  (Triton unpacks no tuples into tuples)
from __future__ import annotations

import functools

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

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
    do_not_specialize=[
        "length", "chunk", "chunks", "A_parts", "B_parts", "C_parts", "D_parts", "bias_parts"
    ],
    do_not_specialize_on_alignment=[
        "A", "initial", "starts", "ends", "edge", "checkpoints", "dfinal", "dA"
    ],
)  # fmt: skip


@_jit()
def forward(
    u, delta, z, A, B, C, D, bias, initial, starts, reset,
    y, final, checkpoints,
    u_b, u_l, delta_b, delta_l, z_b, z_l, B_b, B_l, C_b, C_l,
    length, width, chunk, chunks,
    STATE: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr, LANES: tl.constexpr,
    EVERY: tl.constexpr, STEPS: tl.constexpr,
    SOFTPLUS: tl.constexpr, COMPLEX: tl.constexpr,
    SELECTIVE_B: tl.constexpr, SELECTIVE_C: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """y, the states every EVERY steps, and the final state, from `starts` or `initial`."""
    BLOCK: tl.constexpr = GROUPS * LANES
    b, k, block, d, inside, n, state, tile = _place(width, chunks, STATE, ROWS, GROUPS, LANES)
    begin, end = k * chunk, tl.minimum((k + 1) * chunk, length)
    Ar, Ai = _load_A(A, d, n, state, width, STATE, COMPLEX)
    Br, Bi = _load_constant(B, d, n, state, width, STATE, COMPLEX, SELECTIVE_B)
    Cr, Ci = _load_constant(C, d, n, state, width, STATE, COMPLEX, SELECTIVE_C)
    bias_d = _load_vector(bias, d, inside, GROUPS, LANES)
    D_d = _load_vector(D, d, inside, GROUPS, LANES)
    checkpoint = b * tl.cdiv(length, EVERY) + begin // EVERY
    u += b * u_b
    delta += b * delta_b
    y += b * length * width
    next_u = _load_steps(u, u_l, begin, begin, end, d, inside, STEPS)
    next_delta = _load_steps(delta, delta_l, begin, begin, end, d, inside, STEPS)
    if z is not None:
        z += b * z_b
        next_z = _load_steps(z, z_l, begin, begin, end, d, inside, STEPS)
    if SELECTIVE_B:
        B += b * B_b
        next_B = _load_projections(B, B_l, begin, begin, end, n, STATE, STEPS, COMPLEX)
    if SELECTIVE_C:
        C += b * C_b
        next_C = _load_projections(C, C_l, begin, begin, end, n, STATE, STEPS, COMPLEX)
    _wait(OVERLAP)
    hr, hi = _first_state(initial, starts, b, b * chunks + k, block, d, n, state, tile, width,
                          STATE, ROWS, GROUPS, LANES, COMPLEX)  # fmt: skip
    for t in range(begin, end, STEPS):
        if checkpoints is not None and t % EVERY == 0:
            kept = _tile(checkpoints, checkpoint, block, width, STATE, BLOCK, COMPLEX)
            _store_tile(kept, tile, hr, hi, n, STATE, BLOCK, COMPLEX)
            checkpoint += 1
        u_SD, raw_SD = next_u.to(tl.float32), next_delta.to(tl.float32)
        next_u = _load_steps(u, u_l, t + STEPS, begin, end, d, inside, STEPS)
        next_delta = _load_steps(delta, delta_l, t + STEPS, begin, end, d, inside, STEPS)
        if z is not None:
            z_SD = next_z.to(tl.float32)
            next_z = _load_steps(z, z_l, t + STEPS, begin, end, d, inside, STEPS)
        Bs, Cs = (Br, Bi), (Cr, Ci)
        if SELECTIVE_B:
            Bs = next_B
            next_B = _load_projections(B, B_l, t + STEPS, begin, end, n, STATE, STEPS, COMPLEX)
        if SELECTIVE_C:
            Cs = next_C
            next_C = _load_projections(C, C_l, t + STEPS, begin, end, n, STATE, STEPS, COMPLEX)
        delta_SD = _delta(raw_SD, bias_d, t, end, SOFTPLUS, STEPS)
        deltas, drives = _two_rows(delta_SD, delta_SD * u_SD, STEPS, GROUPS, LANES)
        Bs = _projections(Bs, STEPS, ROWS, COMPLEX, SELECTIVE_B)
        Cs = _projections(Cs, STEPS, ROWS, COMPLEX, SELECTIVE_C)
        outs = ()
        for i in tl.static_range(STEPS):
            ar, ai = _decay(deltas[i], Ar, Ai, COMPLEX)
            ar, ai = _cut(ar, ai, reset, b * length + t + i, t + i < end, COMPLEX)
            Br, Bi = _projection(Bs, i, SELECTIVE_B)
            hr, hi = _advance(hr, hi, ar, ai, drives[i], Br, Bi, COMPLEX)
            Cr, Ci = _projection(Cs, i, SELECTIVE_C)
            outs = outs + (_read(hr, hi, Cr, Ci, COMPLEX),)
        y_SD = _stack(outs, STEPS, GROUPS, LANES)
        if D is not None:
            y_SD += D_d[None] * u_SD
        if z is not None:
            y_SD *= z_SD * _sigmoid(z_SD)
        _store_steps(y, y_SD, t, end, d, inside, width, STEPS)
    if end == length:
        _store_state(final, b, d, n, hr, hi, state, width, STATE, COMPLEX)


@_jit()
def chunk_states(
    u, delta, A, B, bias, reset, ends, sums,
    u_b, u_l, delta_b, delta_l, B_b, B_l,
    length, width, chunk, chunks,
    STATE: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr, LANES: tl.constexpr,
    STEPS: tl.constexpr,
    SOFTPLUS: tl.constexpr, COMPLEX: tl.constexpr, SELECTIVE_B: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Every chunk's final state from the zero state; its sum of Δ, and 0 after it if reset."""
    _let_next_start(OVERLAP)
    BLOCK: tl.constexpr = GROUPS * LANES
    b, k, block, d, inside, n, state, tile = _place(width, chunks, STATE, ROWS, GROUPS, LANES)
    begin, end = k * chunk, tl.minimum((k + 1) * chunk, length)
    Ar, Ai = _load_A(A, d, n, state, width, STATE, COMPLEX)
    Br, Bi = _load_constant(B, d, n, state, width, STATE, COMPLEX, SELECTIVE_B)
    bias_d = _load_vector(bias, d, inside, GROUPS, LANES)
    hr = tl.zeros((GROUPS, ROWS, LANES), tl.float32)
    hi = hr
    sum_SD = tl.zeros((STEPS, GROUPS, LANES), tl.float32)
    uncut = 1.0
    u += b * u_b
    delta += b * delta_b
    next_u = _load_steps(u, u_l, begin, begin, end, d, inside, STEPS)
    next_delta = _load_steps(delta, delta_l, begin, begin, end, d, inside, STEPS)
    if SELECTIVE_B:
        B += b * B_b
        next_B = _load_projections(B, B_l, begin, begin, end, n, STATE, STEPS, COMPLEX)
    for t in range(begin, end, STEPS):
        u_SD, raw_SD = next_u.to(tl.float32), next_delta.to(tl.float32)
        next_u = _load_steps(u, u_l, t + STEPS, begin, end, d, inside, STEPS)
        next_delta = _load_steps(delta, delta_l, t + STEPS, begin, end, d, inside, STEPS)
        Bs = (Br, Bi)
        if SELECTIVE_B:
            Bs = next_B
            next_B = _load_projections(B, B_l, t + STEPS, begin, end, n, STATE, STEPS, COMPLEX)
        delta_SD = _delta(raw_SD, bias_d, t, end, SOFTPLUS, STEPS)
        sum_SD += delta_SD
        deltas, drives = _two_rows(delta_SD, delta_SD * u_SD, STEPS, GROUPS, LANES)
        Bs = _projections(Bs, STEPS, ROWS, COMPLEX, SELECTIVE_B)
        for i in tl.static_range(STEPS):
            ar, ai = _decay(deltas[i], Ar, Ai, COMPLEX)
            ar, ai = _cut(ar, ai, reset, b * length + t + i, t + i < end, COMPLEX)
            uncut = _keep(uncut, reset, b * length + t + i, t + i < end)
            Br, Bi = _projection(Bs, i, SELECTIVE_B)
            hr, hi = _advance(hr, hi, ar, ai, drives[i], Br, Bi, COMPLEX)
    chunk_number = b * chunks + k
    end_tile = _tile(ends, chunk_number, block, width, STATE, BLOCK, COMPLEX)
    _store_tile(end_tile, tile, hr, hi, n, STATE, BLOCK, COMPLEX)
    _store_sums(sums, chunk_number, sum_SD, uncut, d, inside, width)


@_jit()
def chunk_starts(
    ends, sums, A, edge,
    width, chunks,
    STATE: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr, LANES: tl.constexpr,
    STEPS: tl.constexpr, COMPLEX: tl.constexpr, REVERSE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """In place of every chunk's own final state, the state it starts from; the first's is `edge`.

    REVERSE: likewise of the adjoint, from the last chunk on.
    """
    BLOCK: tl.constexpr = GROUPS * LANES
    _let_next_start(OVERLAP)
    b, _, block, d, inside, n, state, tile = _place(width, 1, STATE, ROWS, GROUPS, LANES)
    Ar, Ai = _load_A(A, d, n, state, width, STATE, COMPLEX)
    if REVERSE:
        Ai = -Ai
    if edge is not None:
        hr, hi = _load_planes(edge, b, d, n, state, width, STATE, COMPLEX)
    else:
        hr = tl.zeros((GROUPS, ROWS, LANES), tl.float32)
        hi = hr
    _wait(OVERLAP)
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
                hr = uncut_d[:, None, :] * nr + er
                hi = uncut_d[:, None, :] * ni + ei


@_jit()
def chunk_adjoints(
    dy, z, delta, A, C, bias, reset, ends, sums,
    dy_b, dy_l, z_b, z_l, delta_b, delta_l, C_b, C_l,
    length, width, chunk, chunks,
    STATE: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr, LANES: tl.constexpr,
    STEPS: tl.constexpr,
    SOFTPLUS: tl.constexpr, COMPLEX: tl.constexpr, SELECTIVE_C: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """The adjoint each chunk hands to the one before it, from a zero adjoint at its end."""
    _let_next_start(OVERLAP)
    BLOCK: tl.constexpr = GROUPS * LANES
    b, k, block, d, inside, n, state, tile = _place(width, chunks, STATE, ROWS, GROUPS, LANES)
    begin, end = k * chunk, tl.minimum((k + 1) * chunk, length)
    Ar, Ai = _load_A(A, d, n, state, width, STATE, COMPLEX)
    Cr, Ci = _load_constant(C, d, n, state, width, STATE, COMPLEX, SELECTIVE_C)
    bias_d = _load_vector(bias, d, inside, GROUPS, LANES)
    gr = tl.zeros((GROUPS, ROWS, LANES), tl.float32)
    gi = gr
    sum_SD = tl.zeros((STEPS, GROUPS, LANES), tl.float32)
    uncut = 1.0
    dy += b * dy_b
    delta += b * delta_b
    groups = tl.cdiv(end - begin, STEPS)
    last = begin + (groups - 1) * STEPS
    next_dy = _load_steps(dy, dy_l, last, begin, end, d, inside, STEPS)
    next_delta = _load_steps(delta, delta_l, last, begin, end, d, inside, STEPS)
    if z is not None:
        z += b * z_b
        next_z = _load_steps(z, z_l, last, begin, end, d, inside, STEPS)
    if SELECTIVE_C:
        C += b * C_b
        next_C = _load_projections(C, C_l, last, begin, end, n, STATE, STEPS, COMPLEX)
    for group in range(0, groups):
        t = last - group * STEPS
        dout_SD, raw_SD = next_dy.to(tl.float32), next_delta.to(tl.float32)
        next_dy = _load_steps(dy, dy_l, t - STEPS, begin, end, d, inside, STEPS)
        next_delta = _load_steps(delta, delta_l, t - STEPS, begin, end, d, inside, STEPS)
        if z is not None:
            z_SD = next_z.to(tl.float32)
            dout_SD *= z_SD * _sigmoid(z_SD)
            next_z = _load_steps(z, z_l, t - STEPS, begin, end, d, inside, STEPS)
        Cs = (Cr, Ci)
        if SELECTIVE_C:
            Cs = next_C
            next_C = _load_projections(C, C_l, t - STEPS, begin, end, n, STATE, STEPS, COMPLEX)
        delta_SD = _delta(raw_SD, bias_d, t, end, SOFTPLUS, STEPS)
        sum_SD += delta_SD
        deltas, douts = _two_rows(delta_SD, dout_SD, STEPS, GROUPS, LANES)
        Cs = _projections(Cs, STEPS, ROWS, COMPLEX, SELECTIVE_C)
        for i in tl.static_range(STEPS - 1, -1, -1):
            Cr, Ci = _projection(Cs, i, SELECTIVE_C)
            gr, gi = _feed(gr, gi, douts[i], Cr, Ci, COMPLEX)
            ar, ai = _decay(deltas[i], Ar, Ai, COMPLEX)
            ar, ai = _cut(ar, ai, reset, b * length + t + i, t + i < end, COMPLEX)
            uncut = _keep(uncut, reset, b * length + t + i, t + i < end)
            gr, gi = _multiply(ar, -ai, gr, gi, COMPLEX)
    chunk_number = b * chunks + k
    end_tile = _tile(ends, chunk_number, block, width, STATE, BLOCK, COMPLEX)
    _store_tile(end_tile, tile, gr, gi, n, STATE, BLOCK, COMPLEX)
    _store_sums(sums, chunk_number, sum_SD, uncut, d, inside, width)


@_jit()
def backward(
    dy, dfinal, starts, u, delta, z, A, B, C, D, bias, reset, checkpoints,
    du, ddelta, dz, dA, dB, dC, dD, dbias, dinitial,
    dy_b, dy_l, u_b, u_l, delta_b, delta_l, z_b, z_l, B_b, B_l, C_b, C_l,
    length, width, chunk, chunks,
    STATE: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr, LANES: tl.constexpr,
    EVERY: tl.constexpr, STEPS: tl.constexpr,
    SOFTPLUS: tl.constexpr, COMPLEX: tl.constexpr,
    SELECTIVE_B: tl.constexpr, SELECTIVE_C: tl.constexpr, AHEAD: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Gradients; those summed over channels or time as one partial sum a program.

    Group by group, the last first: from the block's kept state to the group's start, then its
    states and decays, which stay in registers while the adjoint goes back through the group. They
    leave few registers: on the way back B, for the second time, and C are handed out by halves.
    AHEAD: what is passed on the way from a block's start is loaded at the end of the group before,
    if it is one group, in sequences of a group or more; else it is waited for.
    """
    BLOCK: tl.constexpr = GROUPS * LANES
    HALF: tl.constexpr = STEPS // 2
    _let_next_start(OVERLAP)
    b, k, block, d, inside, n, state, tile = _place(width, chunks, STATE, ROWS, GROUPS, LANES)
    begin, end = k * chunk, tl.minimum((k + 1) * chunk, length)
    Ar, Ai = _load_A(A, d, n, state, width, STATE, COMPLEX)
    Br, Bi = _load_constant(B, d, n, state, width, STATE, COMPLEX, SELECTIVE_B)
    Cr, Ci = _load_constant(C, d, n, state, width, STATE, COMPLEX, SELECTIVE_C)
    bias_d = _load_vector(bias, d, inside, GROUPS, LANES)
    D_d = _load_vector(D, d, inside, GROUPS, LANES)
    zero = tl.zeros((GROUPS, ROWS, LANES), tl.float32)
    dAr, dAi, dBr, dBi, dCr, dCi = zero, zero, zero, zero, zero, zero
    dD_SD = tl.zeros((STEPS, GROUPS, LANES), tl.float32)
    dbias_SD = tl.zeros((STEPS, GROUPS, LANES), tl.float32)
    dy += b * dy_b
    u += b * u_b
    delta += b * delta_b
    wide = b * length * width
    # Partial sums of selective B and C: one (B, L, N) for each block of channels.
    blocks = tl.cdiv(width, BLOCK)
    narrow = ((tl.program_id(0) % blocks) * _batches(blocks, chunks) + b) * length * STATE

    groups = tl.cdiv(end - begin, STEPS)
    last = begin + (groups - 1) * STEPS
    next_dy = _load_steps(dy, dy_l, last, begin, end, d, inside, STEPS)
    next_u = _load_steps(u, u_l, last, begin, end, d, inside, STEPS)
    next_delta = _load_steps(delta, delta_l, last, begin, end, d, inside, STEPS)
    if AHEAD:
        passed_u = _load_steps(u, u_l, last - STEPS, begin, end, d, inside, STEPS)
        passed_delta = _load_steps(delta, delta_l, last - STEPS, begin, end, d, inside, STEPS)
    if z is not None:
        z += b * z_b
        next_z = _load_steps(z, z_l, last, begin, end, d, inside, STEPS)
    if SELECTIVE_B:
        B += b * B_b
        next_B = _load_projections(B, B_l, last, begin, end, n, STATE, STEPS, COMPLEX)
        passed_B = next_B
        if AHEAD:
            passed_B = _load_projections(B, B_l, last - STEPS, begin, end, n, STATE, STEPS, COMPLEX)
    if SELECTIVE_C:
        C += b * C_b
        next_C = _load_projections(C, C_l, last, begin, end, n, STATE, STEPS, COMPLEX)
    first = b * tl.cdiv(length, EVERY)
    kept = _tile(checkpoints, first + last // EVERY, block, width, STATE, BLOCK, COMPLEX)
    next_hr, next_hi = _load_tile(kept, tile, n, STATE, BLOCK, COMPLEX)
    _wait(OVERLAP)
    gr, gi = _first_state(dfinal, starts, b, b * chunks + k, block, d, n, state, tile, width,
                          STATE, ROWS, GROUPS, LANES, COMPLEX)  # fmt: skip
    for group in range(0, groups):
        t = last - group * STEPS
        hr, hi = next_hr, next_hi
        dy_SD, u_SD, raw_SD = (
            next_dy.to(tl.float32), next_u.to(tl.float32), next_delta.to(tl.float32)
        )  # fmt: skip
        dout_SD = dy_SD
        if z is not None:
            z_SD = next_z.to(tl.float32)
            sigmoid_SD = _sigmoid(z_SD)
            dout_SD = dy_SD * z_SD * sigmoid_SD
        Bs, Cs = (Br, Bi), (Cr, Ci)
        if SELECTIVE_B:
            Bs = next_B
        if SELECTIVE_C:
            Cs = next_C
        for at in range(t - t % EVERY, t, STEPS):
            passed_Bs = Bs
            if SELECTIVE_B:
                passed_Bs = passed_B
            if not AHEAD:
                passed_u = _load_whole(u, u_l, at, d, inside, STEPS)
                passed_delta = _load_whole(delta, delta_l, at, d, inside, STEPS)
                if SELECTIVE_B:
                    passed_Bs = _load_whole_projections(B, B_l, at, n, STATE, STEPS, COMPLEX)
            passed = _delta(passed_delta.to(tl.float32), bias_d, at, end, SOFTPLUS, STEPS)
            driven = passed * passed_u.to(tl.float32)
            deltas, drives = _two_rows(passed, driven, STEPS, GROUPS, LANES)
            passed_Bs = _projections(passed_Bs, STEPS, ROWS, COMPLEX, SELECTIVE_B)
            for i in tl.static_range(STEPS):
                ar, ai = _decay(deltas[i], Ar, Ai, COMPLEX)
                ar, ai = _cut(ar, ai, reset, b * length + at + i, at + i < end, COMPLEX)
                Br, Bi = _projection(passed_Bs, i, SELECTIVE_B)
                hr, hi = _advance(hr, hi, ar, ai, drives[i], Br, Bi, COMPLEX)

        delta_SD = _delta(raw_SD, bias_d, t, end, SOFTPLUS, STEPS)
        dD_SD += dout_SD * u_SD
        # What sums over the state are multiplied with, while each lane has its own.
        slope_SD = tl.full((STEPS, GROUPS, LANES), 1.0, tl.float32)
        if SOFTPLUS:
            slope_SD = _sigmoid(raw_SD + bias_d[None])
        if z is not None and dz is not None:
            of_out_SD = dy_SD * sigmoid_SD * (1.0 + z_SD * (1.0 - sigmoid_SD))
        deltas, drives = _two_rows(delta_SD, delta_SD * u_SD, STEPS, GROUPS, LANES)
        forth_Bs = _projections(Bs, STEPS, ROWS, COMPLEX, SELECTIVE_B)
        hrs, his, ars, ais = (hr,), (hi,), (), ()
        for i in tl.static_range(STEPS):
            ar, ai = _decay(deltas[i], Ar, Ai, COMPLEX)
            ar, ai = _cut(ar, ai, reset, b * length + t + i, t + i < end, COMPLEX)
            Br, Bi = _projection(forth_Bs, i, SELECTIVE_B)
            hr, hi = _advance(hr, hi, ar, ai, drives[i], Br, Bi, COMPLEX)
            hrs, his = hrs + (hr,), his + (hi,)
            ars, ais = ars + (ar,), ais + (ai,)
        douts = _rows(dout_SD, STEPS, GROUPS, LANES)
        outs, Bgs, Aqs, dBrs, dBis, dCrs, dCis = (), (), (), (), (), (), ()
        for i in tl.static_range(STEPS - 1, -1, -1):
            # Registers are scarce: the next tiles are loaded no sooner, and the branch keeps the
            # compiler from putting off the later half's share of dA.
            if i == HALF - 1:  # noqa: SIM102  (known to the compiler; the next is not)
                if t > begin:
                    before = t - STEPS
                    next_dy = _load_whole(dy, dy_l, before, d, inside, STEPS)
                    next_u = _load_whole(u, u_l, before, d, inside, STEPS)
                    next_delta = _load_whole(delta, delta_l, before, d, inside, STEPS)
                    if z is not None:
                        next_z = _load_whole(z, z_l, before, d, inside, STEPS)
                    if SELECTIVE_B:
                        next_B = _load_whole_projections(B, B_l, before, n, STATE, STEPS, COMPLEX)
                    if SELECTIVE_C:
                        next_C = _load_whole_projections(C, C_l, before, n, STATE, STEPS, COMPLEX)
                    number = first + before // EVERY
                    kept = _tile(checkpoints, number, block, width, STATE, BLOCK, COMPLEX)
                    next_hr, next_hi = _load_tile(kept, tile, n, STATE, BLOCK, COMPLEX)
            if (i + 1) % HALF == 0:
                back_Bs, back_Cs = _half_projections(
                    Bs, Cs, i // HALF, STEPS, ROWS, COMPLEX, SELECTIVE_B, SELECTIVE_C
                )
            Cr, Ci = _projection(back_Cs, i % HALF, SELECTIVE_C)
            dout = douts[i][:, None, :]
            if z is not None and dz is not None:
                outs = (_read(hrs[i + 1], his[i + 1], Cr, Ci, COMPLEX),) + outs
            if dC is not None:
                weighted = dout * (2.0 if COMPLEX else 1.0)
                if SELECTIVE_C:
                    dCrs = (tl.sum(weighted * hrs[i + 1], 0),) + dCrs
                    dCis = (tl.sum(-weighted * his[i + 1], 0),) + dCis
                else:
                    dCr += weighted * hrs[i + 1]
                    dCi -= weighted * his[i + 1]
            gr, gi = _feed(gr, gi, douts[i], Cr, Ci, COMPLEX)
            Br, Bi = _projection(back_Bs, i % HALF, SELECTIVE_B)
            drive = drives[i][:, None, :]
            if dB is not None:
                if SELECTIVE_B:
                    dBrs = (tl.sum(drive * gr, 0),) + dBrs
                    dBis = (tl.sum(drive * gi, 0),) + dBis
                else:
                    dBr += drive * gr
                    dBi += drive * gi
            if COMPLEX:
                Bgs = (tl.sum(Br * gr + Bi * gi, 1),) + Bgs
            else:
                Bgs = (tl.sum(Br * gr, 1),) + Bgs
            gr, gi = _multiply(ars[i], -ais[i], gr, gi, COMPLEX)
            qr, qi = _multiply(hrs[i], -his[i], gr, gi, COMPLEX)
            dAr += deltas[i][:, None, :] * qr
            dAi += deltas[i][:, None, :] * qi
            if COMPLEX:
                Aqs = (tl.sum(Ar * qr * _LN2 + Ai * qi, 1),) + Aqs
            else:
                Aqs = (tl.sum(Ar * qr, 1),) + Aqs
        if dB is not None and SELECTIVE_B:
            _store_summed(dB, narrow, t, end, n, dBrs, dBis, STATE, STEPS, ROWS, LANES, COMPLEX)
        if dC is not None and SELECTIVE_C:
            _store_summed(dC, narrow, t, end, n, dCrs, dCis, STATE, STEPS, ROWS, LANES, COMPLEX)
        if AHEAD:
            # What the next group passes, if it does; not the chunk's first steps if it does not,
            # for a last chunk can have fewer than are loaded.
            at = tl.maximum(t - 2 * STEPS, 0)
            passed_u = _load_whole(u, u_l, at, d, inside, STEPS)
            passed_delta = _load_whole(delta, delta_l, at, d, inside, STEPS)
            if SELECTIVE_B:
                passed_B = _load_whole_projections(B, B_l, at, n, STATE, STEPS, COMPLEX)
        Bg_SD = _stack(Bgs, STEPS, GROUPS, LANES)
        Aq_SD = _stack(Aqs, STEPS, GROUPS, LANES) * (1.0 if COMPLEX else _LN2)
        ddelta_SD = slope_SD * (Aq_SD + u_SD * Bg_SD)
        now = t + tl.arange(0, STEPS)[:, None, None] < end
        dbias_SD += tl.where(now, ddelta_SD, 0.0)
        if ddelta is not None:
            _store_steps(ddelta + wide, ddelta_SD, t, end, d, inside, width, STEPS)
        if du is not None:
            du_SD = delta_SD * Bg_SD + D_d[None] * dout_SD
            _store_steps(du + wide, du_SD, t, end, d, inside, width, STEPS)
        if z is not None and dz is not None:
            dz_SD = of_out_SD * (_stack(outs, STEPS, GROUPS, LANES) + D_d[None] * u_SD)
            _store_steps(dz + wide, dz_SD, t, end, d, inside, width, STEPS)
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
        tl.store(dD + chunk_number * width + d, tl.sum(dD_SD, 0), mask=inside)
    if dbias is not None:
        tl.store(dbias + chunk_number * width + d, tl.sum(dbias_SD, 0), mask=inside)
    if dinitial is not None:  # noqa: SIM102  (known to the compiler; the next is not)
        if begin == 0:
            _store_state(dinitial, b, d, n, gr, gi, state, width, STATE, COMPLEX)


@_jit()
def sum_parts(
    dA, dB, dC, dD, dbias, sum_A, sum_B, sum_C, sum_D, sum_bias,
    A_parts, B_parts, C_parts, D_parts, bias_parts,
    A_size, B_size, C_size, D_size, bias_size,
    width,
    STATE: tl.constexpr, BLOCK: tl.constexpr, COMPLEX: tl.constexpr,
    SELECTIVE_B: tl.constexpr, SELECTIVE_C: tl.constexpr,
    PARTS: tl.constexpr, COLUMNS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """The sums over parts of what `backward` stores a part at a time: (parts, size) each."""
    left = tl.program_id(0)
    _wait(OVERLAP)
    left = _sum_parts(left, dA, sum_A, A_parts, A_size, width,
                      STATE, BLOCK, COMPLEX, True, PARTS, COLUMNS)  # fmt: skip
    left = _sum_parts(left, dB, sum_B, B_parts, B_size, width,
                      STATE, BLOCK, COMPLEX, not SELECTIVE_B, PARTS, COLUMNS)  # fmt: skip
    left = _sum_parts(left, dC, sum_C, C_parts, C_size, width,
                      STATE, BLOCK, COMPLEX, not SELECTIVE_C, PARTS, COLUMNS)  # fmt: skip
    left = _sum_parts(left, dD, sum_D, D_parts, D_size, width,
                      STATE, BLOCK, COMPLEX, False, PARTS, COLUMNS)  # fmt: skip
    _sum_parts(left, dbias, sum_bias, bias_parts, bias_size, width,
               STATE, BLOCK, COMPLEX, False, PARTS, COLUMNS)  # fmt: skip


@triton.jit
def _sum_parts(
    number, x, total, parts, size, width,
    STATE: tl.constexpr, BLOCK: tl.constexpr, COMPLEX: tl.constexpr, TILES: tl.constexpr,
    PARTS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Sums COLUMNS of x, if the program is one of those that do: `number`, counted from the first.

    Returns its number counted from the first after these. TILES: of a state, into (D, N).
    """
    if x is None:
        return number
    else:
        at = number * COLUMNS + tl.arange(0, COLUMNS)
        if (number >= 0) & (number * COLUMNS < size):
            sum_PC = tl.zeros((PARTS, COLUMNS), tl.float32)
            for first in range(0, parts, PARTS):
                part = first + tl.arange(0, PARTS)[:, None]
                row = x + part.to(tl.int64) * size + at[None, :]
                sum_PC += tl.load(row, mask=(part < parts) & (at < size)[None, :], other=0.0)
            to = at
            inside = at < size
            if TILES:
                planes: tl.constexpr = 2 if COMPLEX else 1
                d = at // (planes * STATE * BLOCK) * BLOCK + at % BLOCK
                to = (d * STATE + at // BLOCK % STATE) * planes + at // (STATE * BLOCK) % planes
                inside &= d < width
            tl.store(total + to, tl.sum(sum_PC, 0).to(total.dtype.element_ty), mask=inside)
        return number - tl.cdiv(size, COLUMNS)


@triton.jit
def step(
    before, u, delta, z, A, B, C, D, bias, after, y,
    u_b, delta_b, z_b, B_b, B_d, C_b, C_d,
    width,
    STATE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    SOFTPLUS: tl.constexpr, COMPLEX: tl.constexpr,
):  # fmt: skip
    """One step of a block of channels of one sequence, tiles (BLOCK, N) as they lie in memory."""
    PARTS: tl.constexpr = 2 if COMPLEX else 1
    blocks = tl.cdiv(width, BLOCK)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    d = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    n = tl.arange(0, ROWS)[None, :]
    inside = d < width
    mask = inside[:, None] & (n < STATE)
    of_channel = PARTS * (d[:, None] * STATE + n)
    of_state = b * width * STATE * PARTS + of_channel
    u_d = tl.load(u + b * u_b + d, mask=inside, other=0.0).to(tl.float32)
    delta_d = tl.load(delta + b * delta_b + d, mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        delta_d += tl.load(bias + d, mask=inside, other=0.0).to(tl.float32)
    if SOFTPLUS:
        delta_d = _softplus(delta_d)
    of_B = b * B_b + d[:, None] * B_d + PARTS * n
    of_C = b * C_b + d[:, None] * C_d + PARTS * n
    hr = tl.load(before + of_state, mask=mask, other=0.0)
    Br = tl.load(B + of_B, mask=mask, other=0.0).to(tl.float32)
    Cr = tl.load(C + of_C, mask=mask, other=0.0).to(tl.float32)
    size = tl.exp2(delta_d[:, None] * (tl.load(A + of_channel, mask=mask, other=0.0) * _LOG2E))
    drive = (delta_d * u_d)[:, None]
    if COMPLEX:
        hi = tl.load(before + of_state + 1, mask=mask, other=0.0)
        Bi = tl.load(B + of_B + 1, mask=mask, other=0.0)
        Ci = tl.load(C + of_C + 1, mask=mask, other=0.0)
        angle = delta_d[:, None] * tl.load(A + of_channel + 1, mask=mask, other=0.0)
        ar, ai = size * tl.cos(angle), size * tl.sin(angle)
        nr = ar * hr - ai * hi + drive * Br
        ni = ar * hi + ai * hr + drive * Bi
        tl.store(after + of_state + 1, ni, mask=mask)
        y_d = 2.0 * tl.sum(nr * Cr - ni * Ci, 1)
    else:
        nr = size * hr + drive * Br
        y_d = tl.sum(nr * Cr, 1)
    tl.store(after + of_state, nr, mask=mask)
    if D is not None:
        y_d += tl.load(D + d, mask=inside, other=0.0).to(tl.float32) * u_d
    if z is not None:
        z_d = tl.load(z + b * z_b + d, mask=inside, other=0.0).to(tl.float32)
        y_d *= z_d * _sigmoid(z_d)
    tl.store(y + b * width + d, y_d.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _place(
    width, chunks,
    STATE: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Batch, chunk and channels of a program, and the offsets in a state tile that is stored."""
    BLOCK: tl.constexpr = GROUPS * LANES
    blocks = tl.cdiv(width, BLOCK)
    program = tl.program_id(0)
    lane = tl.arange(0, GROUPS)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    block = program % blocks
    d = block * BLOCK + lane
    k = (program // blocks) % chunks
    b = (program // blocks // chunks).to(tl.int64)
    n = tl.arange(0, ROWS)
    inside = d < width
    state = (n < STATE)[None, :, None] & inside[:, None, :]
    tile = n[None, :, None] * BLOCK + lane[:, None, :]
    return b, k, block, d, inside, n, state, tile


@triton.jit
def _tile(x, number, block, width, STATE: tl.constexpr, BLOCK: tl.constexpr, COMPLEX: tl.constexpr):
    """Where the tile of a channel block lies in state `number` of x."""
    size: tl.constexpr = STATE * BLOCK * (2 if COMPLEX else 1)
    return x + (number * tl.cdiv(width, BLOCK) + block) * size


@triton.jit
def _batches(blocks, chunks):
    return tl.num_programs(0) // (blocks * chunks)


@triton.jit
def _load_planes(x, b, d, n, state, width, STATE: tl.constexpr, COMPLEX: tl.constexpr):
    """A state tile of (B, N, D), or (B, 2, N, D) if complex."""
    x += b * STATE * width * (2 if COMPLEX else 1)
    offsets = n[None, :, None] * width + d[:, None, :]
    real = tl.load(x + offsets, mask=state, other=0.0)
    if COMPLEX:
        return real, tl.load(x + STATE * width + offsets, mask=state, other=0.0)
    else:
        return real, real


@triton.jit
def _store_state(
    x, b, d, n, real, imaginary, state, width, STATE: tl.constexpr, COMPLEX: tl.constexpr
):
    """Stores a state tile of (B, D, N)."""
    at = (b * width + d)[:, None, :] * STATE + n[None, :, None]
    if COMPLEX:
        tl.store(x + 2 * at, real, mask=state)
        tl.store(x + 2 * at + 1, imaginary, mask=state)
    else:
        tl.store(x + at, real, mask=state)


@triton.jit
def _first_state(
    edge, starts, b, number, block, d, n, state, tile, width,
    STATE: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr, LANES: tl.constexpr,
    COMPLEX: tl.constexpr,
):  # fmt: skip
    """A chunk's from `starts`, or the whole sequence's from `edge`, or zero."""
    if starts is not None:
        start = _tile(starts, number, block, width, STATE, GROUPS * LANES, COMPLEX)
        return _load_tile(start, tile, n, STATE, GROUPS * LANES, COMPLEX)
    elif edge is not None:
        return _load_planes(edge, b, d, n, state, width, STATE, COMPLEX)
    else:
        zero = tl.zeros((GROUPS, ROWS, LANES), tl.float32)
        return zero, zero


@triton.jit
def _let_next_start(OVERLAP: tl.constexpr):
    if OVERLAP:
        gdc_launch_dependents()


@triton.jit
def _wait(OVERLAP: tl.constexpr):
    if OVERLAP:
        gdc_wait()


@triton.jit
def _load_tile(x, tile, n, STATE: tl.constexpr, BLOCK: tl.constexpr, COMPLEX: tl.constexpr):
    mask = (n < STATE)[None, :, None]
    real = tl.load(x + tile, mask=mask, other=0.0)
    if COMPLEX:
        return real, tl.load(x + STATE * BLOCK + tile, mask=mask, other=0.0)
    else:
        return real, real


@triton.jit
def _store_tile(
    x, tile, real, imaginary, n, STATE: tl.constexpr, BLOCK: tl.constexpr, COMPLEX: tl.constexpr
):
    mask = (n < STATE)[None, :, None]
    tl.store(x + tile, real, mask=mask)
    if COMPLEX:
        tl.store(x + STATE * BLOCK + tile, imaginary, mask=mask)


@triton.jit
def _store_sums(sums, chunk_number, sum_SD, uncut, d, inside, width):
    """A chunk's sum of Δ, and whether a state lasts through it."""
    row = sums + 2 * chunk_number * width + d
    tl.store(row, tl.sum(sum_SD, 0), mask=inside)
    tl.store(row + width, tl.zeros(d.shape, tl.float32) + uncut, mask=inside)


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
        zero = tl.zeros((1, n.shape[0], 1), tl.float32)
        return zero, zero
    else:
        return _load_planes(x, 0, d, n, state, width, STATE, COMPLEX)


@triton.jit
def _load_vector(x, d, inside, GROUPS: tl.constexpr, LANES: tl.constexpr):
    if x is None:
        return tl.zeros((GROUPS, LANES), tl.float32)
    else:
        return tl.load(x + d, mask=inside, other=0.0)


@triton.jit
def _load_steps(x, stride, t, begin, end, d, inside, STEPS: tl.constexpr):
    """x from step t on (STEPS, GROUPS, LANES), zeros before begin and past the end."""
    step = tl.arange(0, STEPS)[:, None, None]
    now = (t + step >= begin) & (t + step < end) & inside[None]
    return tl.load(
        x + tl.cast(t, tl.int64) * stride + (step * stride + d[None]), mask=now, other=0.0
    )


@triton.jit
def _load_whole(x, stride, t, d, inside, STEPS: tl.constexpr):
    """_load_steps where no step is outside."""
    step = tl.arange(0, STEPS)[:, None, None]
    rows = x + tl.cast(t, tl.int64) * stride + (step * stride + d[None])
    return tl.load(rows, mask=inside[None], other=0.0)


@triton.jit
def _store_steps(x, value, t, end, d, inside, width, STEPS: tl.constexpr):
    step = tl.arange(0, STEPS)[:, None, None]
    now = (t + step < end) & inside[None]
    row = x + tl.cast(t, tl.int64) * width + (step * width + d[None])
    tl.store(row, value.to(x.dtype.element_ty), mask=now)


@triton.jit
def _load_projections(
    x, stride, t, begin, end, n, STATE: tl.constexpr, STEPS: tl.constexpr, COMPLEX: tl.constexpr
):  # fmt: skip
    """B or C from step t on, zeros before begin and past the end, as two tiles.

    Real and imaginary part (STEPS, N), or the first and the second half of the steps.
    """
    rows: tl.constexpr = STEPS if COMPLEX else STEPS // 2
    step = tl.arange(0, rows)[:, None]
    row = x + tl.cast(t, tl.int64) * stride
    low = (t + step >= begin) & (t + step < end) & (n < STATE)[None, :]
    if COMPLEX:
        row += step * stride + 2 * n[None, :]
        return tl.load(row, mask=low, other=0.0), tl.load(row + 1, mask=low, other=0.0)
    else:
        row += step * stride + n[None, :]
        high = (t + rows + step >= begin) & (t + rows + step < end) & (n < STATE)[None, :]
        second = row + rows * stride
        return tl.load(row, mask=low, other=0.0), tl.load(second, mask=high, other=0.0)


@triton.jit
def _load_whole_projections(
    x, stride, t, n, STATE: tl.constexpr, STEPS: tl.constexpr, COMPLEX: tl.constexpr
):  # fmt: skip
    """_load_projections where no step is outside."""
    rows: tl.constexpr = STEPS if COMPLEX else STEPS // 2
    step = tl.arange(0, rows)[:, None]
    mask = (n < STATE)[None, :]
    row = x + tl.cast(t, tl.int64) * stride + (step * stride + (2 if COMPLEX else 1) * n[None, :])
    second = row + (1 if COMPLEX else rows * stride)
    return tl.load(row, mask=mask, other=0.0), tl.load(second, mask=mask, other=0.0)


@triton.jit
def _projections(
    x, STEPS: tl.constexpr, ROWS: tl.constexpr, COMPLEX: tl.constexpr, SELECTIVE: tl.constexpr
):  # fmt: skip
    """Each step's real and imaginary part (N,) of what _load_projections gave; the constant's."""
    if SELECTIVE:
        if COMPLEX:
            return _two_columns(x[0], x[1], STEPS, ROWS)
        else:
            low, high = _two_columns(x[0], x[1], STEPS // 2, ROWS)
            return low + high, low + high
    else:
        return x


@triton.jit
def _half_projections(
    B, C, half: tl.constexpr, STEPS: tl.constexpr, ROWS: tl.constexpr, COMPLEX: tl.constexpr,
    SELECTIVE_B: tl.constexpr, SELECTIVE_C: tl.constexpr,
):  # fmt: skip
    """_projections of B and of C, of the first or the second half of the steps."""
    if SELECTIVE_B and SELECTIVE_C and not COMPLEX:
        Bs, Cs = _two_columns(B[half], C[half], STEPS // 2, ROWS)
        return (Bs, Bs), (Cs, Cs)
    else:
        Bs = _projections(B, STEPS, ROWS, COMPLEX, SELECTIVE_B)
        Cs = _projections(C, STEPS, ROWS, COMPLEX, SELECTIVE_C)
        return _half(Bs, half, STEPS, SELECTIVE_B), _half(Cs, half, STEPS, SELECTIVE_C)


@triton.jit
def _half(x, half: tl.constexpr, STEPS: tl.constexpr, SELECTIVE: tl.constexpr):
    if SELECTIVE:
        pairs = _halves(x[0], STEPS // 2), _halves(x[1], STEPS // 2)
        return pairs[0][half], pairs[1][half]
    else:
        return x


@triton.jit
def _projection(x, i: tl.constexpr, SELECTIVE: tl.constexpr):
    """B or C of a step, (1, N, 1), or the constant one."""
    if SELECTIVE:
        return x[0][i][None, :, None], x[1][i][None, :, None]
    else:
        return x[0], x[1]


# Rows of a tile are handed to all lanes two tiles at once: half the passes through shared memory,
# and the compiler, which would else rather pass bfloat16, leaves conversions where they are spread.


@triton.jit
def _two_rows(a, b, STEPS: tl.constexpr, GROUPS: tl.constexpr, LANES: tl.constexpr):
    """The rows (GROUPS, LANES) of two tiles (STEPS, GROUPS, LANES)."""
    joined = tl.permute(tl.join(a, b), (1, 2, 3, 0))
    rows = _split_rows(tl.reshape(joined, (GROUPS, LANES, 2 * STEPS)), 2 * STEPS, GROUPS, LANES)
    return _halves(rows, STEPS)


@triton.jit
def _two_columns(a, b, STEPS: tl.constexpr, ROWS: tl.constexpr):
    """The rows (N,) of two tiles (STEPS, N)."""
    joined = tl.permute(tl.join(a.to(tl.float32), b.to(tl.float32)), (1, 2, 0))
    return _halves(_split_columns(tl.reshape(joined, (ROWS, 2 * STEPS)), 2 * STEPS, ROWS), STEPS)


@triton.jit
def _halves(rows, STEPS: tl.constexpr):
    low, high = (), ()
    for i in tl.static_range(STEPS):
        low = low + (rows[i],)
        high = high + (rows[STEPS + i],)
    return low, high


@triton.jit
def _rows(x, STEPS: tl.constexpr, GROUPS: tl.constexpr, LANES: tl.constexpr):
    return _split_rows(tl.permute(x, (1, 2, 0)), STEPS, GROUPS, LANES)


@triton.jit
def _split_rows(x, COUNT: tl.constexpr, GROUPS: tl.constexpr, LANES: tl.constexpr):
    """x[..., i] of (GROUPS, LANES, COUNT)."""
    if COUNT == 1:
        return (tl.reshape(x, (GROUPS, LANES)),)
    else:
        even, odd = tl.split(tl.reshape(x, (GROUPS, LANES, COUNT // 2, 2)))
        return _interleave(
            _split_rows(even, COUNT // 2, GROUPS, LANES),
            _split_rows(odd, COUNT // 2, GROUPS, LANES),
            COUNT // 2,
        )


@triton.jit
def _split_columns(x, COUNT: tl.constexpr, ROWS: tl.constexpr):
    """x[..., i] of (N, COUNT)."""
    if COUNT == 1:
        return (tl.reshape(x, (ROWS,)),)
    else:
        even, odd = tl.split(tl.reshape(x, (ROWS, COUNT // 2, 2)))
        return _interleave(
            _split_columns(even, COUNT // 2, ROWS),
            _split_columns(odd, COUNT // 2, ROWS),
            COUNT // 2,
        )


@triton.jit
def _interleave(even, odd, COUNT: tl.constexpr):
    rows = ()
    for i in tl.static_range(COUNT):
        rows = rows + (even[i], odd[i])
    return rows


@triton.jit
def _stack(rows, COUNT: tl.constexpr, GROUPS: tl.constexpr, LANES: tl.constexpr):
    """Rows (GROUPS, LANES) as a tile (COUNT, GROUPS, LANES)."""
    return tl.permute(_join_rows(rows, COUNT, GROUPS, LANES), (2, 0, 1))


@triton.jit
def _join_rows(rows, COUNT: tl.constexpr, GROUPS: tl.constexpr, LANES: tl.constexpr):
    """Rows (GROUPS, LANES) as (GROUPS, LANES, COUNT)."""
    if COUNT == 1:
        return tl.reshape(rows[0], (GROUPS, LANES, 1))
    else:
        even, odd = (), ()
        for i in tl.static_range(COUNT // 2):
            even = even + (rows[2 * i],)
            odd = odd + (rows[2 * i + 1],)
        joined = tl.join(
            _join_rows(even, COUNT // 2, GROUPS, LANES), _join_rows(odd, COUNT // 2, GROUPS, LANES)
        )
        return tl.reshape(joined, (GROUPS, LANES, COUNT))


@triton.jit
def _delta(raw_SD, bias_d, t, end, SOFTPLUS: tl.constexpr, STEPS: tl.constexpr):
    delta_SD = raw_SD + bias_d[None]
    if SOFTPLUS:
        delta_SD = _softplus(delta_SD)
    return tl.where(t + tl.arange(0, STEPS)[:, None, None] < end, delta_SD, 0.0)


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
    size = tl.exp2(delta_d[:, None, :] * Ar)
    if COMPLEX:
        angle = delta_d[:, None, :] * Ai
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
def _keep(uncut, reset, offset, now):
    """0 from a reset on."""
    if reset is not None:
        cut = tl.load(reset + offset, mask=now, other=0) != 0
        uncut = tl.where(cut, 0.0, uncut)
    return uncut


@triton.jit
def _multiply(ar, ai, hr, hi, COMPLEX: tl.constexpr):
    if COMPLEX:
        return ar * hr - ai * hi, ar * hi + ai * hr
    else:
        real = ar * hr
        return real, real


@triton.jit
def _advance(hr, hi, ar, ai, drive_d, Br, Bi, COMPLEX: tl.constexpr):
    """exp(Δ A) h + Δ u B."""
    drive = drive_d[:, None, :]
    if COMPLEX:
        return ar * hr - ai * hi + drive * Br, ar * hi + ai * hr + drive * Bi
    else:
        real = ar * hr + drive * Br
        return real, real


@triton.jit
def _feed(gr, gi, dout_d, Cr, Ci, COMPLEX: tl.constexpr):
    """The adjoint and what a step's output adds to it."""
    dout = dout_d[:, None, :]
    if COMPLEX:
        return gr + 2.0 * dout * Cr, gi - 2.0 * dout * Ci
    else:
        real = gr + dout * Cr
        return real, real


@triton.jit
def _read(hr, hi, Cr, Ci, COMPLEX: tl.constexpr):
    """C·h, of a complex state twice the real part."""
    if COMPLEX:
        return 2.0 * tl.sum(hr * Cr - hi * Ci, 1)
    else:
        return tl.sum(hr * Cr, 1)


@triton.jit
def _store_summed(
    x, narrow, t, end, n, reals, imaginaries,
    STATE: tl.constexpr, STEPS: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
    COMPLEX: tl.constexpr,
):  # fmt: skip
    """Stores the sums over channels of STEPS steps, given for each lane's channels (N, LANES)."""
    step = tl.arange(0, STEPS)[None, :]
    row = narrow + tl.cast(t, tl.int64) * STATE + (step * STATE + n[:, None])
    mask = (n < STATE)[:, None] & (t + step < end)
    real = _over_lanes(tl.permute(_join_rows(reals, STEPS, ROWS, LANES), (0, 2, 1)))
    if COMPLEX:
        imaginary = tl.permute(_join_rows(imaginaries, STEPS, ROWS, LANES), (0, 2, 1))
        tl.store(x + 2 * row, real, mask=mask)
        tl.store(x + 2 * row + 1, _over_lanes(imaginary), mask=mask)
    else:
        tl.store(x + row, real, mask=mask)


@triton.jit
def _over_lanes(x):
    """The sum over the last axis, spread over lanes, of (N, STEPS, LANES).

    tl.sum would exchange all numbers of a lane log2 LANES times over; split brings each lane all
    LANES terms of a few sums.
    """
    rows: tl.constexpr = x.shape[0]
    steps: tl.constexpr = x.shape[1]
    lanes: tl.constexpr = x.shape[2]
    if lanes == 1:
        return tl.reshape(x, (rows, steps))
    else:
        low, high = tl.split(tl.reshape(x, (rows, steps, lanes // 2, 2)))
        return _over_lanes(low + high)
