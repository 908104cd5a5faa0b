"""Loss curves of the hybrid method, of its zeroth-order and of its first-order half at equal budget (figure 4 of the hybrid paper).

python -m paper_figs loss_curves
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from matplotlib.figure import Figure

from hybridtheory.errors import UserError
from probes.markdown import interval, number, percent
from probes.records import Record
from probes.sweep_compare import LOSS, Table
from probes.sweep_figures import methods
from probes.sweep_grid import edge
from probes.sweep_report import AXES, SweepReport
from probes.sweep_study import in_words

RECORDS = ("methods-embedded",)
METHODS = ("hybrid", "mezo", "peft-sgd")


def chosen(records: list[Record], names: Sequence[str]) -> Table | None:
    """The first table of the sweep, these methods alone; None where one of them was not run. The target stays where one of them set it."""
    for found in SweepReport(records).tables:
        rows = [r for r in found.rows if r.method in names]
        if len(rows) == len(names):
            return replace(found, rows=rows, target=found.target if found.rows[0].method in names else None)
    return None


def told(found: Table, digits: int = 4, share: bool = False) -> str:
    """Each method's training loss at its best rates: its interval over seeds, whether it moved at all, what it spent where that differs."""
    unlike = len({r.place.spent for r in found.rows}) > 1
    parts = []
    for r in found.rows:
        ends = r.intervals[LOSS]
        notes = [interval(ends)] if ends else []
        notes += [] if r.ranked else ["budget too small"]
        notes += [f"{r.place.spent:g} forward-equivalents"] if unlike else []
        notes += [f"{percent(r.share)} of the best decrease"] if share and r.share is not None else []
        parts.append(f"{r.method} {number(r.means[LOSS], digits)}" + (f" ({'; '.join(notes)})" if notes else ""))
    return ", ".join(parts)


def not_bracketed(report: SweepReport, found: Table) -> str:
    """A sentence about the methods whose best rate lies on the edge of its grid; nothing where there is none."""
    names = {r.method for r in found.rows}
    parts = [
        f"{s.line.method} ({edge(s.known, s.start)} of the grid of {AXES[s.line.axis]})"
        for s in report.states
        if s.at_edge
        and s.line.method in names
        and (s.line.task, s.line.horizon, s.line.amount) == (found.task, found.horizon, found.amount)
    ]
    return f" Not bracketed, so better rates may lie beyond: {', '.join(parts)}." if parts else ""


def draw(records: list[Record]) -> Figure | None:
    found = chosen(records, METHODS)
    return methods(found) if found else None


def caption(records: list[Record]) -> str:
    report, found = SweepReport(records), chosen(records, METHODS)
    if found is None:
        raise UserError(f"the record was not swept with {', '.join(METHODS)}")
    seeds = len(found.rows[0].place.cells)
    return (
        f"Minibatch loss over forward-equivalents on {report.head.model.name}, each method at the best of its own rates, {seeds} seeds, a "
        f"budget of {in_words(found.horizon, found.amount)}; a run ends with the step that reaches it. Training loss at the end with 95 % "
        f"intervals: {told(found)}.{not_bracketed(report, found)}"
    )
