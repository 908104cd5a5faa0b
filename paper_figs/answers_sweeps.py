"""Questions that training runs decide: methods, directions, choices at equal budget. Each function states its answer from records."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from hybridtheory.errors import UserError
from paper_figs.records import load
from probes.markdown import interval, number, percent
from probes.sweep_compare import LOSS, Compared, Table, mean_interval
from probes.sweep_grid import best_of
from probes.sweep_lines import Place
from probes.sweep_report import UNITS, SweepReport

WHO = "docs/questions.md"


def sweep(reports: Path, name: str) -> SweepReport:
    return SweepReport(load(name, reports, WHO))


def methods(reports: Path) -> Table:
    return sweep(reports, "methods-embedded").tables[0]


def row(found: Table, method: str) -> Compared:
    return next(r for r in found.rows if r.method == method)


def best(report: SweepReport, task: str, method: str | None = None) -> Place:
    """The best place of a task's line, or its only one."""
    state = next(s for s in report.states if s.line.task == task and method in (None, s.line.method))
    place = best_of(state.known)
    return next(p for p in state.whole if p.place == place)


def decrease(place: Place) -> np.ndarray:
    return np.array([c.start - c.final for c in place.cells.values()])


def gap(one: Place, other: Place) -> tuple[float, tuple[float, float]]:
    """What ``other`` lowers the loss beyond ``one``, paired over seeds, as a share of ``one``'s decrease, with its 95 % interval.

    Over the seeds that gain something under both: one run that blows up would be all of a mean, so such runs are told apart (`lost`).
    """
    seeds = [s for s in one.cells if s in other.cells and s not in {*lost(one), *lost(other)}]
    differences = [one.cells[s].final - other.cells[s].final for s in seeds]
    unit = float(np.mean([one.cells[s].start - one.cells[s].final for s in seeds])) if seeds else 0.0
    ends = mean_interval(differences)
    if ends is None or unit <= 0:
        raise UserError(
            f"the runs at places {one.place:g} and {other.place:g} cannot be compared: three seeds that gain something are needed"
        )
    return float(np.mean(differences)) / unit, (ends[0] / unit, ends[1] / unit)


def lost(place: Place) -> list[int]:
    """Seeds that ended no lower than they began, or not at all."""
    return [s for s, c in place.cells.items() if not c.final < c.start]


def verdict(found: tuple[float, tuple[float, float]], better: str, worse: str, alike: str) -> str:
    """The word that the interval allows."""
    low, high = found[1]
    return better if low > 0 else worse if high < 0 else alike


def against(one: Place, other: Place, names: tuple[str, str]) -> str:
    """Mean decreases, and their difference with its interval."""
    mean, (low, high) = gap(one, other)
    gone = {*lost(one), *lost(other)}
    kept = [(s, c) for s, c in one.cells.items() if s in other.cells and s not in gone]
    first = number(float(np.mean([c.start - c.final for _, c in kept])))
    second = number(float(np.mean([other.cells[s].start - other.cells[s].final for s, _ in kept])))
    runs = f", {len(kept)} seeds"
    if gone:
        runs += (
            f"; of {len(one.cells)} runs each {len(lost(one))} and {len(lost(other))} gained nothing and are left out"
        )
    return (
        f"{names[0]} lowers the loss by {first}, {names[1]} by {second}: {100 * mean:+.1f} % ({100 * low:+.1f} to {100 * high:+.1f} %) "
        f"of it{runs}"
    )


def shuffling(reports: Path) -> str:
    found = sweep(reports, "variants-embedded")
    pair = best(found, "reshuffled", "hybrid"), best(found, "iid", "hybrid")
    said = verdict(
        gap(*pair), "No, it is the worse of the two here", "Yes", "It makes no difference that these runs resolve"
    )
    return (
        f"{said}: at equal rates {against(*pair, ('reshuffling', 'drawing rows independently'))}. On sums with known constants the plateau "
        "of a first-order block falls as η² under reshuffling and as η under independent draws, that of a zeroth-order block "
        "as η under both (`docs/log.md`, tests of the theory): in the long run shuffling is an asset of the PEFT half."
    )


def order(reports: Path) -> str:
    found = sweep(reports, "variants-embedded")
    pair = best(found, "reshuffled", "hybrid"), best(found, "reshuffled", "hybrid-sequential")
    said = verdict(gap(*pair), "Sequential", "Joint", "No difference that these runs resolve")
    return f"{said}: at equal rates {against(*pair, ('the joint step', 'the sequential one'))}. It costs a forward pass more."


def halves(reports: Path) -> str:
    found = sweep(reports, "variants-embedded")
    plain = best(found, "reshuffled", "hybrid")
    told = [
        against(plain, best(found, "reshuffled", m), ("plain hybrid", m)) for m in ("hybrid-subzero", "hybrid-lozo")
    ]
    return f"At the rates of the plain hybrid, which both laws are scaled to: {'. '.join(told)}."


def baselines(reports: Path) -> str:
    table = methods(reports)
    told = []
    for r in table.rows:
        ends = r.intervals[LOSS]
        share = "" if r.share is None else f", {percent(r.share)} of the best decrease"
        told.append(f"{r.method} {number(r.means[LOSS], 3)}" + (f" ({interval(ends)})" if ends else "") + share)
    return (
        f"Training loss after {table.amount:g} {UNITS[table.horizon]}, each at its own best rates: {'; '.join(told)}."
    )


def zo_lora(reports: Path) -> str:
    table = methods(reports)
    zo, fo = row(table, "mezo-peft"), row(table, "peft-sgd")
    return f"At equal compute {against(fo.place, zo.place, ('first-order LoRA', 'zeroth-order LoRA'))}."


def variance(reports: Path) -> str:
    found = sweep(reports, "queries-embedded")
    one, eight = best(found, "q1"), best(found, "q8")
    said = verdict(
        gap(one, eight), "Yes, here", "No, what it costs is more than it brings", "Not that these runs resolve"
    )
    steps = [max(c.step for c in p.cells.values()) for p in (one, eight)]
    return (
        f"{said}. Eight queries a step have an eighth of the variance and cost eight times as much: at equal forward passes "
        f"({steps[0]} and {steps[1]} steps) {against(one, eight, ('one query', 'eight queries'))}. Best rates {number(one.lr_base)} and "
        f"{number(eight.lr_base)}."
    )


def refresh(reports: Path) -> str:
    found = sweep(reports, "refresh-embedded")
    first = best(found, "refresh-1")
    told = [
        against(first, best(found, f"refresh-{x}"), ("a subspace a step", label))
        for x, label in (("10", "one every ten steps"), ("never", "a single one"))
    ]
    return f"{'. '.join(told)}."


def seeds(reports: Path) -> str:
    told = []
    for r in methods(reports).rows:
        gained = decrease(r.place)
        if np.isfinite(gained).all() and gained.mean() > 0:
            told.append(f"{r.method} {percent(float(gained.std(ddof=1) / gained.mean()))}")
    return (
        f"Standard deviation of the decrease over seeds at the best rates, as a share of its mean: {', '.join(told)}."
    )


def edges(reports: Path) -> str:
    moved = total = 0
    factors = []
    for state in sweep(reports, "methods-embedded").states:
        grid = state.line.grid
        if grid is None or not state.known:
            continue
        total += 1
        first = [grid.rate(i) for i in grid.first]
        here = best_of(state.known)
        if not first[0] <= here <= first[-1]:
            moved += 1
            factors.append(max(here / first[-1], first[0] / here))
    far = f", by a factor of up to {number(max(factors), 2)}" if factors else ""
    said = "Yes" if moved else "Not here"
    return f"{said}: in {moved} of {total} lines the best rate lay outside the first three points{far}."
