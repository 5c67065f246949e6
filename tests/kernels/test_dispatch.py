"""Choosing a backend: who is asked in which order, what is logged, what is refused."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

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


@pytest.fixture(scope="module")
def square() -> dispatch.Operator:
    """x² as an operator."""

    @dispatch.operator("seqbench_test::square")
    def square(x: Tensor) -> Tensor:
        return x * x

    def differentiate(ctx: Any, dy: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * dy

    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    square.register_fake(torch.empty_like)
    square.register_autograd(differentiate, setup_context=setup_context)
    return square


@pytest.fixture
def seen(square: dispatch.Operator, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What reaches the custom op."""
    calls: list[Tensor] = []
    op = square.op

    def record(x: Tensor) -> Tensor:
        calls.append(x)
        result: Tensor = op(x)
        return result

    monkeypatch.setattr(square, "op", record)
    return calls


def test_a_plain_call_goes_past_the_dispatcher(
    square: dispatch.Operator, seen: list[Tensor]
) -> None:
    x = torch.tensor([3.0], requires_grad=True)
    y = square(x)
    assert torch.autograd.grad(y, x)[0].item() == 6 and square(x.detach()).item() == 9
    with torch.no_grad():
        assert not square(x).requires_grad
    (slope,) = torch.autograd.grad(square(x), x, create_graph=True)
    assert torch.autograd.grad(slope, x)[0].item() == 2
    assert not seen


def test_a_second_derivative_that_no_kernel_has_is_an_error() -> None:
    call = {name: x for name, x in example("cpu").items() if x is not None}
    u = call.pop("u").requires_grad_()
    y = selective_scan(u, **call)
    assert isinstance(y, Tensor)
    (slope,) = torch.autograd.grad(y.sum(), u, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        slope.sum().backward()


def test_whoever_watches_a_call_sees_the_custom_op(
    square: dispatch.Operator, seen: list[Tensor]
) -> None:
    x = torch.tensor([3.0])
    graph = make_fx(square)(x).graph
    assert "seqbench_test.square.default" in {str(node.target) for node in graph.nodes}
    assert len(seen) == 1
    with torch.profiler.profile():
        square(x)
    assert len(seen) == 2
    with FakeTensorMode() as mode:
        assert isinstance(square(mode.from_tensor(x)), FakeTensor)
    assert len(seen) == 3
    with pytest.raises(RuntimeError, match="functorch transforms"):  # PyTorch's own refusal
        torch.func.grad(lambda x: square(x).sum())(x)
    assert len(seen) == 4
