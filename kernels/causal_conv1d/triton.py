"""The short convolution in Triton on NVIDIA and AMD GPUs, SiLU fused, recompute in backward."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from seqbench.kernels import dispatch
from seqbench.kernels.causal_conv1d import triton_kernels as kernels

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MAX_TAPS = 16
_BLOCK = 64  # channels of a program: rows of 128 bytes in bfloat16
_STEP_BLOCK = 256  # channels of a program of `step`
_CHUNK = 64  # steps of a program, of which backward walks K - 1 twice
_STEPS = 4  # rows loaded together
_INTERPRETED = triton.knobs.runtime.interpret


def refuse(
    *,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    initial_state: Tensor | None,
) -> str | None:
    """Why this backend cannot take the call, or None."""
    device = "cpu" if _INTERPRETED else "cuda"
    for tensor in (x, weight, bias, initial_state):
        if tensor is not None and tensor.device.type != device:
            return f"a tensor is on {tensor.device}; it runs on {device}"
    if x.dtype not in _DTYPES:
        return f"x is {x.dtype}; it takes float32, bfloat16 and float16"
    if not 1 <= weight.shape[1] <= _MAX_TAPS:
        return f"the filter has {weight.shape[1]} taps; it takes 1 to {_MAX_TAPS}"
    return None


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """y and the final state (B, K-1, D), both in x's dtype."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if y.numel():
        sequences = {"x": x, "initial": initial_state}
        _run(kernels.forward, x.shape[1], x, weight, activation, sequences, bias=bias, y=y)
    return y, _last(x, weight.shape[1] - 1, initial_state)


def backward(
    dy: Tensor,
    dfinal_state: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    initial_state: Tensor | None,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Gradients of x, weight, bias, initial_state; None if not needed."""
    inputs = (x, weight, bias, initial_state)
    dx, dweight, dbias, dinitial = (
        torch.empty(tensor.shape, dtype=tensor.dtype, device=x.device)
        if needed and tensor is not None
        else None
        for tensor, needed in zip(inputs, needs)
    )
    gradients = (dx, dweight, dbias, dinitial)
    if x.numel() == 0:
        for gradient in gradients:
            if gradient is not None:
                gradient.zero_()
        if dinitial is not None and dfinal_state is not None:
            dinitial.copy_(dfinal_state)
        return gradients
    batch, length, width = x.shape
    taps = weight.shape[1]
    length += taps - 1
    parts = batch * triton.cdiv(length, _CHUNK)
    sums: Any = {"dtype": torch.float32, "device": x.device}
    dweight_PKD = torch.empty(parts, taps, width, **sums)
    dbias_PD = torch.empty(parts, width, **sums)
    _run(
        kernels.backward, length, x, weight, activation,
        {"dy": dy.to(x.dtype), "dfinal": dfinal_state, "x": x, "initial": initial_state},
        bias=bias, dx=dx, dweight=dweight_PKD, dbias=dbias_PD,
        dinitial=dinitial,
    )  # fmt: skip
    if dweight is not None:
        dweight.copy_(dweight_PKD.sum(0).mT)
    if dbias is not None:
        dbias.copy_(dbias_PD.sum(0))
    return gradients


def refuse_step(*, state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    """Why `step` cannot take the call, or None."""
    reason = dispatch.refuse_untraced((x, state, weight, bias))
    if reason is not None:
        return reason
    return refuse(x=x, weight=weight, bias=bias, activation=None, initial_state=state)


def step(
    state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None
) -> tuple[Tensor, Tensor]:
    """y (B, D) and the next state (B, K-1, D), both in x's dtype."""
    batch, width = x.shape
    taps = weight.shape[1]
    x, state = (each if each.stride(-1) == 1 else each.contiguous() for each in (x, state))
    y, after = x.new_empty(batch, width), x.new_empty(batch, taps - 1, width)
    block = min(_STEP_BLOCK, triton.next_power_of_2(width))
    values: dict[str, Any] = {
        "x": x,
        "weight": weight.contiguous(),
        "bias": bias,
        "before": state,
        "y": y,
        "after": after,
        "x_b": x.stride(0),
        "before_b": state.stride(0),
        "before_k": state.stride(1),
        "width": width,
        "TAPS": taps,
        "BLOCK": block,
        "SILU": activation == "silu",
    }
    kernel: Any = kernels.step
    with torch.cuda.device_of(x):
        kernel[(batch * triton.cdiv(width, block),)](
            **{name: values[name] for name in kernel.arg_names}, num_warps=4
        )
    return y, after


def _run(
    kernel: Any,
    steps: int,
    x: Tensor,
    weight: Tensor,
    activation: str | None,
    sequences: dict[str, Tensor | None],
    **tensors: Tensor | None,
) -> None:
    """Launches a kernel over `steps` steps; of sequences it gets the strides too."""
    batch, length, width = x.shape
    block = min(_BLOCK, triton.next_power_of_2(width))
    chunks = triton.cdiv(steps, _CHUNK)
    values: dict[str, Any] = {
        **tensors,
        "weight": weight.contiguous(),
        "length": length,
        "width": width,
        "chunk": _CHUNK,
        "chunks": chunks,
        "TAPS": weight.shape[1],
        "BLOCK": block,
        "STEPS": _STEPS,
        "SILU": activation == "silu",
    }
    for name, tensor in sequences.items():
        if tensor is not None and tensor.stride(-1) != 1:
            tensor = tensor.contiguous()
        values[name] = tensor
        values[f"{name}_b"] = 0 if tensor is None else tensor.stride(0)
        values[f"{name}_l"] = 0 if tensor is None else tensor.stride(1)
    programs = batch * chunks * triton.cdiv(width, block)
    with torch.cuda.device_of(x):
        kernel[(programs,)](**{name: values[name] for name in kernel.arg_names}, num_warps=1)


def _last(x: Tensor, count: int, initial_state: Tensor | None) -> Tensor:
    """The last `count` inputs, from the initial state or zeros where x has not as many."""
    batch, length, width = x.shape
    last = x.new_empty(batch, count, width)
    kept = max(count - length, 0)
    if kept and initial_state is not None:
        last[:, :kept] = initial_state[:, count - kept :]
    elif kept:
        last[:, :kept] = 0
    last[:, kept:] = x[:, length - (count - kept) :]
    return last
