"""A worker process of the local launcher: cells in on stdin, events out on stdout, as JSON."""

from __future__ import annotations

import json
import logging
import os
import queue
import signal
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def main() -> None:
    """Runs cells until stdin closes; if that is within one, the launcher died: so does this."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the launcher's to handle
    results, device = Path(sys.argv[1]), sys.argv[2]
    # Whatever a library prints must not mix with the events.
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def tell(event: Mapping[str, Any]) -> None:
        channel.write(json.dumps(event) + "\n")

    busy = threading.Event()
    cells: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(cells, busy), daemon=True).start()

    import torch

    from seqbench.suite.configuration import build_config
    from seqbench.suite.experiment import Cell, TrainConfig
    from seqbench.suite.records import Record, write
    from seqbench.suite.training import run_cell

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    logger = logging.getLogger("seqbench")
    logger.setLevel(logging.INFO)
    logger.addHandler(_Forward(tell))

    while (line := cells.get()) is not None:
        plain = json.loads(line)
        cell = Cell(**{**plain, "train": build_config(TrainConfig, plain["train"], "train")})
        try:
            record = run_cell(cell, results, device=device, listener=tell)
        except ValueError as error:  # a user's mistake that only shows while running
            record = Record(cell=cell, digest=cell.digest, status="failed", error=str(error))
        assert record is not None
        write(results, record)
        busy.clear()
        tell({"event": "recorded"})


class _Forward(logging.Handler):
    """Passes log lines on to the launcher."""

    def __init__(self, tell: Any) -> None:
        super().__init__()
        self.tell = tell

    def emit(self, record: logging.LogRecord) -> None:
        self.tell({"event": "log", "level": record.levelname, "message": record.getMessage()})


def _listen(cells: queue.SimpleQueue[str | None], busy: threading.Event) -> None:
    for line in sys.stdin:
        busy.set()
        cells.put(line)
    if busy.is_set():
        os._exit(3)
    cells.put(None)


if __name__ == "__main__":
    main()
