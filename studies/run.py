"""Run one part of the learning-rate study: probes, predictions, then the sweep that tests them. Every step is a command of its own.

    python studies/run.py embedded                  # probes, and the predictions; commit them as it says
    python studies/run.py embedded --minutes 20 -j 2   # a slice of the sweep; again, until it is finished

Records go to docs/reports/study-NAME and may be committed at any time: a fresh clone goes on from them.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

from probes import rundir, sweep_description
from probes.sweep_study import Line, Source

HERE, REPORTS = Path(__file__).parent, Path("docs/reports")
# Settings of the measurement that every part shares: what the rates need, and no more.
MEASUREMENT = ("--points", "2", "--secants", "12", "--run-steps", "12")
LARGE = ("--trace-tol", "0.3")  # for models whose base trace costs hours at 10 %


def flags(options: dict[str, Any]) -> list[str]:
    """{"max_length": 64} as --max-length 64."""
    return [
        x for key, value in options.items() if value is not None for x in (f"--{key.replace('_', '-')}", str(value))
    ]


def probe(source: Source, line: Line, folder: Path) -> list[str]:
    """The probe-smoothness command whose planned training is that of ``line``."""
    train = line.train
    planned = {
        "steps": round(line.amount),
        "batch_size": train.get("batch"),
        "mu": train.get("mu"),
        "q": train.get("q"),
    }
    large = LARGE if source.model == "smollm2" else ()
    model = [source.model] if source.model else []
    data = ["--data", source.data] if source.data else []
    options = flags({**source.loading, **planned, "seed": source.seed})
    return ["probe-smoothness", *model, *data, *options, *MEASUREMENT, *large, "--out", str(folder)]


def call(command: list[str]) -> int:
    print("$", " ".join(command), flush=True)
    return subprocess.run([str(Path(sys.executable).with_name(command[0])), *command[1:]], check=False).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("name", choices=sorted(p.stem for p in HERE.glob("*.toml")))
    parser.add_argument("--minutes", type=float, help="end the slice of the sweep then")
    parser.add_argument("-j", "--jobs", type=int, default=2)
    wanted = parser.parse_args()
    study = sweep_description.read(HERE / f"{wanted.name}.toml")
    out = REPORTS / f"study-{wanted.name}"
    sources = {s.name: s for s in study.sources}
    horizons = {(x.task, x.amount): x for x in study.lines}
    folders = {}
    for (task, amount), line in horizons.items():
        folder = out / "probes" / f"{task}-{amount:g}"
        folders[task, amount] = folder
        if not rundir.whole(folder):
            resume = ["--resume"] if (folder / rundir.RECORDS).exists() else []
            if code := call([*probe(sources[task], line, folder), *resume]):
                return code
    predictions = out / "predictions.json"
    if not predictions.exists():
        named = [x for (task, _), folder in folders.items() for x in ("--predict", f"{task}={folder}")]
        if code := call(["hybrid-sweep", *named, "--predictions", str(predictions)]):
            return code
        print(f"commit {out} now: a sweep refuses predictions that git does not hold. Then run this again.")
        return 0
    command = [
        "hybrid-sweep",
        str(HERE / f"{wanted.name}.toml"),
        "--predictions",
        str(predictions),
        "--out",
        str(out),
        "-j",
        str(wanted.jobs),
    ]
    command += ["--max-minutes", str(wanted.minutes)] if wanted.minutes else []
    command += ["--resume"] if (out / rundir.RECORDS).exists() else []
    return call(command)


if __name__ == "__main__":
    sys.exit(main())
