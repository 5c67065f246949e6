"""Who takes part in the scan bench: our backends, other packages' scans, and other sequence mixers.

Shapes: B batch, L length, D width, N state. Every scan computes the same function of the same
tensors: y = (C·h + D u) silu(z) with Δ = softplus(delta + bias) and h[t] = exp(Δ A) h[t-1] + Δ B u.
"""

from __future__ import annotations

import functools
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from seqbench.kernels import dispatch
from seqbench.kernels.selective_scan import selective_scan

HEAD_WIDTH = 64  # of the attention


@dataclass(frozen=True, kw_only=True)
class Size:
    """Of one call."""

    batch: int
    length: int
    width: int
    state: int

    def __str__(self) -> str:
        return f"({self.batch}, {self.length}, {self.width}, {self.state})"


@dataclass(frozen=True, kw_only=True)
class Entrant:
    """One way to mix a sequence; `run` maps the tensors that `draw` makes to (B, L, D)."""

    name: str
    computes: Literal["scan", "attention", "convolution"]
    run: Callable[..., Tensor]
    dtypes: tuple[torch.dtype, ...] = (torch.float32,)  # of the sequences; parameters are float32
    ours: bool = False
    expands: bool = False  # holds several (B, L, D, N) tensors at once
    loops: bool = False  # over time, in Python
    compiled: bool = False  # by torch.compile, once a size
    launched: bool = False  # always from Python: it cannot be captured as a CUDA graph
    time_last: bool = False  # wants (B, D, L) contiguous in memory
    missing: str | None = None  # why it cannot be run here
    package: str | None = None  # the distribution it comes from

    def draw(
        self, size: Size, device: torch.device, dtype: torch.dtype = torch.float32
    ) -> dict[str, Tensor]:
        """The inputs, all leaves that ask for a gradient; the same ones on every call."""
        generator = torch.Generator(device).manual_seed(0)
        drawn = _DRAW[self.computes](size, generator)
        return {name: self._own(x, size, dtype).requires_grad_() for name, x in drawn.items()}

    def exact(self, inputs: dict[str, Tensor]) -> Tensor:
        """The same function by its definition, in float64."""
        return _EXACT[self.computes](**{name: x.double() for name, x in inputs.items()})

    def _own(self, x: Tensor, size: Size, dtype: torch.dtype) -> Tensor:
        """In the dtype and the layout that it takes."""
        if x.ndim == 3:
            x = x.to(dtype)
            if self.time_last:
                x = x.mT.contiguous().mT
        return x


def entrants(device: torch.device) -> list[Entrant]:
    """Ours first, a row for every backend there is, then the peers."""
    cuda = device.type == "cuda"
    ours = {
        name: reason
        for name, reason in dispatch.backends("selective_scan").items()
        if name != "reference" and (name == "torch" or (name == "cpu") != cuda)
    }
    low = (torch.bfloat16,)
    scan = partial(Entrant, computes="scan", dtypes=low if cuda else (torch.float32,))
    return [
        *(
            scan(
                name=f"seqbench {name}",
                run=partial(_seqbench, backend=name),
                dtypes=low if cuda else (torch.float32, *(low if name == "cpu" else ())),
                ours=True,
                missing=reason,
            )
            for name, reason in ours.items()
        ),
        *(
            [
                scan(
                    name="mamba_ssm CUDA",
                    run=_mamba_ssm,
                    time_last=True,
                    missing=None if find_spec("mamba_ssm") else "mamba_ssm is not installed",
                    package="mamba_ssm",
                )
            ]
            if cuda
            else []
        ),
        scan(
            name="mambapy pscan",
            run=_mambapy,
            expands=True,
            missing=_absent("mambapy"),
            package="mambapy",
        ),
        scan(
            name="accelerated-scan reference",
            run=_accelerated_scan,
            expands=True,
            missing=_absent("accelerated_scan"),
            package="accelerated-scan",
        ),
        scan(
            name="accelerated-scan compiled",
            run=_accelerated_scan_compiled,
            expands=True,
            compiled=True,
            missing=_absent("accelerated_scan") or _cannot_compile(device),
            package="accelerated-scan",
        ),
        scan(
            name="torch associative_scan",
            run=_associative_scan,
            expands=True,
            launched=True,
            missing=_no_associative_scan(),
        ),
        scan(name="plain loop", run=_loop, expands=True, loops=True),
        Entrant(
            name="attention (flash)" if cuda else "attention (SDPA)",
            computes="attention",
            run=_flash_attention if cuda else _attention,
            dtypes=low if cuda else (torch.float32,),
        ),
        Entrant(
            name="FFT convolution",
            computes="convolution",
            run=_convolution,
            dtypes=low if cuda else (torch.float32,),
        ),
    ]


def _seqbench(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor,
    delta_bias: Tensor,
    *,
    backend: str,
) -> Tensor:
    y = selective_scan(
        u, delta, A, B, C, D, z, delta_bias=delta_bias, delta_softplus=True, backend=backend
    )
    assert isinstance(y, Tensor)
    return y


def _expanded(
    scan: Callable[[Tensor, Tensor, Tensor], Tensor],
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor,
    delta_bias: Tensor,
) -> Tensor:
    """Around a scan of (B, L, D, N) gates and tokens, as mambapy's block writes it.

    In the parameters' precision, whatever the dtype of the sequences.
    """
    dtype = u.dtype
    u, delta, B, C, z = (x.to(A.dtype) for x in (u, delta, B, C, z))
    delta = F.softplus(delta + delta_bias)
    gates_BLDN = torch.exp(delta[..., None] * A)
    tokens_BLDN = delta[..., None] * B[:, :, None] * u[..., None]
    return ((scan(gates_BLDN, tokens_BLDN, C) + D * u) * F.silu(z)).to(dtype)


def _mambapy(**inputs: Tensor) -> Tensor:
    from mambapy.pscan import pscan

    def scan(gates_BLDN: Tensor, tokens_BLDN: Tensor, C_BLN: Tensor) -> Tensor:
        return (pscan(gates_BLDN, tokens_BLDN) @ C_BLN[..., None])[..., 0]

    return _expanded(scan, **inputs)


def _associative_scan(**inputs: Tensor) -> Tensor:
    from torch._higher_order_ops.associative_scan import associative_scan

    def scan(gates_BLDN: Tensor, tokens_BLDN: Tensor, C_BLN: Tensor) -> Tensor:
        _, states = associative_scan(
            _after, (gates_BLDN, tokens_BLDN), dim=1, combine_mode="generic"
        )
        return (states @ C_BLN[..., None])[..., 0]

    return _expanded(scan, **inputs)


def _after(first: tuple[Tensor, Tensor], then: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Two steps h -> gate h + token as one."""
    return first[0] * then[0], then[0] * first[1] + then[1]


def _loop(**inputs: Tensor) -> Tensor:
    """Unbound first: indexing inside the loop would make the backward quadratic in L."""

    def scan(gates_BLDN: Tensor, tokens_BLDN: Tensor, C_BLN: Tensor) -> Tensor:
        h_BDN, states = torch.zeros_like(gates_BLDN[:, 0]), []
        for gate_BDN, token_BDN in zip(gates_BLDN.unbind(1), tokens_BLDN.unbind(1)):
            h_BDN = gate_BDN * h_BDN + token_BDN
            states.append(h_BDN)
        return (torch.stack(states, 1) @ C_BLN[..., None])[..., 0]

    return _expanded(scan, **inputs)


def _accelerated_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor,
    delta_bias: Tensor,
) -> Tensor:
    """In its own layout, time last, made without a copy of anything as large as the states."""
    from accelerated_scan.ref import scan

    dtype = u.dtype
    u, delta, B, C, z = (x.to(A.dtype) for x in (u, delta, B, C, z))
    delta_BDL = F.softplus(delta + delta_bias).mT.contiguous()
    gates_BDNL = torch.exp(delta_BDL[:, :, None] * A[..., None])
    drive_BDL = delta_BDL * u.mT
    tokens_BDNL = drive_BDL[:, :, None] * B.mT.contiguous()[:, None]
    states = scan(gates_BDNL.flatten(1, 2), tokens_BDNL.flatten(1, 2))
    y_BDL = torch.einsum("bdnl,bnl->bdl", states.view_as(gates_BDNL), C.mT)
    return ((y_BDL.mT + D * u) * F.silu(z)).to(dtype)


@functools.cache
def _compile() -> Callable[..., Tensor]:
    return torch.compile(_accelerated_scan, dynamic=False)


def _accelerated_scan_compiled(**inputs: Tensor) -> Tensor:
    return _compile()(**inputs)


def _mamba_ssm(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor,
    delta_bias: Tensor,
) -> Tensor:
    """The kernel of the paper's authors, in its own layout, time last."""
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    y_BDL = selective_scan_fn(
        u.mT, delta.mT, A, B.mT, C.mT, D, z.mT, delta_bias=delta_bias, delta_softplus=True
    )
    return y_BDL.mT


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal softmax attention, without its projections."""
    q_BHLd, k_BHLd, v_BHLd = (x.unflatten(-1, (-1, _head(x))).transpose(1, 2) for x in (q, k, v))
    y_BHLd = F.scaled_dot_product_attention(q_BHLd, k_BHLd, v_BHLd, is_causal=True)
    return y_BHLd.transpose(1, 2).flatten(2)


def _flash_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return _attention(q, k, v)


def _attention_by_definition(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q_BHLd, k_BHLd, v_BHLd = (x.unflatten(-1, (-1, _head(x))).transpose(1, 2) for x in (q, k, v))
    scores = q_BHLd @ k_BHLd.mT / math.sqrt(_head(q))
    future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    y_BHLd = scores.masked_fill(future, -torch.inf).softmax(-1) @ v_BHLd
    return y_BHLd.transpose(1, 2).flatten(2)


def _convolution(u: Tensor, kernel: Tensor) -> Tensor:
    """A causal convolution with a kernel as long as the sequence, one a channel, in float32."""
    length, x = u.shape[1], u.to(kernel.dtype)
    spectrum = torch.fft.rfft(x, 2 * length, dim=1) * torch.fft.rfft(kernel, 2 * length, dim=0)
    return torch.fft.irfft(spectrum, 2 * length, dim=1)[:, :length].to(u.dtype)


def _convolution_by_definition(u: Tensor, kernel: Tensor) -> Tensor:
    length, width = u.shape[1:]
    padded_BDL = F.pad(u.mT, (length - 1, 0))
    return F.conv1d(padded_BDL, kernel.flip(0).mT[:, None], groups=width).mT


def _head(x_BLD: Tensor) -> int:
    return math.gcd(HEAD_WIDTH, x_BLD.shape[-1])


def _draw_scan(size: Size, generator: torch.Generator) -> dict[str, Tensor]:
    """As Mamba starts: Δ log-uniform in [0.001, 0.1], A = -1 ... -N."""
    sequence = (size.batch, size.length, size.width)
    device = generator.device
    normal = partial(torch.randn, generator=generator, device=device)
    step_D = torch.exp(
        torch.rand(size.width, generator=generator, device=device)
        * (math.log(0.1) - math.log(0.001))
        + math.log(0.001)
    )
    return {
        "u": normal(sequence),
        "delta": normal(sequence).mul_(0.5),
        "A": -torch.arange(1.0, size.state + 1, device=device).repeat(size.width, 1),
        "B": normal(size.batch, size.length, size.state),
        "C": normal(size.batch, size.length, size.state),
        "D": normal(size.width),
        "z": normal(sequence),
        "delta_bias": step_D + torch.log(-torch.expm1(-step_D)),  # softplus undone
    }


def _draw_attention(size: Size, generator: torch.Generator) -> dict[str, Tensor]:
    shape, device = (size.batch, size.length, size.width), generator.device
    return {name: torch.randn(shape, generator=generator, device=device) for name in "qkv"}


def _draw_convolution(size: Size, generator: torch.Generator) -> dict[str, Tensor]:
    normal = partial(torch.randn, generator=generator, device=generator.device)
    time_L = torch.arange(size.length, device=generator.device)
    decay_L1 = torch.exp(-time_L / (0.1 * size.length + 1))[:, None]
    return {
        "u": normal(size.batch, size.length, size.width),
        "kernel": normal(size.length, size.width) * decay_L1,
    }


def _absent(package: str) -> str | None:
    return None if find_spec(package) else "not installed; the extra seqbench[test] brings it"


def _cannot_compile(device: torch.device) -> str | None:
    if device.type == "cuda":
        return "compiling it for each size takes longer than the whole bench"
    found = any(map(shutil.which, ("g++", "clang++", "c++")))
    return None if found else "torch.compile needs a C++ compiler"


def _no_associative_scan() -> str | None:
    try:
        found = find_spec("torch._higher_order_ops.associative_scan")
    except ModuleNotFoundError:
        found = None
    return None if found else "this torch has none"


_DRAW: dict[str, Callable[[Size, torch.Generator], dict[str, Tensor]]] = {
    "scan": _draw_scan,
    "attention": _draw_attention,
    "convolution": _draw_convolution,
}
_EXACT: dict[str, Callable[..., Any]] = {
    "scan": partial(_seqbench, backend="reference"),
    "attention": _attention_by_definition,
    "convolution": _convolution_by_definition,
}
