"""Command lines. Each reads its arguments, calls a probe, writes what it yields and shows it; nothing is measured here.

Exit codes: 0 done; 2 bad input or a model that cannot be measured, with one sentence; 130 Ctrl-C, with what was
measured kept.
"""

from __future__ import annotations

import math
import re
import shlex
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from hybridtheory.errors import UserError
from probes import rundir
from probes.records import Cost, End, Header, Point, Preflight, Record, Secant, Warning

WHAT, ADAPTER, MEASURE, PLAN, MACHINE, OUTPUT = (
    "Model and data",
    "Adapter",
    "Measurement",
    "Planned training",
    "Machine",
    "Output",
)


def command_line() -> typer.Typer:
    """What every command shares: no completion scripts, our own sentences instead of typer's tracebacks, -h beside --help."""
    return typer.Typer(
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
        context_settings={"help_option_names": ["-h", "--help"]},
    )


app = command_line()


def option(panel: str, help: str, *names: str, **more: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel, **more)


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
            "Most that the process may hold, like 8GiB: graphs that do not fit are rebuilt.",
            show_default="what is free",
        ),
    ] = None,
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
    console, errors = Console(), Console(stderr=True)
    with one_sentence(errors), ExitStack() as stack:
        check_numbers(seed=seed, micro_batch=micro_batch, alpha=alpha, mu=mu)
        if curvature not in ("hessian", "ggn"):
            raise UserError(f"--curvature is hessian or ggn, not {curvature!r}")
        folder = choose_folder(model, data, out, resume)
        run = None if dry_run or doctor else stack.enter_context(rundir.RunFolder(folder, resume))
        if run is not None and rundir.finished(run.done):
            console.print(Text(f"{folder} is finished already; its report is made again from its records."))
            return finish(console, run, [*run.done])
        if run is not None and run.dropped:
            console.print(Text(f"! {run.dropped}", style="yellow"))
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
                model, data, peft=peft, rank=rank, alpha=alpha, targets=names(targets), virtual_tokens=virtual_tokens, loss=loss, rows=rows,
                max_length=max_length, head=head, labels=names(labels), template=template, text_column=text_column,
                label_column=label_column, device=device, dtype=dtype, seed=seed, revision=revision, trust_remote_code=trust_remote_code,
            )  # fmt: skip
        from probes.provenance import provenance

        with terminal.Bar(console) as bar:
            done = run.done if run is not None else []
            stream = smoothness.run(task, settings, done, bar.phase, provenance(), dry=run is None, restore=False)
            records = follow(stream, run, console, bar, doctor)
        if run is not None:
            finish(console, run, records)


def follow(
    stream: Iterator[Record],
    run: rundir.RunFolder | None,
    console: Console,
    bar: Any,
    doctor: bool,
    words: Mapping[type, str] = MappingProxyType({Point: "point", Secant: "secant"}),
) -> list[Record]:
    """Write every record as it comes and show what a user wants to see of it; what was measured survives whatever
    stops the stream. ``words``: what the probe measures, and what a user calls one of it.
    """
    from probes import terminal

    records: list[Record] = list(run.done) if run is not None else []
    resumed = bool(records)
    try:
        for record in stream:
            if isinstance(record, Cost) and record.phase == "actual" and resumed:
                record = replace(record, note="of the resumed part")
            if run is not None and not run.append(record):
                continue  # a resumed run says again what stands in the file
            records.append(record)
            if isinstance(record, Header):
                console.print(terminal.opening(record))
                if doctor:
                    console.print(terminal.versions(record))
            elif isinstance(record, Preflight) and (doctor or record.verdict != "ok"):
                console.print(terminal.preflight(record))
            elif isinstance(record, Warning) and not any(isinstance(r, Point) for r in records):
                console.print(terminal.warning(record))  # later ones stand in the summary
            elif isinstance(record, Cost) and record.phase == "estimated":
                bar.expect(record)
                console.print(terminal.cost(record))
    except BaseException as error:
        if run is not None and run.started:
            reason = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
            run.append(End(reason, "" if reason == "interrupted" else f"{type(error).__name__}: {error}"))  # type: ignore[arg-type]
            error.add_note(kept(run, records, words))
        raise
    return records


def finish(console: Console, run: rundir.RunFolder, records: list[Record]) -> None:
    """Report, figures and summary from the records of a run that ended."""
    from probes import terminal
    from probes.report import Report

    report = Report.of(records)
    with console.status(Text("writing the report")):
        report.save(run)
    console.print(terminal.summary(report, run.path))


def kept(run: rundir.RunFolder, records: list[Record], words: Mapping[type, str]) -> str:
    """What survives, and the command that goes on."""
    counts = {word: sum(isinstance(r, kind) for r in records) for kind, word in words.items()}
    measured = " and ".join(f"{n} {word}{'s'[: n != 1]}" for word, n in counts.items())
    arguments = [a for a in sys.argv[1:] if a != "--resume"]
    if not any(a == "--out" or a.startswith("--out=") for a in arguments):
        arguments += ["--out", str(run.path)]
    command = shlex.join([Path(sys.argv[0]).name, *arguments, "--resume"])
    return f"{measured} are kept in {run.path}; to go on: {command}"


def choose_folder(model: str | None, data: str | None, out: Path | None, resume: bool) -> Path:
    """--out, or a free name under runs/; with --resume the latest name that is taken."""
    if out is not None:
        return out
    model, data = model or "embedded", data or "sentiment"
    if not resume:
        return rundir.default_folder("smoothness", model, data)
    taken = rundir.latest_folder("smoothness", model, data)
    if taken is None:
        raise UserError(f"--resume: there is no run of {model} on {data} under runs/: give its folder as --out")
    return taken


def size_in_bytes(text: str | None) -> int | None:
    """8GiB, 900MiB, 8GB or plain bytes."""
    if text is None:
        return None
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([kMGT])(i?)B?)?\s*", text)
    size = 0.0
    if found:
        number, unit, binary = found.groups()
        size = float(number) * (1024 if binary else 1000) ** (" kMGT".index(unit) if unit else 0)
    if size < 1:
        raise UserError(f"--max-memory is a size like 8GiB or 900MiB, not {text!r}")
    return int(size)


def check_numbers(seed: int, micro_batch: int | None, alpha: float | None, mu: float) -> None:
    """What would fail late, or be misunderstood; the rest is checked where it is used."""
    if not 0 <= seed < 2**63:
        raise UserError(f"--seed is a whole number from 0 to 2^63 - 1, not {seed}")
    if micro_batch is not None and micro_batch < 1:
        raise UserError(f"--micro-batch is a number of rows, at least 1, not {micro_batch}")
    for name, value in (("alpha", alpha), ("mu", mu)):
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"--{name} is a positive number, not {value}")


def names(text: str | None) -> list[str] | str | None:
    """ "a,b" is a list of names; anything with a regex character is one pattern."""
    if text is None:
        return None
    parts = [p.strip() for p in text.split(",") if p.strip()]
    if not parts:
        raise UserError("an empty list of names was given: leave the option out, or name at least one")
    return text if any(c in text for c in "*+?()[]|^$\\") else parts


def prepare() -> None:
    """Before a probe or a training loads anything: this process is ours, and its libraries are quiet."""
    from hybridtheory import memory

    memory.keep_freed()
    quiet()


def quiet() -> None:
    """Progress bars and notices of the libraries would tear ours apart; what matters of them reaches the user as a
    warning of ours.
    """
    import datasets
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", module=r"(torch|transformers|peft|datasets)(\.|$)")


@contextmanager
def one_sentence(console: Console) -> Iterator[None]:
    """Errors that are the user's to mend become one sentence and an exit code; a defect of ours keeps its traceback."""
    try:
        yield
    except UserError as error:
        tell(console, str(error), error)
        raise typer.Exit(2) from None
    except KeyboardInterrupt as error:
        tell(console, "interrupted", error)
        raise typer.Exit(130) from None
    except Exception as error:
        if not out_of_memory(error):
            for note in getattr(error, "__notes__", []):
                console.print(Text(note))
            raise
        tell(
            console,
            "out of memory: give a smaller --micro-batch (the numbers stay the same), fewer --rows or a smaller --max-length",
            error,
        )
        raise typer.Exit(2) from None


def tell(console: Console, sentence: str, error: BaseException) -> None:
    console.print(
        Text.assemble(
            ("error: " if sentence != "interrupted" else "", "bold red"), (" ".join(sentence.split()), "red")
        ),
        soft_wrap=True,
    )
    for note in getattr(error, "__notes__", []):
        console.print(Text(note), soft_wrap=True)
    if isinstance(error, KeyboardInterrupt) and not getattr(error, "__notes__", []):
        console.print(Text("nothing was measured yet, so nothing was written"), soft_wrap=True)


def out_of_memory(error: BaseException) -> bool:
    """torch on CUDA, Python itself, and torch on the CPU (a RuntimeError that says so)."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in str(error)
    )


def smoothness() -> None:
    """The command `probe-smoothness`."""
    app()
