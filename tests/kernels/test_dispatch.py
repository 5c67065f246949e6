"""Choosing a backend: who is asked in which order, what is logged, what is refused."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from seqbench.kernels import dispatch
from seqbench.kernels.selective_scan import example, selective_scan

CALL = {"missing": None, "x": torch.zeros(2)}


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An op whose cpu backend refuses long inputs; triton's does not import; torch's takes all."""
    (tmp_path / "cpu.py").write_text(
        "def refuse(*, missing, x): return 'too long' if len(x) > 3 else None\n"
    )
    (tmp_path / "torch_plain.py").write_text("def refuse(**call): return None\n")
    (tmp_path / "triton.py").write_text("import no_such_module\n")
    package = ModuleType("seqbench.kernels.toy")
    package.__path__ = [str(tmp_path)]
    package.example = lambda device: CALL  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, package.__name__, package)
    monkeypatch.setattr(dispatch, "_announced", set())
    yield "toy"
    dispatch._modules.cache_clear()
    for name in [name for name in sys.modules if name.startswith(f"{package.__name__}.")]:
        del sys.modules[name]


def test_auto_takes_the_device_s_backend_and_says_so_once(
    toy: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            assert dispatch.resolve(toy, "auto", CALL)[0] == "cpu"
    assert [(r.levelname, r.message) for r in caplog.records] == [
        ("INFO", "toy: backend cpu on cpu")
    ]


def test_auto_falls_back_and_warns_once_with_the_reason(
    toy: str, caplog: pytest.LogCaptureFixture
) -> None:
    for length in (4, 5):
        call = {"missing": None, "x": torch.zeros(length)}
        assert dispatch.resolve(toy, "auto", call)[0] == "torch"
    assert [(r.levelname, r.message) for r in caplog.records] == [
        ("WARNING", "toy: backend torch on cpu (cpu: too long)")
    ]


def test_a_backend_asked_for_by_name_never_falls_back(toy: str) -> None:
    with pytest.raises(dispatch.BackendRefused, match=r"toy: backend 'cpu' refuses .* too long"):
        dispatch.resolve(toy, "cpu", {"missing": None, "x": torch.zeros(4)})


def test_backends_lists_what_runs_here_and_why_the_rest_does_not(toy: str) -> None:
    assert dispatch.backends(toy) == {
        "triton": "cannot be imported: No module named 'no_such_module'",
        "cpu": None,
        "torch": None,
    }


def test_an_unknown_backend_is_refused_with_the_valid_ones() -> None:
    call = {name: x for name, x in example("cpu").items() if x is not None}
    with pytest.raises(
        dispatch.BackendRefused, match=r"no backend 'cuda'; valid: auto, .*torch, ref"
    ):
        selective_scan(**call, backend="cuda")


def test_auto_compiles_and_records_what_ran() -> None:
    call = {name: x for name, x in example("cpu").items() if x is not None}
    torch._dynamo.reset()
    compiled = torch.compile(selective_scan, fullgraph=True, backend="aot_eager")
    dispatch.record("selective_scan", "none yet")
    assert torch.equal(compiled(**call), selective_scan(**call, backend="reference"))
    compiled(**call)
    assert dispatch.used()["selective_scan"] in ("cpu", "torch")


def test_importing_the_kernels_imports_no_backend() -> None:
    code = (
        "import sys, seqbench.kernels.selective_scan\n"
        "loaded = [m for m in sys.modules if m.startswith('seqbench.kernels.selective_scan.')]\n"
        "print(loaded, 'triton' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    loaded, _, triton = done.stdout.strip().rpartition(" ")
    assert "reference" in loaded and triton == "False", done.stderr
    assert not any(backend in loaded for backend in (".cpu", ".torch", ".triton")), loaded
