"""Bilevel ZOFO against MeZO at equal budget, each at the best of its own rates.

python -m paper_figs bilevel
"""

from __future__ import annotations

from matplotlib.figure import Figure

from paper_figs.loss_curves import chosen, told
from probes.records import Record
from probes.sweep_figures import methods
from probes.sweep_report import UNITS, SweepReport

RECORDS = ("methods-embedded",)
METHODS = ("bilevel", "mezo")


def draw(records: list[Record]) -> Figure | None:
    found = chosen(records, METHODS)
    return methods(found) if found else None


def caption(records: list[Record]) -> str:
    found = chosen(records, METHODS)
    assert found is not None
    steps = {r.method: max(c.step for c in r.place.cells.values()) for r in found.rows}
    return (
        f"Bilevel ZOFO ({steps['bilevel']} steps) and MeZO ({steps['mezo']} steps) over {found.amount:g} {UNITS[found.horizon]} on "
        f"{SweepReport(records).head.model.name}. Training loss at the end with 95 % intervals over seeds: {told(found)}."
    )
