"""RMSNorm in C++ on CPU: one pass over memory forward, and one backward."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from seqbench.kernels import native

_SOURCE = Path(__file__).parent / "csrc" / "norm.cpp"


def refuse(*, x: Tensor, weight: Tensor) -> str | None:
    """Why this backend cannot take the call, or None."""
    for tensor in (x, weight):
        if tensor.device.type != "cpu":
            return f"a tensor is on {tensor.device}; it runs on cpu"
    if x.dtype not in native.DTYPES:
        return f"x is {x.dtype}; it takes float32, bfloat16 and float16"
    return native.refusal(_SOURCE)


def forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """y in x's dtype, and 1 / sqrt(mean(x²) + eps) of every row (R)."""
    x, weight, y = x.contiguous(), weight.contiguous(), native.empty(x.shape, x.dtype)
    scale = torch.empty(x.shape[:-1].numel())
    if x.numel():
        library, arguments = _call(x, weight, scale, eps)
        arguments.y = _rows(y)
        library.norm_forward(ctypes.byref(arguments))
    return y, scale


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, scale: Tensor, needs: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """Gradients of x and weight; None if not needed."""
    x, dy, weight = x.contiguous(), dy.to(x.dtype).contiguous(), weight.contiguous()
    dx = native.empty(x.shape, x.dtype) if needs[0] else None
    dweight = torch.zeros_like(weight) if needs[1] else None
    if x.numel():
        library, arguments = _call(x, weight, scale, 0.0)
        workspace = torch.empty(library.norm_workspace(ctypes.byref(arguments)))
        arguments.dy, arguments.workspace = _rows(dy), workspace.data_ptr()
        if dx is not None:
            arguments.dx = _rows(dx)
        if dweight is not None:
            arguments.dweight = dweight.data_ptr()
        library.norm_backward(ctypes.byref(arguments))
    return dx, dweight


class _Arguments(ctypes.Structure):
    """NormArgs of norm.cpp."""

    _fields_ = (
        ("rows", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("team", native.Team),
        ("eps", ctypes.c_float),
        ("unused", ctypes.c_int32),
        ("x", native.Rows),
        ("weight", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        *((name, native.Rows) for name in ("y", "dy", "dx")),
        ("dweight", ctypes.c_void_p),
        ("workspace", ctypes.c_void_p),
    )


def _call(x: Tensor, weight: Tensor, scale: Tensor, eps: float) -> tuple[ctypes.CDLL, _Arguments]:
    """The library and the arguments both directions share; the caller keeps the tensors alive."""
    arguments = _Arguments(scale.numel(), x.shape[-1], native.Team.current(), eps)
    arguments.x, arguments.weight, arguments.scale = _rows(x), weight.data_ptr(), scale.data_ptr()
    return _declared(native.load(_SOURCE)), arguments


def _rows(x: Tensor) -> native.Rows:
    """A contiguous (..., D) as (1, R, D)."""
    return native.Rows(x.data_ptr(), 0, x.shape[-1], native.DTYPES[x.dtype], 0)


@functools.cache
def _declared(library: ctypes.CDLL) -> ctypes.CDLL:
    library.norm_workspace.restype = ctypes.c_int64
    for function in (library.norm_workspace, library.norm_forward, library.norm_backward):
        function.argtypes = (ctypes.c_void_p,)
    for function in (library.norm_forward, library.norm_backward):
        function.restype = None
    return library
