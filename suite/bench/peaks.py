"""What this machine can do at most, measured, and the time that leaves a scan: its floor.

The floor counts, for a state element (b, t, d, n), what no algorithm can leave out that recomputes
states in backward, as every one must that does not store (B, L, D, N):

- forward: one exp2, and four multiply-adds: Δ A', (Δu) B, h = a h + that, y += C h;
- backward: one exp2 more, and thirteen: three to replay h and one to replay C h (the gate's
  gradient needs it), two for the adjoint g = a g + C dy, one each for dC, dB and d(Δu), two for the
  gradient at the exponent, a h g, one each for dA and dΔ.

What a whole channel shares (softplus, silu, the skip) is left out, 1/N of the rest; so are sums
over lanes, checkpoints and parameters. Bytes: each sequence tensor is read or written once a
direction.
On a CPU exp2 is made of the same multiply-adds, so their times add up; on a GPU a unit of its own
computes it beside them, and the floor takes the exp2s alone. Time is the larger of computing and
moving bytes.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from seqbench.kernels import native
from seqbench.suite.bench.entrants import Size

_SOURCE = Path(__file__).parent / "csrc" / "peaks.cpp"
_READ_FLOATS = 2**25  # 128 MiB: beyond the caches
# Repeats of a sample, a few milliseconds: short, so that some run undisturbed on a busy machine.
_EXP2S, _MULTIPLY_ADDS = 4_000, 400_000
_SAMPLES = 25

# (exp2s, multiply-adds) of a state element; (B, L, D) and (B, L, N) tensors read or written.
_FORWARD, _BACKWARD = (1, 4), (1, 13)
_FORWARD_TENSORS = (4, 2)  # u, delta, z, y; B, C
_BACKWARD_TENSORS = (7, 4)  # u, delta, z, dy, du, ddelta, dz; B, C, dB, dC


@dataclass(frozen=True, kw_only=True)
class Peaks:
    """The best of several samples each, as rates a second."""

    instructions: str  # the CPU's instruction set, or the GPU's name
    exp2: float  # float32 numbers
    multiply_add: float | None  # float32 numbers; None: not measured, done beside the exp2s
    bandwidth: float  # bytes


@dataclass(frozen=True, kw_only=True)
class Floor:
    """Seconds that a scan takes at least."""

    forward: float
    backward: float

    @property
    def both(self) -> float:
        """Forward and backward."""
        return self.forward + self.backward


def scan_floor(size: Size, dtype: torch.dtype, peaks: Peaks) -> Floor:
    """The least time of a scan with z, by the counts above."""

    def seconds(operations: tuple[int, int], tensors: tuple[int, int]) -> float:
        steps = size.batch * size.length
        elements = steps * size.width * size.state
        computing = elements * operations[0] / peaks.exp2
        if peaks.multiply_add is not None:
            computing += elements * operations[1] / peaks.multiply_add
        moved = steps * (tensors[0] * size.width + tensors[1] * size.state) * dtype.itemsize
        return max(computing, moved / peaks.bandwidth)

    return Floor(
        forward=seconds(_FORWARD, _FORWARD_TENSORS),
        backward=seconds(_BACKWARD, _BACKWARD_TENSORS),
    )


def measure_peaks(device: torch.device) -> list[Peaks]:
    """This machine's, for every instruction set, the best first; empty without a compiler."""
    if device.type == "cuda":
        from seqbench.suite.bench import peaks_cuda

        return [
            Peaks(
                instructions=torch.cuda.get_device_name(device),
                exp2=peaks_cuda.exp2_rate(device),
                multiply_add=None,
                bandwidth=peaks_cuda.copy_bandwidth(device),
            )
        ]
    if native.refusal(_SOURCE) is not None:
        return []
    return [_of_instruction_set(name) for name in native.instruction_sets()]


def _of_instruction_set(name: str) -> Peaks:
    with native.instruction_set(name):
        library = native.load(_SOURCE)
    team = ctypes.byref(native.Team.current())
    rates = torch.zeros(torch.get_num_threads(), dtype=torch.float64)
    numbers = torch.zeros(_READ_FLOATS)
    source, out = (ctypes.c_void_p(x.data_ptr()) for x in (numbers, rates))
    exp2s, multiply_adds, read = map(ctypes.c_int64, (_EXP2S, _MULTIPLY_ADDS, _READ_FLOATS))

    def best(work: Callable[..., None], *arguments: Any) -> float:
        found = 0.0
        for _ in range(_SAMPLES):
            work(team, *arguments, out)
            found = max(found, rates.sum().item())
        return found

    return Peaks(
        instructions=name,
        exp2=max(best(library.peak_exp2, exp2s, ctypes.c_int64(k)) for k in (2, 4, 8)),
        multiply_add=best(library.peak_multiply_add, multiply_adds),
        bandwidth=best(library.peak_read, source, read),
    )
