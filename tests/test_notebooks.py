"""Every notebook runs from top to bottom in a process of its own; figures and answers are made from what is committed and nothing else."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from paper_figs import questions
from paper_figs.__main__ import FIGURES, main, module
from paper_figs.records import COMMANDS, command
from probes import rundir

ROOT = Path(__file__).parent.parent
REPORTS = ROOT / "docs" / "reports"
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.py"))


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_runs_and_answers(notebook: Path) -> None:
    environment = {**os.environ, "MPLBACKEND": "Agg", "HF_HUB_OFFLINE": "1"}
    found = subprocess.run(
        [sys.executable, str(notebook)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )
    assert found.returncode == 0, found.stderr[-3000:]
    assert found.stdout.strip(), "a notebook states its answer"


def test_a_notebook_opens_with_its_question() -> None:
    assert NOTEBOOKS
    for notebook in NOTEBOOKS:
        title = next(line for line in notebook.read_text().splitlines() if line.startswith("# # "))
        assert title.endswith("?"), notebook


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_is_drawn_with_its_caption(name: str, tmp_path: Path) -> None:
    assert main([name, "--records", str(REPORTS), "--out", str(tmp_path)]) == 0
    assert {p.name for p in tmp_path.iterdir()} == {f"{name}.{suffix}" for suffix in ("pdf", "png", "md")}
    assert b"Type3" not in (tmp_path / f"{name}.pdf").read_bytes()
    assert "Records: `reports/" in (tmp_path / f"{name}.md").read_text()


def test_a_missing_record_fails_loudly(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([FIGURES[0], "--records", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    [record] = module(FIGURES[0]).RECORDS
    assert "needs the record" in said and COMMANDS[record].command in said and not (tmp_path / "out").exists()
    assert main(["nonesuch"]) == 2


def test_a_record_that_is_not_finished_fails_loudly(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    [record] = module(FIGURES[0]).RECORDS
    whole = (REPORTS / record / rundir.RECORDS).read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / record).mkdir()
    (tmp_path / record / rundir.RECORDS).write_text("".join(whole[:-1]), encoding="utf-8")
    assert main([FIGURES[0], "--records", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "is not finished" in capsys.readouterr().err


def test_the_page_of_questions_says_what_the_committed_records_say() -> None:
    assert (ROOT / questions.PAGE).read_text(encoding="utf-8") == questions.page(REPORTS), (
        "records or answers changed: python -m paper_figs.questions"
    )


def test_a_question_without_its_record_is_not_answered(tmp_path: Path) -> None:
    text = questions.page(tmp_path)
    assert text.count("Not measured yet") == len(questions.QUESTIONS)


@pytest.mark.parametrize("name", [n for n in COMMANDS if (REPORTS / n / rundir.RECORDS).exists()])
def test_a_committed_record_was_made_by_its_command(name: str) -> None:
    head = rundir.load(REPORTS / name)[0]
    made = [Path(head.argv[0]).name, *head.argv[1:]]
    told = [w for w in shlex.split(command(name)) if w != "python"]
    assert [w for w in made if w != "--resume"] == [Path(told[0]).name, *told[1:]]
