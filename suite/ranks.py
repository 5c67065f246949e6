"""The processes that share one cell: each takes its rows of every batch and averages gradients.

The first is the one that was asked to run the cell; it starts the others, and alone writes files.
"""

from __future__ import annotations

import os


def rank() -> int:
    """This process's number among those of its cell; 0 where it is alone."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def first() -> bool:
    """Whether this process is the one that writes."""
    return rank() == 0
