"""Names, options and their errors; layers from outside; sizes; initialisations."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from seqbench.models.base import ModelError, SequenceLayer
from seqbench.models.build import build_model, match_parameters, options_of, presets
from seqbench.models.discovery import layer_class

PLUGIN = '''
"""Decay: an exponential moving average."""
from dataclasses import dataclass

import torch
from seqbench.models.base import SequenceLayer


@dataclass(frozen=True, kw_only=True)
class DecayConfig:
    keep: float = 0.9


class Decay(SequenceLayer):
    Config = DecayConfig
    complexity = "O(L), O(1)"

    def __init__(self, width, config, *, d_model):
        super().__init__(width, config, d_model=d_model)
        self.width, self.keep = width, config.keep

    def forward(self, x_BLD, state=None):
        h = self.initial_state(len(x_BLD), None, x_BLD.dtype) if state is None else state
        ys = []
        for x in x_BLD.unbind(1):
            y, h = self.step(x, h)
            ys.append(y)
        y = torch.stack(ys, 1)
        return y if state is None else (y, h)

    def initial_state(self, batch_size, device, dtype):
        return torch.zeros(batch_size, self.width, device=device, dtype=dtype)

    def step(self, x_BD, state):
        state = self.keep * state + x_BD
        return state, state

    def state_size(self, length):
        return self.width
'''


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("manba", {}, ["'manba'", "did you mean 'mamba'", "transformer", "BLOCK+LAYER"]),
        ("mamba+s44", {}, ["unknown layer 's44'", "'s4'", "path/to/file.py"]),
        ("mambo+s4", {}, ["unknown block 'mambo'", "did you mean 'mamba'"]),
        (
            "mamba",
            {"d_sate": 8},
            ["'mamba'", "no option 'd_sate'", "'d_state'?", "expand"],
        ),
        ("mamba", {"num_heads": 8}, ["no option 'num_heads'", "valid: "]),
        ("mamba", {"d_state": "8"}, ["d_state='8'", "integer"]),
        ("mamba", {"d_state": True}, ["d_state=True", "integer"]),
        ("mamba", {"d_state": 0}, ["d_state=0", "1 to 256"]),
        ("mamba", {"d_state": 1.5}, ["d_state=1.5", "integer"]),
        ("mamba", {"dt_rank": "full"}, ["dt_rank='full'", "'auto'"]),
        ("mamba", {"tie_embeddings": "no"}, ["tie_embeddings='no'", "boolean"]),
        ("mamba", {"norm": "batch"}, ["norm='batch'", "'rms' or 'layer'"]),
        ("mamba", {"d_model": 0}, ["d_model=0", "1 or more"]),
        ("mamba", {"d_model": "64"}, ["d_model='64'", "integer"]),
        ("transformer", {"num_heads": 5}, ["num_heads=5", "divisor of", "32"]),
        ("transformer", {"num_heads": 32}, ["num_heads=32", "even"]),
        ("s4", {"d_state": 7}, ["d_state=7", "even"]),
        ("s4", {"dt_max": float("nan")}, ["dt_max=nan", "finite"]),
        ("none+no/such.py", {}, ["'no/such.py'", "path"]),
    ],
)
def test_mistakes_are_one_line_that_helps(name: str, options: dict, words: list[str]) -> None:
    with pytest.raises(ModelError) as error:
        build_model(name, **{"vocab_size": 5, "d_model": 32, "num_layers": 1, **options})
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_a_layer_may_come_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "decay.py"
    path.write_text(PLUGIN)
    model = build_model(f"mamba+{path}", vocab_size=5, d_model=8, num_layers=1, keep=0.5, expand=3)
    assert model.state_size(10) == 24 * 3 + 24
    tokens = torch.randint(5, (2, 7))
    assert model(tokens).shape == (2, 7, 5)
    other = build_model(
        "none+s6", layer=layer_class(str(path)), vocab_size=5, d_model=8, num_layers=1
    )
    assert other.state_size(10) == 8
    assert options_of(f"none+{path}")["keep"] == 0.9


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("x = 1", "exactly one public SequenceLayer"),
        ("import nowhere_at_all", "ModuleNotFound"),
    ],
)
def test_a_file_without_a_layer_is_refused(tmp_path: Path, text: str, word: str) -> None:
    path = tmp_path / "empty.py"
    path.write_text(text)
    with pytest.raises(ModelError, match=word):
        build_model(f"none+{path}", vocab_size=5, d_model=8, num_layers=1)


def test_listing_names_imports_no_layer() -> None:
    code = (
        "import sys; from seqbench.models.build import presets; "
        "from seqbench.models.discovery import layer_names; presets(); layer_names(); "
        "print([m for m in sys.modules if 'seqbench.models.l' in m or 'selective_scan' in m])"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("blocks", "d_model", "parameters"),
    [
        (4, 64, 262_720),
        (5, 96, 684_192),
        (6, 128, 1_401_472),
        (7, 192, 3_527_232),
        (8, 256, 7_012_608),
        (10, 384, 19_291_008),
        (12, 512, 40_694_272),
    ],
)
def test_mamba_has_the_papers_sizes(blocks: int, d_model: int, parameters: int) -> None:
    """The sizes of the DNA experiment (figure 5): two Mamba blocks a Transformer layer."""
    with torch.device("meta"):
        model = build_model("mamba", vocab_size=16, d_model=d_model, num_layers=2 * blocks)
    assert model.num_parameters == parameters


def test_initialisations_survive_the_stack() -> None:
    torch.manual_seed(0)
    model = build_model("mamba", vocab_size=16, d_model=256, num_layers=4)
    for residual in model.layers:
        block, layer = residual.block, residual.block.layer
        n = torch.arange(1, 17).float().log()
        assert torch.equal(layer.A_log, n.expand(512, 16))
        assert torch.equal(layer.D, torch.ones(512))
        dt = F.softplus(layer.dt_bias)
        assert dt.min() >= 1e-3 * 0.999 and dt.max() <= 0.1 * 1.001
        # Log-uniform: the logarithm's mean and spread are those of a uniform draw.
        assert abs(dt.log().mean() - math.log(1e-2)) < 0.2
        assert abs(dt.log().std() - math.log(100) / math.sqrt(12)) < 0.1
        assert layer.dt_proj.weight.abs().max() <= 16**-0.5
        # Linear's own bound is width^-0.5; the output's is divided by sqrt(num_layers).
        for weight, bound in (
            (block.in_proj.weight, 256**-0.5),
            (layer.x_proj.weight, 512**-0.5),
            (block.out_proj.weight, 512**-0.5 / 2),
        ):
            assert bound * 0.99 < weight.abs().max() <= bound
    assert abs(model.embedding.weight.std() - 0.02) < 1e-3
    assert model.head.weight is model.embedding.weight
    assert all(torch.equal(r.norm.weight, torch.ones(256)) for r in model.layers)


def test_an_untied_head_has_weights_of_its_own() -> None:
    tied, untied = (
        build_model("mamba", vocab_size=16, d_model=8, num_layers=1, tie_embeddings=tie)
        for tie in (True, False)
    )
    assert untied.num_parameters == tied.num_parameters + 16 * 8


def test_s4_convolution_equals_recurrence_in_float32() -> None:
    torch.manual_seed(0)
    layer = layer_class("s4")(32, layer_class("s4").Config(), d_model=32)
    assert isinstance(layer, SequenceLayer)
    x = torch.randn(2, 2500, 32)
    with torch.no_grad():
        whole = layer(x)
        pieces, state = layer(x, layer.initial_state(2, x.device, x.dtype))
        h, steps = layer.initial_state(2, x.device, x.dtype), []
        for t in range(x.shape[1]):
            y, h = layer.step(x[:, t], h)
            steps.append(y)
    scale = whole.abs().max()
    assert (pieces - whole).abs().max() < 1e-5 * scale
    assert (torch.stack(steps, 1) - whole).abs().max() < 1e-5 * scale
    assert (h - state).abs().max() < 1e-5 * h.abs().max()


@pytest.mark.parametrize("name", presets())
def test_widths_are_picked_for_equal_sizes(name: str) -> None:
    def size(d_model: int) -> int:
        with torch.device("meta"):
            model = build_model(name, vocab_size=256, d_model=d_model, num_layers=3)
        return model.num_parameters

    wanted = 400_000 if name != "sashimi" else 4_000_000  # which has three layers a stage
    width = match_parameters(name, parameters=wanted, vocab_size=256, num_layers=3)
    error = abs(size(width) - wanted)
    assert width % 16 == 0 and width > 16
    assert error <= min(abs(size(width - 16) - wanted), abs(size(width + 16) - wanted))
    assert error < 0.2 * wanted


def test_a_width_is_matched_under_options() -> None:
    options = {"vocab_size": 16, "num_layers": 2, "expand": 4}
    size = build_model("mamba", d_model=40, **options).num_parameters
    assert match_parameters("mamba", parameters=size, multiple_of=8, **options) == 40
    with pytest.raises(ModelError, match="parameters=0"):
        match_parameters("mamba", parameters=0, **options)


def test_attention_has_the_size_of_table_2() -> None:
    """137K: two layers of attention without MLP, D = 128, biases, LayerNorm, untied embedding."""
    options = {"vocab_size": 16, "d_model": 128, "num_layers": 2, "tie_embeddings": False}
    for name in ("transformer-absolute", "transformer-rope", "transformer-xpos"):
        assert build_model(name, **options).num_parameters == 136_960
    mamba = build_model("mamba", **{**options, "d_model": 64, "dt_rank": 16})
    assert round(mamba.num_parameters / 1000) == 74
