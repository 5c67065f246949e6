"""Linear recurrences in chunks, by matrix products: with matrix states, and diagonal ones.

Shapes: B batch, L length, H heads, K key width and V value width of a head, C chunk, N chunks.
The plain loops they are tested against stand in reference.py.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["diagonal_recurrence", "linear_attention", "linear_attention_step"]

MAX_EXPONENT = 60.0  # exp of it, and of twice it, is still a float32


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    state: Tensor | None = None,
    *,
    chunk: int = 64,
) -> tuple[Tensor, Tensor]:
    """S[t] = diag(exp(log_decay[t])) S[t-1] + k[t] v[t]ᵀ; y[t] = q[t] S[t]: y and the last S.

    Shapes: q, k (B, L, H, K); v, y (B, L, H, V); state (B, H, K, V); log_decay, at most 0,
    (B, L, H, K), or broadcast: (H, 1) for one constant a head.
    """
    B, L, H, K = q.shape
    if state is None:
        state = q.new_zeros(B, H, K, v.shape[-1])
    chunk = min(chunk, L)
    pad = -L % max(chunk, 1)

    def split(x: Tensor) -> Tensor:  # (B, L, H, X) -> (N, B, H, C, X)
        x = F.pad(x, (0, 0, 0, 0, 0, pad))
        return x.unflatten(1, (-1, chunk)).permute(1, 0, 3, 2, 4)

    q, k, v = split(q), split(k), split(v)
    if log_decay is None:
        k_end, decay = k, None
    else:
        width = log_decay.shape[-1]
        g = log_decay.expand(B, L, H, width)
        # Padded steps decay by nothing: the state after the last chunk is the one after step L.
        sums = split(g).cumsum(-2)
        total = sums[..., -1:, :]
        middle = sums[..., chunk // 2 : chunk // 2 + 1, :]
        k_end = k * (total - sums).exp()
        decay = total.exp().transpose(-1, -2)  # (N, B, H, K or 1, 1)
        q_start = q * sums.exp()
        # Decay from s to t as exp(sum[t] - middle) exp(middle - sum[s]), neither factor too large.
        q = q * (sums - middle).clamp(max=MAX_EXPONENT).exp()
        k = k * (middle - sums).clamp(max=MAX_EXPONENT).exp()
    y = (q @ k.mT).tril() @ v
    writes = k_end.mT @ v
    carried = []
    for n in range(len(writes)):
        carried.append(state)
        state = writes[n] + (state if decay is None else decay[n] * state)
    y = y + (q if log_decay is None else q_start) @ torch.stack(carried)
    return y.permute(1, 0, 3, 2, 4).flatten(1, 2)[:, :L], state


def linear_attention_step(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One time step: q, k (B, H, K); v, y (B, H, V); log_decay (B, H, K) or (H, 1)."""
    if log_decay is not None:
        state = log_decay.exp()[..., None] * state
    state = state + k[..., None] * v[..., None, :]
    return (q[..., None, :] @ state)[..., 0, :], state


def diagonal_recurrence(
    log_a_P: Tensor, x_BLP: Tensor, state_BP: Tensor | None = None, *, chunk: int = 32
) -> Tensor:
    """h[t] = exp(log_a) h[t-1] + x[t], elementwise, real or complex; every h (B, L, P)."""
    B, L, P = x_BLP.shape
    state = x_BLP.new_zeros(B, P) if state_BP is None else state_BP
    chunk = min(chunk, L)
    lag = torch.arange(chunk, device=x_BLP.device)
    lag = lag[:, None] - lag  # (C, C)
    weights_PCC = torch.exp(log_a_P[:, None, None] * lag.clamp(min=0)) * (lag >= 0)
    from_state_PC = torch.exp(log_a_P[:, None] * torch.arange(1, chunk + 1, device=x_BLP.device))
    x = F.pad(x_BLP, (0, 0, 0, -L % max(chunk, 1))).unflatten(1, (-1, chunk))  # (B, N, C, P)
    inner_PNBC = torch.matmul(x.permute(3, 1, 0, 2).flatten(1, 2), weights_PCC.mT).unflatten(
        1, (x.shape[1], B)
    )
    hs = []
    h_PB = state.mT
    for inner_PBC in inner_PNBC.unbind(1):
        h_PBC = inner_PBC + h_PB[..., None] * from_state_PC[:, None]
        h_PB = h_PBC[..., -1]
        hs.append(h_PBC)
    return torch.cat(hs, -1).permute(1, 2, 0)[:, :L]
