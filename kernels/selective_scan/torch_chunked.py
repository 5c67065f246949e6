"""The selective scan in plain PyTorch, on any device: all chunks step through time at once.

Forward: the chunks' own contributions from the zero state, the states at chunk starts one after
another, then every chunk again from its true start. Backward: the same for the adjoint, in reverse;
states are recomputed for a few chunks at a time, so (B, L, D, N) never exists for the whole L.

Shapes: B batch, L length = K chunks of T, D width, N state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

_CHUNK = 64
# Elements of one (B, chunks, T, D, N) tensor in backward; about five live at once.
_GROUP_ELEMENTS = 2**22


def refuse(**call: Any) -> str | None:
    """Takes every call."""
    return None


def checkpoints_shape(batch: int, length: int, width: int, state: int) -> tuple[int, ...]:
    """The states at the chunks' starts."""
    return batch, (length + _CHUNK - 1) // _CHUNK, width, state


def forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    initial_state: Tensor | None,
    reset: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """y in u's dtype, the final state, the states at the chunks' starts (B, K, D, N)."""
    batch, length, width = u.shape
    start_BDN = A.new_zeros(batch, *A.shape) if initial_state is None else initial_state
    if u.numel() == 0:
        empty = A.new_zeros(checkpoints_shape(batch, length, width, A.shape[1]))
        return torch.zeros_like(u), start_BDN.clone(), empty
    x = _chunk(u, delta, A, B, C, delta_bias, delta_softplus, reset)
    chunks, steps = x.u.shape[1:3]

    h_BKDN = A.new_zeros(batch, chunks, *A.shape)
    for t in range(steps):
        h_BKDN = x.decay(t) * h_BKDN + x.drive(t)
    starts_BKDN = torch.empty_like(h_BKDN)
    decay_BKDN = x.chunk_decay()
    for k in range(chunks):
        starts_BKDN[:, k] = start_BDN
        start_BDN = decay_BKDN[:, k] * start_BDN + h_BKDN[:, k]

    h_BKDN, ys = starts_BKDN, []
    for t in range(steps):
        h_BKDN = x.decay(t) * h_BKDN + x.drive(t)
        ys.append(_real(x.read(t, h_BKDN)))
    y_BLD = torch.stack(ys, 2).flatten(1, 2)[:, :length]
    if D is not None:
        y_BLD = y_BLD + D * u
    if z is not None:
        y_BLD = y_BLD * F.silu(z.to(y_BLD.dtype))
    return y_BLD.to(u.dtype).contiguous(), start_BDN.clone(), starts_BKDN


def backward(
    dy: Tensor,
    dfinal_state: Tensor | None,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    initial_state: Tensor | None,
    reset: Tensor | None,
    checkpoints: Tensor,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Of u, delta, A, B, C, D, z, delta_bias, initial_state; None where not needed."""
    batch, length, _ = u.shape
    inputs = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    if u.numel() == 0:
        zeros = [
            torch.zeros_like(x) if needed and x is not None else None
            for x, needed in zip(inputs, needs)
        ]
        if needs[8] and dfinal_state is not None:
            zeros[8] = dfinal_state.clone()
        return tuple(zeros)
    x = _chunk(u, delta, A, B, C, delta_bias, delta_softplus, reset)
    chunks, steps = x.u.shape[1:3]
    real = x.u.dtype
    dy_BLD = dy.to(real)
    dout_BLD = dy_BLD  # at C·h + D u, before the gate
    if z is not None:
        sigmoid = torch.sigmoid(z.to(real))
        dout_BLD = dy_BLD * z * sigmoid
    dout_BKTD = _pad(dout_BLD, chunks, steps)

    # g is the adjoint of the state after a step; into[t] what step t's output adds to it.
    def into(t: int, dout_BKTD: Tensor, x: _Chunks) -> Tensor:
        scale = 2 if A.is_complex() else 1
        return scale * dout_BKTD[:, :, t, :, None] * _at(x.C, t).conj()

    g_BKDN = A.new_zeros(batch, chunks, *A.shape)
    for t in reversed(range(steps)):
        g_BKDN = x.decay(t).conj() * (g_BKDN + into(t, dout_BKTD, x))
    ends_BKDN = torch.empty_like(
        g_BKDN
    )  # the adjoint of each chunk's last state, from later chunks
    decay_BKDN = x.chunk_decay().conj()
    end_BDN = A.new_zeros(batch, *A.shape) if dfinal_state is None else dfinal_state
    for k in reversed(range(chunks)):
        ends_BKDN[:, k] = end_BDN
        end_BDN = decay_BKDN[:, k] * end_BDN + g_BKDN[:, k]

    parts: dict[str, list[Tensor]] = {name: [] for name in ("u", "delta", "B", "C", "out")}
    dA, dB, dC = (torch.zeros_like(p) for p in (A, x.B[0, 0, 0], x.C[0, 0, 0]))
    group = max(1, _GROUP_ELEMENTS // (batch * steps * A.numel()))
    for first in range(0, chunks, group):
        some = slice(first, first + group)
        xs, dout = x.group(some), dout_BKTD[:, some]
        hs, decayed = [], []
        h_BKDN = checkpoints[:, some]
        for t in range(steps):
            decayed.append(xs.decay(t) * h_BKDN)
            h_BKDN = decayed[-1] + xs.drive(t)
            hs.append(h_BKDN)
        gs = []
        g_BKDN = ends_BKDN[:, some]
        for t in reversed(range(steps)):
            gs.append(g_BKDN + into(t, dout, xs))
            g_BKDN = xs.decay(t).conj() * gs[-1]
        h, g = torch.stack(hs, 2), torch.stack(gs[::-1], 2)
        q = torch.stack(decayed, 2).conj_physical_().mul_(g)  # through exp(Δ A), before Δ or A
        del hs, gs, decayed
        w = (xs.B.conj() * g).sum(-1)
        w = w.real if A.is_complex() else w
        through = (A.conj() * q).sum(-1)
        parts["u"].append(xs.delta * w)
        parts["delta"].append((through.real if A.is_complex() else through) + xs.u * w)
        if needs[2]:
            dA += torch.einsum("bktd,bktdn->dn", xs.delta.to(A.dtype), q)
        if needs[3]:
            du_g = (xs.delta * xs.u).to(A.dtype)
            if B.ndim == 3:
                parts["B"].append(torch.einsum("bktd,bktdn->bktn", du_g, g))
            else:
                dB += torch.einsum("bktd,bktdn->dn", du_g, g)
        if needs[4]:
            scaled = (dout * (2 if A.is_complex() else 1)).to(A.dtype)
            if C.ndim == 3:
                parts["C"].append(torch.einsum("bktd,bktdn->bktn", scaled, h.conj()))
            else:
                dC += torch.einsum("bktd,bktdn->dn", scaled, h.conj())
        if needs[6]:
            parts["out"].append(_real((xs.C * h).sum(-1)))

    def joined(name: str) -> Tensor:
        return torch.cat(parts[name], 1).flatten(1, 2)[:, :length]

    du, ddelta = joined("u"), joined("delta")
    if D is not None:
        du = du + D * dout_BLD
    if delta_softplus:
        raw = delta.to(real) if delta_bias is None else delta.to(real) + delta_bias
        ddelta = ddelta * torch.sigmoid(raw)
    dz = None
    if needs[6] and z is not None:
        out = joined("out") if D is None else joined("out") + D * u
        dz = dy_BLD * out * sigmoid * (1 + z * (1 - sigmoid))
    gradients = (
        du,
        ddelta,
        dA,
        (joined("B") if B.ndim == 3 else dB) if needs[3] else None,
        (joined("C") if C.ndim == 3 else dC) if needs[4] else None,
        (dout_BLD * u).sum((0, 1)) if needs[5] else None,
        dz,
        ddelta.sum((0, 1)) if needs[7] else None,
        end_BDN,
    )
    return tuple(
        g.to(p.dtype).contiguous() if needed and g is not None and p is not None else None
        for g, p, needed in zip(gradients, inputs, needs)
    )


@dataclass(frozen=True, kw_only=True)
class _Chunks:
    """A call in chunks and in the state's precision; past the end Δ is 0: no state changes."""

    u: Tensor  # (B, K, T, D)
    delta: Tensor  # (B, K, T, D): Δ, after bias and softplus
    A: Tensor  # (D, N)
    B: Tensor  # (B, K, T, 1, N), or (1, 1, 1, D, N) constant
    C: Tensor  # likewise
    keep: Tensor | None  # (B, K, T), 0 where the state is reset

    def decay(self, t: int) -> Tensor:
        decay_BKDN = torch.exp(self.delta[:, :, t, :, None] * self.A)
        return decay_BKDN if self.keep is None else decay_BKDN * self.keep[:, :, t, None, None]

    def drive(self, t: int) -> Tensor:
        return (self.delta[:, :, t] * self.u[:, :, t])[..., None] * _at(self.B, t)

    def read(self, t: int, h_BKDN: Tensor) -> Tensor:
        return (_at(self.C, t) * h_BKDN).sum(-1)

    def chunk_decay(self) -> Tensor:
        decay_BKDN = torch.exp(self.delta.sum(2)[..., None] * self.A)
        return decay_BKDN if self.keep is None else decay_BKDN * self.keep.amin(2)[..., None, None]

    def group(self, some: slice) -> _Chunks:
        return _Chunks(
            u=self.u[:, some],
            delta=self.delta[:, some],
            A=self.A,
            B=self.B[:, some] if self.B.shape[1] > 1 else self.B,
            C=self.C[:, some] if self.C.shape[1] > 1 else self.C,
            keep=None if self.keep is None else self.keep[:, some],
        )


def _chunk(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    reset: Tensor | None,
) -> _Chunks:
    length = u.shape[1]
    steps = min(_CHUNK, length)
    chunks = checkpoints_shape(1, length, 1, 1)[1]
    real = A.real.dtype
    delta = delta.to(real)
    if delta_bias is not None:
        delta = delta + delta_bias
    if delta_softplus:
        delta = F.softplus(delta)

    def projection(x: Tensor) -> Tensor:
        if x.ndim == 2:
            return x[None, None, None]
        return _pad(x.to(A.dtype), chunks, steps)[..., None, :]

    return _Chunks(
        u=_pad(u.to(real), chunks, steps),
        delta=_pad(delta, chunks, steps),
        A=A,
        B=projection(B),
        C=projection(C),
        keep=None if reset is None else 1 - _pad(reset.to(real)[..., None], chunks, steps)[..., 0],
    )


def _pad(x_BLX: Tensor, chunks: int, steps: int) -> Tensor:
    """(B, L, X) to (B, K, T, X), zeros past the end."""
    padding = chunks * steps - x_BLX.shape[1]
    return F.pad(x_BLX, (0, 0, 0, padding)).unflatten(1, (chunks, steps))


def _at(x: Tensor, t: int) -> Tensor:
    """B or C at step t of every chunk."""
    return x[:, :, t] if x.shape[2] > 1 else x[:, :, 0]


def _real(x: Tensor) -> Tensor:
    """What a readout contributes: a complex state stands for itself and its conjugate."""
    return 2 * x.real if x.is_complex() else x
