"""Learning rates for one block: what each theory prescribes, from which trace, under which hypotheses.

A zeroth-order (ZO) block has `d` parameters, gradient g, Hessian H and, with q averaged Gaussian queries, the
curvature of a step is ((q+1) g'Hg + tr(H) |g|²)/q: it is the trace, not the dimension, that limits the step. The worst
case replaces the trace by d L, which is wrong by orders of magnitude on real models; both are always returned so that
they are printed side by side.

Which trace a rule needs: Identity Q is exact and uses tr(H) as it is, negative eigenvalues included; A0 needs M >= H, so
tr(H_+); the edge-of-stability bracket is stated for H >= 0 only. Every step has the units of 1/H. Sources are named
with each rule; "ours" means derived in this project, with constants that no paper states.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from hybridtheory.errors import UserError
from hybridtheory.theory.checks import Hypothesis, count, finite, nonnegative, positive
from hybridtheory.theory.moments import curvature_moment, fourth


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

    Examples:
        >>> curvature_per_gradient(98), curvature_per_gradient(98, q=9)
        (100.0, 12.0)
    """
    nonnegative("curvature_per_gradient", d=d)
    count("curvature_per_gradient", q=q)
    return (d + q + 1) / q


def worst_case(L: float, d: int, q: int = 1) -> Step:
    """1/(L (d+q+1)/q): the step that the dimension prescribes.

    Assumptions: f is L-smooth (H <= L I everywhere), Gaussian directions, q averaged queries.
    Statement:   the expected descent -η‖g‖² + (η²L/2)((d+q+1)/q)‖g‖² is least at this η, and below 0 up to twice it.
    Reference:   Theorem A0 with r = d (ours).

    Examples:
        >>> worst_case(L=2.0, d=98).value
        0.005
    """
    positive("worst_case", L=L)
    count("worst_case", d=d)
    return Step(1.0 / (L * curvature_per_gradient(d, q)), "A0, worst case", "1/(L (d+q+1)/q)", "L and the dimension d")


def identity_q_optimum(
    trace: float,
    gHg: float,
    g_sq: float,
    q: int = 1,
    trace_se: float = 0.0,
    law: str = "gaussian",
    d: int = 1,
    diag_gHg: float | None = None,
) -> Step:
    """q/(tr H + (q+1) g'Hg/‖g‖²): the exact minimiser of the expected one-step change of the local quadratic model.

    Args: law, d, diag_gHg: for directions that are not gaussian, as in `moments.curvature_moment` (gaussian needs no d).
    Assumptions: f quadratic on the scale of a step; full batch; any sign of the eigenvalues.
    Statement:   E f(w+) - f(w) = -η‖g‖² + (η²/2) E ĝ'Hĝ with E ĝ'Hĝ = ((q+1) g'Hg + tr(H)‖g‖²)/q for gaussian directions;
                 least at η = ‖g‖²/E ĝ'Hĝ, and without a minimum unless E ĝ'Hĝ > 0.
    Reference:   Identity Q (ours), exact. The interval covers tr(H) ± 2 standard errors and nothing else.

    The trace rules and the dimension does not: with tr H = 46 and g'Hg/‖g‖² = 2, whatever d is,

    Examples:
        >>> identity_q_optimum(trace=46.0, gHg=2.0, g_sq=1.0).value
        0.02
    """
    positive("identity_q_optimum", g_sq=g_sq)
    nonnegative("identity_q_optimum", trace_se=trace_se)
    bend = curvature_moment(law, d, g_sq, gHg, trace, diag_gHg, q) / g_sq
    if bend <= 0:
        raise UserError(
            f"Identity Q has no finite best step: E[ghat'H ghat]/|g|^2 = {bend:.4g} <= 0 (tr H = {trace:.4g}, "
            f"g'Hg/|g|^2 = {gHg / g_sq:.4g}, q = {q}): the quadratic model falls for ever here; use the finite-scale "
            f"rule or A0 with tr(H_+)"
        )
    room = 2 * trace_se * fourth(law, d, q).isotropic
    return Step(
        1 / bend,
        "Identity Q",
        "q/(tr H + (q+1) g'Hg/|g|^2)" if law == "gaussian" else "|g|^2/E[ghat'H ghat]",
        "tr(H)",
        (1 / (bend + room), 1 / (bend - room) if bend > room else math.inf) if trace_se > 0 else None,
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

    Examples:
        >>> [step.value for step in first_order(L=4.0)]
        [0.25, 0.5]
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


def noise_limited(Delta: float, T: float, L: float, sigma_sq: float, r: float | None, q: int = 1) -> Step:
    """sqrt(2Δ/(T L ((r+q+1)/q) σ²)) for a ZO block, sqrt(2Δ/(T L σ²)) for a first-order one (r = None).

    Args:
        Delta: f(w_0) - f* (or an upper bound), units of f.   T: steps.
        sigma_sq: variance of the step's minibatch gradient in this block (σ²/b for b rows), units of ‖g‖².
        r: effective rank tr(H_+)/L, or d for the worst case; None for a first-order block.
    Assumptions: those of Theorem A0.
    Statement:   minimises 2Δ/(ηT) + ηL((r+q+1)/q)σ², the part of A0's bound that survives T -> ∞.
    Reference:   ours, from Theorem A0. It binds when it is below the stability-limited step.
    """
    positive("noise_limited", Delta=Delta, T=T, L=L, sigma_sq=sigma_sq)
    count("noise_limited", q=q)
    gamma = 1.0 if r is None else curvature_per_gradient(r, q)
    return Step(
        math.sqrt(2 * Delta / (T * L * gamma * sigma_sq)),
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


def coupled_trace(trace_plus: float, B: float, C: float, L_y: float, d_x: int, d_y: int) -> float:
    """tr(M_x) <= tr(H_xx,+) + C² min(d_x, d_y)/(L_y - B): the trace that Theorem A0 needs once the blocks are coupled.

    Args: trace_plus = tr(H_xx,+); B, C, L_y as in `couple`; pass ‖H_xy‖_F²/C² in place of d_y where the Frobenius norm is known.
    Statement:   M_x = H_xx,+ + H_xy (L_y I - H_yy)^{-1} H_yx has diag(M_x, L_y I) >= H and λ_max(M_x) <= A + C²/(L_y - B), the
                 L_x of `couple`; adding C sqrt(A/B) to every eigenvalue instead would multiply it by d_x.
    Reference:   ours (Schur complement).
    """
    nonnegative("coupled_trace", trace_plus=trace_plus, C=C)
    positive("coupled_trace", d_x=d_x, d_y=d_y)
    if C == 0:
        return trace_plus
    if not L_y > B:
        raise UserError(f"coupled_trace needs L_y > B, got L_y = {L_y:.6g}, B = {B:.6g}: take L_y from couple(A, B, C)")
    return trace_plus + C**2 * min(d_x, d_y) / (L_y - B)


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
