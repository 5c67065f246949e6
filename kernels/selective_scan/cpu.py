"""The selective scan in C++ on CPU: SIMD over channels, checkpoints, recompute in backward."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from seqbench.kernels import dispatch, native

_FOLDER = Path(__file__).parent / "csrc"
_REAL = _FOLDER / "scan.cpp"  # real A in float32, inputs of any precision below
_GENERAL = _FOLDER / "scan_general.cpp"  # complex A, float64
_CHUNK = 32  # steps between checkpoints: CHUNK in arguments.h
_MAX_STATE = 256
_ROUNDED = (torch.bfloat16, torch.float16)  # inputs in less than the state's precision
_INPUTS = frozenset((*_ROUNDED, torch.float32, torch.float64))


def refuse(
    *,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    reset: Tensor | None,
) -> str | None:
    """Why this backend cannot take the call, or None."""
    given = (u, delta, A, B, C, D, z, delta_bias, initial_state, reset)
    for x in given:
        if x is not None and not x.is_cpu:
            return f"a tensor is on {x.device}; it runs on cpu"
    for x in given[:-1]:
        if x is not None and x.dtype not in _INPUTS and not x.is_complex():
            return f"a tensor is {x.dtype}; it takes float64, float32, bfloat16 and float16"
    if not 1 <= A.shape[1] <= _MAX_STATE:
        return f"the state has {A.shape[1]} numbers; it takes 1 to {_MAX_STATE}"
    return native.refusal(_GENERAL if _is_general(A) else _REAL)


def checkpoints_shape(batch: int, length: int, width: int, state: int) -> tuple[int, ...]:
    """The state before every chunk of steps, in blocks of 16 channels."""
    return batch, -(-length // _CHUNK), -(-width // 16), state, 16


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
    """y (B, L, D), the final state (B, D, N), and, to `keep`, the checkpoints for backward."""
    batch, length, width = u.shape
    y_BLD = native.empty(u.shape, u.dtype)
    final_BDN = native.empty((batch, *A.shape), A.dtype)
    shape = checkpoints_shape(batch, length, width, A.shape[1]) if keep else (0,)
    checkpoints = native.empty(shape, A.dtype)
    if y_BLD.numel() == 0:
        if initial_state is None:
            return y_BLD, final_BDN.zero_(), checkpoints
        return y_BLD, final_BDN.copy_(initial_state), checkpoints
    call = _Call(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, reset)
    call.point(checkpoints=checkpoints if keep else None, final_state=final_BDN)
    call.receive(y=y_BLD)
    call.run("forward")
    return y_BLD, final_BDN, checkpoints


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
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Gradients of u, delta, A, B, C, D, z, delta_bias, initial_state; None if not needed."""
    inputs = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    if u.numel() == 0:
        gradients = [torch.zeros_like(x) if n and x is not None else None
                     for x, n in zip(inputs, needs)]  # fmt: skip
        if gradients[8] is not None and dfinal_state is not None:
            gradients[8].copy_(dfinal_state)
        return tuple(gradients)
    gradients = [
        native.empty(x.shape, x.dtype) if needed and x is not None else None
        for x, needed in zip(inputs, needs)
    ]
    du, ddelta, dA, dB, dC, dD, dz, dbias, dinitial = gradients
    call = _Call(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, reset)
    call.point(checkpoints=checkpoints, dy=dy.to(u.dtype), dfinal=dfinal_state)
    call.point(dA=dA, dD=dD, dbias=dbias, dinitial=dinitial)
    call.receive(du=du, ddelta=ddelta, dz=dz)
    call.receive(**{"dB" if B.ndim == 3 else "dconstant_B": dB})
    call.receive(**{"dC" if C.ndim == 3 else "dconstant_C": dC})
    call.run("backward")
    return tuple(gradients)


def refuse_step(*, state: Tensor, **inputs: Tensor | None) -> str | None:
    """Why `step` cannot take the call, or None."""
    if any(x is not None and x.device.type != "cpu" for x in (state, *inputs.values())):
        return "a tensor is not on the CPU"
    if state.dtype != torch.float32:
        return f"the state is {state.dtype}; it takes float32"
    return dispatch.refuse_untraced((state, *inputs.values())) or native.refusal(_REAL)


def step(
    state: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> tuple[Tensor, Tensor]:
    """y (B, D) in float32 and the next state; B and C broadcast to (B, D, N)."""
    batch, width, n = state.shape
    after, y = torch.empty(state.shape), torch.empty(batch, width)
    arguments = _StepArguments(batch, width, n, native.Team.current(), delta_softplus)
    given = dict(before=state, u=u, delta=delta, z=z, A=A, B=B, C=C, D=D, bias=delta_bias)
    kept = []
    for name, x in (*given.items(), ("after", after), ("y", y)):
        if x is None:
            continue
        if x.dtype != torch.float32 or not x.is_contiguous():
            x = x.float().contiguous()
        kept.append(x)
        setattr(arguments, name, x.data_ptr())
        if name in "BC":
            selective = x.ndim == 3 and x.shape[0] == batch and x.shape[1] == 1
            setattr(arguments, f"{name}_strides", (n, 0) if selective else (0, n))
    _library(_REAL).scan_step(ctypes.byref(arguments))
    return y, after


_ROWS = frozenset(("y", "dy", "du", "ddelta", "dz", "dB", "dC"))


class _Arguments(ctypes.Structure):
    """Arguments of arguments.h."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("batch", "length", "width", "state")),
        ("team", native.Team),
        ("softplus", ctypes.c_int32),
        ("complex", ctypes.c_int32),
        *((name, native.Rows) for name in ("u", "delta", "z", "B", "C")),
        *((name, ctypes.c_void_p) for name in ("A", "constant_B", "constant_C", "D", "bias")),
        *((name, ctypes.c_void_p) for name in ("initial", "reset", "checkpoints", "workspace")),
        ("y", native.Rows),
        ("final_state", ctypes.c_void_p),
        *((name, native.Rows) for name in ("dy", "du", "ddelta", "dz", "dB", "dC")),
        *((name, ctypes.c_void_p) for name in ("dfinal", "dA", "dconstant_B", "dconstant_C")),
        *((name, ctypes.c_void_p) for name in ("dD", "dbias", "dinitial")),
    )


class _StepArguments(ctypes.Structure):
    """StepArgs of scan.cpp."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("batch", "width", "state")),
        ("team", native.Team),
        ("softplus", ctypes.c_int64),
        *((name, ctypes.c_int64 * 2) for name in ("B_strides", "C_strides")),
        *((name, ctypes.c_void_p) for name in ("before", "u", "delta", "z", "A", "B", "C")),
        *((name, ctypes.c_void_p) for name in ("D", "bias", "after", "y")),
    )


class _Call:
    """One call's arguments, and the tensors they point into."""

    def __init__(
        self,
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
    ) -> None:
        self.general = _is_general(A)
        self.precision = A.real.dtype if A.is_complex() else A.dtype
        self.tensors: list[Tensor] = []
        self.received: list[tuple[Tensor, Tensor]] = []
        batch, length, width = u.shape
        B_DN, B_BLN = (None, B) if B.ndim == 3 else (B, None)
        C_DN, C_BLN = (None, C) if C.ndim == 3 else (C, None)
        rows, pointer = self.rows, self.pointer
        # In the order of the fields: a small model's call is mostly what Python does around it.
        self.arguments = _Arguments(
            *(batch, length, width, A.shape[1], native.Team.current()),
            *(delta_softplus, A.is_complex()),
            *(rows(u), rows(delta), rows(z), rows(B_BLN), rows(C_BLN)),
            *(pointer(A), pointer(B_DN), pointer(C_DN), pointer(D), pointer(delta_bias)),
            *(pointer(initial_state), pointer(reset)),
        )

    def rows(self, x_BLD: Tensor | None) -> native.Rows:
        """A field for a sequence."""
        if x_BLD is None:
            return native.Rows()
        x_BLD = native.adjacent(self._exact(x_BLD))
        self.tensors.append(x_BLD)
        return _unconverted_rows(x_BLD) if self.general else native.Rows.of(x_BLD)

    def pointer(self, x: Tensor | None) -> int | None:
        """A field for a tensor as it lies in memory."""
        if x is None:
            return None
        x = self._exact(x).contiguous()
        self.tensors.append(x)
        return x.data_ptr()

    def _exact(self, x: Tensor) -> Tensor:
        if not self.general:
            return x
        x = x.resolve_conj().resolve_neg()
        return x.to(self.precision) if x.dtype in _ROUNDED else x

    def point(self, **tensors: Tensor | None) -> None:
        """Sets fields to tensors; None leaves a field null."""
        for name, x in tensors.items():
            if x is not None:
                setattr(self.arguments, name, self.rows(x) if name in _ROWS else self.pointer(x))

    def receive(self, **results: Tensor | None) -> None:
        """Sets fields to tensors that `run` fills, through the state's precision if that is all
        the library writes."""
        for name, x in results.items():
            if x is not None and self.general and x.dtype in _ROUNDED:
                exact = native.empty(tuple(x.shape), self.precision)
                self.received.append((x, exact))
                x = exact
            self.point(**{name: x})

    def run(self, direction: str) -> None:
        library = _library(_GENERAL if self.general else _REAL)
        pointer = ctypes.byref(self.arguments)
        general = (self.precision == torch.float64,) if self.general else ()
        size = library.scan_workspace(pointer, direction == "backward", *general)
        self.point(workspace=native.empty((size,), self.precision))
        run = library.scan_backward if direction == "backward" else library.scan_forward
        run(pointer, *general)
        for x, exact in self.received:
            x.copy_(exact)


def _is_general(A: Tensor) -> bool:
    return A.dtype != torch.float32


def _unconverted_rows(x_BLD: Tensor) -> native.Rows:
    return native.Rows(x_BLD.data_ptr(), x_BLD.stride(0), x_BLD.stride(1), 0, 0)


def _library(source: Path) -> ctypes.CDLL:
    return _declared(native.load(source), source is _GENERAL)


@functools.cache
def _declared(library: ctypes.CDLL, general: bool) -> ctypes.CDLL:
    precision = (ctypes.c_int32,) if general else ()
    library.scan_workspace.restype = ctypes.c_int64
    library.scan_workspace.argtypes = (ctypes.c_void_p, ctypes.c_int32, *precision)
    for function in (library.scan_forward, library.scan_backward):
        function.argtypes = (ctypes.c_void_p, *precision)
        function.restype = None
    if not general:
        library.scan_step.argtypes = (ctypes.c_void_p,)
        library.scan_step.restype = None
    return library
