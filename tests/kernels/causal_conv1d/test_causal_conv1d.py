"""Every backend of the short convolution against the plain sum in float64, and the op's contract."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from seqbench.kernels import causal_conv1d as package
from seqbench.kernels import dispatch, native
from seqbench.kernels.causal_conv1d import causal_conv1d, causal_conv1d_step

# Largest error allowed, over the largest value of the tensor it is in.
TOLERANCE = {
    torch.float64: 1e-13,  # sums in another order
    torch.float32: 2e-6,  # 2^-24 of rounding, over sums of up to a few thousand terms
    torch.bfloat16: 2**-8,  # the result is rounded to 8 bits once; what comes before is float32
    torch.float16: 2**-10,  # likewise, to 11 bits
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call; `without` names the optional tensors that are left out."""

    batch: int = 2
    length: int = 70
    width: int = 5
    taps: int = 4
    dtype: torch.dtype = torch.float32
    without: tuple[str, ...] = ()
    silu: bool = True

    def __str__(self) -> str:
        shape = f"{self.batch}x{self.length}x{self.width}x{self.taps}"
        marks = [f"no-{name}" for name in self.without] + ["no-silu"] * (not self.silu)
        return "-".join([str(self.dtype).removeprefix("torch."), shape, *marks])


OPTIONAL = ("bias", "initial_state")
_base = Case()
CASES = [
    *(replace(_base, length=length) for length in (0, 1, 2, 3, 63, 64, 65, 1000)),
    *(replace(_base, taps=taps) for taps in (1, 2, 3, 5, 20, 100)),
    *(replace(_base, width=width, length=9) for width in (1, 16, 17, 64, 200)),
    replace(_base, batch=0, length=3),
    replace(_base, batch=9, length=600, width=70),
    replace(_base, taps=20, length=1400, width=3),
    *(replace(_base, without=(name,)) for name in OPTIONAL),
    replace(_base, without=OPTIONAL, silu=False),
    replace(_base, without=OPTIONAL, length=2),
    *(
        replace(case, dtype=dtype)
        for dtype in (torch.float64, torch.bfloat16, torch.float16)
        for case in (_base, replace(_base, width=70), replace(_base, length=2, without=OPTIONAL))
    ),
]


@pytest.fixture(autouse=True)
def _uninitialised_memory_is_nan(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def _places(*without: str) -> list[Any]:
    there = dispatch.names("causal_conv1d")
    places = [("cpu", name) for name in there if name not in ("triton", *without)]
    places += [("cuda", name) for name in there if name in ("triton", "torch")]
    return [
        pytest.param(pair, marks=[pytest.mark.gpu] * (pair[0] == "cuda"), id="-".join(pair))
        for pair in places
    ]


@pytest.fixture(params=_places())
def where(request: pytest.FixtureRequest) -> tuple[str, str]:
    """(device, backend), skipped where this machine cannot."""
    device, backend = request.param
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    reason = dispatch.load("causal_conv1d", backend).refuse(**package.example(device))
    if reason is not None:
        pytest.skip(reason)
    return device, backend


# For what concerns the custom op: autograd goes through the reference's sum itself.
for_op = pytest.mark.parametrize("where", _places("reference"), indirect=True)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients_equal_the_float64_sum(case: Case, where: tuple[str, str]) -> None:
    check(case, where)


@pytest.mark.parametrize("instructions", native.instruction_sets()[1:])
@pytest.mark.parametrize(
    "case",
    [
        replace(case, dtype=dtype)
        for dtype in native.DTYPES
        for case in (_base, replace(_base, taps=6, width=70), replace(_base, length=2))
    ],
    ids=str,
)
def test_every_instruction_set(case: Case, instructions: str) -> None:
    if (reason := refusal("cpu", draw(case))) is not None:
        pytest.skip(reason)
    with native.instruction_set(instructions):
        check(case, ("cpu", "cpu"))


def check(case: Case, where: tuple[str, str]) -> None:
    device, backend = where
    inputs = {name: x.to(device) for name, x in draw(case).items()}
    if (reason := refusal(backend, inputs)) is not None:
        pytest.skip(reason)
    actual = run(case, inputs, backend)
    assert dispatch.used()["causal_conv1d"] == backend
    for name, expected in oracle(case).items():
        x = actual[name]
        of = name.removeprefix("d_")
        assert x.dtype == (inputs[of].dtype if of in inputs else case.dtype), name
        assert x.shape == expected.shape and not x.isnan().any(), name
        assert error(x.cpu(), expected) <= TOLERANCE[x.dtype], name


def test_reference_is_pytorchs_own_depthwise_convolution() -> None:
    x = draw(Case(dtype=torch.float64, without=OPTIONAL, silu=False))
    expected = torch.nn.functional.conv1d(
        x["x_BLD"].mT, x["weight_DK"][:, None], groups=5, padding=3
    )
    actual = causal_conv1d(**x, backend="reference")
    torch.testing.assert_close(actual, expected.mT[:, : actual.shape[1]])


def test_gradcheck(where: tuple[str, str]) -> None:
    device, backend = where
    case = Case(batch=1, length=5, width=2, taps=3, dtype=torch.float64)
    inputs = {name: x.to(device) for name, x in draw(case).items()}
    if (reason := refusal(backend, inputs)) is not None:
        pytest.skip(reason)

    def convolve(*tensors: Tensor) -> Any:
        return causal_conv1d(
            **dict(zip(inputs, tensors)),
            activation="silu",
            return_final_state=True,
            backend=backend,
        )

    assert torch.autograd.gradcheck(convolve, [x.requires_grad_() for x in inputs.values()])


@pytest.mark.parametrize("case", [_base, Case(width=17, taps=5)], ids=str)
def test_strides_do_not_matter(where: tuple[str, str], case: Case) -> None:
    device, backend = where
    inputs = {name: x.to(device) for name, x in draw(case).items()}
    expected = run(case, inputs, backend)
    for strided in (_transposed, _one_of_many):
        leaves = {name: strided(x).requires_grad_() for name, x in inputs.items()}
        y, final_state = causal_conv1d(
            **leaves, activation="silu", return_final_state=True, backend=backend
        )
        torch.autograd.backward(
            [y, final_state], [_transposed(weights(y)), _transposed(weights(final_state))]
        )
        assert error(y, expected["y"]) < TOLERANCE[torch.float32]
        for name, x in leaves.items():
            assert x.grad is not None
            assert error(x.grad, expected[f"d_{name}"]) < TOLERANCE[torch.float32], name


def _transposed(x: Tensor) -> Tensor:
    return x.mT.contiguous().mT.detach() if x.ndim > 1 else _one_of_many(x)


def _one_of_many(x: Tensor) -> Tensor:
    """As a slice of what one projection emits."""
    return torch.cat([torch.zeros_like(x), x, x], -1)[..., x.shape[-1] : 2 * x.shape[-1]].detach()


@for_op
def test_every_gradient_alone_equals_that_of_all(where: tuple[str, str]) -> None:
    device, backend = where
    inputs = {name: x.to(device) for name, x in draw(_base).items()}
    expected = run(_base, inputs, backend)
    for name in inputs:
        leaves = {**inputs, name: inputs[name].clone().requires_grad_()}
        y, final_state = causal_conv1d(
            **leaves, activation="silu", return_final_state=True, backend=backend
        )
        torch.autograd.backward([y, final_state], [weights(y), weights(final_state)])
        gradient = leaves[name].grad
        assert gradient is not None
        assert error(gradient, expected[f"d_{name}"]) < TOLERANCE[torch.float32], name


def test_either_output_may_stay_unused(where: tuple[str, str]) -> None:
    device, backend = where
    inputs = {name: x.to(device).requires_grad_() for name, x in draw(_base).items()}
    outputs = causal_conv1d(**inputs, activation="silu", return_final_state=True, backend=backend)
    total = run(_base, inputs, backend)
    alone = [
        torch.autograd.grad(
            x, list(inputs.values()), weights(x), retain_graph=True, materialize_grads=True
        )
        for x in outputs
    ]
    for name, *parts in zip(inputs, *alone):
        assert error(sum(parts), total[f"d_{name}"]) < TOLERANCE[torch.float32], name


def test_in_pieces_it_has_the_values_and_gradients_of_the_whole(where: tuple[str, str]) -> None:
    device, backend = where
    inputs = {name: x.to(device).requires_grad_() for name, x in draw(_base).items()}
    expected = run(_base, inputs, backend)
    state, ys = inputs["initial_state"], []
    for piece in inputs["x_BLD"].split([1, 0, 2, 66, 1], 1):
        y, state = causal_conv1d(
            **{**inputs, "x_BLD": piece, "initial_state": state},
            activation="silu",
            return_final_state=True,
            backend=backend,
        )
        ys.append(y)
    y = torch.cat(ys, 1)
    torch.autograd.backward([y, state], [weights(y), weights(state)])
    assert error(y, expected["y"]) < TOLERANCE[torch.float32]
    assert torch.equal(state, expected["final_state"])
    for name, x in inputs.items():
        assert x.grad is not None
        assert error(x.grad, expected[f"d_{name}"]) < TOLERANCE[torch.float32], name


@pytest.mark.parametrize(
    "case",
    [
        Case(length=20),
        Case(length=20, taps=1),
        Case(length=20, without=OPTIONAL, silu=False),
        Case(length=20, dtype=torch.bfloat16),
    ],
    ids=str,
)
def test_steps_equal_forward(where: tuple[str, str], case: Case) -> None:
    device, backend = where
    inputs = {name: x.to(device) for name, x in draw(case).items()}
    activation: package.Activation = "silu" if case.silu else None
    y, final_state = causal_conv1d(
        **inputs, activation=activation, return_final_state=True, backend=backend
    )
    x_BLD = inputs.pop("x_BLD")
    state = inputs.pop("initial_state", torch.zeros_like(final_state))
    for t in range(case.length):
        y_BD, state = causal_conv1d_step(state, x_BLD[:, t], **inputs, activation=activation)
        assert y_BD.dtype == y.dtype
        assert error(y_BD, y[:, t]) < 2 * TOLERANCE[case.dtype]
    assert torch.equal(state, final_state)


# opcheck reads .grad of the copies it makes itself.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@for_op
@pytest.mark.parametrize(
    "case",
    [
        Case(length=7),
        Case(length=2, without=("bias",), silu=False),
        Case(length=7, without=("initial_state",), dtype=torch.bfloat16),
    ],
    ids=str,
)
def test_opcheck(where: tuple[str, str], case: Case) -> None:
    device, backend = where
    inputs = {name: x.to(device).requires_grad_() for name, x in draw(case).items()}
    arguments = (
        *(inputs.get(name) for name in ("x_BLD", "weight_DK", "bias_D")),
        "silu" if case.silu else None,
        inputs.get("initial_state"),
        backend,
    )
    op = torch.ops.seqbench.causal_conv1d.default
    torch.library.opcheck(op, arguments, rtol=TOLERANCE[case.dtype], atol=TOLERANCE[case.dtype])


@for_op
def test_compiles_without_a_graph_break_for_every_length(where: tuple[str, str]) -> None:
    device, backend = where
    torch._dynamo.reset()
    # Lowering to code is inductor's business; what a custom op can break is tracing.
    compiled = torch.compile(run_plainly, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (5, 70, 130):
        case = Case(length=length)
        inputs = {name: x.to(device) for name, x in draw(case).items()}
        leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
        expected = run(case, inputs, backend)
        y, final_state = compiled(leaves, backend)
        torch.autograd.backward([y, final_state], [weights(y), weights(final_state)])
        assert error(y, expected["y"]) < TOLERANCE[torch.float32]
        for name, x in leaves.items():
            assert x.grad is not None
            assert error(x.grad, expected[f"d_{name}"]) < TOLERANCE[torch.float32], name


def run_plainly(leaves: dict[str, Tensor], backend: str) -> Any:
    return causal_conv1d(**leaves, activation="silu", return_final_state=True, backend=backend)


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


def test_same_bits_for_any_number_of_threads() -> None:
    case = Case(batch=3, length=1100, width=70)
    if (reason := refusal("cpu", draw(case))) is not None:
        pytest.skip(reason)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            results.append(run(case, draw(case), "cpu"))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(x, result[name]) for name, x in results[0].items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight_DK": torch.zeros(4, 4)}, r"weight is \(4, 4\).* ask for \(5, 4\)"),
        ({"weight_DK": torch.zeros(5, 0)}, r"K at least 1"),
        ({"bias_D": torch.zeros(4)}, r"bias is \(4,\)"),
        ({"x_BLD": torch.zeros(70, 5)}, r"x \(70, 5\) .* must be \(B, L, D\)"),
        ({"initial_state": torch.zeros(2, 4, 5)}, r"initial_state is .* ask for \(2, 3, 5\)"),
        ({"activation": "relu"}, r"activation is 'relu'; valid: None, 'silu'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_does_not_fit_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        causal_conv1d(**{**draw(_base), **change})


def draw(case: Case) -> dict[str, Tensor]:
    """The call's tensors, the same whenever drawn."""
    generator = torch.Generator().manual_seed(case.length * 1000 + case.taps)
    params = torch.float64 if case.dtype == torch.float64 else torch.float32

    def normal(*shape: int, dtype: torch.dtype = params) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    inputs = {
        "x_BLD": normal(case.batch, case.length, case.width, dtype=case.dtype),
        "weight_DK": normal(case.width, case.taps),
        "bias_D": normal(case.width),
        "initial_state": normal(case.batch, case.taps - 1, case.width, dtype=case.dtype),
    }
    without = {"bias": "bias_D"}
    left_out = {without.get(name, name) for name in case.without}
    return {name: x for name, x in inputs.items() if name not in left_out}


def run(case: Case, inputs: dict[str, Tensor], backend: str) -> dict[str, Tensor]:
    """y, the final state and, under d_<name>, every gradient of a fixed weighting of both."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}
    y, final_state = causal_conv1d(
        **leaves,
        activation="silu" if case.silu else None,
        return_final_state=True,
        backend=backend,
    )
    assert final_state.shape == (case.batch, case.taps - 1, case.width)
    gradients = torch.autograd.grad(
        [y, final_state],
        list(leaves.values()),
        [weights(y, case.dtype), weights(final_state, case.dtype)],
        materialize_grads=True,
    )
    named = {f"d_{name}": x for name, x in zip(leaves, gradients)}
    return {"y": y.detach(), "final_state": final_state.detach(), **named}


def weights(x: Tensor, rounded_to: torch.dtype | None = None) -> Tensor:
    ramp = torch.arange(x.numel(), device=x.device, dtype=torch.float64).reshape(x.shape).cos()
    return ramp.to(rounded_to or torch.float32).to(x.dtype)


@functools.cache
def oracle(case: Case) -> dict[str, Tensor]:
    return run(case, {name: x.double() for name, x in draw(case).items()}, "reference")


def refusal(backend: str, inputs: dict[str, Tensor]) -> str | None:
    call = {
        "x": inputs["x_BLD"],
        "weight": inputs["weight_DK"],
        "bias": inputs.get("bias_D"),
        "activation": "silu",
        "initial_state": inputs.get("initial_state"),
    }
    reason: str | None = dispatch.load("causal_conv1d", backend).refuse(**call)
    return reason


def error(actual: Tensor, expected: Tensor) -> float:
    """The largest difference, over the largest expected value."""
    if expected.numel() == 0:
        return 0.0
    expected = expected.double()
    difference = (actual.double() - expected).abs().max().item()
    return difference / max(expected.abs().max().item(), 1e-30)


@pytest.mark.parametrize("taps", [1, 2, 4])
@pytest.mark.parametrize("length", [1, 2, 9])
def test_a_reset_is_a_new_sequence(taps: int, length: int) -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, length, 3), torch.randn(3, taps), torch.randn(3)
    state = torch.randn(2, taps - 1, 3)
    for at in range(length):
        reset = torch.zeros(2, length, dtype=torch.bool)
        reset[1, at] = True
        y, end = causal_conv1d(
            x,
            weight,
            bias,
            activation="silu",
            initial_state=state,
            return_final_state=True,
            reset=reset,
        )
        kept, kept_end = causal_conv1d(
            x[:1], weight, bias, activation="silu", initial_state=state[:1], return_final_state=True
        )
        before = causal_conv1d(x[1:, :at], weight, bias, activation="silu", initial_state=state[1:])
        after, after_end = causal_conv1d(
            x[1:, at:], weight, bias, activation="silu", return_final_state=True
        )
        torch.testing.assert_close(y, torch.cat([kept, torch.cat([before, after], 1)]))
        torch.testing.assert_close(end, torch.cat([kept_end, after_end]))


def test_a_reset_is_for_auto_and_reference_alone() -> None:
    x, weight = torch.randn(2, 5, 3), torch.randn(3, 4)
    reset = torch.zeros(2, 5, dtype=torch.bool)
    torch.testing.assert_close(
        causal_conv1d(x, weight, reset=reset, backend="reference"), causal_conv1d(x, weight)
    )
    with pytest.raises(dispatch.BackendRefused, match="reset is for"):
        causal_conv1d(x, weight, reset=reset, backend="torch")
    for wrong in (reset.float(), reset[:, :3]):
        with pytest.raises(ValueError, match=r"must be torch\.bool \(2, 5\)"):
            causal_conv1d(x, weight, reset=wrong)
