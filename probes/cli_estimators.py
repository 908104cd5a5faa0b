"""probe-estimators on the command line. Model, data, adapter, block and machine options are those of probe-smoothness, declared there."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

from rich.console import Console
from rich.text import Text

from hybridtheory.errors import UserError
from probes import rundir
from probes.cli import probe_smoothness
from probes.command import (
    MEASURE,
    OUTPUT,
    PLAN,
    TASK,
    check_numbers,
    choose_folder,
    command_line,
    consoles,
    follow,
    one_sentence,
    opened,
    option,
    prepare,
    reported,
    task_arguments,
    with_options_of,
)
from probes.markdown import interval, number
from probes.records import Budget, Estimator, Record

SHARED = (*TASK, "blocks", "batch_size", "micro_batch", "timeout", "resume")

app = command_line()


@app.command()
@with_options_of(probe_smoothness, SHARED, rows=16)
def probe_estimators(
    laws: Annotated[
        str | None,
        option(
            MEASURE,
            "Direction laws, separated by spaces: NAME or NAME:option=number,..., e.g. 'gaussian gaussian:q=4 subzero:rank=8'.",
            show_default="a table of 12",
        ),
    ] = None,
    precision: Annotated[
        float | None,
        option(
            MEASURE,
            "Relative error of the second moment at which sampling stops.",
            show_default="0.03; 0.15 above 10 M weights",
        ),
    ] = None,
    max_draws: Annotated[int, option(MEASURE, "Most directions of one law.")] = 20_000,
    directions: Annotated[
        int | None, option(MEASURE, "Directions of the error budget.", show_default="8; 4 above 10 M weights")
    ] = None,
    mus: Annotated[
        str | None,
        option(MEASURE, "Values of mu of the error budget, comma-separated.", show_default="decades from 1e-5"),
    ] = None,
    q: Annotated[int, option(PLAN, "Queries a step, for the comparison of more rows with more queries.")] = 1,
    out: Annotated[Path | None, option(OUTPUT, "Run folder.", show_default="runs/estimators-MODEL-DATA")] = None,
    dry_run: Annotated[bool, option(OUTPUT, "Cost estimate, then stop; nothing is written.", "--dry-run")] = False,
    **options: Any,
) -> None:
    """Measure zeroth-order estimators against the exact gradient, beside their closed formulas, and where their error comes from.

    Without arguments it runs on the embedded model and task.
    """
    console, errors = consoles(options["timeout"])
    with one_sentence(errors), ExitStack() as stack:
        check_numbers(seed=options["seed"], micro_batch=options["micro_batch"], alpha=options["alpha"], mu=1e-3)
        steps = None if mus is None else tuple(_positive(x) for x in mus.split(","))
        folder = choose_folder("estimators", options["model"], options["data"], out, options["resume"])
        run = None if dry_run else opened(console, stack, folder, options["resume"])
        if run is not None and rundir.finished(run.done):
            return finish(console, run, [*run.done])
        from probes import terminal

        with terminal.waiting(console, "loading model and data"):
            prepare()
            from probes import estimators
            from probes.provenance import provenance
            from probes.tasks import load_task

            settings = estimators.Settings(
                laws=tuple(laws.split()) if laws is not None else estimators.DEFAULT_LAWS, blocks=options["blocks"], seed=options["seed"],
                precision=precision, max_draws=max_draws, directions=directions, mus=steps, q=q, batch_size=options["batch_size"],
                micro_batch=options["micro_batch"],
            )  # fmt: skip
            task = load_task(**task_arguments(options))
        with terminal.Bar(console) as bar:
            done = run.done if run is not None else []
            stream = estimators.run(task, settings, done, bar.phase, provenance(), dry=run is None)
            words = {Estimator: "estimator", Budget: "error budget"}
            records = follow(stream, run, console, bar, False, words)
        if run is not None:
            finish(console, run, records)


def finish(console: Console, run: rundir.RunFolder, records: list[Record]) -> None:
    """Report, figures and a table of the groups' laws from the records of a run that ended."""
    from probes import terminal
    from probes.markdown_estimators import far, measured, predicted, scaled

    report = reported(console, run, records)
    for group in [b for b in report.blocks if b.name == b.group]:
        rows = []
        for e in (e for e in report.all(Estimator) if e.block == group.name):
            second, square = e.quantities["second_moment"], e.quantities["cosine_sq"]
            rows.append(
                [e.law, f"{e.n:,}", measured(second), predicted(second), far(second), measured(scaled(square, e.d))]
            )
        if rows:
            head = ["law", "estimates", "E|ĝ|²/|g|²", "formula", "off by", "d·E cos²"]
            console.print(terminal.grid(head, rows, f"{group.name}: d = {group.d:,}"), Text(""))
    best = [
        [b.block, b.dtype, number(b.recommended), interval(b.flat) if b.flat else "nowhere"] for b in report.all(Budget)
    ]
    if best:
        console.print(terminal.grid(["error budget", "dtype", "best mu", "flat from - to"], best, left=2), Text(""))
    estimated, actual = report.cost("estimated"), report.cost("actual")
    if estimated is not None:
        console.print(terminal.cost(estimated, actual))
    console.print(*map(terminal.warning, report.warnings), sep="\n") if report.warnings else None
    console.print(terminal.place(run.path / "report.md"))


def _positive(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UserError(f"--mus is a list of numbers separated by commas, and {text!r} is not a number") from None


def estimators() -> None:
    """The command `probe-estimators`."""
    app()
