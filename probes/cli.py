"""probe-smoothness on the command line: arguments in, records, report and a summary out; nothing is measured here."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from hybridtheory.errors import UserError
from probes import rundir
from probes.command import (
    ADAPTER,
    MACHINE,
    MEASURE,
    OUTPUT,
    PLAN,
    TIMEOUT,
    WHAT,
    check_numbers,
    choose_folder,
    command_line,
    consoles,
    follow,
    modules,
    names,
    one_sentence,
    opened,
    option,
    prepare,
    reported,
    size_in_bytes,
)
from probes.records import Record

app = command_line()


@app.command()
def probe_smoothness(
    model: Annotated[
        str | None,
        typer.Argument(help="Hub name, local folder or GGUF file; nothing: the embedded model.", show_default=False),
    ] = None,
    data: Annotated[
        str | None,
        option(
            WHAT,
            "A named task (sst2, rte, cb, copa, boolq, winogrande, mrpc, wsc, wic, sentiment), a text, JSONL, CSV or Parquet file, "
            "a folder of datasets.save_to_disk, or a hub data set.",
            "--data",
            "--task",
            show_default="sentiment",
        ),
    ] = None,
    rows: Annotated[int, option(WHAT, "Rows to measure on.")] = 10,
    max_length: Annotated[
        int | None,
        option(WHAT, "Longest row in tokens; longer ones are cut, with a count.", show_default="256 or the context"),
    ] = None,
    loss: Annotated[
        str, option(WHAT, "vocabulary: cross-entropy over all tokens; labels: over the label words only.")
    ] = "vocabulary",
    head: Annotated[str, option(WHAT, "Which model class: auto, causal, masked, seq2seq, classification.")] = "auto",
    labels: Annotated[
        str | None, option(WHAT, "Label words, comma-separated, for data of your own.", show_default=False)
    ] = None,
    template: Annotated[
        str | None, option(WHAT, "Prompt with {column} fields, for data of your own.", show_default=False)
    ] = None,
    text_column: Annotated[str | None, option(WHAT, "Column with the text.", show_default=False)] = None,
    label_column: Annotated[str | None, option(WHAT, "Column with the label.", show_default=False)] = None,
    revision: Annotated[str | None, option(WHAT, "Branch, tag or commit on the hub.", show_default=False)] = None,
    trust_remote_code: Annotated[
        bool, option(WHAT, "Run model code that comes with the weights.", "--trust-remote-code")
    ] = False,
    allow_pickle: Annotated[
        bool, option(WHAT, "Read weights that are only there as pickle, which can run code.", "--allow-pickle")
    ] = False,
    peft: Annotated[
        str, option(ADAPTER, "lora, ia3, prefix, prompt, none, or the folder of a saved adapter.")
    ] = "lora",
    rank: Annotated[int, option(ADAPTER, "LoRA rank.")] = 8,
    alpha: Annotated[
        float | None, option(ADAPTER, "LoRA alpha; the scale is alpha/rank.", show_default="2 x rank")
    ] = None,
    targets: Annotated[
        str | None, option(ADAPTER, "Modules to adapt, comma-separated, or a regex.", show_default="peft's own choice")
    ] = None,
    virtual_tokens: Annotated[int, option(ADAPTER, "Virtual tokens of prefix and prompt tuning.")] = 8,
    blocks: Annotated[str, option(MEASURE, "group (base, peft), layer, module, or a regex.")] = "group",
    points: Annotated[int, option(MEASURE, "Full points along the reference run.")] = 3,
    secants: Annotated[int, option(MEASURE, "Secant positions along the run (two gradients a block each).")] = 30,
    run_steps: Annotated[int, option(MEASURE, "Steps of the reference run.")] = 45,
    trace_tol: Annotated[
        float,
        option(
            MEASURE,
            "Relative standard error at which the trace of the base stops; 0.3 for large models, a product each.",
        ),
    ] = 0.1,
    directions: Annotated[int, option(MEASURE, "Directions of the finite-scale rule at each point.")] = 10,
    curvature: Annotated[str, option(MEASURE, "hessian or ggn.")] = "hessian",
    seed: Annotated[int, option(MEASURE, "Every random number follows from it.")] = 0,
    steps: Annotated[int, option(PLAN, "Optimizer steps.")] = 1000,
    batch_size: Annotated[int, option(PLAN, "Rows a step.")] = 16,
    mu: Annotated[float, option(PLAN, "Perturbation of the zeroth-order differences.")] = 1e-3,
    q: Annotated[int, option(PLAN, "Queries: averaged zeroth-order directions a step.")] = 1,
    engine: Annotated[
        str,
        option(
            MACHINE,
            "exact (double backward), difference (of gradients), forward (values only), or auto: the first that serves the model.",
        ),
    ] = "exact",
    device: Annotated[str, option(MACHINE, "cpu, cuda, cuda:1, mps.")] = "cpu",
    dtype: Annotated[str, option(MACHINE, "float32 (for verification), float64, bfloat16, float16.")] = "float32",
    micro_batch: Annotated[
        int | None,
        option(MACHINE, "Rows at a time: less memory, the same numbers.", show_default="a quarter of the rows"),
    ] = None,
    max_memory: Annotated[
        str | None,
        option(
            MACHINE,
            "Most that the process may hold, like 8GiB: rows at a time, kept graphs and (with --engine auto) the engine are chosen to fit.",
            show_default="what is free",
        ),
    ] = None,
    timeout: Annotated[
        float, option(MACHINE, "Of several processes: seconds after which one waits for another in vain.")
    ] = TIMEOUT,
    out: Annotated[Path | None, option(OUTPUT, "Run folder.", show_default="runs/smoothness-MODEL-DATA")] = None,
    resume: Annotated[
        bool, option(OUTPUT, "Go on with the run in --out (or the latest of this model and data).", "--resume")
    ] = False,
    dry_run: Annotated[
        bool, option(OUTPUT, "Preflight and cost estimate, then stop; nothing is written.", "--dry-run")
    ] = False,
    doctor: Annotated[
        bool, option(OUTPUT, "As --dry-run, with versions and every preflight number.", "--doctor")
    ] = False,
) -> None:
    """Measure the smoothness of base and PEFT weights and the learning rates that theory recommends.

    Without arguments it runs on the embedded model and task, in about a minute.
    """
    console, errors = consoles(timeout)
    with one_sentence(errors), ExitStack() as stack:
        check_numbers(seed=seed, micro_batch=micro_batch, alpha=alpha, mu=mu)
        if curvature not in ("hessian", "ggn"):
            raise UserError(f"--curvature is hessian or ggn, not {curvature!r}")
        folder = choose_folder("smoothness", model, data, out, resume)
        run = None if dry_run or doctor else opened(console, stack, folder, resume)
        if run is not None and rundir.finished(run.done):
            return finish(console, run, [*run.done])
        from probes import terminal

        with terminal.waiting(console, "loading model and data"):
            prepare()
            from probes import smoothness
            from probes.point import Settings
            from probes.tasks import load_task

            settings = Settings(
                blocks=blocks, seed=seed, points=points, secants=secants, run_steps=run_steps, directions=directions, mu=mu, q=q,
                trace_tol=trace_tol,
                batch_size=batch_size, steps=steps, micro_batch=micro_batch, curvature=curvature, max_memory=size_in_bytes(max_memory),
                engine=engine,
            )  # fmt: skip
            task = load_task(
                model, data, peft=peft, rank=rank, alpha=alpha, targets=modules(targets), virtual_tokens=virtual_tokens, loss=loss,
                rows=rows, max_length=max_length, head=head, labels=names(labels), template=template, text_column=text_column,
                label_column=label_column, device=device, dtype=dtype, seed=seed, revision=revision, trust_remote_code=trust_remote_code,
                allow_pickle=allow_pickle,
            )  # fmt: skip
        from probes.provenance import provenance

        with terminal.Bar(console) as bar:
            done = run.done if run is not None else []
            stream = smoothness.run(task, settings, done, bar.phase, provenance(), dry=run is None, restore=False)
            records = follow(stream, run, console, bar, doctor)
        if run is not None:
            finish(console, run, records)


def finish(console: Console, run: rundir.RunFolder, records: list[Record]) -> None:
    """Report, figures and summary from the records of a run that ended."""
    from probes import terminal

    report = reported(console, run, records)
    console.print(terminal.summary(report, run.path))


def smoothness() -> None:
    """The command `probe-smoothness`."""
    app()
