"""The selective scan in plain PyTorch, on any device: all chunks step through time at once.

Forward: the chunks' own contributions from the zero state, the states at chunk starts one after
another, then every chunk again from its true start. Backward: the same for the adjoint, in reverse;
states are recomputed for a few chunks at a time, so (B, L, D, N) never exists for the whole L.

Shapes: B batch, L length = K chunks of T, D width, N state; time leads: a step is one piece.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

_CHUNK = 64
# Elements of one (T, B, chunks, D, N) tensor in backward, of which three live at once.
_GROUP_ELEMENTS = 2**20
_ALL = slice(None)


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
    keep: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """y in u's dtype, the final state, and, to `keep`, the chunks' starts (B, K, D, N)."""
    batch, length, width = u.shape
    start_BDN = A.new_zeros(batch, *A.shape) if initial_state is None else initial_state
    if u.numel() == 0:
        shape = checkpoints_shape(batch, length, width, A.shape[1]) if keep else (0,)
        return torch.zeros_like(u), start_BDN.clone(), A.new_zeros(shape)
    x = _chunk(u, delta, A, B, C, delta_bias, delta_softplus, reset)
    steps, _, chunks = x.u.shape[:3]

    h_BKDN = A.new_zeros(batch, chunks, *A.shape)
    for t in range(steps):
        h_BKDN = x.drive(t).addcmul_(x.decay(t), h_BKDN)
    starts_BKDN = torch.empty_like(h_BKDN)
    decay_BKDN = x.chunk_decay()
    for k in range(chunks):
        starts_BKDN[:, k] = start_BDN
        start_BDN = torch.addcmul(h_BKDN[:, k], decay_BKDN[:, k], start_BDN)

    h_BKDN, ys = starts_BKDN, []
    for t in range(steps):
        h_BKDN = x.drive(t).addcmul_(x.decay(t), h_BKDN)
        ys.append(x.read(t, h_BKDN))
    y_BLD = _whole(torch.stack(ys), length)
    if D is not None:
        y_BLD = y_BLD + D * u
    if z is not None:
        y_BLD = y_BLD * F.silu(z.to(y_BLD.dtype))
    kept = starts_BKDN if keep else A.new_empty(0)
    return y_BLD.to(u.dtype).contiguous(), start_BDN.clone(), kept


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
    steps, _, chunks = x.u.shape[:3]
    real = x.u.dtype
    dy_BLD = dy.to(real)
    dout_BLD = dy_BLD  # at C·h + D u, before the gate
    if z is not None:
        sigmoid = torch.sigmoid(z.to(real))
        dout_BLD = dy_BLD * z * sigmoid
    dout = _split(dout_BLD, chunks, steps)
    x = replace(x, dout=dout)

    # The adjoint of the state after each chunk: first from the next, then from all later ones.
    g_BKDN = A.new_zeros(batch, chunks, *A.shape)
    for t in reversed(range(steps)):
        g_BKDN = x.decay(t).conj() * (g_BKDN + x.feed(t))
    ends_BKDN = torch.empty_like(g_BKDN)
    decay_BKDN = x.chunk_decay().conj()
    end_BDN = A.new_zeros(batch, *A.shape) if dfinal_state is None else dfinal_state
    for k in reversed(range(chunks)):
        ends_BKDN[:, k] = end_BDN
        end_BDN = torch.addcmul(g_BKDN[:, k], decay_BKDN[:, k], end_BDN)

    group = max(1, _GROUP_ELEMENTS // (batch * steps * A.numel()))
    dA, dB, dC = (torch.zeros_like(p) for p in (A, x.B, x.C))
    du, ddelta, out = (torch.empty_like(x.u) for _ in range(3))
    for first in range(0, chunks, group):
        some = slice(first, first + group)
        part = x.chunks(some)
        decay, h, g = part.decay(_ALL), part.drive(_ALL), part.feed(_ALL)
        last = checkpoints[:, some]
        for t in range(steps):
            last = h[t].addcmul_(decay[t], last)
        g[-1] += ends_BKDN[:, some]
        for t in reversed(range(steps - 1)):
            g[t].addcmul_(decay[t + 1].conj(), g[t + 1])
        if needs[6]:
            out[:, :, some] = part.read(_ALL, h)
        if needs[4]:
            _put(dC, some, part.weight * dout[:, :, some], h.conj())
        if needs[3]:
            _put(dB, some, part.delta * part.u, g)
        # The adjoint of Δ A, in place of the decay.
        q = decay
        q[0] *= checkpoints[:, some]
        q[1:] *= h[:-1]
        q = q.conj_physical_().mul_(g)
        if needs[2]:
            dA += torch.einsum("tbkd,tbkdn->dn", part.delta.to(A.dtype), q)
        Bg = torch.einsum(f"{part.axes(part.B)},tbkdn->tbkd", part.B.conj(), g)
        du[:, :, some] = part.delta * _real(Bg)
        Aq = torch.einsum("dn,tbkdn->tbkd", A.conj(), q)
        ddelta[:, :, some] = _real(Aq) + part.u * _real(Bg)

    du, ddelta, out = (_whole(x, length) for x in (du, ddelta, out))
    if D is not None:
        du = du + D * dout_BLD
        out = out + D * u
    if delta_softplus:
        raw = delta.to(real) if delta_bias is None else delta.to(real) + delta_bias
        ddelta = ddelta * torch.sigmoid(raw)
    gradients = (
        du,
        ddelta,
        dA,
        _whole(dB, length) if B.ndim == 3 else dB,
        _whole(dC, length) if C.ndim == 3 else dC,
        (dout_BLD * u).sum((0, 1)) if needs[5] else None,
        dy_BLD * out * sigmoid * (1 + z * (1 - sigmoid)) if needs[6] and z is not None else None,
        ddelta.sum((0, 1)) if needs[7] else None,
        end_BDN,
    )
    return tuple(
        g.to(p.dtype).contiguous() if needed and g is not None and p is not None else None
        for g, p, needed in zip(gradients, inputs, needs)
    )


@dataclass(frozen=True, kw_only=True)
class _Chunks:
    """A call in chunks and in the state's precision; past the end Δ is 0: no state changes.

    Every method takes one step, or all of them as a slice.
    """

    u: Tensor  # (T, B, K, D)
    delta: Tensor  # (T, B, K, D): Δ, after bias and softplus
    A: Tensor  # (D, N)
    B: Tensor  # (T, B, K, N) or (D, N)
    C: Tensor  # likewise
    keep: Tensor | None  # (T, B, K), 0 where the state is reset
    dout: Tensor | None = None  # (T, B, K, D): the gradient at C·h, in backward

    @property
    def weight(self) -> int:
        """A complex state stands for itself and its conjugate."""
        return 2 if self.A.is_complex() else 1

    def decay(self, t: int | slice) -> Tensor:
        """exp(Δ A), 0 at a reset."""
        decay = torch.exp(self.delta[t][..., None] * self.A)
        return decay if self.keep is None else decay * self.keep[t][..., None, None]

    def chunk_decay(self) -> Tensor:
        """The product of a chunk's decays (B, K, D, N)."""
        decay = torch.exp(self.delta.sum(0)[..., None] * self.A)
        return decay if self.keep is None else decay * self.keep.amin(0)[..., None, None]

    def drive(self, t: int | slice) -> Tensor:
        """Δ B u, what a step adds to the state."""
        return (self.delta[t] * self.u[t])[..., None] * self._spread(self.B, t)

    def feed(self, t: int | slice) -> Tensor:
        """What a step's output adds to the state's adjoint."""
        assert self.dout is not None
        return (self.weight * self.dout[t])[..., None] * self._spread(self.C, t).conj()

    def read(self, t: int | slice, h: Tensor) -> Tensor:
        """C·h."""
        return self.weight * _real((self._spread(self.C, t) * h).sum(-1))

    def chunks(self, some: slice) -> _Chunks:
        """Some of the chunks."""
        return _Chunks(
            u=self.u[:, :, some],
            delta=self.delta[:, :, some],
            A=self.A,
            B=self.B[:, :, some] if self.B.ndim == 4 else self.B,
            C=self.C[:, :, some] if self.C.ndim == 4 else self.C,
            keep=None if self.keep is None else self.keep[:, :, some],
            dout=None if self.dout is None else self.dout[:, :, some],
        )

    def axes(self, x: Tensor) -> str:
        """Of B or C, as einsum names them."""
        return "tbkn" if x.ndim == 4 else "dn"

    def _spread(self, x: Tensor, t: int | slice) -> Tensor:
        """B or C, broadcast over channels or time."""
        return x[t][..., None, :] if x.ndim == 4 else x


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
        return x if x.ndim == 2 else _split(x.to(A.dtype), chunks, steps)

    return _Chunks(
        u=_split(u.to(real), chunks, steps),
        delta=_split(delta, chunks, steps),
        A=A,
        B=projection(B),
        C=projection(C),
        keep=None
        if reset is None
        else 1 - _split(reset.to(real)[..., None], chunks, steps)[..., 0],
    )


def _put(gradient: Tensor, some: slice, scale_TBKD: Tensor, states: Tensor) -> None:
    """Adds the gradient of B or C, from some chunks, where it belongs."""
    scale = scale_TBKD.to(states.dtype)
    if gradient.ndim == 2:
        gradient += torch.einsum("tbkd,tbkdn->dn", scale, states)
    else:
        gradient[:, :, some] = torch.einsum("tbkd,tbkdn->tbkn", scale, states)


def _split(x_BLX: Tensor, chunks: int, steps: int) -> Tensor:
    """(B, L, X) to (T, B, K, X), zeros past the end."""
    padding = chunks * steps - x_BLX.shape[1]
    x_BKTX = F.pad(x_BLX, (0, 0, 0, padding)).unflatten(1, (chunks, steps))
    return x_BKTX.permute(2, 0, 1, 3).contiguous()


def _whole(x_TBKX: Tensor, length: int) -> Tensor:
    """Back to (B, L, X)."""
    return x_TBKX.permute(1, 2, 0, 3).flatten(1, 2)[:, :length]


def _real(x: Tensor) -> Tensor:
    return x.real if x.is_complex() else x
