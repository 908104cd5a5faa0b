"""Methods of a sweep beside each other at equal budget: each at its best rates, paired over seeds.

A method that has not moved its training loss by five standard errors had too small a budget, and is not ranked. Scores of unlike tasks
are never averaged: over tasks goes the share of the best method's decrease.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import stats

from probes.records_parts import Interval
from probes.records_sweep import Cell
from probes.sweep_lines import ENDED, Place, State

MOVED = 5.0  # standard errors
LOSS = "training loss"
HELD_OUT = {
    "loss": "held-out loss",
    "accuracy": "accuracy",
    "calibrated_accuracy": "calibrated accuracy",
    "auc": "AUC",
    "f1": "F1",
}


@dataclass(frozen=True)
class Compared:
    """One method at its best rates. interval: 95 % over seeds (t). moved: mean decrease over its standard error.

    ranked   whether it moved by `MOVED` standard errors.
    worse    mean paired difference to the best method (positive: worse), its interval, and the p-value of the paired t test after Holm.
    share    decrease of the training loss over the best method's.
    reached  to the target: forward-equivalents, tokens and seconds, means over the seeds that reached it; reaching: how many did.
    """

    method: str
    place: Place
    axis: str
    means: dict[str, float]
    intervals: dict[str, Interval | None]
    moved: float
    ranked: bool
    worse: float | None = None
    worse_interval: Interval | None = None
    p: float | None = None
    share: float | None = None
    reached: tuple[float, float, float] | None = None
    reaching: int = 0


@dataclass(frozen=True)
class Table:
    """The methods of one task at one budget, best first, those that are not ranked last. target: a training loss."""

    task: str
    horizon: str
    amount: float
    rows: list[Compared]
    target: float | None


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> Interval | None:
    """t interval of a mean; None for fewer than 3 values or one that is not finite."""
    x = np.asarray(values, float)
    if len(x) < 3 or not np.isfinite(x).all():
        return None
    half = float(stats.t.ppf((1 + confidence) / 2, len(x) - 1) * x.std(ddof=1) / math.sqrt(len(x)))
    return float(x.mean()) - half, float(x.mean()) + half


def holm(p: Sequence[float]) -> list[float]:
    """p-values adjusted for their number (Holm 1979, Scand. J. Stat. 6, 65)."""
    order = np.argsort(p)
    adjusted, highest = [0.0] * len(p), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(p) - rank) * p[i]))
        adjusted[i] = highest
    return adjusted


def tables(states: Sequence[State], target: float = 0.5) -> list[Table]:
    """A table for every task and budget at which two methods or more were run."""
    found = []
    for task, horizon, amount in dict.fromkeys((s.line.task, s.line.horizon, s.line.amount) for s in states):
        here = [s for s in states if (s.line.task, s.line.horizon, s.line.amount) == (task, horizon, amount)]
        chosen = {m: best for m in dict.fromkeys(s.line.method for s in here) if (best := _best(m, here)) is not None}
        if len(chosen) > 1:
            found.append(_table(task, horizon, amount, chosen, target))
    return found


def _best(method: str, states: Sequence[State]) -> tuple[str, Place] | None:
    """(axis, place) of the least mean loss among lines on which the method moves all that it can."""
    own = [s for s in states if s.line.method == method]
    lines = [s for s in own if len(s.line.groups) == 1 or s.line.axis not in ("base", "peft")]
    found = [(s.known[p.place].loss, s.line.axis, p) for s in lines for p in s.whole]
    return min(found, key=lambda f: f[0])[1:] if found else None


def _decrease(place: Place) -> np.ndarray:
    """By seed, of the training loss; minus infinity where the run diverged."""
    return np.array([c.start - c.final if c.status in ENDED else -math.inf for c in place.cells.values()])


def _table(task: str, horizon: str, amount: float, chosen: dict[str, tuple[str, Place]], target: float) -> Table:
    rows = [_compared(method, axis, place) for method, (axis, place) in chosen.items()]
    rows.sort(key=lambda r: (not r.ranked, r.means[LOSS]))
    best = rows[0]
    if not best.ranked:
        return Table(task, horizon, amount, rows, None)
    goal = float(np.mean([c.start - target * (c.start - c.final) for c in best.place.cells.values()]))
    tests = [_paired(row.place, best.place) for row in rows[1:]]
    adjusted = iter(holm([p for _, _, p in tests if p is not None]))
    done = [_with(best, goal, 1.0)]
    for row, (worse, ends, p) in zip(rows[1:], tests, strict=True):
        share = float(_decrease(row.place).mean() / _decrease(best.place).mean())
        done.append(_with(row, goal, share, worse, ends, next(adjusted) if p is not None else None))
    return Table(task, horizon, amount, done, goal)


def _compared(method: str, axis: str, place: Place) -> Compared:
    cells = list(place.cells.values())
    values = {LOSS: [c.final for c in cells]}
    for name, word in HELD_OUT.items():
        if all(c.held_out is not None and name in c.held_out for c in cells):
            values[word] = [float(c.held_out[name]) for c in cells if c.held_out is not None]
    gained = _decrease(place)
    error = (
        float(gained.std(ddof=1)) / math.sqrt(len(gained))
        if len(gained) > 1 and np.isfinite(gained).all()
        else math.inf
    )
    # Where seeds agree to the last bit, the loss's own rounding is the error.
    error = max(error, float(np.finfo(np.float32).eps) * cells[0].start)
    far = float(gained.mean()) / error if math.isfinite(error) else 0.0
    means = {k: float(np.mean(v)) for k, v in values.items()}
    return Compared(method, place, axis, means, {k: mean_interval(v) for k, v in values.items()}, far, far >= MOVED)


def _paired(one: Place, best: Place) -> tuple[float | None, Interval | None, float | None]:
    """Mean difference of the training losses of equal seeds, its interval, p of the paired t test."""
    seeds = [s for s in one.cells if s in best.cells]
    a, b = (np.array([p.cells[s].final for s in seeds]) for p in (one, best))
    if len(seeds) < 3 or not (np.isfinite(a).all() and np.isfinite(b).all()):
        return None, None, None
    d = a - b
    p = 0.0 if d.std() == 0 and d.mean() != 0 else 1.0 if d.std() == 0 else float(stats.ttest_rel(a, b).pvalue)
    return float(d.mean()), mean_interval(list(d)), p


def _with(
    row: Compared,
    goal: float,
    share: float,
    worse: float | None = None,
    ends: Interval | None = None,
    p: float | None = None,
) -> Compared:
    found = [to_target(c, goal) for c in row.place.cells.values()]
    there = [f for f in found if f is not None]
    mean = tuple(float(np.mean(v)) for v in zip(*there, strict=True)) if there else None
    return replace(row, share=share, worse=worse, worse_interval=ends, p=p, reached=mean, reaching=len(there))  # type: ignore[arg-type]


def to_target(cell: Cell, goal: float) -> tuple[float, float, float] | None:
    """(forward-equivalents, tokens, seconds) of the steps until the minibatches' mean loss is at most ``goal`` for the rest of the run.

    Read from the curve's stretches, so it is known to a twentieth of the run. None: never.
    """
    if cell.status not in ENDED or not cell.curve["loss"]:
        return None
    above = [i for i, loss in enumerate(cell.curve["loss"]) if loss > goal]
    i = above[-1] + 1 if above else 0
    if i >= len(cell.curve["loss"]):
        return None
    return cell.curve["equivalents"][i], cell.curve["tokens"][i], cell.clock[i] if i < len(cell.clock) else math.nan


def over_tasks(found: Sequence[Table]) -> dict[str, tuple[float, Interval | None, int]]:
    """By method: the mean over tasks of its share of the best method's decrease, its interval, and the number of tasks.

    Tasks at which the method is not ranked count with what it did; methods that miss a task are compared on fewer, which n says.
    """
    shares: dict[str, list[float]] = {}
    for table in found:
        for row in table.rows:
            if row.share is not None:
                shares.setdefault(row.method, []).append(max(row.share, 0.0))
    return {m: (float(np.mean(v)), mean_interval(v), len(v)) for m, v in shares.items()}
