"""Where the squared error of a zeroth-order estimate comes from, over mu, beside the published defaults.

python -m paper_figs error_budget
"""

from __future__ import annotations

from matplotlib.figure import Figure

from probes.figures_estimators import budget
from probes.markdown import number
from probes.records import Budget, Record
from probes.report import Report

RECORDS = ("estimators-smollm2",)


def draw(records: list[Record]) -> Figure | None:
    return budget(Report.of(records))


def caption(records: list[Record]) -> str:
    report = Report.of(records)
    flat = [
        f"{b.block}: best mu {number(b.recommended)}, flat from {number(b.flat[0])} to {number(b.flat[1])}"
        for b in report.all(Budget)
        if b.recommended is not None and b.flat is not None
    ]
    return (
        f"Squared error of one estimate on {report.header.model.name} by its causes (direction, minibatch, truncation, rounding) over mu. "
        f"{'; '.join(flat)}."
    )
