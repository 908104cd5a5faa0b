"""docs/theorems.md: its last column says what the committed records say, and a bound that fails would stand there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from hybridtheory.errors import UserError
from paper_figs import theorems

ROOT = Path(__file__).parent.parent


def test_the_committed_column_is_that_of_the_committed_records(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    page = theorems.PAGE.read_text(encoding="utf-8")
    assert theorems.filled(page, theorems.column()) == page, "run make figures and commit docs/theorems.md"


def test_a_bound_that_fails_and_one_that_is_decided_are_told(tmp_path: Path) -> None:
    source = ROOT / "docs" / "reports" / "convergence-embedded"
    folder = tmp_path / "convergence-embedded"
    folder.mkdir()
    shutil.copy(source / "records.jsonl", folder)
    assert "not decided: `eta_x <= 1/(4 L_x (d+2))`" in theorems.column(tmp_path)["A"]
    lines = [json.loads(line) for line in (folder / "records.jsonl").read_text(encoding="utf-8").splitlines()]
    for record in lines:
        if record.get("name") == "A":
            record |= {"holds": True, "measured": 2.0, "bound": 6.0}
        if record.get("name") == "A0":
            record |= {"holds": False, "measured": 2.0, "bound": 1.0}
    (folder / "records.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines), encoding="utf-8")
    said = theorems.column(tmp_path)
    assert (
        said["A"] == "embedded: holds, bound/measured 3.00"
        and said["A0"] == "embedded: **fails**, bound/measured 0.500"
    )
    assert said["Coupling"] == "not measured yet"


def test_a_row_that_the_page_lacks_is_named() -> None:
    with pytest.raises(UserError, match="no row called A0"):
        theorems.filled("| theorem | x |\n|---|---|\n| B | |\n", {"A0": "holds"})
    assert (
        theorems.filled("| A0, `f` | |\n| B | old |\n", {"A0": "a|b"})
        == "| A0, `f` | a\\|b |\n| B | on problems only |\n"
    )
