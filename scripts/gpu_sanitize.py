"""Runs the Triton scan and convolution once at small shapes, to be watched by compute-sanitizer.

TRITON_INTERPRET=1 python3 -P scripts/gpu_sanitize.py       on a CPU
compute-sanitizer --tool memcheck python3 -P scripts/gpu_sanitize.py
"""

from __future__ import annotations

from typing import Any

import torch
import triton

from seqbench.kernels.causal_conv1d import causal_conv1d
from seqbench.kernels.selective_scan import selective_scan, selective_scan_step
from seqbench.kernels.selective_scan import triton as scan

DEVICE = "cpu" if triton.knobs.runtime.interpret else "cuda"
WHOLE, CUT = 0, 2**20  # programs that fill the GPU: any number does, none does


def main() -> None:
    torch.manual_seed(0)
    bfloat16, float32 = torch.bfloat16, torch.float32
    for programs in (WHOLE, CUT):
        scan._PROGRAMS_TO_FILL = programs
        run_scan(1, 19, 35, 16, bfloat16, complex=False, selective=True)
    run_scan(2, 17, 5, 5, float32, complex=True, selective=True)
    run_scan(2, 3, 5, 16, bfloat16, complex=False, selective=True)  # less than a group of steps
    scan._PROGRAMS_TO_FILL = WHOLE
    run_scan(2, 9, 5, 5, float32, complex=False, selective=False)
    for complex in (False, True):
        run_step(2, 35, 5, complex=complex)
    run_convolution(2, 67, 70, 4)
    print("every result is finite")


def run_scan(
    batch: int,
    length: int,
    width: int,
    state: int,
    dtype: torch.dtype,
    *,
    complex: bool,
    selective: bool,
) -> None:
    numbers = torch.complex64 if complex else torch.float32
    of_time = numbers if complex else dtype
    A = -0.1 - torch.rand(width, state)
    call: dict[str, Any] = {
        "u": torch.randn(batch, length, width, dtype=dtype),
        "delta": torch.randn(batch, length, width, dtype=dtype),
        "A": torch.complex(A, torch.randn(width, state)) if complex else A,
        "D": torch.randn(width),
        "z": torch.randn(batch, length, width, dtype=dtype),
        "delta_bias": torch.randn(width),
        "initial_state": torch.randn(batch, width, state, dtype=numbers),
    }
    for name in "BC":
        shape, kind = ((batch, length, state), of_time) if selective else ((width, state), numbers)
        call[name] = torch.randn(shape, dtype=kind)
    reset = (torch.rand(batch, length) < 0.2).to(DEVICE)
    leaves = {name: x.to(DEVICE).requires_grad_() for name, x in call.items()}
    y, final_state = selective_scan(
        **leaves,
        reset=reset,
        delta_softplus=True,
        return_final_state=True,
        backend="triton",
    )
    check(y, final_state, leaves)


def run_step(batch: int, width: int, state: int, *, complex: bool) -> None:
    dtype = torch.complex64 if complex else torch.float32

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(shape, dtype=dtype, device=DEVICE)

    with torch.no_grad():
        y, after = selective_scan_step(
            normal(batch, width, state, dtype=dtype),
            normal(batch, width),
            normal(batch, width),
            -normal(width, state).abs().to(dtype),
            normal(batch, 1, state, dtype=dtype),
            normal(width, state, dtype=dtype),
            normal(width),
            normal(batch, width),
            delta_bias=normal(width),
            delta_softplus=True,
            backend="triton",
        )
    assert y.isfinite().all() and after.isfinite().all()


def run_convolution(batch: int, length: int, width: int, taps: int) -> None:
    call = {
        "x_BLD": torch.randn(batch, length, width),
        "weight_DK": torch.randn(width, taps),
        "bias_D": torch.randn(width),
        "initial_state": torch.randn(batch, taps - 1, width),
    }
    leaves = {name: x.to(DEVICE).requires_grad_() for name, x in call.items()}
    y, final_state = causal_conv1d(
        **leaves, activation="silu", return_final_state=True, backend="triton"
    )
    check(y, final_state, leaves)


def check(y: torch.Tensor, final_state: torch.Tensor, leaves: dict[str, torch.Tensor]) -> None:
    # Not one number repeated: strides of 0 would hide what a kernel reads.
    outputs = [torch.randn_like(x) for x in (y, final_state)]
    gradients = torch.autograd.grad([y, final_state], list(leaves.values()), outputs)
    for x in (y, final_state, *gradients):
        assert x.isfinite().all()


if __name__ == "__main__":
    main()
