"""studies/records.py: a committed record is never lost, a failed command never passes, and a record is not compared with itself."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from types import ModuleType

import pytest

from paper_figs.records import Made
from probes import records as R
from probes import rundir
from probes.jsonl import encode

NAME = "made-up"
# A command of a record: writes its header and one line, then what the file `does` says: finish, fail, or die of signal 9 or Ctrl-C.
COMMAND = """
import os, signal, sys
from pathlib import Path
folder, does = Path(sys.argv[sys.argv.index("--out") + 1]), Path("does").read_text()
folder.mkdir(parents=True, exist_ok=True)
with open(folder / "records.jsonl", "a") as file:
    print("resumed" if "--resume" in sys.argv else "anew", file=open("how", "w"))
    if "--resume" not in sys.argv:
        file.write(Path("header").read_text())
    if does == "finish":
        file.write(Path("lines").read_text())
if does == "die":
    os.kill(os.getpid(), signal.SIGKILL)
sys.exit({"finish": 0, "fail": 4}[does])
"""


@pytest.fixture
def making(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """studies/records.py with one record, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    path = Path(__file__).parent.parent / "studies" / "records.py"
    spec = importlib.util.spec_from_file_location("making", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setitem(module.COMMANDS, NAME, Made("python command.py"))
    Path("command.py").write_text(COMMAND)
    header = R.Header("smoothness", 0, R.ModelInfo("m", "", 0), R.DataInfo("d", ""), [])
    Path("header").write_text(encode(header) + "\n")
    says(1.0)
    return module


def says(value: float) -> None:
    """What the command measures from now on."""
    lines = [R.Warning(f"measured {value}", "made up"), R.End("finished")]
    Path("lines").write_text("".join(encode(x) + "\n" for x in lines))


def call(making: ModuleType, monkeypatch: pytest.MonkeyPatch, does: str, *arguments: str) -> int:
    Path("does").write_text(does)
    monkeypatch.setattr("sys.argv", ["records.py", *(arguments or (NAME,))])
    return int(making.main())


def here(making: ModuleType) -> bytes:
    return Path(making.REPORTS / NAME / rundir.RECORDS).read_bytes()


@pytest.mark.parametrize(("does", "code"), [("die", 137), ("fail", 4)])
def test_a_command_that_does_not_end_well_leaves_the_committed_record(making, monkeypatch, capsys, does, code) -> None:
    assert call(making, monkeypatch, "finish") == 0
    before = here(making)
    assert call(making, monkeypatch, does) == code
    assert here(making) == before and not (making.BEFORE / NAME).exists()
    said = capsys.readouterr().out
    assert f"is back in {making.REPORTS / NAME}" in said and f"goes on with {making.UNFINISHED / NAME}" in said
    # The next call goes on with what there was, and compares it with the record from before.
    says(2.0)
    assert call(making, monkeypatch, "finish") == 1 and Path("how").read_text() == "resumed\n"
    assert "2 lines say something else" in capsys.readouterr().out
    assert not (making.UNFINISHED / NAME).exists() and not (making.BEFORE / NAME).exists()
    assert call(making, monkeypatch, "finish") == 0 and Path("how").read_text() == "anew\n"


def test_a_record_that_was_never_there_waits_in_its_place(making, monkeypatch) -> None:
    assert call(making, monkeypatch, "die") == 137
    assert call(making, monkeypatch, "finish") == 0 and Path("how").read_text() == "resumed\n"


def test_ctrl_c_puts_the_record_back_and_stops(making, monkeypatch, capsys) -> None:
    assert call(making, monkeypatch, "finish") == 0
    before = here(making)

    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(making.subprocess, "run", stopped)
    assert call(making, monkeypatch, "finish", NAME, NAME) == 130
    assert here(making) == before and capsys.readouterr().out.count("not made anew") == 1


def test_a_record_that_was_put_back_by_hand_is_made_again(making, monkeypatch, capsys) -> None:
    """The state that a kill -9 of records.py itself leaves, after `git checkout` of the record."""
    assert call(making, monkeypatch, "finish") == 0
    before = making.BEFORE / NAME
    before.mkdir(parents=True)
    (before / rundir.RECORDS).write_bytes(here(making))
    says(2.0)
    assert call(making, monkeypatch, "finish") == 1 and Path("how").read_text() == "anew\n"
    assert "2 lines say something else" in capsys.readouterr().out
    # Killed between the two: the new record is whole and is compared now.
    before.mkdir()
    (before / rundir.RECORDS).write_bytes(here(making).replace(b"measured 2", b"measured 3"))
    assert call(making, monkeypatch, "die") == 1
    assert "the last call was killed" in capsys.readouterr().out and not before.exists()


def test_a_field_that_is_new_in_this_version_changes_no_number(making) -> None:
    old = [{"kind": "a", "x": 1.0}, {"kind": "b"}]
    assert making.changed(old, [{"kind": "a", "x": 1.0, "y": 2.0}, {"kind": "b"}]) == 0
    assert making.changed(old, [{"kind": "a", "x": 1.5, "y": 2.0}, {"kind": "b"}]) == 2
    assert making.changed(old, [*old, {"kind": "c", "z": 1}]) == 1


def test_the_list_says_what_cannot_be_read(making, monkeypatch, capsys) -> None:
    folder = making.REPORTS / NAME
    for text, said in ((None, "missing"), ("", "unfinished"), ('{"kind": "hea', "unfinished"), ("{}\n", "unreadable")):
        if text is not None:
            os.makedirs(folder, exist_ok=True)
            (folder / rundir.RECORDS).write_text(text)
        assert call(making, monkeypatch, "finish", "--list") == 0
        [line] = [x for x in capsys.readouterr().out.splitlines() if x.startswith(NAME)]
        assert said in line
