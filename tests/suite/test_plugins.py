"""Strangers' code: found lazily, refused by the name of the rule it breaks, written by `new`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from seqbench.models.base import ModelError
from seqbench.models.discovery import layer_class
from seqbench.suite import cli, discovery, listing
from seqbench.suite.configuration import resolve
from seqbench.suite.contract import Rule, apply, models, tasks
from seqbench.suite.contract.plugin import check_plugin
from seqbench.suite.experiment import Cell, Request, UserError
from seqbench.suite.new import TEMPLATES, write_new
from seqbench.suite.records import Record, from_dict, to_dict
from seqbench.suite.runner import grid_cells
from seqbench.suite.training import run_cell

TASK = (TEMPLATES / "task.py").read_text()
LAYER = (TEMPLATES / "layer.py").read_text()
ONE_TEXT = (
    "text = np.random.default_rng(0).integers(0, c.vocab_size, 4096)\n"
    "            starts = rng.integers(0, 4096 - c.length, rows)\n"
    "            return text[starts[:, None] + np.arange(c.length)]"
)
RETURN_DRAWN = "return rng.integers(0, c.vocab_size, (rows, c.length), dtype=np.int64)"
LATER = TASK.replace(
    "targets[:, c.delay :] = inputs[:, : -c.delay]", "targets[:, : -c.delay] = inputs[:, c.delay :]"
)

# The rule, what is put in place of what in a good task, and a word of the finding.
BROKEN_TASKS: list[tuple[Rule[tasks.Subject], str, str, str]] = [
    (tasks.config, "frozen=True, ", "", "frozen"),
    (tasks.config, "length: int = 64", "length: int", "default"),
    (tasks.scales, "hundred steps.", "hundred steps", "sentence"),
    (tasks.scales, '"delay": 64', '"delai": 64', "delai"),
    (tasks.headline, '"accuracy"', '"acuracy"', "acuracy"),
    (tasks.docstring, "Targets", "Answers", "Targets"),
    (tasks.fingerprint, "digest(GENERATOR)", "'today'", "hex"),
    (tasks.determinism, "rng.integers", "np.random.default_rng().integers", "another instance"),
    (tasks.determinism, "seed, index)", "seed)", "are the same"),
    (tasks.seed, "*purpose, seed, index", "*purpose, index", "seeds 0 and 1"),
    (tasks.passes, "min(batch_size, c.eval_sequences - first)", "batch_size", "IndexError"),
    (tasks.streams_disjoint, "fixed_rows(split", "fixed_rows('test'", "share"),
    (tasks.train_test_overlap, RETURN_DRAWN, ONE_TEXT, "stand in train"),
    (tasks.chance, "1 / self.config.vocab_size", "1 / 2 / self.config.vocab_size", "0.0625 to 1"),
    (tasks.config_keys_live, "data_seed: int = 0", "spare: int = 3\n    data_seed: int = 0", "spare"),
    (tasks.oracle, "self.config.delay, dims", "self.config.delay + 1, dims", "wrong at"),
]  # fmt: skip

BROKEN_LAYERS: list[tuple[Rule[models.Subject], str, str, str]] = [
    (models.config, "frozen=True, ", "", "frozen"),
    (models.builds, '0, math.log(config.longest_memory), width', "0, 3, width, device='cpu'", 'log_rate'),
    (models.shapes, "self.weight * h_BLD", "(self.weight * h_BLD).mT", "NewLayer maps"),
    (models.dtypes, "y_BLD = self.weight * h_BLD", "y_BLD = (self.weight * h_BLD).float()", "float != double"),
    (models.determinism, "torch.ones(width)", "torch.rand(width, generator=SEED)", "weight"),
    (models.causality, "self.weight * h_BLD", "self.weight * h_BLD.flip(1)", "before it"),
    (models.forward_is_step, "* state + x_BD", "* state + 2 * x_BD", "differ"),
    (models.pieces_are_the_whole, "x_BLD, state)", "x_BLD)", "differ"),
    (models.state_size, "return self.width", "return self.width + 1", "the state has"),
    (models.gradients, "self.width = width", "self.width, self.idle = width, nn.Linear(2, 2)", "idle"),
    (models.config_keys_live, "    def __post", "    spare: int = 3\n\n    def __post", "spare"),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "old", "new", "word"), BROKEN_TASKS)
def test_a_broken_task_is_told_by_its_rule(
    rule: Rule[tasks.Subject], old: str, new: str, word: str, tmp_path: Path
) -> None:
    assert old in TASK
    (tmp_path / "mine.py").write_text(TASK.replace(old, new))
    finding = apply(rule, tasks.Subject(str(tmp_path / "mine.py")))
    assert finding.status == "broken"
    assert word in finding.note


def test_an_oracle_that_looks_ahead_is_told(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(LATER.replace("roll(self", "roll(-self"))
    finding = apply(tasks.oracle, tasks.Subject(str(tmp_path / "mine.py")))
    assert finding.status == "broken" and "needs inputs after" in finding.note


@pytest.mark.parametrize(("rule", "old", "new", "word"), BROKEN_LAYERS)
def test_a_broken_layer_is_told_by_its_rule(
    rule: Rule[models.Subject], old: str, new: str, word: str, tmp_path: Path
) -> None:
    assert old in LAYER
    text = LAYER.replace(old, new) + "\n\nSEED = torch.Generator()\n"
    (tmp_path / "mine.py").write_text(text)
    finding = apply(rule, models.Subject(f"none+{tmp_path / 'mine.py'}"))
    assert finding.status == "broken"
    assert word in finding.note


@pytest.mark.parametrize("kind", ["task", "model"])
def test_what_new_writes_keeps_its_contract_and_is_never_written_over(
    kind: str, tmp_path: Path
) -> None:
    file, test = write_new(kind, "my-own-2", tmp_path)
    assert "new" not in file.read_text() + test.read_text()
    (report,) = check_plugin(str(file))
    assert {finding.status for finding in report.findings} == {"ok"}
    file.write_text("mine now")
    test.unlink()
    with pytest.raises(UserError, match="is there already"):
        write_new(kind, "my-own-2", tmp_path)
    assert file.read_text() == "mine now" and not test.exists()


def install(folder: Path, package: str, entry_points: str, **files: str) -> None:
    """A distribution as pip leaves it, on the path."""
    info = folder / f"{package}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(entry_points)
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text)


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    install(
        tmp_path,
        "stranger",
        "[seqbench.tasks]\nlate = stranger_task:NewTask\nheavy = stranger_heavy\ndna = stranger_task\n"
        "[seqbench.layers]\nslow = stranger_layer\ns4 = stranger_layer:NewLayer\n"
        "[seqbench.models]\nslowly = stranger_models:SLOWLY\ntable = stranger_models:Table\n"
        "[seqbench.grids]\nlately = stranger_grid\n",
        stranger_task=TASK,
        stranger_layer=LAYER,
        stranger_heavy="import flash_nowhere",
        stranger_models=WHOLE,
        stranger_grid=GRID,
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


WHOLE = '''
import torch
from seqbench.models.base import SequenceModel
from seqbench.models.build import Preset

SLOWLY = Preset(block="none", layer="slow", summary="slow", options={"longest_memory": 9.0})

class Table(SequenceModel):
    """The next token by the last one alone."""
    complexity = "O(L), O(1)"
    def __init__(self, config, *, vocab_size, d_model, num_layers):
        super().__init__(config, vocab_size=vocab_size, d_model=d_model, num_layers=num_layers)
        self.table = torch.nn.Embedding(vocab_size, vocab_size)
    def forward(self, tokens_BL, state=None):
        y = self.table(tokens_BL)
        return y if state is None else (y, state)
    def initial_state(self, batch_size, device=None, dtype=None):
        return torch.zeros(batch_size, 0)
    def step(self, tokens_B, state):
        return self.table(tokens_B), state
    def state_size(self, length):
        return 0
'''
GRID = '''"""Late. Cost: seconds."""
from seqbench.suite.experiment import Request
SEEDS = (0, 1)
def requests(scale):
    return [Request(task="late", model=m, scale=scale) for m in ("slowly", "table", "mamba+slow")]
'''


def test_listing_imports_no_plugin(installed: Path) -> None:
    assert {"late", "heavy"} <= {row["name"] for row in listing.tasks()}
    rows = {row["name"]: row for row in [*listing.models(), *listing.grids()]}
    assert "stranger 1.0" in rows["slowly"]["summary"]
    assert {"BLOCK+slow", "table", "lately"} <= set(rows)
    assert rows["mamba"]["parameters"] and rows["table"]["parameters"] is None
    assert "unique-name" in rows["s4"]["summary"] and rows["s4"]["parameters"] is None
    assert not [name for name in sys.modules if name.startswith("stranger")]


def test_plugins_of_a_package_make_a_grid(installed: Path) -> None:
    cells = grid_cells("lately", scale="cpu", seeds=None)
    assert [c.label for c in cells][:3] == ["late/slowly/seed0", "late/table/seed0", "late/mamba+slow/seed0"]  # fmt: skip
    assert cells[0].model_config["longest_memory"] == 9.0
    (report,) = check_plugin("table")
    # A table hears nothing but the last token, and has no options: the rest holds.
    assert [f.rule for f in report.broken] == ["causality"]


@pytest.mark.parametrize(
    ("find", "name", "words"),
    [
        (discovery.task_class, "heavy", ["stranger 1.0", "loads", "flash_nowhere", "install it"]),
        (discovery.task_class, "dna", ["stranger 1.0", "unique-name", "'dna'"]),
        (layer_class, "s4", ["stranger 1.0", "unique-name"]),
    ],
)
def test_a_package_that_breaks_a_rule_is_named(
    find: Any, name: str, words: list[str], installed: Path
) -> None:
    with pytest.raises((UserError, ModelError)) as raised:
        find(name)
    assert all(word in str(raised.value) for word in words)
    assert "\n" not in str(raised.value)


def test_two_packages_with_one_name_are_both_named(
    installed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(installed / "other", "twin", "[seqbench.tasks]\nlate = stranger_task:NewTask\n")
    monkeypatch.syspath_prepend(str(installed / "other"))
    with pytest.raises(UserError, match=r"twin 1\.0") as raised:
        discovery.task_class("late")
    assert "stranger 1.0" in str(raised.value) and "unique-name" in str(raised.value)


def check(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["seqbench", "check-plugin", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert isinstance(stopped.value.code, int)
    return stopped.value.code, capsys.readouterr().out


def test_check_plugin_has_a_line_for_every_rule_and_an_exit_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = tmp_path / "good.py", tmp_path / "bad.py"
    good.write_text(TASK)
    bad.write_text(TASK.replace("int64", "int32"))
    status, shown = check([str(good)], monkeypatch, capsys)
    assert status == 0
    assert all(f"ok      {name}" in shown for name in ("shapes", "streams-disjoint", "oracle"))
    status, shown = check([str(bad), "--json"], monkeypatch, capsys)
    (report,) = json.loads(shown)
    assert status == 1 and report["kind"] == "task"
    found = {f["rule"]: f["status"] for f in report["findings"]}
    assert found["dtypes"] == "broken" and found["oracle"] == "not checked"


def test_a_plugin_that_cannot_be_loaded_breaks_a_rule(installed: Path) -> None:
    (report,) = check_plugin("heavy")
    assert [f.rule for f in report.broken] == ["loads"]


def test_a_yaml_grid_asks_for_the_same_cells_as_names_and_set(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(
        "description: Two.\nseeds: [3]\ncells:\n- tasks: [induction-heads]\n  models: [s4, lstm]\n"
        "  set: {train.lr: 1e-3, task.test_lengths: []}\n"
    )
    cells = grid_cells(str(tmp_path / "mine.yaml"), scale="cpu", seeds=None)
    assert [(c.model, c.seed, c.train.lr) for c in cells] == [("s4", 3, 1e-3), ("lstm", 3, 1e-3)]
    assert discovery.grid_module(str(tmp_path / "mine.yaml")).__doc__ == "Two."
    assert not [r for r in check_plugin(str(tmp_path / "mine.yaml")) if r.broken]


def resolved(task: str, model: str) -> Cell:
    return resolve(Request(task=task, model=model), 0)


def test_the_source_of_a_plugin_file_is_part_of_its_cells(tmp_path: Path) -> None:
    task, layer = tmp_path / "mine.py", tmp_path / "slow.py"
    task.write_text(f"{TASK}\ndef helped():\n    import helper\n")
    layer.write_text(LAYER)
    before = resolved(str(task), f"none+{layer}")
    assert set(before.code) == {"task", "model"}
    assert resolved(str(task), f"none+{layer}").digest == before.digest
    (tmp_path / "helper.py").write_text("SIZE = 3\n")
    helped = resolved(str(task), f"none+{layer}")
    assert (
        helped.code["task"] != before.code["task"] and helped.code["model"] == before.code["model"]
    )
    (tmp_path / "unrelated.py").write_text("SIZE = 3\n")
    layer.write_text(LAYER.replace("math.log(config.longest_memory)", "2.0"))
    slower = resolved(str(task), f"none+{layer}")
    assert slower.code["task"] == helped.code["task"]
    assert slower.code["model"] != helped.code["model"] and slower.digest != helped.digest


def test_a_cell_of_seqbenchs_own_code_is_known_as_before() -> None:
    """Records that were written before the field was there stay valid."""
    cell = resolved("induction-heads", "s4")
    assert cell.code == {} and '"code"' not in cell.canonical()
    plain = to_dict(Record(cell=cell, digest=cell.digest, status="done"))
    del plain["cell"]["code"]
    assert from_dict(plain).cell == cell


def test_a_file_that_is_edited_between_its_plan_and_its_run_is_refused(tmp_path: Path) -> None:
    layer = tmp_path / "slow.py"
    layer.write_text(LAYER)
    cell = resolved("induction-heads", f"none+{layer}")
    layer.write_text(LAYER + "\n# edited\n")
    with pytest.raises(UserError, match="source of its task or model changed"):
        run_cell(cell, tmp_path, device="cpu")


def test_the_modules_of_a_package_that_a_plugin_imports_are_part_of_its_cells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, "parcel", "[seqbench.layers]\nposted = parcel.layers.posted:NewLayer\n")
    (tmp_path / "parcel" / "layers").mkdir(parents=True)
    files = {
        "__init__.py": "",
        "layers/__init__.py": "",
        "layers/posted.py": f"{LAYER}\nfrom ..rates import RATE\n",
        "rates.py": "RATE = 1\n",
        "others.py": "RATE = 1\n",
    }
    for name, text in files.items():
        (tmp_path / "parcel" / name).write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    before = resolved("induction-heads", "none+posted").code
    (tmp_path / "parcel" / "others.py").write_text("RATE = 2\n")
    assert resolved("induction-heads", "none+posted").code == before
    (tmp_path / "parcel" / "rates.py").write_text("RATE = 2\n")
    assert resolved("induction-heads", "none+posted").code != before
