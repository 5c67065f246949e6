"""The task contract, over every task found: a new file in tasks/ is tested by being there."""

from __future__ import annotations

import functools

import pytest

from seqbench.suite.contract import Rule, apply, name_of
from seqbench.suite.contract.tasks import RULES, Subject
from seqbench.suite.discovery import task_class, task_names

TASKS = task_names()


def test_the_tasks_are_found() -> None:
    assert {"selective-copying", "induction-heads", "language", "dna", "piano"} <= set(TASKS)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes the user's cache; one folder serves the whole file."""
    folder = tmp_path_factory.getbasetemp() / "cache"
    monkeypatch.setenv("SEQBENCH_DATA", str(folder))


subject = functools.cache(Subject)  # its data is read once for all rules


@pytest.mark.parametrize("rule", RULES, ids=name_of)
@pytest.mark.parametrize("name", TASKS)
def test_it_keeps(name: str, rule: Rule[Subject]) -> None:
    finding = apply(rule, subject(name))
    assert finding.status != "broken", finding.note


@pytest.mark.parametrize("name", TASKS)
def test_ours_has_the_papers_scale_and_a_baseline(name: str) -> None:
    scales = task_class(name).scales
    assert "paper" in scales
    assert "not the paper's" in scales["cpu"].note
    assert subject(name).task.baselines()


@pytest.mark.parametrize("name", ["selective-copying", "induction-heads"])
def test_the_synthetic_tasks_have_an_oracle(name: str) -> None:
    task = subject(name).task
    assert task.oracle(task.batch("test", 0, 1).inputs) is not None
