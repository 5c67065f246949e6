"""How cells are run: processes, threads, devices, limits; no part of their identity."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Compile = Literal["off", "default", "graphs"]


@dataclass(frozen=True, kw_only=True)
class Execution:
    """What a launcher needs to know beside the cells."""

    workers: int = 1  # cells at a time
    threads: int = 1  # CPU threads of each cell
    device: str = "auto"  # auto, cpu or cuda
    devices: int = 1  # of one cell: as many processes share its batches
    strategy: str = "auto"  # Lightning's, over those devices: auto, ddp or fsdp
    compile: Compile = "off"  # torch.compile of the training step; graphs: with CUDA graphs
    prefetch: int | None = None  # processes that make batches ahead; None: on a GPU, a few
    gpus: tuple[str, ...] = ()  # visible here; shared out among the workers
    cells_per_gpu: int = 1
    cell_seconds: float | None = None  # wall time of a cell in this sitting
    cell_memory: int | None = None  # resident bytes of a cell's processes
    budget: float | None = None  # seconds of this sitting
    conclude: bool = False  # test what is trained so far, and train no further
