"""Theorems of others, with the constants of their papers, to set beside ours.

Each docstring says whether the text was read or recalled, and what we proved again ourselves. The O(.) constants of the hybrid
paper (arXiv 2604.09940) are not known: it appears here by its exponents only, and no number of ours is printed as the paper's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from hybridtheory.errors import UserError
from hybridtheory.theory.checks import at_least, at_most, count, gap, inside, nonnegative, positive
from hybridtheory.theory.convergence import ROOM, Bound, gradient_radius


def sgd(eta: float, L: float, Delta: float, T: int, sigma_sq: float = 0.0) -> Bound:
    """(1/T) Σ E‖∇f‖² <= 2Δ/(ηT) + ηLσ² for η <= 1/L: textbook (Ghadimi & Lan 2013), re-derived; FO block alone."""
    positive("the SGD reference", eta=eta, L=L)
    gap("the SGD reference", Delta)
    nonnegative("the SGD reference", sigma_sq=sigma_sq)
    count("the SGD reference", T=T)
    tested = inside("the SGD reference", [at_most("eta <= 1/L", eta, ROOM / L)], "lower eta")
    terms = {"2 Delta/(eta T)": 2 * Delta / (eta * T), "eta L sigma^2": eta * L * sigma_sq}
    return Bound("SGD", "mean over t of E|g|^2", terms, (0.0, 1.0), tested, "textbook")


def random_reshuffling(gamma: float, L: float, n: int, Delta: float, T: int, B_sq: float = 0.0) -> Bound:
    """min_t E‖∇f‖² <= 12Δ/(γnT) + 2γ²L²nB² for γ <= 1/(2nL), T epochs, (1/n) Σ‖∇f_i‖² <= B² + ‖∇f‖².

    Reference: Mishchenko, Khaled & Richtárik 2020, Theorem 4 with A = 0 (from memory); first-order block alone.
    """
    positive("the reshuffling reference", gamma=gamma, L=L)
    gap("the reshuffling reference", Delta)
    nonnegative("the reshuffling reference", B_sq=B_sq)
    count("the reshuffling reference", n=n, T=T)
    limit = ROOM / (2 * n * L)
    tested = inside("the reshuffling reference", [at_most("gamma <= 1/(2 n L)", gamma, limit)], "lower gamma")
    terms = {
        "12 Delta/(gamma n T)": 12 * Delta / (gamma * n * T),
        "2 gamma^2 L^2 n B^2": 2 * gamma**2 * L**2 * n * B_sq,
    }
    return Bound("random reshuffling", "min over epochs of E|g|^2", terms, (0.0, 1.0), tested, "paper (from memory)")


def li_convex(law: Callable[[float], float], g0_norm: float, eta: float, distance_sq: float, T: int) -> Bound:
    """Gradient descent on a convex l-smooth f: gradient norms never increase, and f(w_T) - f* <= ‖w_0 - w*‖²/(2ηT).

    Assumptions: l-smooth in the sense ‖H‖ <= l(‖g‖); with a = G = ‖g_0‖ that is (r, m)-smooth with m(G) = l(2G), r(G) = G/l(2G),
                 so the step range min{1/m(G), r(G)/(2G)} is 1/(2 l(2G)).
    Reference:   Li et al. 2023 (arXiv 2306.01264), Theorem 4.2 (step range read; the rate recalled, classical for L-smooth f).
    """
    positive("Li et al. Theorem 4.2", g0_norm=g0_norm, eta=eta)
    nonnegative("Li et al. Theorem 4.2", distance_sq=distance_sq)
    count("Li et al. Theorem 4.2", T=T)
    m = law(2 * g0_norm)
    positive("Li et al. Theorem 4.2", l_of_2G=m)
    tested = inside("Li et al. Theorem 4.2", [at_most("eta <= 1/(2 l(2G))", eta, ROOM / (2 * m))], "lower eta")
    terms = {"|w_0 - w*|^2/(2 eta T)": distance_sq / (2 * eta * T)}
    return Bound("Li et al. 4.2", "f(w_T) - f*", terms, (0.0, 0.0), tested, "paper (rate from memory)")


@dataclass(frozen=True)
class GeneralizedBound:
    """A bound under generalized smoothness with the gradient radius G and L = l(2G) that it rests on."""

    gradient: float
    L: float
    bound: Bound


def li_nonconvex(law: Callable[[float], float], eta: float, Delta: float, T: int) -> GeneralizedBound:
    """Gradient descent, non-convex: with G from F = Δ, L = l(2G), η <= 1/L: ‖g_t‖ <= G and (1/T) Σ‖g‖² <= 2Δ/(ηT).

    Reference: Li et al. 2023, Theorem 5.2 (read; the constant 2 is the classical one).
    """
    gap("Li et al. Theorem 5.2", Delta)
    positive("Li et al. Theorem 5.2", eta=eta, Delta=Delta)
    count("Li et al. Theorem 5.2", T=T)
    G = gradient_radius(law, Delta)
    L = law(2 * G)
    tested = inside(
        "Li et al. Theorem 5.2", [at_most("eta <= 1/l(2G)", eta, ROOM / L)], f"here G = {G:.4g}, l(2G) = {L:.4g}"
    )
    bound = Bound(
        "Li et al. 5.2", "mean over t of |g|^2", {"2 Delta/(eta T)": 2 * Delta / (eta * T)}, (0, 1), tested, "paper"
    )
    return GeneralizedBound(G, L, bound)


def li_sgd(
    law: Callable[[float], float], eta: float, Delta: float, sigma: float, T: int, eps: float, delta_probability: float
) -> GeneralizedBound:
    """SGD with bounded variance: with probability >= 1 - δ all ‖g_t‖ <= G and (1/T) Σ‖g_t‖² <= ε².

    Assumptions: F = 8(Δ + σ)/δ, G from F, L = l(2G), η <= min{1/(2L), 1/(4G√T)}, T >= F/(η ε²).
    Reference:   Li et al. 2023, Theorem 5.3 (read). σ enters F as it stands there, although its units are those of a gradient.
    """
    _failure(delta_probability)
    gap("Li et al. Theorem 5.3", Delta)
    positive("Li et al. Theorem 5.3", eta=eta, Delta=Delta, eps=eps)
    nonnegative("Li et al. Theorem 5.3", sigma=sigma)
    count("Li et al. Theorem 5.3", T=T)
    F = 8 * (Delta + sigma) / delta_probability
    G = gradient_radius(law, F)
    L = law(2 * G)
    tested = inside(
        "Li et al. Theorem 5.3",
        [
            at_most("eta <= 1/(2 l(2G))", eta, ROOM / (2 * L)),
            at_most("eta <= 1/(4 G sqrt(T))", eta, ROOM / (4 * G * math.sqrt(T))),
            at_least("T >= F/(eta eps^2)", T * ROOM, F / (eta * eps**2)),
        ],
        f"here F = {F:.4g}, G = {G:.4g}, l(2G) = {L:.4g}",
    )
    return GeneralizedBound(
        G, L, Bound("Li et al. 5.3", "mean over t of |g|^2", {"eps^2": eps**2}, (0, 1), tested, "paper")
    )


def mezo_gamma(d: int, r: float, n: int = 1) -> float:
    """γ = (dr + d - 2)/(n(d+2)) + 1: how much n-SPSA on the sphere slows SGD where the Hessian has effective rank r.

    Assumptions: E ĝ'Hĝ <= γ ‖H‖ ‖g‖² for directions of norm √d and tr H <= r‖H‖ near the point.
    Reference:   MeZO (arXiv 2305.17333), Theorem 1 (γ re-derived by us). Gaussian directions give r + 2 at n = 1.
    """
    count("MeZO's theorem", d=d, n=n)
    positive("MeZO's theorem", r=r)
    if r > d:
        raise UserError(f"an effective rank is at most d, got r = {r:.6g}, d = {d}")
    return (d * r + d - 2) / (n * (d + 2)) + 1


def mezo_one_step(eta: float, l: float, g_sq: float, gB_sq: float, d: int, r: float, n: int = 1) -> Bound:
    """E f(w+) - f(w) <= -η‖g‖² + ½η² l γ E‖g_B‖², l >= ‖H‖ within ηdG of w; hence η_ZO = η_SGD/γ.

    Args: gB_sq = E‖∇f_B‖² over minibatches (‖g‖² + σ²/b; ‖g‖² on the full batch).
    Reference: MeZO, Theorem 1 and its corollary (from memory, re-derived). The Hessian bound must hold over the whole step.
    """
    positive("MeZO's theorem", eta=eta, l=l)
    nonnegative("MeZO's theorem", g_sq=g_sq, gB_sq=gB_sq)
    tested = inside("MeZO's theorem", [at_least("E|g_B|^2 >= |g|^2", gB_sq * ROOM, g_sq)], "E|g_B|^2 includes |g|^2")
    terms = {"-eta |g|^2": -eta * g_sq, "eta^2 l gamma E|g_B|^2/2": 0.5 * eta**2 * l * mezo_gamma(d, r, n) * gB_sq}
    return Bound("MeZO Theorem 1", "E f(w+) - f(w)", terms, (0.0, 0.0), tested, "paper (re-derived)")


def fixed_subspace(k: int, L: float, distance_sq: float, T: int, mu: float = 0.0) -> tuple[float, Bound]:
    """(η, bound): convex f, one fixed subspace of k dimensions, η = 1/(4(k+4)L): mean f(w_t) - min over the subspace
    <= 4(k+4)L R²/T + mu²L(k + k(k+2)/8).

    Args: distance_sq = R², squared distance from w_0 to a minimiser *within* w_0 + span P (orthonormal columns).
    Assumptions: f convex, L-smooth along the subspace, gaussian z, forward or central differences. Says nothing of the minimum
                 over all of w: that is what a refresh is for.
    Reference:   SubZero Theorem 3 gives T = O(d/ε) with this step (arXiv 2410.08989, from memory); the constants and the mu term
                 are ours, after Nesterov & Spokoiny 2017, Theorem 8.
    """
    count("the fixed-subspace theorem", k=k, T=T)
    positive("the fixed-subspace theorem", L=L)
    nonnegative("the fixed-subspace theorem", distance_sq=distance_sq, mu=mu)
    terms = {
        "4(k+4) L R^2/T": 4 * (k + 4) * L * distance_sq / T,
        "mu^2 L (k + k(k+2)/8)": mu**2 * L * (k + k * (k + 2) / 8),
    }
    bound = Bound("fixed subspace", "mean over t of E f(w_t) - min over the subspace", terms, (0.0, 0.0), (), "ours")
    return 1 / (4 * (k + 4) * L), bound


def steps_markov(
    eps: float,
    delta_probability: float,
    L_x: float,
    L_y: float,
    r: float,
    Delta: float,
    sigma_x_sq: float,
    sigma_y_sq: float,
) -> float:
    """Steps after which (1/T) Σ‖g‖² <= ε² with probability >= 1 - δ, from Theorem A0 and Markov's inequality.

    Statement: with Λ = max(L_x(r+2), L_y), N = σ_x²/(L_x(r+2)) + σ_y²/L_y and η_x = c/(L_x(r+2)), η_y = c/L_y,
               c = min(1, δ ε²/(2NΛ)):  T = 4ΔΛ/(c δ ε²), that is δ^-1
               ε^-2, then δ^-2 ε^-4.
    Reference: ours. The hybrid paper claims T = O(ε^-2/δ + ε^-4/n) epochs, constants unknown.
    """
    _failure(delta_probability)
    positive("the sample complexity", eps=eps, L_x=L_x, L_y=L_y, Delta=Delta)
    nonnegative("the sample complexity", sigma_x_sq=sigma_x_sq, sigma_y_sq=sigma_y_sq, r=r)
    zo = L_x * (r + 2)
    worst = max(zo, L_y)
    noise = sigma_x_sq / zo + sigma_y_sq / L_y
    target = delta_probability * eps**2
    c = min(1.0, target / (2 * noise * worst)) if noise > 0 else 1.0
    return 4 * Delta * worst / (c * target)


def steps_li(eps: float, delta_probability: float, law: Callable[[float], float], Delta: float, sigma: float) -> float:
    """Steps that Li et al.'s Theorem 5.3 asks for: max(2LF/ε², 16F²G²/ε⁴), F = 8(Δ+σ)/δ.

    Statement: the best η = min{1/(2L), 1/(4G√T)} put into T >= F/(η ε²). The price of confidence is δ^-3 where l is
               constant (G² ~ F) and δ^-4 where it is affine (G ~ F), against δ^-2 of `steps_markov`.
    Reference: Li et al. 2023, Theorem 5.3 (read); the exponents ours.
    """
    _failure(delta_probability)
    positive("Li et al. Theorem 5.3", eps=eps, Delta=Delta)
    nonnegative("Li et al. Theorem 5.3", sigma=sigma)
    F = 8 * (Delta + sigma) / delta_probability
    G = gradient_radius(law, F)
    return max(2 * law(2 * G) * F / eps**2, 16 * F**2 * G**2 / eps**4)


def failure_exponent(steps: Callable[[float], float], delta_probability: float) -> float:
    """-d log T/d log δ of a sample complexity, over a factor of 4 centred on `delta_probability`: its
    price of confidence."""
    _failure(2 * delta_probability)
    return math.log(steps(delta_probability / 2) / steps(2 * delta_probability)) / math.log(4)


def _failure(delta_probability: float) -> None:
    if not 0 < delta_probability < 1:
        raise UserError(f"a failure probability must lie in (0, 1), got {delta_probability:.6g}")
