"""new-layer keeps the contract, and its state forgets at the rate its config says."""

from pathlib import Path

import torch

from seqbench.models.discovery import layer_class
from seqbench.suite.contract.plugin import check_plugin

FILE = str(Path(__file__).with_name("new_layer.py"))


def test_it_keeps_the_contract() -> None:
    (report,) = check_plugin(FILE, kind="layer")
    assert not report.broken


def test_the_last_channel_remembers_for_longest() -> None:
    cls = layer_class(FILE)
    layer = cls(8, cls.Config(longest_memory=10.0), d_model=8)
    impulse = torch.zeros(1, 11, 8)
    impulse[:, 0] = 1.0
    last = layer(impulse)[0, 10]
    assert abs(last[-1].item() - 0.3679) < 1e-3 and last[0] < 1e-4
