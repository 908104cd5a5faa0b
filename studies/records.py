"""Make the committed records that figures, notebooks and docs/questions.md are read from, each by its own command.

    python studies/records.py                # recompute the small ones (make records) and say where numbers changed
    python studies/records.py --missing      # only small ones that are not there, or not finished
    python studies/records.py NAME ...       # these, small or not; --list names all

A record that was cut short is gone on with at the next call; where there was one before, that one stays in its place until then. Exit
code 1 where a recomputed record has other numbers than the one before, the command's own where it failed, 128 + n where signal n ended it.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from hybridtheory.errors import UserError
from paper_figs.records import COMMANDS, REPORTS, command
from probes import rundir
from probes.jsonl import decode, stable
from probes.records import Header

# While a record is recomputed: what it said until then, and, when that was cut short, what there is of the new one.
BEFORE, UNFINISHED = Path("runs/records-before"), Path("runs/records-unfinished")
STOPPED = 128 + signal.SIGINT  # the exit code of a shell for a command that Ctrl-C ended


def state(folder: Path) -> str:
    """ "there", "unfinished", "missing", or why it cannot be read."""
    try:
        return "there" if rundir.whole(folder) else "unfinished" if (folder / rundir.RECORDS).exists() else "missing"
    except UserError as error:
        return f"unreadable: {error}"


def said(folder: Path) -> list[dict[str, Any]]:
    """What the lines of a record say, without time and place; each with the fields that stand in the file."""
    found = []
    for line in (folder / rundir.RECORDS).read_text(encoding="utf-8").split("\n")[:-1]:
        record, written = decode(line), json.loads(line)
        if not isinstance(record, Header):
            found.append(
                {"kind": written["kind"], **{k: v for k, v in stable(record).items() if k in written}},
            )
    return found


def changed(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> int:
    """Lines that only one of the two says. A field that no old line of its kind has is new in this version and changes nothing."""
    known: dict[str, set[str]] = {}
    for line in old:
        known.setdefault(line["kind"], set()).update(line)
    new = [{k: v for k, v in line.items() if k in known.get(line["kind"], line)} for line in new]
    before, now = ({json.dumps(line, sort_keys=True) for line in lines} for lines in (old, new))
    return len(before ^ now)


def make(name: str) -> int:
    """Run the command of a record, or go on with it: its exit code, 128 + n where signal n ended it, as in a shell."""
    folder = REPORTS / name
    resume = ["--resume"] if (folder / rundir.RECORDS).exists() else []
    words = [*shlex.split(command(name)), *resume]
    print("$", shlex.join(words), flush=True)
    program = sys.executable if words[0] == "python" else str(Path(sys.executable).with_name(words[0]))
    try:
        code = subprocess.run([program, *words[1:]], check=False).returncode
    except KeyboardInterrupt:
        return STOPPED
    return code if code >= 0 else 128 - code


def recompute(name: str) -> int:
    """Make a record anew. The one before waits in `BEFORE`, is compared with the new one when that is whole, and is put back when it is
    not; what there is of the new one then waits in `UNFINISHED` for the next call.
    """
    folder, before, unfinished = REPORTS / name, BEFORE / name, UNFINISHED / name
    if before.exists() and _same(before, folder):
        shutil.rmtree(before)  # someone put the record back by hand: to compare it with itself would say nothing
    if before.exists():
        print(f"{name}: the last call was killed; the record from before is in {before}", flush=True)
    elif rundir.whole(folder):
        _move(folder, before)
    if unfinished.exists() and not folder.exists():
        _move(unfinished, folder)
    code = 0 if rundir.whole(folder) else make(name)
    if code or not rundir.whole(folder):
        if before.exists():
            if folder.exists():
                _move(folder, unfinished)
            _move(before, folder)
            print(f"{name}: not made anew. The record from before is back in {folder}", flush=True)
            if unfinished.exists():
                print(f"{name}: the next call goes on with {unfinished}; remove it to begin anew", flush=True)
        return code or 1
    if not before.exists():
        return 0
    lines = changed(said(before), said(folder))
    shutil.rmtree(before)
    print(f"{name}: {f'{lines} lines say something else than before' if lines else 'the same numbers'}", flush=True)
    return int(bool(lines))


def _same(one: Path, other: Path) -> bool:
    """Whether two folders hold the same record to the byte; a record that was made again has another time in it."""
    paths = [folder / rundir.RECORDS for folder in (one, other)]
    return all(p.exists() for p in paths) and paths[0].read_bytes() == paths[1].read_bytes()


def _move(old: Path, new: Path) -> None:
    new.parent.mkdir(parents=True, exist_ok=True)
    if new.exists():
        shutil.rmtree(new)
    shutil.move(old, new)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="records to make (default: the small ones)")
    parser.add_argument("--missing", action="store_true", help="leave alone what is there and whole")
    parser.add_argument("--list", action="store_true", help="names, commands, and whether they are there")
    wanted = parser.parse_args()
    if wanted.list:
        for name in COMMANDS:
            print(f"{name:<26}{state(REPORTS / name):<12}{command(name)}")
        return 0
    unknown = [n for n in wanted.names if n not in COMMANDS]
    if unknown:
        print(f"error: there is no record {unknown[0]!r}: --list names them", file=sys.stderr)
        return 2
    worst = 0
    try:
        for name in wanted.names or [n for n, made in COMMANDS.items() if made.small]:
            if wanted.missing and rundir.whole(REPORTS / name):
                continue
            code = recompute(name)
            worst = max(worst, code)
            if code == STOPPED:
                print("stopped", file=sys.stderr)
                break
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return worst


if __name__ == "__main__":
    sys.exit(main())
