"""Report of probe-estimators -> report.md: every measured number beside its closed formula, then the error budget."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from probes.markdown import cost, estimate, interval, number, percent, repeat, table, warnings
from probes.records import Allocation, Budget, Estimator
from probes.records_estimators import Compared

if TYPE_CHECKING:
    from probes.report import Report

NONE = "none known"
# Deviations beyond this many standard errors are set in bold; in a table of a hundred numbers three is nothing.
FAR = 4.0


def text(report: Report) -> str:
    """The whole file."""
    parts = [opening(report), warnings(report)]
    for group in groups(report):
        found = [e for e in report.all(Estimator) if e.block == group]
        parts += [moments(group, found), cosines(found), bias(found)]
    parts += [finer(report), budget(report), allocation(report), formulas(report), cost(report), repeat(report)]
    return "\n".join(line for part in parts for line in part).rstrip() + "\n"


def groups(report: Report) -> list[str]:
    return list(dict.fromkeys(e.group for e in report.all(Estimator)))


def deviation(c: Compared) -> float | None:
    """(measured - predicted) in standard errors."""
    if c.predicted is None or not c.stderr or not math.isfinite(c.stderr):
        return None
    return (c.value - c.predicted) / c.stderr


def measured(c: Compared | None) -> str:
    if c is None:
        return "–"
    return number(c.value) + (f" ± {number(c.stderr, 2)}" if c.stderr else "")


def predicted(c: Compared | None) -> str:
    return "–" if c is None else NONE if c.predicted is None else number(c.predicted)


def far(c: Compared | None) -> str:
    z = None if c is None else deviation(c)
    if z is None:
        return "–"
    return f"**{z:+.1f}**" if abs(z) > FAR else f"{z:+.1f}"


def tested(found: Sequence[Estimator]) -> int:
    """How many measured numbers have a closed form beside them."""
    return sum(deviation(c) is not None for e in found for c in {**e.quantities, **e.bias}.values())


def far_off(found: Sequence[Estimator]) -> list[str]:
    """Those that differ from their closed form by more than FAR standard errors."""
    return [
        f"{n} of {e.law} on {e.block}"
        for e in found
        for n, c in {**e.quantities, **e.bias}.items()
        if abs(deviation(c) or 0.0) > FAR
    ]


def opening(report: Report) -> list[str]:
    head = report.header
    found = report.all(Estimator)
    laws = len({e.law for e in found})
    far = far_off(found)
    verdict = (
        f"{tested(found)} measured numbers have a closed form; all agree with it within {FAR:g} standard errors."
        if not far
        else f"{tested(found)} measured numbers have a closed form; {len(far)} differ from it by more than {FAR:g} standard errors: "
        f"{', '.join(far[:5])}."
    )
    return [
        f"# Zeroth-order estimators of the gradient of `{head.model.name}` on `{head.data.name}`",
        "",
        *(
            []
            if report.finished
            else ["**This run did not finish: what follows is what was measured until it stopped.**", ""]
        ),
        f"{laws} direction laws against the exact gradient of {head.data.rows} rows ({head.model.parameters:,} parameters, "
        f"{head.model.dtype}). "
        "Slopes are exact directional derivatives ⟨∇f, u⟩ (the limit μ → 0); what a finite μ adds stands under “Error budget”. "
        "Everything is divided by ‖∇f‖² of the block. “off by” counts standard errors.",
        verdict,
        "",
    ]


def moments(group: str, found: Sequence[Estimator]) -> list[str]:
    rows = []
    for e in found:
        q = e.quantities
        short = (
            ""
            if e.reached
            else f" (**{percent((q['second_moment'].stderr or 0) / q['second_moment'].value)}, not {percent(e.precision)}**)"
        )
        second = q["second_moment"]
        rows.append(
            [f"`{e.law}`", f"{e.n:,}", measured(second) + short, predicted(second), far(second),
             measured(q.get("variance")), measured(q["mse"])]
        )  # fmt: skip
    d = found[0].d
    size = "base weights" if group == "base" else "PEFT weights"
    return [
        f"## {size[0].upper() + size[1:]}: d = {d:,}, ‖∇f‖ = {number(found[0].grad_norm)}", "",
        "Second moment E‖ĝ‖², total variance E‖ĝ − E ĝ‖² and mean squared error E‖ĝ − ∇f‖², over ‖∇f‖²:", "",
        *table(["law", "estimates", "second moment", "formula", "off by", "variance", "squared error"], rows),
    ]  # fmt: skip


def cosines(found: Sequence[Estimator]) -> list[str]:
    d = found[0].d
    rows, inside = [], []
    for e in found:
        q = e.quantities
        rows.append(
            [f"`{e.law}`", measured(q["cosine"]), predicted(q["cosine"]), far(q["cosine"]),
             measured(scaled(q["cosine_sq"], d)), predicted(scaled(q["cosine_sq"], d)), far(q["cosine_sq"])]
        )  # fmt: skip
        if "captured" in q:
            k = e.subspace or math.nan
            to = q.get("cosine_sq_projected")
            inside.append(
                [f"`{e.law}`", number(k), number(k / d), measured(q["captured"]), measured(scaled(to, k)),
                 predicted(scaled(to, k)), far(to)]
            )  # fmt: skip
    out = [
        "Cosine with the true gradient, and its square in units of 1/d (1 for one direction of any law that does not know the gradient):",
        "",
    ]
    out += table(["law", "E cos", "formula", "off by", "d·E cos²", "formula", "off by"], rows)
    if inside:
        out += [
            "Laws with a subspace of k dimensions: the share ‖P′∇f‖²/‖∇f‖² of the gradient that it captures beside k/d, and the "
            "squared cosine with the *projected* gradient in units of 1/k. Both hold at once: 1/k against the projection, "
            "about 1/d against the gradient.", "",
            *table(["law", "k", "k/d", "captured", "k·E cos² with P′∇f", "formula", "off by"], inside),
        ]  # fmt: skip
    return [
        *out,
        "![Cosine: measured histogram and law](figures/cosines.png)",
        "",
        "![Full against subspace](figures/subspace.png)",
        "",
    ]


def scaled(c: Compared | None, by: float) -> Compared | None:
    if c is None:
        return None
    return Compared(
        c.value * by,
        None if c.stderr is None else c.stderr * by,
        None if c.predicted is None else c.predicted * by,
        c.formula,
    )


def bias(found: Sequence[Estimator]) -> list[str]:
    rows = []
    for e in found:
        fixed = [c for n, c in e.bias.items() if n.startswith("r") and c.stderr]
        largest = max(fixed, key=lambda c: abs(c.value / (c.stderr or 1.0)), default=None)
        rows.append(
            [f"`{e.law}`", measured(e.bias.get("g")), predicted(e.bias.get("g")), measured(e.bias.get("Hg")), measured(largest),
             measured(e.bias.get("norm_sq")), predicted(e.bias.get("norm_sq")), number(e.floor)]
        )  # fmt: skip
    return [
        "Bias ⟨E ĝ − ∇f, v⟩/‖∇f‖ along unit vectors v: the gradient, Hg, and of 8 fixed random ones the one farthest from 0. "
        "‖E ĝ − ∇f‖²/‖∇f‖² comes from products of independent estimates and may be negative. "
        "The norm of a mean of n estimates cannot show a bias below its noise floor, about √(d/n):", "",
        *table(["law", "along g", "formula", "along Hg", "farthest of 8", "‖bias‖²", "formula", "floor of the norm"], rows),
    ]  # fmt: skip


def finer(report: Report) -> list[str]:
    found = [e for e in report.all(Estimator) if e.block != e.group]
    if not found:
        return []
    rows = [
        [f"`{e.block}`", f"{e.d:,}", f"`{e.law}`", measured(e.quantities["second_moment"]), predicted(e.quantities["second_moment"]),
         far(e.quantities["second_moment"]), measured(scaled(e.quantities["cosine_sq"], e.d))]
        for e in found[:120]
    ]  # fmt: skip
    more = f" The first 120 of {len(found)}; all stand in `report.json`." if len(found) > 120 else ""
    return [
        "## Every block for itself", "", f"The same directions, restricted to a block as if it alone were perturbed.{more}", "",
        *table(["block", "d", "law", "second moment", "formula", "off by", "d·E cos²"], rows),
    ]  # fmt: skip


def budget(report: Report) -> list[str]:
    found = report.all(Budget)
    if not found:
        return []
    rows, where, notes = [], [], []
    for b in found:
        best = "–" if b.recommended is None else number(b.recommended)
        rows.append(
            [f"`{b.block}`", b.dtype, number(b.direction), number(b.minibatch), best, interval(b.flat) if b.flat else "nowhere",
             number(b.loss_noise), str(b.n)]
        )  # fmt: skip
        for p in b.published if b.block == b.group else ():
            share = p.added / (b.direction + b.minibatch)
            flat = "outside of the sweep" if math.isnan(p.added) else "yes" if p.flat else "**no**"
            where.append(
                [f"`{b.block}`", f"{p.mu:g} ({p.name})", number(p.added), *split(b, p.mu), number(share), flat]
            )
        if b.note:
            notes.append(f"- `{b.block}`: {b.note}.")
    return [
        "## Error budget", "",
        "Squared error of one estimate (Gaussian, q = 1, central difference) over ‖∇f‖²: directions, a minibatch of "
        f"{found[0].rows} rows, and what μ adds: truncation, rounding of the loss and rounding of the weights. "
        "In the flat range μ adds at most 5 % to the first two; best is where what it adds is least.", "",
        *table(["block", "dtype", "directions", "minibatch", "best μ", "flat from – to", "noise of one loss", "directions measured"], rows),
        "Where the published defaults of μ fall (full fine-tuning, LoRA, prefix), and what they add: as measured, then its parts: "
        "truncation and rounding of the loss from the fit a μ⁴ + b/μ², which holds where μ is small, rounding of the weights, and the "
        "share of the weights that do not move at all:", "",
        *table(
            ["block", "μ", "adds", "truncation", "loss rounded", "weights rounded", "weights that stay", "share of directions + minibatch",
             "in the flat range"], where,
        ),
        *notes, "![Error budget over μ](figures/budget.png)", "",
    ]  # fmt: skip


def split(b: Budget, mu: float) -> list[str]:
    """Truncation, rounding of the loss, rounding of the weights and the share that is absorbed at one mu, between the mus of the sweep."""
    if not b.mu[0] <= mu <= b.mu[-1] * (1 + 1e-9):
        return ["–"] * 4
    at = np.log(mu), np.log(b.mu)
    fitted = b.truncation is not None and b.loss_rounding is not None
    parts = (
        [number((b.truncation or 0.0) * mu**4), number((b.loss_rounding or 0.0) / mu**2)] if fitted else ["no fit"] * 2
    )
    return [*parts, number(float(np.interp(*at, b.weights))), percent(float(np.interp(*at, b.absorbed)))]


def allocation(report: Report) -> list[str]:
    found = report.all(Allocation)
    if not found:
        return []
    rows = [
        [f"`{a.block}`", str(a.rows), str(a.q), number(a.more_rows), number(a.more_queries), number(a.more_steps),
         estimate(a.critical_rows)] for a in found
    ]  # fmt: skip
    return [
        "## Twice the forward passes: more rows, more queries or more steps?", "",
        "Factor on the squared error of what is averaged, from the measured noise of the rows. Rows beyond the critical number "
        "σ²/‖∇f‖² cost forward passes and hardly lower the error, because the directions' part does not depend on them:", "",
        *table(["block", "rows", "q", "twice the rows", "twice the queries", "twice the steps", "critical rows"], rows),
        *[f"- `{a.block}`: {a.note}." for a in found if a.note],
        "One step of a given number of row-evaluations, spent on rows or on queries (squared error over ‖∇f‖²; least in bold):", "",
        *equal_cost([a for a in found if a.block == a.group]),
    ]  # fmt: skip


def equal_cost(found: Sequence[Allocation]) -> list[str]:
    """Rows times queries held fixed, cell by cell of `Allocation.errors`."""
    rows = []
    for a in found:
        totals = sorted({n * q for n, q, _ in a.errors})
        for total in totals:
            same = sorted((q, n, e) for n, q, e in a.errors if n * q == total)
            if len(same) > 1:
                least = min(e for _, _, e in same)
                cells = [f"{n} × {q}: " + (f"**{number(e)}**" if e == least else number(e)) for q, n, e in same]
                rows.append([f"`{a.block}`", str(total), *cells, *["–"] * (3 - len(cells))])
    return table(["block", "rows × q", "", "", ""], rows)


def formulas(report: Report) -> list[str]:
    rows = []
    for e in report.all(Estimator):
        if e.block == groups(report)[0]:
            for name in ("second_moment", "cosine_sq", "cosine_sq_projected"):
                c = e.quantities.get(name)
                if c is not None:
                    rows.append(
                        [
                            f"`{e.law}`",
                            name.replace("_", " "),
                            c.formula if c.predicted is not None else NONE,
                            e.note or "–",
                        ]
                    )
    return ["## Formulas", "", *table(["law", "quantity", "formula", "note"], rows)]
