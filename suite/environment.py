"""Where a cell ran: versions, device, threads, commit; in its record, not in its identity."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import re
import subprocess
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

ARCHIVAL = ".git_archival.txt"
PACKAGES = (
    "seqbench",
    "torch",
    "lightning",
    "triton",
    "numpy",
    "torchaudio",
    "pyfaidx",
    "tokenizers",
)


def environment(device: torch.device, backends: dict[str, str]) -> dict[str, Any]:
    """The environment as plain data; `backends` are the kernels that really ran."""
    from seqbench.kernels import tuning

    return {
        "commit": commit()[0],
        "dirty": commit()[1],
        "python": platform.python_version(),
        "versions": {p: v for p in PACKAGES if (v := _version(p))},
        "platform": platform.platform(terse=True),
        "processor": processor(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "backends": backends,
        **({"tuned": tuned} if (tuned := tuning.chosen()) else {}),
        # What running the cell again on this machine gives.
        "determinism": "bitwise, at the same number of threads"
        if device.type == "cpu"
        else "not guaranteed: cuBLAS and atomics may reorder sums",
    }


@lru_cache(maxsize=1)
def commit() -> tuple[str | None, bool | None]:
    """The checkout's commit and whether it has changes.

    Of a copy without git, as a release's archive is, the commit it was archived from, its changes
    unknown (None); of an installed copy, None and None.
    """
    folder = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        if not git("ls-files", str(Path(__file__).name)):
            return None, None  # an installed copy that lies inside somebody else's checkout
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.CalledProcessError):
        return archived_commit(folder.parent), None


def archived_commit(folder: Path) -> str | None:
    """The commit that `git archive` wrote into .git_archival.txt; None in a checkout."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        found = re.search(r"^node: ([0-9a-f]{40})$", (folder / ARCHIVAL).read_text(), re.M)
        return found[1] if found else None
    return None


@lru_cache(maxsize=1)
def processor() -> str:
    """The CPU's model name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(
            line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")
        )
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def reset_peak_memory(device: torch.device) -> None:
    """Starts a new measurement of peak memory."""
    if device.type == "cuda":
        torch.cuda.init()  # before it the statistics do not exist
        torch.cuda.reset_peak_memory_stats(device)
    with contextlib.suppress(OSError):  # not Linux
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM restarts from now


def peak_memory(device: torch.device) -> int:
    """Peak bytes since the reset: of the device's allocator, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    import resource

    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def resident_bytes(pid: int) -> int:
    """Bytes of memory that a process and those it started hold; 0 for one that is gone."""
    total = 0
    proc = Path("/proc") / str(pid)
    with contextlib.suppress(OSError):
        total = int((proc / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        for thread in (proc / "task").iterdir():
            children = (thread / "children").read_text().split()
            total += sum(resident_bytes(int(child)) for child in children)
    return total


def gpus() -> tuple[str, ...]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    count = torch.cuda.device_count()
    named = [g.strip() for g in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if g.strip()]
    return tuple(named[:count]) if named else tuple(str(i) for i in range(count))


def keep_freed_memory() -> None:
    """Makes the C library keep large blocks that are freed, for the next step to take again.

    Left alone, glibc hands them back to the system and takes them anew, page by page, at every
    step: on a CPU that can cost a third of a training step. Without glibc it does nothing.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1
    # Older versions take no threshold above 32 MiB.
    if not mallopt(MMAP_THRESHOLD, 1 << 30):
        mallopt(MMAP_THRESHOLD, 32 << 20)
    mallopt(TRIM_THRESHOLD, 2**31 - 1)


def cores() -> int:
    """CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
