"""Questions that training runs decide: methods, directions, choices at equal budget. Each function states its answer from records."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from scipy import stats

from hybridtheory.errors import UserError
from paper_figs.loss_curves import not_bracketed, told
from paper_figs.records import first, load, there
from probes.markdown import number, percent
from probes.sweep_compare import Compared, Table, mean_interval
from probes.sweep_grid import best_of
from probes.sweep_lines import Place, State
from probes.sweep_report import AXES, SweepReport
from probes.sweep_study import in_words

WHO = "docs/questions.md"


def sweep(reports: Path, name: str) -> SweepReport:
    return SweepReport(load(name, reports, WHO))


def methods(report: SweepReport) -> Table:
    return first(report.tables, "two methods at one budget")


def row(found: Table, method: str) -> Compared:
    return first((r for r in found.rows if r.method == method), f"runs of {method}")


def line(report: SweepReport, task: str, method: str | None = None) -> State:
    """The first line of a task (and a method)."""
    wanted = (s for s in report.states if s.line.task == task and method in (None, s.line.method))
    return first(wanted, f"line of {task}" + (f", {method}" if method else ""))


def best(report: SweepReport, task: str, method: str | None = None) -> Place:
    """The best place of a line, or its only one."""
    return there(line(report, task, method).best, f"place of {task} with all of its seeds")


def gap(one: Place, other: Place) -> tuple[float, tuple[float, float]]:
    """What ``other`` lowers the loss beyond ``one``, paired over seeds, as a share of ``one``'s decrease, with its 95 % interval.

    Over the seeds that gain something under both: one run that blows up would be all of a mean, so such runs are told apart (`left_out`).
    """
    seeds = both_gain(one, other)
    differences = [one.cells[s].final - other.cells[s].final for s in seeds]
    unit = float(np.mean([one.cells[s].start - one.cells[s].final for s in seeds])) if seeds else 0.0
    ends = mean_interval(differences)
    if ends is None or unit <= 0:
        raise UserError(
            f"three seeds are needed that gain something at both places {one.place:g} and {other.place:g}, and there are {len(seeds)}: of "
            f"{len(one.cells)} and {len(other.cells)} runs were lost: {gone(one)}; {gone(other)}"
        )
    return float(np.mean(differences)) / unit, (ends[0] / unit, ends[1] / unit)


def both_gain(one: Place, other: Place) -> list[int]:
    return [s for s in one.cells if s in other.cells and s not in {*one.lost, *other.lost}]


def gone(place: Place) -> str:
    """How many runs of a place gained nothing, and what became of those that blew up; "none" where all gained something."""
    if not place.lost:
        return "none"
    blown = ", ".join(f"{number(c.start)} to {number(c.final)}" for c in place.blown.values())
    quiet = len(place.lost) - len(place.blown)
    said = [f"{len(place.blown)} blew up ({blown})"] if blown else []
    return " and ".join(said + ([f"{quiet} gained nothing"] if quiet else []))


def left_out(one: Place, other: Place, names: tuple[str, str]) -> str:
    """A sentence about the runs that no mean holds; nothing where there is none."""
    if not (one.lost or other.lost):
        return ""
    said = f". Left out of {len(one.cells)} runs each: of {names[0]} {gone(one)}, of {names[1]} {gone(other)}"
    counts = [[len(p.lost), len(p.cells) - len(p.lost)] for p in (one, other)]
    if counts[0] == counts[1]:
        return said
    p = float(stats.fisher_exact(counts).pvalue)
    apart = "differ" if p < 0.05 else "do not tell the two apart"
    return f"{said}; the numbers of lost runs {apart} (Fisher's exact test, p = {number(p, 2)})"


def verdict(one: Place, other: Place, better: str, worse: str, alike: str) -> str:
    """The word that the interval allows; that it is about a part of the runs where the two lost different numbers of them."""
    low, high = gap(one, other)[1]
    said = better if low > 0 else worse if high < 0 else alike
    if len(one.lost) == len(other.lost):
        return said
    n = len(one.cells)
    return f"{said} among the seeds that gain something under both ({len(one.lost)} and {len(other.lost)} of {n} runs each were lost)"


def against(one: Place, other: Place, names: tuple[str, str]) -> str:
    """Mean decreases, their difference with its interval, and the runs that were left out."""
    mean, (low, high) = gap(one, other)
    seeds = both_gain(one, other)
    falls = [number(float(np.mean([p.cells[s].start - p.cells[s].final for s in seeds]))) for p in (one, other)]
    return (
        f"{names[0]} lowers the loss by {falls[0]}, {names[1]} by {falls[1]}: {100 * mean:+.1f} % ({100 * low:+.1f} to {100 * high:+.1f} "
        f"%) of it, {len(seeds)} seeds{left_out(one, other, names)}"
    )


def shuffling(reports: Path) -> str:
    found = sweep(reports, "variants-embedded")
    pair = best(found, "reshuffled", "hybrid"), best(found, "iid", "hybrid")
    said = verdict(
        *pair, "No, it is the worse of the two here", "Yes", "It makes no difference that these runs resolve"
    )
    return (
        f"{said}. At equal rates {against(*pair, ('reshuffling', 'drawing rows independently'))}. On sums with known constants the plateau "
        "of a first-order block falls as η² under reshuffling and as η under independent draws, that of a zeroth-order block "
        "as η under both (`docs/log.md`, tests of the theory): in the long run shuffling is an asset of the PEFT half."
    )


def order(reports: Path) -> str:
    found = sweep(reports, "variants-embedded")
    pair = best(found, "reshuffled", "hybrid"), best(found, "reshuffled", "hybrid-sequential")
    said = verdict(*pair, "Sequential", "Joint", "No difference that these runs resolve")
    return (
        f"{said}. At equal rates and steps {against(*pair, ('the joint step', 'the sequential one'))}. The runs cost {pair[0].spent:g} and "
        f"{pair[1].spent:g} forward-equivalents."
    )


def halves(reports: Path) -> str:
    found = sweep(reports, "variants-embedded")
    plain = best(found, "reshuffled", "hybrid")
    told = [
        against(plain, best(found, "reshuffled", m), ("plain hybrid", m)) for m in ("hybrid-subzero", "hybrid-lozo")
    ]
    return f"At the rates of the plain hybrid, which both laws are scaled to: {'. '.join(told)}."


def baselines(reports: Path) -> str:
    report = sweep(reports, "methods-embedded")
    table = methods(report)
    asked = dict.fromkeys(x.method for x in report.study.lines if x.task == table.task)
    missing = [m for m in asked if m not in {r.method for r in table.rows}]
    without = f" Without a rate at which every seed was run, so not compared: {', '.join(missing)}." if missing else ""
    return (
        f"Training loss, each method at its own best rates, after a budget of {in_words(table.horizon, table.amount)} (a run ends with the "
        f"step that reaches it): {told(table, 3, share=True)}.{not_bracketed(report, table)}{without}"
    )


def zo_lora(reports: Path) -> str:
    table = methods(sweep(reports, "methods-embedded"))
    zo, fo = row(table, "mezo-peft").place, row(table, "peft-sgd").place
    return (
        f"Under a budget of {in_words(table.horizon, table.amount)} (spent: {fo.spent:g} by first-order, {zo.spent:g} by zeroth-order "
        f"LoRA) {against(fo, zo, ('first-order LoRA', 'zeroth-order LoRA'))}."
    )


def variance(reports: Path) -> str:
    found = sweep(reports, "queries-embedded")
    one, eight = best(found, "q1"), best(found, "q8")
    said = verdict(one, eight, "Yes, here", "No, what it costs is more than it brings", "Not that these runs resolve")
    steps = [max(c.step for c in p.cells.values()) for p in (one, eight)]
    return (
        f"{said}. Eight queries a step have an eighth of the variance and cost eight times as much: at {one.spent:g} and {eight.spent:g} "
        f"forward passes ({steps[0]} and {steps[1]} steps) {against(one, eight, ('one query', 'eight queries'))}. Best rates "
        f"{number(one.lr_base)} and {number(eight.lr_base)}.{beyond([line(found, x) for x in ('q1', 'q8')])}"
    )


def refresh(reports: Path) -> str:
    found = sweep(reports, "refresh-embedded")
    every = best(found, "refresh-1")
    told = [
        against(every, best(found, f"refresh-{x}"), ("a subspace a step", label))
        for x, label in (("10", "one every ten steps"), ("never", "a single one"))
    ]
    return f"{'. '.join(told)}.{beyond([line(found, f'refresh-{x}') for x in ('1', '10', 'never')])}"


def beyond(states: list[State]) -> str:
    """A sentence about the lines whose best rate lies on the edge of its grid."""
    parts = [f"{s.line.task} ({s.at_edge})" for s in states if s.at_edge]
    return f" Not bracketed, so better rates may lie beyond: {', '.join(parts)}." if parts else ""


def seeds(reports: Path) -> str:
    table = methods(sweep(reports, "methods-embedded"))
    told, without, counts = [], [], set()
    for r in table.rows:
        gained = np.array([c.start - c.final for c in r.place.cells.values()])
        if len(gained) < 2 or not np.isfinite(gained).all() or gained.mean() <= 0:
            without.append(f"{r.method} (of {len(gained)} runs {gone(r.place)})")
            continue
        counts.add(len(gained))
        state = "" if r.ranked else " (budget too small)"
        told.append(f"{r.method} {percent(float(gained.std(ddof=1) / gained.mean()))}{state}")
    first(told, "method with a decrease of two seeds")
    n = min(counts)
    low, high = (float(np.sqrt((n - 1) / stats.chi2.ppf(p, n - 1))) for p in (0.975, 0.025))
    dropped = f" Without a mean decrease: {', '.join(without)}." if without else ""
    return (
        f"Standard deviation of the decrease over seeds at the best rates, as a share of its mean: {', '.join(told)}. From {n} seeds such "
        f"a number is known to a factor of {number(low, 2)} to {number(high, 2)} (95 %, normal decreases).{dropped}"
    )


def edges(reports: Path) -> str:
    outside: list[tuple[State, float]] = []
    states = [s for s in sweep(reports, "methods-embedded").states if s.line.grid is not None and s.known]
    first(states, "swept line")
    sizes = set()
    for s in states:
        assert s.line.grid is not None
        low, *_, high = (s.line.grid.rate(i) for i in s.line.grid.first)
        sizes.add(s.line.grid.points)
        here = best_of(s.known)
        if not low <= here <= high:
            outside.append((s, max(here / high, low / here)))
    points = f"the first {sizes.pop()} points" if len(sizes) == 1 else "the first points"
    said = "Yes" if outside else "Not here"
    parts = [f"{said}: in {len(outside)} of {len(states)} lines the best rate lay outside {points} of the grid"]
    inner = [factor for s, factor in outside if not s.at_edge]
    if inner:
        parts.append(f"{len(inner)} of them are bracketed there, up to a factor {number(max(inner), 2)} outside")
    open_ended = [
        f"{s.line.method}, {AXES[s.line.axis]}, by at least a factor {number(factor, 2)}"
        for s, factor in outside
        if s.at_edge
    ]
    if open_ended:
        parts.append(
            f"{len(open_ended)} of them still lie on the edge of the grid as far as it may be extended, so how far out is not known "
            f"({'; '.join(open_ended)})"
        )
    stuck = [s for s in states if s.at_edge and s not in [x for x, _ in outside]]
    if stuck:
        names = "; ".join(f"{s.line.method}, {AXES[s.line.axis]}" for s in stuck)
        parts.append(f"{len(stuck)} more have it on the edge of {points} ({names})")
    return f"{'; '.join(parts)}."
