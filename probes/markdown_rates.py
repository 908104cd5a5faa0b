"""The learning rates in report.md: what is recommended, every rule beside it, and where each number comes from."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from probes.markdown import interval, number, rate, table
from probes.records_smoothness import Rate

if TYPE_CHECKING:
    from probes.report import Report

RULE_NAMES = {
    "worst_case": "worst case (dimension)",
    "measured": "measured curvature (trace)",
    "noise_limited": "noise-limited (square root)",
    "tail": "tail of a step (compared, not recommended)",
    "finite_scale": "finite-scale (forward passes)",
}
GROUP_NAMES = {"base": "η base", "peft": "η PEFT", "ratio": "ratio PEFT/base"}


def learning_rates(report: Report) -> list[str]:
    found = report.recommendation
    out = ["## Learning rates", ""]
    if found is not None:
        rows = []
        for group, name in GROUP_NAMES.items():
            r: Rate | None = getattr(found, group)
            if r is None:
                continue
            value = f"**{number(r.value)}**" if r.value is not None else f"none: {r.note}"
            by = found.bound_by.get(group, "–")
            rows.append([name, value, interval(r.interval), RULE_NAMES.get(by, by), r.covers or "–"])
        out += ["Recommended, and written to `trainer.toml`:", ""]
        out += table(["", "value", "interval", "bound by", "the interval covers"], rows)
        listed = ", ".join(f"{k} = {v}" for k, v in found.settings.items() if v is not None)
        out += [f"They hold for: {listed}.", ""] if listed else []
    rows = []
    for rule, name in RULE_NAMES.items():
        places = (("first", "first point"), ("envelope", "whole run"))
        for where, words in places if len(report.points) > 1 else (("envelope", "the one point"),):
            rates = report.rates(rule, where)
            if rates is not None and rates.where == where:
                rows.append([name, words, rate(rates.base), rate(rates.peft), rate(rates.ratio)])
    if rows:
        out += ["Every rule, the worst-case theory beside the measured one (value and interval):", ""]
        out += table(["rule", "where", *GROUP_NAMES.values()], rows)
        out += worst_against_measured(report)
        out += ["![The rules side by side](figures/learning_rates.png)", ""]
        out += rule_notes(report)
    elif found is None:
        out += ["The run ended before rates could be derived.", ""]
    return out


def worst_against_measured(report: Report) -> list[str]:
    worst, measured = report.rate("worst_case", "base"), report.rate("measured", "base")
    if worst is None or measured is None or not worst.value or not measured.value:
        return []
    factor = measured.value / worst.value
    smaller = "smaller" if factor >= 1 else "larger"
    orders = abs(math.log10(factor))
    return [
        f"For the base weights the worst case prescribes a rate {number(10**orders, 2)} times {smaller} than the measured trace does "
        f"({orders:.1f} orders of magnitude).",
        "",
    ]


def rule_notes(report: Report) -> list[str]:
    """Formula, theorem, spectrum and failed hypotheses of each rule."""
    rows, notes = [], []
    for rule, name in RULE_NAMES.items():
        for group, words in GROUP_NAMES.items():
            r = report.rate(rule, group)
            if r is None or (group == "ratio" and r.value is not None):
                continue  # a ratio is the quotient of two rows above it
            if r.value is not None and (r.formula or r.theorem):
                rows.append([name, words, f"`{r.formula}`", r.theorem or "–", r.uses or "–", r.covers or "–"])
            failed = [h for h in r.hypotheses if not h.holds]
            for h in failed:
                notes.append(
                    f"- {name}, {words}: the hypothesis “{h.name}” does not hold ({number(h.value)} against {number(h.limit)})."
                )
            if r.note:
                notes.append(f"- {name}, {words}: {r.note}.".replace("..", "."))
        rates = report.rates(rule)
        if rates is not None and rates.note:
            notes.append(f"- {name}: {rates.note}.".replace("..", "."))
    out = (
        [
            "Where each number comes from:",
            "",
            *table(["rule", "", "formula", "theorem", "uses", "interval covers"], rows),
        ]
        if rows
        else []
    )
    return out + ([*dict.fromkeys(notes), ""] if notes else [])
