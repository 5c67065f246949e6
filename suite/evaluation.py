"""Evaluation in bounded memory: by groups of rows, and in pieces with carried state."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqbench.suite.cost import flops_per_token
from seqbench.tasks.base import IGNORE, METRICS, Split, Task, bits

# Tokens of one forward pass: bounds memory at any length and changes no result but by rounding.
MAX_TOKENS = 2**16
MAX_LOGITS = 2**26  # numbers, of one forward pass: fewer tokens where the vocabulary is large
# Longest row of a model whose state grows with the length: it goes through in one pass.
MAX_ROW = 2**17
FEWEST_ROWS = 8  # of a batch of long rows: fewer would say too little
MAX_FLOPS = 2**42  # forward, of a test at another length: a minute or two of one core
PROBE = (
    64  # length at which a model's FLOPs are counted; and at 4 and 16 times it, for their growth
)


@dataclass
class Sums:
    """What a pass over batches adds up to."""

    nats: float = 0.0
    correct: int = 0
    scored: int = 0
    correct_sequences: int = 0
    sequences: int = 0
    # Nats and scored tokens by bucket of positions: 0, 1, 2 to 3, 4 to 7, ...
    by_position: dict[int, tuple[float, int]] = field(default_factory=dict)

    def losses_by_position(self) -> dict[str, float]:
        """First position of a bucket -> mean nats of its tokens; the next begins at twice that."""
        return {
            str(2**bucket // 2): nats / scored
            for bucket, (nats, scored) in sorted(self.by_position.items())
        }

    def metrics(self, task: Task, split: Split) -> dict[str, float]:
        """Metric name (a key of METRICS) -> value; and "sequences", of how many."""
        if not self.scored:
            return {}
        loss = self.nats / self.scored
        found = {
            "accuracy": self.correct / self.scored,
            "sequence_accuracy": self.correct_sequences / self.sequences,
            "loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),
        }
        if task.headline not in found:  # the bits_per_* that the task names
            found[task.headline] = bits(loss) / task.units_per_token(split)
        metrics = {name: found[name] for name in METRICS if name in found}
        return {**metrics, "sequences": float(self.sequences)}


def evaluate(
    model: nn.Module,
    task: Task,
    split: Split,
    *,
    batch_size: int,
    max_tokens: int,
    device: torch.device,
) -> dict[str, float]:
    """Metrics of a model on a split: whole batches up to about `max_tokens` tokens, at least one.

    Rows so long that a batch would exceed that come fewer to a batch, FEWEST_ROWS at the least. A
    batch with more than MAX_TOKENS tokens goes through in groups of rows; longer rows in pieces
    that carry the model's state, unless that state grows with the length.
    """
    sums = add_up(model, task, split, batch_size=batch_size, max_tokens=max_tokens, device=device)
    return sums.metrics(task, split)


@torch.no_grad()
def add_up(
    model: nn.Module,
    task: Task,
    split: Split,
    *,
    batch_size: int,
    max_tokens: int,
    device: torch.device,
    positions: bool = False,
) -> Sums:
    """The sums of `evaluate`; with `positions` also those of every bucket of positions."""
    sums = Sums()
    training = model.training
    model.eval()
    try:
        length = task.batch(split, 0, 1).inputs.shape[1]
        batch_size = min(batch_size, max(FEWEST_ROWS, max_tokens // length))
        in_pieces = length > MAX_TOKENS and not _state_grows(model, length)
        at_once = min(MAX_TOKENS, max(1, MAX_LOGITS // task.vocab_size))
        rows = batch_size if in_pieces else max(1, at_once // length)
        piece = max(1, at_once // batch_size) if in_pieces else length
        available = task.num_batches(split, batch_size)
        index = tokens = 0
        while (index == 0 or tokens < max_tokens) and (available is None or index < available):
            batch = task.batch(split, index, batch_size)
            for inputs, targets in zip(
                batch.inputs.split(rows), batch.targets.split(rows), strict=True
            ):
                _add(sums, model, task, inputs.to(device), targets.to(device), piece, positions)
            tokens += batch.inputs.numel()
            index += 1
    finally:
        model.train(training)
    return sums


def tokens_within_reach(model: nn.Module, length: int, device: torch.device) -> int | str:
    """How many tokens, in rows of that length, can be tested at a sane cost; or why none can.

    By FLOPs, counted at three short lengths and carried on (a token's grow with the length for
    attention, with its logarithm for an FFT), and for a model whose state grows by the memory of
    one row. The answer depends on no clock.
    """
    if length > MAX_ROW and _state_grows(model, length):
        return (
            f"length {length} is too long: the state grows with it, so a row goes through in one "
            f"pass, of at most {MAX_ROW} tokens"
        )
    # Counted where a U-Net's centre has had its say; its share then grows no more.
    probe = max(PROBE, getattr(model, "full_length", 1) // PROBE * PROBE)
    flops, at_4, at_16 = (flops_per_token(model, n * probe, device) for n in (1, 4, 16))
    by_length = max(0.0, ((at_16 - at_4) - (at_4 - flops)) / (9 * probe))
    by_doubling = (at_4 - flops - by_length * 3 * probe) / 2
    row = length * (flops + by_length * (length - probe) + by_doubling * math.log2(length / probe))
    if FEWEST_ROWS * row > MAX_FLOPS:
        return (
            f"length {length} is too long: {FEWEST_ROWS} sequences take "
            f"{FEWEST_ROWS * row:.1e} FLOPs, the limit is {MAX_FLOPS:.1e}"
        )
    return int(MAX_FLOPS / row) * length


def _add(
    sums: Sums,
    model: nn.Module,
    task: Task,
    inputs_BL: Tensor,
    targets_BL: Tensor,
    piece: int,
    positions: bool,
) -> None:
    B, L = inputs_BL.shape
    wrong_B = torch.zeros(B, dtype=torch.long, device=inputs_BL.device)
    state = model.initial_state(B, inputs_BL.device) if piece < L else None  # type: ignore[operator]
    for place in torch.arange(L, device=inputs_BL.device).split(piece):
        inputs, targets = inputs_BL[:, place], targets_BL[:, place]
        scored = targets != IGNORE
        # Logits where something is scored alone: a million tokens with one answer need one.
        asked = {"at": scored} | resets_of(task, inputs)
        if state is None:
            logits = model(inputs, **asked).float()
        else:
            logits, state = model(inputs, state, **asked)
            logits = logits.float()
        wanted = targets[scored]
        right = torch.zeros_like(scored)
        right[scored] = logits.argmax(-1) == wanted
        sums.nats += F.cross_entropy(logits, wanted, reduction="sum").item()
        sums.correct += int(right.sum())
        sums.scored += wanted.numel()
        wrong_B += (scored & ~right).sum(1)
        if positions:
            nats = F.cross_entropy(logits, wanted, reduction="none")
            _add_positions(sums, nats, place.expand_as(targets)[scored])
    has_target = (targets_BL != IGNORE).any(1)
    sums.sequences += int(has_target.sum())
    sums.correct_sequences += int((has_target & (wrong_B == 0)).sum())


def resets_of(task: Task, inputs_BL: Tensor) -> dict[str, Tensor]:
    """The keyword that keeps packed documents apart in a model's forward; nothing if none are."""
    resets = task.resets(inputs_BL)
    return {} if resets is None else {"reset": resets}


def _add_positions(sums: Sums, nats: Tensor, position: Tensor) -> None:
    bucket = torch.frexp(position.double()).exponent.long()  # 0, 1, 2, 2, 3, ... of 0, 1, 2, 3, 4
    counts = bucket.bincount().tolist()
    totals = bucket.bincount(weights=nats.double()).tolist()
    for i, (total, count) in enumerate(zip(totals, counts, strict=True)):
        if count:
            before, seen = sums.by_position.get(i, (0.0, 0))
            sums.by_position[i] = before + total, seen + count


def _state_grows(model: nn.Module, length: int) -> bool:
    size = model.state_size
    return size(2 * length) > size(length)  # type: ignore[operator]
