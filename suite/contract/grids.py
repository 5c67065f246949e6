"""The grid contract, a rule a function: a docstring, seeds, and cells that all resolve."""

from __future__ import annotations

from functools import cached_property

from seqbench.suite.configuration import resolve
from seqbench.suite.contract import Finding, Rule, apply_all, need
from seqbench.suite.discovery import grid_module, grid_requests
from seqbench.suite.experiment import Request

SCALE = "cpu"


class Subject:
    """A grid at its cpu scale."""

    def __init__(self, name: str) -> None:
        self.name = name

    @cached_property
    def asked(self) -> tuple[tuple[int, ...], list[Request]]:
        """Its seeds and requests."""
        return grid_requests(self.name, SCALE)


def check(name: str) -> list[Finding]:
    """The findings of every rule on the grid of that name or path."""
    return apply_all(RULES, [("", Subject(name))], GATES)


def docstring(s: Subject) -> str:
    """It says what it asks, and what it costs."""
    doc = (grid_module(s.name).__doc__ or "").strip()
    need(bool(doc), "no docstring (YAML: description): say what it asks, costs and should show")
    return doc.split("\n")[0]


def requests(s: Subject) -> str:
    """SEEDS are integers from 0 on, and requests(scale) gives requests."""
    seeds, asked = s.asked
    return f"{len(asked)} requests, seeds {', '.join(map(str, seeds))}"


def cells(s: Subject) -> str:
    """Every request resolves: its task, model, scale and settings exist; no two are one cell."""
    seeds, asked = s.asked
    found = [resolve(request, seeds[0]) for request in asked]
    digests = [cell.digest for cell in found]
    twice = sorted({c.label for c in found if digests.count(c.digest) > 1})
    need(not twice, f"{', '.join(twice)}: asked for twice")
    return f"{len(seeds) * len(found)} cells"


RULES: tuple[Rule[Subject], ...] = (docstring, requests, cells)
GATES: tuple[Rule[Subject], ...] = (requests,)
