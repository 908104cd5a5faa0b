"""probe-smoothness as a user meets it: one sentence and an exit code for bad input, nothing half written, nothing measured lost."""

import json
import sys
from pathlib import Path

import pytest
from made_up_run import made_up_run
from typer.testing import CliRunner

from hybridtheory.errors import UserError
from probes import cli, command, figures, jsonl, rundir, smoothness
from probes import records as R
from probes.report import Report

SMALL = [
    "--rows",
    "4",
    "--max-length",
    "16",
    "--points",
    "1",
    "--secants",
    "2",
    "--run-steps",
    "1",
    "--directions",
    "4",
    "--q",
    "1",
]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Every command runs in an empty folder, as `probe-smoothness`, on a terminal wide enough for one line a sentence."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(cli, "prepare", lambda: None)  # it changes settings of the process
    return tmp_path


def run(*arguments, monkeypatch=None):
    if monkeypatch is not None:
        monkeypatch.setattr(sys, "argv", ["probe-smoothness", *arguments])
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


def the_sentence(result) -> str:
    """The one line that follows what was shown before; the folder is as empty as before."""
    assert result.exit_code == 2, result.output
    lines = [line for line in result.output.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, result.output
    assert result.output.rstrip().endswith(lines[0]), "something followed the sentence"
    assert "Traceback" not in result.output
    return lines[0].removeprefix("error: ")


def write(path: str, text: str) -> str:
    Path(path).write_text(text)
    return path


BAD = {
    "missing model": (["./nowhere"], "there is no model at ./nowhere"),
    "missing data": (["--data", "nothere.jsonl"], "there is no file or folder nothere.jsonl"),
    "empty data": (["--data", ("empty.jsonl", "")], "is empty"),
    "empty text": (["--data", ("empty.txt", "")], "is empty"),
    "label outside the set": (
        ["--data", ("a.csv", "text,label\nx,good\ny,ugly\n"), "--labels", "good,bad"],
        "outside the set",
    ),
    "broken JSON": (["--data", ("a.jsonl", '{"text": "a"}\n{"text":\n')], "line 2 of a.jsonl is not JSON"),
    "unknown PEFT type": (["--peft", "nonesuch"], "--peft is one of"),
    "no rows": (["--rows", "0"], "--rows is 0"),
    "no points": (["--points", "0"], "--points must be at least 1, got 0"),
    "no micro-batch": (["--micro-batch", "0"], "--micro-batch is a number of rows, at least 1, not 0"),
    "trace": (["--trace-tol", "0"], "--trace-tol must be a positive number, got 0"),
    "mu": (["--mu", "nan"], "--mu is a positive number, not nan"),
    "alpha": (["--alpha", "-1"], "--alpha is a positive number, not -1"),
    "seed": (["--seed", str(2**70)], "--seed is a whole number from 0 to 2^63 - 1"),
    "dtype": (["--dtype", "int8"], "--dtype is one of"),
    "device": (["--device", "potato"], "the device potato cannot be used here"),
    "curvature": (["--curvature", "fisher"], "--curvature is hessian or ggn, not 'fisher'"),
    "loss": (["--loss", "nonesuch"], "--loss is vocabulary or labels"),
    "no names": (["--targets", " , "], "an empty list of names"),
    "folder is a file": (["--out", ("a.txt", "x")], "a.txt is a file: give a folder as --out"),
    "folder cannot be made": (["--out", "/proc/run"], "/proc/run cannot be created in /proc"),
    "nothing to resume": (["--resume"], "there is no run of embedded on sentiment under runs/"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence_and_leaves_nothing(case, tmp_path):
    arguments, expected = BAD[case]
    given = [a if isinstance(a, str) else write(*a) for a in arguments]
    before = sorted(tmp_path.rglob("*"))
    assert expected in the_sentence(run(*given))
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--targets", "nonesuch"], "no module 'nonesuch' to adapt"),
        (["--blocks", "(("], "'((' is not one"),
        (["--rank", "0"], "the rank of an adapter is at least 1, not 0"),
        (["--max-length", "1"], "the context is too short"),
        (["--peft", "prompt", "--virtual-tokens", "4000"], "the context is too short"),
    ],
)
def test_bad_input_that_only_the_model_shows(arguments, expected, tmp_path):
    assert expected in the_sentence(run("--rows", "4", *arguments))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_holds_a_run_is_not_touched(tmp_path):
    with rundir.RunFolder(tmp_path / "run") as folder:
        for record in made_up_run(complete=False):
            folder.append(record)
    before = (tmp_path / "run" / "records.jsonl").read_bytes()
    assert "already holds a run: add --resume" in the_sentence(run("--out", "run"))
    assert (tmp_path / "run" / "records.jsonl").read_bytes() == before


# ---- what becomes of a run that is stopped: the probe is replaced by one that yields made-up records and then fails ----------


def probe_that_ends_with(error, after=60):
    def probe(task, settings, done=(), progress=None, provenance=None, **more):
        progress("point 1 of 3", 0.0)
        records = made_up_run()
        if error is None:
            yield from records
            return
        yield from records[:after]
        raise error

    return probe


@pytest.fixture
def quick(monkeypatch):
    """No model is loaded: what is tested is what the command does with the records."""
    from probes import tasks

    monkeypatch.setattr(tasks, "load_task", lambda *args, **more: None)
    monkeypatch.setattr(figures, "save", lambda report, folder: [])  # test_report.py draws

    def use(error, after=60):
        monkeypatch.setattr(smoothness, "run", probe_that_ends_with(error, after))

    return use


def test_a_whole_run_writes_everything_and_shows_the_recommendation(quick, tmp_path):
    quick(None)
    result = run("--out", "run")
    assert result.exit_code == 0, result.output
    assert "made-up/[model]_1.2M" in result.output  # shown as text, not read as markup
    assert "2.40e-5" in result.output
    assert "2 of 16 rows were longer" in result.output
    document = json.loads((tmp_path / "run" / "report.json").read_text())
    assert document["recommendation"]["base"]["value"] == 2.4e-5
    assert rundir.finished(rundir.load(tmp_path / "run"))
    assert not list((tmp_path / "run").rglob(".partial*"))


def test_control_c_keeps_what_was_measured_and_says_how_to_go_on(quick, tmp_path, monkeypatch):
    quick(KeyboardInterrupt())
    result = run("--seed", "0", monkeypatch=monkeypatch)
    assert result.exit_code == 130
    folder = "runs/smoothness-embedded-sentiment"
    assert f"probe-smoothness --seed 0 --out {folder} --resume" in result.output
    kept = rundir.load(tmp_path / folder)
    assert f"{sum(isinstance(r, R.Point) for r in kept)} points" in result.output
    assert sum(isinstance(r, R.Secant) for r in kept) > 10
    assert isinstance(kept[-1], R.End)
    assert kept[-1].reason == "interrupted"
    assert not (tmp_path / folder / "report.md").exists()
    quick(None)
    again = run("--seed", "0", "--out", folder, "--resume")
    assert again.exit_code == 0, again.output
    # But for what a run cost, the file is that of a run that nobody stopped.
    records = [r for r in rundir.load(tmp_path / folder) if not isinstance(r, R.Cost)]
    assert [jsonl.stable(r) for r in records] == [jsonl.stable(r) for r in made_up_run() if not isinstance(r, R.Cost)]


def test_control_c_before_the_first_measurement_writes_nothing(quick, tmp_path):
    quick(KeyboardInterrupt(), after=3)
    result = run()
    assert result.exit_code == 130
    assert "nothing was measured yet, so nothing was written" in result.output
    assert list(tmp_path.iterdir()) == []


def test_an_error_after_measurements_keeps_them(quick, tmp_path):
    quick(UserError("the loss is nan at step 20: check the data"))
    result = run("--out", "run")
    assert result.exit_code == 2
    assert "error: the loss is nan at step 20: check the data" in result.output
    assert "are kept in run" in result.output
    assert rundir.load(tmp_path / "run")[-1] == R.End("failed", "UserError: the loss is nan at step 20: check the data")
    assert not (tmp_path / "run" / "report.md").exists()


def test_a_refused_preflight_leaves_no_folder(quick, tmp_path):
    quick(UserError("two evaluations of the loss differ (1.0, 2.0): put the model in eval mode"), after=3)
    assert "two evaluations of the loss differ" in the_sentence(run("--out", "run"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 64 GB")]
)
def test_out_of_memory_is_a_sentence(quick, error):
    quick(error, after=3)
    assert "out of memory: give a smaller --micro-batch" in the_sentence(run())


def test_a_defect_of_ours_keeps_its_traceback(quick, tmp_path):
    quick(ZeroDivisionError("ours"))
    result = run("--out", "run")
    assert result.exit_code == 1
    assert isinstance(result.exception, ZeroDivisionError)
    assert rundir.load(tmp_path / "run")[-1].reason == "failed"


def test_a_finished_run_is_reported_again_from_its_records(quick, tmp_path):
    quick(None)
    assert run("--out", "run").exit_code == 0
    (tmp_path / "run" / "report.md").unlink()
    quick(AssertionError("must not be measured again"))
    result = run("--out", "run", "--resume")
    assert result.exit_code == 0, result.output
    assert "finished already" in result.output
    assert (tmp_path / "run" / "report.md").exists()


def test_resume_with_other_settings_is_refused(quick, tmp_path, monkeypatch):
    quick(KeyboardInterrupt())
    run("--out", "run")

    def other(task, settings, done=(), progress=None, provenance=None, **more):
        from dataclasses import replace

        yield replace(made_up_run()[0], seed=7)

    monkeypatch.setattr(smoothness, "run", other)
    before = (tmp_path / "run" / "records.jsonl").read_bytes()
    assert "is a run with other settings (seed: 0 then, 7 now)" in run("--out", "run", "--resume").output
    assert (tmp_path / "run" / "records.jsonl").read_bytes().startswith(before[: before.rfind(b'{"kind": "end"')])


# ---- the real probe --------------------------------------------------------------------------------------------------------------


def test_doctor_writes_nothing_and_shows_every_check(tmp_path, gpt2, films):
    result = run(gpt2, "--data", films, *SMALL, "--doctor")
    assert result.exit_code == 0, result.output
    for text in ("preflight: ok", "same loss twice", "v'Hv, base", "estimated", "torch 2."):
        assert text in result.output
    assert list(tmp_path.iterdir()) == []


def test_a_run_of_the_real_probe_from_the_command_to_its_files(tmp_path, gpt2, films):
    result = run(gpt2, "--data", films, *SMALL, "--out", "run")
    assert result.exit_code == 0, result.output
    report = Report.load(tmp_path / "run")
    assert report.finished
    assert report.recommendation.base.value > 0
    assert json.loads((tmp_path / "run" / "report.json").read_text()) == report.json()
    assert (tmp_path / "run" / "figures" / "learning_rates.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("text", "size"), [("8GiB", 8 * 2**30), ("900MiB", 900 * 2**20), ("8 GB", 8 * 10**9), ("123456", 123456)]
)
def test_memory_sizes(text: str, size: int) -> None:
    assert command.size_in_bytes(text) == size


@pytest.mark.parametrize("text", ["", "8 apples", "-1GiB", "0", "GiB", "1e3", "nan"])
def test_memory_sizes_refused(text: str) -> None:
    with pytest.raises(UserError, match="--max-memory is a size like 8GiB"):
        command.size_in_bytes(text)
