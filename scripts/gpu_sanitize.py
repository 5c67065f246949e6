"""Runs the Triton scan and convolution once at small shapes, to be watched by compute-sanitizer.

    TRITON_INTERPRET=1 python3 -P scripts/gpu_sanitize.py       on a CPU
    compute-sanitizer --tool memcheck python3 -P scripts/gpu_sanitize.py
"""

from __future__ import annotations

from typing import Any

import torch
import triton

from seqbench.kernels.causal_conv1d import causal_conv1d
from seqbench.kernels.selective_scan import selective_scan
from seqbench.kernels.selective_scan import triton as scan

DEVICE = "cpu" if triton.knobs.runtime.interpret else "cuda"
WHOLE, CUT = 0, 2**20  # programs that fill the GPU: any number does, none does


def main() -> None:
    torch.manual_seed(0)
    for programs in (WHOLE, CUT):
        scan._PROGRAMS_TO_FILL = programs
        for complex in (False, True):
            for selective in (True, False):
                run_scan(2, 37, 19, 5, torch.float32, complex=complex, selective=selective)
        run_scan(1, 64, 48, 16, torch.bfloat16, complex=False, selective=True)
    for taps, width in ((4, 70), (1, 3)):
        run_convolution(2, 67, width, taps)
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


def run_convolution(batch: int, length: int, width: int, taps: int) -> None:
    call = {
        "x_BLD": torch.randn(batch, length, width),
        "weight_DK": torch.randn(width, taps),
        "bias_D": torch.randn(width),
        "initial_state": torch.randn(batch, taps - 1, width),
    }
    leaves = {name: x.to(DEVICE).requires_grad_() for name, x in call.items()}
    y, final_state = causal_conv1d(
        *leaves.values(), activation="silu", return_final_state=True, backend="triton"
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
