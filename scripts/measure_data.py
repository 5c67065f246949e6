"""Peak memory of the dna or the language task over files of growing size, made of random data.

    python -P scripts/measure_data.py fasta 0.1 3
    python -P scripts/measure_data.py bytes 0.1 2
    python -P scripts/measure_data.py gpt2 0.1 0.5

writes a file of 0.1 GB and a larger one, one after the other, to a temporary folder that has room
for three times the largest, and for each opens the task and reads 2,000 train batches in a process
of its own: dna over a FASTA file, or language over a text as bytes or in a tokenizer's byte pairs,
which take two minutes of tokenising a GB. It prints what that took beyond the process's memory
before it opened the file.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from seqbench.tasks.base import Task

LINE = 60
RECORD = 250_000_000  # bases: a large human chromosome
PIECE = 2**20
BATCHES = 2_000


def main() -> None:
    if len(sys.argv) == 4 and sys.argv[1] == "--read":
        read(*sys.argv[2:])
        return
    kind = sys.argv[1] if len(sys.argv) > 1 else "fasta"
    for gigabytes in map(float, sys.argv[2:] or ("0.1", "2")):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "random"
            (write_fasta if kind == "fasta" else write_text)(path, int(gigabytes * 1e9))
            found = subprocess.run(
                [sys.executable, "-P", __file__, "--read", kind, str(path)],
                check=True,
                stdout=subprocess.PIPE,
                text=True,
            )
            size = path.stat().st_size / 1e9
            print(f"{size:.3g} GB, {kind}:", found.stdout.strip(), flush=True)


def write_fasta(path: Path, size: int) -> None:
    """About `size` bytes of FASTA: records of random bases, each with a gap of N."""
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


def write_text(path: Path, size: int) -> None:
    """`size` bytes of words in lines: a megabyte of them in random order, again and again."""
    rng = np.random.default_rng(0)
    words = np.array(["the", "of", "and", "to", "in", "that", "states", "which", "government"])
    lines = rng.choice(words, (PIECE // 48, 10))
    text = ("\n".join(" ".join(line) for line in lines) + "\n").encode()
    with path.open("wb") as out:
        for first in range(0, size, len(text)):
            out.write(text[: size - first])


def read(kind: str, path: str) -> None:
    """Opens the task over that file and reads it; prints the peaks as JSON."""
    import torch

    from seqbench.suite.environment import peak_memory, reset_peak_memory

    cpu = torch.device("cpu")
    task = task_over(kind, path)
    reset_peak_memory(cpu)
    before, began = peak_memory(cpu), time.perf_counter()
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


def task_over(kind: str, path: str) -> Task:
    """The task, not opened yet."""
    from seqbench.tasks.corpora import vocabulary
    from seqbench.tasks.dna import Dna, DnaConfig
    from seqbench.tasks.language import Language, LanguageConfig

    if kind == "fasta":
        return Dna(DnaConfig(length=1024, fasta=path))
    vocabulary(kind)  # its tables are no part of what grows
    return Language(LanguageConfig(length=256, path=path, tokenizer=kind))


if __name__ == "__main__":
    main()
