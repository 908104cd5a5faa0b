"""The cosine's exact law over its measured histogram.

python -m paper_figs cosine_laws
"""

from __future__ import annotations

from matplotlib.figure import Figure

from probes.figures_estimators import cosines
from probes.records import Record
from probes.report import Report

RECORDS = ("estimators-smollm2",)


def draw(records: list[Record]) -> Figure | None:
    return cosines(Report.of(records))


def caption(records: list[Record]) -> str:
    return (
        f"Cosine between one zeroth-order estimate and the gradient on {Report.of(records).header.model.name}, in units of 1/sqrt(d): "
        "histogram of the draws and the Beta law, nothing fitted."
    )
