"""hybrid-train on the command line: reads arguments, calls `probes.train`, writes what comes and shows it."""

from __future__ import annotations

from contextlib import ExitStack, closing
from pathlib import Path
from typing import Annotated, Any

from rich.console import Console
from rich.text import Text

from hybridtheory.errors import UserError
from probes import rundir
from probes.cli import finish, probe_smoothness
from probes.command import (
    MACHINE,
    OUTPUT,
    TASK,
    WHAT,
    check_numbers,
    choose_folder,
    command_line,
    consoles,
    first,
    follow,
    meet,
    one_sentence,
    option,
    prepare,
    task_arguments,
    with_options_of,
)
from probes.interrupts import asking, noting
from probes.records import End, Evaluation, Header, Record, Step, Warning

TRAINING, RATES, SCORES = "Training", "Learning rates", "Evaluation"

# What is trained is said as in the probes; but all rows take part, not a few.
SHARED = (*(name for name in TASK if name != "rows"), "timeout")
PROBE = "-probe"  # the folder of the rates that --lr auto measures first: that of the run with this suffix
PROBE_ROWS = 12  # that they are measured on

app = command_line()


@app.command()
@with_options_of(probe_smoothness, SHARED)
def hybrid_train(
    rows: Annotated[int | None, option(WHAT, "Training rows; 0: all there are.")] = 1000,
    method: Annotated[str, option(TRAINING, "Any name of hybridtheory.optimizers.METHODS; ? lists them.")] = "hybrid",
    options: Annotated[
        list[str] | None,
        option(TRAINING, "name=value for the method, e.g. penalty=1; may be repeated.", "--option", show_default=False),
    ] = None,
    lr: Annotated[
        str | None,
        option(
            RATES, "auto: probe first, then train; or a trainer.toml, or the run folder of a probe.", show_default=False
        ),
    ] = None,
    lr_base: Annotated[float | None, option(RATES, "Rate of the base weights.", show_default=False)] = None,
    lr_peft: Annotated[float | None, option(RATES, "Rate of the PEFT weights.", show_default=False)] = None,
    schedule: Annotated[str, option(RATES, "constant, or linear to zero.")] = "constant",
    weight_decay: Annotated[float, option(TRAINING, "Decoupled; matrices only.")] = 0.0,
    steps: Annotated[
        int | None, option(TRAINING, "Optimizer steps.", show_default="1000, or as --budget allows")
    ] = None,
    budget: Annotated[
        int | None,
        option(TRAINING, "Forward-equivalents: a forward pass is 1, a backward pass 2.", show_default=False),
    ] = None,
    batch: Annotated[int, option(TRAINING, "Rows of a minibatch.")] = 16,
    accumulate: Annotated[int, option(TRAINING, "Minibatches averaged in a step.")] = 1,
    sampling: Annotated[str, option(TRAINING, "reshuffle: exact epochs; iid: with replacement.")] = "reshuffle",
    lower_share: Annotated[
        float,
        option(TRAINING, "Share of the training rows for the lower level of a bilevel method; 0: all rows in both."),
    ] = 0.5,
    objective: Annotated[
        str, option(TRAINING, "loss, or accuracy or f1 of the minibatch (zeroth-order methods).")
    ] = "loss",
    mu: Annotated[float, option(TRAINING, "Perturbation of the zeroth-order differences.")] = 1e-3,
    q: Annotated[int, option(TRAINING, "Averaged zeroth-order directions a step.")] = 1,
    law: Annotated[
        str | None,
        option(TRAINING, "Directions, e.g. rademacher or subzero:rank=8.", show_default="the method's"),
    ] = None,
    dropout: Annotated[float, option(TRAINING, "Probability; 0 is off.")] = 0.0,
    eval_every: Annotated[int, option(SCORES, "Steps between evaluations; 0: before and after only.")] = 100,
    eval_rows: Annotated[int, option(SCORES, "Rows scored during the run, the same each time.")] = 200,
    final_rows: Annotated[int, option(SCORES, "Rows scored at the end; 0: all.")] = 0,
    eval_data: Annotated[
        str | None, option(SCORES, "Evaluate on another task, e.g. sst2.", show_default="the data's own splits")
    ] = None,
    master: Annotated[str, option(MACHINE, "fp32: updates go to a float32 copy of bf16 and fp16 weights.")] = "none",
    micro_batch: Annotated[
        int | None,
        option(MACHINE, "Rows at a time: less memory, the same numbers up to rounding.", show_default="the minibatch"),
    ] = None,
    checkpoint_every: Annotated[int, option(OUTPUT, "Steps between checkpoints.")] = 100,
    merged: Annotated[
        bool, option(OUTPUT, "Export the whole model although the adapter would do.", "--merged")
    ] = False,
    keep: Annotated[
        str, option(OUTPUT, "last, or best: the weights that score best on the dev split (best/ in the run folder).")
    ] = "last",
    tensorboard: Annotated[bool, option(OUTPUT, "Curves for TensorBoard in the run folder.", "--tensorboard")] = False,
    out: Annotated[Path | None, option(OUTPUT, "Run folder.", show_default="runs/train-MODEL-DATA")] = None,
    resume: Annotated[
        bool, option(OUTPUT, "Go on with the run in --out (or the latest of this model and data).", "--resume")
    ] = False,
    **loading: Any,
) -> None:
    """Fine-tune with one method: hybrid (zeroth-order base, first-order PEFT), MeZO, SubZero, LoRA-AdamW and many more.

    Learning rates are given, read from a trainer.toml, or measured first (--lr auto).
    """
    console, errors = consoles(loading.pop("timeout"))
    with one_sentence(errors), ExitStack() as stack:
        from probes import chosen_rates, terminal, train_text
        from probes.train_settings import TrainSettings
        from probes.train_settings import options as pairs

        seed = loading["seed"]
        check_numbers(seed=seed, micro_batch=micro_batch, alpha=loading["alpha"], mu=mu)
        model, data = loading.pop("model"), loading.pop("data")
        loading = task_arguments(loading)
        if method == "?":
            return console.print(train_text.catalogue())
        if master not in ("none", "fp32"):
            raise UserError(f"--master is none or fp32, not {master!r}")
        given = {"base": lr_base, "peft": lr_peft}
        settings: dict[str, Any] = {
            "method": method, "steps": 1000 if steps is None and budget is None else steps, "budget": budget, "batch": batch, "seed": seed,
            "mu": mu, "q": q, "law": law, "options": pairs(options or []), "weight_decay": weight_decay, "schedule": schedule,
            "sampling": sampling, "accumulate": accumulate, "micro_batch": micro_batch, "objective": objective, "dropout": dropout,
            "master": master == "fp32", "eval_every": eval_every, "eval_rows": eval_rows, "eval_data": eval_data,
            "final_rows": final_rows or None, "checkpoint_every": checkpoint_every, "keep": keep,
            "lower_share": lower_share,
        }  # fmt: skip
        TrainSettings(**settings)  # refuses what is wrong before anything is loaded
        auto = lr == "auto" and chosen_rates.needs_measuring(method, given)
        table = None if lr is None or auto or lr == "auto" else chosen_rates.read(Path(lr))
        if not auto:
            chosen_rates.choose(
                method,
                given,
                table,
                {"model_sha256": None, "data": None, "mu": mu, "q": q, "law": "gaussian", "batch_size": batch},
            )
        folder = choose_folder("train", model, data, out, resume, begins_in=PROBE)
        probed = folder.with_name(folder.name + PROBE)
        begun = (folder / rundir.RECORDS).exists()
        if resume and not begun and not (auto and probed.exists()):
            raise UserError(f"--resume: {folder} holds no run: leave --resume out to start one")
        run = stack.enter_context(rundir.RunFolder(folder, resume and begun, first()))
        meet()
        if rundir.finished(run.done):
            console.print(Text(f"{folder} is finished already"))
            return console.print(train_text.summary(run.done, folder, scored=True))
        if auto:
            plan: dict[str, Any] = {
                "seed": seed,
                "mu": mu,
                "q": q,
                "batch_size": batch,
                "steps": settings["steps"] or 1000,
            }
            with noting(folder):
                table = chosen_rates.read(probe(console, model, data, loading, plan, probed))
        with terminal.waiting(console, "loading model and data"):
            prepare()
            from probes import train
            from probes.tasks import load_task

            task = load_task(model, data, rows=rows or None, **loading)
        now = {
            "model_sha256": task.info["model_sha256"], "data": task.info["data"], "mu": mu, "q": q,
            "law": (law or "gaussian").partition(":")[0], "batch_size": batch * accumulate,
        }  # fmt: skip
        rates = chosen_rates.choose(method, given, table, now)
        wanted = TrainSettings(**settings, lr_base=rates.base, lr_peft=rates.peft)
        from probes.export import export
        from probes.provenance import provenance

        board = stack.enter_context(closing(_board(folder, run.done))) if tensorboard and first() else None
        shown: list[Record] = list(run.done)
        before = {r.step for r in run.done if isinstance(r, Step)}

        def emit(record: Record) -> None:
            if not run.append(record):
                return
            shown.append(record)
            if isinstance(record, Step) and record.step in before:
                before.clear()
                emit(
                    Warning(
                        f"step {record.step} gives other numbers than before the interruption: another machine or build of torch"
                    )
                )
            if board is not None:
                board.add(record)
            if isinstance(record, Header):
                console.print(terminal.opening(record))
            elif isinstance(record, Warning):
                console.print(terminal.warning(record))
            elif isinstance(record, Evaluation):
                console.print(Text(train_text.scores(record)))

        with noting(folder, run), asking() as stop, train_text.bar(console) as progress:
            outcome = train.run(
                task, wanted, emit, folder, origin=provenance(), notes=rates.notes, stop=stop, progress=progress,
                finish=lambda task, moved: export(task, folder / "export", moved, merged),
            )  # fmt: skip
            good = outcome.status in ("finished", "budget")
            run.append(End("finished" if good else "failed", outcome.reason))
        console.print(train_text.summary(shown, folder))
        if not good:
            raise UserError(f"the run stopped at step {outcome.step}: {outcome.reason} in {folder / 'checkpoints'}")


def probe(
    console: Console, model: str | None, data: str | None, loading: dict[str, Any], plan: dict[str, Any], folder: Path
) -> Path:
    """probe-smoothness of the same model, adapter and data; it goes on where an earlier one stopped. Returns its folder."""
    from probes import smoothness, terminal
    from probes.point import Settings
    from probes.provenance import provenance
    from probes.tasks import load_task

    with rundir.RunFolder(folder, (folder / rundir.RECORDS).exists(), first()) as run:
        there = rundir.finished(run.done) and (folder / "trainer.toml").exists()
        meet()
        if there:
            return folder
        console.print(Text(f"measuring learning rates first: {folder}"))
        prepare()
        task = load_task(model, data, rows=PROBE_ROWS, **loading)
        with terminal.Bar(console) as bar:
            stream = smoothness.run(task, Settings(**plan), run.done, bar.phase, provenance(), restore=False)
            records = follow(stream, run, console, bar, False)
        finish(console, run, records)
    meet()  # the first one has written the rates that all of them read now
    return folder


def _board(folder: Path, done: list[Record]) -> Any:
    from probes import checkpoints
    from probes.tensorboard import Board

    found = checkpoints.latest(folder / "checkpoints") if done else None
    return Board(folder / "tensorboard", checkpoints.step_of(found) if found else 0)


def main() -> None:
    """The command `hybrid-train`."""
    app()
