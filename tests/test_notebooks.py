"""Every notebook runs from top to bottom in a process of its own, and every figure of the papers is drawn from what is committed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from paper_figs.__main__ import FIGURES, main

ROOT = Path(__file__).parent.parent
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
    assert main([name, "--records", str(ROOT / "docs" / "reports"), "--out", str(tmp_path)]) == 0
    assert {p.name for p in tmp_path.iterdir()} == {f"{name}.{suffix}" for suffix in ("pdf", "png", "md")}
    assert b"Type3" not in (tmp_path / f"{name}.pdf").read_bytes()
    assert "Records: `reports/" in (tmp_path / f"{name}.md").read_text()


def test_a_missing_record_fails_loudly(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([FIGURES[0], "--records", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "needs the record" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert main(["nonesuch"]) == 2
