"""What the command lines share: how options are declared and borrowed, how records are followed, how errors are told.

Exit codes: 0 done; 2 bad input or a model that cannot be measured, with one sentence; 130 Ctrl-C, with what was
measured kept.
"""

from __future__ import annotations

import inspect
import math
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.text import Text

from hybridtheory.errors import UserError
from probes import rundir
from probes.interrupts import again
from probes.records import Cost, End, Header, Point, Preflight, Record, Secant, Warning

if TYPE_CHECKING:
    from probes.report import Report

WHAT, ADAPTER, MEASURE, PLAN, MACHINE, OUTPUT = (
    "Model and data",
    "Adapter",
    "Measurement",
    "Planned training",
    "Machine",
    "Output",
)
# Options of probe-smoothness that say what is measured: every probe takes them.
TASK = (
    "model", "data", "rows", "max_length", "loss", "head", "labels", "template", "text_column", "label_column", "revision",
    "trust_remote_code", "allow_pickle", "peft", "rank", "alpha", "targets", "virtual_tokens", "device", "dtype", "seed",
)  # fmt: skip
TIMEOUT = 120.0  # seconds without progress after which a process is taken to hang
Command = Callable[..., None]


def command_line() -> typer.Typer:
    """What every command shares: no completion scripts, our own sentences instead of typer's tracebacks, -h beside --help."""
    return typer.Typer(
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
        context_settings={"help_option_names": ["-h", "--help"]},
    )


def option(panel: str, help: str, *names: str, **more: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel, **more)


def with_options_of(
    source: Callable[..., Any], shared: tuple[str, ...], **defaults: Any
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A command that takes ``shared`` options of another one, declared once, before its own; they arrive in its ``**options``.

    ``defaults`` are this command's where they differ.
    """

    def decorate(command: Command) -> Command:
        theirs = inspect.signature(source, eval_str=True).parameters
        own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.kind is not p.VAR_KEYWORD]
        both = [p.replace(kind=p.KEYWORD_ONLY) for p in (*(theirs[n] for n in shared), *own)]
        both = [p.replace(default=defaults.get(p.name, p.default)) for p in both]
        command.__signature__ = inspect.Signature(both)  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in both}
        return command

    return decorate


def consoles(timeout: float = TIMEOUT) -> tuple[Console, Console]:
    """(screen, errors). Of several processes the first one speaks, and every one tells its own errors.

    ``timeout``: seconds that each of them waits for the others, from now on.
    """
    errors = Console(stderr=True)
    with one_sentence(errors):
        if not 1 <= timeout < 1e6:
            raise UserError(f"--timeout is a number of seconds from 1 to a million, not {timeout:g}")
        return Console(quiet=not first(timeout)), errors


def first(timeout: float = TIMEOUT) -> bool:
    """Whether this process owns screen and files: it is alone, or the first of those that a launcher started."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return True
    from hybridtheory import ranks

    return ranks.join(timeout).writes


def meet() -> None:
    """Processes that share a run go on together: what its folder holds is read by all before the first of them writes there."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from hybridtheory import ranks

        ranks.joined().meet()


def follow(
    stream: Iterator[Record],
    run: rundir.RunFolder | None,
    console: Console,
    bar: Any,
    doctor: bool = False,
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


def kept(run: rundir.RunFolder, records: list[Record], words: Mapping[type, str]) -> str:
    """What survives, and the command that goes on."""
    counts = {word: sum(isinstance(r, kind) for r in records) for kind, word in words.items()}
    measured = " and ".join(f"{n} {word}{'s'[: n != 1]}" for word, n in counts.items())
    return f"{measured} are kept in {run.path}; to go on: {again(run.path)}"


def choose_folder(
    probe: str, model: str | None, data: str | None, out: Path | None, resume: bool, begins_in: str = ""
) -> Path:
    """--out, or a free name under runs/; with --resume the latest name that is taken, by the run or by the folder with the suffix
    ``begins_in`` that it fills first.
    """
    if out is not None:
        return out
    model, data = model or "embedded", data or "sentiment"
    free = rundir.default_folder(probe, model, data)
    if not resume or (begins_in and free.with_name(free.name + begins_in).exists()):
        return free
    found = rundir.latest_folder(probe, model, data)
    if found is None:
        raise UserError(f"--resume: there is no run of {model} on {data} under runs/: give its folder as --out")
    return found


def opened(console: Console, stack: ExitStack, folder: Path, resume: bool) -> rundir.RunFolder:
    """The run folder, closed with ``stack``; says what a user must know of what it already holds."""
    run = stack.enter_context(rundir.RunFolder(folder, resume, first()))
    meet()
    if rundir.finished(run.done):
        console.print(Text(f"{folder} is finished already; its report is made again from its records."))
    elif run.dropped:
        console.print(Text(f"! {run.dropped}", style="yellow"))
    return run


def reported(console: Console, run: rundir.RunFolder, records: list[Record]) -> Report:
    """The report of a run that ended, with everything that its folder holds of it written."""
    from probes.report import Report

    report = Report.of(records)
    with console.status(Text("writing the report")):
        report.save(run)
    return report


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


def names(text: str | None) -> list[str] | None:
    """ "a,b" is a list of names."""
    if text is None:
        return None
    parts = [p.strip() for p in text.split(",") if p.strip()]
    if not parts:
        raise UserError("an empty list of names was given: leave the option out, or name at least one")
    return parts


def modules(text: str | None) -> list[str] | str | None:
    """Names, or one pattern: anything with a regex character."""
    return text if text is not None and any(c in text for c in "*+?()[]|^$\\") else names(text)


def task_arguments(options: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `load_task` among a command's ``options``, lists of names read as such."""
    read = {"targets": modules, "labels": names}
    return {n: read[n](options[n]) if n in read else options[n] for n in TASK if n in options}


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
        from hybridtheory import memory  # torch: --help does not wait for it

        if not memory.exhausted(error):
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
