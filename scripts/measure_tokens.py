"""Peak memory of the language task over texts of growing size, read as bytes and as byte pairs.

    python -P scripts/measure_tokens.py bytes 0.1 2
    python -P scripts/measure_tokens.py gpt2 0.1 0.5

writes a text of 0.1 GB and a larger one, one after the other, to a temporary folder that has room
for three times the largest, and for each opens the task and reads 2,000 train batches in a process
of its own. Byte pairs take two minutes of tokenising a GB. It prints what that took beyond the
process's memory before it opened the file.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BATCHES = 2000
PIECE = 2**20


def main() -> None:
    if len(sys.argv) == 4 and sys.argv[1] == "--read":
        read(*sys.argv[2:])
        return
    tokenizer = sys.argv[1] if len(sys.argv) > 1 else "bytes"
    for gigabytes in map(float, sys.argv[2:] or ("0.1", "2")):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "words.txt"
            write(path, int(gigabytes * 1e9))
            found = subprocess.run(
                [sys.executable, "-P", __file__, "--read", str(path), tokenizer],
                env={**os.environ, "SEQBENCH_DATA": f"{folder}/data"},
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            print(f"{path.stat().st_size / 1e9:.3g} GB, {tokenizer}:", found.stdout.strip())


def write(path: Path, size: int) -> None:
    """`size` bytes of words in lines: a megabyte of them in random order, again and again."""
    import numpy as np

    rng = np.random.default_rng(0)
    words = np.array(["the", "of", "and", "to", "in", "that", "states", "which", "government"])
    lines = rng.choice(words, (PIECE // 48, 10))
    text = ("\n".join(" ".join(line) for line in lines) + "\n").encode()
    with path.open("wb") as out:
        for first in range(0, size, len(text)):
            out.write(text[: size - first])


def read(path: str, tokenizer: str) -> None:
    """Opens the task over that file and reads it; prints the peaks as JSON."""
    import torch

    from seqbench.suite.environment import peak_memory, reset_peak_memory
    from seqbench.tasks.corpora import vocabulary
    from seqbench.tasks.language import Language, LanguageConfig

    vocabulary(tokenizer)  # its tables are no part of what grows
    cpu = torch.device("cpu")
    reset_peak_memory(cpu)
    before, began = peak_memory(cpu), time.perf_counter()
    task = Language(LanguageConfig(length=256, path=path, tokenizer=tokenizer))
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
