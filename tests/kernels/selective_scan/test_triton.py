"""The Triton scan where there is no GPU: interpreted, and compiled for those there are."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from seqbench.kernels import tuning
from seqbench.kernels.selective_scan import triton as scan

_compiled = runpy.run_path(str(Path(__file__).parents[1] / "compiled.py"))
KERNELS = ("forward", "chunk_states", "chunk_starts", "chunk_adjoints", "backward", "step")
SEQUENCES = ("u", "delta", "z")


def test_interpreted_values_and_gradients_equal_the_float64_loop() -> None:
    found = _compiled["interpreted"](Path(__file__).with_name("interpreted.py"))
    assert len(found) == 14 and _compiled["within"](found), found


@pytest.mark.parametrize("cut", (True, False), ids=("cut", "whole"))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32), ids=("bfloat16", "float32"))
@pytest.mark.parametrize("target", _compiled["TARGETS"])
def test_no_kernel_spills_in_its_default_configuration(
    target: str, dtype: torch.dtype, cut: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With every option but reset; the scan whose length is cut has every kernel."""
    monkeypatch.setattr(scan, "_multiprocessors", lambda x: 132 if cut else 1)
    with _compiled["recorded"](scan.kernels, *KERNELS) as kernels:
        call = arguments(1, 2048, 1024, 16, dtype)
        y, final, checkpoints = scan.forward(**call)
        scan.backward(y, final, **call, checkpoints=checkpoints, needs=(True,) * 9)
        call.pop("initial_state"), call.pop("reset")
        now = {name: x[:, :1] if name in "BC" else x[:, 0] if name in SEQUENCES else x
               for name, x in call.items()}  # fmt: skip
        scan.step(final, **now)
    used = {name: kernel for name, kernel in kernels.items() if kernel.values}
    assert used.keys() == set(KERNELS if cut else ("forward", "backward", "step"))
    for name, kernel in used.items():
        found = _compiled["resources"](kernel.source(), target)
        assert not any(found.get(key) for key in ("STACK", "LOCAL", "SPILL")), (name, found)


def test_tuned_passes_are_cut_as_was_the_fastest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "kept_in", lambda: tmp_path / "choices.json")
    monkeypatch.setattr(tuning, "_chosen", {})
    monkeypatch.setattr(scan, "_multiprocessors", lambda x: 132)
    chunks: list[tuple[str, int, int]] = []

    def seconds(run: Any, wanted: int) -> float:
        run(wanted)
        name = "backward" if kernels["backward"].values else "forward"
        chunks.append((name, wanted, kernels[name].values["chunks"]))
        return abs(wanted - {"forward": 32, "backward": 64}[name])

    monkeypatch.setattr(scan, "_seconds", seconds)
    call = arguments(1, 32768, 1024, 16, torch.bfloat16)
    used = []
    for tuned in ("0", "1", "1"):
        monkeypatch.setenv("SEQBENCH_AUTOTUNE", tuned)
        with _compiled["recorded"](scan.kernels, *KERNELS) as kernels:
            y, _, checkpoints = scan.forward(**call)
            scan.backward(y, None, **call, checkpoints=checkpoints, needs=(True,) * 9)
        used.append([kernels[name].values["chunks"] for name in ("forward", "backward")])
    assert chunks == [(name, wanted, expected) for name in ("forward", "backward")
                      for wanted, expected in ((16, 33), (32, 66), (64, 128))]  # fmt: skip
    assert used == [[33, 33], [66, 128], [66, 128]]
    assert sorted(tuning.chosen().values()) == [32, 64]
    assert all("1 x 32768 x 1024 x 16" in case for case in tuning.chosen())


def arguments(
    batch: int, length: int, width: int, state: int, dtype: torch.dtype
) -> dict[str, Any]:
    """A call as a trained Mamba layer makes it, of tensors without memory."""
    sequence = torch.empty(batch, length, width, dtype=dtype, device="meta")
    projection = torch.empty(batch, length, state, dtype=dtype, device="meta")
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
