"""Bilevel ZOFO against MeZO under one budget, each at the best of its own rates.

python -m paper_figs bilevel
"""

from __future__ import annotations

from matplotlib.figure import Figure

from hybridtheory.errors import UserError
from paper_figs.loss_curves import chosen, not_bracketed, told
from probes.records import Record
from probes.sweep_figures import methods
from probes.sweep_report import SweepReport
from probes.sweep_study import in_words

RECORDS = ("methods-embedded",)
METHODS = ("bilevel", "mezo")


def draw(records: list[Record]) -> Figure | None:
    found = chosen(records, METHODS)
    return methods(found) if found else None


def caption(records: list[Record]) -> str:
    report, found = SweepReport(records), chosen(records, METHODS)
    if found is None:
        raise UserError(f"the record was not swept with {', '.join(METHODS)}")
    steps = {r.method: max(c.step for c in r.place.cells.values()) for r in found.rows}
    return (
        f"Bilevel ZOFO ({steps['bilevel']} steps) and MeZO ({steps['mezo']} steps) on {report.head.model.name}, a budget of "
        f"{in_words(found.horizon, found.amount)}; a run ends with the step that reaches it. Training loss at the end with 95 % intervals "
        f"over seeds: {told(found)}.{not_bracketed(report, found)}"
    )
