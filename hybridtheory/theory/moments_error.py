"""What a real evaluation adds to the moments: finite mu, forward differences, minibatches, noise of the loss, absorbed
weights.

ĝ = D u with D = (f(w+mu u) - f(w-mu u))/(2 mu) (central) or (f(w+mu u) - f(w))/mu (forward). T is the third derivative,
(grad Lap)_i = ∂_i Σ_j f_jj. All statements are ours and exact for the class named, unless a source is named.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import erf

from hybridtheory.errors import UserError
from hybridtheory.theory.checks import count, finite, nonnegative, positive
from hybridtheory.theory.moments import second_moment

# Bits of the significand, the hidden one included.
PRECISION = {"bfloat16": 8, "float16": 11, "float32": 24}


def bias(law: str, mu: float, grad_lap: ArrayLike, third_diag: ArrayLike | None, d: int) -> NDArray[np.float64]:
    """E ĝ - g to order mu², the same for forward and central differences: (mu²/6) E[T[u,u,u] u].

    Args: grad_lap = ∂_i Lap f; third_diag = f_iii (rademacher and coordinate only); shapes (d,) or any subset of
          coordinates.
    Statement: gaussian (mu²/2) ∂_i Lap f; sphere that times d/(d+2); rademacher (mu²/2) ∂_i Lap f - (mu²/3) f_iii;
               coordinate (directions √d e_j) (mu²/6) d f_iii.
    """
    nonnegative("bias", mu=mu)
    count("bias", d=d)
    lap = np.asarray(grad_lap, float)
    out: NDArray[np.float64]
    if law in ("gaussian", "sphere"):
        out = mu**2 / 2 * (1.0 if law == "gaussian" else d / (d + 2)) * lap
        return out
    if law not in ("rademacher", "coordinate"):
        raise UserError(f"no closed form of the bias is known for the law {law!r}")
    if third_diag is None:
        raise UserError(f"the bias of the law {law!r} needs third_diag = f_iii, got none")
    third = np.asarray(third_diag, float)
    out = mu**2 / 2 * lap - mu**2 / 3 * third if law == "rademacher" else mu**2 / 6 * d * third
    return out


def forward_extra(
    law: str, mu: float, d: int, trace: float, frobenius_sq: float, diag_sq: float | None = None, q: int = 1
) -> float:
    """What a forward difference adds to E‖ĝ‖² over a central one; exact for quadratics (where central adds nothing).

    Args: trace = tr H, frobenius_sq = tr(H²), diag_sq = Σ H_ii² (rademacher and coordinate).
    Statement: (mu²/4)/q times: gaussian (d+4)((tr H)² + 2 tr H²); sphere (d²/(d+2))((tr H)² + 2 tr H²); rademacher
               d((tr H)² + 2 Σ_{i≠j} H_ij²); coordinate d² Σ H_ii².
    """
    nonnegative("forward_extra", mu=mu, frobenius_sq=frobenius_sq)
    finite("forward_extra", trace=trace)
    count("forward_extra", d=d, q=q)
    scale = mu**2 / 4 / q
    if law == "gaussian":
        return scale * (d + 4) * (trace**2 + 2 * frobenius_sq)
    if law == "sphere":
        return scale * d**2 / (d + 2) * (trace**2 + 2 * frobenius_sq)
    if law not in ("rademacher", "coordinate"):
        raise UserError(f"no closed form of the forward difference's variance is known for the law {law!r}")
    if diag_sq is None:
        raise UserError(f"the law {law!r} needs diag_sq = sum_i H_ii^2, got none")
    if law == "rademacher":
        return scale * d * (trace**2 + 2 * (frobenius_sq - diag_sq))
    return scale * d**2 * diag_sq


def worst_case_second_moment(d: int, g_sq: float, mu: float, L: float) -> float:
    """E‖ĝ‖² <= 2(d+2)‖g‖² + (mu²L²/2) d(d+2)(d+4), forward or central, one gaussian query, f only L-smooth. Ours."""
    count("worst_case_second_moment", d=d)
    nonnegative("worst_case_second_moment", g_sq=g_sq, mu=mu, L=L)
    return 2 * (d + 2) * g_sq + mu**2 * L**2 / 2 * d * (d + 2) * (d + 4)


def nesterov_spokoiny_second_moment(d: int, g_sq: float, mu: float, L: float) -> float:
    """E‖ĝ‖² <= 2(d+4)‖g‖² + (mu²/2) L² (d+6)³: Nesterov & Spokoiny 2017, Theorem 4 (from memory; looser than ours)."""
    count("nesterov_spokoiny_second_moment", d=d)
    nonnegative("nesterov_spokoiny_second_moment", g_sq=g_sq, mu=mu, L=L)
    return 2 * (d + 4) * g_sq + mu**2 / 2 * L**2 * (d + 6) ** 3


def minibatch_second_moment(law: str, d: int, g_sq: float, sigma_sq: float, q: int = 1) -> float:
    """E‖ĝ‖² = (second moment factor)(‖g‖² + σ²): q queries on one minibatch whose gradient has variance σ² (σ²/b for b
    rows).
    """
    nonnegative("minibatch_second_moment", g_sq=g_sq, sigma_sq=sigma_sq)
    return second_moment(law, d, q) * (g_sq + sigma_sq)


def evaluation_noise(d: int, s: float, mu: float, difference: str = "central", q: int = 1) -> float:
    """What independent noise of standard deviation s in each loss adds to E‖ĝ‖²: d s²/(2 mu² q) central, 2 d s²/(mu²
    q) forward.

    Assumptions: E‖u‖² = d. Different batches at the two ends are such noise, with s the batch's spread of the loss:
                 never do it.
    Sharing f(w) among q independent queries changes nothing, since E u_k'u_l = 0.
    """
    count("evaluation_noise", d=d, q=q)
    nonnegative("evaluation_noise", s=s)
    positive("evaluation_noise", mu=mu)
    if difference not in ("central", "forward"):
        raise UserError(f"difference must be 'central' or 'forward', got {difference!r}")
    return d * s**2 * (0.5 if difference == "central" else 2.0) / (mu**2 * q)


def best_mu_vector(d: int, s: float, grad_lap_norm: float) -> float:
    """(d s²/‖grad Lap f‖²)^(1/6): minimises bias² + noise = (mu⁴/4)‖grad Lap f‖² + d s²/(2 mu²), gaussian, central."""
    count("best_mu_vector", d=d)
    positive("best_mu_vector", s=s, grad_lap_norm=grad_lap_norm)
    return float((d * s**2 / grad_lap_norm**2) ** (1 / 6))


def best_mu_slope(error: float, curvature: float, difference: str = "central") -> tuple[float, float]:
    """(mu, error of the slope there) for one directional derivative with absolute error `error` in each loss.

    Args: curvature = |T[u,u,u]| (central) or |u'Hu| (forward).
    Statement: central (3e/M₃)^(1/3), error (9 M₃ e²)^(1/3)/2; forward 2 sqrt(e/M₂), error 2 sqrt(e M₂).
    """
    positive("best_mu_slope", error=error, curvature=curvature)
    if difference == "central":
        return (3 * error / curvature) ** (1 / 3), (9 * curvature * error**2) ** (1 / 3) / 2
    if difference == "forward":
        return 2 * math.sqrt(error / curvature), 2 * math.sqrt(error * curvature)
    raise UserError(f"difference must be 'central' or 'forward', got {difference!r}")


def slope_signal_to_noise(mu: float, g_norm: float, s: float) -> float:
    """2 mu ‖g‖/(√2 s): the spread of f(w+mu u) - f(w-mu u) over that of its noise; far below 1 the estimate is
    noise.
    """
    positive("slope_signal_to_noise", mu=mu, s=s)
    nonnegative("slope_signal_to_noise", g_norm=g_norm)
    return 2 * mu * g_norm / (math.sqrt(2) * s)


def absorbed_fraction(weights: ArrayLike, mu: float, dtype: str) -> float:
    """Expected share of the weights for which mu u_j, u_j ~ N(0, 1), is lost in w_j + mu u_j: mean of erf(2^(e-p)/(mu
    √2)).

    Args: weights: any shape (2^e <= |w_j| < 2^(e+1)); dtype "bfloat16", "float16" or "float32" (p = 8, 11, 24 bits).
    Assumptions: normal numbers; at an exact power of two the spacing below is half as large, which is ignored.
    """
    positive("absorbed_fraction", mu=mu)
    if dtype not in PRECISION:
        raise UserError(f"absorbed_fraction knows {', '.join(PRECISION)}, got {dtype!r}")
    w = np.abs(np.asarray(weights, float)).ravel()
    if w.size == 0 or not np.isfinite(w).all():
        raise UserError(f"absorbed_fraction needs at least one weight, all finite, got {w.size} weights")
    w = w[w > 0]  # a zero weight absorbs nothing
    size = np.asarray(weights).size
    _, exponent = np.frexp(w)  # w = m 2^exponent with m in [1/2, 1), so e = exponent - 1
    half_ulp = np.ldexp(1.0, exponent - 1 - PRECISION[dtype])
    lost: NDArray[np.float64] = erf(half_ulp / (mu * math.sqrt(2)))
    return float(lost.sum()) / size
