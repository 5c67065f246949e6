"""How long `report` takes over many synthetic records, and its peak memory: one line of JSON.

    python scripts/measure_report.py [RECORDS]

The records are made by a formula, five tasks x 20 models x settings x 5 seeds with curves of 50
points, in a temporary folder; making them is not counted.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests" / "suite" / "report"))

from synthetic import quickstart

from seqbench.suite.records import write
from seqbench.suite.report import check, write_report

MODELS = tuple(f"model-{i}" for i in range(20))
SEEDS = 5


def main() -> None:
    """Prints records, seconds, CPU seconds, peak bytes and the number of plots."""
    wanted = int(sys.argv[1]) if len(sys.argv) > 1 else 5000
    os.fsync = lambda handle: None  # the disk's speed is not the report's
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder)
        made, setting = 0, 0
        while made < wanted:
            for record in quickstart(MODELS, SEEDS)[: wanted - made]:
                train = replace(record.cell.train, lr=1e-4 * 2**setting)
                cell = replace(record.cell, train=train)
                write(
                    results,
                    replace(record, cell=cell, digest=cell.digest, curve=record.curve * 5),
                )
                made += 1
            setting += 1
        before, cpu = time.perf_counter(), time.process_time()
        paths = write_report(results)
        figures = {
            "records": made,
            "seconds": round(time.perf_counter() - before, 1),
            "cpu_seconds": round(time.process_time() - cpu, 1),
            "peak_bytes": _peak_bytes(),
            "plots": len(paths.plots),
            "stale": check(results),
        }
    print(json.dumps(figures))


def _peak_bytes() -> int:
    """The whole process's. Linux's ru_maxrss would count what its parent held when it forked."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
