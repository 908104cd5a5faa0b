"""Loss against the learning rate: base alone, PEFT alone, both around their optima (the study of rates, figure 2 of the hybrid paper).

python -m paper_figs rates
"""

from __future__ import annotations

from matplotlib.figure import Figure

from paper_figs.records import first
from probes.markdown import interval, number
from probes.records import Record
from probes.sweep_figures import rates
from probes.sweep_lines import State
from probes.sweep_report import AXES, SweepReport
from probes.sweep_scores import unit

RECORDS = ("methods-embedded",)


def lines(report: SweepReport) -> list[State]:
    """Those of the hybrid method, on the first task and budget."""
    found = [s for s in report.states if s.line.method == "hybrid" and s.line.grid is not None and s.whole]
    about = [(s.line.task, s.line.horizon, s.line.amount) for s in found]
    return [s for s, which in zip(found, about, strict=True) if which == about[0]] if found else []


def draw(records: list[Record]) -> Figure | None:
    report = SweepReport(records)
    states = lines(report)
    return rates(states, report.scores) if states else None


def caption(records: list[Record]) -> str:
    report = SweepReport(records)
    told = []
    for s in lines(report):
        best, k = s.optimum, unit(s)
        if best is None:
            continue
        sure = (
            f"{number(best.rate * k)} ({interval((best.interval[0] * k, best.interval[1] * k))})"
            if best.interval
            else ""
        )
        told.append(
            f"{AXES[s.line.axis]}: {sure if best.identified else f'not identified, best run {number(best.best * k)}'}"
        )
    line = first(lines(report), "swept line of the hybrid method").line
    return (
        f"Loss of the training rows after a budget of {line.until} of the hybrid method on {report.head.model.name}, "
        f"{len(line.seeds)} seeds, against the learning rate. Optima with 95 % intervals over seeds: {'; '.join(told)}."
    )
