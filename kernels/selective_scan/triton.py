"""The selective scan in Triton on NVIDIA and AMD GPUs: states in registers, time walked in order.

Where batch and channels alone fill the GPU a program scans the whole length. Otherwise the length
is cut into chunks: every chunk's final state from zero, the states the chunks start from one after
another, every chunk again from there; backward likewise for the adjoint. No sum depends on the
order programs run in: what is summed over programs is stored and summed after. Into how many chunks
is a measured default, or measured for the shape at hand if `kernels/tuning.py` is told to.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from seqbench.kernels import dispatch, tuning
from seqbench.kernels.selective_scan import triton_kernels as kernels

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MAX_STATE = 256
_EVERY = 8  # steps between the states forward keeps
_INTERPRETED = triton.knobs.runtime.interpret

# Steps unrolled together, by kernel, at most _EVERY: fewer passes through shared memory, against
# registers. backward keeps two state tiles a step.
_STEPS = {"forward": 8, "chunk_states": 8, "chunk_starts": 8, "chunk_adjoints": 8, "backward": 4}
_WARP = 32
_NUMBERS = 8  # of a state tile, a lane
_LANES = 16  # channels side by side in a warp: rows of 32 bytes in bfloat16
_MAX_BLOCK = 32  # channels of a program
# Of a lane on sm_90, at most, for forward of real A and sequences of 16 bits that keeps states and
# that keeps none. Left alone the compiler orders the instructions in a way that takes longer, by a
# twentieth and a sixth.
_REGISTERS, _REGISTERS_ALONE = 192, 160
_STEP_NUMBERS = 512  # of the state a program of `step` advances
_PROGRAMS_TO_FILL = 6  # a multiprocessor, below which the length is cut
_PROGRAMS_WANTED = 16  # a multiprocessor, when it is cut
_WANTED_ALONE = 24  # in its place for forward that keeps no states, with fewer registers
_WANTED_SHORT, _SHORT = 8, 256  # so many if that makes chunks of at most so many steps
_ALSO_TRIED = (32, 64)  # where the scan is tuned
_PARTS, _COLUMNS = 32, 64  # of partial sums added up at once; larger tiles spill on sm_80


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
    device = "cpu" if _INTERPRETED else "cuda"
    for x in given:
        if x is not None and x.device.type != device:
            return f"a tensor is on {x.device}; it runs on {device}"
    for x in given[:-1]:
        if x is not None and x.dtype not in (*_DTYPES, torch.complex64):
            return f"a tensor is {x.dtype}; it takes float32, bfloat16, float16 and complex64"
    if not 1 <= A.shape[1] <= _MAX_STATE:
        return f"the state has {A.shape[1]} numbers; it takes 1 to {_MAX_STATE}"
    return None


def checkpoints_shape(batch: int, length: int, width: int, state: int) -> tuple[int, ...]:
    """The states before every 8 steps, in tiles of whole blocks of channels."""
    return batch, -(-length // _EVERY), state, -(-width // _MAX_BLOCK) * _MAX_BLOCK


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
    wanted: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """y (B, L, D), the final state (B, D, N), and, to `keep`, the checkpoints for backward.

    They are 40 % of the bytes that the kernel moves. `wanted` are the programs a multiprocessor
    into which the length is cut, if it is and is not short.
    """
    batch, length, width = u.shape
    y_BLD = torch.empty(u.shape, dtype=u.dtype, device=u.device)
    final_BDN = A.new_empty(batch, *A.shape)
    # Tiles of whole blocks leave what pads the width unwritten.
    allocate = A.new_zeros if keep and width % _MAX_BLOCK else A.new_empty
    shape = checkpoints_shape(batch, length, width, A.shape[1]) if keep else (0,)
    checkpoints = allocate(shape)
    if y_BLD.numel() == 0:
        final_BDN.zero_() if initial_state is None else final_BDN.copy_(initial_state)
        return y_BLD, final_BDN, checkpoints
    arguments = (u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, reset)
    if wanted is None:
        name, default = ("forward", _PROGRAMS_WANTED) if keep else ("forward alone", _WANTED_ALONE)
        wanted = _wanted(name, default, u, A, lambda wanted: forward(*arguments, keep, wanted))
    call = _Call(*arguments, wanted=wanted)
    with torch.cuda.device_of(u):
        call.run_chunks("chunk_states", edge="initial", REVERSE=False)
        call.run(
            "forward",
            y=y_BLD,
            final=_numbers(final_BDN),
            checkpoints=_numbers(checkpoints) if keep else None,
        )
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
    wanted: int | None = None,
) -> tuple[Tensor | None, ...]:
    """Gradients of u, delta, A, B, C, D, z, delta_bias, initial_state; None if not needed."""
    inputs = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    if u.numel() == 0:
        gradients = [torch.zeros_like(x, memory_format=torch.contiguous_format)
                     if needed and x is not None else None
                     for x, needed in zip(inputs, needs)]  # fmt: skip
        if gradients[8] is not None and dfinal_state is not None:
            gradients[8].copy_(dfinal_state)
        return tuple(gradients)
    arguments = (u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, reset)
    if wanted is None:
        more = (*arguments, checkpoints, needs)
        wanted = _wanted(
            "backward", _PROGRAMS_WANTED, u, A,
            lambda wanted: backward(dy, dfinal_state, *more, wanted),
        )  # fmt: skip
    call = _Call(*arguments, wanted=wanted)
    call.add(dy=dy.to(u.dtype), dfinal=dfinal_state)
    # What a program sums over time, or over its channels, is one partial sum of many.
    over_time = u.shape[0] * call.chunks
    parts = {
        "dA": call.tiles(over_time),
        "dB": (call.blocks, *B.shape) if B.ndim == 3 else call.tiles(over_time),
        "dC": (call.blocks, *C.shape) if C.ndim == 3 else call.tiles(over_time),
        "dD": (over_time, u.shape[2]),
        "dbias": (over_time, u.shape[2]),
    }
    names = ("du", "ddelta", "dA", "dB", "dC", "dD", "dz", "dbias", "dinitial")
    outputs: dict[str, Tensor | None] = {}
    written: dict[str, Tensor | None] = {}  # by the kernel `backward`
    for name, x, needed in zip(names, inputs, needs):
        if x is None or not needed:
            outputs[name] = written[name] = None
            continue
        outputs[name] = written[name] = torch.empty(x.shape, dtype=x.dtype, device=u.device)
        if name in parts:
            dtype = A.dtype if x.ndim == 3 else torch.float32
            written[name] = torch.empty(parts[name], dtype=dtype, device=u.device)
    with torch.cuda.device_of(u):
        call.run_chunks("chunk_adjoints", edge="dfinal", REVERSE=True)
        call.run(
            "backward",
            checkpoints=_numbers(checkpoints),
            **{name: _numbers(x) for name, x in written.items()},
        )
        call.sum_parts({name: (written[name], outputs[name]) for name in parts})
    return tuple(outputs.values())


def refuse_step(*, state: Tensor, **inputs: Tensor | None) -> str | None:
    """Why `step` cannot take the call, or None."""
    device = "cpu" if _INTERPRETED else "cuda"
    for x in (state, *inputs.values()):
        if x is not None and x.device.type != device:
            return f"a tensor is on {x.device}; it runs on {device}"
    if state.dtype not in (torch.float32, torch.complex64):
        return f"the state is {state.dtype}; it takes float32 and complex64"
    return dispatch.refuse_untraced((state, *inputs.values()))


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
    """y (B, D) in u's dtype and the next state; B and C broadcast to (B, D, N)."""
    batch, width, n = state.shape
    after, y = torch.empty_like(state), torch.empty(u.shape, dtype=u.dtype, device=u.device)
    rows = triton.next_power_of_2(n)
    values: dict[str, Any] = {
        "before": _numbers(state.contiguous()),
        "A": _numbers(A.to(state.dtype).contiguous()),
        "after": _numbers(after),
        "y": y,
        "width": width,
        "STATE": n,
        "ROWS": rows,
        "BLOCK": max(1, _STEP_NUMBERS // rows),
        "SOFTPLUS": delta_softplus,
        "COMPLEX": state.is_complex(),
    }
    for name, x in (("u", u), ("delta", delta), ("z", z)):
        values[name] = x if x is None or x.stride(-1) == 1 else x.contiguous()
        values[f"{name}_b"] = 0 if x is None else values[name].stride(0)
    for name, x in (("D", D), ("bias", delta_bias)):
        values[name] = None if x is None else x.contiguous()
    for name, x in (("B", B), ("C", C)):
        selective = x.ndim == 3 and x.shape[:2] == (batch, 1)
        x = _numbers(x if x.stride(-1) == 1 else x.contiguous())
        values[name] = x
        values[f"{name}_b"] = x.stride(0) if selective else 0
        values[f"{name}_d"] = 0 if selective else x.stride(-3 if state.is_complex() else -2)
    programs = batch * triton.cdiv(width, values["BLOCK"])
    kernel: Any = kernels.step
    with torch.cuda.device_of(state):
        kernel[(programs,)](**{name: values[name] for name in kernel.arg_names}, num_warps=2)
    return y, after


class _Plan(NamedTuple):
    """How a call is divided into programs."""

    groups: int  # of channels of a program
    lanes: int  # channels of a group
    rows: int  # N, up to a power of 2
    chunk: int  # steps of a program
    chunks: int

    @property
    def block(self) -> int:
        """Channels of a program."""
        return self.groups * self.lanes


class _Call:
    """A call's tensors as kernels take them, and how they are divided."""

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
        *,
        wanted: int,
    ) -> None:
        self.batch, self.length, self.width = u.shape
        self.A, self.complex = A, A.is_complex()
        self.sm_90 = _is_sm_90(A)
        self.overlap = _overlaps(A)
        self.launched = False
        self.narrow = self.sm_90 and u.itemsize == 2 and not self.complex
        self.plan = plan(u, A, wanted)
        self.chunks = self.plan.chunks
        self.blocks = triton.cdiv(self.width, self.plan.block)
        self.tensors: dict[str, Tensor | None] = {}
        self.strides: dict[str, int] = {}
        self.add(u=u, delta=delta, A=A, B=B, C=C, D=D, z=z)
        self.add(bias=delta_bias, initial=initial_state)
        self.add(reset=None if reset is None else reset.view(torch.uint8))
        self.tensors["starts"] = None
        self.options = {
            "SOFTPLUS": delta_softplus,
            "COMPLEX": self.complex,
            "SELECTIVE_B": B.ndim == 3,
            "SELECTIVE_C": C.ndim == 3,
        }

    def add(self, **tensors: Tensor | None) -> None:
        """Sequences keep their strides but for the last, states become planes (N, D)."""
        for name, x in tensors.items():
            batch_stride = time_stride = 0
            if x is not None and (name in ("u", "delta", "z", "dy", "B", "C") and x.ndim == 3):
                x = _numbers(x if x.stride(-1) == 1 else x.contiguous())
                batch_stride, time_stride = x.stride()[:2]
            elif x is not None and name != "reset" and x.ndim > 1:
                x = _planes(x)
            elif x is not None:
                x = x.contiguous()
            self.tensors[name] = x
            self.strides |= {f"{name}_b": batch_stride, f"{name}_l": time_stride}

    def tiles(self, states: int) -> tuple[int, ...]:
        """The shape of `states` states as kernels store them."""
        planes = 2 if self.complex else 1
        return states, self.blocks, planes, self.A.shape[1], self.plan.block

    def run_chunks(self, name: str, *, edge: str, REVERSE: bool) -> None:
        """Finds what each chunk starts from, if there are several; `name` has them end, from zero.

        Of the adjoint likewise: with REVERSE a chunk starts at its last step.
        """
        if self.chunks == 1:
            return
        number = self.batch * self.chunks
        options: Any = {"dtype": torch.float32, "device": self.A.device}
        ends = torch.empty(self.tiles(number), **options)
        # Beside a state the sum of Δ and whether it was reset.
        sums = torch.empty(number, 2, self.width, **options)
        self.run(name, ends=ends, sums=sums)
        more = {"edge": self.tensors[edge], "REVERSE": REVERSE}
        self.run("chunk_starts", ends=ends, sums=sums, **more)
        self.tensors["starts"] = ends  # as they are now

    def run(self, name: str, **more: Any) -> None:
        """Launches the kernel `name`, with what its parameters ask for by name."""
        values = {
            **self.tensors,
            **self.strides,
            **self.options,
            "length": self.length,
            "width": self.width,
            "chunk": self.plan.chunk,
            "chunks": self.chunks,
            "STATE": self.A.shape[1],
            "ROWS": self.plan.rows,
            "GROUPS": self.plan.groups,
            "LANES": self.plan.lanes,
            "EVERY": _EVERY,
            "STEPS": _STEPS[name],
            "AHEAD": self.sm_90 and 2 * _STEPS[name] == _EVERY and self.length >= _STEPS[name],
            "OVERLAP": self.overlap,
            **more,
        }
        options: dict[str, Any] = {"num_warps": 1}
        if name == "forward" and self.narrow:
            options["maxnreg"] = _REGISTERS_ALONE if more["checkpoints"] is None else _REGISTERS
        programs = self.batch * self.blocks * (1 if name == "chunk_starts" else self.chunks)
        self.launch(name, programs, values, options)

    def launch(
        self, name: str, programs: int, values: dict[str, Any], options: dict[str, Any]
    ) -> None:
        """Starts a kernel, all but a call's first while the one before still runs if it can."""
        kernel = getattr(kernels, name)
        if self.overlap and self.launched:
            options["launch_pdl"] = True
        self.launched = True
        kernel[(programs,)](
            **{parameter: values[parameter] for parameter in kernel.arg_names}, **options
        )

    def sum_parts(self, sums: dict[str, tuple[Tensor | None, Tensor | None]]) -> None:
        """Adds up partial sums, by name (parts, ...), into the gradients beside them."""
        values: dict[str, Any] = {
            **self.options,
            "width": self.width,
            "STATE": self.A.shape[1],
            "BLOCK": self.plan.block,
            "PARTS": _PARTS,
            "COLUMNS": _COLUMNS,
            "OVERLAP": self.overlap,
        }
        programs = 0
        for name, (parts, total) in sums.items():
            short = name.removeprefix("d")
            values |= {name: _numbers(parts), f"sum_{short}": _numbers(total)}
            count = 0 if parts is None else len(parts)
            size = 0 if parts is None else values[name].numel() // count
            values |= {f"{short}_parts": count, f"{short}_size": size}
            programs += triton.cdiv(size, _COLUMNS)
        if programs:
            self.launch("sum_parts", programs, values, {"num_warps": 4})


def plan(u: Tensor, A: Tensor, wanted: int) -> _Plan:
    """A state tile of _NUMBERS a lane, and chunks for as many programs as fill the GPU.

    `wanted` of them a multiprocessor; a short length makes fewer.
    """
    batch, length, width = u.shape
    multiprocessors = _multiprocessors(u)
    rows = triton.next_power_of_2(A.shape[1])
    block = _NUMBERS * _WARP // rows // (1 + A.is_complex())
    block = max(1, min(block, _MAX_BLOCK, triton.next_power_of_2(width)))
    lanes = min(block, max(_LANES, _WARP // rows))
    programs = batch * triton.cdiv(width, block)
    parts = 1
    if programs < _PROGRAMS_TO_FILL * multiprocessors:
        few = _WANTED_SHORT * multiprocessors // programs
        # No more than fill whole rounds: a few would run alone at the end.
        parts = few if length <= few * _SHORT else wanted * multiprocessors // programs
    chunk = triton.cdiv(triton.cdiv(length, parts), _EVERY) * _EVERY
    return _Plan(block // lanes, lanes, rows, chunk, triton.cdiv(length, chunk))


def _wanted(name: str, default: int, u: Tensor, A: Tensor, run: Callable[[int], object]) -> int:
    """Programs a multiprocessor when the length is cut: the default, or what was the fastest."""
    if not tuning.enabled():
        return default
    candidates = (default, *_ALSO_TRIED)
    if len({plan(u, A, wanted).chunks for wanted in candidates}) == 1:
        return default
    batch, length, width = u.shape
    device = torch.cuda.get_device_name(u.device) if u.is_cuda else u.device.type
    case = (
        f"selective_scan {name}, {device}: {batch} x {triton.next_power_of_2(length)} x {width} x"
        f" {A.shape[1]}, {u.dtype}, {A.dtype}, version {_version()}: programs a multiprocessor"
    )
    with torch.cuda.device_of(u):
        return tuning.choose(case, candidates, lambda wanted: _seconds(run, wanted))


def _seconds(run: Callable[[int], object], wanted: int) -> float:
    """The median of a few calls, after one that compiles."""
    seconds = []
    for _ in range(6):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run(wanted)
        end.record()
        end.synchronize()
        seconds.append(start.elapsed_time(end) / 1e3)
    return sorted(seconds[1:])[2]


@functools.cache
def _version() -> str:
    """Of the kernels and of Triton."""
    source = b"".join(Path(str(file)).read_bytes() for file in (__file__, kernels.__file__))
    return hashlib.sha256(source + triton.__version__.encode()).hexdigest()[:12]


def _is_sm_90(x: Tensor) -> bool:
    """Of what is tuned to its registers some spills on sm_80 and sm_100."""
    return x.is_cuda and _capability(x.device) == (9, 0)


def _overlaps(x: Tensor) -> bool:
    """Whether a kernel can start before the one before it ends: programmatic dependent launch."""
    return x.is_cuda and torch.version.hip is None and _capability(x.device) >= (9, 0)


_capability = functools.cache(torch.cuda.get_device_capability)


def _multiprocessors(x: Tensor) -> int:
    return _count_multiprocessors(x.device) if x.is_cuda else 1


@functools.cache
def _count_multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _planes(x: Tensor) -> Tensor:
    """(..., D, N) as (..., N, D), or (..., 2, N, D) if complex."""
    return (torch.stack([x.real, x.imag], -3) if x.is_complex() else x).mT.contiguous()


def _numbers(x: Tensor | None) -> Any:
    """Complex numbers as pairs of floats."""
    return torch.view_as_real(x) if x is not None and x.is_complex() else x
