"""Our theorems for the hybrid method as functions: hypotheses checked, the bound by its terms, the quantity that it bounds.

The method: x (d parameters, zeroth-order) and y (first-order) move at the same time, x by -η_x ĝ_x, y by -η_y ∇_y. Every
theorem bounds an average (1/T) Σ_t of c_x‖g_x‖² + c_y‖g_y‖²; `Bound.weights` are (c_x, c_y). Constants are ours, derived and
checked by simulation, and nobody's paper states them; the exact one-step identities are in `one_step`, others' results in
`references`.

Notation: f* = inf f, Δ = f(w_0) - f*; L_x, L_y with diag(L_x I, L_y I) >= Hess f on a region that holds all evaluated points;
σ_x², σ_y² suprema (where said, averages over the run) of (1/n) Σ_i ‖∇_k f_i - ∇_k f‖²; d the size of x.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from scipy.optimize import brentq

from hybridtheory.errors import UserError
from hybridtheory.theory.checks import Hypothesis, at_most, count, gap, inside, nonnegative, positive
from hybridtheory.theory.step_sizes import curvature_per_gradient

# Relative room for rounding when a step is exactly at the end of a theorem's range.
ROOM = 1 + 1e-12


@dataclass(frozen=True)
class Bound:
    """An upper bound by its terms.

    `value` is their sum, `quantity` says what is bounded, `weights` are (c_x, c_y) of the averaged squared gradients where the
    bounded quantity has that form. `constants` says whose they are.
    """

    theorem: str
    quantity: str
    terms: dict[str, float]
    weights: tuple[float, float]
    hypotheses: tuple[Hypothesis, ...]
    constants: str = "ours"

    @property
    def value(self) -> float:
        return math.fsum(self.terms.values())

    def share(self, term: str) -> float:
        """The part of the bound that one term makes up."""
        return self.terms[term] / self.value

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "value": self.value}


def theorem_a0(
    eta_x: float,
    eta_y: float,
    L_x: float,
    L_y: float,
    r: float,
    Delta: float,
    T: int,
    sigma_x_sq: float = 0.0,
    sigma_y_sq: float = 0.0,
    q: int = 1,
) -> Bound:
    """(1/T) Σ E[η_x(2 - η_x L_x R)‖g_x‖² + η_y(2 - η_y L_y)‖g_y‖²] <= 2Δ/T + η_x² L_x R σ_x² + η_y² L_y σ_y², R = (r+q+1)/q.

    Assumptions: rows drawn independently; gaussian directions, exact derivative; a matrix M with diag(M, L_y I) >= H everywhere,
                 λ_max(M) <= L_x, tr M <= r L_x (r = d always allowed). The inequality holds for every step; it says something
                 while both weights are >= 0, so η_x <= 2/(L_x R) and η_y <= 2/L_y are required.
    Reference:   Theorem A0, ours (q = 1: R = r + 2).
    """
    _common("Theorem A0", eta_x, eta_y, L_x, L_y, Delta, T, sigma_x_sq, sigma_y_sq)
    R = curvature_per_gradient(r, q)
    tested = inside(
        "Theorem A0",
        [
            at_most("eta_x <= 2/(L_x (r+q+1)/q)", eta_x, 2 / (L_x * R) * ROOM),
            at_most("eta_y <= 2/L_y", eta_y, 2 / L_y * ROOM),
        ],
        "lower the step, raise q, or measure a smaller L or r",
    )
    terms = {
        "2 Delta/T": 2 * Delta / T,
        "eta_x^2 L_x R sigma_x^2": eta_x**2 * L_x * R * sigma_x_sq,
        "eta_y^2 L_y sigma_y^2": eta_y**2 * L_y * sigma_y_sq,
    }
    weights = (eta_x * (2 - eta_x * L_x * R), eta_y * (2 - eta_y * L_y))
    return Bound("Theorem A0", "mean over t of E[c_x |g_x|^2 + c_y |g_y|^2]", terms, weights, tested)


def theorem_a(
    eta_x: float,
    eta_y: float,
    L_x: float,
    L_y: float,
    d: int,
    Delta: float,
    T: int,
    sigma_x_sq: float = 0.0,
    sigma_y_sq: float = 0.0,
    mu: float = 0.0,
    L_m: float = 0.0,
) -> Bound:
    """(1/T) Σ E[η_x‖g_x‖² + η_y‖g_y‖²] <= 2Δ/T + 2 L_x η_x²(d+2)σ_x² + L_y η_y² σ_y² + ½ η_x mu² L_m² (d+2)³.

    Assumptions: as A0, but a finite difference, forward or central, with step mu; every f_i has an x-gradient with Lipschitz
                 constant L_m; η_x <= 1/(4 L_x (d+2)), η_y <= 1/L_y.
    Reference:   Theorem A, ours.
    """
    _common("Theorem A", eta_x, eta_y, L_x, L_y, Delta, T, sigma_x_sq, sigma_y_sq)
    count("Theorem A", d=d)
    nonnegative("Theorem A", mu=mu, L_m=L_m)
    tested = inside(
        "Theorem A",
        [
            at_most("eta_x <= 1/(4 L_x (d+2))", eta_x, ROOM / (4 * L_x * (d + 2))),
            at_most("eta_y <= 1/L_y", eta_y, ROOM / L_y),
        ],
        "lower the step; Theorem A0 has a wider range for exact derivatives",
    )
    terms = {
        "2 Delta/T": 2 * Delta / T,
        "2 L_x eta_x^2 (d+2) sigma_x^2": 2 * L_x * eta_x**2 * (d + 2) * sigma_x_sq,
        "L_y eta_y^2 sigma_y^2": L_y * eta_y**2 * sigma_y_sq,
        "eta_x mu^2 L_m^2 (d+2)^3/2": 0.5 * eta_x * mu**2 * L_m**2 * (d + 2) ** 3,
    }
    return Bound("Theorem A", "mean over t of E[c_x |g_x|^2 + c_y |g_y|^2]", terms, (eta_x, eta_y), tested)


def gradient_radius(law: Callable[[float], float], F: float) -> float:
    """G = sup{u >= 0: u² <= 2 l(2u) F}: no gradient is larger where f - f* <= F, for a sub-quadratic law l.

    Statement: G = 2qF + sqrt(4q²F² + 2pF) for l(u) = p + qu. Reference: Li et al. 2023 (arXiv 2306.01264), Corollary 3.6.
    Raises:    UserError when no upper end is found below 1e30 (l is not sub-quadratic, or not finite).
    """
    nonnegative("gradient_radius", F=F)
    if F == 0:
        return 0.0

    def excess(u: float) -> float:
        return u**2 - 2 * law(2 * u) * F

    # Sub-quadratic: positive for all large u. Start far out and come in, so that the *last* sign change is the one found.
    top = 1e30
    if not excess(top) > 0:
        raise UserError(f"l(u) is not sub-quadratic: u^2 <= 2 l(2u) F still holds at u = 1e30 (F = {F:.4g})")
    while top > 1e-150 and excess(top / 2) > 0:
        top /= 2
    return float(brentq(excess, top / 2, top, rtol=1e-13)) if excess(top / 2) < 0 else top / 2


@dataclass(frozen=True)
class PathwiseBound:
    """Theorem C': what holds surely along every run. `loss_gap` bounds f - f*, `gradient` bounds ‖g‖ (= G)."""

    loss_gap: float
    gradient: float
    L_x: float
    L_y: float
    sure: Bound
    expected: Bound


def theorem_c(
    eta_x: float,
    eta_y: float,
    law_x: Callable[[float], float],
    law_y: Callable[[float], float],
    d: int,
    Delta: float,
    T: int,
    mu: float = 0.0,
) -> PathwiseBound:
    """Generalized smoothness, full batch, directions on the sphere: bounds that hold on every run.

    Assumptions: -D <= H <= D, D = diag(l_x(‖g‖) I, l_y(‖g‖) I), l non-decreasing and sub-quadratic; u uniform with ‖u‖ = √d;
                 forward or central differences with mu <= 2 sqrt(Δ/(T L_x d)); η_x <= 1/(2 d L_x), η_y <= 1/L_y where
                 F = 2Δ, G = `gradient_radius`(max(l_x, l_y), F), L_x = l_x(2G), L_y = l_y(2G).
    Statement:   surely f(w_t) - f* <= 3Δ/2, ‖g_t‖ <= G, ‖g_x‖²/L_x + ‖g_y‖²/L_y <= 2(f - f*), and
                 (1/T) Σ [η_x D_t²/4 + η_y‖g_y‖²/2] <= Δ/T + η_x mu² L_x² d²/4 with D_t the measured slope; in expectation
                 (1/T) Σ E[η_x‖g_x‖²/8 + η_y‖g_y‖²/2] <= Δ/T + (5/16) η_x mu² L_x² d².
    Reference:   Theorem C', ours.
    """
    gap("Theorem C'", Delta)
    positive("Theorem C'", eta_x=eta_x, eta_y=eta_y, Delta=Delta)
    nonnegative("Theorem C'", mu=mu)
    count("Theorem C'", d=d, T=T)
    G = gradient_radius(lambda u: max(law_x(u), law_y(u)), 2 * Delta)
    L_x, L_y = law_x(2 * G), law_y(2 * G)
    positive("Theorem C'", L_x=L_x, L_y=L_y)
    tested = inside(
        "Theorem C'",
        [
            at_most("mu <= 2 sqrt(Delta/(T L_x d))", mu, 2 * math.sqrt(Delta / (T * L_x * d)) * ROOM),
            at_most("eta_x <= 1/(2 d L_x)", eta_x, ROOM / (2 * d * L_x)),
            at_most("eta_y <= 1/L_y", eta_y, ROOM / L_y),
        ],
        f"here G = {G:.4g}, L_x = {L_x:.4g}, L_y = {L_y:.4g}",
    )
    truncation = eta_x * mu**2 * L_x**2 * d**2
    start = {"Delta/T": Delta / T}
    sure = Bound(
        "Theorem C' (every run)",
        "mean over t of c_x D_t^2 + c_y |g_y|^2",
        {**start, "eta_x mu^2 L_x^2 d^2/4": truncation / 4},
        (eta_x / 4, eta_y / 2),
        tested,
    )
    expected = Bound(
        "Theorem C' (expectation)",
        "mean over t of E[c_x |g_x|^2 + c_y |g_y|^2]",
        {**start, "5 eta_x mu^2 L_x^2 d^2/16": 5 * truncation / 16},
        (eta_x / 8, eta_y / 2),
        tested,
    )
    return PathwiseBound(1.5 * Delta, G, L_x, L_y, sure, expected)


def theorem_d(
    eta_x: float,
    eta_y: float,
    L_x: float,
    L_y: float,
    d: int,
    n: int,
    Delta: float,
    T: int,
    sigma_x_sq: float = 0.0,
    sigma_y_sq: float = 0.0,
) -> Bound:
    """Random reshuffling: (1/T) Σ E[η_x‖g_x‖² + η_y‖g_y‖²] over epoch starts <= 4Δ/(nT) + 12.8 η_x² L_x (d+1) σ_x²
    + 6.4 n max(η_x L_x, η_y L_y)(η_x² L_x σ_x² + η_y² L_y σ_y²).

    Assumptions: T epochs of n rows without replacement; -D <= Hess f_i <= D for every f_i, D = diag(L_x I, L_y I); gaussian
                 directions with exact derivative (or quadratic f_i and central differences); η_x <= 1/(16 n (d+2) L_x),
                 η_y <= 1/(8 n L_y). σ_k² may be averages over the epoch starts.
    Reference:   Theorem D, ours; the shape of the steps is that of arXiv 2604.09940.
    """
    _common("Theorem D", eta_x, eta_y, L_x, L_y, Delta, T, sigma_x_sq, sigma_y_sq)
    count("Theorem D", d=d, n=n)
    tested = inside(
        "Theorem D",
        [
            at_most("eta_x <= 1/(16 n (d+2) L_x)", eta_x, ROOM / (16 * n * (d + 2) * L_x)),
            at_most("eta_y <= 1/(8 n L_y)", eta_y, ROOM / (8 * n * L_y)),
        ],
        "lower the step",
    )
    second_order = 6.4 * n * max(eta_x * L_x, eta_y * L_y)
    terms = {
        "4 Delta/(n T)": 4 * Delta / (n * T),
        "12.8 eta_x^2 L_x (d+1) sigma_x^2": 12.8 * eta_x**2 * L_x * (d + 1) * sigma_x_sq,
        "6.4 n gamma eta_x^2 L_x sigma_x^2": second_order * eta_x**2 * L_x * sigma_x_sq,
        "6.4 n gamma eta_y^2 L_y sigma_y^2": second_order * eta_y**2 * L_y * sigma_y_sq,
    }
    return Bound("Theorem D", "mean over epoch starts of E[c_x |g_x|^2 + c_y |g_y|^2]", terms, (eta_x, eta_y), tested)


def with_probability(bound: Bound, delta_probability: float) -> Bound:
    """Markov: with probability >= 1 - delta_probability the average itself is below the bound of its expectation
    divided by delta_probability."""
    if not 0 < delta_probability < 1:
        raise UserError(f"a failure probability must lie in (0, 1), got {delta_probability:.6g}")
    terms = {name: value / delta_probability for name, value in bound.terms.items()}
    name = f"{bound.theorem}, probability {1 - delta_probability:g}"
    return Bound(name, bound.quantity.replace("E[", "["), terms, bound.weights, bound.hypotheses, bound.constants)


def _common(
    where: str, eta_x: float, eta_y: float, L_x: float, L_y: float, Delta: float, T: int, sx: float, sy: float
) -> None:
    # A zero rate freezes a block: the theorem then speaks of the other one.
    gap(where, Delta)
    nonnegative(where, eta_x=eta_x, eta_y=eta_y, sigma_x_sq=sx, sigma_y_sq=sy)
    positive(where, L_x=L_x, L_y=L_y, eta=max(eta_x, eta_y))
    count(where, T=T)
