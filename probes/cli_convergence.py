"""The command `probe-convergence`: arguments in, records, report and checks out; exit codes as in `probes.command`, and 3 where --strict is
given and a check fails."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from hybridtheory.errors import UserError
from probes import chosen_rates, rundir
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
    size_in_bytes,
    task_arguments,
    with_options_of,
)
from probes.records import Point, Record
from probes.records_convergence import Trajectory

FAILED = 3
LR_PEFT = option(PLAN, "Rate of the PEFT weights.", show_default="recommended by probe-smoothness")
LR_BASE = option(PLAN, "Rate of the base weights.", show_default="recommended by probe-smoothness")
SHARED = (*TASK, "micro_batch", "max_memory", "timeout", "resume")

app = command_line()


@app.command()
@with_options_of(probe_smoothness, SHARED, rows=6)
def probe_convergence(
    method: Annotated[str, option(PLAN, "What moves the weights: hybrid-two-sided, hybrid, mezo, zo-adam, ...")] = "hybrid-two-sided",
    lr_base: Annotated[float | None, LR_BASE] = None,
    lr_peft: Annotated[float | None, LR_PEFT] = None,
    rates: Annotated[Path | None, option(PLAN, "A trainer.toml that probe-smoothness wrote: rates, mu and q.", show_default=False)] = None,
    steps: Annotated[int, option(PLAN, "Steps of each run.")] = 24,
    runs: Annotated[int, option(PLAN, "Runs with different directions: errors of means over runs.")] = 3,
    batch_size: Annotated[int | None, option(PLAN, "Rows of a minibatch.", show_default="all rows in every step")] = None,
    sampling: Annotated[str, option(PLAN, "reshuffle or iid, for minibatches.")] = "reshuffle",
    mu: Annotated[float, option(PLAN, "Perturbation of the zeroth-order differences.")] = 1e-3,
    q: Annotated[int, option(PLAN, "Queries: averaged zeroth-order directions a step.")] = 1,
    law: Annotated[str | None, option(PLAN, "gaussian, sphere or rademacher directions.", show_default="the method's own")] = None,
    points: Annotated[int, option(MEASURE, "Points of the first run with constants and one-step descent.")] = 3,
    directions: Annotated[int, option(MEASURE, "Most directions spent on one mean change.")] = 400,
    precision: Annotated[float, option(MEASURE, "Relative standard error at which directions stop.")] = 0.03,
    f_star: Annotated[float | None, option(MEASURE, "A lower bound of the loss.", show_default="0 for cross-entropy")] = None,
    out: Annotated[Path | None, option(OUTPUT, "Run folder.", show_default="runs/convergence-MODEL-DATA")] = None,
    dry_run: Annotated[bool, option(OUTPUT, "Cost estimate, then stop; nothing is written.", "--dry-run")] = False,
    strict: Annotated[bool, option(OUTPUT, "Exit with 3 when a check fails.", "--strict")] = False,
    **options: Any,
) -> None:  # fmt: skip
    """Put a run of the hybrid method beside what theory says: mean one-step descent, convergence bounds, the exponent of the rate.

    Without arguments it runs on the embedded model and task, in about a minute and a half.
    """
    console, errors = consoles(options["timeout"])
    failed = 0
    with one_sentence(errors), ExitStack() as stack:
        check_numbers(seed=options["seed"], micro_batch=options["micro_batch"], alpha=options["alpha"], mu=mu)
        source = ""
        if rates is not None:
            lr_base, lr_peft, mu, q, source = from_toml(rates, lr_base, lr_peft, mu, q)
        folder = choose_folder("convergence", options["model"], options["data"], out, options["resume"])
        run = None if dry_run else opened(console, stack, folder, options["resume"])
        if run is not None and rundir.finished(run.done):
            failed = finish(console, run, [*run.done])
            raise typer.Exit(FAILED if strict and failed else 0)
        from probes import terminal
        from probes.convergence import Settings

        settings = Settings(
            method=method, lr_base=lr_base, lr_peft=lr_peft, steps=steps, runs=runs, points=points, batch_size=batch_size,
            sampling=sampling, mu=mu, q=q, law=law, precision=precision, most=directions, f_star=f_star, seed=options["seed"],
            micro_batch=options["micro_batch"], max_memory=size_in_bytes(options["max_memory"]), rates_from=source,
        )  # fmt: skip
        with terminal.waiting(console, "loading model and data"):
            prepare()
            from probes import convergence
            from probes.provenance import provenance
            from probes.tasks import load_task

            task = load_task(**task_arguments(options))
        with terminal.Bar(console) as bar:
            done = run.done if run is not None else []
            stream = convergence.run(task, settings, bar.phase, provenance(), dry=run is None, done=done)
            records = follow(stream, run, console, bar, words={Point: "point", Trajectory: "run"})
        if run is not None:
            failed = finish(console, run, records)
    if strict and failed:
        Console(stderr=True).print(Text(f"--strict: {failed} check{'s'[: failed != 1]} failed", style="bold red"))
        raise typer.Exit(FAILED)


def from_toml(
    path: Path, lr_base: float | None, lr_peft: float | None, mu: float, q: int
) -> tuple[float | None, float | None, float, int, str]:
    """Rates, mu and q of a trainer.toml; rates given on the command line go before."""
    found = chosen_rates.read(path, "--rates")
    given, settings = found.get("rates", {}), found.get("settings", {})
    if not any(name in given for name in ("eta_base", "eta_peft")):
        raise UserError(
            f"--rates {path} holds no [rates] eta_base or eta_peft: give the trainer.toml of a finished probe-smoothness run"
        )
    base = lr_base if lr_base is not None else given.get("eta_base")
    return (
        base,
        lr_peft if lr_peft is not None else given.get("eta_peft"),
        settings.get("mu", mu),
        settings.get("q", q),
        f"from {path.name}",
    )


def finish(console: Console, run: rundir.RunFolder, records: list[Record]) -> int:
    """Report, figures and summary; returns how many checks failed."""
    from probes import convergence_report, terminal

    with console.status(Text("writing the report")):
        convergence_report.save(records, run)
    console.print(convergence_report.summary(records))
    console.print(terminal.place(run.path / "report.md"))
    return len(convergence_report.failed(records))


def convergence() -> None:
    """The command `probe-convergence`."""
    app()
