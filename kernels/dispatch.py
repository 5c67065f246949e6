"""Which backend runs a kernel: each may refuse a call, and `auto` takes one that does not.

An op is a package beside this file; its backends are the modules in it named `reference`, `cpu`,
`triton`, or `torch_<how>`, found by file and imported when first asked for. Each exposes
`refuse(**call) -> str | None`, which looks at devices, dtypes and shapes only: it is also asked
about torch.compile's fake tensors. Each package exposes `example(device)`, a small call.

`operator` makes the custom ops themselves.
"""

from __future__ import annotations

import functools
import importlib
import logging
import pkgutil
from collections.abc import Callable, Iterable, Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

NAMES = ("triton", "cpu", "torch", "reference")

_log = logging.getLogger(__name__)
_announced: set[str] = set()
_used: dict[str, str] = {}


class BackendRefused(RuntimeError):
    """The backend asked for by name cannot take this call; the message says why."""


def resolve(op: str, backend: str, call: Mapping[str, Any]) -> tuple[str, ModuleType]:
    """The name and module of the backend that takes `call`, the op's tensors by argument name.

    `auto` prefers the device's own backend and falls back on torch; a name never falls back.
    """
    available = _modules(op)
    if backend != "auto":
        if backend not in available:
            raise BackendRefused(
                f"{op}: no backend {backend!r}; valid: auto, {', '.join(available)}"
            )
        reason = load(op, backend).refuse(**call)
        if reason is not None:
            raise BackendRefused(f"{op}: backend {backend!r} refuses this call: {reason}")
        return backend, load(op, backend)
    device = next(value for value in call.values() if isinstance(value, Tensor)).device.type
    refusals: list[str] = []
    for name in ("cpu" if device == "cpu" else "triton", "torch"):
        if name not in available:
            continue
        reason = load(op, name).refuse(**call)
        if reason is None:
            _announce(op, name, device, refusals)
            return name, load(op, name)
        refusals.append(f"{name}: {reason}")
    raise BackendRefused(f"{op}: every backend refuses this call: {'; '.join(refusals)}")


def resolve_step(op: str, backend: str, call: Mapping[str, Any]) -> ModuleType | None:
    """The module whose own step takes `call`, or None: PyTorch's operations take it.

    `auto` asks the device's backend; one asked for by name that has a step never falls back.
    """
    device = next(value for value in call.values() if isinstance(value, Tensor)).device.type
    own = {"cpu": "cpu", "cuda": "triton"}
    name = own.get(device, "torch") if backend == "auto" else backend
    available = _modules(op)
    if backend != "auto" and backend not in available:
        raise BackendRefused(f"{op}: no backend {backend!r}; valid: auto, {', '.join(available)}")
    module = load(op, name) if name in own.values() and name in available else None
    if module is None or not hasattr(module, "refuse_step"):
        return None
    reason = module.refuse_step(**call)
    if reason is None:
        return module
    if backend == "auto":
        return None
    raise BackendRefused(f"{op}: the step of backend {name!r} refuses this call: {reason}")


def refuse_untraced(tensors: Iterable[Tensor | None]) -> str | None:
    """Why a kernel that neither autograd nor torch.compile sees cannot take them, or None."""
    given = [x for x in tensors if x is not None]
    if any(type(x) not in (Tensor, torch.nn.Parameter) for x in given):
        return "a tensor has no memory of its own (a subclass of Tensor)"
    if torch.is_grad_enabled() and any(x.requires_grad for x in given):
        return "a gradient is asked for; a step has none here (use torch.no_grad)"
    if torch.compiler.is_compiling():
        return "torch.compile cannot look into it"
    return None


class Operator:
    """A custom op whose plain calls go past the dispatcher.

    Its layers for custom ops take 0.15 ms a call and its gradient, as much as a small kernel. They
    are for those that watch a call: compilers, modes, transforms, profilers, subclasses of Tensor.
    Without such a one the same function runs alone, or under autograd with the same derivative.
    """

    def __init__(self, name: str, compute: Callable[..., Any]) -> None:
        self.op = torch.library.custom_op(name, compute, mutates_args=())
        self.compute = compute
        self.function: Any = None
        self.register_fake = self.op.register_fake

    def register_autograd(
        self, differentiate: Callable[..., Any], *, setup_context: Callable[..., Any]
    ) -> None:
        """As of a custom op."""
        self.op.register_autograd(differentiate, setup_context=setup_context)

        def forward(ctx: Any, *arguments: Any) -> Any:
            # With a setup_context of its own a Function inspects its signature at every call.
            output = self.compute(*arguments)
            setup_context(ctx, arguments, output)
            return output

        self.function = type(
            self.compute.__module__.rpartition(".")[2].title().replace("_", ""),
            (torch.autograd.Function,),
            {"forward": staticmethod(forward), "backward": staticmethod(differentiate)},
        )

    def __call__(self, *arguments: Any) -> Any:
        tensors = [x for x in arguments if isinstance(x, Tensor)]
        differentiated = torch.is_grad_enabled() and any([x.requires_grad for x in tensors])
        if _watched(tensors) or (differentiated and self.function is None):
            return self.op(*arguments)
        return self.function.apply(*arguments) if differentiated else self.compute(*arguments)


def operator(name: str) -> Callable[[Callable[..., Any]], Operator]:
    """Makes a function the custom op `name`."""
    return lambda compute: Operator(name, compute)


_PLAIN = frozenset((Tensor, torch.nn.Parameter))


def _watched(tensors: Iterable[Tensor]) -> bool:
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or torch._C._autograd._profiler_enabled()
        or any([type(x) not in _PLAIN for x in tensors])
    )


@functools.cache
def load(op: str, backend: str) -> ModuleType:
    """The backend's module, imported now if it was not."""
    return importlib.import_module(_modules(op)[backend])


def record(op: str, backend: str) -> None:
    """Notes that `backend` ran `op`; the ops call this."""
    _used[op] = backend


def used() -> dict[str, str]:
    """Op -> the backend that really ran it last in this process."""
    return dict(_used)


def names(op: str = "selective_scan") -> tuple[str, ...]:
    """The backends there are of `op`, whether they run on this machine or not."""
    return tuple(_modules(op))


def backends(op: str = "selective_scan") -> dict[str, str | None]:
    """Backend -> None if it runs on a device of this machine, else why not."""
    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    example = importlib.import_module(f"{__package__}.{op}").example
    return {
        name: _refusal(op, name, [example(device) for device in devices]) for name in _modules(op)
    }


def _refusal(op: str, name: str, calls: list[Mapping[str, Any]]) -> str | None:
    try:
        backend = load(op, name)
    except ImportError as error:
        return f"cannot be imported: {error}"
    reasons = [backend.refuse(**call) for call in calls]
    return None if None in reasons else reasons[0]


@functools.cache
def _modules(op: str) -> dict[str, str]:
    """Backend name -> full module name, in the order of NAMES."""
    package = importlib.import_module(f"{__package__}.{op}")
    stems = sorted(module.name for module in pkgutil.iter_modules(package.__path__))
    found = {stem.partition("_")[0] if stem.startswith("torch_") else stem: stem for stem in stems}
    return {name: f"{package.__name__}.{found[name]}" for name in NAMES if name in found}


def _announce(op: str, name: str, device: str, refusals: list[str]) -> None:
    """Logs a choice once a process; at WARNING if the device's own backend refused."""
    line = f"{op}: backend {name} on {device}" + "".join(f" ({refusal})" for refusal in refusals)
    if line not in _announced:
        _announced.add(line)
        _log.log(logging.WARNING if refusals else logging.INFO, line)
