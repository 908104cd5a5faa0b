"""Loss curves of the hybrid method, of its zeroth-order and of its first-order half at equal budget (figure 4 of the hybrid paper).

python -m paper_figs loss_curves
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from matplotlib.figure import Figure

from probes.markdown import interval, number
from probes.records import Record
from probes.sweep_compare import LOSS, Table
from probes.sweep_figures import methods
from probes.sweep_report import UNITS, SweepReport

RECORDS = ("methods-embedded",)
METHODS = ("hybrid", "mezo", "peft-sgd")


def chosen(records: list[Record], names: Sequence[str]) -> Table | None:
    """The first table of the sweep, these methods alone; None where one of them was not run."""
    for found in SweepReport(records).tables:
        rows = [r for r in found.rows if r.method in names]
        if len(rows) == len(names):
            return replace(found, rows=rows)
    return None


def told(found: Table) -> str:
    """Each method's training loss at its best rates, with its interval over seeds."""
    parts = []
    for r in found.rows:
        ends = r.intervals[LOSS]
        state = "" if r.ranked else ", budget too small"
        parts.append(f"{r.method} {number(r.means[LOSS], 4)}" + (f" ({interval(ends)}{state})" if ends else state))
    return "; ".join(parts)


def draw(records: list[Record]) -> Figure | None:
    found = chosen(records, METHODS)
    return methods(found) if found else None


def caption(records: list[Record]) -> str:
    found = chosen(records, METHODS)
    assert found is not None
    seeds = len(found.rows[0].place.cells)
    return (
        f"Minibatch loss over forward-equivalents on {SweepReport(records).head.model.name}, each method at the best of its own rates, "
        f"{seeds} seeds, {found.amount:g} {UNITS[found.horizon]}. Training loss at the end with 95 % intervals: {told(found)}."
    )
