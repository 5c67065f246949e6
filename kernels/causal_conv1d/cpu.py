"""The short convolution in C++ on CPU: SIMD over channels, SiLU fused, recompute in backward."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from seqbench.kernels import native

_SOURCE = Path(__file__).parent / "csrc" / "conv.cpp"


def refuse(
    *,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    initial_state: Tensor | None,
) -> str | None:
    """Why this backend cannot take the call, or None."""
    for tensor in (x, weight, bias, initial_state):
        if tensor is not None and tensor.device.type != "cpu":
            return f"a tensor is on {tensor.device}; it runs on cpu"
    if x.dtype not in native.DTYPES:
        return f"x is {x.dtype}; it takes float32, bfloat16 and float16"
    return native.refusal(_SOURCE)


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """y (B, L, D) and the final state (B, K-1, D), both in x's dtype."""
    y = native.empty(x.shape, x.dtype)
    if y.numel():
        call = _Call(x, weight, bias, activation, initial_state)
        call.rows(y=y)
        call.library.conv_forward(ctypes.byref(call.arguments))
    return y, _last(x, weight.shape[1] - 1, initial_state)


def backward(
    dy: Tensor,
    dfinal_state: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    initial_state: Tensor | None,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Gradients of x, weight, bias, initial_state; None if not needed."""
    inputs = (x, weight, bias, initial_state)
    gradients = [
        native.empty(tensor.shape, tensor.dtype) if needed and tensor is not None else None
        for tensor, needed in zip(inputs, needs)
    ]
    dx, dweight, dbias, dinitial = gradients
    if x.numel() == 0:
        for gradient in gradients:
            if gradient is not None:
                gradient.zero_()
        if dinitial is not None and dfinal_state is not None:
            dinitial.copy_(dfinal_state)
        return tuple(gradients)
    call = _Call(x, weight, bias, activation, initial_state)
    call.rows(dy=dy.to(x.dtype), dfinal=dfinal_state, dx=dx, dinitial=dinitial)
    call.pointers(dweight=dweight, dbias=dbias)
    call.pointers(workspace=torch.empty(call.library.conv_workspace(ctypes.byref(call.arguments))))
    call.library.conv_backward(ctypes.byref(call.arguments))
    return tuple(gradients)


def _last(x: Tensor, count: int, initial_state: Tensor | None) -> Tensor:
    """The last `count` inputs, from the initial state or zeros where x has not as many."""
    batch, length, width = x.shape
    last = x.new_empty(batch, count, width)
    kept = max(count - length, 0)
    if kept and initial_state is not None:
        last[:, :kept] = initial_state[:, count - kept :]
    elif kept:
        last[:, :kept] = 0
    last[:, kept:] = x[:, length - (count - kept) :]
    return last


class _Arguments(ctypes.Structure):
    """ConvArgs of conv.cpp."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("batch", "length", "width", "taps")),
        ("team", native.Team),
        ("silu", ctypes.c_int32),
        ("unused", ctypes.c_int32),
        *((name, native.Rows) for name in ("x", "initial")),
        *((name, ctypes.c_void_p) for name in ("weight", "bias")),
        *((name, native.Rows) for name in ("y", "dy", "dfinal", "dx", "dinitial")),
        *((name, ctypes.c_void_p) for name in ("dweight", "dbias", "workspace")),
    )


class _Call:
    """One call's arguments, and the tensors they point into."""

    def __init__(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        activation: str | None,
        initial_state: Tensor | None,
    ) -> None:
        self.library = _declared(native.load(_SOURCE))
        self.tensors: list[Tensor] = []
        self.arguments = _Arguments(*x.shape, weight.shape[1], native.Team.current())
        self.arguments.silu = activation == "silu"
        self.rows(x=x, initial=initial_state)
        self.pointers(weight=weight, bias=bias)

    def rows(self, **tensors: Tensor | None) -> None:
        """Sets fields to tensors of sequences; None leaves a field null."""
        for name, x in tensors.items():
            if x is not None:
                x = native.adjacent(x)
                self.tensors.append(x)
                setattr(self.arguments, name, native.Rows.of(x))

    def pointers(self, **tensors: Tensor | None) -> None:
        """The same for float32 tensors that are read whole."""
        for name, x in tensors.items():
            if x is not None:
                x = x.contiguous()
                self.tensors.append(x)
                setattr(self.arguments, name, x.data_ptr())


@functools.cache
def _declared(library: ctypes.CDLL) -> ctypes.CDLL:
    library.conv_workspace.restype = ctypes.c_int64
    for function in (library.conv_workspace, library.conv_forward, library.conv_backward):
        function.argtypes = (ctypes.c_void_p,)
    for function in (library.conv_forward, library.conv_backward):
        function.restype = None
    return library
