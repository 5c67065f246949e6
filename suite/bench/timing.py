"""How the benches measure: interleaved medians, and peak memory beside inputs and outputs.

On a GPU a run that takes little time is captured as a CUDA graph where it can be, whosever it is:
else its time would be that of launching it from Python.
"""

from __future__ import annotations

import ctypes
import gc
import math
import multiprocessing
import statistics
import time
from collections.abc import Callable, Container, Hashable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from seqbench.suite.bench.result import out_of_memory
from seqbench.suite.environment import peak_memory, reset_peak_memory

Key = TypeVar("Key", bound=Hashable)

_SAMPLE_SECONDS = 0.02  # a sample repeats the work until it has taken this long
CAPTURED_BELOW = 0.02  # seconds; longer runs hide their launches


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds of one run: the median over the samples, the fastest and the slowest of them."""

    median: float
    fastest: float
    slowest: float
    samples: int
    captured: bool = False  # replayed as a CUDA graph


def interleave(
    work: Mapping[Key, Callable[[], object]],
    device: torch.device,
    *,
    rounds: int = 9,
    seconds: float = 3.0,
    launched: Container[Key] = (),
    failures: dict[Key, str] | None = None,
) -> dict[Key, Timing]:
    """Times everything in turn, round after round, so that a drift of the machine hits all alike.

    Each is run before, unmeasured. One that has used up its `seconds`, that run included, sits the
    rest out once it has three samples, or one if a single run takes that long; one that takes five
    times that runs once in all. What is `launched` is never captured. What fails is missing from
    the answer, with its reason in `failures`; without that dict only running out of memory may.
    """
    repeats: dict[Key, int] = {}
    spent: dict[Key, float] = {}
    captured: set[Key] = set()
    able = dict(work)
    for name, run in work.items():
        try:
            spent[name] = _time(run, 1, device)
            again = spent[name] if spent[name] > seconds / 3 else _time(run, 1, device)
        except (RuntimeError, MemoryError) as error:
            _note(name, error, failures)
            del able[name]
            free(device)
            continue
        if device.type == "cuda" and again < CAPTURED_BELOW and name not in launched:
            replay = capture(run)
            if replay is not None:
                able[name], again = replay, _time(replay, 1, device)
                captured.add(name)
        repeats[name] = max(1, math.ceil(_SAMPLE_SECONDS / max(again, 1e-9)))
    # Where a run takes this long its first is as good as any.
    samples: dict[Key, list[float]] = {
        name: [spent[name]] if spent[name] > 5 * seconds else [] for name in able
    }
    for _ in range(rounds):
        for name, run in able.items():
            enough = 1 if samples[name] and samples[name][0] >= seconds else 3
            if (len(samples[name]) >= enough and spent[name] >= seconds) or spent[name] == math.inf:
                continue
            try:
                samples[name].append(_time(run, repeats[name], device))
            except (RuntimeError, MemoryError) as error:
                _note(name, error, failures)
                spent[name], samples[name] = math.inf, []
                free(device)
                continue
            spent[name] += samples[name][-1] * repeats[name]
    return {
        name: Timing(
            median=statistics.median(taken),
            fastest=min(taken),
            slowest=max(taken),
            samples=len(taken),
            captured=name in captured,
        )
        for name, taken in samples.items()
        if taken
    }


def reason(error: BaseException) -> str:
    """Why something did not run, in one line."""
    if out_of_memory(error):
        return "out of memory"
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return f"fails: {lines[0][:160]}"


def free(device: torch.device) -> None:
    """Gives back what the allocator keeps."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def peak_extra_memory(
    job: Callable[..., tuple[Callable[[], Sequence[Tensor]], torch.device]],
    arguments: Sequence[object],
    threads: int,
) -> int:
    """Peak bytes that a run needs beside the tensors it is given and those it returns.

    `job(*arguments)` makes the inputs and returns the run and its device, and must be picklable:
    it goes to a process of its own, where the run's resident memory is read at its peak, less what
    stood before and less the outputs. On a GPU the allocator is asked, in this process.
    """
    if arguments and str(arguments[-1]).startswith("cuda"):
        return _measure(job, arguments, threads)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as process:
        return process.submit(_measure, job, arguments, threads).result()


@dataclass(frozen=True, kw_only=True)
class Peak:
    """Bytes at the peak of a run in a process of its own, and the run's seconds."""

    run: int  # beyond what stood before
    process: int  # all of it, the libraries too; on a GPU the allocator's alone
    seconds: float


def peak_of_process(
    job: Callable[..., Callable[[], object]], arguments: Sequence[object], threads: int, device: str
) -> Peak:
    """Of `job(*arguments)()`, which makes its tensors itself; `job` must be picklable and warm up.

    Raises RuntimeError or MemoryError as the run does.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as process:
        return process.submit(_peak, job, arguments, threads, torch.device(device)).result()


def available_memory() -> int | None:
    """Bytes this machine could still give a process; None where it does not say (not Linux)."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(x.split()[1]) * 1024 for x in lines if x.startswith("MemAvailable")), None)


def _peak(
    job: Callable[..., Callable[[], object]],
    arguments: Sequence[object],
    threads: int,
    device: torch.device,
) -> Peak:
    torch.set_num_threads(threads)
    run = job(*arguments)
    before = _start_peak(device)
    seconds = _time(run, 1, device)
    process = peak_memory(device)
    return Peak(run=max(0, process - before), process=process, seconds=seconds)


def _start_peak(device: torch.device) -> int:
    """Starts a measurement of peak memory: what stands now."""
    free(device)
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)  # else what glibc keeps of freed blocks would serve the run unseen
    reset_peak_memory(device)
    return peak_memory(device)


def _measure(
    job: Callable[..., tuple[Callable[[], Sequence[Tensor]], torch.device]],
    arguments: Sequence[object],
    threads: int,
) -> int:
    torch.set_num_threads(threads)
    run, device = job(*arguments)
    before = _start_peak(device)
    outputs = run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    kept = sum(x.numel() * x.element_size() for x in outputs)
    return max(0, peak_memory(device) - before - kept)


def _note(name: Key, error: BaseException, failures: dict[Key, str] | None) -> None:
    if failures is not None:
        failures[name] = reason(error)
    elif not out_of_memory(error):
        raise error


def _time(run: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Seconds of one run, over `repeats` in a row."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record()
        for _ in range(repeats):
            run()
        end.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(end) / 1e3 / repeats
    began = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - began) / repeats


def capture(run: Callable[[], object]) -> Callable[[], object] | None:
    """The run as a CUDA graph, or None where something in it cannot be captured."""
    graph = torch.cuda.CUDAGraph()
    try:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # what is made on a stream's first use must be there before
            run()
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(graph):
            run()
        graph.replay()
        torch.cuda.synchronize()
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    return graph.replay
