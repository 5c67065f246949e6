"""A record's commit, also where the code came as an archive."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from seqbench.suite.environment import archived_commit

ROOT = Path(__file__).resolve().parents[2]


def test_an_archive_knows_its_commit(tmp_path: Path) -> None:
    checkout, copy = tmp_path / "checkout", tmp_path / "copy"
    checkout.mkdir()
    for name in (".gitattributes", ".git_archival.txt"):
        shutil.copy(ROOT / name, checkout)

    def git(*arguments: str) -> str:
        identity = ("-c", "user.name=a", "-c", "user.email=a@b")
        return subprocess.run(
            ["git", *identity, *arguments], cwd=checkout, capture_output=True, text=True, check=True
        ).stdout.strip()

    git("init", "--quiet")
    git("add", "--all")
    git("commit", "--quiet", "--message", "one")
    git("archive", "--output", "../copy.zip", "HEAD")
    shutil.unpack_archive(tmp_path / "copy.zip", copy)
    assert archived_commit(copy) == git("rev-parse", "HEAD")
    assert archived_commit(checkout) is None
    assert archived_commit(tmp_path) is None
