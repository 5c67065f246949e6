"""Record: one JSON file per finished cell, the only truth reports are drawn from; torch-free."""

from __future__ import annotations

import json
import math
import os
import re
import tempfile
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Strict, TypeAdapter, ValidationError

from seqbench.suite.experiment import Cell, UserError

# stopped: tested before its last step, because that was asked for; its checkpoint waits.
# skipped: the model cannot do what the cell asks for, and says why.
Status = Literal["done", "stopped", "diverged", "failed", "skipped"]
# Strict JSON has no NaN and no infinity: they are written as strings, which this type reads back.
Number = Annotated[float, Strict(False)]

_STRICT = ConfigDict(extra="forbid", strict=True)


class StorageError(UserError):
    """The results folder takes no more: it is full, or not writable. Nothing is torn."""


@dataclass(frozen=True, kw_only=True)
class CurvePoint:
    """One validation: where training stood and the metrics (names as in tasks.base.METRICS)."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    step: int
    seconds: float  # of training so far, evaluation left out
    tokens: int  # seen so far
    lr: float
    train_loss: Number  # nats, of the last training batch
    stage: int | None  # of the curriculum; None: the task itself
    validation: Mapping[str, Number]


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What the cell took."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    parameters: int
    state_numbers: int  # carried per sequence when decoding, after one training length
    flops_per_token: float  # forward, counted by torch's FlopCounterMode plus the scan's own
    tokens_per_second: float  # training
    peak_memory_bytes: int
    train_seconds: float
    wall_seconds: float  # evaluation included


@dataclass(frozen=True, kw_only=True)
class Record:
    """Everything one finished cell leaves behind."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    cell: Cell
    digest: str
    status: Status
    error: str | None = None
    log: tuple[str, ...] = ()  # of a cell that failed: the last lines of its traceback or output
    headline: str = ""  # the task's headline metric, and below whether higher is better
    higher_is_better: bool = True
    test: Mapping[str, Number] = field(default_factory=dict)
    variants: Mapping[str, Mapping[str, Number]] = field(default_factory=dict)  # label -> metrics
    stopped: Mapping[str, str] = field(default_factory=dict)  # variant without metrics -> why
    # First position of a bucket, which the next one's ends -> test loss there, in nats a token; of
    # tasks that ask for the next token at every position.
    by_position: Mapping[str, Number] = field(default_factory=dict)
    chance: Number | None = None
    baselines: Mapping[str, Number] = field(default_factory=dict)
    curve: tuple[CurvePoint, ...] = ()
    steps_done: int = 0
    solved_at: int | None = None  # first validated step at train.stop_at or better
    cost: Cost | None = None
    # Versions, device, backend, ...; `sittings`: the same of each place, if it had several.
    environment: Mapping[str, Any] = field(default_factory=dict)

    @property
    def has_results(self) -> bool:
        """Whether it was tested."""
        return self.status in ("done", "stopped")


def path_of(results: Path, cell: Cell) -> Path:
    """Where a cell's record lies: <results>/records/<task>/<model>/<digest>.json."""
    return results / "records" / _folder(cell.task) / _folder(cell.model) / f"{cell.digest}.json"


def write(results: Path, record: Record) -> Path:
    """Writes a record: it is there whole or not at all, whenever the process or machine dies."""
    path = path_of(results, record.cell)
    text = json.dumps(to_dict(record), indent=1, allow_nan=False) + "\n"
    write_file(path, text.encode())
    return path


def write_file(path: Path, data: bytes) -> None:
    """`write_atomically`, in a folder that is made if need be; StorageError where it fails."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, data)
    except OSError as error:
        raise StorageError(
            f"{path}: cannot be written ({os.strerror(error.errno or 0)}); free or open the "
            "place, or name another with --results, and run the same command again"
        ) from error


def write_atomically(path: Path, data: bytes) -> None:
    """Temporary file in the same folder, fsync, rename, fsync of the folder; raises OSError."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp's files are the owner's alone
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # without it the rename itself may be lost with the machine
    finally:
        os.close(folder)


def load(path: Path) -> Record:
    """One record; UserError names the file, the place in it and the remedy."""
    try:
        return _parse(path)
    except _Invalid as error:
        raise UserError(f"{error}; delete the file and its cell runs again") from error


def load_all(results: Path) -> list[Record]:
    """Every record below <results>/records, in the order of task, model, scale, seed, digest.

    Files that are not whole, valid records raise one UserError that names them all.
    """
    records, invalid = [], []
    for path in record_files(results):
        try:
            records.append(_parse(path))
        except _Invalid as error:
            invalid.append(str(error))
    if invalid:
        shown, more = invalid[:3], len(invalid) - 3
        remedy = (
            "delete the file and its cell runs again"
            if len(invalid) == 1
            else "delete these files and their cells run again"
        )
        rest = f"; and {more} more files like these" if more > 0 else ""
        raise UserError(f"{'; '.join(shown)}{rest}; {remedy}")
    return sorted(
        records, key=lambda r: (r.cell.task, r.cell.model, r.cell.scale, r.cell.seed, r.digest)
    )


def record_files(results: Path) -> list[Path]:
    """The files that hold records, sorted; a killed writer's temporary files are not among them."""
    return sorted(
        path for path in (results / "records").glob("*/*/*.json") if not path.name.startswith(".")
    )


def query(
    records: Iterable[Record],
    *,
    task: str | Collection[str] | None = None,
    model: str | Collection[str] | None = None,
    scale: str | Collection[str] | None = None,
    seed: int | Collection[int] | None = None,
    status: str | Collection[str] | None = None,
    digest: str | Collection[str] | None = None,
) -> list[Record]:
    """The records whose every named field is the value, or one of the values, given."""

    def matches(value: object, wanted: Any) -> bool:
        if wanted is None:
            return True
        return value == wanted if isinstance(wanted, str | int) else value in wanted

    return [
        r
        for r in records
        if matches(r.cell.task, task)
        and matches(r.cell.model, model)
        and matches(r.cell.scale, scale)
        and matches(r.cell.seed, seed)
        and matches(r.status, status)
        and matches(r.digest, digest)
    ]


def to_dict(record: Record) -> dict[str, Any]:
    """A record as what JSON can hold; NaN and the infinities become strings."""
    plain = to_plain(record)
    assert isinstance(plain, dict)
    return plain


def from_dict(data: Mapping[str, Any], where: str = "record") -> Record:
    """The record of `to_dict`'s result; UserError names `where` and the place for anything else."""
    try:
        return _validated(json.dumps(data).encode(), where)
    except _Invalid as error:
        raise UserError(str(error)) from error


def to_plain(value: Any) -> Any:
    """Dataclasses and mappings to dicts, sequences to lists, non-finite floats to strings."""
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {str(k): to_plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


class _Invalid(ValueError):
    """A file that is no record: its name, the place and what is wrong there."""


def _parse(path: Path) -> Record:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise _Invalid(
            f"record {path}: cannot be read ({os.strerror(error.errno or 0)})"
        ) from error
    record = _validated(data, f"record {path}")
    if path.stem != record.digest:
        raise _Invalid(
            f"record {path}: holds the cell {record.digest}, which is not the file's name"
        )
    return record


def _validated(data: bytes, where: str) -> Record:
    try:
        record = _adapter().validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        message = first["msg"][:1].lower() + first["msg"][1:]
        more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        if first["type"] == "json_invalid":
            raise _Invalid(f"{where}: cut off or no JSON: {message.split(': ', 1)[-1]}") from error
        value = repr(first["input"])
        value = value if len(value) <= 60 else value[:57] + "..."
        shown = "" if first["type"] == "missing" else f"={value}"
        raise _Invalid(f"{where}: {place or 'the file'}{shown}: {message}{more}") from error
    if record.cell.digest != record.digest:
        raise _Invalid(
            f"{where}: digest={record.digest!r}: its cell's is {record.cell.digest} (edited, or "
            "written by another version of seqbench)"
        )
    return record


@cache
def _adapter() -> TypeAdapter[Record]:
    return TypeAdapter(Record)


@cache
def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _folder(name: str) -> str:
    """A task's or model's name as one folder's name: a plugin is named by its path."""
    return re.sub(r"[^A-Za-z0-9+._-]+", "_", name).lstrip(".") or "_"
