"""The model contract, a rule a function: causal, forward = step, an honest state, live options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, get_type_hints

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from seqbench.models.base import (
    Block,
    ModelError,
    SequenceLayer,
    cannot_reset,
    parameter_groups,
)
from seqbench.models.build import build_model, config_of, options_of
from seqbench.models.discovery import block_class, layer_class
from seqbench.suite.contract import (
    Broken,
    Finding,
    NotChecked,
    Rule,
    alternatives,
    apply_all,
    frozen_config,
    need,
)

VOCAB = 11
WIDTH = 32
TOLERANCE = 1e-9  # float64, summed in another order


class Subject:
    """A model of two small layers in float64, under some options."""

    def __init__(
        self,
        name: str,
        options: Mapping[str, Any] | None = None,
        keys: Sequence[str] | None = None,
    ) -> None:
        self.name, self.options = name, dict(options or {})
        self.keys = keys  # the options that have to be live; None: all

    def build(self, **options: Any) -> Any:
        """The model as it is initialised, the same one every time."""
        torch.manual_seed(0)
        merged = {**self.options, **options}
        return build_model(self.name, vocab_size=VOCAB, d_model=WIDTH, num_layers=2, **merged)

    def model(self) -> Any:
        """The model in float64, moved off what its initialisation sets to zero."""
        made = self.build()
        # Initialisations that pass nothing on (a zero bias, a tiny embedding) would hide mistakes.
        for parameter in made.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
        return made.double().eval()


def check_model(name: str) -> list[Finding]:
    """The findings of every rule on a preset, BLOCK+LAYER, or whole model."""
    return apply_all(RULES, [("", Subject(name))], GATES)


def check_layer(name: str) -> list[Finding]:
    """The findings on a layer, by itself in a stack and inside the Mamba block."""
    keys = list(get_type_hints(layer_class(name).Config))
    hosts = [f"{block}+{name}" for block in ("none", "mamba")]
    return apply_all(RULES, [(host, Subject(host, keys=keys)) for host in hosts], GATES)


def check_block(name: str) -> list[Finding]:
    """The findings on a block, with a recurrent layer and with attention in it."""
    keys = list(get_type_hints(block_class(name).Config))
    filled = [f"{name}+{layer}" for layer in ("s6", "attention")]
    return apply_all(RULES, [(pair, Subject(pair, keys=keys)) for pair in filled], GATES)


def config(s: Subject) -> str:
    """The options are frozen, keyword-only dataclasses with defaults."""
    configs = config_of(s.name, s.options.get("backbone"))
    for one in configs:
        frozen_config(one)
    return ", ".join(one.__name__ for one in configs)


def builds(s: Subject) -> str:
    """It builds with its default options; on the meta device, without memory, at any size."""
    size = sum(p.numel() for p in s.build().parameters())
    with torch.device("meta"):
        large = build_model(s.name, vocab_size=50_000, d_model=4096, num_layers=2, **s.options)
    real = [n for n, p in large.named_parameters() if not p.is_meta]
    need(not real, f"{', '.join(real)}: made on a device of its own choice")
    return f"{size} parameters at width {WIDTH}"


def shapes(s: Subject) -> str:
    """(B, L) tokens become (B, L, V) logits, and a layer's output is shaped as its input."""
    logits_of(s.model(), VOCAB)
    return "(B, L) -> (B, L, V)"


@torch.no_grad()
def logits_of(model: Any, vocab_size: int) -> Tensor:
    """Logits of a few tokens, from forward, forward with a state, and step; raises Broken."""
    tokens = _tokens(3, 9) % vocab_size
    wrong: list[str] = []

    def watch(module: nn.Module, arguments: Any, result: Any) -> None:
        y = result[0] if isinstance(result, tuple) else result
        if not isinstance(y, Tensor) or y.shape != arguments[0].shape:
            got = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
            wrong.append(f"{type(module).__name__} maps {tuple(arguments[0].shape)} to {got}")

    for module in model.modules():
        if isinstance(module, SequenceLayer | Block):
            module.register_forward_hook(watch)
    try:
        logits = model(tokens)
        with_state = model(tokens, model.initial_state(3))
        stepped = model.step(tokens[:, 0], model.initial_state(3))
    except Exception as error:
        if wrong:  # and what failed is a consequence
            raise Broken(wrong[0]) from error
        raise
    need(not wrong, wrong[0] if wrong else "")
    need(isinstance(logits, Tensor), "forward without a state returns more than the logits")
    for found, call in ((with_state, "forward with a state"), (stepped, "step")):
        need(isinstance(found, tuple) and len(found) == 2, f"{call} returns no (output, state)")
    for got, want in (
        (logits, (3, 9, vocab_size)),
        (with_state[0], (3, 9, vocab_size)),
        (stepped[0], (3, vocab_size)),
    ):
        need(tuple(got.shape) == want, f"logits {tuple(got.shape)}: must be {want}")
    return logits


def dtypes(s: Subject) -> str:
    """In float64 parameters logits are float64: nothing is cast on the way."""
    logits = s.model()(_tokens(2, 5))
    need(logits.dtype == torch.float64, f"logits of a float64 model are {logits.dtype}")
    return "logits in the parameters' dtype"


@torch.no_grad()
def determinism(s: Subject) -> str:
    """Built twice from one seed it is the same, and so is what it says twice."""
    one, other = s.build().eval(), s.build().eval()
    for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
        need(torch.equal(a, b), f"{name} is initialised by other than torch's seeded generator")
    tokens = _tokens(2, 12)
    need(torch.equal(one(tokens), one(tokens)), "forward twice gives two results")
    return "the same weights and outputs twice"


@torch.no_grad()
def causality(s: Subject) -> str:
    """Changing a token leaves every earlier output alone, and changes those after it."""
    model, tokens = s.model(), _tokens(2, 24)
    changed = tokens.clone()
    changed[:, 13] = (changed[:, 13] + 1) % VOCAB
    moved = (model(tokens) - model(changed)).abs().amax((0, 2))
    # A Fourier transform leaks rounding into the past, nothing more.
    early = float(moved[:13].max())
    need(early < 1e-12, f"a token at 13 moves the outputs before it by {early:.1e}")
    window = s.options.get("window")
    heard = moved[13:] if window is None else moved[13:14]
    deaf = (heard < TOLERANCE).nonzero()[:, 0] + 13
    need(not len(deaf), f"outputs at {deaf.tolist()} do not hear a token at 13")
    return f"the past moves by {early:.0e} at most"


@torch.no_grad()
def forward_is_step(s: Subject) -> str:
    """Decoding token by token gives what forward gives."""
    model, tokens = s.model(), _tokens(3, 21)
    state, steps = model.initial_state(3), []
    for t in range(tokens.shape[1]):
        logits, state = model.step(tokens[:, t], state)
        steps.append(logits)
    return _close(torch.stack(steps, 1), model(tokens), "step and forward")


@torch.no_grad()
def pieces_are_the_whole(s: Subject) -> str:
    """Forward in pieces that carry the state gives the whole, and the state goes on in step."""
    model, tokens = s.model(), _tokens(2, 40)
    state, pieces = model.initial_state(2), []
    for piece in tokens.split([1, 2, 17, 19, 1], 1):
        logits, state = model(piece, state)
        pieces.append(logits)
    logits, _ = model.step(tokens[:, 0], state)
    whole = model(torch.cat([tokens, tokens[:, :1]], 1))
    _close(logits, whole[:, -1], "a step from forward's state and forward")
    return _close(torch.cat(pieces, 1), whole[:, :-1], "pieces and whole")


@torch.no_grad()
def resets(s: Subject) -> str:
    """With `reset`, packed documents are each by itself; a part that cannot does not say it can."""
    model, tokens = s.model(), _tokens(2, 30)
    reason = cannot_reset(model)
    if reason is not None:
        return f"not claimed: {reason}"
    lengths = ((7, 1, 13, 9), (2, 28))
    reset = torch.zeros(tokens.shape, dtype=torch.bool)
    for row, parts in zip(reset, lengths, strict=True):
        row[torch.tensor([0, *parts]).cumsum(0)[:-1]] = True
    alone = [
        torch.cat([model(document[None])[0] for document in row.split(parts)])
        for row, parts in zip(tokens, lengths, strict=True)
    ]
    # Rotary positions count from the sequence's start, in float32.
    return _close(
        model(tokens, reset=reset), torch.stack(alone), "packed and single documents", 1e-4
    )


@torch.no_grad()
def state_size(s: Subject) -> str:
    """state_size(length) is the count of numbers in the state after as many tokens."""
    model, told = s.model(), []
    for length in (1, 9, 40):
        _, state = model(_tokens(2, length), model.initial_state(2))
        leaves = tree_leaves(state)
        need(
            all(isinstance(t, Tensor) and t.ndim and t.shape[0] == 2 for t in leaves),
            "a part of the state is no tensor with the batch as its first axis",
        )
        numbers = sum(t[0].numel() * (2 if t.is_complex() else 1) for t in leaves)
        said = model.state_size(length)
        need(said == numbers, f"state_size({length}) says {said}, the state has {numbers}")
        told.append(f"{numbers} after {length}")
    return ", ".join(told)


def gradients(s: Subject) -> str:
    """The loss reaches every parameter."""
    model = s.model()
    # A U-Net's centre says its first word when as many positions are over.
    tokens = _tokens(2, max(12, getattr(model, "full_length", 1)))
    nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
    named = dict(model.named_parameters())
    idle = [n for n, p in named.items() if p.grad is None or not p.grad.abs().max() > 0]
    need(not idle, f"no gradient reaches {', '.join(idle)}")
    return f"all {len(named)}"


def weight_decay(s: Subject) -> str:
    """What no_weight_decay marks stays marked and spared, as every vector; all else is decayed."""
    model = s.build()
    marked = {n for n, p in model.named_parameters() if getattr(p, "_no_weight_decay", False)}
    model = model.double().to("cpu").train()
    lost = marked - {n for n, p in model.named_parameters() if hasattr(p, "_no_weight_decay")}
    need(not lost, f"{', '.join(sorted(lost))}: the mark is lost")
    decay, spared = ({id(p) for p in g["params"]} for g in parameter_groups(model, 0.1))
    for name, p in model.named_parameters():
        own = spared if name in marked or p.ndim < 2 else decay
        need(id(p) in own, f"{name} is in the wrong group of the optimizer")
    return f"{len(marked)} marked, {len(spared)} spared, {len(decay)} decayed"


def autocast(s: Subject) -> str:
    """It trains under bfloat16 autocast, near the float32 result."""
    model = s.model().float()
    tokens = _tokens(2, max(12, getattr(model, "full_length", 1)))
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(tokens).float().logsumexp(-1).mean()
    loss.backward()
    exact = model(tokens).logsumexp(-1).mean().item()
    error = abs(loss.item() - exact)
    need(error < 0.03 * (1 + abs(exact)), f"the result is {error:.2g} off float32's")
    finite = all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    need(finite, "a gradient is missing or not finite")
    return f"{error:.0e} off float32"


def config_keys_live(s: Subject) -> str:
    """Changing an option, by itself or beside another, changes parameters, outputs or the state."""
    backbone = s.options.get("backbone")
    configs = config_of(s.name, backbone)
    options = {**options_of(s.name, backbone), **s.options}
    hints = {k: v for one in configs for k, v in get_type_hints(one).items()}
    others = {key: alternatives(hints[key], value) for key, value in options.items()}
    live, untried = [], []
    for key in options if s.keys is None else s.keys:
        changed = _changes(s, key, others[key], {})
        if changed is None:
            untried.append(key)
            continue
        # Some options only count under another: the MLP's width where there is an MLP.
        siblings = next(h for h in map(get_type_hints, configs) if key in h)
        beside = ({k: v} for k in siblings if k != key for v in others[k][:3])
        need(
            changed or any(_changes(s, key, others[key], more) for more in beside),
            f"{key} changes nothing",
        )
        live.append(key)
    if not live and untried:
        raise NotChecked(f"no other value is known for {', '.join(untried)}")
    more = f"; no other value known for {', '.join(untried)}" if untried else ""
    return (", ".join(live) or "no options") + more


RULES: tuple[Rule[Subject], ...] = (
    config,
    builds,
    shapes,
    dtypes,
    determinism,
    causality,
    forward_is_step,
    pieces_are_the_whole,
    resets,
    state_size,
    gradients,
    weight_decay,
    autocast,
    config_keys_live,
)
GATES: tuple[Rule[Subject], ...] = (config, builds, shapes)


def _tokens(batch: int, length: int) -> Tensor:
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(1))


def _close(one: Tensor, other: Tensor, what: str, tolerance: float = TOLERANCE) -> str:
    error = float(((one - other).abs() / (1 + other.abs())).max())
    need(error < tolerance, f"{what} differ by {error:.1e}")
    return f"differ by {error:.0e} at most"


def _changes(s: Subject, key: str, others: Sequence[Any], beside: Mapping[str, Any]) -> bool | None:
    """Whether another value of the option shows, beside some changes; None: no value is valid."""
    tried = None
    try:
        here = _shows(s, beside)
    except ModelError:
        return None
    for other in others:
        try:
            shown = _shows(s, {**beside, key: other})
        except ModelError:  # not valid, or not at this width
            continue
        tried = False
        if not _equal(here, shown):
            return True
    return tried


@torch.no_grad()
def _shows(s: Subject, options: Mapping[str, Any]) -> list[Any]:
    """Parameters, training outputs (dropout is an option too), decoded outputs, state sizes."""
    model = s.build(**options)
    shown: list[Any] = [p.detach().clone() for p in model.parameters()]
    torch.manual_seed(1)
    for parameter in model.parameters():
        parameter += 0.05 * torch.randn_like(parameter)
    tokens = _tokens(2, 24)
    shown += [model.train()(tokens), model.eval()(tokens)]
    return [*shown, *(model.state_size(length) for length in (1, 24, 5000))]


def _equal(one: list[Any], other: list[Any]) -> bool:
    return len(one) == len(other) and all(
        torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a == b
        for a, b in zip(one, other, strict=True)
    )
