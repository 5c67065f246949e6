"""The Triton scan where there is no GPU: interpreted, and compiled for those there are."""

from __future__ import annotations

import copy
import itertools
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from seqbench.kernels import tuning
from seqbench.kernels.selective_scan import triton as scan

_compiled = runpy.run_path(str(Path(__file__).parents[1] / "compiled.py"))
KERNELS = (
    "forward", "chunk_states", "chunk_starts", "chunk_adjoints", "backward", "sum_parts", "step"
)  # fmt: skip
SEQUENCES = ("u", "delta", "z")


def test_interpreted_values_and_gradients_equal_the_float64_loop() -> None:
    found = _compiled["interpreted"](Path(__file__).with_name("interpreted.py"))
    assert len(found) == 14 and _compiled["within"](found), found


DEFAULTS = ("", "whole", "float32", "float32 whole", "no-initial")


@pytest.mark.parametrize(
    ("target", "variant"),
    [*itertools.product(("sm_80", "sm_90", "sm_100"), DEFAULTS), ("gfx942", "")],
)
def test_no_kernel_spills_in_its_default_configuration(target: str, variant: str) -> None:
    for name, kernel in launched(variant, target).items():
        found = _compiled["resources"](kernel, target)
        # Four numbers, put away around the loop.
        around = 16 if (name, target, variant) == ("backward", "sm_100", "no-initial") else 0
        assert found.get("STACK", 0) <= around, (name, found)
        assert not found.get("LOCAL") and not found.get("SPILL"), (name, found)


# What a variant has otherwise than the default: bfloat16, cut, real A, selective B and C, and all
# that may be left out but reset. With the default itself, any two options stand in all four ways.
OPTIONS = ("float32", "whole", "complex", "constant-B", "constant-C", "no-z", "no-D", "no-bias", "reset", "no-initial")  # fmt: skip
VARIANTS = (
    "float32 whole complex constant-B constant-C no-z",
    "float32 whole complex no-D no-bias reset",
    "float32 constant-B constant-C no-D no-bias no-initial",
    "whole constant-B no-z no-D reset no-initial",
    "complex constant-C no-z no-bias reset no-initial",
)
OPPOSITE = " ".join(OPTIONS)


def test_any_two_options_stand_in_all_four_ways() -> None:
    rows = [set(variant.split()) for variant in ("", *VARIANTS)]
    assert set().union(*rows) == set(OPTIONS)
    for a, b in itertools.combinations(OPTIONS, 2):
        assert len({(a in row, b in row) for row in rows}) == 4, (a, b)


@pytest.mark.parametrize(
    ("target", "variant"),
    [
        *(("sm_90", variant) for variant in VARIANTS),
        *((target, OPPOSITE) for target in ("sm_80", "sm_100", "gfx942")),
    ],
)
def test_every_option_compiles(target: str, variant: str) -> None:
    """On sm_90 in pairs; elsewhere all at once, which with the defaults above is each both ways."""
    for name, kernel in launched(variant, target).items():
        found = _compiled["resources"](kernel, target)
        assert 0 < found["REG"] <= 512 and found["SHARED"] <= 48 * 1024, (name, found)
        # Sine and cosine have 32 bytes of stack of their own.
        assert not found.get("SPILL") and found.get("STACK", 0) <= 128, (name, found)
        assert "complex" in variant or not found.get("STACK"), (name, found)


def launched(variant: str, target: str) -> dict[str, Any]:
    """The kernels with what calls launch them with; a cut scan has every kernel there is."""
    with (
        pytest.MonkeyPatch.context() as patch,
        _compiled["recorded"](scan.kernels, *KERNELS) as kernels,
    ):
        patch.setattr(scan, "_multiprocessors", lambda x: 1 if "whole" in variant else 132)
        patch.setattr(scan, "_is_sm_90", lambda x: target == "sm_90")
        patch.setattr(scan, "_overlaps", lambda x: target in ("sm_90", "sm_100"))
        call = arguments(1, 2048, 1024, 16, variant)
        scan.forward(**call, keep=False)
        alone = copy.copy(kernels["forward"])
        y, final, checkpoints = scan.forward(**call)
        scan.backward(y, final, **call, checkpoints=checkpoints, needs=(True,) * 9)
        call.pop("initial_state"), call.pop("reset")
        now = {name: x[:, :1] if name in "BC" and x.ndim == 3 else
                     x[:, 0] if name in SEQUENCES and x is not None else x
               for name, x in call.items()}  # fmt: skip
        scan.step(final, **now)
    used = {name: kernel for name, kernel in kernels.items() if kernel.values}
    # A call's first kernel waits for all before it, as kernels do; the others start sooner.
    first, others = ("chunk_states", "chunk_adjoints", "step"), KERNELS
    if "whole" in variant:
        first, others = ("forward", "backward", "step"), ("sum_parts",)
    assert used.keys() == {*first, *others}
    overlapping = {name for name, kernel in used.items() if kernel.options.get("launch_pdl")}
    assert overlapping == ({*others} - {*first} if target in ("sm_90", "sm_100") else set())
    return {**used, "forward alone": alone}


@pytest.mark.parametrize(("keep", "most"), ((True, 16), (False, 24)))
def test_a_cut_scan_fills_whole_rounds(
    keep: bool, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not one program more than are wanted, and less than a chunk of every block fewer."""
    monkeypatch.setattr(scan, "_multiprocessors", lambda x: 132)
    for width in (512, 1000, 1024):
        with _compiled["recorded"](scan.kernels, *KERNELS) as kernels:
            scan.forward(**arguments(1, 2**20, width, 16), keep=keep)
        programs = -(-width // 16) * kernels["forward"].values["chunks"]
        assert most * 132 - -(-width // 16) < programs <= most * 132


@pytest.mark.parametrize(("length", "chunks"), ((512, 16), (4096, 16), (4104, 33)))
def test_a_short_scan_is_cut_into_fewer(
    length: int, chunks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Into 8 programs a multiprocessor as long as their chunks are of at most 256 steps."""
    monkeypatch.setattr(scan, "_multiprocessors", lambda x: 132)
    call = arguments(1, length, 1024, 16)
    assert scan.plan(call["u"], call["A"], 16).chunks == chunks


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
    call = arguments(1, 32768, 1024, 16)
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


def arguments(batch: int, length: int, width: int, state: int, variant: str = "") -> dict[str, Any]:
    """A call as a trained Mamba layer makes it, but for what is named, of tensors without memory."""
    other = variant.split()
    inputs = torch.float32 if "float32" in other else torch.bfloat16
    params = torch.complex64 if "complex" in other else torch.float32

    def tensor(without: str, *shape: int, dtype: torch.dtype = torch.float32) -> Any:
        return None if without in other else torch.empty(shape, dtype=dtype, device="meta")

    def projection(constant: str) -> Any:
        if constant in other:
            return tensor("", width, state, dtype=params)
        return tensor("", batch, length, state, dtype=params if params.is_complex else inputs)

    sequence = tensor("", batch, length, width, dtype=inputs)
    return {
        "u": sequence,
        "delta": sequence,
        "A": tensor("", width, state, dtype=params),
        "B": projection("constant-B"),
        "C": projection("constant-C"),
        "D": tensor("no-D", width),
        "z": tensor("no-z", batch, length, width, dtype=inputs),
        "delta_bias": tensor("no-bias", width),
        "delta_softplus": True,
        "initial_state": tensor("no-initial", batch, width, state, dtype=params),
        "reset": torch.empty(batch, length, dtype=torch.bool, device="meta")
        if "reset" in other
        else None,
    }
