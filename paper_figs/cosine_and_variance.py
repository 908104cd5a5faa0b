"""Cosine similarity and variance of zeroth-order estimators, full against subspace, with both reference gradients (SubZero's figure).

python -m paper_figs cosine_and_variance
"""

from __future__ import annotations

from matplotlib.figure import Figure

from probes.figures_estimators import subspace
from probes.markdown import number
from probes.records import Estimator, Record
from probes.report import Report

RECORDS = ("estimators-smollm2",)


def draw(records: list[Record]) -> Figure | None:
    return subspace(Report.of(records))


def caption(records: list[Record]) -> str:
    report = Report.of(records)
    base = [e for e in report.all(Estimator) if e.block == e.group == "base" and e.q == 1]
    parts = []
    for e in base:
        projected = e.quantities.get("cosine_sq_projected")
        if projected is not None and e.law.startswith("subzero"):
            parts.append(
                f"{e.law}: {number(e.quantities['cosine_sq'].value)} with the true gradient, "
                f"{number(projected.value)} with its projection"
            )
    d = base[0].d if base else 0
    return (
        f"Mean squared cosine (left) and total variance over the squared gradient norm (right) of one estimate, "
        f"{report.header.model.name}. "
        f"A subspace raises the cosine with the gradient's projection, not with the gradient itself, which stays at 1/d = {number(1 / d)}. "
        f"{'; '.join(parts)}."
    )
