"""The Triton convolution where there is no GPU, interpreted."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

pytest.importorskip("triton")

_compiled = runpy.run_path(str(Path(__file__).parents[1] / "compiled.py"))


def test_interpreted_values_and_gradients_equal_the_float64_sum() -> None:
    found = _compiled["interpreted"](Path(__file__).with_name("interpreted.py"))
    assert len(found) == 14 and _compiled["within"](found), found
