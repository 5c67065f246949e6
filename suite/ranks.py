"""The processes that share one cell: each takes its rows of every batch and averages gradients.

The first is the one that was asked to run the cell; it starts the others, and alone writes files.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import threading
from collections.abc import Iterator, Sequence


def rank() -> int:
    """This process's number among those of its cell; 0 where it is alone."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def first() -> bool:
    """Whether this process is the one that writes."""
    return rank() == 0


@contextlib.contextmanager
def group(size: int, command: Sequence[str], line: str) -> Iterator[None]:
    """Runs the other `size` - 1 processes, as `command` with `line` on stdin, while inside.

    If one of them dies, so does this process: it would wait for its gradients for ever.
    """
    if size == 1:
        yield
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0"}
    os.environ.update({**meeting, "LOCAL_RANK": "0"})
    over = threading.Event()
    others = []
    for number in range(1, size):
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            env=os.environ | {"LOCAL_RANK": str(number)},
        )
        assert process.stdin is not None
        process.stdin.write(line + "\n")
        process.stdin.flush()
        others.append(process)

    def watch() -> None:
        while not over.wait(0.5):
            if any(process.poll() not in (None, 0) for process in others):
                os._exit(4)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()
        for process in others:
            assert process.stdin is not None
            with contextlib.suppress(OSError):
                process.stdin.close()
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for name in (*meeting, "LOCAL_RANK"):
            os.environ.pop(name, None)


def part() -> None:
    """Leaves the process group, if there is one, so that a later cell can form its own."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
