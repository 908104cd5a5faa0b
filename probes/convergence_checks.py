"""Measured points and runs -> the constants that theorems are given, and the checks of probe-convergence. No model here."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from hybridtheory.optimizers.catalogue import METHODS
from hybridtheory.smoothness import fit_envelope
from hybridtheory.theory import step_sizes
from hybridtheory.theory.checks import Check, check_bound
from hybridtheory.theory.descent import Mean, compare, rate_exponent
from hybridtheory.theory.held import THEOREMS, evidence, hold
from probes.convergence_settings import PLAIN
from probes.records import Point, Record
from probes.records_convergence import Checked, Constants, Descent, Exponent, Nearby, Trajectory
from probes.records_smoothness import BlockPoint
from probes.setup import Probe

TOLERANCE = {"quadratic": 0.10, "fitted": 0.15}
QUADRATIC_UP_TO = 0.1  # of the rates: as far as infinitesimal curvature is held to its prediction


def _ends(block: BlockPoint) -> float:
    """An upper bound on |H| of one block: both ends, with stated probability where Lanczos ran long enough."""
    found = [block.lam_max, block.lam_min]
    values = [
        abs(e.upper)
        if e is not None and e.upper is not None and math.isfinite(e.upper)
        else abs(e.value)
        if e is not None
        else 0.0
        for e in found
    ]
    return max(values)


def _coupling(p: Point) -> float:
    """An upper bound on ‖H_xy‖, with stated probability where Golub-Kahan ran long enough."""
    if p.coupling is None:
        return 0.0
    upper = p.coupling.upper
    return upper if upper is not None and math.isfinite(upper) else p.coupling.value


def _joint(norms: dict[str, float], names: Sequence[str]) -> dict[str, float]:
    if len(names) < 2:
        return {n: norms[n] for n in names}
    both = step_sizes.couple(norms["base"], norms["peft"], norms["coupling"])
    return {"base": both.L_x, "peft": both.L_y}


def constants(
    probe: Probe, eta: dict[str, float], source: str, measured: Sequence[Point], nearby: Sequence[Nearby],
    runs: Sequence[Trajectory], f_star: float,
) -> Constants:  # fmt: skip
    """The largest of every constant over the points, and the settings that theorems ask for."""
    s = probe.settings
    names = [g.name for g in probe.groups]
    own = [{n: _ends(p.blocks[n]) for n in names} | {"coupling": _coupling(p)} for p in measured]
    norms = {n: max(o[n] for o in own) for n in (*names, "coupling")}
    joint = [_joint(o, names) for o in own]
    L = _joint(norms, names)
    laws = {}
    for n in names:
        u, values = [p.grad_norm for p in measured], [j[n] for j in joint]
        fit = fit_envelope(u, values) if len(u) >= 3 else None
        laws[n] = (fit.L0, fit.L1) if fit is not None and fit.identified else (L[n], 0.0)
    plus = [p.blocks["base"].trace_plus or p.blocks["base"].trace for p in measured if "base" in names]
    bounds = [max(e.value, 0.0) + 2 * (e.stderr or 0.0) if e.upper is None else e.upper for e in plus if e is not None]
    trace = max(bounds, default=0.0)
    law = s.law or ("gaussian" if METHODS[s.method].law is None else s.method)
    fixed = [n for n in names if n not in eta]
    return Constants(
        eta={n: eta.get(n, 0.0) for n in names}, norms=norms, L=L, trace_plus=max(trace, norms.get("base", 0.0)),
        cross_sq=max((x.cross_sq for x in nearby), default=0.0), laws=laws, d={g.name: g.numel for g in probe.groups},
        Delta=runs[0].loss[0] - f_star, f_star=f_star,
        slope_error=max((x.slope_error for x in nearby), default=0.0), mu=s.mu, q=s.q, law=law,
        n=1 if s.whole else len(probe.oracle.batches), sampling=s.order, method=s.method, sgd=s.method in PLAIN, rates_from=source,
        note=f"the method does not move: {', '.join(fixed)}" if fixed else "",
    )  # fmt: skip


def checks(descents: Sequence[Descent], found: Constants, runs: Sequence[Trajectory]) -> Iterator[Record]:
    """Every claim of the run, decided or not."""
    for d in descents:
        for kind, predicted in (
            ("quadratic", Mean(d.quadratic, d.quadratic_stderr, d.n)),
            ("fitted", Mean(d.fitted, d.fitted_stderr, d.n)),
        ):
            words = "Identity Q" if kind == "quadratic" else "the finite-scale curve of other directions"
            check = compare(
                f"one step of {d.what} at {d.factor:g} of the rates (step {d.step}): mean change of the loss as {words} says",
                Mean(d.measured, d.stderr, d.n), predicted, TOLERANCE[kind], d.hypotheses if kind == "quadratic" else (),
                d.broken if kind == "quadratic" else "", kind == "fitted" or d.factor <= QUADRATIC_UP_TO,
            )  # fmt: skip
            yield _checked("descent", kind, check, {"step": float(d.step), "factor": d.factor})
    whole = [r for r in runs if len(r.loss) >= 8 and r.status == "finished"]
    if whole:
        squares = [[sum(v) for v in zip(*r.grad_sq.values(), strict=True)] for r in whole]
        slope = rate_exponent(squares)
        yield Exponent(slope.value, slope.interval, slope.start, slope.runs)
    for r in runs:
        check = check_bound(f"run {r.run} ends at or below the loss at which it starts", r.final - r.loss[0], 0.0)
        yield _checked("run", "descends", check, {"run": float(r.run)})
    seen = evidence(asdict(found), [asdict(r) for r in runs])
    for theorem in THEOREMS:
        for check in hold(seen, theorem):
            yield _checked("bound", theorem, check, {})


def _checked(about: Any, name: str, c: Check, at: dict[str, float]) -> Checked:
    return Checked(
        about, name, c.claim, c.measured, c.relation, c.predicted, c.bound, c.stderr, c.holds, c.hypotheses, c.note, at
    )
