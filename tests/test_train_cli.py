"""hybrid-train as a user meets it: one sentence for bad input, Ctrl-C keeps everything, the curves are the records."""

from __future__ import annotations

import json
import os
import signal
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from typer.testing import CliRunner

from probes import checkpoints, cli_train, figures, point, rundir, train_text
from probes import records as R
from probes.command import choose_folder

SMALL = ["--rows", "6", "--batch", "3", "--eval-every", "2", "--checkpoint-every", "2"]
RATES = ["--lr-base", "1e-5", "--lr-peft", "1e-2"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(cli_train, "prepare", lambda: None)  # it changes settings of the process
    return tmp_path


@pytest.fixture
def command(gpt2, films, monkeypatch):
    def call(*arguments):
        full = [str(gpt2), "--data", str(films), *SMALL, *arguments]
        monkeypatch.setattr(sys, "argv", ["/usr/bin/hybrid-train", *full])
        return CliRunner().invoke(cli_train.app, full)

    return call


def the_sentence(result) -> str:
    assert result.exit_code == 2, result.output
    lines = [line for line in result.output.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, result.output
    assert "Traceback" not in result.output
    return lines[0].removeprefix("error: ")


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ([], "hybrid needs a learning rate for the base weights: pass --lr-base, or --lr auto"),
        (["--method", "nonesuch", *RATES], "there is no method 'nonesuch'"),
        (["--lr", "nothere.toml"], "nothere.toml cannot be read"),
        (["--lr", "auto", "--method", "hybrid-adamw"], "the peft weights move otherwise under hybrid-adamw"),
        ([*RATES, "--resume"], "there is no run of"),
        ([*RATES, "--resume", "--out", "none"], "none holds no run"),
        ([*RATES, "--batch", "0"], "--batch is a whole number of at least 1"),
        ([*RATES, "--master", "yes"], "--master is none or fp32"),
        ([*RATES, "--option", "penalty"], "--option is name=value"),
        ([*RATES, "--mu", "nan"], "--mu is a positive number"),
    ],
)
def test_bad_input_is_one_sentence_before_anything_is_loaded(arguments, part, command, elsewhere, monkeypatch):
    monkeypatch.setattr("probes.tasks.load_task", lambda *a, **k: pytest.fail("something was loaded"))
    assert part in the_sentence(command(*arguments))
    assert not list(elsewhere.iterdir())


def test_methods_are_listed(command):
    result = command("--method", "?")
    assert result.exit_code == 0
    assert "subzero" in result.output and "zeroth-order" in result.output


def test_resume_without_out_finds_the_latest_run_or_the_probe_before_it(elsewhere):
    def found(resume: bool) -> str:
        return choose_folder("train", None, None, None, resume, begins_in="-probe").name

    Path("runs/train-embedded-sentiment").mkdir(parents=True)
    assert (found(False), found(True)) == ("train-embedded-sentiment-2", "train-embedded-sentiment")
    Path("runs/train-embedded-sentiment-2-probe").mkdir()
    assert (found(False), found(True)) == ("train-embedded-sentiment-2", "train-embedded-sentiment-2")
    assert choose_folder("train", None, None, Path("mine"), True, begins_in="-probe") == Path("mine")


def test_a_block_that_is_not_there_leaves_nothing_behind(command, elsewhere):
    sentence = the_sentence(command(*RATES, "--peft", "none"))
    assert "needs a PEFT block and the model has none" in sentence
    assert not list(elsewhere.glob("runs/*"))


def test_control_c_keeps_everything_and_resuming_finishes(command, elsewhere, monkeypatch):
    # A runner started in the background ignores the key; the command's own handling is what is tested here.
    found = signal.getsignal(signal.SIGINT)
    whole = command(*RATES, "--steps", "5", "--out", "whole")
    assert whole.exit_code == 0, whole.output
    assert "finished after 5 steps" in whole.output

    @contextmanager
    def pressed(console):
        yield lambda what, share: os.kill(os.getpid(), signal.SIGINT) if what.startswith("step 3") else None

    with monkeypatch.context() as patch:
        patch.setattr(train_text, "bar", pressed)
        stopped = command(*RATES, "--steps", "5", "--out", "cut")
    assert stopped.exit_code == 130, stopped.output
    assert "the checkpoint of step 4 are kept in cut" in stopped.output  # the step after the key was pressed
    assert stopped.output.rstrip().endswith("--steps 5 --out cut --resume")
    assert signal.getsignal(signal.SIGINT) is found
    assert the_sentence(command(*RATES, "--steps", "5", "--out", "cut")).startswith("cut already holds a run")
    assert "other settings" in the_sentence(command(*RATES, "--steps", "6", "--out", "cut", "--resume"))
    resumed = command(*RATES, "--steps", "5", "--out", "cut", "--resume")
    assert resumed.exit_code == 0, resumed.output
    one, two = ([r for r in rundir.load(Path(f)) if not isinstance(r, R.Header)] for f in ("whole", "cut"))
    strip = [[json.dumps(rundir.stable(r)) for r in records] for records in (one, two)]
    assert strip[0] == strip[1]
    again = command(*RATES, "--steps", "5", "--out", "cut", "--resume")
    assert again.exit_code == 0 and "finished already" in again.output
    assert {p.name for p in Path("cut/export").iterdir()} == {"adapter", "merged"}
    assert checkpoints.latest(Path("cut/checkpoints")).name == "step-000000005"


def test_a_diverging_run_is_a_sentence_with_its_checkpoint(command):
    result = command("--lr-base", "1e-5", "--lr-peft", "1e12", "--steps", "40", "--out", "high")
    sentence = the_sentence(result)
    assert sentence.startswith("the run stopped at step ")
    assert "the last good checkpoint, of step 0, is kept in high/checkpoints" in sentence
    assert isinstance(rundir.load(Path("high"))[-1], R.End)
    assert rundir.load(Path("high"))[-1].reason == "failed"


def test_auto_measures_first_and_says_where_a_given_rate_is_too_high(command, monkeypatch):
    small = {"points": 1, "secants": 2, "run_steps": 1, "directions": 4, "max_steps": 6, "max_vectors": 3}
    full = point.Settings
    monkeypatch.setattr(point, "Settings", lambda **k: full(**{**k, **small}))
    monkeypatch.setattr(cli_train, "PROBE_ROWS", 4)
    monkeypatch.setattr(figures, "save", lambda report, folder: [])  # test_report.py draws
    result = command("--lr", "auto", "--steps", "2", "--out", "run")
    assert result.exit_code == 0, result.output
    assert Path("run-probe/trainer.toml").exists()
    from probes.chosen_rates import read

    toml = read(Path("run-probe"))
    step = next(r for r in rundir.load(Path("run")) if isinstance(r, R.Step))
    assert step.lr == {"base": toml["rates"]["eta_base"], "peft": toml["rates"]["eta_peft"]}
    high = 1.5 * toml["limits"]["eta_base"]
    result = command("--lr", "run-probe", "--lr-base", str(high), "--steps", "1", "--out", "high")
    assert f"--lr-base {high:.3g} is above the stability limit {toml['limits']['eta_base']:.3g}" in result.output


def test_tensorboard_shows_the_records(command, monkeypatch):
    event = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    result = command(*RATES, "--steps", "3", "--out", "run", "--tensorboard")
    assert result.exit_code == 0, result.output
    curves = event.EventAccumulator("run/tensorboard").Reload()
    steps = [r for r in rundir.load(Path("run")) if isinstance(r, R.Step)]
    assert [(e.step, e.value) for e in curves.Scalars("train/loss")] == [
        (s.step, pytest.approx(s.loss, rel=1e-6)) for s in steps
    ]
    assert {"lr/base", "lr/peft", "test/accuracy", "test/loss", "test/floor"} <= set(curves.Tags()["scalars"])
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert "--tensorboard needs the package tensorboard" in the_sentence(
        command(*RATES, "--steps", "3", "--out", "other", "--tensorboard")
    )
