"""Prints, as JSON, by how much the Triton convolution misses the float64 sum, over what is allowed.

Run with TRITON_INTERPRET=1, which a process cannot turn on once Triton is imported.
"""

from __future__ import annotations

import json
import runpy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from seqbench.kernels.causal_conv1d import causal_conv1d, causal_conv1d_step

there = runpy.run_path(str(Path(__file__).with_name("test_causal_conv1d.py")))
base = there["Case"](batch=2, length=9, width=5)
CASES = [
    base,
    replace(base, length=67, batch=1),  # two chunks
    replace(base, length=2),
    replace(base, taps=1, width=70),
    replace(base, without=there["OPTIONAL"], silu=False),
    replace(base, dtype=torch.bfloat16),
    replace(base, dtype=torch.float16, taps=3),
]


def main() -> None:
    torch.use_deterministic_algorithms(True)  # with which memory not yet written is NaN
    assert torch.empty(8).isnan().all()
    found = {}
    for case in CASES:
        actual = there["run"](case, there["draw"](case), "triton")
        worst = 0.0
        for name, expected in there["oracle"](case).items():
            x = actual[name]
            assert x.shape == expected.shape and not x.isnan().any(), (str(case), name)
            worst = max(worst, there["error"](x, expected) / there["TOLERANCE"][x.dtype])
        found[str(case)] = worst
        found[f"{case}-steps"] = step_error(case)
    print(json.dumps(found))


def step_error(case: Any) -> float:
    """By how much steps miss `forward`, over what is allowed."""
    inputs = there["draw"](case)
    options = {"activation": "silu" if case.silu else None, "backend": "triton"}
    y, final_state = causal_conv1d(**inputs, return_final_state=True, **options)
    x_BLD = inputs.pop("x_BLD")
    state = inputs.pop("initial_state", torch.zeros_like(final_state))
    worst = 0.0
    for t in range(case.length):
        y_BD, state = causal_conv1d_step(state, x_BLD[:, t], **inputs, **options)
        assert y_BD.dtype == y.dtype
        worst = max(worst, there["error"](y_BD, y[:, t]) / (2 * there["TOLERANCE"][case.dtype]))
    assert torch.equal(state, final_state), str(case)
    return worst


if __name__ == "__main__":
    main()
