"""What `seqbench new` writes: a working task or layer of your own, with its test."""

from __future__ import annotations

import keyword
import os
import re
from pathlib import Path

from seqbench.suite.discovery import task_names
from seqbench.suite.experiment import UserError

TEMPLATES = Path(__file__).resolve().parent / "templates"
PARTS = {"task": "task", "model": "layer"}  # what is new -> its template


def write_new(kind: str, name: str, folder: Path) -> list[Path]:
    """Writes NAME.py and test_NAME.py into the folder; nothing if one of them is there already."""
    part = PARTS[kind]
    stem = name.replace("-", "_")
    if re.fullmatch("[a-z][a-z0-9]*(-[a-z0-9]+)*", name) is None or keyword.iskeyword(stem):
        raise UserError(
            f"new {kind} {name!r}: a name is small letters, digits and dashes, as in my-{part}"
        )
    if name in _taken(kind):
        raise UserError(f"new {kind} {name!r}: there is a {part} of this name; take another")
    names = {
        f"new-{part}": name,
        f"new_{part}": stem,
        f"New{part.title()}": "".join(word.title() for word in name.split("-")),
    }
    texts = {}
    for template, target in ((f"{part}.py", f"{stem}.py"), (f"test_{part}.py", f"test_{stem}.py")):
        text = (TEMPLATES / template).read_text(encoding="utf-8")
        for placeholder, own in names.items():
            text = text.replace(placeholder, own)
        texts[folder / target] = text
    for path in texts:
        if path.exists():
            raise UserError(
                f"new {kind} {name!r}: {path} is there already; move it or name a folder"
            )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path, text in texts.items():
            with path.open("x", encoding="utf-8") as file:
                file.write(text)
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise UserError(
            f"new {kind} {name!r}: cannot write into {folder} ({reason}); name another with --into"
        ) from error
    return list(texts)


def _taken(kind: str) -> list[str]:
    if kind == "task":
        return task_names()
    from seqbench.models.discovery import layer_names  # late: it imports torch

    return layer_names()
