"""Peak memory of a step by phase, every method beside its formula.

python -m paper_figs cost_memory
"""

from __future__ import annotations

from matplotlib.figure import Figure

from probes import markdown_cost
from probes.figures_cost import memory
from probes.records import Record, StepMemory
from probes.report import Report

RECORDS = ("cost-embedded",)


def draw(records: list[Record]) -> Figure | None:
    return memory(Report.of(records))


def caption(records: list[Record]) -> str:
    report = Report.of(records)
    head = report.header
    peaks = "; ".join(f"{m.method} {markdown_cost.mib(m.peak)}" for m in report.all(StepMemory))
    return (
        f"Peak memory of one step on {head.model.name} with {head.data.rows} rows of {head.data.name}, each method in a process of its "
        f"own, above that process before loading; phases follow one another. {peaks}. {' '.join(markdown_cost.answers(report))}"
    )
