"""probe-cost on the command line. Model, data, adapter and machine options are those of probe-smoothness, declared there."""

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
    ADAPTER,
    MEASURE,
    OUTPUT,
    TASK,
    check_numbers,
    choose_folder,
    command_line,
    consoles,
    follow,
    one_sentence,
    opened,
    option,
    quiet,
    reported,
    task_arguments,
    with_options_of,
)
from probes.records import Record

SHARED = (*(n for n in TASK if n != "peft"), "micro_batch", "timeout", "resume")

app = command_line()


@app.command()
@with_options_of(probe_smoothness, SHARED, rows=8)
def probe_cost(
    methods: Annotated[
        str | None,
        option(
            MEASURE,
            "Names of hybrid-train's methods, separated by spaces, or all; NAME+LAW for other directions, e.g. hybrid+rademacher.",
            show_default="eleven of them",
        ),
    ] = None,
    peft: Annotated[
        str, option(ADAPTER, "lora, ia3, prefix, prompt, several of them separated by spaces, or all.")
    ] = "lora",
    rounds: Annotated[int, option(MEASURE, "Interleaved rounds of the timing; 0: memory alone.")] = 10,
    memory: Annotated[
        bool, option(MEASURE, "Peak memory of each method, in a process of its own.", "--memory/--no-memory")
    ] = True,
    out: Annotated[Path | None, option(OUTPUT, "Run folder.", show_default="runs/cost-MODEL-DATA")] = None,
    dry_run: Annotated[bool, option(OUTPUT, "Cost estimate, then stop; nothing is written.", "--dry-run")] = False,
    **options: Any,
) -> None:
    """Measure what a step of every training method costs: peak memory by phase and time, beside the formulas.

    Without arguments it runs on the embedded model and task, whose figures are too small to count; the report says so.
    """
    console, errors = consoles(options["timeout"])
    with one_sentence(errors), ExitStack() as stack:
        check_numbers(seed=options["seed"], micro_batch=options["micro_batch"], alpha=options["alpha"], mu=1e-3)
        folder = choose_folder("cost", options["model"], options["data"], out, options["resume"])
        run = None if dry_run else opened(console, stack, folder, options["resume"])
        if run is not None and rundir.finished(run.done):
            return finish(console, run, [*run.done])
        from probes import terminal

        with terminal.waiting(console, "loading"):
            quiet()
            from probes import cost
            from probes.adapters import TYPES
            from probes.provenance import provenance

            settings = cost.Settings(
                methods=chosen(methods, cost.DEFAULT_METHODS), pefts=tuple(t for t in TYPES if t != "none") if peft == "all" else
                tuple(peft.split()), rounds=rounds, memory=memory, device=options["device"],
                seed=options["seed"], micro_batch=options["micro_batch"],
            )  # fmt: skip
            loading = task_arguments(options)
        with terminal.Bar(console) as bar:
            done = run.done if run is not None else []
            stream = cost.run(loading, settings, done, bar.phase, provenance(), dry=run is None)
            records = follow(stream, run, console, bar, False)
        if run is not None:
            finish(console, run, records)


def chosen(text: str | None, default: tuple[str, ...]) -> tuple[str, ...]:
    """--methods as names; "all" is every method whose package is there."""
    if text is None:
        return default
    if text != "all":
        found = tuple(text.split())
        if not found:
            raise UserError("--methods is a list of names separated by spaces, or all")
        return found
    from importlib.util import find_spec

    from hybridtheory.optimizers import METHODS

    return tuple(m for m in METHODS if m != "galore" or find_spec("galore_torch"))


def finish(console: Console, run: rundir.RunFolder, records: list[Record]) -> None:
    """Report, figures and the answer from the records of a run that ended."""
    from probes import markdown_cost, terminal

    report = reported(console, run, records)
    for sentence in markdown_cost.answers(report):
        console.print(Text(terminal.plain(sentence)), soft_wrap=True)
    for warning in report.warnings:
        console.print(terminal.warning(warning))
    console.print(terminal.place(run.path / "report.md"))


def cost() -> None:
    """The command `probe-cost`."""
    app()
