"""Peak memory of the dna task over FASTA files of growing size, made of random bases.

    python -P scripts/measure_fasta.py 0.1 3

writes a file of 0.1 GB and one of 3 GB, one after the other, to a temporary folder that has room
for twice the largest, and for each opens the task and reads 2,000 train batches in a process of its
own. It prints what that took beyond the process's memory before it opened the file.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LINE = 60
RECORD = 250_000_000  # bases: a large human chromosome
BATCHES = 2000


def main() -> None:
    if len(sys.argv) == 3 and sys.argv[1] == "--read":
        read(sys.argv[2])
        return
    for gigabytes in map(float, sys.argv[1:] or ("0.1", "3")):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "random.fa"
            write(path, int(gigabytes * 1e9))
            found = subprocess.run(
                [sys.executable, "-P", __file__, "--read", str(path)],
                env={**os.environ, "SEQBENCH_DATA": f"{folder}/data"},
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            print(f"{path.stat().st_size / 1e9:.2f} GB:", found.stdout.strip(), flush=True)


def write(path: Path, size: int) -> None:
    """About `size` bytes of FASTA: records of random bases, each with a gap of N."""
    import numpy as np

    rng = np.random.default_rng(0)
    letters = np.frombuffer(b"ACGT", dtype=np.uint8)
    with path.open("wb") as out:
        left, record = size * LINE // (LINE + 1), 0
        while left > 0:
            bases, record = min(left, RECORD) // LINE * LINE or LINE, record + 1
            out.write(f">chr{record}\n".encode())
            for first in range(0, bases, 10_000 * LINE):
                rows = min(10_000, (bases - first) // LINE)
                lines = np.full((rows, LINE + 1), ord("\n"), dtype=np.uint8)
                lines[:, :LINE] = letters[rng.integers(0, 4, (rows, LINE), dtype=np.uint8)]
                if first == 0:
                    lines[: rows // 2, :LINE] = ord("N")
                out.write(lines.data)
            left -= bases


def read(path: str) -> None:
    """Opens the task over that file and reads it; prints the peaks as JSON."""
    import torch

    from seqbench.suite.environment import peak_memory, reset_peak_memory
    from seqbench.tasks.dna import Dna, DnaConfig

    cpu = torch.device("cpu")
    reset_peak_memory(cpu)
    before, began = peak_memory(cpu), time.perf_counter()
    task = Dna(DnaConfig(length=1024, fasta=path))
    task.prepare()
    opened, opening = peak_memory(cpu), time.perf_counter() - began
    reset_peak_memory(cpu)
    began = time.perf_counter()
    for index in range(BATCHES):
        task.batch("train", index, 32)
    reading = time.perf_counter() - began
    found = {
        "opening_mb": round((opened - before) / 1e6),
        "reading_mb": round((peak_memory(cpu) - before) / 1e6),
        "opening_seconds": round(opening, 1),
        "batch_milliseconds": round(1e3 * reading / BATCHES, 3),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
