"""A cell's model in shards: each of its processes keeps a part of every weight (FSDP)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


def fsdp_strategy(devices: int) -> Any:
    """Lightning's strategy for models that `shard` has cut, in so many processes.

    Its own strategy of the name fsdp is for CUDA alone, clips no gradients by their norm, and gives
    parameters other names; this one drives torch's newer form, which does neither.
    """
    from lightning.pytorch.strategies import ModelParallelStrategy

    return ModelParallelStrategy(data_parallel_size=devices, tensor_parallel_size=1)


def shard(model: nn.Module, mesh: Any) -> dict[str, dict[str, Any]]:
    """Cuts the weights in place: those of each residual layer together, then what is left.

    Gives what was marked on each parameter, for `mark`: the parts are others, without the marks.
    """
    from torch.distributed.fsdp import fully_shard

    marks = {name: vars(p).copy() for name, p in model.named_parameters()}
    layers = getattr(model, "layers", None)
    for layer in layers if isinstance(layers, nn.ModuleList) else ():
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return marks


def mark(model: nn.Module, marks: dict[str, dict[str, Any]]) -> None:
    """Puts the marks back, as of what weight decay spares; after the last move to a device."""
    for name, parameter in model.named_parameters():
        vars(parameter).update(marks.get(name, {}))


def whole(tensor: Tensor) -> Tensor:
    """The tensor of which each process has a part; all of them must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor cut as a parameter is, if it is and has its shape."""
    if isinstance(parameter, DTensor) and tensor.shape == parameter.shape:
        return distribute_tensor(
            tensor.to(parameter.device), parameter.device_mesh, parameter.placements
        )
    return tensor
