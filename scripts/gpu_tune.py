"""Times the Triton scan on this GPU under several configurations, beside the two ceilings it meets.

    PYTHONPATH=.typing python3 -P scripts/gpu_tune.py [--quick]

Prints, for every shape and configuration, milliseconds of forward and backward (kernels only, no
autograd), exponentials per second over those this GPU does, and, last, the time of every kernel.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from seqbench.kernels.selective_scan import torch_chunked, triton_kernels
from seqbench.kernels.selective_scan import triton as scan

SHAPES = {
    "training": (8, 2048, 2048, 16),
    "paper 2K": (1, 2048, 1024, 16),
    "paper 32K": (1, 32768, 1024, 16),
    "long": (1, 2**20, 512, 16),
}


@triton.jit
def _exponentials(x, ROUNDS: tl.constexpr):
    at = x + tl.program_id(0) * 4096 + tl.arange(0, 4096)
    value = tl.load(at)
    for _ in range(ROUNDS):
        value = tl.exp2(value)
    tl.store(at, value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the default configuration only")
    parser.add_argument("--compile", metavar="CONFIGURATION", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.compile:
        gate() if arguments.compile == "gate" else compile_kernels(arguments.compile)
        return
    # Each configuration's kernels are compiled by a process of its own, into the cache they share.
    labels = ["gate", *(["default"] if arguments.quick else CONFIGURATIONS)]
    for process in [
        subprocess.Popen([sys.executable, "-P", __file__, "--compile", label]) for label in labels
    ]:
        process.wait()
    exps, bandwidth = peaks()
    name = torch.cuda.get_device_name()
    print(f"{name}: {exps / 1e12:.2f} T exp2/s, copies {bandwidth / 1e12:.2f} TB/s")
    gate()
    for title, shape in SHAPES.items():
        tune(title, shape, exps, quick=arguments.quick)
    attention()
    for title, shape in SHAPES.items():
        profile(title, shape)


def peaks() -> tuple[float, float]:
    """exp2 per second and bytes per second, read and written."""
    x = -torch.rand(132 * 64 * 4096, device="cuda")
    rounds = 512
    seconds = time(lambda: _exponentials[(x.numel() // 4096,)](x, rounds))
    a, b = (torch.randn(2**28, device="cuda") for _ in range(2))
    return x.numel() * rounds / seconds, 2 * 4 * a.numel() / time(lambda: b.copy_(a))


def gate() -> None:
    """Forward and every gradient against the chunked PyTorch scan in float64."""
    for batch, length, width in ((2, 300, 70), (1, 5000, 64)):
        call, dy = draw(batch, length, width, 16, torch.float32)
        double = {k: x.double() if isinstance(x, Tensor) else x for k, x in call.items()}
        y, final, checkpoints = scan.forward(**call)
        y64, final64, checkpoints64 = torch_chunked.forward(**double)
        needs = (True,) * 9
        gradients = scan.backward(dy, final, **call, checkpoints=checkpoints, needs=needs)
        expected = torch_chunked.backward(
            dy.double(), final.double(), **double, checkpoints=checkpoints64, needs=needs
        )
        errors = [
            (float((a - b).norm() / b.norm()) if a is not None and b is not None else 0.0)
            for a, b in zip((y, final, *gradients), (y64, final64, *expected))
        ]
        print(f"gate {(batch, length, width)}:", " ".join(f"{e:.1e}" for e in errors))
        assert max(errors) < 1e-4


DEFAULTS = {
    name: getattr(scan, f"_{name}")
    for name in (
        "STEPS",
        "NUMBERS",
        "LANES",
        "EVERY",
        "PROGRAMS_TO_FILL",
        "PROGRAMS_WANTED",
        "SHORT",
    )
}


def steps(forward: int, backward: int) -> dict[str, Any]:
    passes = dict.fromkeys(("forward", "chunk_states", "chunk_adjoints"), forward)
    return {"STEPS": {**DEFAULTS["STEPS"], **passes, "backward": backward}}


# Numbers of a state tile a lane, channels side by side, steps unrolled, chunks.
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "steps 4, 4": steps(4, 4),
    "steps 8, 2": steps(8, 2),
    "4 a lane, 8, 4": {"NUMBERS": 4},
    "4 a lane, 8, 8": {"NUMBERS": 4, **steps(8, 8)},
    "16 a lane, 4, 2": {"NUMBERS": 16, **steps(4, 2)},
    "16 a lane, 4, 4": {"NUMBERS": 16, **steps(4, 4)},
    "8, 16 wide": {"LANES": 16},
    "16, 16 wide, 4, 2": {"NUMBERS": 16, "LANES": 16, **steps(4, 2)},
    "16, 32 wide, 4, 2": {"NUMBERS": 16, "LANES": 32, **steps(4, 2)},
    "every 16": {"EVERY": 16},
    # Compiled for fewer registers more programs stay on a multiprocessor, if nothing spills.
    "4 a lane, 128 registers": {"NUMBERS": 4, "REGISTERS": 128},
    "160 registers": {"REGISTERS": 160},
    "programs 8": {"PROGRAMS_TO_FILL": 8, "PROGRAMS_WANTED": 8, "SHORT": 0},
    "programs 12": {"PROGRAMS_TO_FILL": 12, "PROGRAMS_WANTED": 12, "SHORT": 0},
    "programs 32": {"PROGRAMS_WANTED": 32, "SHORT": 0},
    "programs 64": {"PROGRAMS_WANTED": 64, "SHORT": 0},
}


class Limited:
    """A kernel compiled for so many registers a lane."""

    def __init__(self, kernel: Any, registers: int) -> None:
        self.kernel, self.registers, self.arg_names = kernel, registers, kernel.arg_names

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        launch = self.kernel[grid]
        return lambda **values: launch(**{**values, "maxnreg": self.registers})


KERNELS = {name: getattr(triton_kernels, name) for name in DEFAULTS["STEPS"]}


def configure(changes: dict[str, Any]) -> None:
    changes = dict(changes)
    registers = changes.pop("REGISTERS", None)
    for name, kernel in KERNELS.items():
        setattr(triton_kernels, name, Limited(kernel, registers) if registers else kernel)
    for name, value in {**DEFAULTS, **changes}.items():
        setattr(scan, f"_{name}", value)


def compile_kernels(label: str) -> None:
    """Runs a configuration once whole and once in chunks."""
    call, dy = draw(1, 64, 512, 16, torch.bfloat16)
    for wanted in (0, 1):
        configure({**CONFIGURATIONS[label], "PROGRAMS_TO_FILL": wanted * 2**20})
        try:
            checkpoints = scan.forward(**call)[2]
            needs = (True,) * 8 + (False,)
            scan.backward(dy, None, **call, checkpoints=checkpoints, needs=needs)
        except Exception as error:
            print(f"{label}: {error!s:.200}")


def tune(title: str, shape: tuple[int, int, int, int], exps: float, *, quick: bool) -> None:
    batch, length, width, state = shape
    call, dy = draw(*shape, torch.bfloat16)
    needs = (True,) * 8 + (False,)
    elements = batch * length * width * state
    for label, changes in CONFIGURATIONS.items():
        if quick and changes:
            break
        configure(changes)
        try:
            checkpoints = scan.forward(**call)[2]
            forward = time(partial(scan.forward, **call))
            backward = time(
                partial(scan.backward, dy, None, **call, checkpoints=checkpoints, needs=needs)
            )
            print(
                f"{title:10s} {label:24s} forward {forward * 1e3:8.3f} ms"
                f" {elements / forward / exps:5.1%}   backward {backward * 1e3:8.3f} ms"
                f" {2 * elements / backward / exps:5.1%} (of 2 exps)",
                flush=True,
            )
        except Exception as error:
            print(f"{title:10s} {label:24s} {type(error).__name__}: {str(error)[:200]}", flush=True)
    configure({})


def attention() -> None:
    for length in (512, 1024, 2048, 4096, 8192, 32768):
        q, k, v = (
            torch.randn(1, 16, length, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3)
        )
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
            flash = time(partial(F.scaled_dot_product_attention, q, k, v, is_causal=True))
        call, _ = draw(1, length, 1024, 16, torch.bfloat16)
        ours = time(partial(scan.forward, **call))
        print(f"L {length:6d} flash {flash * 1e3:.3f} ms, scan {ours * 1e3:.3f} ms,"
              f" {flash / ours:.2f}x", flush=True)  # fmt: skip


def profile(title: str, shape: tuple[int, int, int, int]) -> None:
    call, dy = draw(*shape, torch.bfloat16)
    needs = (True,) * 8 + (False,)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
        for _ in range(3):
            checkpoints = scan.forward(**call)[2]
            scan.backward(dy, None, **call, checkpoints=checkpoints, needs=needs)
        torch.cuda.synchronize()
    print(f"-- {title} {shape}: microseconds a call")
    for event in sorted(trace.key_averages(), key=lambda e: -e.self_device_time_total)[:12]:
        print(f"{event.self_device_time_total / 3:10.1f} {event.key[:90]}")


def draw(
    batch: int, length: int, width: int, state: int, dtype: torch.dtype
) -> tuple[dict[str, Any], Tensor]:
    """A call as a trained Mamba layer makes it, steps of 1e-3 to 1e-1, and a gradient of y."""
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, device="cuda", generator=generator).to(dtype)

    step = torch.logspace(-3, -1, width, device="cuda")
    call = {
        "u": normal(batch, length, width),
        "delta": normal(batch, length, width) * 0.1,
        "A": -torch.arange(1.0, state + 1, device="cuda").repeat(width, 1),
        "B": normal(batch, length, state),
        "C": normal(batch, length, state),
        "D": torch.ones(width, device="cuda"),
        "z": normal(batch, length, width),
        "delta_bias": step + torch.log(-torch.expm1(-step)),
        "delta_softplus": True,
        "initial_state": None,
        "reset": None,
    }
    return call, normal(batch, length, width)


def time(run: Callable[[], Any]) -> float:
    """Median seconds."""
    return float(triton.testing.do_bench(run, warmup=20, rep=60, return_mode="median")) / 1e3


if __name__ == "__main__":
    main()
