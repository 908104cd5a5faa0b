"""Captured energy under lazy refresh, on the embedded model and task: python studies/captured.py --out FOLDER [--resume]."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from hybridtheory.errors import UserError
from probes import captured, rundir
from probes.provenance import provenance
from probes.tasks import load_task


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition(":")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--resume", action="store_true")
    wanted = parser.parse_args()
    try:
        with rundir.RunFolder(wanted.out, wanted.resume) as folder:
            if rundir.finished(folder.done):
                print(f"{wanted.out} is finished already")
                return 0
            for record in captured.run(load_task(rows=8), captured.Settings(), folder.done, provenance()):
                folder.append(record)
                if isinstance(record, captured.Captured):
                    last = f"loss {record.loss[0]:.4g} -> {record.loss[-1]:.4g}"
                    print(f"refresh {record.refresh}, seed {record.seed}: {record.status}, {last}", flush=True)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
