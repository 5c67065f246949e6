"""Prints, as JSON, by how much the Triton scan misses the float64 loop, over what is allowed.

Run with TRITON_INTERPRET=1, which a process cannot turn on once Triton is imported.
"""

from __future__ import annotations

import json
import runpy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from seqbench.kernels.selective_scan import selective_scan, selective_scan_step
from seqbench.kernels.selective_scan import triton as scan

there = runpy.run_path(str(Path(__file__).with_name("test_selective_scan.py")))
base = there["Case"](batch=2, length=9, width=5, state=3)
every = replace(base, without=())  # with reset
CASES = [
    (base, True),
    (every, True),
    (every, False),
    (replace(base, batch=1, width=35, state=16, dtype=torch.bfloat16), False),
    (replace(every, complex=True), True),
    (replace(every, complex=True, selective=""), False),
    (replace(base, selective="B", softplus=False, without=there["OPTIONAL"]), True),
    (replace(base, selective="C", without=("initial_state",), length=1), True),
    (replace(base, batch=1, state=33, width=3, dtype=torch.float16, length=5), False),
]

STEPS = [
    replace(base, length=3),
    replace(base, length=3, complex=True),
    replace(base, length=3, complex=True, selective=""),
    replace(base, length=3, width=35, state=16, dtype=torch.bfloat16, selective="B"),
    replace(base, length=3, softplus=False, without=there["OPTIONAL"]),
]


def watch(name: str, lengths: list[int]) -> None:
    """Has a load that is not masked in time fail beyond the newest length; else nobody would see."""
    load = getattr(scan.kernels, name)

    def watched(x: Any, stride: Any, t: Any, *arguments: Any) -> Any:
        begin = t if isinstance(t, int) else int(t.handle.data.item())
        steps = scan._STEPS["backward"]
        assert 0 <= begin <= lengths[-1] - steps, f"{name}: step {begin} on, of {lengths[-1]}"
        return load(x, stride, t, *arguments)

    setattr(scan.kernels, name, watched)


def main() -> None:
    torch.use_deterministic_algorithms(True)  # with which memory not yet written is NaN
    assert torch.empty(8).isnan().all()
    found = {}
    lengths: list[int] = []
    for name in ("_load_whole", "_load_whole_projections"):
        watch(name, lengths)
    for case, cut in CASES:
        lengths.append(case.length)
        scan._PROGRAMS_TO_FILL = 2**20 if cut else 0
        scan._PARTS, scan._COLUMNS = (2, 4) if cut else (32, 64)  # several tiles, or few
        scan._is_sm_90 = lambda x, cut=cut: cut  # what is done there alone, and without it
        actual = there["run"](case, there["draw"](case), "triton")
        worst = 0.0
        for name, expected in there["oracle"](case).items():
            x = actual[name]
            assert x.shape == expected.shape and not x.isnan().any(), (str(case), name)
            worst = max(worst, there["error"](x, expected) / there["TOLERANCE"][x.real.dtype])
        found[f"{case}-{'cut' if cut else 'whole'}"] = worst
    for case in STEPS:
        found[f"{case}-step"] = step_error(case)
    print(json.dumps(found))


def step_error(case: Any) -> float:
    """By how much three steps miss `forward`, over what is allowed."""
    inputs = there["draw"](case)
    options = {"delta_softplus": case.softplus, "backend": "triton"}
    y, final_state = selective_scan(**inputs, return_final_state=True, **options)
    unkept = scan.forward(
        **{**dict.fromkeys(("D", "z", "delta_bias", "initial_state", "reset")), **inputs},
        delta_softplus=case.softplus,
        keep=False,
    )
    assert unkept[0].equal(y) and unkept[1].equal(final_state) and unkept[2].numel() == 0
    state = inputs.pop("initial_state", torch.zeros_like(final_state))
    worst = 0.0
    for t in range(case.length):
        now = {
            name: x[:, t] if name in "u delta z" or x.ndim == 3 else x for name, x in inputs.items()
        }
        y_BD, state = selective_scan_step(state, **now, **options)
        assert y_BD.dtype == y.dtype
        worst = max(worst, there["error"](y_BD, y[:, t]) / (2 * there["TOLERANCE"][case.dtype]))
    return max(worst, there["error"](state, final_state) / there["TOLERANCE"][torch.float32])


if __name__ == "__main__":
    main()
