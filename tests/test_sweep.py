"""hybrid-sweep: the same runs whoever runs them and however often it is killed, and commands that say what is wrong."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from tiny_models import FILMS, write
from typer.testing import CliRunner

from hybridtheory.errors import UserError
from probes import cli_sweep, jsonl, rundir, sweep, sweep_cell, sweep_description, sweep_lines, sweep_study, train
from probes import records as R
from probes.sweep_description import study
from probes.sweep_lines import Lines
from probes.sweep_report import SweepReport
from probes.sweep_watch import Watch
from probes.sweep_work import half, work

SMALL = {
    "steps": 3,
    "seeds": 2,
    "train": {"batch": 4, "eval_rows": 8},
    "grid": {"points": 3, "extensions": 1, "peft": 1.0},
}


@pytest.fixture(scope="module")
def data(root: Path) -> Path:
    return write(root / "sweep.jsonl", [{"text": f"{t} {i}", "label": i % 2} for i, t in enumerate(FILMS * 3)])


@pytest.fixture(scope="module")
def tiny(gpt2, data):
    return {"name": "tiny", "model": str(gpt2), "data": str(data), "rows": 12, "rank": 2}


def stable_lines(records) -> list[str]:
    return [json.dumps([type(r).__name__, jsonl.stable(r)]) for r in records]


def run(made, folder: Path, resume: bool = False, **options) -> list[R.Record]:
    """The sweep of a study in a folder, to its end."""
    with rundir.RunFolder(folder, resume) as kept:
        job = sweep.Sweep(made, kept.append, options.pop("said", lambda *a: None), **options)
        if job.run(kept.done, {}):
            kept.append(R.End("finished"))
    return rundir.load(folder)


def cells(records) -> list[R.Cell]:
    return [r for r in records if isinstance(r, R.Cell)]


def by_place(found: list[R.Cell]) -> dict:
    return {(c.axis, c.place, c.seed): jsonl.stable(c) for c in found}


# ---- cells -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def one(tiny):
    """A study of one task, and its works at chosen places."""
    made = study({**SMALL, "task": [tiny]})
    task = sweep_cell.describe(made.sources[0], 0)

    def at(axis: str, place: float, seed: int = 0, method: str = "hybrid", **line):
        found = next(x for x in study({**SMALL, "methods": [method], "task": [tiny]}).lines if x.axis == axis)
        lines = Lines(made, [])
        state = lines.state(replace(found, **line))
        return work(made, {("tiny", 0): task}, state, place, seed)

    yield at
    sweep_cell.unload()


def same(a: R.Cell, b: R.Cell) -> bool:
    return jsonl.stable(a) == jsonl.stable(b)


def test_a_cell_does_not_depend_on_what_its_worker_ran_before(one):
    first = sweep_cell.run_cell(one("peft", 0.5))
    lost = sweep_cell.run_cell(one("base", 1e3))
    assert lost.status in ("diverged", "not finite") and not math.isfinite(lost.final)
    again = sweep_cell.run_cell(one("peft", 0.5))
    assert same(first, again) and first.final < first.start and first.weights_sha256
    sweep_cell.unload()
    assert same(first, sweep_cell.run_cell(one("peft", 0.5)))


@pytest.mark.parametrize(
    "method", ["hybrid", "hybrid-two-sided", "hybrid-adamw", "hybrid-sequential", "hybrid-subzero"]
)
@pytest.mark.parametrize("axis", ["base", "peft"])
def test_with_one_rate_zero_the_half_that_moves_gives_the_same_loss(one, method, axis):
    """The sweep runs the half, which is cheaper, in the place of the method; to the bit."""
    place = 1e-2
    cheap = one(axis, place, method=method)
    assert cheap.settings.method != method
    settings = sweep_description.settings_of(
        next(x for x in [replace_line(cheap)]), *(place if axis == "base" else 0.0, place if axis == "peft" else 0.0), 0
    )
    whole = replace(cheap, settings=settings)
    a, b = sweep_cell.run_cell(cheap), sweep_cell.run_cell(whole)
    assert a.final == b.final != a.start
    assert a.equivalents < b.equivalents


def replace_line(made) -> sweep_study.Line:
    f = made.fields
    train = {"batch": 4, "eval_rows": 8, "eval_data": "train", "eval_every": 0, "final_rows": 8}
    groups = ("base", "peft")
    return sweep_study.Line(
        f["task"], f["method"], f["axis"], f["horizon"], f["amount"], (0,), groups, True, train, None
    )


def test_halves_are_for_budgets_of_steps(one):
    line = replace_line(one("base", 1e-2))
    settings = sweep_description.settings_of(replace(line, horizon="budget", amount=40), 1e-2, 0.0, 0)
    assert half(replace(line, horizon="budget"), settings) is settings
    assert half(line, sweep_description.settings_of(line, 1e-2, 0.0, 0)).method == "mezo"


@pytest.mark.parametrize(("horizon", "amount"), [("budget", 20), ("tokens", 400), ("seconds", 0.05)])
def test_every_budget_ends_a_run(one, horizon, amount):
    made = one("peft", 0.1, horizon=horizon, amount=float(amount))
    cell = sweep_cell.run_cell(made)
    spent = {"budget": cell.equivalents, "tokens": cell.tokens, "seconds": cell.clock[-1]}[horizon]
    step = spent / cell.step
    assert cell.status == "budget" and amount - 1e-4 <= spent
    assert horizon == "seconds" or spent < amount + 2 * step


def test_the_identity_of_a_cell_is_what_determines_it(one):
    made = one("base", 0.01)
    task, settings = made.expected, made.settings
    known = sweep_cell.identity(task, settings, 1)
    assert known == sweep_cell.identity(
        replace(task, name="x", model="elsewhere"), replace(settings, checkpoint_every=7), 1
    )
    changed = [
        (replace(task, data_sha256="x"), settings, 1),
        (task, replace(settings, mu=1e-2), 1),
        (task, settings, 2),
    ]
    assert len({known, *(sweep_cell.identity(*c) for c in changed)}) == 4


# ---- whole sweeps: killed, resumed, in workers -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tiny):
    return study({**SMALL, "axes": ["base", "peft", "scale", "ratio"], "task": [tiny]})


@pytest.fixture(scope="module")
def whole(made, tmp_path_factory):
    """The records of the uninterrupted sweep, and its folder."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    return run(made, folder), folder


@pytest.mark.parametrize("part", [0.2, 0.6])
def test_a_sweep_killed_at_any_moment_resumes_to_the_same_records(made, whole, tmp_path, part):
    expected, _ = whole
    total, folder = len(cells(expected)), tmp_path / "cut"
    assert total > 20
    child = os.fork()
    if child == 0:  # pragma: no cover - it is killed in the middle of a training step
        step, left = train.Run.step, iter(range(int(3 * part * total), 0, -1))

        def killed(*arguments):
            if next(left, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            return step(*arguments)

        train.Run.step = killed
        run(made, folder)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    kept = cells(rundir.load(folder))
    assert 0 < len(kept) < total
    with open(folder / rundir.RECORDS, "ab") as file:
        file.write(b'{"kind": "cell", "id": "cut')  # and what a kill in the middle of a line leaves
    ran: list[str] = []
    again = run(made, folder, True, said=lambda what, *a: ran.append(what))
    assert stable_lines(again) == stable_lines(expected)
    assert len([w for w in ran if "loss" in w]) == total - len(kept)


def test_a_run_that_two_lines_share_is_made_once(whole):
    found = cells(whole[0])
    assert len({(c.axis, c.place, c.seed) for c in found}) == len(found) > len({c.id for c in found})
    for cell in found:
        first = next(c for c in found if c.id == cell.id)
        labels = {"axis": cell.axis, "place": cell.place, "around": cell.around, "seconds": first.seconds}
        assert cell.seconds == 0 or cell is first
        assert same(cell, replace(first, **labels))


@pytest.mark.parametrize("axis", ["scale", "ratio"])
def test_a_joint_line_keeps_the_rates_it_began_around_when_optima_are_found_in_another_way(
    made, whole, tmp_path, monkeypatch, axis
):
    lines = (whole[1] / rundir.RECORDS).read_text().splitlines(keepends=True)
    begun = next(i for i, t in enumerate(lines) if '"kind": "cell"' in t and f'"axis": "{axis}"' in t)
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / rundir.RECORDS).write_text("".join(lines[: begun + 1]))
    found = sweep_lines.optimum

    def elsewhere(*arguments):
        best = found(*arguments)
        return replace(best, rate=1.3 * best.rate, best=1.3 * best.best)

    monkeypatch.setattr(sweep_lines, "optimum", elsewhere)
    again = cells(run(made, folder, True))
    expected, resumed = ([c for c in x if c.axis == axis] for x in (cells(whole[0]), again))
    # Not only the run that was there: those that came after the change have the rates and losses of a sweep without it.
    assert len(resumed) == len(expected) > 2 and by_place(resumed) == by_place(expected)
    assert {c.around for c in resumed} == {expected[0].around}
    report = SweepReport(rundir.load(folder))
    [state] = [s for s in report.states if s.line.axis == axis]
    assert state.around == expected[0].around and not report.warnings
    # A line that had not begun goes around the optima of the day.
    assert axis == "ratio" or {c.around for c in again if c.axis == "ratio"}.isdisjoint(
        c.around for c in cells(whole[0])
    )


def test_records_that_do_not_say_what_a_line_goes_around_are_gone_on_with_and_one_warning_says_so(
    made, whole, tmp_path
):
    """An older version's, cut in the middle of the scale line."""
    text = [
        re.sub(r', "around": (null|\[[^]]*\])', "", t)
        for t in (whole[1] / rundir.RECORDS).read_text().splitlines(keepends=True)
    ]
    begun = next(i for i, t in enumerate(text) if '"kind": "cell"' in t and '"axis": "scale"' in t)
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / rundir.RECORDS).write_text("".join(text[: begun + 1]))
    again = run(made, folder, True)
    [warning] = [r for r in again if isinstance(r, R.Warning)]
    assert "runs of 1 joint line do not say" in warning.text and "tiny hybrid 3 steps scale" in warning.text
    assert SweepReport(again).warnings == [warning.text] and warning.text in SweepReport(again).text()
    first, *others = [c for c in cells(again) if c.axis == "scale"]
    assert first.around is None and None not in {c.around for c in others}
    assert by_place([replace(c, around=None) for c in cells(again)]) == by_place(
        [replace(c, around=None) for c in cells(whole[0])]
    )


def test_a_slice_ends_cleanly_and_the_next_goes_on(made, whole, tmp_path):
    expected, _ = whole
    folder = tmp_path / "slices"
    clock = {"until": time.time() + 3600}
    count = []

    def said(what, done, known, left):
        count.append(what)
        if len(count) == 5:
            job.until = time.time() - 1

    with rundir.RunFolder(folder) as kept:
        job = sweep.Sweep(made, kept.append, said, until=clock["until"])
        assert not job.run([], {})
        kept.append(R.End("interrupted", "the slice ended"))
        assert job.left() > 0 and job.expected() > len(job.cells)
    assert 0 < len(cells(rundir.load(folder))) < len(cells(expected))
    assert stable_lines(run(made, folder, True)) == stable_lines(expected)


def test_a_slice_may_end_inside_a_run_that_has_checkpoints(tiny, tmp_path):
    table = {
        **SMALL,
        "steps": 6,
        "seeds": 1,
        "axes": ["peft"],
        "grid": {**SMALL["grid"], "extensions": 0},
        "task": [tiny],
    }
    plain = run(study(table), tmp_path / "plain")
    made = study({**table, "checkpoint": 2})
    folder = tmp_path / "cut"
    # A deadline that has passed when the first run looks: each slice makes one step and a checkpoint.
    for _ in range(60):
        with rundir.RunFolder(folder, (folder / rundir.RECORDS).exists()) as kept:
            job = sweep.Sweep(
                made, kept.append, lambda *a: None, until=time.time() + 0.05, folder=str(tmp_path / "cells")
            )
            job._over = lambda: False
            if job.run(kept.done, {}):
                break
    assert stable_lines(rundir.load(folder))[1:] == stable_lines(plain)[1:-1]
    assert not list((tmp_path / "cells").glob("*"))


def test_a_worker_that_dies_is_named_and_nothing_finished_is_lost(made, whole, tmp_path, monkeypatch):
    """Two loky workers; one dies in the middle. The rest then runs in this process: the numbers are the same."""
    expected, _ = whole
    victim = cells(expected)[8].id

    def dying(work):
        if work.id == victim:
            os.kill(os.getpid(), signal.SIGKILL)
        return sweep_cell.run_cell(work)

    folder = tmp_path / "run"
    monkeypatch.setattr(sweep, "run_cell", dying)
    with pytest.raises(
        UserError, match=rf"a worker died while it ran cell .*{victim} \(tiny, hybrid, axis base, 3 steps"
    ):
        run(made, folder, pool=sweep.Pool(2))
    kept = {c.id: jsonl.stable(c) for c in cells(rundir.load(folder))}
    assert len(kept) >= 6 and victim not in kept
    monkeypatch.undo()
    done = cells(run(made, folder, True))
    assert by_place(done) == by_place(cells(expected))
    assert [c.id for c in done[: len(kept)]] == list(kept)


def test_a_worker_that_leaves_no_sign_is_ended_and_one_that_does_is_not(tmp_path):
    workers = {name: subprocess.Popen(["sleep", "600"]) for name in ("slow", "stuck")}
    try:
        for name, worker in workers.items():
            (tmp_path / name).write_text(str(worker.pid))
        (tmp_path / "new").write_text("")  # has not yet said who it is
        watch = Watch(_folder=str(tmp_path))
        for look in range(12):
            if look % 4 == 0:  # just in time, every time
                os.utime(tmp_path / "slow", ns=(look, look))
            watch.look(1.0)
            assert watch.hung == (set() if look < 5 else {"stuck"}), look
        assert workers["stuck"].wait(60) == -signal.SIGKILL and workers["slow"].poll() is None
        assert not (tmp_path / "stuck").exists()
    finally:
        for worker in workers.values():
            worker.kill()
            worker.wait()


@dataclass
class AtTheirPace(Watch):
    """Looks only once every worker but the victim's has left a sign since the last look: a busy machine, on which none of them gets far
    in a second, makes none of them hang.
    """

    victim: str = ""
    before: dict[str, int] = field(default_factory=dict)

    def look(self, timeout: float) -> None:
        now = {}
        for path in Path(self._folder).iterdir():
            with suppress(OSError):  # it has just ended
                now[path.name] = path.stat().st_mtime_ns
        if all(now[name] != self.before.get(name) for name in now if name != self.victim):
            self.before = now
            super().look(timeout)


def test_a_worker_that_hangs_is_ended_and_nothing_finished_is_lost(made, whole, tmp_path, monkeypatch):
    """One of two loky workers is stopped in the middle of its run, as a machine that swaps to death would stop it."""
    expected, _ = whole
    victim = cells(expected)[8].id
    evaluated = train.evaluate

    def hanging(work):
        if work.id != victim:
            return sweep_cell.run_cell(work)

        def stopped(*arguments):
            os.kill(os.getpid(), signal.SIGSTOP)
            return evaluated(*arguments)

        train.evaluate = stopped  # in this worker, which does nothing else any more
        return sweep_cell.run_cell(work)

    folder = tmp_path / "run"
    monkeypatch.setattr(sweep, "run_cell", hanging)
    with pytest.raises(
        UserError, match=rf"the worker of cell {victim} \(tiny, .* made no progress for 1 s and was ended.*--resume"
    ):
        run(made, folder, pool=sweep.Pool(2, timeout=1), watch=AtTheirPace(victim=victim))
    kept = {c.id: jsonl.stable(c) for c in cells(rundir.load(folder))}
    assert len(kept) >= 6 and victim not in kept
    monkeypatch.undo()
    assert by_place(cells(run(made, folder, True))) == by_place(cells(expected))


def test_a_model_that_changed_since_is_refused(made, whole, tmp_path):
    _, folder = whole
    text = (folder / rundir.RECORDS).read_text().splitlines(keepends=True)
    (tmp_path / "run").mkdir()
    changed = [
        t.replace('"model_sha256": "', '"model_sha256": "0') if '"kind": "sweep_task"' in t else t for t in text[:3]
    ]
    (tmp_path / "run" / rundir.RECORDS).write_text("".join(changed))
    with pytest.raises(UserError, match="the model of task tiny is not the one that this sweep began with"):
        run(made, tmp_path / "run", True)
    with pytest.raises(UserError, match="run with other settings"):
        run(replace(made, threads=2), tmp_path / "run", True)


def test_every_cell_carries_the_predictions_that_its_sweep_began_with(tiny, tmp_path):
    table = {**SMALL, "seeds": 1, "axes": ["peft"], "grid": {**SMALL["grid"], "extensions": 0}, "task": [tiny]}
    made = study(table)
    seen = sweep_cell.describe(made.sources[0], 0)
    about = {
        "model_sha256": seen.model_sha256,
        "data": seen.data,
        "adapter": {k: seen.peft[k] for k in ("type", "rank", "scale")},
    }
    entry = {
        "task": "tiny",
        "rule": "recommended",
        "scored": True,
        "base": None,
        "peft": {"value": 0.123, "interval": None},
        "ratio": None,
    }
    known = R.Predictions("p.json", "a" * 64, "b" * 40, [{**about, **entry}])
    records = run(made, tmp_path / "run", registered=known)
    assert {(c.predictions, c.predictions_commit) for c in cells(records)} == {("a" * 64, "b" * 40)}
    assert 0.123 in {c.place for c in cells(records)}  # the predicted rate is run as well
    part = tmp_path / "part" / rundir.RECORDS
    part.parent.mkdir()
    part.write_text("".join((tmp_path / "run" / rundir.RECORDS).read_text().splitlines(keepends=True)[:5]))
    with pytest.raises(UserError, match="this sweep began with the predictions aaaaaaaaaaaa"):
        run(made, part.parent, True, registered=replace(known, sha256="c" * 64))
    assert stable_lines(run(made, part.parent, True)) == stable_lines(records)
    with pytest.raises(UserError, match="are about another model"):
        run(made, tmp_path / "other", registered=replace(known, entries=[{**about, **entry, "model_sha256": "d" * 64}]))


def test_dask_says_what_to_install(made, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(UserError, match=r"pip install 'hybridtheory\[dask\]'"):
        run(made, tmp_path / "run", pool=sweep.Pool(2, "dask"))


@pytest.mark.slow
def test_dask_runs_the_same_cells(made, whole, tmp_path):
    pytest.importorskip("distributed")
    done = cells(run(made, tmp_path / "run", pool=sweep.Pool(1, "dask")))
    assert by_place(done) == by_place(cells(whole[0]))


@pytest.fixture
def command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["/usr/bin/hybrid-sweep", *map(str, arguments)])
        return CliRunner().invoke(cli_sweep.app, [str(a) for a in arguments])

    return call


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nothere.toml"], "nothere.toml cannot be read"),
        (["--set", "seeds"], "--set is KEY=VALUE"),
        (["--n-jobs", "0"], "--n-jobs is a whole number"),
        (["--backend", "ray"], "--backend is loky or dask"),
        (["--scheduler", "tcp://x"], "add --backend dask"),
        (["--max-minutes", "0"], "--max-minutes is a positive number"),
        (["--resume", "--out", "none"], "holds no sweep"),
        (["--check"], "give --out"),
        (["--predict", "a"], "--predict writes the file that --predictions names"),
        (["--predict", "a", "--predictions", "p.json"], "TASK=FOLDER"),
        (["--predictions", "p.json"], "p.json cannot be read"),
    ],
)
def test_a_command_that_is_wrong_is_one_sentence(command, arguments, sentence):
    found = command(*arguments)
    lines = [x for x in found.output.splitlines() if x.startswith("error: ")]
    assert found.exit_code == 2 and len(lines) == 1 and sentence in lines[0], found.output


def test_the_command_sweeps_ends_a_slice_goes_on_and_reports(command, tiny, tmp_path):
    table = "\n".join(f"{k} = {json.dumps(v)}" for k, v in tiny.items())
    toml = tmp_path / "study.toml"
    start = 'steps = 2\nseeds = 1\naxes = ["peft"]\ntrain = { batch = 4, eval_rows = 8 }\n'
    toml.write_text(f"{start}[grid]\nextensions = 0\npeft = 1.0\n[[task]]\n{table}\n")
    plan = command(toml, "--dry-run")
    assert plan.exit_code == 0 and "5 runs to begin with" in plan.output
    cut = command(toml, "--out", "run", "--max-minutes", "1e-9")
    assert cut.exit_code == 3 and "to go on: hybrid-sweep" in cut.output and "--resume" in cut.output
    done = command(toml, "--out", "run", "--resume")
    assert done.exit_code == 0, done.output
    assert "left, extensions aside" in done.output and "report: run/report.md" in done.output
    assert {"records.jsonl", "report.md", "report.json", "figures"} <= {p.name for p in Path("run").iterdir()}
    again = command(toml, "--out", "run", "--resume")
    assert again.exit_code == 0 and "finished already" in again.output
    other = command(toml, "--out", "run", "--resume", "--set", "seeds=2")
    assert other.exit_code == 0  # a finished sweep is only reported again
