"""Time of a step in forward passes of the same batch, every method beside its formula.

python -m paper_figs cost_time
"""

from __future__ import annotations

from matplotlib.figure import Figure

from probes.figures_cost import time
from probes.markdown import interval, number
from probes.records import Record, StepTime
from probes.report import Report

RECORDS = ("cost-embedded",)


def draw(records: list[Record]) -> Figure | None:
    return time(Report.of(records))


def caption(records: list[Record]) -> str:
    report = Report.of(records)
    found = report.all(StepTime)
    told = "; ".join(
        f"{t.method} {number(t.ratio)} ({interval(t.ratio_interval)}), formula {number(t.predicted)}" for t in found
    )
    return (
        f"Time of one step on {report.header.model.name} over that of a forward pass in the same round, median of {found[0].rounds} rounds "
        f"with quartiles, and the formula with the backward pass as measured. {told}."
    )
