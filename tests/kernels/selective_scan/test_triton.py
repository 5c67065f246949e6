"""The Triton scan where there is no GPU: interpreted, and compiled for those there are."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from seqbench.kernels.selective_scan import triton as scan

_compiled = runpy.run_path(str(Path(__file__).parents[1] / "compiled.py"))
KERNELS = ("forward", "chunk_states", "chunk_starts", "chunk_adjoints", "backward", "step")
SEQUENCES = ("u", "delta", "z")


def test_interpreted_values_and_gradients_equal_the_float64_loop() -> None:
    found = _compiled["interpreted"](Path(__file__).with_name("interpreted.py"))
    assert len(found) == 14 and _compiled["within"](found), found


@pytest.mark.parametrize("target", _compiled["TARGETS"])
def test_no_kernel_but_backward_spills_in_its_default_configuration(
    target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the cut scan, whose kernels are all there are, in bfloat16 with every option but reset.

    backward keeps up to 32 registers' worth on the stack (TRITON.md).
    """
    monkeypatch.setattr(scan, "_multiprocessors", lambda x: 132)
    with _compiled["recorded"](scan.kernels, *KERNELS) as kernels:
        call = arguments(1, 2048, 1024, 16)
        y, final, checkpoints = scan.forward(**call)
        scan.backward(y, final, **call, checkpoints=checkpoints, needs=(True,) * 9)
        call.pop("initial_state"), call.pop("reset")
        now = {name: x[:, :1] if name in "BC" else x[:, 0] if name in SEQUENCES else x
               for name, x in call.items()}  # fmt: skip
        scan.step(final, **now)
    for name, kernel in kernels.items():
        used = _compiled["resources"](kernel.source(), target)
        allowed = 128 if name == "backward" else 0
        assert used.get("STACK", 0) <= allowed, (name, used)
        assert not used.get("LOCAL") and not used.get("SPILL"), (name, used)


def arguments(batch: int, length: int, width: int, state: int) -> dict[str, Any]:
    """A call as a trained Mamba layer makes it, of tensors without memory."""
    sequence = torch.empty(batch, length, width, dtype=torch.bfloat16, device="meta")
    projection = torch.empty(batch, length, state, dtype=torch.bfloat16, device="meta")
    channels = torch.empty(width, device="meta")
    return {
        "u": sequence,
        "delta": sequence,
        "A": torch.empty(width, state, device="meta"),
        "B": projection,
        "C": projection,
        "D": channels,
        "z": sequence,
        "delta_bias": channels,
        "delta_softplus": True,
        "initial_state": torch.empty(batch, width, state, device="meta"),
        "reset": None,
    }
