"""hybrid-sweep on the command line: reads a description, hands its cells to `probes.sweep`, writes what comes and shows it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console, Group
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from hybridtheory.errors import UserError
from probes import rundir
from probes.command import MACHINE, OUTPUT, TIMEOUT, command_line, consoles, one_sentence, opened, option
from probes.interrupts import again
from probes.records import End

SWEEP, REGISTERED = "Sweep", "Predictions"

app = command_line()


@app.command()
def hybrid_sweep(
    description: Annotated[
        Path | None,
        typer.Argument(
            help="A TOML file, see docs/sweeps.md; nothing: a small sweep on the embedded model.", show_default=False
        ),
    ] = None,
    changes: Annotated[
        list[str] | None,
        option(
            SWEEP,
            "KEY=VALUE of the description, e.g. seeds=5 or train.batch=8; may be repeated.",
            "--set",
            show_default=False,
        ),
    ] = None,
    dry_run: Annotated[
        bool, option(SWEEP, "Show the lines and how many runs they start with, then stop.", "--dry-run")
    ] = False,
    predictions: Annotated[
        Path | None,
        option(
            REGISTERED,
            "A committed file of predicted rates; every record then carries its hash and commit.",
            show_default=False,
        ),
    ] = None,
    predict: Annotated[
        list[str] | None,
        option(
            REGISTERED,
            "TASK=FOLDER of a probe-smoothness run: write the --predictions file and stop; may be repeated.",
            "--predict",
            show_default=False,
        ),
    ] = None,
    check: Annotated[
        bool,
        option(
            REGISTERED, "Check that the predictions of the run in --out came before its records, and stop.", "--check"
        ),
    ] = False,
    n_jobs: Annotated[
        int, option(MACHINE, "Runs at a time, each with the description's threads.", "--n-jobs", "-j")
    ] = 1,
    backend: Annotated[str, option(MACHINE, "loky: processes of this machine; dask: a Dask cluster.")] = "loky",
    scheduler: Annotated[
        str | None, option(MACHINE, "Address of a Dask scheduler.", show_default="a cluster of --n-jobs workers here")
    ] = None,
    timeout: Annotated[
        float, option(MACHINE, "Seconds without progress after which a worker of this machine is ended.")
    ] = TIMEOUT,
    max_minutes: Annotated[
        float | None, option(MACHINE, "End this slice then; --resume goes on with the next.", show_default=False)
    ] = None,
    out: Annotated[Path | None, option(OUTPUT, "Run folder.", show_default="runs/sweep-NAME")] = None,
    resume: Annotated[bool, option(OUTPUT, "Go on with the sweep in --out.", "--resume")] = False,
) -> None:
    """Sweep learning rates, methods and seeds over tasks, at equal budget.

    The grid is extended where the best rate lies on its edge and refined next to it. A sweep may be killed at any moment: --resume repeats
    only the runs that were not finished. Exit code 0: finished; 3: the slice ended and --resume goes on.
    """
    console, errors = consoles(timeout)
    with one_sentence(errors), ExitStack() as stack:
        if predict:
            return _predict(console, predict, predictions)
        if check:
            from probes.predictions import check as checked

            if out is None:
                raise UserError("--check needs the run folder: give --out")
            return console.print(Text(checked(out)), soft_wrap=True)
        if max_minutes is not None and not max_minutes > 0:
            raise UserError(f"--max-minutes is a positive number, not {max_minutes}")
        until = None if max_minutes is None else time.time() + 60 * max_minutes
        from probes import sweep_description

        study = sweep_description.read(description, changes or [])
        if dry_run:
            return _plan(console, study)
        folder = out or _folder(description, resume)
        begun = (folder / rundir.RECORDS).exists()
        if resume and not begun:
            raise UserError(f"--resume: {folder} holds no sweep: leave --resume out to start one")
        registered = None
        if predictions is not None:
            from probes.predictions import register

            registered = register(predictions)
        from probes.sweep import Pool, Sweep

        pool = Pool(n_jobs, backend, scheduler, timeout)
        run = opened(console, stack, folder, resume)
        if rundir.finished(run.done):
            return _finish(console, run)
        from probes.provenance import provenance

        with _following(run, folder), _bar(console) as said:
            sweep = Sweep(study, run.append, said, pool, until, str(folder / "cells"), registered)
            finished = sweep.run(run.done, provenance())
            run.append(End("finished" if finished else "interrupted", "" if finished else "the slice ended"))
        _finish(console, run)
        if not finished:
            done, known = len(sweep.cells), sweep.expected()
            console.print(Text(f"{done} of at least {known} runs are done; to go on: {again(folder)}"), soft_wrap=True)
            raise typer.Exit(3)


def _predict(console: Console, probes: list[str], path: Path | None) -> None:
    from probes.predictions import write

    if path is None:
        raise UserError("--predict writes the file that --predictions names: give it")
    named: dict[str, list[Path]] = {}
    for item in probes:
        task, sign, folder = item.partition("=")
        if not (sign and task and folder):
            raise UserError(f"--predict is TASK=FOLDER of a probe-smoothness run, not {item!r}")
        named.setdefault(task, []).append(Path(folder))
    digest = write(path, named)
    said = f"{path} written, sha256 {digest}; commit it, then sweep with --predictions {path}"
    console.print(Text(said), soft_wrap=True)


def _plan(console: Console, study: Any) -> None:
    from probes.terminal import grid

    rows = []
    for line in study.lines:
        first = [line.grid.rate(i) for i in line.grid.first] if line.grid else []
        places = f"{first[0]:.3g} to {first[-1]:.3g}" if first else "given rates"
        runs = max(len(first), 1) * len(line.seeds)
        rows.append([line.task, line.method, line.axis, line.until, places, str(runs)])
    total = sum(int(r[-1]) for r in rows)
    console.print(
        grid(["task", "method", "axis", "budget", "first places", "runs"], rows, "lines of this sweep", left=5)
    )
    console.print(Text(f"{total} runs to begin with; extensions and refinements come on top"))


def _folder(description: Path | None, resume: bool) -> Path:
    name = "embedded" if description is None else description.stem
    if not resume:
        return rundir.default_folder("sweep", name, "")
    taken = rundir.latest_folder("sweep", name, "")
    if taken is None:
        raise UserError(f"--resume: there is no sweep of {name} under runs/: give its folder as --out")
    return taken


@contextmanager
def _bar(console: Console) -> Iterator[Any]:
    """A bar with the time left; where output is not a terminal, a line for every finished run."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[left]}"),
    )
    live, begun = console.is_terminal, time.time()
    from probes.markdown import seconds

    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True, disable=not live) as shown:
        task = shown.add_task("starting", total=1, left="")

        def said(what: str, done: int, known: int, left: float | None) -> None:
            rest = "" if not left else f"about {seconds(left)} left, extensions aside"
            shown.update(task, description=what, completed=done, total=known, left=f"{done}/{known} {rest}")
            if not live:
                line = f"[{seconds(time.time() - begun)}] {done}/{known} {what}" + (f" ({rest})" if rest else "")
                console.print(Text(line), soft_wrap=True)

        yield said


@contextmanager
def _following(run: rundir.RunFolder, folder: Path) -> Iterator[None]:
    """Whatever stops the sweep, the user learns what is kept and how to go on."""
    try:
        yield
    except BaseException as error:
        if run.started:
            error.add_note(f"finished runs are kept in {folder}; to go on: {again(folder)}")
        raise


def _finish(console: Console, run: rundir.RunFolder) -> None:
    """Report and figures from the records that stand in the folder."""
    from probes import sweep_report

    records = rundir.load(run.path)
    with console.status(Text("writing the report")):
        report = sweep_report.save(records, run)
    parts = [Text(line) for line in report.summary()]
    console.print(Group(*parts, Text(f"report: {run.path / 'report.md'}", style="bold")), soft_wrap=True)


def main() -> None:
    """The command `hybrid-sweep`."""
    app()
