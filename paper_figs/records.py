"""The committed records, and the command that makes each: what a figure or an answer names when its record is missing.

``--out docs/reports/NAME`` is added to each command; `python studies/records.py NAME` runs it. Small ones take minutes on the embedded
model and belong to ``make records``; the others take an hour and more, or a model that ``make real-data`` installs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from hybridtheory.errors import UserError
from probes import rundir
from probes.records import Record

T = TypeVar("T")
REPORTS = Path("docs/reports")


@dataclass(frozen=True)
class Made:
    """command: without its --out; small: whether ``make records`` makes it."""

    command: str
    small: bool = True


COMMANDS = {
    "smoothness-smollm2-sst2": Made(
        "probe-smoothness smollm2 --data sst2 --rows 16 --points 3 --secants 30 --run-steps 36 --directions 8 --trace-tol 0.3 "
        "--max-memory 8GiB",
        small=False,
    ),
    "smoothness-smollm2-boolq": Made(
        "probe-smoothness smollm2 --data boolq --rows 8 --max-length 256 --micro-batch 2 --points 1 --secants 10 --run-steps 10 "
        "--directions 6 --trace-tol 0.3 --max-memory 8GiB",
        small=False,
    ),
    "estimators-smollm2": Made("probe-estimators smollm2 --data sst2", small=False),
    "estimators-embedded": Made("probe-estimators"),
    "convergence-embedded": Made("probe-convergence"),
    "coupling-embedded": Made("probe-convergence --rows 8 --runs 1"),
    "bounds-embedded": Made("probe-convergence --lr-base 4e-5 --lr-peft 1e-3"),
    "convergence-smollm2": Made(
        "probe-convergence smollm2 --data sst2 --rows 8 --rates docs/reports/smoothness-smollm2-sst2/trainer.toml --max-memory 8GiB",
        small=False,
    ),
    "methods-embedded": Made("hybrid-sweep studies/small/methods.toml"),
    "queries-embedded": Made("hybrid-sweep studies/small/queries.toml"),
    "refresh-embedded": Made("hybrid-sweep studies/small/refresh.toml"),
    "variants-embedded": Made("hybrid-sweep studies/small/variants.toml"),
    "captured-embedded": Made("python studies/captured.py"),
    "projections-embedded": Made(
        "probe-estimators --laws 'gaussian srgf:k=8 subzero:rank=8,refresh=1 srgf:k=8,refresh=50 subzero:rank=8'"
    ),
    "scale-2-embedded": Made(
        "probe-smoothness --alpha 16 --points 2 --secants 4 --run-steps 4 --directions 4 --trace-tol 0.2"
    ),
    "scale-64-embedded": Made(
        "probe-smoothness --alpha 512 --points 2 --secants 4 --run-steps 4 --directions 4 --trace-tol 0.2"
    ),
    "accuracy-embedded": Made(
        "hybrid-train --method peft-adamw --lr-peft 1e-3 --rows 256 --steps 200 --eval-every 5 --eval-rows 200 --final-rows 200"
    ),
    "cost-embedded": Made(
        "probe-cost --rounds 6 --methods 'peft-sgd peft-adamw mezo subzero hybrid hybrid-subzero sgd adamw'"
    ),
    "cost-smollm2": Made(
        "probe-cost smollm2 --data sst2 --rounds 3 --methods 'peft-sgd peft-adamw mezo subzero hybrid hybrid-subzero sgd adamw'",
        small=False,
    ),
}


def command(name: str, reports: Path = REPORTS) -> str:
    """The whole command that makes a record."""
    return f"{COMMANDS[name].command} --out {(reports / name).as_posix()}"


def load(name: str, reports: Path, wanted_by: str) -> list[Record]:
    """The records of docs/reports/NAME; UserError names the command that makes them where they are missing or not finished."""
    how = f"python studies/records.py {name}, which runs: {command(name)}"
    if not (reports / name / rundir.RECORDS).is_file():
        raise UserError(f"{wanted_by} needs the record {reports / name}, which is not there: make it with {how}")
    if not rundir.whole(reports / name):
        raise UserError(f"{wanted_by} needs the record {reports / name}, which is not finished: go on with {how}")
    return rundir.load(reports / name)


def first(found: Iterable[T], what: str) -> T:
    """The first of them; UserError says that the records hold no ``what``."""
    for x in found:
        return x
    raise UserError(f"they hold no {what}")


def there(value: T | None, what: str) -> T:
    """``value``; UserError where the records hold none."""
    return first([] if value is None else [value], what)
