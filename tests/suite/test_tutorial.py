"""The pages do as they say: the tutorial's commands run as printed, CONTRIBUTING's layer is a layer."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from seqbench.suite.contract.plugin import check_plugin

ROOT = Path(__file__).resolve().parents[2]


def blocks(page: str, language: str) -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def test_the_tutorials_commands_end_in_finished_cells(tmp_path: Path) -> None:
    commands = blocks("docs/tutorial.md", "sh")
    assert "seqbench new task" in commands[0] and "seqbench run" in commands[-1]
    tools, folder = tmp_path / "bin", tmp_path / "mine"
    tools.mkdir(), folder.mkdir()
    for name, arguments in (("seqbench", "-P -m seqbench.suite.cli"), ("python", "-P")):
        (tools / name).write_text(f'#!/bin/sh\nexec {sys.executable} {arguments} "$@"\n')
        (tools / name).chmod(0o755)
    # The commands run elsewhere: a relative PYTHONPATH must still lead to this checkout.
    paths = [str(Path(p).absolute()) for p in os.environ.get("PYTHONPATH", "").split(":") if p]
    changed = {"PATH": f"{tools}:{os.environ['PATH']}", "PYTHONPATH": ":".join(paths)}
    done = subprocess.run(
        ["bash", "-e", "-c", "\n".join(commands)],
        cwd=folder,
        env=os.environ | changed,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    records = [json.loads(p.read_text()) for p in (folder / "results/records").rglob("*.json")]
    assert [r["status"] for r in records] == ["done"] * 4
    assert {r["cell"]["model"] for r in records} == {"mamba", "mamba+my_layer.py"}
    assert (folder / "results/index.html").is_file()


def test_the_layer_of_contributing_keeps_the_contract(tmp_path: Path) -> None:
    (source,) = blocks("CONTRIBUTING.md", "python")
    (tmp_path / "fade.py").write_text(source)
    (report,) = check_plugin(str(tmp_path / "fade.py"))
    assert report.kind == "layer"
    assert not report.broken
