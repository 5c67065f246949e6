"""new-task keeps the contract, and its answers are the tokens of `delay` places before."""

from pathlib import Path

from seqbench.suite.contract.plugin import check_plugin
from seqbench.suite.discovery import task_class

FILE = str(Path(__file__).with_name("new_task.py"))


def test_it_keeps_the_contract() -> None:
    (report,) = check_plugin(FILE, kind="task")
    assert not report.broken


def test_an_answer_is_the_token_of_delay_places_before() -> None:
    cls = task_class(FILE)
    task = cls(cls.Config(length=8, delay=3))
    task.prepare()
    inputs, targets = task.batch("train", 0, 2)
    assert targets[:, 3:].tolist() == inputs[:, :5].tolist()
