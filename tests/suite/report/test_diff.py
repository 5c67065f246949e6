"""seqbench diff: which record is meant, what differs, and nothing where nothing does."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from synthetic import record

from seqbench.suite import cli
from seqbench.suite.experiment import UserError
from seqbench.suite.records import Record, write
from seqbench.suite.report.diff import differences, find, to_json


def test_a_record_is_found_by_file_digest_or_beginning(tmp_path: Path) -> None:
    made = record()
    path = write(tmp_path, made)
    assert find(tmp_path, str(path)) == find(tmp_path, made.digest) == made
    assert find(tmp_path, made.digest[:5]) == made
    write(tmp_path, record(seed=1))
    for name, words in {"": "none of the 2", "zz": "none of the 2", "no/file": "no such"}.items():
        with pytest.raises(UserError, match=words):
            find(tmp_path, name)
    many = [record(seed=s) for s in range(2, 20)]
    for other in many:
        write(tmp_path, other)
    with pytest.raises(UserError, match=r"records begin so .*give more of the digest"):
        find(tmp_path, _shared([made, *many]))


def _shared(records: list[Record]) -> str:
    """A first digit that two digests share: there are more digests than digits."""
    digits = [r.digest[0] for r in records]
    return next(d for d in digits if digits.count(d) > 1)


def test_config_environment_metrics_and_cost(tmp_path: Path) -> None:
    a = record(score=0.9, variants={"length=512": {"accuracy": 0.5}})
    b = record(score=0.95, train={"lr": 1e-3}, train_seconds=80.0, stopped={"length=512": "memory"})
    b = replace(b, environment={**b.environment, "versions": {"torch": "2.13.0"}})
    found = {(d.section, d.key): d for d in differences(a, b)}
    assert (found["config", "train.lr"].a, found["config", "train.lr"].b) == (3e-3, 1e-3)
    assert found["environment", "versions.torch"].b == "2.13.0"
    assert found["environment", "versions.seqbench"].b == "(absent)"
    assert found["metrics", "test.accuracy"].change == pytest.approx(0.05)
    assert found["metrics", "variants.length=512.accuracy"].b == "(absent)"
    assert found["metrics", "stopped.length=512"].change is None
    assert found["cost", "train_seconds"].change == pytest.approx(20.0)
    assert ("config", "train.steps") not in found
    assert differences(a, a) == []
    plain = json.loads(to_json(a, b))
    assert len(plain["differences"]) == len(found) and plain["a"] == a.digest


def test_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = record(score=0.9), record(seed=1, score=0.8)
    for made in (a, b):
        write(tmp_path, made)

    def run(*arguments: str) -> tuple[object, str, str]:
        given = ["seqbench", "diff", *arguments, "--results", str(tmp_path)]
        monkeypatch.setattr(sys, "argv", given)
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        shown = capsys.readouterr()
        return stopped.value.code, shown.out, shown.err

    status, out, _ = run(a.digest, b.digest[:8])
    assert status == 1 and "test.accuracy" in out and "-0.1" in out
    assert run(a.digest, a.digest)[:2] == (0, f"{a.digest} and {a.digest}: no difference\n")
    assert json.loads(run(a.digest, b.digest, "--json")[1])["b"] == b.digest
    status, _, err = run(a.digest, "xyz")
    assert status == 2 and err.count("\n") == 1 and "'xyz'" in err and "--results" in err
