"""Moments of zeroth-order estimates in the limit mu -> 0, for laws of directions without structure.

One estimate is ĝ = (1/q) Σ_k (g'u_k) u_k (for "orthonormal" (d/q) Σ_k (g'u_k) u_k with orthonormal u_k). For every law
here E ĝ = g and E ĝĝ' = a‖g‖² I + b gg' + c diag(g²) with three numbers of (law, d, q): all second moments follow from
them.

Laws: "gaussian" N(0, I); "sphere" uniform on the sphere of radius √d; "rademacher" independent signs; "coordinate"
√d e_j with j uniform; "orthonormal" q columns of a random rotation. Structured directions: `moments_subspace`; finite mu,
minibatches and rounding: `moments_error`. All statements are ours (Isserlis' theorem and its analogues) and exact.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import gammaln

from hybridtheory.errors import UserError
from hybridtheory.theory.checks import count, finite, nonnegative

LAWS = ("gaussian", "sphere", "rademacher", "coordinate", "orthonormal")


@dataclass(frozen=True)
class Fourth:
    """E ĝĝ' = isotropic ‖g‖² I + along gg' + diagonal diag(g²)."""

    isotropic: float
    along: float
    diagonal: float


def fourth(law: str, d: int, q: int = 1) -> Fourth:
    """The three numbers of E ĝĝ' for a law, d coordinates and q averaged queries.

    Statement: gaussian (1, 2, 0), sphere d/(d+2) (1, 2, 0), rademacher (1, 2, -2), coordinate (0, 0, d) at q = 1; q
               independent queries give ((q-1) gg' + single)/q; orthonormal: isotropic d(d-q)/(q(d+2)(d-1)), along the
               rest of d(q+2)/(q(d+2)) (Beta moments of a random projector).
    Raises:    UserError for an unknown law, or q > d orthonormal directions.
    """
    count("fourth", d=d, q=q)
    if law == "orthonormal":
        if q > d:
            raise UserError(f"orthonormal directions need q <= d, got q = {q}, d = {d}: lower q")
        isotropic = d * (d - q) / (q * (d + 2) * (d - 1)) if d > 1 else 0.0
        return Fourth(isotropic, d * (q + 2) / (q * (d + 2)) - isotropic, 0.0)
    shrink = d / (d + 2)
    single = {
        "gaussian": (1.0, 2.0, 0.0),
        "sphere": (shrink, 2 * shrink, 0.0),
        "rademacher": (1.0, 2.0, -2.0),
        "coordinate": (0.0, 0.0, float(d)),
    }
    if law not in single:
        raise UserError(f"no closed form is known for the law {law!r}: known laws are {', '.join(LAWS)}")
    a, b, c = single[law]
    return Fourth(a / q, (b + q - 1) / q, c / q)


def second_moment(law: str, d: int, q: int = 1) -> float:
    """E‖ĝ‖²/‖g‖²: (d+q+1)/q gaussian, (d+q-1)/q sphere, rademacher and coordinate, d/q orthonormal.

    Assumptions: exact directional derivative (or mu -> 0), independent queries (but for orthonormal).

    Examples:
        >>> second_moment("gaussian", d=100), second_moment("sphere", d=100), second_moment("gaussian", d=100, q=4)
        (102.0, 100.0, 26.25)
    """
    f = fourth(law, d, q)
    return f.isotropic * d + f.along + f.diagonal


def variance(law: str, d: int, q: int = 1) -> float:
    """E‖ĝ - g‖²/‖g‖², the total variance: the second moment less 1, since every law here is unbiased."""
    return second_moment(law, d, q) - 1.0


def coordinate_second_moment(law: str, g: ArrayLike, g_sq: float, d: int, q: int = 1) -> NDArray[np.float64]:
    """E ĝ_i² for the coordinates `g` (any subset, same shape returned) of a gradient with ‖g‖² = g_sq in d
    dimensions.
    """
    nonnegative("coordinate_second_moment", g_sq=g_sq)
    f = fourth(law, d, q)
    out: NDArray[np.float64] = f.isotropic * g_sq + (f.along + f.diagonal) * np.asarray(g, float) ** 2
    return out


def curvature_moment(
    law: str, d: int, g_sq: float, gHg: float, trace: float, diag_gHg: float | None = None, q: int = 1
) -> float:
    """E ĝ'Hĝ: what one step of size η adds to the loss, times η²/2.

    Args: g_sq = ‖g‖², gHg = g'Hg, trace = tr H, diag_gHg = Σ H_ii g_i² (needed by rademacher and coordinate only).
    Statement: isotropic tr(H)‖g‖² + along g'Hg + diagonal Σ H_ii g_i²; for one gaussian query 2 g'Hg + tr(H)‖g‖².
    """
    nonnegative("curvature_moment", g_sq=g_sq)
    finite("curvature_moment", gHg=gHg, trace=trace)
    f = fourth(law, d, q)
    if f.diagonal and diag_gHg is None:
        raise UserError(f"the law {law!r} needs diag_gHg = sum_i H_ii g_i^2 for E[ghat'H ghat], got none")
    return f.isotropic * trace * g_sq + f.along * gHg + (f.diagonal * diag_gHg if diag_gHg is not None else 0.0)


def cosine_beta(law: str, d: int, q: int = 1) -> tuple[float, float] | None:
    """(α, β) of the Beta law of cos²(ĝ, g), exact, or None where no law is known.

    Statement: gaussian with q averaged queries Beta(q/2, (d-1)/2); sphere only at q = 1 (the same law: its radius is
               lost when several are averaged); orthonormal Beta(q/2, (d-q)/2). A mean near zero is the right answer,
               not a bug.
    Needs d >= 2 (q < d for orthonormal); at the excluded ends the cosine is 1 surely.
    """
    fourth(law, d, q)  # refuses unknown laws and impossible q
    if law == "gaussian" or (law == "sphere" and q == 1):
        return (q / 2, (d - 1) / 2) if d > 1 else None
    if law == "orthonormal":
        return (q / 2, (d - q) / 2) if q < d else None
    return None


def cosine_squared(law: str, d: int, q: int = 1) -> float | None:
    """E cos²(ĝ, g): q/(q+d-1) gaussian, q/d orthonormal, 1/d for every law at q = 1; None where unknown.

    Examples:
        >>> cosine_squared("gaussian", d=100), cosine_squared("orthonormal", d=100, q=4), cosine_squared("rademacher", d=100, q=4)
        (0.01, 0.04, None)
    """
    if law == "orthonormal" and q == d:
        return 1.0
    beta = cosine_beta(law, d, q)
    if beta is not None:
        return beta[0] / (beta[0] + beta[1])
    return 1.0 / d if q == 1 else None


def cosine(law: str, d: int, q: int = 1) -> float | None:
    """E cos(ĝ, g) (never negative: <ĝ, g> is a mean of squares); Γ(α+½)Γ(α+β)/(Γ(α)Γ(α+β+½)) of the Beta law, or None.

    Statement: about sqrt(2/(π d)) for one gaussian query: 2.2e-5 at d = 1.3e9.
    """
    beta = cosine_beta(law, d, q)
    if beta is None:
        return 1.0 if (law == "orthonormal" and q == d) or d == 1 else None
    a, b = beta
    return float(np.exp(gammaln(a + 0.5) + gammaln(a + b) - gammaln(a) - gammaln(a + b + 0.5)))


def sign_slope_mean(g: ArrayLike) -> NDArray[np.float64]:
    """E[sign(g'u) u] = sqrt(2/π) g/‖g‖ for gaussian u: ZO-Bench's "sign" method, whose squared step length is d."""
    v = np.asarray(g, float)
    norm = float(np.linalg.norm(v))
    if not norm > 0:
        raise UserError(f"sign_slope_mean needs a gradient with a positive norm, got {norm}")
    out: NDArray[np.float64] = np.sqrt(2 / np.pi) * v / norm
    return out


def sign_mean(g: ArrayLike) -> NDArray[np.float64]:
    """E sign(ĝ) = (2/π) arcsin(g_i/‖g‖) per coordinate, one gaussian query: the sign of each coordinate of the
    estimate.
    """
    v = np.asarray(g, float)
    norm = float(np.linalg.norm(v))
    if not norm > 0:
        raise UserError(f"sign_mean needs a gradient with a positive norm, got {norm}")
    out: NDArray[np.float64] = 2 / np.pi * np.arcsin(np.clip(v / norm, -1, 1))
    return out
