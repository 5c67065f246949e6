"""How the benches measure: interleaved medians, and peak memory beside inputs and outputs."""

from __future__ import annotations

import ctypes
import gc
import math
import multiprocessing
import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from seqbench.suite.environment import peak_memory, reset_peak_memory

Key = TypeVar("Key", bound=Hashable)

_SAMPLE_SECONDS = 0.02  # a sample repeats the work until it has taken this long


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds of one run: the median over the samples, the fastest and the slowest of them."""

    median: float
    fastest: float
    slowest: float
    samples: int


def interleave(
    work: Mapping[Key, Callable[[], object]],
    device: torch.device,
    *,
    rounds: int = 9,
    seconds: float = 3.0,
) -> dict[Key, Timing]:
    """Times everything in turn, round after round, so that a drift of the machine hits all alike.

    Each is run before, unmeasured. One that has used up its `seconds`, that run included, sits the
    rest out once it has three samples, or one if a single run takes that long.
    """
    repeats: dict[Key, int] = {}
    spent: dict[Key, float] = {}
    for name, run in work.items():
        spent[name] = _time(run, 1, device)
        again = spent[name] if spent[name] > seconds / 3 else _time(run, 1, device)
        repeats[name] = max(1, math.ceil(_SAMPLE_SECONDS / max(again, 1e-9)))
    samples: dict[Key, list[float]] = {name: [] for name in work}
    for _ in range(rounds):
        for name, run in work.items():
            enough = 1 if samples[name] and samples[name][0] >= seconds else 3
            if len(samples[name]) >= enough and spent[name] >= seconds:
                continue
            samples[name].append(_time(run, repeats[name], device))
            spent[name] += samples[name][-1] * repeats[name]
    return {
        name: Timing(
            median=statistics.median(taken),
            fastest=min(taken),
            slowest=max(taken),
            samples=len(taken),
        )
        for name, taken in samples.items()
    }


def peak_extra_memory(
    job: Callable[..., tuple[Callable[[], Sequence[Tensor]], torch.device]],
    arguments: Sequence[object],
    threads: int,
) -> int:
    """Peak bytes that a run needs beside the tensors it is given and those it returns.

    `job(*arguments)` makes the inputs and returns the run and its device, and must be picklable:
    it goes to a process of its own, where the run's resident memory (or, on a GPU, the allocator's)
    is read at its peak, less what stood before and less the outputs.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as process:
        return process.submit(_measure, job, arguments, threads).result()


def available_memory() -> int | None:
    """Bytes this machine could still give a process; None where it does not say (not Linux)."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(x.split()[1]) * 1024 for x in lines if x.startswith("MemAvailable")), None)


def _measure(
    job: Callable[..., tuple[Callable[[], Sequence[Tensor]], torch.device]],
    arguments: Sequence[object],
    threads: int,
) -> int:
    torch.set_num_threads(threads)
    run, device = job(*arguments)
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)  # else what glibc keeps of freed blocks would serve the run unseen
    reset_peak_memory(device)
    before = peak_memory(device)
    outputs = run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    kept = sum(x.numel() * x.element_size() for x in outputs)
    return max(0, peak_memory(device) - before - kept)


def _time(run: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Seconds of one run, over `repeats` in a row."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    for _ in range(repeats):
        run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - began) / repeats
