"""Mean change of the loss in one step, measured over predicted, against the fraction of the recommended rates.

python -m paper_figs descent
"""

from __future__ import annotations

from matplotlib.figure import Figure

from probes.convergence_figures import descent
from probes.records import Record
from probes.records_convergence import Descent

RECORDS = ("convergence-embedded",)


def draw(records: list[Record]) -> Figure | None:
    return descent(records)


def caption(records: list[Record]) -> str:
    found = [r for r in records if isinstance(r, Descent)]
    near = [abs(r.measured / r.quadratic - 1) for r in found if r.factor <= 0.1]
    far = [abs(r.measured / r.fitted - 1) for r in found]
    return (
        f"{len(found)} mean changes of the loss in one step, over what Identity Q with infinitesimal curvature and what the finite-scale "
        f"curve of other directions predict. Largest deviation: {max(near):.1%} up to 0.1 of the rates (Identity Q), {max(far):.1%} up to "
        "the whole rates (finite scale)."
    )
