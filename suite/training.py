"""Trains one cell: the LightningModule, validations, checkpoints, and run_cell(cell) -> Record.

The data stream, the rate and the curriculum are functions of the step and of the checkpointed state
alone, so a run that was killed goes on with the very batches it would have seen.
"""

from __future__ import annotations

import csv
import hashlib
import logging
import math
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import lightning
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqbench.models.build import build_model, parameter_groups
from seqbench.suite import checkpoint
from seqbench.suite.configuration import prepared_task
from seqbench.suite.cost import flops_per_token, kernel_backends
from seqbench.suite.environment import environment, peak_memory, reset_peak_memory
from seqbench.suite.evaluation import evaluate, tokens_within_reach
from seqbench.suite.experiment import Cell, UserError
from seqbench.suite.records import Cost, CurvePoint, Record, to_plain
from seqbench.suite.schedule import learning_rate
from seqbench.tasks.base import IGNORE, METRICS, Batch, Task

Event = Mapping[str, Any]
Listener = Callable[[Event], None]

CHECKPOINT_SECONDS = 10.0  # at most this much work is lost to a kill (and one validation interval)
EVENT_SECONDS = 0.5
STAGE_STEPS = 10  # a stage of the curriculum lasts at least this many steps
ACCURACY_DECAY = 0.9  # of the moving average that ends a stage


class Diverged(RuntimeError):
    """The loss is no longer a finite number."""


class CellModule(lightning.LightningModule):
    """One cell in training. `step` counts optimizer steps over all sittings of the run."""

    def __init__(self, cell: Cell, task: Task, model: nn.Module, listener: Listener) -> None:
        super().__init__()
        self.cell, self.task, self.model, self.listener = cell, task, model, listener
        self.step = 0
        self.tokens = 0
        self.seconds = 0.0
        self.stage: int | None = 0 if cell.train.curriculum and task.num_stages else None
        self.stage_started = 0
        self.accuracy = 0.0  # moving average over training batches, while a curriculum lasts
        self.curve: list[CurvePoint] = []
        self.best: dict[str, Tensor] = {}  # the weights of the best validation, the last of equals
        self.solved_at: int | None = None
        self.after_validation: Callable[[], None] = lambda: None
        self._began = self._told = time.perf_counter()
        self._loss = torch.tensor(math.nan)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        train = self.cell.train
        return torch.optim.AdamW(
            parameter_groups(self.model, train.weight_decay),
            lr=train.lr,
            betas=(train.beta1, train.beta2),
        )

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self._began = time.perf_counter()
        rate = learning_rate(self.cell.train, self.step)
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] = rate

    def training_step(self, index: int, batch_idx: int) -> Tensor:
        cell = self.cell
        self._advance_curriculum()
        batch = Batch(
            *self.task.batch(
                "train", index, cell.train.batch_size, seed=cell.seed, stage=self.stage
            )
        )
        inputs, targets = batch.inputs.to(self.device), batch.targets.to(self.device)
        self.tokens += inputs.numel()
        logits_BLV = self.model(inputs)
        loss = F.cross_entropy(
            logits_BLV.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORE
        )
        if self.stage is not None:
            scored = targets != IGNORE
            right = (logits_BLV.detach().argmax(-1) == targets)[scored].float().mean().item()
            self.accuracy = ACCURACY_DECAY * self.accuracy + (1 - ACCURACY_DECAY) * right
        self._loss = loss.detach()
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.step += 1
        validate = self.step % self.cell.train.eval_every == 0 or self.step == self.cell.train.steps
        # On a GPU reading the loss waits for the device, so it is read at validations only.
        if (self.device.type == "cpu" or validate) and not math.isfinite(self._loss.item()):
            raise Diverged(f"the training loss is {self._loss.item()} at step {self.step}")
        self.seconds += time.perf_counter() - self._began
        if validate:
            self._validate()
        self._tell()

    def _advance_curriculum(self) -> None:
        """Ends a stage once it is passed, and every stage by curriculum_until of the steps."""
        if self.stage is None:
            return
        train, last = self.cell.train, self.task.num_stages
        forced = int(self.step / max(1.0, train.curriculum_until * train.steps) * last)
        passed = (
            self.accuracy >= train.curriculum_pass and self.step - self.stage_started >= STAGE_STEPS
        )
        stage = max(self.stage + passed, forced)
        if stage != self.stage:
            self.stage = stage if stage < last else None
            self.stage_started, self.accuracy = self.step, 0.0

    def _validate(self) -> None:
        train, task = self.cell.train, self.task
        batch = task.batch("validation", 0, train.batch_size)
        metrics = evaluate(
            self.model,
            task,
            "validation",
            batch_size=train.batch_size,
            max_tokens=train.eval_batches * batch.inputs.numel(),
            device=self.device,
        )
        better = METRICS[task.headline]
        value = metrics[task.headline]
        earlier = [point.validation[task.headline] for point in self.curve]
        if not earlier or (value >= max(earlier) if better else value <= min(earlier)):
            self.best = {k: v.detach().clone() for k, v in self.model.state_dict().items()}
        self.curve.append(
            CurvePoint(
                step=self.step,
                seconds=self.seconds,
                tokens=self.tokens,
                lr=learning_rate(train, self.step - 1),
                train_loss=self._loss.item(),
                stage=self.stage,
                validation=metrics,
            )
        )
        if train.stop_at is not None and (
            value >= train.stop_at if better else value <= train.stop_at
        ):
            self.solved_at = self.solved_at or self.step
            self.trainer.should_stop = train.stop_early
        if train.patience is not None:
            since = len(earlier) - _best_index([*earlier, value], better)
            if since >= train.patience:
                self.trainer.should_stop = True
        self.after_validation()

    def _tell(self) -> None:
        now = time.perf_counter()
        if now - self._told < EVENT_SECONDS:
            return
        self._told = now
        headline = self.task.headline
        self.listener(
            {
                "event": "step",
                "step": self.step,
                "steps": self.cell.train.steps,
                "loss": self._loss.item(),
                "stage": self.stage,
                "headline": headline,
                "value": self.curve[-1].validation[headline] if self.curve else None,
            }
        )

    def pack(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything a later sitting needs, as tensors and plain data."""
        tensors = {f"model/{k}": v for k, v in self.model.state_dict().items()}
        tensors |= {f"best/{k}": v for k, v in self.best.items()}
        tensors |= checkpoint.pack_optimizer(self.trainer.optimizers[0])
        tensors["rng/torch"] = torch.get_rng_state()
        state = {
            "step": self.step,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "stage": self.stage,
            "stage_started": self.stage_started,
            "accuracy": self.accuracy,
            "solved_at": self.solved_at,
            "curve": [asdict(point) for point in self.curve],
        }
        return tensors, state

    def unpack(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Puts back what `pack` took, but for the optimizer, which does not exist yet."""
        self.model.load_state_dict(_below("model/", tensors))
        self.best = _below("best/", tensors)
        for name in (
            "step",
            "tokens",
            "seconds",
            "stage",
            "stage_started",
            "accuracy",
            "solved_at",
        ):
            setattr(self, name, state[name])
        self.curve = [CurvePoint(**point) for point in state["curve"]]

    def on_train_start(self) -> None:
        """A resumed run's optimizer and random state, once Lightning has made the optimizer."""
        if self._resumed is not None:
            checkpoint.unpack_optimizer(self.trainer.optimizers[0], self._resumed)
            torch.set_rng_state(self._resumed["rng/torch"])

    _resumed: Mapping[str, Tensor] | None = None


def run_cell(
    cell: Cell,
    results: Path,
    *,
    device: str = "auto",
    listener: Listener = lambda event: None,
    stop_after: int | None = None,
) -> Record | None:
    """Trains and tests a cell, from its checkpoint if it has one; its own failure is a record too.

    `stop_after` ends this sitting after so many steps, checkpointed, and returns None.
    """
    began = time.perf_counter()
    place = _device(device)
    try:
        return _run(cell, results, place, listener, stop_after, began)
    except Diverged as error:
        return _unfinished(cell, "diverged", str(error), place)
    except UserError:
        raise
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        message = f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"
        logging.getLogger("seqbench").debug("%s", traceback.format_exc())
        return _unfinished(cell, "failed", message, place)


def _run(
    cell: Cell,
    results: Path,
    device: torch.device,
    listener: Listener,
    stop_after: int | None,
    began: float,
) -> Record | None:
    reset_peak_memory(device)
    task = prepared_task(cell.task, cell.task_config)
    if task.fingerprint() != cell.data_fingerprint:
        raise UserError(
            f"{cell.label}: the data changed since the cell was resolved; run the command again"
        )
    train = cell.train
    torch.manual_seed(_seed(cell, "init"))
    model = build_model(cell.model, vocab_size=task.vocab_size, **cell.model_config).to(device)
    module = CellModule(cell, task, model, listener)
    saved = results / "checkpoints" / f"{cell.digest}.safetensors"
    if saved.exists():
        tensors, state = checkpoint.read(saved)
        if not state.get("finished"):
            module.unpack(tensors, state)
            module._resumed = tensors
    last_saved = time.perf_counter()

    def save() -> None:
        nonlocal last_saved
        if time.perf_counter() - last_saved > CHECKPOINT_SECONDS:
            checkpoint.write(saved, *module.pack())
            last_saved = time.perf_counter()
        _write_log(results / "logs" / f"{cell.digest}.csv", module.curve)

    module.after_validation = save
    end = train.steps if stop_after is None else min(train.steps, module.step + stop_after)
    if module.step < train.steps and not _stopped(module):
        model.train()
        fit(module, range(module.step, end), device)
        if module.step < train.steps and not _stopped(module):
            checkpoint.write(saved, *module.pack())
            return None
    if module.best:
        model.load_state_dict(module.best)
    budget = train.test_batches * task.batch("test", 0, train.batch_size).inputs.numel()

    def test(which: Task, tokens: int) -> dict[str, float]:
        listener({"event": "testing"})
        return evaluate(
            model,
            which,
            "test",
            batch_size=train.batch_size,
            max_tokens=tokens,
            device=device,
        )

    scores = test(task, budget)
    variants: dict[str, dict[str, float]] = {}
    stopped: dict[str, str] = {}
    for label, variant in task.test_variants().items():
        length = variant.batch("test", 0, 1).inputs.shape[1]
        reach = tokens_within_reach(model, length, device)
        if isinstance(reach, str):
            stopped[label] = reach
        else:
            variants[label] = test(variant, min(budget, reach))
    memory = peak_memory(device)
    length = task.batch("validation", 0, 1).inputs.shape[1]
    checkpoint.write(
        saved,
        {f"model/{k}": v for k, v in model.state_dict().items()},
        {"finished": True, "cell": asdict(cell)},
    )
    return Record(
        cell=cell,
        digest=cell.digest,
        status="done",
        headline=task.headline,
        higher_is_better=METRICS[task.headline],
        test=scores,
        variants=variants,
        stopped=stopped,
        chance=task.chance(),
        baselines=task.baselines(),
        curve=tuple(module.curve),
        steps_done=module.step,
        solved_at=module.solved_at,
        cost=Cost(
            parameters=sum(p.numel() for p in model.parameters()),
            state_numbers=model.state_size(length),
            flops_per_token=flops_per_token(model, length, device),
            tokens_per_second=module.tokens / module.seconds,
            peak_memory_bytes=memory,
            train_seconds=module.seconds,
            wall_seconds=time.perf_counter() - began,
        ),
        environment=environment(device, kernel_backends()),
    )


def fit(module: CellModule, steps: range, device: torch.device) -> None:
    """Takes the steps of that range through Lightning."""
    train = module.cell.train
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    with warnings.catch_warnings():
        # The stream makes its batches in the step itself: there is no loader to give workers to.
        warnings.filterwarnings("ignore", category=UserWarning, module="lightning")
        warnings.filterwarnings("ignore", category=FutureWarning)
        trainer = lightning.Trainer(
            barebones=True,  # no logger, bar or checkpoints of its own: records are ours
            accelerator="gpu" if device.type == "cuda" else "cpu",
            devices=1,
            precision=train.precision,
            gradient_clip_val=train.clip or None,
            max_epochs=1,
            use_distributed_sampler=False,
        )
        trainer.fit(module, train_dataloaders=steps)


def _stopped(module: CellModule) -> bool:
    """Whether an earlier or this sitting ended the run before its last step."""
    train = module.cell.train
    if module.solved_at is not None and train.stop_early:
        return True
    if train.patience is None or not module.curve:
        return False
    headline = module.task.headline
    values = [point.validation[headline] for point in module.curve]
    return len(values) - 1 - _best_index(values, METRICS[headline]) >= train.patience


def _best_index(values: list[float], higher: bool) -> int:
    return values.index(max(values) if higher else min(values))


def _unfinished(cell: Cell, status: Any, error: str, device: torch.device) -> Record:
    return Record(
        cell=cell,
        digest=cell.digest,
        status=status,
        error=error,
        environment=environment(device, kernel_backends()),
    )


def _write_log(path: Path, curve: list[CurvePoint]) -> None:
    """The curve so far as CSV, for people who watch a run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        rows = [to_plain(replace(point)) for point in curve]
        writer.writerow([*(k for k in rows[0] if k != "validation"), *rows[0]["validation"]])
        for row in rows:
            metrics = row.pop("validation")
            writer.writerow([*row.values(), *metrics.values()])


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _seed(cell: Cell, purpose: str) -> int:
    """A 63-bit seed from the cell's seed and a purpose; the same initialisation for every task."""
    text = f"{cell.seed}/{purpose}".encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "little") >> 1


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA device here; valid here: cpu, auto")
    if name not in ("cpu", "cuda"):
        raise UserError(f"--device {name}: valid are auto, cpu, cuda")
    return torch.device(name)
