"""Trains one cell: the LightningModule, validations, checkpoints, and run_cell(cell) -> Record.

The data stream, the rate and the curriculum are functions of the step and of the checkpointed state
alone, so a run that was killed goes on with the very batches it would have seen.
"""

from __future__ import annotations

import csv
import hashlib
import io
import logging
import math
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import torch
import torch.nn.functional as F
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from torch import Tensor, nn

from seqbench.models.base import cannot_reset
from seqbench.models.build import build_model, parameter_groups
from seqbench.models.segments import accumulated_loss, cannot_carry, segmented_loss
from seqbench.suite import checkpoint, ranks
from seqbench.suite.configuration import code_of, prepared_task
from seqbench.suite.cost import flops_per_token, kernel_backends
from seqbench.suite.environment import cores, environment, peak_memory, reset_peak_memory
from seqbench.suite.evaluation import add_up, evaluate, resets_of, tokens_within_reach
from seqbench.suite.execution import Compile
from seqbench.suite.experiment import Cell, UserError
from seqbench.suite.feed import Feed, Made
from seqbench.suite.initial import load_initial
from seqbench.suite.penalty import Deltas
from seqbench.suite.records import Cost, CurvePoint, Record, to_plain, write_file
from seqbench.suite.schedule import learning_rate
from seqbench.suite.selection import write_selection
from seqbench.suite.sharding import fsdp_strategy, mark, shard, whole
from seqbench.tasks.base import IGNORE, METRICS, Task

Event = Mapping[str, Any]
Listener = Callable[[Event], None]

CHECKPOINT_SECONDS = 10.0  # a kill loses about this much work,
CHECKPOINT_SHARE = 0.02  # or more where writing would take more than this part of the time
EVENT_SECONDS = 0.5
STAGE_STEPS = 10  # a stage of the curriculum is passed after a multiple of this many steps
ACCURACY_DECAY = 0.9  # of the moving average that ends a stage
AGREE_STEPS = 10  # steps between looks at `pause` where several processes must agree
ERROR_LENGTH = 500  # of an exception's own words, in a record
LOG_LINES = 10  # of a traceback, kept in the record
PREFETCH = 4  # processes that make batches for a GPU, at most


class Diverged(RuntimeError):
    """The loss is no longer a finite number."""


class Unable(RuntimeError):
    """The model cannot do what the cell asks for: the cell is skipped, with the reason."""


class Paused(Exception):
    """This sitting ends in the middle of an evaluation."""


class CellModule(lightning.LightningModule):
    """One cell in training. `step` counts optimizer steps over all sittings of the run."""

    def __init__(self, cell: Cell, task: Task, model: nn.Module, listener: Listener) -> None:
        super().__init__()
        self.cell, self.task, self.model, self.listener = cell, task, model, listener
        self.step = 0
        self.tokens = 0
        self.seconds = 0.0  # of training, evaluations and checkpoints left out
        self.stage: int | None = 0 if cell.train.curriculum and task.num_stages else None
        self.stage_started = 0
        self.accuracy = torch.tensor(0.0)  # moving average over training batches, in a curriculum
        self.curve: list[CurvePoint] = []
        self.best: dict[str, Tensor] = {}  # the weights of the best validation, the last of equals
        self.solved_at: int | None = None
        self.feed = Feed(
            task,
            batch_size=cell.train.batch_size,
            seed=cell.seed,
            stage=lambda: self.stage,
        )
        self.logits = model.__call__  # or its compiled form
        self._deltas = Deltas(model) if cell.train.delta_penalty else None
        self.sharded = False  # each process keeps a part of every weight
        self._marks: dict[str, dict[str, Any]] = {}  # of the parameters before that
        self.at_end: tuple[dict[str, Tensor], dict[str, Any]] | None = None
        self.pause: Callable[[], bool] = lambda: False
        self.paused = False
        self.after_step: Callable[[bool], None] = lambda validated: None
        self._resumed: Mapping[str, Tensor] | None = None
        self._precision_state: Mapping[str, Any] = {}
        self._began = self._told = time.perf_counter()
        self.loss = torch.tensor(math.nan)  # of the last training batch

    def configure_model(self) -> None:
        """Cuts the model for a run whose processes share its weights."""
        if self.sharded and not self._marks:
            assert self._device_mesh is not None
            self._marks = shard(self.model, self._device_mesh["data_parallel"])

    def on_train_end(self) -> None:
        """The state of a model in shards, whole, while all processes are here to give theirs."""
        if self.sharded:
            self.at_end = self.pack()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        train = self.cell.train
        mark(self.model, self._marks)
        return torch.optim.AdamW(
            parameter_groups(self.model, train.weight_decay),
            lr=train.lr,
            betas=(train.beta1, train.beta2),
            eps=train.eps,
            # One kernel for all parameters; it would undo the loss scaling before the clipping.
            fused=train.precision != "16-mixed",
        )

    def on_train_start(self) -> None:
        """A resumed run's optimizer and random state, once Lightning has made the optimizer."""
        if self._resumed is not None:
            checkpoint.unpack_optimizer(self.trainer.optimizers[0], self._resumed)
            checkpoint.unpack_random(self._resumed, self.device)
            self.trainer.precision_plugin.load_state_dict(dict(self._precision_state))
        self.accuracy = self.accuracy.to(self.device)
        if self._validation_is_due():
            self._validate()
            self.after_step(True)
        self._began = time.perf_counter()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        if self.trainer.should_stop:
            return -1  # the validation that a sitting left undone was the last
        rate = learning_rate(self.cell.train, self.step)
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] = rate
        return None

    def training_step(self, item: int | Made, batch_idx: int) -> Tensor:
        self._advance_curriculum()
        batch = self.feed.batch(item)
        self.tokens += batch.inputs.numel()
        inputs, targets = self._share(batch.inputs), self._share(batch.targets)
        train, (rows, length) = self.cell.train, inputs.shape
        segment = min(length, train.segment_length or length)
        at_once = max(1, (train.micro_tokens or rows * segment) // segment)
        in_groups, in_pieces = rows > at_once, length > segment
        parts = in_groups or in_pieces or self._world > 1  # of the batch, in one loss
        if parts:
            answers = (batch.targets != IGNORE).sum().to(self.device)
        right: dict[tuple[int, int], Tensor] = {}  # by row and place where a part begins

        def loss_of(logits_BLV: Tensor, place: slice, group: slice) -> Tensor:
            wanted = targets[group, place]
            loss = F.cross_entropy(
                logits_BLV.flatten(0, 1).float(),
                wanted.flatten(),
                ignore_index=IGNORE,
                reduction="sum" if parts else "mean",
            )
            if parts:
                # The mean over all processes' tokens, once their gradients are averaged.
                loss = loss * self._world / answers
            if self._deltas is not None:
                share = wanted.numel() / targets.numel()
                loss = loss + train.delta_penalty * share * self._deltas.mean_log()
            if self.stage is not None:
                begins = group.start, place.start
                right[begins] = (logits_BLV.detach().argmax(-1) == wanted).sum()
            return loss

        def loss_of_rows(group: slice) -> Tensor:
            of_group = partial(loss_of, group=group)
            resets = resets_of(self.task, inputs[group])
            if not in_pieces:
                return of_group(self.logits(inputs[group], **resets), slice(0, length))
            return segmented_loss(
                self.model,
                of_group,
                inputs[group],
                segment=segment,
                gradients=train.segment_gradients,
                **resets,
            )

        if in_groups:
            loss = accumulated_loss(loss_of_rows, self.model, rows, at_once=at_once)
        else:
            loss = loss_of_rows(slice(0, rows))
        if self.stage is not None:
            mean = sum(right.values()) / (targets != IGNORE).sum().clamp(min=1)
            self.accuracy = ACCURACY_DECAY * self.accuracy + (1 - ACCURACY_DECAY) * mean
        self.loss = loss.detach()
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.step += 1
        validate = self._validation_is_due()
        # On a GPU reading the loss waits for the device, so it is read at validations only.
        if validate or (self.device.type == "cpu" and self._world == 1):
            loss = self._mean(self.loss)
            if not math.isfinite(loss):
                raise Diverged(f"the training loss is {loss} at step {self.step}")
        if (self._world == 1 or self.step % AGREE_STEPS == 0) and self.agreed(self.pause()):
            self.paused = self.trainer.should_stop = True
        if validate and not self.paused:
            self._validate()
        self.after_step(validate)
        self._tell()

    def settle_seconds(self) -> None:
        """Adds the training time up to now to `seconds`, once the device has caught up."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        self.seconds += now - self._began
        self._began = now

    @contextmanager
    def untimed(self) -> Iterator[None]:
        """What is done inside is not training time."""
        self.settle_seconds()
        try:
            yield
        finally:
            self._began = time.perf_counter()

    @contextmanager
    def stoppable(self) -> Iterator[None]:
        """Inside, a forward pass of the model raises Paused once the sitting is to end."""

        def check(*_: Any) -> None:
            if self.pause():
                raise Paused

        # Where several processes evaluate together, one that left would keep the others waiting.
        handle = self.model.register_forward_pre_hook(check) if self._world == 1 else None
        try:
            yield
        finally:
            if handle is not None:
                handle.remove()

    @property
    def stopped(self) -> bool:
        """Whether the run is over, by its last step or before it."""
        train = self.cell.train
        if self._validation_is_due():
            return False
        if self.step >= train.steps or (self.solved_at is not None and train.stop_early):
            return True
        if train.patience is None or not self.curve:
            return False
        values = [point.validation[self.task.headline] for point in self.curve]
        best = max(values) if METRICS[self.task.headline] else min(values)
        return len(values) - 1 - values.index(best) >= train.patience

    def _advance_curriculum(self) -> None:
        """Ends a stage once it is passed, and every stage by curriculum_until of the steps."""
        if self.stage is None:
            return
        train, last = self.cell.train, self.task.num_stages
        forced = int(self.step / max(1.0, train.curriculum_until * train.steps) * last)
        since = self.step - self.stage_started
        # Reading the average waits for a GPU, so it is not read at every step.
        look = since > 0 and since % STAGE_STEPS == 0
        passed = look and self._mean(self.accuracy) >= train.curriculum_pass
        stage = max(self.stage + passed, forced)
        if stage != self.stage:
            self.stage = stage if stage < last else None
            self.stage_started, self.accuracy = self.step, torch.zeros_like(self.accuracy)

    def _validation_is_due(self) -> bool:
        train = self.cell.train
        at_step = self.step > 0 and (self.step % train.eval_every == 0 or self.step == train.steps)
        return at_step and (not self.curve or self.curve[-1].step < self.step)

    def _validate(self) -> None:
        with self.untimed():
            train, task = self.cell.train, self.task
            batch = task.batch("validation", 0, train.batch_size)
            try:
                with self.stoppable():
                    metrics = evaluate(
                        self.model,
                        task,
                        "validation",
                        batch_size=train.batch_size,
                        max_tokens=train.eval_batches * batch.inputs.numel(),
                        device=self.device,
                    )
            except Paused:
                self.paused = self.trainer.should_stop = True
                return
            self._judge(self.agreed(metrics))

    def _judge(self, metrics: Mapping[str, float]) -> None:
        """Adds a validation to the curve, keeps the weights if best, and stops the run if over."""
        train = self.cell.train
        better = METRICS[self.task.headline]
        value = metrics[self.task.headline]
        earlier = [point.validation[self.task.headline] for point in self.curve]
        if not earlier or (value >= max(earlier) if better else value <= min(earlier)):
            self.best = {k: v.detach().clone() for k, v in self.model.state_dict().items()}
        self.curve.append(
            CurvePoint(
                step=self.step,
                seconds=self.seconds,
                tokens=self.tokens,
                lr=learning_rate(train, self.step - 1),
                train_loss=self._mean(self.loss),
                stage=self.stage,
                validation=metrics,
            )
        )
        self.listener({"event": "validated", "point": asdict(self.curve[-1])})
        if train.stop_at is not None and (
            value >= train.stop_at if better else value <= train.stop_at
        ):
            self.solved_at = self.solved_at or self.step
        if self.stopped:
            self.trainer.should_stop = True

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
                "loss": self.loss.item(),
                "stage": self.stage,
                "headline": headline,
                "value": self.curve[-1].validation[headline] if self.curve else None,
            }
        )

    @property
    def _world(self) -> int:
        return self.trainer.world_size if self._trainer is not None else 1

    def _share(self, whole: Tensor) -> Tensor:
        """This process's rows of a batch, on its device."""
        rows = len(whole) // self._world
        first = rows * self.trainer.global_rank
        return whole[first : first + rows].to(self.device, non_blocking=True)

    def _mean(self, value: Tensor) -> float:
        """The mean over the processes of this run."""
        if self._world > 1:
            value = self.trainer.strategy.reduce(value, reduce_op="mean")
        return float(value)

    def agreed(self, value: Any) -> Any:
        """The first process's value, so that all of them decide alike."""
        return value if self._world == 1 else self.trainer.strategy.broadcast(value)

    def pack(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything a later sitting needs, as tensors and plain data."""
        tensors = {f"model/{k}": v for k, v in self.model.state_dict().items()}
        tensors |= {f"best/{k}": v for k, v in self.best.items()}
        tensors |= {"loss": self.loss, "accuracy": self.accuracy}
        state = {name: getattr(self, name) for name in _PLAIN_STATE}
        state |= {"curve": [asdict(point) for point in self.curve], "precision": {}}
        if self._trainer is not None:  # a sitting that only tests has none
            tensors |= checkpoint.pack_optimizer(self.trainer.optimizers[0])
            tensors |= checkpoint.pack_random(self.device)
            state["precision"] = self.trainer.precision_plugin.state_dict()
        return {name: whole(tensor) for name, tensor in tensors.items()}, state

    def unpack(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Puts back what `pack` took; the optimizer's part waits until there is one."""
        self.model.load_state_dict(_below("model/", tensors))
        self.best = _below("best/", tensors)
        self.loss, self.accuracy = tensors["loss"], tensors["accuracy"]
        for name in _PLAIN_STATE:
            setattr(self, name, state[name])
        self.curve = [CurvePoint(**point) for point in state["curve"]]
        self._resumed, self._precision_state = tensors, state["precision"]


_PLAIN_STATE = ("step", "tokens", "seconds", "stage", "stage_started", "solved_at")


def run_cell(
    cell: Cell,
    results: Path,
    *,
    device: str = "auto",
    devices: int = 1,
    strategy: str = "auto",
    compile: Compile = "off",
    prefetch: int | None = None,
    listener: Listener = lambda event: None,
    pause: Callable[[], bool] = lambda: False,
    stop_after: int | None = None,
    conclude: bool = False,
) -> Record | None:
    """Trains and tests a cell, from its checkpoint if it has one; its own failure is a record too.

    Once `pause` says so, or after `stop_after` steps, this sitting ends, checkpointed, and the
    result is None; a later call goes on. With `conclude` a cell that has been validated is not
    trained any further: it is tested at its best weights so far and recorded as stopped, while its
    checkpoint stays for a call that goes on. The other keywords are those of `Execution`. With
    several devices this process is one of `ranks.group`, and all but the first return None.
    """
    place = device_of(device)
    try:
        run = _Run(cell, results, place, listener, pause, devices, strategy)
        run.module.feed.processes = _prefetch(prefetch, place)
        run.module.feed.pinned = place.type == "cuda"
        if compile != "off":
            run.compile(compile)
        if conclude and not run.over:
            return run.conclude()
        return run.to_the_end(stop_after)
    except Diverged as error:
        return _unfinished(cell, "diverged", str(error), place)
    except Unable as error:
        return _unfinished(cell, "skipped", str(error), place)
    except UserError:
        raise
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        said = " ".join(str(error).split())  # a compiler's can be pages
        said = said if len(said) <= ERROR_LENGTH else said[: ERROR_LENGTH - 3] + "..."
        message = f"{type(error).__name__}: {said} ({Path(where.filename).name}:{where.lineno})"
        if _out_of_memory(error):
            message = f"out of memory: {message}"
        lines = traceback.format_exc().splitlines()
        return replace(_unfinished(cell, "failed", message, place), log=tuple(lines[-LOG_LINES:]))


class _Run:
    """One sitting of a cell: its module, its checkpoint, and what earlier sittings left behind."""

    def __init__(
        self,
        cell: Cell,
        results: Path,
        device: torch.device,
        listener: Listener,
        pause: Callable[[], bool],
        devices: int,
        strategy: str,
    ) -> None:
        self.began = time.perf_counter()
        self.cell, self.device, self.listener = cell, device, listener
        self.devices, self.strategy = devices, strategy
        reset_peak_memory(device)
        self.task = prepared_task(cell.task, cell.task_config)
        if self.task.fingerprint() != cell.data_fingerprint:
            raise UserError(
                f"{cell.label}: the data changed since the cell was resolved; run the command again"
            )
        if code_of(cell.task, cell.model, cell.model_config) != cell.code:
            raise UserError(
                f"{cell.label}: the source of its task or model changed since the cell was "
                "resolved; run the command again"
            )
        torch.manual_seed(_seed(cell, "init"))
        self.model = build_model(cell.model, vocab_size=self.task.vocab_size, **cell.model_config)
        # Where an earlier sitting's weights come, these are overwritten again.
        self.initial = None
        if cell.train.init_from is not None:
            self.initial = load_initial(self.model, cell, results)
        self.model.to(device)
        _check_segments(cell, self.task, self.model)
        _check_resets(cell, self.task, self.model)
        self.module = CellModule(cell, self.task, self.model, listener)
        self.module.pause = pause
        self.module.after_step = self._save_at_times
        self.saved = results / "checkpoints" / f"{cell.digest}.safetensors"
        self.log = results / "logs" / f"{cell.digest}.csv"
        self.trained = False
        self.tested: dict[str, dict[str, float]] = {}  # by variant; "": the task itself
        self.untested: dict[str, str] = {}  # variant -> why
        self.by_position: dict[str, float] = {}
        self.earlier_seconds, self.earlier_peak = 0.0, 0
        self.earlier_sittings: list[dict[str, Any]] = []
        self.compiled: Compile = "off"
        if self.saved.exists():
            tensors, state = checkpoint.read(self.saved)
            if not state.get("finished"):
                self._resume(tensors, state)
        self.first_step = self.module.step
        self.saved_at = time.perf_counter()
        self.save_cost = 0.0

    @property
    def over(self) -> bool:
        """Whether training is."""
        return self.trained or self.module.stopped

    def conclude(self) -> Record | None:
        """Tests a run that is not over; None if there is nothing to test, or no time for it."""
        module = self.module
        if not module.curve or not ranks.first():
            return None
        try:
            with module.stoppable():
                self._test()
        except Paused:
            return None
        write_selection(self.saved.parents[1], self.cell, self.task, self.model)
        why = f"concluded at step {module.step:,} of {self.cell.train.steps:,}"
        return replace(self._record(), status="stopped", error=why)

    def to_the_end(self, stop_after: int | None) -> Record | None:
        """Trains and tests; None if the sitting ends before, or in a process not the first."""
        module, steps = self.module, self.cell.train.steps
        if not self.trained:
            self.model.train()
            end = steps if stop_after is None else min(steps, module.step + stop_after)
            # One step more than there is where a validation is still due: it comes first.
            if not module.stopped:
                fit(
                    module,
                    range(module.step, max(end, module.step + 1)),
                    self.device,
                    self.devices,
                    self.strategy,
                )
            if module.at_end is not None:
                self._unshard(*module.at_end)
            if not ranks.first():
                return None
            self.trained = module.stopped
            self._save()
            if not self.trained:
                return None
        try:
            with module.stoppable():
                self._test()
        except Paused:
            self._save()
            return None
        checkpoint.write(
            self.saved,
            {f"model/{k}": v for k, v in self.model.state_dict().items()},
            {"finished": True, "cell": asdict(self.cell)},
        )
        write_selection(self.saved.parents[1], self.cell, self.task, self.model)
        return self._record()

    def _unshard(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Goes on, in each process for itself, with the whole model that training left."""
        module = self.module
        self.model = build_model(
            self.cell.model, vocab_size=self.task.vocab_size, **self.cell.model_config
        ).to(self.device)
        module.model, module.logits = self.model, self.model.__call__
        module.unpack(tensors, state)
        module.trainer = None  # its optimizer has the parameters of the shards
        module.sharded = False

    def compile(self, how: Compile) -> None:
        """Compiles the training forward and backward pass; evaluation stays as it is."""
        if self.cell.train.segment_length is not None:
            raise UserError(
                f"--compile {how}: train.segment_length={self.cell.train.segment_length} runs the "
                "model in pieces, uncompiled; leave one of the two out"
            )
        mode = "reduce-overhead" if how == "graphs" else None
        compiled = torch.compile(self.model, mode=mode)
        self.compiled = how

        def logits(inputs_BL: Tensor, **resets: Tensor) -> Tensor:
            if how == "graphs":
                torch.compiler.cudagraph_mark_step_begin()
            return compiled(inputs_BL, **resets)

        self.module.logits = logits

    def _test(self) -> None:
        module, train = self.module, self.cell.train
        if module.best:
            self.model.load_state_dict(module.best)
        budget = train.test_batches * self.task.batch("test", 0, train.batch_size).inputs.numel()
        for label, which in {"": self.task, **self.task.test_variants()}.items():
            if label in self.tested:
                continue
            tokens = budget
            if label:
                length = which.batch("test", 0, 1).inputs.shape[1]
                reach = tokens_within_reach(self.model, length, self.device)
                if isinstance(reach, str):
                    self.untested[label] = reach
                    continue
                tokens = min(budget, reach)
            self.listener({"event": "testing"})
            sums = add_up(
                self.model,
                which,
                "test",
                batch_size=train.batch_size,
                max_tokens=tokens,
                device=self.device,
                positions=not label and self.task.models_a_stream,
            )
            self.tested[label] = sums.metrics(which, "test")
            self.by_position = self.by_position or sums.losses_by_position()
            if self.trained and self._save_is_due():
                self._save()

    def _environment(self) -> dict[str, Any]:
        return environment(self.device, kernel_backends()) | {
            "devices": self.devices,
            "strategy": self.strategy,
            "compile": self.compiled,
        }

    def _sittings(self) -> list[dict[str, Any]]:
        """Up to which step each place took the steps, the earlier ones first; none twice in a row.

        A sitting that only tests is none of them.
        """
        if self.module.step == self.first_step:
            return self.earlier_sittings
        now = {"to_step": self.module.step, **self._environment()}
        changing = {"to_step", "backends"}  # a process that goes on may come to use another kernel
        earlier = self.earlier_sittings
        if earlier and all(earlier[-1].get(k) == v for k, v in now.items() if k not in changing):
            earlier = earlier[:-1]
        return [*earlier, now]

    def _record(self) -> Record:
        module, task = self.module, self.task
        length = task.batch("validation", 0, 1).inputs.shape[1]
        memory = max(self.earlier_peak, peak_memory(self.device))
        here, sittings = self._environment(), self._sittings()
        elsewhere = sittings != [{"to_step": module.step, **here}]
        return Record(
            cell=self.cell,
            digest=self.cell.digest,
            status="done",
            headline=task.headline,
            higher_is_better=METRICS[task.headline],
            test=self.tested.pop(""),
            variants=self.tested,
            stopped=self.untested,
            by_position=self.by_position,
            chance=task.chance(),
            baselines=task.baselines(),
            curve=tuple(module.curve),
            steps_done=module.step,
            solved_at=module.solved_at,
            cost=Cost(
                parameters=sum(p.numel() for p in self.model.parameters()),
                state_numbers=self.model.state_size(length),
                # A model that goes through segments never sees the whole at once.
                flops_per_token=flops_per_token(
                    self.model, min(length, self.cell.train.segment_length or length), self.device
                ),
                tokens_per_second=module.tokens / module.seconds,
                peak_memory_bytes=memory,
                train_seconds=module.seconds,
                wall_seconds=self.earlier_seconds + time.perf_counter() - self.began,
            ),
            environment=here
            | ({"sittings": sittings} if elsewhere else {})
            | ({"initial_weights_sha256": self.initial} if self.initial else {}),
        )

    def _save_at_times(self, validated: bool) -> None:
        module = self.module
        due = self._save_is_due()
        if module.sharded:  # all give their part of it, so all must do it at the same step
            due = (validated or module.step % AGREE_STEPS == 0) and module.agreed(due)
        if due and (ranks.first() or module.sharded):
            with module.untimed():
                self._save()
        if validated and module.curve and ranks.first():
            _write_log(self.log, self.module.curve)

    def _save_is_due(self) -> bool:
        since = time.perf_counter() - self.saved_at
        return since > max(CHECKPOINT_SECONDS, self.save_cost / CHECKPOINT_SHARE)

    def _save(self) -> None:
        began = time.perf_counter()
        tensors, state = self.module.at_end or self.module.pack()
        if not ranks.first():
            return
        seconds = self.earlier_seconds + began - self.began
        peak = max(self.earlier_peak, peak_memory(self.device))
        state |= {"trained": self.trained, "tested": self.tested}
        state |= {"by_position": self.by_position}
        state |= {"wall_seconds": seconds, "peak_memory_bytes": peak}
        state |= {"sittings": self._sittings()}
        checkpoint.write(self.saved, tensors, state)
        self.saved_at = time.perf_counter()
        self.save_cost = self.saved_at - began

    def _resume(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        self.module.unpack(tensors, state)
        self.trained, self.tested = state["trained"], state["tested"]
        self.by_position = state.get("by_position", {})  # older checkpoints have none
        self.earlier_seconds = state["wall_seconds"]
        self.earlier_peak = state["peak_memory_bytes"]
        # Older checkpoints do not say where.
        self.earlier_sittings = state.get("sittings", [{"to_step": self.module.step}])


def fit(
    module: CellModule,
    steps: range,
    device: torch.device,
    devices: int = 1,
    strategy: str = "auto",
) -> None:
    """Takes the steps of that range through Lightning."""
    train = module.cell.train
    if train.batch_size % devices:
        raise UserError(
            f"--devices {devices}: they share a batch; train.batch_size={train.batch_size} does "
            "not divide evenly; change one of the two"
        )
    if strategy == "fsdp" and devices == 1:
        raise UserError(
            "--strategy fsdp: one device has nothing to share; give --devices 2 or more"
        )
    if strategy == "fsdp" and train.precision == "16-mixed":
        raise UserError(
            "--strategy fsdp: scales no loss, so train.precision=16-mixed is not valid with it; "
            "take bf16-mixed"
        )
    module.sharded = strategy == "fsdp"
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    with warnings.catch_warnings():
        # The stream makes its batches in the step itself: there is no loader to give workers to.
        warnings.filterwarnings("ignore", category=UserWarning, module="lightning")
        warnings.filterwarnings("ignore", category=FutureWarning)
        trainer = lightning.Trainer(
            barebones=True,  # no logger, bar or checkpoints of its own: records are ours
            accelerator="gpu" if device.type == "cuda" else "cpu",
            devices=devices,
            strategy=fsdp_strategy(devices) if module.sharded else strategy,
            plugins=[LightningEnvironment()],  # the processes are ours, whatever started them
            precision=train.precision,
            gradient_clip_val=train.clip or None,
            max_epochs=1,
            use_distributed_sampler=False,
        )
        trainer.fit(module, train_dataloaders=module.feed.over(steps))
    module.model.to(device)  # Lightning leaves it on the CPU


def _check_segments(cell: Cell, task: Task, model: nn.Module) -> None:
    """Unable if the model cannot train in the pieces that the cell asks for."""
    segment = cell.train.segment_length
    length = task.batch("validation", 0, 1).inputs.shape[1]
    if segment is None or length <= segment:
        return
    where = f"train.segment_length={segment} at length {length}: {cell.model} cannot:"
    if (reason := cannot_carry(model, length)) is not None:
        raise Unable(f"{where} {reason}; leave segment_length out, or take a recurrent model")
    if cell.train.segment_gradients == "exact" and cell.model_config.get("dropout"):
        raise Unable(
            f"{where} dropout draws other masks when a piece runs again; set model.dropout=0 or "
            "train.segment_gradients=truncated"
        )


def _check_resets(cell: Cell, task: Task, model: nn.Module) -> None:
    """Unable if documents are to be kept apart and the model cannot."""
    if task.resets(task.batch("validation", 0, 1).inputs) is None:
        return
    if (reason := cannot_reset(model)) is not None:
        raise Unable(
            f"{cell.model} cannot keep packed documents apart: {reason}; set task.packing=stream, "
            "or take a model that can, as mamba or transformer"
        )
    if cell.train.segment_length is not None:
        raise Unable(
            f"train.segment_length={cell.train.segment_length}: pieces carry the state through the "
            "documents; set task.packing=stream or leave segment_length out"
        )


def _unfinished(cell: Cell, status: Any, error: str, device: torch.device) -> Record:
    return Record(
        cell=cell,
        digest=cell.digest,
        status=status,
        error=error,
        environment=environment(device, kernel_backends()),
    )


def _out_of_memory(error: Exception) -> bool:
    # The CPU's allocator has no exception class of its own.
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "alloc" in str(error)


def _write_log(path: Path, curve: list[CurvePoint]) -> None:
    """The curve so far as CSV, for people who watch a run."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    rows = [to_plain(replace(point)) for point in curve]
    writer.writerow([*(k for k in rows[0] if k != "validation"), *rows[0]["validation"]])
    for row in rows:
        metrics = row.pop("validation")
        writer.writerow([*row.values(), *metrics.values()])
    write_file(path, text.getvalue().encode())


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _seed(cell: Cell, purpose: str) -> int:
    """A 63-bit seed from the cell's seed and a purpose; the same initialisation for every task."""
    text = f"{cell.seed}/{purpose}".encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "little") >> 1


def _prefetch(asked: int | None, device: torch.device) -> int:
    """The processes that make batches: on a CPU they would only take the model's cores."""
    if asked is not None:
        return asked
    return min(PREFETCH, max(1, cores() - 1)) if device.type == "cuda" else 0


def device_of(name: str) -> torch.device:
    """The device of auto, cpu or cuda; UserError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA device here; valid here: cpu, auto")
    if name not in ("cpu", "cuda"):
        raise UserError(f"--device {name}: valid are auto, cpu, cuda")
    return torch.device("cuda", ranks.rank()) if name == "cuda" else torch.device("cpu")
