"""Make the committed records that figures, notebooks and docs/questions.md are read from, each by its own command.

    python studies/records.py                # recompute the small ones (make records) and say where numbers changed
    python studies/records.py --missing      # only small ones that are not there, or not finished
    python studies/records.py NAME ...       # these, small or not; --list names all

An interrupted record is gone on with at the next call. Exit code 1 where a recomputed record has other numbers than the one before.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from hybridtheory.errors import UserError
from paper_figs.records import COMMANDS, REPORTS, command
from probes import rundir
from probes.jsonl import stable
from probes.records import Header, Record

BEFORE = Path("runs/records-before")  # what a record said until it was recomputed, while that goes on


def finished(folder: Path) -> bool:
    return (folder / rundir.RECORDS).exists() and rundir.finished(rundir.load(folder))


def said(records: list[Record]) -> list[str]:
    """What the records say, without time and place."""
    return [json.dumps(stable(r), sort_keys=True) for r in records if not isinstance(r, Header)]


def make(name: str) -> int:
    folder = REPORTS / name
    resume = ["--resume"] if (folder / rundir.RECORDS).exists() else []
    words = [*shlex.split(command(name)), *resume]
    print("$", shlex.join(words), flush=True)
    program = sys.executable if words[0] == "python" else str(Path(sys.executable).with_name(words[0]))
    return subprocess.run([program, *words[1:]], check=False).returncode


def recompute(name: str) -> int:
    """Make a record anew; the one before stays in runs/ until the new one is whole, and is compared with it."""
    folder, before = REPORTS / name, BEFORE / name
    if finished(folder) and not before.exists():
        before.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(folder, before)
    code = make(name)
    if code or not finished(folder):
        return code or 1
    if not before.exists():
        return 0
    old, new = said(rundir.load(before)), said(rundir.load(folder))
    shutil.rmtree(before)
    changed = len(set(new) ^ set(old))
    print(
        f"{name}: {'the same numbers' if not changed else f'{changed} lines say something else than before'}",
        flush=True,
    )
    return int(bool(changed))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="records to make (default: the small ones)")
    parser.add_argument("--missing", action="store_true", help="leave alone what is there and whole")
    parser.add_argument("--list", action="store_true", help="names, commands, and whether they are there")
    wanted = parser.parse_args()
    if wanted.list:
        for name in COMMANDS:
            print(f"{name:<26}{'there  ' if finished(REPORTS / name) else 'missing'}  {command(name)}")
        return 0
    unknown = [n for n in wanted.names if n not in COMMANDS]
    if unknown:
        print(f"error: there is no record {unknown[0]!r}: --list names them", file=sys.stderr)
        return 2
    worst = 0
    try:
        for name in wanted.names or [n for n, made in COMMANDS.items() if made.small]:
            if wanted.missing and finished(REPORTS / name):
                continue
            worst = max(worst, recompute(name))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return worst


if __name__ == "__main__":
    sys.exit(main())
