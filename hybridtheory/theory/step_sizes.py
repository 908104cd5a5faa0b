"""Learning rates for one block: what each theory prescribes, from which trace, under which hypotheses.

A zeroth-order (ZO) block has `d` parameters, gradient g, Hessian H and, with q averaged Gaussian queries, the
curvature of a step is ((q+1) g'Hg + tr(H) |g|²)/q: it is the trace, not the dimension, that limits the step. The worst
case replaces the trace by d L, which is wrong by orders of magnitude on real models; both are always returned so that
they are printed side by side.

Which trace a rule needs: Identity Q is exact and uses tr(H) as it is, negative eigenvalues included; A0 needs M >= H,
    so
tr(H_+); the edge-of-stability bracket is stated for H >= 0 only. Every step has the units of 1/H. Sources are named
with each rule; "ours" means derived in this project, with constants that no paper states.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from hybridtheory.errors import UserError
from hybridtheory.theory.checks import Hypothesis, count, finite, nonnegative, positive


@dataclass(frozen=True)
class Step:
    """A learning rate with its evidence.

    `uses` names the trace or the end of the spectrum that it rests on, `covers` what `interval` covers (an empty text
    when there is no interval), `hypotheses` what was tested on the way.
    """

    value: float
    theorem: str
    formula: str
    uses: str
    interval: tuple[float, float] | None = None
    covers: str = ""
    hypotheses: tuple[Hypothesis, ...] = ()
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def curvature_per_gradient(d: float, q: int = 1) -> float:
    """(d + q + 1)/q: E‖ĝ‖²/‖g‖² for q averaged Gaussian directions; d may be an effective rank.

    Assumptions: u_k ~ N(0, I) independent, exact directional derivative.
    Statement:   E‖ĝ‖² = ((d + q + 1)/q)‖g‖², and E ĝ'Mĝ <= λ_max(M)((r + q + 1)/q)‖g‖² with r = tr(M)/λ_max(M).
    Reference:   ours (Isserlis); q = 1 gives the d + 2 of Nesterov & Spokoiny type bounds.
    """
    nonnegative("curvature_per_gradient", d=d)
    count("curvature_per_gradient", q=q)
    return (d + q + 1) / q


def worst_case(L: float, d: int, q: int = 1) -> Step:
    """1/(L (d+q+1)/q): the step that the dimension prescribes.

    Assumptions: f is L-smooth (H <= L I everywhere), Gaussian directions, q averaged queries.
    Statement:   the expected descent -η‖g‖² + (η²L/2)((d+q+1)/q)‖g‖² is least at this η, and below 0 up to twice it.
    Reference:   Theorem A0 with r = d (ours).
    """
    positive("worst_case", L=L)
    count("worst_case", d=d)
    return Step(1.0 / (L * curvature_per_gradient(d, q)), "A0, worst case", "1/(L (d+q+1)/q)", "L and the dimension d")


def identity_q_optimum(trace: float, gHg: float, g_sq: float, q: int = 1, trace_se: float = 0.0) -> Step:
    """q/(tr H + (q+1) g'Hg/‖g‖²): the exact minimiser of the expected one-step change of the local quadratic model.

    Assumptions: f quadratic on the scale of a step; Gaussian directions; full batch; any sign of the eigenvalues.
    Statement:   E f(w+) - f(w) = -η‖g‖² + (η²/2)((q+1) g'Hg + tr(H)‖g‖²)/q, least at this η (unbounded unless the
                 bracket is > 0).
    Reference:   Identity Q (ours), exact. The interval covers tr(H) ± 2 standard errors and nothing else.
    """
    finite("identity_q_optimum", trace=trace, gHg=gHg)
    positive("identity_q_optimum", g_sq=g_sq)
    nonnegative("identity_q_optimum", trace_se=trace_se)
    count("identity_q_optimum", q=q)
    bend = trace + (q + 1) * gHg / g_sq
    if bend <= 0:
        raise UserError(
            f"Identity Q has no finite best step: tr H + (q+1) g'Hg/|g|^2 = {bend:.4g} <= 0 (tr H = {trace:.4g}, "
            f"g'Hg/|g|^2 = {gHg / g_sq:.4g}, "
            f"q = {q}): the quadratic model falls for ever here; use the finite-scale rule or A0 with tr(H_+)"
        )
    low, high = bend + 2 * trace_se, bend - 2 * trace_se
    return Step(
        q / bend,
        "Identity Q",
        "q/(tr H + (q+1) g'Hg/|g|^2)",
        "tr(H)",
        (q / low, q / high if high > 0 else math.inf) if trace_se > 0 else None,
        "tr(H) within 2 standard errors, at this point" if trace_se > 0 else "",
    )


def a0_optimum(L: float, trace_plus: float, q: int = 1, trace_plus_se: float = 0.0) -> Step:
    """q/(tr H_+ + (q+1) L): Theorem A0's best noiseless step, 1/(L (r+q+1)/q) with effective rank r = tr(H_+)/L.

    Assumptions: diag(M, L_y I) >= H for a matrix M with λ_max(M) <= L and tr(M) <= r L (M = H_+ where H is constant).
    Statement:   descent coefficient η(2 - ηL(r+q+1)/q) is largest at this η, positive up to twice it.
    Reference:   Theorem A0 (ours). The interval covers tr(H_+) ± 2 standard errors and nothing else.
    """
    positive("a0_optimum", L=L)
    nonnegative("a0_optimum", trace_plus=trace_plus, trace_plus_se=trace_plus_se)
    step = 1.0 / (L * curvature_per_gradient(trace_plus / L, q))
    ends = tuple(q / (max(trace_plus + s * 2 * trace_plus_se, 0.0) + (q + 1) * L) for s in (1, -1))
    return Step(
        step,
        "A0, effective rank",
        "1/(L (r+q+1)/q), r = tr(H_+)/L",
        "tr(H_+) and the upper end L",
        (ends[0], ends[1]) if trace_plus_se > 0 else None,
        "tr(H_+) within 2 standard errors, at this point" if trace_plus_se > 0 else "",
    )


def first_order(L: float, momentum: float = 0.0) -> tuple[Step, Step]:
    """(1/L, 2/L): the best guaranteed step of gradient descent and its stability limit.

    Assumptions: H <= L I on the segment of the step.
    Statement:   f(w+) <= f(w) - η(1 - ηL/2)‖g‖². With heavy-ball momentum β the limit of a quadratic is 2(1+β)/L
                 exactly, and the step with the same drift is (1-β)/L.
    Reference:   textbook (Polyak 1964 for momentum).
    """
    positive("first_order", L=L)
    check_momentum("first_order", momentum)
    return (
        Step((1 - momentum) / L, "descent lemma", "(1-beta)/L", "the upper end L"),
        Step(2 * (1 + momentum) / L, "gradient-descent stability", "2(1+beta)/L", "the upper end L"),
    )


def check_momentum(where: str, momentum: float) -> None:
    """Refuse a momentum outside [0, 1)."""
    nonnegative(where, momentum=momentum)
    if momentum >= 1:
        raise UserError(f"{where} needs momentum in [0, 1), got {momentum:.6g}")


def with_momentum(step: Step, momentum: float) -> Step:
    """The step with the same drift under heavy-ball momentum β (w -= η m, m = β m + ĝ): η(1-β).

    Assumptions: the gradient changes little over 1/(1-β) steps.
    Reference:   textbook; the stability bracket has its own exact correction (`stability_bracket(momentum=)`).
    """
    check_momentum("with_momentum", momentum)
    k = 1 - momentum
    interval = (step.interval[0] * k, step.interval[1] * k) if step.interval else None
    return Step(
        step.value * k,
        f"{step.theorem}, momentum",
        f"(1-beta) * {step.formula}",
        step.uses,
        interval,
        step.covers,
        step.hypotheses,
        f"momentum beta = {momentum:g}",
    )


def noise_limited(delta: float, T: float, L: float, sigma_sq: float, r: float | None, q: int = 1) -> Step:
    """sqrt(2Δ/(T L ((r+q+1)/q) σ²)) for a ZO block, sqrt(2Δ/(T L σ²)) for a first-order one (r = None).

    Args:
        delta: f(w_0) - f* (or an upper bound), units of f.   T: steps.
        sigma_sq: variance of the step's minibatch gradient in this block (σ²/b for b rows), units of ‖g‖².
        r: effective rank tr(H_+)/L, or d for the worst case; None for a first-order block.
    Assumptions: those of Theorem A0.
    Statement:   minimises 2Δ/(ηT) + ηL((r+q+1)/q)σ², the part of A0's bound that survives T -> ∞.
    Reference:   ours, from Theorem A0. It binds when it is below the stability-limited step.
    """
    positive("noise_limited", delta=delta, T=T, L=L, sigma_sq=sigma_sq)
    count("noise_limited", q=q)
    gamma = 1.0 if r is None else curvature_per_gradient(r, q)
    return Step(
        math.sqrt(2 * delta / (T * L * gamma * sigma_sq)),
        "A0, noise-limited",
        "sqrt(2 Delta/(T L sigma^2))" if r is None else "sqrt(2 Delta/(T L ((r+q+1)/q) sigma^2))",
        "the upper end L" if r is None else "tr(H_+) and the upper end L",
    )


def reshuffling(L: float, n: int, d: int | None = None) -> Step:
    """1/(16 n (d+2) L) for a ZO block, 1/(8 n L) for a first-order one (d = None): the range of Theorem D.

    Assumptions: every f_i has -L I <= H <= L I in its block metric; n batches per epoch, without replacement; Gaussian
                 directions.
    Reference:   Theorem D (ours); the shape 1/(L n d) is that of arXiv 2604.09940, whose constants are not known to us.
    """
    positive("reshuffling", L=L)
    count("reshuffling", n=n)
    if d is None:
        return Step(1 / (8 * n * L), "D", "1/(8 n L)", "the upper end L")
    count("reshuffling", d=d)
    return Step(1 / (16 * n * (d + 2) * L), "D", "1/(16 n (d+2) L)", "L and the dimension d")


@dataclass(frozen=True)
class Coupled:
    """Block constants that hold jointly: diag(L_x I, L_y I) >= H, two-sided where A and B are norms."""

    L_x: float
    L_y: float
    keeps_ratio: bool
    note: str = ""


def couple(A: float, B: float, C: float) -> Coupled:
    """L_x = A + C sqrt(A/B), L_y = B + C sqrt(B/A): per-block curvature alone is not a joint bound.

    Args: A, B: upper bounds of λ_max(H_xx), λ_max(H_yy) (or norms, for the two-sided condition). C: ‖H_xy‖.
    Assumptions: none on H beyond those bounds. Where A or B is not positive (concave or flat block) no ratio can be
                 kept: A and B are replaced by max(., 0) and C is added to both.
    Statement:   (L_x - A)(L_y - B) >= C², hence D >= H; L_x <= 2A and L_y <= 2B when H >= 0.
    Reference:   ours (Schur complement).
    """
    finite("couple", A=A, B=B)
    nonnegative("couple", C=C)
    if A > 0 and B > 0:
        return Coupled(A + C * math.sqrt(A / B), B + C * math.sqrt(B / A), True)
    L_x, L_y = max(A, 0.0) + C, max(B, 0.0) + C
    note = f"A = {A:.4g} and B = {B:.4g} are not both positive: L_x = A_+ + C, L_y = B_+ + C; no ratio is kept"
    return Coupled(L_x, L_y, False, note)


def ratio(L_x: float, L_y: float, r: float, q: int = 1) -> float:
    """η_y/η_x = ((r+q+1)/q) L_x/L_y in the stability-limited branch (Theorem A0, ours); r = d is the worst case."""
    positive("ratio", L_x=L_x, L_y=L_y)
    return curvature_per_gradient(r, q) * L_x / L_y


def noise_limited_ratio(L_x: float, L_y: float, r: float, sigma_x_sq: float, sigma_y_sq: float, q: int = 1) -> float:
    """η_y/η_x = sqrt(((r+q+1)/q) L_x σ_x²/(L_y σ_y²)): the square-root law towards which the best ratio shrinks as T
    grows (ours).
    """
    positive("noise_limited_ratio", L_x=L_x, L_y=L_y, sigma_x_sq=sigma_x_sq, sigma_y_sq=sigma_y_sq)
    return math.sqrt(curvature_per_gradient(r, q) * L_x * sigma_x_sq / (L_y * sigma_y_sq))
