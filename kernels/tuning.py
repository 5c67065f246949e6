"""Which of a few configurations is the fastest: measured once, kept in the user's cache.

Off unless SEQBENCH_AUTOTUNE is 1, and wherever deterministic algorithms are asked for: a
configuration may change the order of sums, and so the last bits of a result. A kept choice is never
measured again, so runs on one machine agree; `chosen` says what a process uses, and a run's record
and `seqbench doctor` show it. To measure anew, delete the file that `kept_in` names.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from seqbench.kernels import native

_log = logging.getLogger(__name__)
_chosen: dict[str, int] = {}


def choose(case: str, candidates: Sequence[int], measure: Callable[[int], float]) -> int:
    """The candidate with the fewest seconds, or the first, the default, while that is not known.

    `case` names all that the answer depends on. Nothing is measured inside a CUDA graph's capture
    or while torch.compile traces.
    """
    if len(candidates) < 2 or not enabled():
        return candidates[0]
    if case not in _chosen:
        found: Any = kept().get(case)
        if found not in candidates:
            if torch.compiler.is_compiling() or _capturing():
                return candidates[0]
            seconds = {candidate: measure(candidate) for candidate in candidates}
            found = _keep(case, candidates, min(candidates, key=seconds.__getitem__))
            _log.info("%s: %d of %s seconds", case, found, seconds)
        _chosen[case] = found
    return _chosen[case]


def enabled() -> bool:
    """Whether choices are used and measured at all."""
    asked = os.environ.get("SEQBENCH_AUTOTUNE") == "1"
    return asked and not torch.are_deterministic_algorithms_enabled()


def chosen() -> dict[str, int]:
    """Case -> the choice that this process uses."""
    return dict(_chosen)


def kept_in() -> Path:
    """The file of choices."""
    return native.cache_folder() / "choices.json"


def kept() -> dict[str, Any]:
    """What the file holds: nothing if it is missing or damaged, and then all is measured again."""
    try:
        found = json.loads(kept_in().read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _keep(case: str, candidates: Sequence[int], choice: int) -> int:
    """Adds a choice to the file, unless another process was first: then that one's."""
    found = kept()
    if found.get(case) in candidates:
        return int(found[case])
    with contextlib.suppress(OSError):  # the choice still holds in this process
        handle, temporary = tempfile.mkstemp(suffix=".tmp", dir=kept_in().parent)
        with os.fdopen(handle, "w") as file:
            json.dump(found | {case: choice}, file, indent=1, sort_keys=True)
        os.replace(temporary, kept_in())
    return choice


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
