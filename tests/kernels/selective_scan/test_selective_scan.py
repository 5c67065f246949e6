"""Every backend of the selective scan against the plain loop in float64, and the op's contract."""

from __future__ import annotations

import functools
import math
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from seqbench.kernels import dispatch, native
from seqbench.kernels import selective_scan as package
from seqbench.kernels.selective_scan import chunked_scan, selective_scan, selective_scan_step

# Largest error allowed, over the largest value of the tensor it is in.
TOLERANCE = {
    torch.float64: 1e-11,  # sums of a few thousand terms in another order than the loop's
    torch.float32: 2e-5,  # 2^-24 of rounding, over recurrences and sums of up to a thousand terms
    torch.bfloat16: 2**-8,  # the result is rounded to 8 bits once; what comes before is float32
    torch.float16: 2**-10,  # likewise, to 11 bits, and inputs reach the bottom of its range
}
LONG_MEMORY_TOLERANCE = 1e-4  # float32 sums over 4096 steps, nothing of which decays away


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call; `without` names the optional tensors that are left out."""

    batch: int = 2
    length: int = 65
    width: int = 5
    state: int = 4
    dtype: torch.dtype = torch.float32
    complex: bool = False
    selective: str = "BC"
    without: tuple[str, ...] = ("reset",)
    softplus: bool = True
    delta: float = 0.0  # added to every Δ's argument: -12 makes a memory of 10^5 steps, 50 none

    def __str__(self) -> str:
        shape = f"{self.batch}x{self.length}x{self.width}x{self.state}"
        marks = ["complex"] * self.complex + [f"selective-{self.selective}"] * (
            self.selective != "BC"
        )
        marks += [f"no-{name}" for name in self.without if name != "reset"]
        marks += ["reset"] * ("reset" not in self.without) + ["no-softplus"] * (not self.softplus)
        marks += [f"delta{self.delta:+g}"] * (self.delta != 0)
        return "-".join([str(self.dtype).removeprefix("torch."), shape, *marks])


OPTIONAL = ("D", "z", "delta_bias", "initial_state", "reset")
_base = Case()
_shapes = [
    *(replace(_base, length=length) for length in (0, 1, 63, 64, 65, 1000)),
    *(replace(_base, width=19, state=state) for state in (1, 4, 16, 33)),
    replace(_base, batch=1, length=130, width=70, state=16),
    replace(_base, batch=3, length=17, width=16, state=256),
    replace(_base, batch=0, length=3),
]
_options = [
    *(replace(_base, width=17, selective=which) for which in ("", "B", "C")),
    *(replace(_base, without=(name, "reset")) for name in OPTIONAL[:-1]),
    replace(_base, without=OPTIONAL),
    replace(_base, softplus=False),
    replace(_base, without=()),
    replace(_base, without=(), length=1000, width=17),
    replace(_base, without=("initial_state",), selective="", length=1),
]
_complex = [
    replace(case, complex=True)
    for case in (*_options, *(replace(_base, length=length) for length in (0, 1, 64, 1000)))
]
CASES = [
    *_shapes,
    *_options,
    *_complex,
    *(
        replace(case, dtype=dtype)
        for dtype in (torch.float64, torch.bfloat16, torch.float16)
        for case in (
            _base,
            replace(_base, length=130, width=17, state=16, without=()),
            replace(_base, selective="", without=OPTIONAL),
            replace(_base, length=0),
            replace(_base, complex=True, without=()),
        )
    ),
    replace(
        _base,
        batch=1,
        length=4096,
        width=17,
        delta=-12,
    ),
    replace(_base, batch=1, length=4096, width=3, delta=-12, complex=True),
    replace(_base, delta=50),
    replace(_base, delta=300, complex=True),
]


@pytest.fixture(autouse=True)
def _uninitialised_memory_is_nan(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


_devices = [("cpu", name) for name in dispatch.names() if name != "triton"]
_devices += [("cuda", name) for name in dispatch.names() if name not in ("cpu", "reference")]


def _places(*without: str) -> list[Any]:
    devices = [("cpu", name) for name in dispatch.names() if name not in ("triton", *without)]
    devices += [("cuda", name) for name in dispatch.names() if name in ("triton", "torch")]
    return [
        pytest.param(pair, marks=[pytest.mark.gpu] * (pair[0] == "cuda"), id="-".join(pair))
        for pair in devices
    ]


@pytest.fixture(params=_places())
def where(request: pytest.FixtureRequest) -> tuple[str, str]:
    """(device, backend), skipped where this machine cannot."""
    device, backend = request.param
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    reason = dispatch.load("selective_scan", backend).refuse(**package.example(device))
    if reason is not None:
        pytest.skip(reason)
    return device, backend


# For what concerns the custom op: autograd goes through the reference's loop itself.
for_op = pytest.mark.parametrize("where", _places("reference"), indirect=True)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients_equal_the_float64_loop(case: Case, where: tuple[str, str]) -> None:
    device, backend = where
    inputs = {name: x.to(device) for name, x in draw(case).items()}
    reason = refusal(backend, inputs)
    if reason is not None:
        pytest.skip(reason)
    actual = run(case, inputs, backend)
    assert dispatch.used()["selective_scan"] == backend
    for name, expected in oracle(case).items():
        x = actual[name]
        if name in ("y", *inputs):
            assert x.dtype == (case.dtype if name == "y" else inputs[name].dtype), name
        assert x.shape == expected.shape and not x.isnan().any(), name
        tolerance = LONG_MEMORY_TOLERANCE if case.delta else TOLERANCE[x.real.dtype]
        assert error(x.cpu(), expected) <= tolerance, name


def test_reference_equals_the_sum_over_all_earlier_steps() -> None:
    case = Case(length=20, dtype=torch.float64, complex=True, without=OPTIONAL, softplus=False)
    x = draw(case)
    elapsed_BLD = x["delta"].cumsum(1)
    y_BLD = torch.zeros_like(x["u"])
    for t in range(case.length):
        for s in range(t + 1):
            decay_BDN = torch.exp((elapsed_BLD[:, t] - elapsed_BLD[:, s])[..., None] * x["A"])
            CB_BDN = decay_BDN * (x["C"][:, t] * x["B"][:, s])[:, None]
            y_BLD[:, t] += 2 * CB_BDN.sum(-1).real * x["delta"][:, s] * x["u"][:, s]
    torch.testing.assert_close(selective_scan(**x, backend="reference"), y_BLD)


@pytest.mark.parametrize("complex", [False, True], ids=["real", "complex"])
@pytest.mark.parametrize("selective", ["BC", ""], ids=["selective", "constant"])
def test_gradcheck(where: tuple[str, str], complex: bool, selective: str) -> None:
    device, backend = where
    case = Case(
        batch=1, length=4, width=2, state=2, dtype=torch.float64, complex=complex,
        selective=selective, without=(),
    )  # fmt: skip
    inputs = {name: x.to(device) for name, x in draw(case).items()}
    if (reason := refusal(backend, inputs)) is not None:
        pytest.skip(reason)
    names = [name for name in inputs if name != "reset"]

    def scan(*tensors: Tensor) -> Any:
        return selective_scan(
            **dict(zip(names, tensors)),
            reset=torch.tensor([[False, False, True, False]], device=device),
            delta_softplus=True,
            return_final_state=True,
            backend=backend,
        )

    assert torch.autograd.gradcheck(scan, [inputs[name].requires_grad_() for name in names])


@pytest.mark.parametrize("case", [_base, Case(width=17, without=())], ids=str)
def test_strides_do_not_matter(where: tuple[str, str], case: Case) -> None:
    device, backend = where
    inputs = {name: x.to(device) for name, x in draw(case).items()}
    expected = run(case, inputs, backend)
    for strided in (_transposed, _every_other, _one_of_many):
        leaves = {
            name: strided(x).requires_grad_(x.dtype != torch.bool) for name, x in inputs.items()
        }
        y, final_state = selective_scan(
            **leaves, delta_softplus=True, return_final_state=True, backend=backend
        )
        torch.autograd.backward(
            [y, final_state], [_transposed(weights(y)), _transposed(weights(final_state))]
        )
        assert error(y, expected["y"]) < TOLERANCE[torch.float32]
        for name, x in leaves.items():
            if name != "reset":
                assert x.grad is not None
                assert error(x.grad, expected[f"d_{name}"]) < TOLERANCE[torch.float32], name


def _transposed(x: Tensor) -> Tensor:
    return x.mT.contiguous().mT.detach() if x.ndim > 1 else _every_other(x)


def _every_other(x: Tensor) -> Tensor:
    return torch.stack([x, torch.zeros_like(x)], -1).flatten(-2)[..., ::2].detach()


def _one_of_many(x: Tensor) -> Tensor:
    """As a slice of what one projection emits."""
    return torch.cat([torch.zeros_like(x), x, x], -1)[..., x.shape[-1] : 2 * x.shape[-1]].detach()


@for_op
def test_every_gradient_alone_equals_that_of_all(where: tuple[str, str]) -> None:
    device, backend = where
    case = Case(without=())
    inputs = {name: x.to(device) for name, x in draw(case).items()}
    expected = run(case, inputs, backend)
    for name in inputs:
        if name == "reset":
            continue
        leaves = {**inputs, name: inputs[name].clone().requires_grad_()}
        y, final_state = selective_scan(
            **leaves, delta_softplus=True, return_final_state=True, backend=backend
        )
        torch.autograd.backward([y, final_state], [weights(y), weights(final_state)])
        gradient = leaves[name].grad
        assert gradient is not None
        assert error(gradient, expected[f"d_{name}"]) < TOLERANCE[torch.float32], name


def test_either_output_may_stay_unused(where: tuple[str, str]) -> None:
    device, backend = where
    case = Case()
    inputs = {name: x.to(device).requires_grad_() for name, x in draw(case).items()}
    outputs = selective_scan(
        **inputs, delta_softplus=True, return_final_state=True, backend=backend
    )
    total = run(case, inputs, backend)
    alone = [
        torch.autograd.grad(
            x, list(inputs.values()), weights(x), retain_graph=True, materialize_grads=True
        )
        for x in outputs
    ]
    for name, *parts in zip(inputs, *alone):
        assert error(sum(parts), total[f"d_{name}"]) < TOLERANCE[torch.float32], name


def test_a_scan_in_pieces_has_the_gradients_of_the_whole(where: tuple[str, str]) -> None:
    device, backend = where
    case = Case(length=130, without=())
    inputs = {name: x.to(device).requires_grad_(name != "reset") for name, x in draw(case).items()}
    expected = run(case, inputs, backend)
    state, ys = inputs["initial_state"], []
    for first, last in ((0, 1), (1, 1), (1, 64), (64, 130)):
        piece = {
            name: x[:, first:last] if name in ("u", "delta", "B", "C", "z", "reset") else x
            for name, x in inputs.items()
        }
        piece["initial_state"] = state
        y, state = selective_scan(
            **piece, delta_softplus=True, return_final_state=True, backend=backend
        )
        ys.append(y)
    y = torch.cat(ys, 1)
    torch.autograd.backward([y, state], [weights(y), weights(state)])
    assert error(y, expected["y"]) < TOLERANCE[torch.float32]
    assert error(state, expected["final_state"]) < TOLERANCE[torch.float32]
    for name, x in inputs.items():
        if name != "reset":
            assert x.grad is not None
            assert error(x.grad, expected[f"d_{name}"]) < TOLERANCE[torch.float32], name


@pytest.mark.parametrize(
    "case",
    [
        Case(length=20),
        Case(length=20, complex=True),
        Case(length=20, complex=True, selective=""),
        Case(length=20, without=OPTIONAL, softplus=False),
        Case(length=20, dtype=torch.bfloat16),
    ],
    ids=str,
)
def test_steps_equal_forward(where: tuple[str, str], case: Case) -> None:
    device, backend = where
    inputs = {name: x.to(device) for name, x in draw(case).items()}
    if (reason := refusal(backend, inputs)) is not None:
        pytest.skip(reason)
    y, final_state = selective_scan(
        **inputs, delta_softplus=case.softplus, return_final_state=True, backend=backend
    )
    state = inputs.pop("initial_state", torch.zeros_like(final_state))
    for t in range(case.length):
        now = {
            name: x[:, t] if name in "u delta z" or x.ndim == 3 else x for name, x in inputs.items()
        }
        y_BD, state = selective_scan_step(state, **now, delta_softplus=case.softplus)
        assert y_BD.dtype == y.dtype
        assert error(y_BD, y[:, t]) < 2 * TOLERANCE[case.dtype]
    assert error(state, final_state) < TOLERANCE[torch.float32]


def test_a_step_that_could_be_read_two_ways_is_refused() -> None:
    inputs = draw(Case(batch=4, width=4, length=1, selective="B"))
    state = inputs.pop("initial_state")
    B_BN, C_DN = inputs.pop("B")[:, 0], inputs.pop("C")
    now = {name: x[:, 0] if x.ndim == 3 else x for name, x in inputs.items()}
    with pytest.raises(ValueError, match=r"B\[:, None\] \(selective\) or B\[None\] \(constant\)"):
        selective_scan_step(state, B=B_BN, C=C_DN[None], **now, delta_softplus=True)
    y_BD, _ = selective_scan_step(state, B=B_BN[:, None], C=C_DN[None], **now, delta_softplus=True)
    y_BLD = selective_scan(
        **draw(Case(batch=4, width=4, length=1, selective="B")), delta_softplus=True
    )
    assert error(y_BD, y_BLD[:, 0]) < TOLERANCE[torch.float32]


# opcheck reads .grad of the copies it makes itself.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@for_op
@pytest.mark.parametrize(
    "case",
    [
        Case(length=7, width=3, state=2),
        Case(length=66, width=3, state=2, without=(), complex=True),
        Case(length=7, width=3, state=2, without=OPTIONAL, selective=""),
        Case(length=7, width=3, state=2, without=("z",), dtype=torch.bfloat16),
    ],
    ids=str,
)
def test_opcheck(where: tuple[str, str], case: Case) -> None:
    device, backend = where
    inputs = {name: x.to(device) for name, x in draw(case).items()}
    if (reason := refusal(backend, inputs)) is not None:
        pytest.skip(reason)
    for name, x in inputs.items():
        x.requires_grad_(name in ("u", "A", "C", "initial_state"))
    before = [inputs.get(name) for name in ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")]
    after = [inputs.get("initial_state"), inputs.get("reset"), backend]
    op = torch.ops.seqbench.selective_scan.default
    tolerance = TOLERANCE[case.dtype]
    keep = (*before, case.softplus, *after, True)
    torch.library.opcheck(op, keep, rtol=tolerance, atol=tolerance)
    alone = tuple(x.detach() if isinstance(x, Tensor) else x for x in keep[:-1])
    torch.library.opcheck(op, (*alone, False), rtol=tolerance, atol=tolerance)
    assert op(*alone, False)[2].numel() == 0 < op(*alone, True)[2].numel()


@for_op
def test_compiles_without_a_graph_break_for_every_length(where: tuple[str, str]) -> None:
    device, backend = where
    torch._dynamo.reset()
    # Lowering to code is inductor's business; what a custom op can break is tracing.
    compiled = torch.compile(run_plainly, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (5, 70, 130):
        case = Case(length=length, without=())
        inputs = {name: x.to(device) for name, x in draw(case).items()}
        leaves = {name: x.clone().requires_grad_(name != "reset") for name, x in inputs.items()}
        expected = run(case, inputs, backend)
        y, final_state = compiled(leaves, backend)
        torch.autograd.backward([y, final_state], [weights(y), weights(final_state)])
        assert error(y, expected["y"]) < TOLERANCE[torch.float32]
        for name, x in leaves.items():
            if name != "reset":
                assert x.grad is not None
                assert error(x.grad, expected[f"d_{name}"]) < TOLERANCE[torch.float32], name


def run_plainly(leaves: dict[str, Tensor], backend: str) -> Any:
    return selective_scan(**leaves, delta_softplus=True, return_final_state=True, backend=backend)


@for_op
def test_autocast_changes_no_result(where: tuple[str, str]) -> None:
    device, backend = where
    case = Case(dtype=torch.bfloat16)
    inputs = {name: x.to(device) for name, x in draw(case).items()}
    expected = run(case, inputs, backend)
    with torch.autocast(device, dtype=torch.bfloat16):
        actual = run(case, inputs, backend)
    for name, x in expected.items():
        assert x.dtype == actual[name].dtype and torch.equal(x, actual[name]), name


def test_inputs_of_mixed_precision_are_promoted(where: tuple[str, str]) -> None:
    """Under autocast u comes from a matrix product in bfloat16, delta perhaps from a float32 op."""
    device, backend = where
    inputs = {name: x.to(device) for name, x in draw(Case(without=OPTIONAL)).items()}
    y = selective_scan(**{**inputs, "u": inputs["u"].bfloat16()}, backend=backend)
    expected = selective_scan(**{**inputs, "u": inputs["u"].bfloat16().float()}, backend=backend)
    assert y.dtype == torch.bfloat16 and torch.equal(y, expected.bfloat16())


def test_same_bits_twice(where: tuple[str, str]) -> None:
    device, backend = where
    case = Case(batch=3, length=300, width=33, state=16, without=())
    inputs = {name: x.to(device) for name, x in draw(case).items()}
    first, second = run(case, inputs, backend), run(case, inputs, backend)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_two_ddp_processes_have_the_gradients_of_one(tmp_path: Path) -> None:
    worker = Path(__file__).with_name("ddp_worker.py")
    outs = [tmp_path / f"gradients-{rank}" for rank in (0, 1)]
    processes = [
        subprocess.Popen([sys.executable, "-P", worker, str(rank), tmp_path / "store", out])
        for rank, out in enumerate(outs)
    ]
    assert [process.wait(timeout=300) for process in processes] == [0, 0]
    layer, x_BLD = runpy.run_path(str(worker))["layer_and_input"]()
    layer(x_BLD).sum().backward()
    for out in outs:
        for p, gradient in zip(layer.parameters(), torch.load(out), strict=True):
            # DDP averages over the processes; this loss is a sum.
            assert error(2 * gradient, p.grad) < TOLERANCE[torch.float32]


_ON_CPU = [
    Case(width=19, state=33, without=()),
    Case(width=33, length=70, state=16, without=("reset", "z")),
    Case(width=19, state=3, selective="", without=()),
    Case(width=19, state=3, selective="C", without=("z",), dtype=torch.bfloat16),
    Case(width=33, state=5, selective="B", without=("z",), dtype=torch.float16),
    Case(width=5, length=4096, batch=1, delta=-12),
    Case(width=19, delta=50),
    Case(width=19, state=3, complex=True, without=()),
    Case(width=19, state=3, complex=True, selective="", dtype=torch.float64),
    Case(width=19, state=3, without=(), dtype=torch.float64),
]


@pytest.mark.parametrize("case", _ON_CPU, ids=str)
@pytest.mark.parametrize("instructions", native.instruction_sets())
def test_every_instruction_set_equals_the_float64_loop(instructions: str, case: Case) -> None:
    with native.instruction_set(instructions):
        actual = run(case, draw(case), "cpu")
    for name, expected in oracle(case).items():
        tolerance = LONG_MEMORY_TOLERANCE if case.delta else TOLERANCE[actual[name].real.dtype]
        assert error(actual[name], expected) <= tolerance, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("instructions", native.instruction_sets())
def test_a_decay_is_as_exact_as_its_step(instructions: str, dtype: torch.dtype) -> None:
    """Of a step rounded to 16 bits the exponential is one of 1 + 1.5e-5 times that step."""
    width = 4096
    step = torch.logspace(-4, 1, width).to(dtype)
    one, nothing = torch.ones(width, 1), torch.zeros(1, 1, 1, dtype=dtype)
    with native.instruction_set(instructions):
        result = selective_scan(
            nothing.expand(1, 1, width), step.expand(1, 1, width), -one, nothing, nothing,
            initial_state=one[None], return_final_state=True, backend="cpu",
        )  # fmt: skip
    exact = torch.exp(-step.double())
    missed = (result[1].flatten() - exact).abs() / exact
    share = 1.6e-5 if dtype != torch.float32 else 1.2e-7
    assert (missed <= share * step.double() + 2.4e-7).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("instructions", native.instruction_sets())
def test_the_vectors_beside_a_large_step_keep_their_bits(
    instructions: str, dtype: torch.dtype
) -> None:
    """A chunk with one Δ A far below 2^-126 takes another path through the exponential."""
    case = Case(
        batch=1, length=32, width=16, state=4, without=OPTIONAL, softplus=False, dtype=dtype
    )
    inputs = draw(case)
    with native.instruction_set(instructions):
        y = selective_scan(**inputs, backend="cpu")
        inputs["delta"][0, -1, 0] = 1e4
        y_large = selective_scan(**inputs, backend="cpu")
    assert torch.equal(y[0, :, 1:], y_large[0, :, 1:]) and torch.equal(y[0, :-1], y_large[0, :-1])


def test_a_million_steps_sum_a_geometric_series(where: tuple[str, str]) -> None:
    device, backend = where
    if backend == "reference":
        pytest.skip("a loop of a million steps takes a minute")
    length, step = 10**6, 1e-3
    one = torch.ones(1, 1, device=device)
    u = torch.ones(1, length, 1, device=device, requires_grad=True)
    y = selective_scan(u, step * torch.ones_like(u), -one, one, one, backend=backend)
    ratio = math.exp(-torch.tensor(step).double().item())
    powers = ratio ** torch.arange(1, length + 1, device=device, dtype=torch.float64)
    expected = (step * (1 - powers) / (1 - ratio))[None, :, None]
    assert error(y, expected) < LONG_MEMORY_TOLERANCE
    assert error(torch.autograd.grad(y.sum(), u)[0], expected.flip(1)) < LONG_MEMORY_TOLERANCE


@pytest.mark.parametrize("complex", [False, True], ids=["real", "complex"])
def test_no_bit_depends_on_the_number_of_threads(complex: bool) -> None:
    case = Case(batch=2, length=130, width=300, state=5, without=(), complex=complex)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            assert native.Team.current().threads == threads
            results.append(run(case, draw(case), "cpu"))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(x, other[name]) for name, x in results[0].items())


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads in /proc")
def test_the_scan_starts_no_more_threads_than_asked() -> None:
    code = (
        "import os, torch; from seqbench.kernels.selective_scan import example, selective_scan\n"
        "torch.set_num_threads(1)\n"
        "call = {name: x for name, x in example('cpu').items() if x is not None}\n"
        "count = lambda: len(os.listdir('/proc/self/task'))\n"
        "call['u'] = call['delta'] = torch.zeros(8, 2, 4); call['B'] = call['C'] = call['A']\n"
        "before = count(); selective_scan(**call, backend='cpu'); one = count() - before\n"
        "torch.set_num_threads(3); selective_scan(**call, backend='cpu')\n"
        "print(one, count() - before)"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert done.stdout == "0 2\n", done.stdout + done.stderr


# Python 3.12 warns of any fork of a process with threads, which is what is tested here.
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_child_scans_with_threads_of_its_own() -> None:
    case = Case(without=())
    inputs = draw(case)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with torch.no_grad():
            expected = selective_scan(**inputs, backend="cpu")  # PyTorch's pool has threads now
            child = os.fork()
            if child == 0:
                equal = torch.equal(selective_scan(**inputs, backend="cpu"), expected)
                os._exit(0 if equal else 1)
    finally:
        torch.set_num_threads(before)
    deadline = time.monotonic() + 60
    while (ended := os.waitpid(child, os.WNOHANG))[0] == 0 and time.monotonic() < deadline:
        time.sleep(0.01)
    if ended[0] == 0:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert ended == (child, 0)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_dataloader_workers_scan() -> None:
    expected = torch.stack([Scans()[i] for i in range(4)])
    loader = torch.utils.data.DataLoader(Scans(), batch_size=2, num_workers=2, timeout=60)
    assert torch.equal(torch.cat(list(loader)), expected)


class Scans(torch.utils.data.Dataset[Tensor]):
    """Of four different lengths, the last output of each."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Tensor:
        y = selective_scan(**draw(Case(length=60 + index)), backend="cpu")
        assert isinstance(y, Tensor)
        return y[:, -1]


def test_memory_not_yet_written_is_nan_in_these_tests() -> None:
    for count in (8, 2**20):
        assert torch.empty(count).isnan().all() and native.empty((count,)).isnan().all()


@pytest.mark.parametrize(
    "case",
    [
        Case(length=130, without=()),
        Case(length=130, selective="", without=("z", "reset")),
        Case(length=130, selective="B", without=OPTIONAL, complex=True),
        Case(length=130, dtype=torch.bfloat16),
    ],
    ids=str,
)
@pytest.mark.parametrize("segment", [1, 50, 64, 130])
def test_chunked_scan_has_values_and_gradients_of_the_whole(
    where: tuple[str, str], case: Case, segment: int
) -> None:
    device, backend = where
    if segment == 1 and backend != "cpu":
        pytest.skip("130 calls; the segments are cut above the backends")
    inputs = {name: x.to(device) for name, x in draw(case).items()}
    expected = run(case, inputs, backend)
    actual = run(case, inputs, backend, scan=functools.partial(chunked_scan, segment=segment))
    for name, x in expected.items():
        assert x.dtype == actual[name].dtype and x.shape == actual[name].shape
        assert error(actual[name], x) <= TOLERANCE[x.real.dtype], name


def test_chunked_scan_differentiates_only_what_asks() -> None:
    inputs = draw(Case(length=20, without=()))
    inputs["A"].requires_grad_()
    y, state = chunked_scan(**inputs, segment=7, return_final_state=True)
    for output in (y, state):  # either may stay unused
        (dA,) = torch.autograd.grad(output.sum(), inputs["A"], retain_graph=True)
        whole = selective_scan(**inputs, return_final_state=True)[output is state]
        expected = torch.autograd.grad(whole.sum(), inputs["A"])[0]
        assert error(dA, expected) < TOLERANCE[torch.float32]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads peaks in /proc")
def test_chunked_scan_needs_the_same_memory_for_every_length() -> None:
    """Beside inputs, outputs and gradients: four times the length, for which the checkpoints of the
    whole would take 48 MB more. The first call pays for what the process allocates once."""
    code = (
        "import ctypes, torch; from seqbench.kernels.selective_scan import chunked_scan\n"
        "def status(key):\n"
        "    lines = open('/proc/self/status').read().splitlines()\n"
        "    return next(int(x.split()[1]) for x in lines if x.startswith(key)) / 1024\n"
        "def extra(length, width=16, state=64):\n"
        "    u, delta = (torch.rand(1, length, width).requires_grad_() for _ in 'ud')\n"
        "    A, B, C = (-torch.rand(width, state) for _ in 'ABC')\n"
        "    dy = torch.ones_like(u)\n"
        "    ctypes.CDLL(None).malloc_trim(0)\n"
        "    open('/proc/self/clear_refs', 'w').write('5')\n"
        "    before = status('VmRSS')\n"
        "    y = chunked_scan(u, delta, A, B, C, segment=2048, backend='cpu')\n"
        "    found = torch.autograd.grad(y, [u, delta], dy)\n"
        "    results = sum(x.nbytes for x in (y, *found)) / 2**20\n"
        "    return status('VmHWM') - before - results\n"
        "print(*(extra(2**n) for n in (12, 17, 19)))"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    _, shorter, longer = map(float, done.stdout.split())
    assert longer < shorter + 32, done.stdout


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"delta": torch.zeros(2, 65, 4)}, r"delta is \(2, 65, 4\).* ask for \(2, 65, 5\)"),
        ({"B": torch.zeros(2, 65, 5)}, r"B is .* ask for \(2, 65, 4\) or \(5, 4\)"),
        ({"u": torch.zeros(65, 5)}, r"u \(65, 5\) .* must be \(B, L, D\)"),
        ({"C": torch.zeros(5, 4, dtype=torch.complex64)}, "both complex or both real"),
        ({"reset": torch.zeros(2, 65)}, r"reset is torch.float32; it must be torch.bool"),
        ({"initial_state": torch.zeros(5, 4)}, r"initial_state is \(5, 4\)"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_does_not_fit_is_named(change: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        selective_scan(**{**draw(Case()), **change})


def draw(case: Case) -> dict[str, Tensor]:
    """The call's tensors, the same whenever drawn; with resets at a quarter of the steps."""
    generator = torch.Generator().manual_seed(case.length * 1000 + case.state)
    batch, length, width, state = case.batch, case.length, case.width, case.state

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    def maybe_complex(*shape: int, dtype: torch.dtype) -> Tensor:
        if not case.complex:
            return normal(*shape, dtype=dtype)
        return torch.complex(normal(*shape, dtype=params), normal(*shape, dtype=params))

    params = torch.float64 if case.dtype == torch.float64 else torch.float32
    sequence = functools.partial(normal, batch, length, width, dtype=case.dtype)
    A = -0.1 - normal(width, state, dtype=params).abs()
    inputs = {
        "u": sequence(),
        "delta": sequence() + case.delta if case.softplus else sequence().abs(),
        "A": torch.complex(A, normal(width, state, dtype=params)) if case.complex else A,
        **{
            name: maybe_complex(batch, length, state, dtype=case.dtype)
            if name in case.selective
            else maybe_complex(width, state, dtype=params)
            for name in "BC"
        },
        "D": normal(width, dtype=params),
        "z": sequence(),
        "delta_bias": normal(width, dtype=params).abs(),
        "initial_state": maybe_complex(batch, width, state, dtype=params),
        "reset": torch.rand(batch, length, generator=generator) < 0.25,
    }
    inputs["reset"][:, :1] = case.length > 1
    return {name: x for name, x in inputs.items() if name not in case.without}


def run(
    case: Case,
    inputs: dict[str, Tensor],
    backend: str,
    scan: Callable[..., Any] = selective_scan,
) -> dict[str, Tensor]:
    """y, the final state and, under d_<name>, every gradient of a fixed weighting of both."""
    leaves = {
        name: x.detach().clone().requires_grad_() for name, x in inputs.items() if name != "reset"
    }
    y, final_state = scan(
        **leaves,
        reset=inputs.get("reset"),
        delta_softplus=case.softplus,
        return_final_state=True,
        backend=backend,
    )
    assert final_state.shape == (case.batch, case.width, case.state)
    gradients = torch.autograd.grad(
        [y, final_state],
        list(leaves.values()),
        [weights(y, case.dtype), weights(final_state)],
        materialize_grads=True,
    )
    named = {f"d_{name}": x for name, x in zip(leaves, gradients)}
    return {"y": y.detach(), "final_state": final_state.detach(), **named}


def weights(x: Tensor, rounded_to: torch.dtype | None = None) -> Tensor:
    ramp = torch.arange(x.numel(), device=x.device, dtype=torch.float64).reshape(x.shape).cos()
    return ramp.to(rounded_to or torch.float32).to(x.dtype)


@functools.cache
def oracle(case: Case) -> dict[str, Tensor]:
    double = {
        name: x
        if x.dtype == torch.bool
        else x.to(torch.complex128 if x.is_complex() else torch.float64)
        for name, x in draw(case).items()
    }
    return run(case, double, "reference")


def refusal(backend: str, inputs: dict[str, Tensor]) -> str | None:
    call = {**dict.fromkeys(OPTIONAL), **inputs}
    reason: str | None = dispatch.load("selective_scan", backend).refuse(**call)
    return reason


def error(actual: Tensor, expected: Tensor) -> float:
    if not expected.numel():
        return 0.0
    scale = expected.abs().max().item()
    distance = (actual.to(expected.dtype) - expected).abs().max().item()
    return distance / scale if scale else distance
