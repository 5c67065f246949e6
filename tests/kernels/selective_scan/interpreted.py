"""Prints, as JSON, by how much the Triton scan misses the float64 loop, over what is allowed.

Run with TRITON_INTERPRET=1, which a process cannot turn on once Triton is imported.
"""

from __future__ import annotations

import json
import runpy
from dataclasses import replace
from pathlib import Path

import torch

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


def main() -> None:
    torch.use_deterministic_algorithms(True)  # with which memory not yet written is NaN
    assert torch.empty(8).isnan().all()
    found = {}
    for case, cut in CASES:
        scan._PROGRAMS_TO_FILL = 2**20 if cut else 0
        actual = there["run"](case, there["draw"](case), "triton")
        worst = 0.0
        for name, expected in there["oracle"](case).items():
            x = actual[name]
            assert x.shape == expected.shape and not x.isnan().any(), (str(case), name)
            worst = max(worst, there["error"](x, expected) / there["TOLERANCE"][x.real.dtype])
        found[f"{case}-{'cut' if cut else 'whole'}"] = worst
    print(json.dumps(found))


if __name__ == "__main__":
    main()
