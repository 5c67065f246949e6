"""The commands; the only place that prints. A user's mistake is one line on stderr, status 2."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from seqbench.suite.experiment import Cell, UserError

if TYPE_CHECKING:
    from seqbench.suite.bench.result import Result
    from seqbench.suite.execution import Execution

app = typer.Typer(
    name="seqbench",
    help="Sequence models compared across modalities: train a grid, report it, time it.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(help="Data sets: where they lie, their checksums.", no_args_is_help=True)
bench_app = typer.Typer(help="Timings behind a correctness gate.", no_args_is_help=True)
new_app = typer.Typer(help="Write a working file of your own, with its test.", no_args_is_help=True)
app.add_typer(data_app, name="data")
app.add_typer(bench_app, name="bench")
app.add_typer(new_app, name="new")

LAUNCHERS = ("local", "ray", "slurm")
RETRIED = ("failed", "diverged", "stopped")
UNFINISHED = 3  # exit status of a sitting that ended before its cells

_WIDE = 170  # columns of a bench's table where there is no terminal to fit
out = Console()
err = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)

# Typer raises click's errors; recent versions carry a click of their own, so the class is theirs.
_UsageError: Any = typer.BadParameter.__base__

Results = Annotated[
    Path, typer.Option("--results", help="Folder of records, tables and plots.", show_default=True)
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]


def main() -> None:
    """Runs the command line; the entry point of `seqbench`."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("seqbench").setLevel(logging.INFO)
    # What ends a job politely (a scheduler, a shutdown) ends a run as Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        status = app(standalone_mode=False)
    except _UsageError as error:
        _fail(error.format_message(), 2)
    except (typer.Abort, KeyboardInterrupt):
        _fail("stopped; the same command goes on from here", 130)
    except BrokenPipeError:
        os._exit(141)  # the reader (head, less) has gone
    except Exception as error:
        if not _users_fault(error):
            raise
        _fail(str(error), 2)
    sys.exit(status if isinstance(status, int) else 0)


@app.command("list")
def list_command(
    what: Annotated[str, typer.Argument(help="tasks, models, grids or backends.")] = "all",
    as_json: Json = False,
) -> None:
    """List tasks, models, grids and kernel backends, one line each."""
    from seqbench.suite import discovery
    from seqbench.suite.listing import LISTINGS

    if what != "all" and what not in LISTINGS:
        raise discovery.unknown("listing", what, ["all", *LISTINGS])
    wanted = [what] if what != "all" else list(LISTINGS)
    found = {kind: LISTINGS[kind]() for kind in wanted}
    if as_json:
        print(json.dumps(found if what == "all" else found[what], indent=2))
        return
    for kind, rows in found.items():
        if what == "all":
            out.print(f"[bold]{kind}[/bold]")
        width = max((len(row["name"]) for row in rows), default=0)
        for row in rows:
            print(f"  {row['name']:<{width}}  {row['summary']}")


@app.command()
def run(
    grid: Annotated[str | None, typer.Argument(help="A grid: a name, or a file.")] = None,
    tasks: Annotated[str | None, typer.Option(help="Comma-separated, instead of a grid.")] = None,
    models: Annotated[str | None, typer.Option(help="Comma-separated, instead of a grid.")] = None,
    seeds: Annotated[str | None, typer.Option(help="Comma-separated integers.")] = None,
    scale: Annotated[str, typer.Option(help="cpu (reduced) or paper.")] = "cpu",
    assign: Annotated[
        list[str] | None,
        typer.Option("--set", help="SECTION.KEY=VALUE (task, model, train); repeatable."),
    ] = None,
    results: Results = Path("results"),
    launcher: Annotated[str, typer.Option(help="local, ray or slurm.")] = "local",
    workers: Annotated[
        int | None, typer.Option(help="Cells at a time; by default one for each core (or GPU).")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(help="CPU threads of each cell; by default cores / workers.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    devices: Annotated[int, typer.Option(help="Devices of one cell, which share its batches.")] = 1,
    strategy: Annotated[
        str, typer.Option(help="Lightning's, over those devices: auto, ddp or fsdp.")
    ] = "auto",
    cells_per_gpu: Annotated[int, typer.Option(help="Cells that share a GPU.")] = 1,
    compile: Annotated[
        str, typer.Option(help="torch.compile the training step: off, default or graphs (CUDA).")
    ] = "off",
    prefetch: Annotated[
        int | None, typer.Option(help="Processes that make a cell's batches ahead.")
    ] = None,
    cell_seconds: Annotated[
        float | None, typer.Option(help="Fail a cell that takes longer than this.")
    ] = None,
    cell_memory: Annotated[
        str | None, typer.Option(help="Fail a cell that holds more memory, as in 4G or 500M.")
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option(help="Seconds of this sitting; what is unfinished waits, exit status 3."),
    ] = None,
    conclude: Annotated[
        bool,
        typer.Option(
            "--conclude",
            help="Train no further: test cells that began at their best weights so far, recorded "
            "as stopped; --retry stopped goes on.",
        ),
    ] = False,
    ray_address: Annotated[
        str | None, typer.Option(help="A Ray cluster's address, or auto; a local one without.")
    ] = None,
    slurm: Annotated[
        list[str] | None,
        typer.Option(
            help="KEY=VALUE for sbatch (partition, account, time in minutes); repeatable."
        ),
    ] = None,
    retry: Annotated[
        str | None, typer.Option(help="Run cells again that ended as: failed, diverged or stopped.")
    ] = None,
    logger: Annotated[
        str | None, typer.Option(help="Mirror the curves too: tensorboard or wandb.")
    ] = None,
    as_json: Json = False,
) -> int:
    """Run the missing cells of a grid, then draw its tables and plots."""
    began = time.monotonic()
    from seqbench.suite import discovery, runner
    from seqbench.suite.configuration import parse_assignment
    from seqbench.suite.expectation import declare
    from seqbench.suite.loggers import check_logger, mirrored

    assignments = [parse_assignment(text) for text in assign or ()]
    chosen = _integers("--seeds", seeds)
    if launcher not in LAUNCHERS:
        raise discovery.unknown("launcher", launcher, LAUNCHERS)
    execution = _execution(
        workers=workers,
        threads=threads,
        device=device,
        devices=devices,
        strategy=strategy,
        cells_per_gpu=cells_per_gpu,
        compile=compile,
        prefetch=prefetch,
        cell_seconds=cell_seconds,
        cell_memory=cell_memory,
        budget=budget,
        conclude=conclude,
    )
    launch = _launcher(launcher, ray_address, slurm or [])
    if logger is not None:
        check_logger(logger)
    if (grid is None) == (tasks is None and models is None):
        raise UserError(
            "run: name a grid (seqbench list grids) or give --tasks and --models, not both"
        )
    if grid is not None:
        cells = runner.grid_cells(grid, scale=scale, seeds=chosen, assignments=assignments)
    else:
        if tasks is None or models is None:
            raise UserError("run: --tasks and --models go together")
        for option, names in (("--tasks", tasks), ("--models", models)):
            if not _names(names):
                raise UserError(f"{option} {names!r}: give names, comma-separated (seqbench list)")
        cells = runner.product_cells(
            _names(tasks),
            _names(models),
            scale=scale,
            seeds=chosen or (0,),
            assignments=assignments,
        )
    runner.check_writable(results)
    if retry is not None:
        if retry not in RETRIED:
            raise discovery.unknown("status in --retry", retry, RETRIED)
        runner.forget(cells, results, retry)
    if grid is not None:
        declare(results, grid, scale, assignments)
    plan = runner.plan(cells, results)
    if not as_json:
        err.print(
            f"{len(cells)} cells: {len(plan.finished)} with a record, {len(plan.missing)} to run; "
            f"results in {results}/"
        )
    if plan.missing:
        with (
            _progress(plan.missing, as_json) as on_event,
            mirrored(logger, results, on_event) as told,
        ):
            for wave in runner.waves(plan.missing):
                ready = runner.startable(wave, plan.missing)
                if budget is not None:
                    left = budget - (time.monotonic() - began)
                    execution = replace(execution, budget=max(1.0, left))
                if ready:
                    launch(ready, results, execution, on_event=told)
                    plan = runner.plan(cells, results)
    if plan.missing:
        err.print(f"{len(plan.missing)} cells unfinished; the same command goes on from here")
        return UNFINISHED
    _report(results, grid, cells, as_json)
    bad = [r for r in plan.finished if r.status != "done"]
    for record in bad:
        err.print(f"{record.cell.label}: {record.status}: {record.error}")
    return 1 if any(r.status not in ("skipped", "stopped") for r in bad) else 0


@app.command()
def report(
    grid: Annotated[str | None, typer.Argument(help="A named grid; all records without.")] = None,
    results: Results = Path("results"),
    scale: Annotated[str, typer.Option(help="Of the grid: cpu (reduced) or paper.")] = "cpu",
    published: Annotated[bool, typer.Option(help="The project's own committed results.")] = False,
    check: Annotated[
        bool, typer.Option(help="Draw nothing; exit with 1 if a table or plot is stale.")
    ] = False,
    as_json: Json = False,
) -> int:
    """Draw tables, plots and the HTML page from the records."""
    from seqbench.suite import discovery, runner

    if grid is not None:
        discovery.grid_module(grid)  # its name first: the folder is the smaller mistake
    if published:
        results = _published()
    if not (results / "records").is_dir():
        raise UserError(
            f"report: no records in {results}/; run a grid first (seqbench run quickstart) "
            "or name the folder with --results"
        )
    if check:
        from seqbench.suite.report import check as stale

        found = stale(results)
        for line in found:
            print(line)
        return 1 if found else 0
    cells = runner.grid_cells(grid, scale=scale, seeds=None) if grid else None
    runner.check_writable(results)
    if grid is not None:
        from seqbench.suite.expectation import declare

        declare(results, grid, scale)
    _report(results, grid, cells, as_json)
    return 0


@app.command()
def diff(
    a: Annotated[str, typer.Argument(help="A record's file, its digest, or a beginning of it.")],
    b: Annotated[str, typer.Argument(help="The other one.")],
    results: Results = Path("results"),
    as_json: Json = False,
) -> int:
    """Show how two records differ in configuration, environment, metrics and cost; 1 if they do."""
    from seqbench.suite.report import diff as records

    one, other = records.find(results, a), records.find(results, b)
    found = records.differences(one, other)
    if as_json:
        print(records.to_json(one, other))
        return 1 if found else 0
    table = Table(box=None)
    for column in ("section", "key", one.digest, other.digest, "change"):
        table.add_column(column, overflow="fold")
    section = ""
    for d in found:
        change = "" if d.change is None else f"{d.change:+.4g}"
        texts = (d.section if d.section != section else "", d.key, str(d.a), str(d.b), change)
        table.add_row(*(Text(text) for text in texts))
        section = d.section
    if found:
        out.print(table)
    else:
        out.print(f"{one.digest} and {other.digest}: no difference")
    return 1 if found else 0


@app.command("eval")
def eval_command(
    checkpoint: Annotated[
        str,
        typer.Argument(
            help="A finished cell's digest or file, a Hugging Face Mamba's folder, or OWNER/NAME."
        ),
    ],
    tasks: Annotated[
        str,
        typer.Option(help="Of lm-evaluation-harness, comma-separated; table3: the paper's six."),
    ] = "table3",
    tokenizer: Annotated[
        str | None, typer.Option(help="A tokenizer.json, where the folder has none.")
    ] = None,
    include: Annotated[
        Path | None, typer.Option(help="A folder with YAML tasks of the harness of your own.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Ask so many examples of a task alone.")] = None,
    few_shot: Annotated[
        int | None, typer.Option(help="Examples before each question; by default the task's.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Requests at a time.")] = 8,
    max_length: Annotated[int, typer.Option(help="Tokens of a request at most.")] = 2048,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    results: Results = Path("results"),
    as_json: Json = False,
) -> None:
    """Score a language checkpoint on downstream tasks, as in the paper's Table 3 (extra eval)."""
    from dataclasses import asdict

    from seqbench.suite import downstream, runner
    from seqbench.suite.training import device_of

    for option, value in (
        ("--limit", limit),
        ("--batch-size", batch_size),
        ("--max-length", max_length),
    ):
        _check_range(option, value, 1)
    _check_range("--few-shot", few_shot, 0)
    if not _names(tasks):
        raise UserError(f"--tasks {tasks!r}: give names, comma-separated, or table3")
    runner.check_writable(results)
    found = downstream.evaluate_checkpoint(
        checkpoint,
        _names(tasks),
        results=results,
        tokenizer=tokenizer,
        include=include,
        limit=limit,
        few_shot=few_shot,
        batch_size=batch_size,
        max_length=max_length,
        device=device_of(device),
    )
    path = found.write(results)
    if as_json:
        print(json.dumps(asdict(found), indent=2))
        return
    for table in downstream.tables(found):
        out.print(table)
    err.print(str(path))


@app.command()
def select(results: Results = Path("results")) -> None:
    """Write what finished models select of a test sequence, from checkpoints; run does so too."""
    from seqbench.suite.selection import write_missing

    for path in write_missing(results):
        print(path)


@app.command()
def generate(
    checkpoint: Annotated[
        str,
        typer.Argument(
            help="A finished cell's digest or .safetensors file, or a folder with a pretrained "
            "Mamba."
        ),
    ],
    results: Results = Path("results"),
    length: Annotated[
        int | None, typer.Option(help="Tokens, bases or samples: 500, 1000 or 64000 by default.")
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(help="What to go on from: text, bases, or a file of them or sound."),
    ] = None,
    temperature: Annotated[float, typer.Option(help="0: always the likeliest.")] = 1.0,
    top_k: Annotated[int | None, typer.Option(help="Draw from so many likeliest.")] = None,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest of that share.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    write: Annotated[
        Path | None,
        typer.Option("--out", help="File; by default text is printed, sound is in RESULTS."),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    as_json: Json = False,
) -> None:
    """Generate text, DNA (FASTA) or sound (WAV) from a trained model, one step at a time."""
    from seqbench.suite import generation

    sampling = generation.Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    with Progress(console=err, transient=True, disable=as_json or not err.is_terminal) as progress:
        bar = progress.add_task("generating", total=None)
        made = generation.generate(
            checkpoint,
            results,
            length=length,
            prompt=prompt,
            sampling=sampling,
            out=write,
            device=device,
            on_step=lambda done, of: progress.update(bar, completed=done, total=of),
        )
    if as_json:
        print(json.dumps(made.facts, indent=2))
    elif "out" in made.facts:
        err.print(f"{made.facts['out']}: {made.facts['new_tokens']} new tokens")
    else:
        print(made.text, end="" if made.text.endswith("\n") else "\n")


Device = Annotated[str, typer.Option(help="cpu or cuda.")]
Threads = Annotated[int | None, typer.Option(help="CPU threads; by default torch's own.")]
Quick = Annotated[bool, typer.Option(help="The headline size alone.")]


@bench_app.command("overhead")
def bench_overhead_command(
    grid: Annotated[str, typer.Option(help="The grid whose cells to time.")] = "quickstart",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Time a training step, harness against a bare PyTorch loop, and its wait for the batch."""
    from dataclasses import asdict

    import torch

    from seqbench.suite import runner
    from seqbench.suite.bench.overhead import measure_overhead

    _check_range("--threads", threads, 1)
    cells = runner.grid_cells(grid, scale="cpu", seeds=None)
    torch.set_num_threads(threads or torch.get_num_threads())
    rows = []
    for cell in cells:
        rows += measure_overhead(cell)
        if not as_json:
            err.print(f"{cell.label}: {100 * rows[-1].fraction:+.1f} %")
    if as_json:
        found = [{**asdict(r), "fraction": r.fraction, "idle": r.idle} for r in rows]
        print(json.dumps(found, indent=2))
        return
    table = Table(box=None)
    names = ("cell", "stage", "bare ms", "harness ms", "overhead", "set-up ms", "waits for data")
    for column in names:
        table.add_column(column, justify="left" if column == "cell" else "right")
    for r in rows:
        times = [f"{1e3 * t:.1f}" for t in (r.bare_seconds, r.harness_seconds, r.setup_seconds)]
        stage = "" if r.stage is None else str(r.stage)
        shares = f"{100 * r.fraction:+.1f} %", f"{100 * r.idle:.2f} %"
        table.add_row(r.cell, stage, times[0], times[1], shares[0], times[2], shares[1])
    out.print(table)


@bench_app.command("scan")
def bench_scan_command(
    results: Results = Path("results"),
    threads: Threads = None,
    device: Device = "cpu",
    quick: Quick = False,
    as_json: Json = False,
) -> None:
    """Time the selective scan beside its peers and the physical floor, with peak memory."""
    from seqbench.suite.bench import scan

    _check_bench(results, device, threads)
    headline = scan.CUDA_HEADLINE if device == "cuda" else scan.HEADLINE
    _show(
        scan.bench_scan(
            sizes=(headline,) if quick else None,
            device=device,
            threads=threads,
            progress=_progress_lines(as_json),
            so_far=_so_far(results),
        ),
        results,
        as_json,
    )


@bench_app.command("train")
def bench_train_command(
    results: Results = Path("results"),
    threads: Threads = None,
    device: Device = "cpu",
    quick: Annotated[bool, typer.Option(help="Beside mambapy alone.")] = False,
    profile: Annotated[
        bool, typer.Option(help="Also say which operators a Mamba step spends its time in.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Time training steps, Mamba beside mambapy and beside a Transformer over lengths."""
    from seqbench.suite.bench import train

    _check_bench(results, device, threads)
    done = train.bench_train(
        range_=() if quick else train.RANGE,
        device=device,
        threads=threads,
        profile=profile,
        progress=_progress_lines(as_json),
    )
    _show(done, results, as_json)


@bench_app.command("decode")
def bench_decode_command(
    results: Results = Path("results"),
    threads: Threads = None,
    device: Device = "cpu",
    quick: Annotated[bool, typer.Option(help="Two batch sizes alone.")] = False,
    as_json: Json = False,
) -> None:
    """Time decoding, Mamba beside a Transformer with a KV cache, batch 1 to 128."""
    from seqbench.suite.bench import decode

    _check_bench(results, device, threads)
    done = decode.bench_decode(
        batches=decode.QUICK if quick else decode.BATCHES,
        device=device,
        threads=threads,
        progress=_progress_lines(as_json),
        so_far=_so_far(results),
    )
    _show(done, results, as_json)


@bench_app.command("memory")
def bench_memory_command(
    results: Results = Path("results"),
    threads: Threads = None,
    device: Device = "cpu",
    quick: Annotated[bool, typer.Option(help="Two lengths alone.")] = False,
    as_json: Json = False,
) -> None:
    """Measure the peak memory of a training step of Mamba, whole, in exact and truncated pieces."""
    from seqbench.suite.bench import memory

    _check_bench(results, device, threads)
    done = memory.bench_memory(
        lengths=memory.QUICK if quick else memory.LENGTHS,
        device=device,
        threads=threads,
        progress=_progress_lines(as_json),
    )
    _show(done, results, as_json)


def _check_bench(results: Path, device: str, threads: int | None) -> None:
    """Raises for what would only fail after minutes of timing."""
    from seqbench.suite import runner

    _check_range("--threads", threads, 1)
    if device not in ("cpu", "cuda"):
        raise UserError(f"--device {device}: valid are cpu and cuda")
    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise UserError("--device cuda: no CUDA device here; run on one, or use --device cpu")
    runner.check_writable(results)


def _progress_lines(quiet: bool) -> Callable[[str], None]:
    return lambda line: None if quiet else err.print(line)


def _so_far(results: Path) -> Callable[[Result], object]:
    """Writes what a bench has found by now, so that one that is ended leaves it behind."""
    return lambda found: found.write(results / "bench")


def _show(done: Result, results: Path, as_json: bool) -> None:
    """Writes a bench's result, and prints it as a table or as JSON."""
    paths = done.write(results / "bench")
    if as_json:
        print(done.to_json())
        return
    out.print(done.title(), soft_wrap=True, style="bold")
    (out if out.is_terminal else Console(width=_WIDE)).print(done.table())
    for line in done.remarks():
        out.print(line, soft_wrap=True, highlight=False, markup=False)
    for path in paths:
        err.print(str(path))


@data_app.command("list")
def data_list(as_json: Json = False) -> None:
    """List the data sets, where they come from and whether they are here."""
    from seqbench.tasks import fetch

    rows = [fetch.describe(name) for name in fetch.registry()]
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    table = Table(box=None)
    for column in ("name", "here", "size", "licence", "source"):
        table.add_column(column)
    for row in rows:
        table.add_row(*(str(row[c]) for c in ("name", "here", "size", "licence", "source")))
    out.print(table)


@data_app.command("fetch")
def data_fetch(
    name: str,
    path: Annotated[Path | None, typer.Option(help="A copy that is here already.")] = None,
) -> None:
    """Fetch a data set once, checked; an interrupted download goes on."""
    from seqbench.tasks import fetch

    print(fetch.fetch(name, path=path))


@data_app.command("verify")
def data_verify(
    names: Annotated[list[str] | None, typer.Argument()] = None, as_json: Json = False
) -> int:
    """Check the data sets that are here against their checksums."""
    from seqbench.tasks import fetch

    found = {name: fetch.verify(name) for name in names or fetch.registry()}
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        for name, status in found.items():
            print(f"{name}: {status}")
    return 1 if any(s.startswith("corrupt") for s in found.values()) else 0


@new_app.command("task")
def new_task(
    name: Annotated[str, typer.Argument(help="Small letters and dashes: my-task.")],
    into: Annotated[Path, typer.Option(help="The folder to write to.")] = Path(),
) -> None:
    """Write a working task and its test, to be changed into yours."""
    from seqbench.suite.new import write_new

    file, test = write_new("task", name, into)
    print(file)
    print(test)
    err.print(f"next: seqbench check-plugin {file}; seqbench run --tasks {file} --models mamba")


@new_app.command("model")
def new_model(
    name: Annotated[str, typer.Argument(help="Small letters and dashes: my-layer.")],
    into: Annotated[Path, typer.Option(help="The folder to write to.")] = Path(),
) -> None:
    """Write a working sequence layer and its test, to be changed into yours."""
    from seqbench.suite.new import write_new

    file, test = write_new("model", name, into)
    print(file)
    print(test)
    err.print(
        f"next: seqbench check-plugin {file}; "
        f"seqbench run --tasks selective-copying --models mamba+{file}"
    )


@app.command("check-plugin")
def check_plugin_command(
    name: Annotated[str, typer.Argument(help="A name, BLOCK+LAYER, or the path of a file.")],
    kind: Annotated[
        str | None, typer.Option(help="task, grid, model, layer or block; by default all it is.")
    ] = None,
    as_json: Json = False,
) -> int:
    """Hold a task, model or grid against its contract, a line for every rule."""
    from dataclasses import asdict

    from seqbench.suite.contract.plugin import check_plugin

    logging.getLogger("seqbench").setLevel(logging.WARNING)
    reports = check_plugin(name, kind)
    broken = [finding for report in reports for finding in report.broken]
    if as_json:
        print(json.dumps([asdict(report) for report in reports], indent=2))
        return 1 if broken else 0
    marks = {"ok": "ok", "broken": "BROKEN", "not checked": "-"}
    for report in reports:
        print(f"{report.kind} {report.name}")
        for finding in report.findings:
            print(f"  {marks[finding.status]:<6}  {finding.rule:<20}  {finding.note}")
        count = len(report.broken)
        print(f"{count} rules are broken" if count else "every rule that could be checked holds")
    return 1 if broken else 0


@app.command()
def doctor(as_json: Json = False) -> int:
    """Report the environment, each backend's refusal, and whether forward = step holds."""
    from seqbench.suite.doctor import examine

    findings = examine()
    if as_json:
        print(json.dumps(findings, indent=2))
    else:
        for title, rows in findings.items():
            out.print(f"[bold]{title}[/bold]")
            for key, value in rows.items():
                out.print(f"  {key}: {value}", highlight=False, markup=False)
    return 1 if any("FAILED" in str(v) for rows in findings.values() for v in rows.values()) else 0


def _execution(
    *,
    workers: int | None,
    threads: int | None,
    device: str,
    cell_memory: str | None,
    **others: Any,
) -> Execution:
    """What the options of `run` say about how cells run; checked, the defaults filled in."""
    from seqbench.suite import environment
    from seqbench.suite.discovery import unknown
    from seqbench.suite.execution import Execution

    for name in ("devices", "cells_per_gpu", "prefetch", "cell_seconds", "budget"):
        _check_range(f"--{name.replace('_', '-')}", others[name], 0 if name == "prefetch" else 1)
    _check_range("--workers", workers, 1)
    _check_range("--threads", threads, 1)
    for option, value, valid in (
        ("device", device, ("auto", "cpu", "cuda")),
        ("strategy", others["strategy"], ("auto", "ddp", "fsdp")),
        ("compile", others["compile"], ("off", "default", "graphs")),
    ):
        if value not in valid:
            raise unknown(f"--{option}", value, valid)
    gpus = () if device == "cpu" else environment.gpus()
    if device == "cuda" and not gpus:
        raise UserError("--device cuda: torch sees no CUDA device here; valid here: cpu, auto")
    devices = others["devices"]
    if gpus and devices > len(gpus):
        raise UserError(
            f"--devices {devices}: this machine has {len(gpus)} GPUs; give at most that"
        )
    if others["strategy"] == "fsdp":
        if devices == 1:
            raise UserError(
                "--strategy fsdp: shares a model between devices; give --devices 2 or more"
            )
        if others["compile"] != "off":
            raise UserError(
                "--strategy fsdp: a model in shards is not compiled; leave --compile out"
            )
    cores = environment.cores()
    if workers is None:
        at_once = len(gpus) // devices * others["cells_per_gpu"] if gpus else cores // devices
        workers = max(1, at_once // (threads or 1) if not gpus else at_once)
    return Execution(
        workers=workers,
        threads=threads or max(1, cores // (workers * devices)),
        device=device,
        cell_memory=_bytes("--cell-memory", cell_memory),
        gpus=gpus,
        **others,
    )


def _launcher(name: str, ray_address: str | None, slurm: Sequence[str]) -> Callable[..., Any]:
    """The `run` function of a launcher, with what belongs to it alone filled in."""
    if ray_address is not None and name != "ray":
        raise UserError(f"--ray-address {ray_address}: goes with --launcher ray")
    if slurm and name != "slurm":
        raise UserError(f"--slurm {slurm[0]}: goes with --launcher slurm")
    if name == "ray":
        from seqbench.suite.launchers import ray

        return partial(ray.run, address=ray_address)
    if name == "slurm":
        from seqbench.suite.launchers import slurm as slurm_launcher

        pairs = [text.partition("=") for text in slurm]
        for key, equals, _ in pairs:
            if not key or not equals:
                raise UserError(f"--slurm {key}: write KEY=VALUE, as in partition=gpu")
        return partial(slurm_launcher.run, parameters={key: value for key, _, value in pairs})
    from seqbench.suite.launchers import local

    return local.run


@contextmanager
def _progress(cells: Sequence[Cell], quiet: bool) -> Iterator[Any]:
    """A bar for the grid and one a worker; without a terminal, a line for every finished cell."""
    if quiet or not err.is_terminal:

        def on_line(worker: int, cell: Cell, event: Mapping[str, Any]) -> None:
            if event["event"] == "done" and not quiet:
                note = f": {event['error']}" if event["error"] else ""
                err.print(f"{cell.label}: {event['status']}{note}")
            elif event["event"] == "log":
                err.print(event["message"])

        yield on_line
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=err) as progress:
        whole = progress.add_task("grid", total=len(cells), note="")
        bars: dict[int, TaskID] = {}

        def on_event(worker: int, cell: Cell, event: Mapping[str, Any]) -> None:
            kind = event["event"]
            if kind == "start":
                if worker in bars:
                    progress.remove_task(bars[worker])
                bars[worker] = progress.add_task(cell.label, total=cell.train.steps, note="")
            elif kind == "step":
                value = event["value"]
                note = f"loss {event['loss']:.3f}"
                if event["stage"] is not None:
                    note += f"  stage {event['stage']}"
                if value is not None:
                    note += f"  {event['headline']} {value:.3f}"
                progress.update(bars[worker], completed=event["step"], note=note)
            elif kind == "testing":
                progress.update(bars[worker], completed=cell.train.steps, note="testing")
            elif kind == "log":
                progress.console.print(event["message"])
            elif kind == "done":
                progress.advance(whole)
                if worker in bars:
                    progress.remove_task(bars.pop(worker))
                progress.console.print(f"{cell.label}: {event['status']}")

        yield on_event


def _report(results: Path, grid: str | None, cells: Sequence[Cell] | None, as_json: bool) -> None:
    from seqbench.suite.report import write_report
    from seqbench.suite.report.tables import to_rich

    drawn = write_report(results, grid=grid, cells=cells)
    if as_json:
        found = {
            "index": str(drawn.index),
            "tables": [str(path) for path in drawn.tables],
            "plots": [str(path) for path in drawn.plots],
        }
        print(json.dumps(found, indent=2))
        return
    for table in drawn.verdicts or (drawn.headline,):
        out.print(to_rich(table))
    err.print(f"tables in {results}/tables/, plots in {results}/plots/, all of it in {drawn.index}")


def _published() -> Path:
    folder = Path(__file__).resolve().parent.parent / "results" / "published"
    if not folder.is_dir():
        raise UserError(
            "--published: the project's own results come with a checkout, not with the wheel"
        )
    return folder


def _names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _integers(option: str, text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        numbers = tuple(int(part) for part in _names(text))
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < 0:
        raise UserError(f"{option} {text!r}: give comma-separated integers from 0 on, as in 0,1,2")
    return numbers


def _bytes(option: str, text: str | None) -> int | None:
    if text is None:
        return None
    units = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    number, unit = (text[:-1], text[-1].upper()) if text[-1:].isalpha() else (text, "")
    try:
        size = float(number) * (units[unit] if unit else 1)
    except (ValueError, KeyError):
        size = 0
    if not 1 <= size < 2**63:
        raise UserError(f"{option} {text}: give bytes, or K, M, G or T of them, as in 4G")
    return int(size)


def _check_range(option: str, value: float | None, least: int) -> None:
    if value is not None and value < least:
        raise UserError(f"{option} {value}: must be at least {least}")


def _users_fault(error: Exception) -> bool:
    if isinstance(error, UserError):
        return True
    # Imported late: these modules import torch, and a UserError needs none of it.
    from seqbench.kernels.dispatch import BackendRefused
    from seqbench.models.base import ModelError
    from seqbench.suite.bench.result import GateClosed
    from seqbench.tasks.base import TaskError

    return isinstance(error, TaskError | ModelError | BackendRefused | GateClosed)


def _fail(message: str, status: int) -> None:
    err.print(f"seqbench: {' '.join(message.split())}")
    sys.exit(status)


if __name__ == "__main__":
    main()
