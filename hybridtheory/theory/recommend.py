"""From measured points to one learning rate a block: every rule that applies, the envelope over points, and which rule
bound.

Curvature grows along a run, so a rule is taken at every point and the least counts; rules that cap another are applied
last, and the answer names the one that bound, with all candidates beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from hybridtheory.errors import UserError
from hybridtheory.theory.checks import finite, nonnegative
from hybridtheory.theory.stability import INDEFINITE, Bracket, stability_bracket
from hybridtheory.theory.step_sizes import Step, a0_optimum, identity_q_optimum, with_momentum, worst_case


@dataclass(frozen=True)
class Curvature:
    """What was measured of one block at one point.

    Args:
        d: number of parameters.
        L: upper bound on the largest eigenvalue of H (Lanczos errs low: use its probabilistic upper bound).
        lambda_max, lambda_min: the two ends as estimated.
        trace: tr(H), with standard error `trace_se`.
        trace_plus: tr(H_+), the sum of the positive eigenvalues (None when no spectral density was taken), with
            `trace_plus_se`.
        gHg, g_sq: g'Hg and |g|² of the block.
        q: queries averaged per step.
        trace_sq: tr(H²) (of H_+ where H is indefinite), when known: it tightens the bracket's upper end.
    """

    d: int
    L: float
    lambda_max: float
    lambda_min: float
    trace: float
    gHg: float
    g_sq: float
    q: int = 1
    trace_plus: float | None = None
    trace_se: float = 0.0
    trace_plus_se: float = 0.0
    trace_sq: float | None = None


def block_rules(c: Curvature, momentum: float = 0.0) -> tuple[dict[str, Step], dict[str, str]]:
    """Every ZO rule that one measured point allows, and for each that it does not, the reason.

    An indefinite H uses its positive part (tr H_+) for A0 and the bracket, and says so; without tr(H_+) those rules
    are refused.
    """
    indefinite = c.lambda_min < -INDEFINITE * abs(c.lambda_max)
    plus = c.trace_plus if c.trace_plus is not None else (None if indefinite else c.trace)
    plus_se = c.trace_plus_se if c.trace_plus is not None else c.trace_se
    steps: dict[str, Step] = {}
    refused: dict[str, str] = {}

    def attempt(name: str, rule: Callable[..., Step | Bracket], *args: Any) -> None:
        try:
            made = rule(*args)
        except UserError as error:
            refused[name] = str(error)
        else:
            steps.update(
                {f"{name}_{end}": getattr(made, end) for end in ("lower", "upper")}
                if isinstance(made, Bracket)
                else {name: made}
            )

    attempt("worst_case", worst_case, c.L, c.d, c.q)
    attempt("identity_q", identity_q_optimum, c.trace, c.gHg, c.g_sq, c.q, c.trace_se)
    if plus is None:
        reason = (
            f"H is indefinite (lambda_min = {c.lambda_min:.4g}, lambda_max = {c.lambda_max:.4g}) and tr(H_+) was not "
            f"measured: take a spectral density"
        )
        refused.update(a0=reason, stability=reason)
    else:
        attempt("a0", a0_optimum, c.L, plus, c.q, plus_se)
        attempt("stability", stability_bracket, max(plus, c.lambda_max), c.lambda_max, 0.0, c.q, momentum, c.trace_sq)
    if momentum:
        steps = {k: s if k.startswith("stability") else with_momentum(s, momentum) for k, s in steps.items()}
    return steps, refused


def envelope(steps: Sequence[Step]) -> Step:
    """The least of one rule's steps over the points of a trajectory: one point is not enough, curvature grows."""
    if not steps:
        raise UserError("envelope needs the steps of at least one point, got none")
    finite("envelope", **{f"step_{i}": s.value for i, s in enumerate(steps)})
    at = min(range(len(steps)), key=lambda i: steps[i].value)
    note = f"envelope minimum: point {at} of {len(steps)}"
    return replace(steps[at], note=f"{steps[at].note}; {note}" if steps[at].note else note)


@dataclass(frozen=True)
class Recommendation:
    """One learning rate: the rule that bound it, and every candidate beside it (so that the cap can be judged)."""

    step: Step
    bound_by: str
    candidates: dict[str, Step]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def capped(first: Step, **caps: Step | None) -> Recommendation:
    """`first`, lowered to the least of the caps that are below it; a None cap is a rule that was not measured."""
    candidates = {"rule": first, **{name: step for name, step in caps.items() if step is not None}}
    name = min(candidates, key=lambda k: candidates[k].value)
    chosen = candidates[name]
    note = chosen.note
    if name != "rule":
        note = f"{first.theorem} alone gives {first.value:.4g}" + (f"; {note}" if note else "")
    return Recommendation(replace(chosen, note=note), chosen.theorem, candidates)


def recommend_base(
    finite_scale_steps: Sequence[Step],
    bracket_lower_ends: Sequence[Step] = (),
    noise: Step | None = None,
    tail: Step | None = None,
) -> Recommendation:
    """η_base: the envelope minimum of the finite-scale rule, lowered to the least cap that is given.

    Args: one finite-scale step a point; lower ends of the stability bracket (tr(H_+) where H is indefinite), for the
          points that have one; the noise-limited step of the block, for minibatch training; the tail-limited step, for
          a horizon of many steps.
    """
    bracket = envelope(bracket_lower_ends) if bracket_lower_ends else None
    return capped(envelope(finite_scale_steps), stability=bracket, noise=noise, tail=tail)


def recommend_peft(coupled_L: Sequence[float], noise: Step | None = None) -> Recommendation:
    """η_peft: the least 1/L_y over the points, L_y after the coupling correction, not above the noise-limited step.

    Points whose L_y is 0 (a flat block: LoRA before its first step) set no limit; at least one must be positive.
    """
    for i, L in enumerate(coupled_L):
        nonnegative("recommend_peft", **{f"L_y at point {i}": L})
    curved = [
        Step(1 / L, "1/L_y after coupling", "1/(B + C sqrt(B/A))", "the upper end of H_yy and the coupling norm")
        for L in coupled_L
        if L > 0
    ]
    if not curved:
        raise UserError(
            f"recommend_peft needs a positive L_y at one point at least, got {list(coupled_L)}: measure after the "
            f"first steps too"
        )
    return capped(envelope(curved), noise=noise)
