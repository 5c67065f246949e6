"""Evaluation in bounded memory: by groups of rows, and in pieces with carried state."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqbench.tasks.base import IGNORE, METRICS, Split, Task, bits

# Tokens of one forward pass: bounds memory at any length and changes no result but by rounding.
MAX_TOKENS = 2**16


@dataclass
class Sums:
    """What a pass over batches adds up to."""

    nats: float = 0.0
    correct: int = 0
    scored: int = 0
    correct_sequences: int = 0
    sequences: int = 0

    def metrics(self, task: Task, split: Split) -> dict[str, float]:
        """Metric name (a key of METRICS) -> value."""
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
        return {name: found[name] for name in METRICS if name in found}


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

    A batch with more than MAX_TOKENS tokens goes through in groups of rows, and a row longer than
    that in pieces that carry the model's state.
    """
    sums = Sums()
    training = model.training
    model.eval()
    try:
        available = task.num_batches(split, batch_size)
        index = tokens = 0
        while (index == 0 or tokens < max_tokens) and (available is None or index < available):
            batch = task.batch(split, index, batch_size)
            rows = max(1, MAX_TOKENS // max(1, batch.inputs.shape[1]))
            for inputs, targets in zip(
                batch.inputs.split(rows), batch.targets.split(rows), strict=True
            ):
                _add(sums, model, inputs.to(device), targets.to(device))
            tokens += batch.inputs.numel()
            index += 1
    finally:
        model.train(training)
    return sums.metrics(task, split)


def _add(sums: Sums, model: nn.Module, inputs_BL: Tensor, targets_BL: Tensor) -> None:
    B, L = inputs_BL.shape
    wrong_B = torch.zeros(B, dtype=torch.long, device=inputs_BL.device)
    state = model.initial_state(B, inputs_BL.device) if L > MAX_TOKENS else None  # type: ignore[operator]
    for start in range(0, L, MAX_TOKENS):
        piece = inputs_BL[:, start : start + MAX_TOKENS]
        if state is None:
            logits_BLV = model(piece)
        else:
            logits_BLV, state = model(piece, state)
        targets = targets_BL[:, start : start + MAX_TOKENS]
        scored = targets != IGNORE
        logits = logits_BLV[scored].float()
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
