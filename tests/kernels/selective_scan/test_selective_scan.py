"""Every backend of the selective scan against the plain loop in float64, and the op's contract."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from seqbench.kernels import dispatch
from seqbench.kernels import selective_scan as package
from seqbench.kernels.selective_scan import selective_scan, selective_scan_step

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
    delta: float = 0.0  # added to every Δ's argument; -12 makes a memory of 10^5 steps

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
    arguments = (*before, case.softplus, *after)
    torch.library.opcheck(op, arguments, rtol=TOLERANCE[case.dtype], atol=TOLERANCE[case.dtype])


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


def test_trains_under_ddp(tmp_path: Any) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        torch.manual_seed(0)
        layer = Layer()
        x_BLD = torch.randn(2, 9, 4)
        layer(x_BLD).sum().backward()
        expected = [p.grad.clone() for p in layer.parameters() if p.grad is not None]
        layer.zero_grad()
        nn.parallel.DistributedDataParallel(layer)(x_BLD).sum().backward()
        assert len(expected) == 3
        for p, gradient in zip(layer.parameters(), expected):
            assert p.grad is not None and torch.equal(p.grad, gradient)
    finally:
        torch.distributed.destroy_process_group()


class Layer(nn.Module):
    """S6 of width 4 and state 2, without its projections' rank."""

    def __init__(self) -> None:
        super().__init__()
        self.projection = nn.Linear(4, 8)
        self.log_A = nn.Parameter(torch.zeros(4, 2))

    def forward(self, x_BLD: Tensor) -> Tensor:
        delta_BLD, B_BLN, C_BLN = self.projection(x_BLD).split([4, 2, 2], -1)
        y = selective_scan(x_BLD, delta_BLD, -self.log_A.exp(), B_BLN, C_BLN, delta_softplus=True)
        assert isinstance(y, Tensor)
        return y


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


def run(case: Case, inputs: dict[str, Tensor], backend: str) -> dict[str, Tensor]:
    """y, the final state and, under d_<name>, every gradient of a fixed weighting of both."""
    leaves = {
        name: x.detach().clone().requires_grad_() for name, x in inputs.items() if name != "reset"
    }
    y, final_state = selective_scan(
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
