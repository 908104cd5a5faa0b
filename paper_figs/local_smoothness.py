"""Local smoothness against gradient norm, base beside PEFT (figure 1 of the hybrid paper).

python -m paper_figs local_smoothness
"""

from __future__ import annotations

from matplotlib.figure import Figure

from probes.figures import smoothness
from probes.markdown import number
from probes.records import Fit, Record
from probes.report import Report

RECORDS = ("smoothness-smollm2-sst2",)


def draw(records: list[Record]) -> Figure | None:
    return smoothness(Report.of(records))


def caption(records: list[Record]) -> str:
    report = Report.of(records)
    told = []
    for f in report.fits:
        if (f.data, f.method, f.argument) == ("secant", "envelope", "full"):
            told.append(
                f"{f.block}: L0 = {number(f.L0)}, L1 = {number(f.L1)}"
                if f.identified
                else f"{f.block}: L1 is not identified (gradient norms span a factor {number(f.span, 2)})"
            )
    info = report.header.model
    rows = [f for f in report.fits if isinstance(f, Fit)]
    return (
        f"Local smoothness of {info.name} on {report.header.data.name} against the norm of the full gradient: secants along the run, along "
        f"gradients and in random directions, and the largest curvature at full points with its one-sided bound. Envelopes of the secants: "
        f"{'; '.join(told) if rows else 'none'}."
    )
