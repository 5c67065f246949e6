"""The Triton convolution where there is no GPU, interpreted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


def test_interpreted_values_and_gradients_equal_the_float64_sum() -> None:
    worker = Path(__file__).with_name("interpreted.py")
    done = subprocess.run(
        [sys.executable, "-P", worker],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == 14
    for case, error in found.items():
        # The interpreter truncates to bfloat16 where GPUs round: twice the error.
        assert error <= (2 if case.startswith("bfloat16") else 1), found
