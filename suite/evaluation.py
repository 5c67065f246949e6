"""Evaluation in bounded memory: by groups of rows, and in pieces with carried state."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqbench.suite.cost import flops_per_token
from seqbench.tasks.base import IGNORE, METRICS, Split, Task, bits

# Tokens of one forward pass: bounds memory at any length and changes no result but by rounding.
MAX_TOKENS = 2**16
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


@torch.no_grad()
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
    sums = Sums()
    training = model.training
    model.eval()
    try:
        length = task.batch(split, 0, 1).inputs.shape[1]
        batch_size = min(batch_size, max(FEWEST_ROWS, max_tokens // length))
        in_pieces = length > MAX_TOKENS and not _state_grows(model, length)
        rows = batch_size if in_pieces else max(1, MAX_TOKENS // length)
        piece = max(1, MAX_TOKENS // batch_size) if in_pieces else length
        available = task.num_batches(split, batch_size)
        index = tokens = 0
        while (index == 0 or tokens < max_tokens) and (available is None or index < available):
            batch = task.batch(split, index, batch_size)
            for inputs, targets in zip(
                batch.inputs.split(rows), batch.targets.split(rows), strict=True
            ):
                _add(sums, model, inputs.to(device), targets.to(device), piece)
            tokens += batch.inputs.numel()
            index += 1
    finally:
        model.train(training)
    return sums.metrics(task, split)


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


def _add(sums: Sums, model: nn.Module, inputs_BL: Tensor, targets_BL: Tensor, piece: int) -> None:
    B, L = inputs_BL.shape
    wrong_B = torch.zeros(B, dtype=torch.long, device=inputs_BL.device)
    state = model.initial_state(B, inputs_BL.device) if piece < L else None  # type: ignore[operator]
    for inputs, targets in zip(inputs_BL.split(piece, 1), targets_BL.split(piece, 1), strict=True):
        scored = targets != IGNORE
        # Logits where something is scored alone: a million tokens with one answer need one.
        if state is None:
            logits = model(inputs, at=scored).float()
        else:
            logits, state = model(inputs, state, at=scored)
            logits = logits.float()
        wanted = targets[scored]
        right = torch.zeros_like(scored)
        right[scored] = logits.argmax(-1) == wanted
        sums.nats += F.cross_entropy(logits, wanted, reduction="sum").item()
        sums.correct += int(right.sum())
        sums.scored += wanted.numel()
        wrong_B += (scored & ~right).sum(1)
    has_target = (targets_BL != IGNORE).any(1)
    sums.sequences += int(has_target.sum())
    sums.correct_sequences += int((has_target & (wrong_B == 0)).sum())


def _state_grows(model: nn.Module, length: int) -> bool:
    size = model.state_size
    return size(2 * length) > size(length)  # type: ignore[operator]
