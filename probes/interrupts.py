"""Ctrl-C and other ends of a run: what is kept, and the command that goes on."""

from __future__ import annotations

import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from hybridtheory.errors import UserError
from probes import rundir
from probes.records import End


@contextmanager
def asking() -> Iterator[Callable[[], bool]]:
    """The first Ctrl-C asks the run to stop after its step, with a checkpoint; a second one stops it where it is."""
    pressed = False

    def handle(number: int, frame: Any) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    try:
        before = signal.signal(signal.SIGINT, handle)
    except ValueError:  # not in the main thread: Ctrl-C never comes here
        yield lambda: False
        return
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def noting(folder: Path, run: rundir.RunFolder | None = None) -> Iterator[None]:
    """Whatever stops the run, the user learns what is kept and how to go on."""
    try:
        yield
    except BaseException as error:
        from probes import checkpoints

        if run is not None and run.started:
            reason = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
            note = "" if reason == "interrupted" else f"{type(error).__name__}: {error}"
            with suppress(
                UserError
            ):  # on a full disk the records end without their last line, and can be resumed all the same
                run.append(End(reason, note))  # type: ignore[arg-type]
        found = checkpoints.latest(folder / "checkpoints")
        kept = (
            f"the records and the checkpoint of step {checkpoints.step_of(found)} are kept in {folder}; "
            if found
            else ""
        )
        error.add_note(f"{kept}to go on: {again(folder)}")
        raise


def again(folder: Path) -> str:
    """The command line of this process with --resume and its folder: what goes on with the run."""
    arguments = [a for a in sys.argv[1:] if a != "--resume"]
    if not any(a == "--out" or a.startswith("--out=") for a in arguments):
        arguments += ["--out", str(folder)]
    return shlex.join([Path(sys.argv[0]).name, *arguments, "--resume"])
