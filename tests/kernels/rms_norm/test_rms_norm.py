"""Every backend of RMSNorm against its formula in float64, and the op's contract."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from seqbench.kernels import dispatch, native
from seqbench.kernels.rms_norm import RMSNorm, rms_norm

EPS = 1e-5
# Largest error allowed, over the largest value of the tensor it is in: see the scan's table.
TOLERANCE = {
    torch.float64: 1e-13,
    torch.float32: 2e-6,
    torch.bfloat16: 2**-8,
    torch.float16: 2**-10,
}
SHAPES = [(5,), (0, 4), (3, 0, 4), (2, 3, 3), (1, 16), (7, 100), (2, 300, 64), (3, 17)]
BACKENDS = [name for name in dispatch.names("rms_norm") if name != "triton"]


@pytest.fixture(autouse=True)
def _uninitialised_memory_is_nan(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    reason = dispatch.backends("rms_norm")[name]
    if reason is not None:
        pytest.skip(reason)
    return name


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients_are_the_formulas(
    shape: tuple[int, ...], dtype: torch.dtype, backend: str
) -> None:
    if backend == "cpu" and dtype not in native.DTYPES:
        pytest.skip("the C++ takes no float64")
    check(shape, dtype, backend)


@pytest.mark.parametrize("instructions", native.instruction_sets()[1:])
@pytest.mark.parametrize("dtype", native.DTYPES, ids=str)
def test_every_instruction_set(instructions: str, dtype: torch.dtype) -> None:
    with native.instruction_set(instructions):
        if (reason := dispatch.backends("rms_norm")["cpu"]) is not None:
            pytest.skip(reason)
        for shape in SHAPES:
            check(shape, dtype, "cpu")


def check(shape: tuple[int, ...], dtype: torch.dtype, backend: str) -> None:
    x, weight, dy = draw(shape, dtype)
    actual = run(x, weight, dy, backend)
    expected = run(x.double(), weight.double(), dy.double(), "reference")
    for one, other in zip(actual, expected):
        assert not one.isnan().any() and one.shape == other.shape
        scale = other.abs().max().item() if other.numel() else 1.0
        tolerance = max(TOLERANCE[one.dtype] * scale, 1e-30)
        torch.testing.assert_close(one.double(), other, rtol=0, atol=tolerance)
    assert [one.dtype for one in actual] == [dtype, dtype, weight.dtype]


def test_the_module_is_pytorchs(backend: str) -> None:
    x, _, dy = draw((4, 24), torch.float32)
    theirs, ours = nn.RMSNorm(24, eps=EPS), RMSNorm(24, EPS)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    for module, leaf in zip((theirs, ours), leaves):
        module(leaf).backward(dy)
    torch.testing.assert_close(leaves[1].grad, leaves[0].grad)
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x))


def test_strides_do_not_matter(backend: str) -> None:
    x, weight, dy = draw((6, 40), torch.float32)
    expected = run(x, weight, dy, backend)
    strided = [t.mT.contiguous().mT for t in (x, dy)]
    for one, other in zip(run(strided[0], weight, strided[1], backend), expected):
        torch.testing.assert_close(one, other)
    expanded = torch.ones(()).expand(6, 40)
    for one, other in zip(
        run(x, weight, expanded, backend), run(x, weight, expanded.contiguous(), backend)
    ):
        torch.testing.assert_close(one, other)


def test_same_bits_for_any_number_of_threads() -> None:
    if (reason := dispatch.backends("rms_norm")["cpu"]) is not None:
        pytest.skip(reason)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run(*draw((2000, 20), torch.float32), "cpu"))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(result, results[0]))


# opcheck reads .grad of the copies it makes itself.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("name", [name for name in BACKENDS if name != "reference"])
def test_opcheck(name: str) -> None:
    if (reason := dispatch.backends("rms_norm")[name]) is not None:
        pytest.skip(reason)
    x, weight, _ = draw((3, 5), torch.float32)
    arguments = (x.requires_grad_(), weight.requires_grad_(), EPS, name)
    torch.library.opcheck(torch.ops.seqbench.rms_norm.default, arguments)


def test_compiles_without_a_graph_break() -> None:
    torch._dynamo.reset()
    norm = RMSNorm(8, EPS)
    compiled = torch.compile(norm, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (3, 5):
        x, _, _ = draw((rows, 8), torch.float32)
        torch.testing.assert_close(compiled(x), norm(x))


def test_a_weight_that_does_not_fit_is_named() -> None:
    with pytest.raises(ValueError, match=r"weight is \(4,\); x \(2, 5\)"):
        rms_norm(torch.zeros(2, 5), torch.zeros(4), EPS)


def draw(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(len(shape))
    params = torch.promote_types(dtype, torch.float32)
    x, dy = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    return x, torch.randn(shape[-1], generator=generator).to(params), dy


def run(x: Tensor, weight: Tensor, dy: Tensor, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """y, dx and dweight."""
    x, weight = x.detach().requires_grad_(), weight.detach().clone().requires_grad_()
    y = rms_norm(x, weight, EPS, backend=backend)
    assert dispatch.used()["rms_norm"] == backend
    dx, dweight = torch.autograd.grad(y, (x, weight), dy)
    return y.detach(), dx, dweight
