"""Measured points -> learning rates by every rule, at the first point and as the envelope over the trajectory. No model here."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from hybridtheory.errors import UserError
from hybridtheory.estimate import Estimate
from hybridtheory.theory import finite_scale as finite
from hybridtheory.theory import recommend, stability, step_sizes
from hybridtheory.theory.step_sizes import Step
from probes.records import Point, Rates, Recommendation
from probes.records_parts import Interval
from probes.records_smoothness import BlockPoint, Rate

# A rule gives a step for the base, a step for the adapter, or the reason why it cannot.
Given = Step | str
RULES = ("worst_case", "measured", "noise_limited", "finite_scale", "tail")
NO_TAIL = "a first-order step has no random tail"
PAIRED = "the ends combine as if both were off in the least favourable way"


def rates(points: Sequence[Point], sizes: dict[str, int], q: int, batch_size: int, steps: int) -> list[Rates]:
    """Every rule at the first point and over all of them. ``sizes``: d of "base" and "peft" (those that were measured)."""
    found = []
    for rule in RULES:
        given = [_rule(rule, p, points[0].loss, sizes, q, batch_size, steps) for p in points]
        for where, chosen in (("first", given[:1]), ("envelope", given)):
            base = _envelope([g.get("base") for g in chosen])
            peft = _envelope([g.get("peft") for g in chosen])
            found.append(Rates(rule, where, base, peft, _ratio(base, peft)))  # type: ignore[arg-type]
    return found


def recommendation(
    points: Sequence[Point], sizes: dict[str, int], q: int, batch_size: int, steps: int, mu: float
) -> Recommendation:
    """What trainer.toml carries: the finite-scale rule's envelope below the stability bracket, 1/L_y after coupling, both below the
    noise-limited rates where those bind."""
    noise = [_rule("noise_limited", p, points[0].loss, sizes, q, batch_size, steps) for p in points]
    base = peft = None
    bound: dict[str, str] = {}
    if "base" in sizes:
        finite = [s for p in points if isinstance(s := _finite_scale(p, "base"), Step)]
        brackets = [s for p in points if isinstance(s := bracket_lower(p, q), Step)]
        caps = _steps([n.get("base") for n in noise])
        cap = recommend.envelope(caps) if caps else None
        if finite:
            chosen = recommend.recommend_base(finite, brackets, cap)
            uncapped = "" if brackets else "tr(H_+) was not measured, so the stability bracket does not cap it"
            base, bound["base"] = _rate(chosen.step, uncapped), chosen.bound_by
        elif brackets:
            chosen = recommend.capped(recommend.envelope(brackets), noise=cap)
            base = _rate(chosen.step, "the finite-scale rule found no decrease at any point")
            bound["base"] = chosen.bound_by
        else:
            base = Rate(None, note="neither the finite-scale rule nor the stability bracket could be evaluated")
    if "peft" in sizes:
        limits = [joint["peft"] for p in points if (joint := coupled(p)) is not None]
        caps = _steps([n.get("peft") for n in noise])
        try:
            chosen = recommend.recommend_peft(limits, recommend.envelope(caps) if caps else None)
            peft, bound["peft"] = _rate(chosen.step), chosen.bound_by
        except UserError as error:
            peft = Rate(None, note=str(error))
    settings = {"mu": mu, "q": q, "law": "gaussian", "batch_size": batch_size, "steps": steps}
    ratio = _ratio(base, peft)
    if ratio is not None and ratio.value is not None:
        bound["ratio"] = f"{bound['peft']} over {bound['base']}"
    return Recommendation(base, peft, ratio, bound, settings)


def upper_end(point: BlockPoint) -> float:
    """The upper bound on lambda_max that holds with stated probability; nan where Lanczos ran too short to have one."""
    top = point.lam_max
    return top.upper if top is not None and top.upper is not None and math.isfinite(top.upper) else math.nan


def coupled(point: Point) -> dict[str, float] | None:
    """L_x and L_y that hold jointly: upper ends of both groups, corrected for the coupling between them."""
    tops: dict[str, float] = {name: upper_end(point.blocks[name]) for name in ("base", "peft") if name in point.blocks}
    if any(math.isnan(top) for top in tops.values()):
        return None
    if point.coupling is None or len(tops) < 2:
        return tops
    bound = point.coupling.upper
    norm = bound if bound is not None and math.isfinite(bound) else point.coupling.value
    joint = step_sizes.couple(tops["base"], tops["peft"], norm)
    return {"base": joint.L_x, "peft": joint.L_y}


def bracket_lower(point: Point, q: int) -> Given:
    """The lower end of the edge-of-stability bracket of the positive part of H_xx."""
    x = point.blocks["base"]
    if x.trace_plus is None or x.lam_max is None:
        return "tr(H_+) was not measured at this point"
    top = upper_end(x)
    top = top if math.isfinite(top) else x.lam_max.value
    plus, note = _plus(x.trace_plus)
    found = _attempt(lambda: stability.stability_bracket(max(plus, top), top, 0.0, q).lower)
    return found if isinstance(found, str) else replace(found, note=note)


def _plus(trace: Estimate) -> tuple[float, str]:
    """tr(H_+) as a rule that caps takes it. A cap from a number that is not resolved would bind for no reason: the least that it can
    be caps no more than it must."""
    if trace.resolved:
        return trace.value, ""
    least = trace.lower or 0.0
    return least, f"tr(H_+) is not resolved: the least it can be, {least:.3g}, is used"


def _rule(
    rule: str, point: Point, first_loss: float, sizes: dict[str, int], q: int, batch_size: int, steps: int
) -> dict[str, Given]:
    limits = coupled(point)
    if rule == "finite_scale":
        return {g: _finite_scale(point, g) for g in sizes}
    if rule == "tail":
        return {g: _tail(point, steps, batch_size, q) if g == "base" else NO_TAIL for g in sizes}
    if limits is None:
        return dict.fromkeys(sizes, "Lanczos ran too short for an upper bound on the spectrum: raise --max-steps")
    made: dict[str, Given] = {}
    for group, d in sizes.items():
        block, L = point.blocks[group], limits[group]
        if rule == "worst_case":
            zeroth = group == "base"
            made[group] = _attempt(step_sizes.worst_case, L, d, q) if zeroth else _attempt(_first_order, L)
        elif rule == "measured":
            made[group] = _measured(block, q) if group == "base" else _coupled_peft(point, L)
        else:
            made[group] = _noise_limited(block, L, first_loss, steps, batch_size, q, group == "base")
    return made


def _measured(x: BlockPoint, q: int) -> Given:
    if x.trace is None or x.gHg is None or x.grad_norm == 0:
        return "the trace or the gradient was not measured at this point"
    # Probe vectors and the choice of rows are independent sources of error in the trace.
    error = math.hypot(x.trace.stderr or 0.0, x.rows_stderr or 0.0)
    g_sq = x.grad_norm**2
    step = _attempt(step_sizes.identity_q_optimum, x.trace.value, x.gHg.value * g_sq, g_sq, q, error)
    if isinstance(step, str) or step.interval is None:
        return step
    covers = "probe vectors and rows (jackknife over micro-batches)" if x.rows_stderr is not None else "probe vectors"
    return Step(**{**step.__dict__, "covers": f"the trace within 2 standard errors: {covers}; at one point"})


def _first_order(L: float) -> Step:
    return step_sizes.first_order(L)[0]


def _coupled_peft(point: Point, L: float) -> Given:
    step = _attempt(_first_order, L)
    if isinstance(step, str):
        return step
    own = upper_end(point.blocks["peft"])
    note = f"L_y = {L:.4g} after coupling ({own:.4g} alone)" if point.coupling is not None else f"L_y = {L:.4g}"
    top = point.blocks["peft"].lam_max
    # From the bound (which holds with its stated probability) down to the Ritz value, below which the largest eigenvalue is not.
    interval = (1 / L, 1 / top.value) if top is not None and top.value > 0 else None
    return Step(
        step.value, "1/L_y after coupling", "1/(B + C sqrt(B/A))", "the upper end of H_yy and the coupling norm", interval,
        "from the probable upper bound of the largest eigenvalue to its Ritz value; at one point" if interval else "", note=note,
    )  # fmt: skip


def _noise_limited(x: BlockPoint, L: float, loss: float, steps: int, batch_size: int, q: int, zeroth: bool) -> Given:
    if x.noise is None or not math.isfinite(x.noise.value):
        return "the minibatch noise was not measured: it needs at least two micro-batches"
    if zeroth and x.trace_plus is None:
        return "tr(H_+) was not measured at this point"
    plus, caution = _plus(x.trace_plus) if zeroth and x.trace_plus is not None else (0.0, "")
    r = max(plus / L, 1.0) if zeroth else None
    step = _attempt(step_sizes.noise_limited, loss, steps, L, x.noise.value / batch_size, r, q)
    if isinstance(step, str):
        return step
    note = f"Delta is the loss at the start, {loss:.4g}: an upper bound of f(w_0) - f*" + (
        f"; {caution}" if caution else ""
    )
    interval = None
    if x.noise.stderr is not None and x.noise.value > 0:
        spread = 2 * x.noise.stderr / x.noise.value
        low = step.value / math.sqrt(1 + spread)
        interval = (low, step.value / math.sqrt(1 - spread) if spread < 1 else math.inf)
    covers = "the minibatch noise within 2 standard errors; at one point" if interval else ""
    return Step(**{**step.__dict__, "note": note, "interval": interval, "covers": covers})


def _finite_scale(point: Point, group: str) -> Given:
    found = point.finite_scale.get(group)
    if found is None:
        return "no finite change of the loss was measured at this point"
    zeroth = group == "base"
    formula = "argmin_eta E_u f(w - eta c u) - f(w)" if zeroth else "argmin_eta f(y - eta g_y)"
    covers = f"sampling of {found.n} directions (95 % bootstrap); at one point" if found.interval else ""
    return Step(
        found.eta_star,
        "finite-scale rule",
        formula,
        "forward passes only: no trace",
        found.interval,
        covers,
        note=found.note,
    )


def _tail(point: Point, steps: int, batch_size: int, q: int) -> Given:
    """None of the planned steps leaves the distance up to which phi is quadratic, with probability 0.9. Compared, not recommended."""
    phi, x = point.phi.get("base"), point.blocks["base"]
    if phi is None or x.grad_norm == 0:
        return "phi(delta) or the gradient was not measured at this point"
    # Below the first rung that is resolved the curve says nothing, and nothing can be compared with it.
    first = next((i for i, (m, s) in enumerate(zip(phi.mean, phi.stderr, strict=True)) if 2 * s <= abs(m)), None)
    if first is None or first + 2 > len(phi.delta):
        return "phi(delta) was not resolved at two displacements at least"
    deltas, mean = phi.delta[first:], phi.mean[first:]
    found = _attempt_scale(deltas, mean)
    if isinstance(found, str):
        return found
    scale, reached = found
    noise = x.noise.value / batch_size if x.noise is not None and math.isfinite(x.noise.value) else 0.0
    step = _attempt(finite.tail_limited, scale, x.grad_norm**2, steps, 0.1, noise, q)
    if isinstance(step, str) or reached:
        return step
    return replace(step, note=f"{step.note}; phi stays quadratic as far as it was measured, so the rate may be larger")


def _attempt_scale(deltas: list[float], mean: list[float]) -> tuple[float, bool] | str:
    try:
        return finite.flat_scale(deltas, [mean] * 2, [mean] * 2)  # the curve of the mean: its directions are not kept
    except UserError as error:
        return str(error)


def _attempt(rule: Callable[..., Step], *args: Any) -> Given:
    try:
        return rule(*args)
    except UserError as error:
        return str(error)


def _steps(given: Sequence[Given | None]) -> list[Step]:
    return [g for g in given if isinstance(g, Step)]


def _envelope(given: Sequence[Given | None]) -> Rate | None:
    """The least step over the points that have one; a Rate without a value, with the reason, where none has."""
    if all(g is None for g in given):
        return None
    steps = _steps(given)
    if not steps:
        return Rate(None, note=next(g for g in given if isinstance(g, str)))
    if len(given) == 1:
        return _rate(steps[0])
    missing = len(given) - len(steps)
    return _rate(recommend.envelope(steps), f"{missing} of {len(given)} points have no such step" if missing else "")


def _rate(step: Step, more: str = "") -> Rate:
    return Rate(
        step.value,
        step.interval,
        step.covers,
        step.formula,
        step.theorem,
        step.uses,
        step.hypotheses,
        "; ".join(n for n in (step.note, more) if n),
    )


def _ratio(base: Rate | None, peft: Rate | None) -> Rate | None:
    if base is None or peft is None:
        return None
    if base.value is None or peft.value is None or base.value == 0:
        return Rate(None, note=base.note if base.value is None else peft.note)
    interval: Interval | None = None
    if base.interval is not None or peft.interval is not None:
        b, p = base.interval or (base.value, base.value), peft.interval or (peft.value, peft.value)
        interval = (p[0] / b[1] if math.isfinite(b[1]) else 0.0, p[1] / b[0] if b[0] > 0 else math.inf)
    return Rate(
        peft.value / base.value, interval, PAIRED if interval else "", "eta_peft / eta_base", base.theorem, base.uses,
        note=f"{peft.theorem} over {base.theorem}",
    )  # fmt: skip
