"""The averaged squared gradient of a run under the bounds of every theorem whose hypotheses hold on it.

python -m paper_figs bounds
"""

from __future__ import annotations

from matplotlib.figure import Figure

from probes.convergence_figures import bounds
from probes.records import Record
from probes.records_convergence import Checked

RECORDS = ("convergence-embedded",)


def draw(records: list[Record]) -> Figure | None:
    return bounds(records)


def caption(records: list[Record]) -> str:
    found = [r for r in records if isinstance(r, Checked) and r.about == "bound"]
    told = [f"{r.name}: slack {r.slack:.3g}" for r in found if r.slack is not None and r.holds]
    slack = "; ".join(dict.fromkeys(told)) or "no theorem's hypotheses all hold"
    return f"Averaged squared gradient norm of the runs and the bounds of theorems: {slack}."
