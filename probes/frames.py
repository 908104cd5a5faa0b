"""Records -> pandas tables, tidy: one observation a row, one variable a column."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import pandas as pd

from hybridtheory.estimate import Estimate
from probes.records import Allocation, Budget, Estimator, Rates
from probes.records_smoothness import AtScale, Density

if TYPE_CHECKING:
    from probes.report import Report


def frames(report: Report) -> dict[str, pd.DataFrame]:
    """points (a row per point and block; an estimate x becomes x, x_stderr, x_upper, x_resolved), secants, steps,
    fits, rates; of a run of probe-estimators the tables of `estimators`.
    """
    if report.header.probe == "estimators":
        return estimators(report)
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


def estimators(report: Report) -> dict[str, pd.DataFrame]:
    """estimators: a row per law, block and quantity (value, stderr, predicted, formula; "bias g" and so on are the biases).
    cosines: a row per bin of each law's histogram. budgets: a row per block and mu. published: where MeZO's values of mu fall.
    allocations: a row per block, minibatch and q, with the squared error over |g|^2.
    """
    found = report.all(Estimator)
    rows = [
        {
            "law": e.law, "block": e.block, "group": e.group, "d": e.d, "q": e.q, "n": e.n, "subspace": e.subspace, "reached": e.reached,
            "quantity": name, **vars(c),
        }
        for e in found for name, c in {**e.quantities, **{f"bias {v}": c for v, c in e.bias.items()}}.items()
    ]  # fmt: skip
    bins = [
        {"law": e.law, "block": e.block, "target": c.target, "low": low, "high": high, "count": n}
        for e in found for c in e.cosines for low, high, n in zip(c.edges, c.edges[1:], c.counts, strict=False)
    ]  # fmt: skip
    budgets, published, allocations = [], [], []
    for b in report.all(Budget):
        same = {
            "block": b.block,
            "group": b.group,
            "dtype": b.dtype,
            "direction": b.direction,
            "minibatch": b.minibatch,
        }
        each = zip(b.mu, b.added, b.stderr, b.weights, b.absorbed, strict=True)
        budgets += [
            {**same, "mu": mu, "added": x, "stderr": s, "weights": w, "absorbed": a, **_parts(b, mu)} for mu, x, s, w, a in each
        ]  # fmt: skip
        published += [{"block": b.block, "recommended": b.recommended, **vars(p)} for p in b.published]
    for a in report.all(Allocation):
        allocations += [{"block": a.block, "group": a.group, "rows": n, "q": q, "error": e} for n, q, e in a.errors]
    made = {"estimators": rows, "cosines": bins, "budgets": budgets, "published": published, "allocations": allocations}
    return {name: pd.DataFrame(table) for name, table in made.items()}


def _parts(b: Budget, mu: float) -> dict[str, float]:
    """The fitted parts of what mu adds; nan where no fit was possible."""
    fitted = b.truncation is not None and b.loss_rounding is not None
    return {
        "truncation": (b.truncation or 0.0) * mu**4 if fitted else float("nan"),
        "loss_rounding": (b.loss_rounding or 0.0) / mu**2 if fitted else float("nan"),
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
