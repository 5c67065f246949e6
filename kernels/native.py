"""The C++ kernels: compiled at first use for this CPU's instruction set, cached, called by ctypes.

The sources have a plain C interface and no PyTorch headers, so a build takes seconds, fits every
version of torch, and a call releases the GIL. One library is built for each instruction set when it
is first needed, and the CPU decides at run time which, so a cache shared by machines is safe.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import logging
import mmap
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_log = logging.getLogger(__name__)

_HEADERS = Path(__file__).parent / "csrc"
# No -ffast-math: it made narrower builds wrong with finite values, and may flush subnormals to zero
# in the whole process.
_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-pthread", "-fno-exceptions", "-fno-math-errno")
_INSTRUCTION_SETS = {
    "avx512": (
        *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mf16c"),
        "-mprefer-vector-width=512",
    ),
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "baseline": (),  # SSE2 on x86-64, NEON on ARM
}
_forced: str | None = None


class Unavailable(RuntimeError):
    """A library cannot be built or loaded here; the message says why."""


class Team(ctypes.Structure):
    """As many threads as PyTorch uses, and the OpenMP runtime that starts them (parallel.h)."""

    _fields_ = (("threads", ctypes.c_int64), ("openmp", ctypes.c_void_p))

    @staticmethod
    def current() -> Team:
        return Team(torch.get_num_threads(), _openmp())


class Rows(ctypes.Structure):
    """A (batch, length, channels) tensor with adjacent channels (simd.h); all zero if absent."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("batch_stride", ctypes.c_int64),
        ("time_stride", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
        ("unused", ctypes.c_int32),
    )

    @staticmethod
    def of(x_BLD: Tensor | None) -> Rows:
        """Points into `x_BLD`, which the caller keeps alive; see `adjacent`."""
        if x_BLD is None:
            return Rows()
        batch, time, _ = x_BLD.stride()
        return Rows(x_BLD.data_ptr(), batch, time, DTYPES[x_BLD.dtype], 0)


DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def adjacent(x_BLD: Tensor) -> Tensor:
    """`x_BLD` itself if its channels are adjacent in memory, as in a slice of a projection."""
    return x_BLD if x_BLD.stride(-1) == 1 else x_BLD.contiguous()


def empty(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """torch.empty in huge pages where Linux gives them on request, as NumPy does.

    A large result is fresh memory at every call, and a fault for each 4 KiB of it can cost more
    than the kernel that fills it.
    """
    x = torch.empty(shape, dtype=dtype)
    if x.nbytes < _HUGE_FROM:
        return x
    _keep_what_is_freed()
    first = -(-x.data_ptr() // _PAGE) * _PAGE
    size = (x.data_ptr() + x.nbytes - first) // _PAGE * _PAGE
    if size >= _HUGE_FROM and (madvise := _madvise()) is not None:
        madvise(first, size, mmap.MADV_HUGEPAGE)
    return x


_PAGE = mmap.PAGESIZE
_HUGE_FROM = 2 << 20


@functools.cache
def _keep_what_is_freed() -> None:
    """Lets glibc keep up to 64 MB of freed memory, once a process.

    It gives back what is free beyond twice the largest block that was ever mapped and freed, up to
    32 MB. Results of a few MB that a training step frees would else fault anew in every step.
    """
    torch.empty(31 << 20, dtype=torch.uint8)  # never touched, freed at once


@functools.cache
def _madvise() -> Any:
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return madvise


@functools.cache
def instruction_sets() -> tuple[str, ...]:
    """What this CPU can run, the best first."""
    names = {"AVX512": ("avx512", "avx2"), "AVX2": ("avx2",)}
    return (*names.get(torch.backends.cpu.get_cpu_capability(), ()), "baseline")


@contextlib.contextmanager
def instruction_set(name: str) -> Iterator[None]:
    """Inside, the kernels run in the build for `name`, one of `instruction_sets()`."""
    global _forced
    if name not in instruction_sets():
        raise ValueError(f"instruction set {name!r}: this CPU runs {', '.join(instruction_sets())}")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def load(source: Path) -> ctypes.CDLL:
    """The library built from `source` for the instruction set in force; raises Unavailable."""
    found = _load(source, _forced or instruction_sets()[0])
    if isinstance(found, str):
        raise Unavailable(found)
    return found


def refusal(source: Path) -> str | None:
    """Why `load(source)` raises, or None."""
    try:
        load(source)
    except Unavailable as error:
        return str(error)
    return None


@functools.cache
def _load(source: Path, instructions: str) -> ctypes.CDLL | str:
    try:
        return ctypes.CDLL(str(_build(source, instructions)))
    except (Unavailable, OSError) as error:
        return str(error).partition("\n")[0]


def _build(source: Path, instructions: str) -> Path:
    """The cached library, compiled if it is not there."""
    compiler, version = _compiler()
    command = [*compiler, *_FLAGS, *_INSTRUCTION_SETS[instructions]]
    key = hashlib.sha256("\0".join((*command, version, platform.machine())).encode())
    for file in (source, *sorted((*source.parent.glob("*.h"), *_HEADERS.glob("*.h")))):
        key.update(file.read_bytes())
    name = f"{source.stem}-{instructions}-{key.hexdigest()[:20]}.so"
    cached = cache_folder() / name
    if cached.exists():
        return cached
    _log.info("compiling %s for %s, once (into %s)", source.name, instructions, cached.parent)
    # Built beside its place and renamed: two processes may build at once, and neither sees half.
    handle, temporary = tempfile.mkstemp(suffix=".tmp", dir=cached.parent)
    os.close(handle)
    try:
        done = subprocess.run(
            [*command, str(source), "-o", temporary], capture_output=True, text=True, timeout=600
        )
        if done.returncode:
            lines = done.stderr.splitlines() or [f"exit status {done.returncode}"]
            first = next((line for line in lines if "error" in line), lines[0])
            raise Unavailable(f"{compiler[0]} fails on {source.name}: {first.strip()}")
        os.replace(temporary, cached)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"{compiler[0]} cannot build {source.name}: {error}") from None
    finally:
        Path(temporary).unlink(missing_ok=True)
    return cached


def _compiler() -> tuple[list[str], str]:
    """The compiler's command and its version: CXX if it is set, else the first there is."""
    chosen = os.environ.get("CXX")
    for command in [chosen] if chosen else ["g++", "clang++", "c++"]:
        words = shlex.split(command)
        if words and shutil.which(words[0]):
            done = subprocess.run([*words, "--version"], capture_output=True, text=True, timeout=60)
            return words, done.stdout
    raise Unavailable(
        f"CXX={chosen!r} is not an executable; set it to a C++17 compiler"
        if chosen
        else "no C++ compiler: install g++ or clang++, or set CXX"
    )


@functools.cache
def cache_folder() -> Path:
    """In the user's cache, or a folder of this process where that cannot be written."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = Path(base).expanduser() / "seqbench" / "kernels"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError:
        private = tempfile.TemporaryDirectory(prefix="seqbench-kernels-")
        _kept.append(private)
        return Path(private.name)


_kept: list[tempfile.TemporaryDirectory[str]] = []


@functools.cache
def _process_openmp() -> int | None:
    """Where GOMP_parallel is in this process: PyTorch's OpenMP runtime has brought it."""
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p).value
    except (OSError, AttributeError, TypeError):
        return None


_forked = False


def _openmp() -> int | None:
    return None if _forked else _process_openmp()


def _after_fork() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
