"""kill -9 at any moment, then --resume: the records, the report and the weights of a run that nothing interrupted.

Commands run in forked children of this process, which imported everything before: a kill then falls into the run and not into imports.
docs/reliability.md lists the faults, what is promised for each, and which test shows it.
"""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tqdm import tqdm

from probes import checkpoints, cli, cli_convergence, cli_train, convergence_figures, figures, rundir
from probes.jsonl import stable

pytestmark = pytest.mark.slow
KILLS = {"probe": 12, "train": 38, "convergence": 3}  # at times uniform over the wall time
# probe: trainer.toml, report.json, report.md; train: five checkpoints, two exports; convergence: checks.json, report.md
RENAMES = {"probe": 3, "train": 7, "convergence": 2}
RATES = ["--lr-base", "1e-4", "--lr-peft", "1e-2"]
PROBE = ["--points", "2", "--secants", "2", "--run-steps", "2", "--directions", "4", "--rows", "4"]
TRAIN = [
    "--steps",
    "8",
    "--batch",
    "3",
    "--checkpoint-every",
    "2",
    "--eval-every",
    "4",
    "--eval-rows",
    "4",
    "--rows",
    "8",
    *RATES,
]
COMPARE = ["--points", "2", "--steps", "8", "--runs", "2", "--directions", "12", "--rows", "6", *RATES]


@dataclass(frozen=True)
class Command:
    """``run(folder, resume)`` in this process; ``result(folder)``: everything that two runs of the same command must agree on."""

    run: Callable[[Path, bool], None]
    result: Callable[[Path], list[str]]
    kills: int
    renames: int


def records(folder: Path) -> list[str]:
    return [json.dumps([type(r).__name__, stable(r)]) for r in rundir.load(folder)]


def probed(folder: Path) -> list[str]:
    report = json.loads((folder / "report.json").read_text())
    measured = {k: report[k] for k in ("schema", "model", "blocks", "points", "coupling", "learning_rates")}
    return [*records(folder), _without_seconds(measured), (folder / "trainer.toml").read_text().split("[source]")[0]]


def trained(folder: Path) -> list[str]:
    weights = load_file(folder / "export" / "adapter" / "adapter_model.safetensors")
    last = checkpoints.latest(folder / "checkpoints")
    assert last is not None
    return [*records(folder), checkpoints.sha256(weights), checkpoints.sha256(load_file(last / checkpoints.WEIGHTS))]


def _without_seconds(value: object) -> str:
    return json.dumps(
        json.loads(
            json.dumps(value),
            object_hook=lambda d: {k: v for k, v in d.items() if k not in ("seconds", "argv", "host", "time")},
        )
    )


@pytest.fixture(scope="module", params=list(KILLS))
def command(request, gpt2, films):
    app, own, result = {
        "probe": (cli.app, PROBE, probed),
        "train": (cli_train.app, TRAIN, trained),
        "convergence": (cli_convergence.app, COMPARE, records),
    }[request.param]

    def run(folder: Path, resume: bool) -> None:
        arguments = [str(gpt2), "--data", str(films), *own, "--out", str(folder), *["--resume"][:resume]]
        app(arguments, standalone_mode=False)

    return Command(run, result, KILLS[request.param], RENAMES[request.param])


def forked(
    command: Command, folder: Path, after: float | None = None, prepare: Callable[[], None] = lambda: None
) -> int:
    """The wait status of a child that runs the command; killed ``after`` seconds."""
    resume = (folder / rundir.RECORDS).exists() and (folder / rundir.RECORDS).stat().st_size > 0
    child = os.fork()
    if child == 0:  # pragma: no cover
        code = 1
        try:
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), 1)
                os.dup2(nowhere.fileno(), 2)
            # The default lock is one semaphore for this process and all its forks: a child that is killed inside would keep it for ever.
            tqdm.set_lock(threading.RLock())
            # Drawn from the records after everything is measured, and most of a small run's time.
            figures.save = convergence_figures.save = lambda *a: []
            prepare()
            command.run(folder, resume)
            code = 0
        finally:
            os._exit(code)
    if after is not None:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]


@pytest.fixture(scope="module")
def whole(command, tmp_path_factory):
    """(what an uninterrupted run leaves, its seconds)"""
    folder = tmp_path_factory.mktemp("whole") / "run"
    started = time.perf_counter()
    assert forked(command, folder) == 0
    return command.result(folder), time.perf_counter() - started


def finish(command: Command, folder: Path) -> None:
    assert forked(command, folder) == 0


def test_killed_at_any_time_and_resumed_is_uninterrupted(command, whole, tmp_path):
    expected, seconds = whole
    times = random.Random(0)
    begun = 0
    for number in range(command.kills):
        folder = tmp_path / str(number)
        status = forked(command, folder, after=times.uniform(0, seconds))
        assert os.WIFSIGNALED(status) or os.waitstatus_to_exitcode(status) == 0
        begun += (folder / rundir.RECORDS).exists()
        finish(command, folder)
        assert command.result(folder) == expected, f"kill {number}"
    assert begun > command.kills // 4  # a test whose kills all fall before anything is written shows nothing


def test_killed_again_and_again_it_still_gets_there(command, whole, tmp_path):
    expected, seconds = whole
    times, folder = random.Random(1), tmp_path / "run"
    for _ in range(4):
        forked(command, folder, after=times.uniform(0.2, 0.6) * seconds)
    finish(command, folder)
    assert command.result(folder) == expected


@pytest.mark.parametrize("before", [True, False], ids=["before the rename", "after it"])
def test_killed_around_every_rename(command, whole, tmp_path, before):
    """Between the write of every file and the rename that makes it whole, and right after that."""
    expected, _ = whole
    number = 0
    while True:
        number += 1

        def at_rename(left: int = number) -> None:
            replace, count = os.replace, iter(range(left - 1, -1, -1))

            def killing(*names, **options):
                due = next(count, None) == 0
                if due and before:
                    os.kill(os.getpid(), signal.SIGKILL)
                replace(*names, **options)
                if due:
                    os.kill(os.getpid(), signal.SIGKILL)

            os.replace = killing

        folder = tmp_path / str(number)
        status = forked(command, folder, prepare=at_rename)
        if os.waitstatus_to_exitcode(status) == 0:
            break
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        finish(command, folder)
        assert command.result(folder) == expected, f"rename {number}"
    assert number == command.renames + 1
