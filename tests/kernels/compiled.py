"""Triton kernels without a GPU: interpreted, and compiled as the backends launch them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
_TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.uint8: "*u8",
}


def interpreted(worker: Path) -> dict[str, float]:
    """By how much each case of a file `interpreted.py` misses float64, over what is allowed."""
    done = subprocess.run(
        [sys.executable, "-P", worker],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def within(found: dict[str, float]) -> bool:
    """Whether all do; the interpreter truncates to bfloat16 where GPUs round: twice the error."""
    return all(e <= (2 if case.startswith("bfloat16") else 1) for case, e in found.items())


class Recorder:
    """Stands for a kernel and keeps what it is launched with."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.arg_names = kernel, kernel.arg_names
        self.values: dict[str, Any] = {}
        self.options: dict[str, int] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self._launch

    def _launch(
        self,
        *,
        num_warps: int,
        maxnreg: int | None = None,
        launch_pdl: bool = False,
        **values: Any,
    ) -> None:
        self.values, self.options = values, {"num_warps": num_warps}
        if maxnreg is not None:
            self.options["maxnreg"] = maxnreg
        if launch_pdl:
            self.options["launch_pdl"] = True

    def source(self) -> ASTSource:
        """What the launcher would compile, of tensors that begin at multiples of 16 bytes."""
        signature: dict[str, str] = {}
        constants: dict[tuple[int], Any] = {}
        attributes: dict[tuple[int], Any] = {}
        for i, parameter in enumerate(self.kernel.params):
            value = self.values[parameter.name]
            aligned = not parameter.do_not_specialize_on_alignment
            if parameter.is_constexpr or value is None:
                signature[parameter.name], constants[(i,)] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                signature[parameter.name] = _TYPES[value.dtype]
            elif value == 1 and not parameter.do_not_specialize:
                signature[parameter.name], constants[(i,)] = "constexpr", 1
                aligned = False
            else:
                signature[parameter.name] = "i32"
                aligned &= value % 16 == 0 and not parameter.do_not_specialize
            if aligned and signature[parameter.name] != "constexpr":
                attributes[(i,)] = [["tt.divisibility", 16]]
        return ASTSource(self.kernel, signature, constants, attributes)


@contextmanager
def recorded(module: ModuleType, *names: str) -> Iterator[dict[str, Recorder]]:
    """The module's kernels do nothing but remember their arguments."""
    recorders = {name: Recorder(getattr(module, name)) for name in names}
    try:
        for name, recorder in recorders.items():
            setattr(module, name, recorder)
        yield recorders
    finally:
        for name, recorder in recorders.items():
            setattr(module, name, recorder.kernel)


def resources(kernel: Recorder, target: str) -> dict[str, int]:
    """Registers, bytes of stack and of shared memory, and spills on AMD."""
    compiled = triton.compile(kernel.source(), target=TARGETS[target], options=kernel.options)
    found = {"SHARED": int(compiled.metadata.shared)}
    if target == "gfx942":
        assembly = compiled.asm["amdgcn"]
        for name, key in (("REG", "vgpr_count"), ("SPILL", "vgpr_spill_count")):
            found[name] = int(re.findall(rf"\.{key}:\s+(\d+)", assembly)[0])
        return found
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        listing = subprocess.run(
            [cuobjdump, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    for name in ("REG", "STACK", "LOCAL"):
        found[name] = int(re.findall(rf"{name}:(\d+)", listing)[0])
    return found
