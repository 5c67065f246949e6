"""One of two processes that train a layer by DDP; run by test_selective_scan.py, which compares.

Arguments: rank, the file the processes meet in, the file for this rank's gradients.
"""

import sys

import torch
from torch import Tensor, nn

from seqbench.kernels.selective_scan import selective_scan


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


def layer_and_input() -> tuple[Layer, Tensor]:
    torch.manual_seed(0)
    return Layer(), torch.randn(4, 9, 4)


if __name__ == "__main__":
    rank, store, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2
    )
    layer, x_BLD = layer_and_input()
    parallel = nn.parallel.DistributedDataParallel(layer)  # its hooks live as long as it does
    parallel(x_BLD.chunk(2)[rank]).sum().backward()
    torch.save([p.grad for p in layer.parameters()], out)
    torch.distributed.destroy_process_group()
