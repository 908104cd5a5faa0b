"""The command `probe-convergence`: arguments in, records, report and checks out; exit codes as in `probes.cli`, and 3 where --strict is
given and a check fails."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from hybridtheory.errors import UserError
from probes import rundir
from probes.cli import (
    ADAPTER,
    MACHINE,
    MEASURE,
    OUTPUT,
    PLAN,
    WHAT,
    check_numbers,
    command_line,
    names,
    one_sentence,
    option,
    prepare,
)
from probes.records import Cost, End, Header, Point, Preflight, Record, Warning

FAILED = 3
LR_PEFT = option(PLAN, "Rate of the PEFT weights.", show_default="recommended by probe-smoothness")
LR_BASE = option(PLAN, "Rate of the base weights.", show_default="recommended by probe-smoothness")
TARGETS = option(ADAPTER, "Modules to adapt, comma-separated, or a regex.", show_default="peft's own choice")
MICRO = option(MACHINE, "Rows at a time: less memory, the same numbers.", show_default="a quarter of the rows")
DATA = option(
    WHAT,
    "A named task, a file, a folder or a hub data set, as in probe-smoothness.",
    "--data",
    show_default="sentiment",
)
MODEL = typer.Argument(help="Hub name, local folder or GGUF file; nothing: the embedded model.", show_default=False)

app = command_line()


@app.command()
def probe_convergence(
    model: Annotated[str | None, MODEL] = None,
    data: Annotated[str | None, DATA] = None,
    rows: Annotated[int, option(WHAT, "Rows to measure on: they are the whole objective.")] = 8,
    max_length: Annotated[int | None, option(WHAT, "Longest row in tokens.", show_default="256 or the context")] = None,
    loss: Annotated[str, option(WHAT, "vocabulary: cross-entropy over all tokens; labels: over the label words only.")] = "vocabulary",
    head: Annotated[str, option(WHAT, "Which model class: auto, causal, masked, seq2seq, classification.")] = "auto",
    labels: Annotated[str | None, option(WHAT, "Label words, comma-separated, for data of your own.", show_default=False)] = None,
    template: Annotated[str | None, option(WHAT, "Prompt with {column} fields, for data of your own.", show_default=False)] = None,
    text_column: Annotated[str | None, option(WHAT, "Column with the text.", show_default=False)] = None,
    label_column: Annotated[str | None, option(WHAT, "Column with the label.", show_default=False)] = None,
    peft: Annotated[str, option(ADAPTER, "lora, ia3, prefix, prompt, none, or the folder of a saved adapter.")] = "lora",
    rank: Annotated[int, option(ADAPTER, "LoRA rank.")] = 8,
    alpha: Annotated[float | None, option(ADAPTER, "LoRA alpha; the scale is alpha/rank.", show_default="2 x rank")] = None,
    targets: Annotated[str | None, TARGETS] = None,
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
    seed: Annotated[int, option(MEASURE, "Every random number follows from it.")] = 0,
    device: Annotated[str, option(MACHINE, "cpu, cuda, cuda:1, mps.")] = "cpu",
    dtype: Annotated[str, option(MACHINE, "float32 (for verification), float64, bfloat16, float16.")] = "float32",
    micro_batch: Annotated[int | None, MICRO] = None,
    out: Annotated[Path | None, option(OUTPUT, "Run folder.", show_default="runs/convergence-MODEL-DATA")] = None,
    dry_run: Annotated[bool, option(OUTPUT, "Cost estimate, then stop; nothing is written.", "--dry-run")] = False,
    strict: Annotated[bool, option(OUTPUT, "Exit with 3 when a check fails.", "--strict")] = False,
) -> None:  # fmt: skip
    """Put a run of the hybrid method beside what theory says: mean one-step descent, convergence bounds, the exponent of the rate.

    Without arguments it runs on the embedded model and task, in about a minute and a half.
    """
    console, errors = Console(), Console(stderr=True)
    failed = 0
    with one_sentence(errors), ExitStack() as stack:
        check_numbers(seed=seed, micro_batch=micro_batch, alpha=alpha, mu=mu)
        source = ""
        if rates is not None:
            lr_base, lr_peft, mu, q, source = from_toml(rates, lr_base, lr_peft, mu, q)
        folder = out or rundir.default_folder("convergence", model or "embedded", data or "sentiment")
        run = None if dry_run else stack.enter_context(rundir.RunFolder(folder))
        from probes import terminal
        from probes.convergence import Settings

        settings = Settings(
            method=method, lr_base=lr_base, lr_peft=lr_peft, steps=steps, runs=runs, points=points, batch_size=batch_size,
            sampling=sampling, mu=mu, q=q, law=law, precision=precision, most=directions, f_star=f_star, seed=seed, micro_batch=micro_batch,
            rates_from=source,
        )  # fmt: skip
        with terminal.waiting(console, "loading model and data"):
            prepare()
            from probes import convergence
            from probes.provenance import provenance
            from probes.tasks import load_task

            task = load_task(
                model, data, peft=peft, rank=rank, alpha=alpha, targets=names(targets), loss=loss, rows=rows, max_length=max_length,
                head=head, labels=names(labels), template=template, text_column=text_column, label_column=label_column, device=device,
                dtype=dtype, seed=seed,
            )  # fmt: skip
        with terminal.Bar(console) as bar:
            records = follow(
                convergence.run(task, settings, bar.phase, provenance(), dry=run is None), run, console, bar
            )
        if run is not None:
            failed = finish(console, run, records)
    if strict and failed:
        Console(stderr=True).print(Text(f"--strict: {failed} check{'s'[: failed != 1]} failed", style="bold red"))
        raise typer.Exit(FAILED)


def from_toml(
    path: Path, lr_base: float | None, lr_peft: float | None, mu: float, q: int
) -> tuple[float | None, float | None, float, int, str]:
    """Rates, mu and q of a trainer.toml; rates given on the command line go before."""
    try:
        found: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"--rates {path} cannot be read ({error.strerror}): give the trainer.toml of a probe-smoothness run"
        ) from None
    except tomllib.TOMLDecodeError as error:
        raise UserError(
            f"--rates {path} is not TOML ({error}): give the trainer.toml of a probe-smoothness run"
        ) from None
    given, settings = found.get("rates", {}), found.get("settings", {})
    if not any(name in given for name in ("eta_base", "eta_peft")):
        raise UserError(
            f"--rates {path} holds no [rates] eta_base or eta_peft: give the trainer.toml of a finished probe-smoothness run"
        )
    for name, value in given.items():
        if not isinstance(value, int | float) or not 0 < value < math.inf:
            raise UserError(f"--rates {path}: {name} must be a positive number, not {value!r}")
    base = lr_base if lr_base is not None else given.get("eta_base")
    return (
        base,
        lr_peft if lr_peft is not None else given.get("eta_peft"),
        settings.get("mu", mu),
        settings.get("q", q),
        f"from {path.name}",
    )


def follow(stream: Iterator[Record], run: rundir.RunFolder | None, console: Console, bar: Any) -> list[Record]:
    """Write every record as it comes; what was measured survives whatever stops the stream."""
    from probes import terminal

    records: list[Record] = []
    try:
        for record in stream:
            if run is not None:
                run.append(record)
            records.append(record)
            if isinstance(record, Header):
                console.print(terminal.opening(record))
            elif isinstance(record, Preflight) and record.verdict != "ok":
                console.print(terminal.preflight(record))
            elif isinstance(record, Warning):
                console.print(terminal.warning(record))
            elif isinstance(record, Cost) and record.phase == "estimated":
                bar.expect(record)
                console.print(terminal.cost(record))
    except BaseException as error:
        if run is not None and run.started:
            interrupted = isinstance(error, KeyboardInterrupt)
            run.append(
                End(
                    "interrupted" if interrupted else "failed",
                    "" if interrupted else f"{type(error).__name__}: {error}",
                )
            )
            error.add_note(
                f"{sum(isinstance(r, Point) for r in records)} points are kept in {run.path}/{rundir.RECORDS}"
            )
        raise
    return records


def finish(console: Console, run: rundir.RunFolder, records: list[Record]) -> int:
    """Report, figures and summary; returns how many checks failed."""
    from probes import convergence_report

    with console.status(Text("writing the report")):
        convergence_report.save(records, run)
    console.print(convergence_report.summary(records))
    console.print(Text.assemble(("report  ", "dim"), (str(run.path / "report.md"), "bold")))
    return len(convergence_report.failed(records))


def convergence() -> None:
    """The command `probe-convergence`."""
    app()
