"""Records -> pandas tables, tidy: one observation a row, one variable a column."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import pandas as pd

from probes.records import AtScale, Density, Estimate, Rates

if TYPE_CHECKING:
    from probes.report import Report


def frames(report: Report) -> dict[str, pd.DataFrame]:
    """points (a row per point and block; an estimate x becomes x, x_stderr, x_upper, x_resolved), secants, steps,
    fits, rates.
    """
    groups = {b.name: b.group for b in report.blocks}
    points = []
    for p in report.points:
        for name, block in p.blocks.items():
            row: dict[str, Any] = {"point": p.index, "step": p.step, "loss": p.loss, "full_grad_norm": p.grad_norm}
            row |= {"block": name, "group": groups.get(name, "")}
            for key, item in vars(block).items():
                row |= flat(key, item)
            points.append(row)
    rates = [
        {"rule": r.rule, "where": r.where, "group": group, **({} if rate is None else vars(rate))}
        for r in report.all(Rates)
        for group, rate in (("base", r.base), ("peft", r.peft), ("ratio", r.ratio))
    ]
    steps = [
        {
            "step": s.step,
            "loss": s.loss,
            "accepted": s.accepted,
            **prefix("eta", s.eta),
            **prefix("grad_norm", s.grad_norm),
        }
        for s in report.steps
    ]
    return {
        "points": pd.DataFrame(points),
        "secants": pd.DataFrame([asdict(s) for s in report.secants]),
        "steps": pd.DataFrame(steps),
        "fits": pd.DataFrame([asdict(f) for f in report.fits]),
        "rates": pd.DataFrame(rates),
    }


def prefix(name: str, values: dict[str, float]) -> dict[str, float]:
    return {f"{name}_{key}": v for key, v in values.items()}


def flat(name: str, item: Any) -> dict[str, Any]:
    """The columns of one field of a block: an estimate becomes its value, error, bound and whether it is resolved."""
    if isinstance(item, Estimate):
        return {
            name: item.value,
            f"{name}_stderr": item.stderr,
            f"{name}_lower": item.lower,
            f"{name}_upper": item.upper,
            f"{name}_resolved": item.resolved,
        }
    if isinstance(item, AtScale):
        return {"mu": item.mu, **{k: v for n, e in item.estimates.items() for k, v in flat(f"{n}_at_mu", e).items()}}
    return {} if item is None or isinstance(item, Density) else {name: item}
