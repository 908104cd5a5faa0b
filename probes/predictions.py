"""Learning rates predicted before a sweep: written from probes' records, committed, carried by every record of the sweep, and checked.

A prediction made after the sweep is worth nothing, so the file is refused until git holds it, every cell keeps its sha256 and the
commit that brought it in, and `check` asks git whether that commit is an ancestor of the sweep's own commit and of the one that brought its
records in.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hybridtheory.errors import UserError
from probes import rundir
from probes.records import Header, Rates, Recommendation
from probes.records_smoothness import Rate
from probes.records_sweep import Cell, Predictions, SweepTask
from probes.report import Report
from probes.trainer_toml import limits

SCHEMA = 0
GROUPS = ("base", "peft", "ratio")
RECOMMENDED = "recommended"  # the rule that trainer.toml carries


# ---- write ----


def entries(task: str, report: Report) -> list[dict[str, Any]]:
    """One entry a rule, and one for the recommendation, which is the one that is scored."""
    head, settings = report.header, report.header.options
    about = {
        "task": task, "model_sha256": head.model.sha256, "data": head.data.name,
        "adapter": {"type": head.peft.type, "rank": head.peft.rank, "scale": head.peft.scale} if head.peft else {},
        "steps": settings.get("steps"), "batch": settings.get("batch_size"), "mu": settings.get("mu"), "q": settings.get("q"),
    }  # fmt: skip
    found = [
        {
            **about,
            "rule": r.rule,
            "where": r.where,
            "scored": False,
            **{g: _rate(getattr(r, g)) for g in GROUPS},
            "limits": {},
        }
        for r in report.all(Rates)
    ]
    last = report.last(Recommendation)
    if last is None:
        raise UserError(f"the probe of {task} ended before it could recommend rates: finish it with --resume")
    rates = {g: _rate(getattr(last, g)) for g in GROUPS}
    bounds = limits(report, int(settings.get("q", 1)))
    return [*found, {**about, "rule": RECOMMENDED, "where": "run", "scored": True, **rates, "limits": bounds}]


def write(path: Path, probes: Mapping[str, Sequence[Path]]) -> str:
    """The file of predictions from probe-smoothness's run folders, by task; returns its sha256."""
    found, sources = [], []
    for task, folders in probes.items():
        for folder in folders:
            report = Report.load(folder)
            if report.header.probe != "smoothness":
                raise UserError(
                    f"{folder} is a run of probe-{report.header.probe}: predictions come from probe-smoothness"
                )
            found += entries(task, report)
            raw = (folder / rundir.RECORDS if folder.is_dir() else folder).read_bytes()
            sources.append({"task": task, "records": folder.as_posix(), "sha256": hashlib.sha256(raw).hexdigest()})
    text = json.dumps({"schema": SCHEMA, "sources": sources, "predictions": found}, indent=1, ensure_ascii=False) + "\n"
    if path.exists():
        raise UserError(f"{path} exists already: predictions are written once; give another name")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} could not be written: {error.strerror or error}") from error
    return hashlib.sha256(text.encode()).hexdigest()


def _rate(rate: Rate | None) -> dict[str, Any] | None:
    if rate is None or rate.value is None:
        return None
    return {"value": rate.value, "interval": list(rate.interval) if rate.interval else None}


# ---- register ----


def register(path: Path) -> Predictions:
    """The predictions of a committed file, with the commit that brought it in as it is now."""
    try:
        raw = path.read_bytes()
        table = json.loads(raw)
        listed = [_checked(e) for e in table["predictions"]]
    except OSError as error:
        raise UserError(
            f"--predictions: {path} cannot be read ({error.strerror or error}): write it with --predict first"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"--predictions: {path} is no file of predictions ({error}): write it with --predict") from None
    digest = hashlib.sha256(raw).hexdigest()
    folder = path.resolve().parent
    root = _git(folder, "rev-parse", "--show-toplevel")
    name = path.resolve().name
    remedy = f"commit it before the sweep (git add {path} && git commit), so that anyone can see which came first"
    if root is None:
        raise UserError(f"{path} is not in a git repository: {remedy}")
    commit = _git(folder, "log", "-1", "--format=%H", "--", name)
    if not commit or _digest(folder, commit, f"./{name}") != digest:
        raise UserError(f"{path} is not committed as it stands: {remedy}")
    inside = path.resolve().relative_to(Path(root).resolve()).as_posix()
    return Predictions(inside, digest, commit, listed, _git(folder, "rev-parse", "HEAD"))


def _checked(entry: Any) -> dict[str, Any]:
    """An entry with what the sweep reads from it; KeyError or TypeError where it is not one."""
    for name in ("task", "rule", "scored", "model_sha256", "data", "adapter"):
        entry[name]
    for group in GROUPS:
        rate = entry[group]
        if rate is not None and not (isinstance(rate["value"], int | float) and 0 < rate["value"] < float("inf")):
            raise ValueError(
                f"{entry['task']}, {entry['rule']}: a predicted {group} of {rate['value']!r} is not a positive number"
            )
    return dict(entry)


def refuse_other(predictions: Predictions, tasks: Sequence[SweepTask]) -> None:
    """UserError where a prediction is of another model, adapter or data set than the task of its name."""
    for task in tasks:
        for e in predictions.entries:
            if e["task"] != task.name:
                continue
            peft = {k: task.peft.get(k) for k in ("type", "rank", "scale")} if task.peft else {}
            said = {k: v for k, v in e["adapter"].items() if v is not None}
            pairs = (
                ("model", e["model_sha256"], task.model_sha256), ("data", e["data"], task.data),
                ("adapter", said, {k: v for k, v in peft.items() if v is not None}),
            )  # fmt: skip
            for what, predicted, swept in pairs:
                if predicted != swept:
                    raise UserError(
                        f"the predictions for task {task.name} are about another {what} ({str(predicted)[:60]}) than the sweep's "
                        f"({str(swept)[:60]}): run the probe on what is swept"
                    )


# ---- check ----


def check(folder: Path) -> str:
    """A sentence that says what was checked; UserError where a sweep's records do not show that the predictions came first."""
    records = rundir.load(folder)
    said = [r for r in records if isinstance(r, Predictions)]
    if not said:
        raise UserError(f"{folder} was swept without predictions: there is nothing to check")
    first = said[0]
    cells = [r for r in records if isinstance(r, Cell)]
    strangers = [c.id for c in cells if (c.predictions, c.predictions_commit) != (first.sha256, first.commit)]
    if strangers:
        raise UserError(
            f"{folder}: {len(strangers)} of {len(cells)} cells carry other predictions, the first is {strangers[0]}"
        )
    file = folder / rundir.RECORDS if folder.is_dir() else folder
    where = file.resolve().parent
    if _git(where, "rev-parse", "--show-toplevel") is None:
        raise UserError(
            f"{folder} is not in a git repository: check the records in the repository that holds the predictions"
        )
    if _git(where, "cat-file", "-e", f"{first.commit}^{{commit}}") is None:
        raise UserError(
            f"{folder}: the commit {first.commit[:12]} of the predictions is not in this repository (a shallow clone?)"
        )
    if _digest(where, first.commit, first.path) != first.sha256:
        raise UserError(
            f"{folder}: {first.path} at commit {first.commit[:12]} is not the file that the sweep was given"
        )
    header = next(r for r in records if isinstance(r, Header))
    brought = _git(where, "log", "--diff-filter=A", "--format=%H", "--", file.name)
    later = {
        "the sweep was started at": first.head,
        "the sweep's code was at": (header.git or "").removesuffix("-dirty") or None,
        "its records came in with": brought.splitlines()[-1] if brought else None,
    }
    checked = []
    for what, commit in later.items():
        if commit is None or _git(where, "cat-file", "-e", f"{commit}^{{commit}}") is None:
            continue
        if commit == first.commit and what.startswith("its records"):
            raise UserError(
                f"{folder}: predictions and records came in with the same commit {commit[:12]}: nothing shows which was first"
            )
        if _git(where, "merge-base", "--is-ancestor", first.commit, commit) is None:
            raise UserError(
                f"{folder}: the predictions' commit {first.commit[:12]} is no ancestor of {commit[:12]}, which {what}"
            )
        checked.append(f"{what} {commit[:12]}")
    if not checked:
        raise UserError(
            f"{folder}: no commit of the sweep is known here, so nothing shows that the predictions came first"
        )
    return f"{len(cells)} cells, predictions {first.sha256[:12]} of commit {first.commit[:12]}, an ancestor of all: {'; '.join(checked)}"


def _git(folder: Path, *arguments: str) -> str | None:
    """What git prints, None where it fails."""
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode("utf-8", errors="replace").strip()


def _digest(folder: Path, commit: str, path: str) -> str | None:
    """sha256 of a file as a commit holds it; ``path`` from the repository's root, or from ``folder`` with ./ in front."""
    try:
        done = subprocess.run(
            ["git", "show", f"{commit}:{path}"], cwd=folder, capture_output=True, timeout=60, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return hashlib.sha256(done.stdout).hexdigest()
