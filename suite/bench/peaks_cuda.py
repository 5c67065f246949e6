"""What a GPU can do at most: exp2 a second, by a small Triton kernel, and bytes copied a second."""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl

_BLOCK, _WARPS = 1024, 4  # eight independent numbers a thread
_REPEATS = 4096
_PROGRAMS = 32  # for each multiprocessor
_COPIED = 2**30
_SAMPLES = 10


@triton.jit
def _exp2_kernel(out, repeats, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = -at.to(tl.float32) / 1e9
    for _ in range(repeats):
        x = tl.exp2(x)
    tl.store(out + at, x)


def exp2_rate(device: torch.device) -> float:
    """float32 exponentials a second, everything in registers."""
    programs = _PROGRAMS * torch.cuda.get_device_properties(device).multi_processor_count
    out = torch.empty(programs * _BLOCK, device=device)
    seconds = _fastest(
        lambda: _exp2_kernel[(programs,)](out, _REPEATS, BLOCK=_BLOCK, num_warps=_WARPS)
    )
    return programs * _BLOCK * _REPEATS / seconds


def copy_bandwidth(device: torch.device) -> float:
    """Bytes read and written a second by a copy of 1 GiB."""
    source = torch.empty(_COPIED, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * _COPIED / _fastest(lambda: target.copy_(source))


def _fastest(run: Callable[[], object]) -> float:
    run()
    taken = []
    for _ in range(_SAMPLES):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        taken.append(start.elapsed_time(end) / 1e3)
    return min(taken)
