"""Committed studies: their predictions stand in git before the records of the sweep that tests them, and come from probes alone."""

from __future__ import annotations

import hashlib
import json
import subprocess
from pathlib import Path

import pytest

from probes import predictions, rundir, sweep_description

ROOT = Path(__file__).parent.parent
REPORTS = ROOT / "docs" / "reports"
STUDIES = sorted(p for p in REPORTS.glob("study-*") if p.is_dir())
SWEPT = [p for p in STUDIES if (p / rundir.RECORDS).exists()]


def in_git() -> bool:
    done = subprocess.run(["git", "ls-files", "--error-unmatch", "pyproject.toml"], cwd=ROOT, capture_output=True)
    return done.returncode == 0


@pytest.mark.skipif(not in_git(), reason="this is no clone: only git can say which came first")
@pytest.mark.parametrize("study", SWEPT, ids=lambda p: p.name)
def test_the_predictions_of_a_swept_study_were_committed_before_its_records(study: Path) -> None:
    """Every cell carries the hash and the commit; the commit is an ancestor of the sweep's commit and of its records'."""
    assert "an ancestor of all" in predictions.check(study)


@pytest.mark.parametrize("study", STUDIES, ids=lambda p: p.name)
def test_predictions_come_from_the_committed_probes(study: Path) -> None:
    """The probes' records are those that the predictions were written from, and they say the same today."""
    path = study / "predictions.json"
    if not path.exists():
        assert study not in SWEPT, f"{study.name} was swept without predictions"
        return
    table = json.loads(path.read_text(encoding="utf-8"))
    found = []
    for source in table["sources"]:
        folder = ROOT / source["records"]
        raw = (folder / rundir.RECORDS).read_bytes()
        assert hashlib.sha256(raw).hexdigest() == source["sha256"], f"{folder} is not what {path} was written from"
        assert not any(type(r).__name__ == "Cell" for r in rundir.load(folder)), f"{folder} holds runs of a sweep"
        found.append(source["task"])
    assert set(found) == {e["task"] for e in table["predictions"]}


@pytest.mark.parametrize("description", sorted(ROOT.glob("studies/**/*.toml")), ids=lambda p: p.stem)
def test_a_study_is_described_in_words_that_the_sweep_knows(description: Path) -> None:
    study = sweep_description.read(description)
    assert study.lines and all(line.seeds for line in study.lines)
