"""The finite-scale rule: the learning rate from forward passes alone.

For a ZO step with direction u and slope c the expected one-step change is Δ(η) = E_u[f(w - η c u) - f(w)]. It is
measured on a grid of η with the *same* u at every η, without a quadratic model: where curvature grows away from w,
Hessian rules at w are too optimistic and this one is not. c must stay paired with its u: an independent c drops the 2
g'Hg of Identity Q.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import chi2

from hybridtheory.errors import UserError
from hybridtheory.theory.checks import count, nonnegative, positive
from hybridtheory.theory.step_sizes import Step

Array = NDArray[np.float64]


@dataclass(frozen=True)
class FiniteScale:
    """Δ(η) with standard errors, and its minimiser.

    `etas`, `change`, `stderr`: [n_etas]. `coefficient`: [n_etas], the control variate's weight in units of η (1 at
    small η). `step.interval` is a bootstrap over directions. `edge` is "low" or "high" where the least change lies at
    the grid's end: the minimiser is then only a bound, and the grid must be widened. `significant`: the least change
    is below zero by two standard errors.
    """

    etas: tuple[float, ...]
    change: tuple[float, ...]
    stderr: tuple[float, ...]
    coefficient: tuple[float, ...]
    least: float
    step: Step
    n: int
    edge: str = ""
    significant: bool = True

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def finite_scale(
    etas: ArrayLike,
    changes: ArrayLike,
    slopes: ArrayLike,
    g_norm_sq: float,
    g_norm_sq_se: float = 0.0,
    variance: float = 0.0,
    control: str = "fitted",
    n_boot: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> FiniteScale:
    """Mean one-step change on a grid of steps, its errors and its minimiser.

    Args:
        etas: [n_etas] increasing, positive, at least 3.
        changes: [n_dirs, n_etas], f(w - η c u) - f(w).
        slopes: [n_dirs], c: the slope that moved the step (from the training batch where training is by minibatches).
        g_norm_sq: ‖g‖² of the block for the function behind `slopes`, exact or from an independent set (then with
            `g_norm_sq_se`).
        variance: σ²/b, the minibatch variance of the gradient behind `slopes`, so that E c² = ‖g‖² + variance.
        control: "fitted" (default) or "unit". Both add a(c² - E c²) to each sample, whose mean is 0. "unit" takes a =
            η, which removes nearly all noise at small η but nothing near the optimum, where the change is -ηc²/2 +
            ...; "fitted" regresses a from the *other* directions, so the mean stays unbiased and the noise is 3 to 5
            times lower. c² is heavy-tailed, so few directions give optimistic errors: on a quadratic of effective rank
            6 the true error of "fitted" was 3.8, 1.9, 1.15 reported standard errors at 12, 56, 400 directions ("unit":
            1.9, 1.0, 1.0).
        n_boot, confidence, seed: bootstrap over directions, with its own generator.

    Assumptions: Gaussian u (E c² = ‖g‖²; true of sphere and Rademacher too), independent directions.
    Statement:   argmin over the grid, refined by interpolating Δ(η)/η through the least point and its neighbours.
    Reference:   ours. The interval covers the sampling of directions (and of `g_norm_sq`), at this point only.
    Raises:      UserError on shapes, fewer than 4 directions, or values that are not finite (a step that overflowed:
                 drop that η).
    """
    eta, change, c = np.asarray(etas, float), np.asarray(changes, float), np.asarray(slopes, float)
    if eta.ndim != 1 or eta.size < 3 or not (np.isfinite(eta).all() and (eta > 0).all() and (np.diff(eta) > 0).all()):
        raise UserError(f"finite_scale needs at least 3 positive, increasing etas, got {eta.tolist()}")
    if change.shape != (c.size, eta.size) or c.ndim != 1 or c.size < 4:
        raise UserError(
            f"finite_scale needs changes [n_dirs, n_etas] with n_dirs = len(slopes) >= 4, got {change.shape} and "
            f"{c.shape}"
        )
    if not (np.isfinite(change).all() and np.isfinite(c).all()):
        bad = eta[~np.isfinite(change).all(axis=0)]
        raise UserError(
            f"finite_scale got changes or slopes that are not finite (at eta = {bad.tolist()}): drop those etas from "
            f"the grid"
        )
    positive("finite_scale", g_norm_sq=g_norm_sq)
    nonnegative("finite_scale", g_norm_sq_se=g_norm_sq_se, variance=variance)
    if control not in ("fitted", "unit"):
        raise UserError(f"finite_scale knows the controls 'fitted' and 'unit', got {control!r}")

    n = c.size
    x = c**2 - (g_norm_sq + variance)  # [n_dirs], mean 0
    a = _leave_one_out_slope(x, change) if control == "fitted" else np.broadcast_to(-eta, change.shape)
    corrected = change - a * x[:, None]
    mean = corrected.mean(axis=0)
    # The corrected samples share x's known mean: an error there moves all of them at once.
    stderr = np.sqrt(corrected.var(axis=0, ddof=1) / n + (a.mean(axis=0) * g_norm_sq_se) ** 2)

    rng = np.random.default_rng(seed)
    weights = rng.multinomial(n, np.full(n, 1 / n), size=n_boot) / n  # [n_boot, n_dirs]
    shift = rng.normal(0.0, g_norm_sq_se, size=(n_boot, 1)) if g_norm_sq_se else np.zeros((n_boot, 1))
    x_mean = weights @ x[:, None]  # [n_boot, 1]
    slope = (
        -eta
        if control == "unit"
        else (weights @ (x[:, None] * change) - x_mean * (weights @ change))
        / np.maximum(weights @ (x**2)[:, None] - x_mean**2, 1e-300)
    )
    boot = weights @ change - slope * (x_mean - shift)
    best, _, _ = _least(eta, boot)
    tail = 100 * (1 - confidence) / 2
    low, high = np.percentile(best, [tail, 100 - tail])

    value, least, index = (v[0] for v in _least(eta, mean[None]))
    edge = "low" if index == 0 else "high" if index == eta.size - 1 else ""
    note = f"the least change lies at the {edge} end of the grid ({value:.3g}): widen it" if edge else ""
    step = Step(
        float(value),
        "finite-scale rule",
        "argmin_eta E_u f(w - eta c u) - f(w)",
        "forward passes only: no trace",
        # The samples correct each direction by the others, a bootstrap each sample by itself: with few directions they may disagree.
        (float(min(low, value)), float(max(high, value))),
        f"sampling of {n} directions at this point ({100 * confidence:g} % bootstrap)",
        (),
        note,
    )
    return FiniteScale(
        tuple(eta.tolist()),
        tuple(mean.tolist()),
        tuple(stderr.tolist()),
        tuple((-a.mean(axis=0) / eta).tolist()),
        float(least),
        step,
        n,
        edge,
        bool(mean[index] + 2 * stderr[index] < 0),
    )


def _leave_one_out_slope(x: Array, y: Array) -> Array:
    """[n, m]: for each sample the regression slope of y on x over the other samples (so that it is independent of this
    one).
    """
    n = x.size - 1
    X = x[:, None]
    sx, sy = X.sum(0) - X, y.sum(0) - y
    sxx, sxy = (X**2).sum(0) - X**2, (X * y).sum(0) - X * y
    spread = sxx - sx**2 / n
    slope: Array = (sxy - sx * sy / n) / np.where(spread > 0, spread, np.inf)
    return slope


def _least(eta: Array, curves: Array) -> tuple[Array, Array, NDArray[np.intp]]:
    """Minimiser, minimum and grid index of each curve [k, n_etas].

    Δ(η)/η, not Δ, is interpolated by a parabola through the least point and its neighbours: exact where Δ is the
    quadratic of Identity Q, while a parabola in log η through points a factor 1.6 apart errs by 7 % there.
    """
    index = np.argmin(curves, axis=1)
    mid = np.clip(index, 1, eta.size - 2)
    rows = np.arange(curves.shape[0])
    e0, e1, e2 = eta[mid - 1], eta[mid], eta[mid + 1]
    y0, y1, y2 = curves[rows, mid - 1] / e0, curves[rows, mid] / e1, curves[rows, mid + 1] / e2
    p = (y1 - y0) / (e1 - e0)
    p2 = ((y2 - y1) / (e2 - e1) - p) / (e2 - e0)
    p1 = p - p2 * (e0 + e1)
    p0 = y0 - p1 * e0 - p2 * e0**2
    # η(p0 + p1 η + p2 η²) is stationary where p0 + 2 p1 η + 3 p2 η² = 0; the minimum is the root with positive slope
    # there, written without cancellation for p2 -> 0. A least point inside the grid brackets it.
    root = p1 + np.sqrt(np.maximum(p1**2 - 3 * p0 * p2, 0.0))
    best = np.where(root != 0, -p0 / np.where(root != 0, root, 1.0), 0.0)
    inner = (index == mid) & (best > e0) & (best < e2)
    best = np.where(inner, best, eta[index])
    least = np.where(inner, best * (p0 + p1 * best + p2 * best**2), curves[rows, index])
    return best, least, index


def least(etas: ArrayLike, change: ArrayLike) -> tuple[float, bool]:
    """Minimiser of one measured curve [n_etas], interpolated as in `finite_scale`, and whether it lies at the grid's
    edge.
    """
    eta, curve = np.asarray(etas, float), np.asarray(change, float)
    if eta.shape != curve.shape or eta.ndim != 1 or eta.size < 3 or not np.isfinite(curve).all():
        raise UserError(f"least needs a finite change at each of 3 or more etas, got {eta.size} and {curve.tolist()}")
    best, _, index = _least(eta, curve[None])
    return float(best[0]), bool(index[0] in (0, eta.size - 1))


def phi_trace(deltas: ArrayLike, plus: ArrayLike, minus: ArrayLike) -> tuple[Array, Array]:
    """Implied trace 2φ(δ)/δ² and its standard error, from antithetic pairs: flat in δ where the quadratic model holds.

    Args: deltas: [k].  plus, minus: [n_dirs, k], f(w ± δu) - f(w) with the same u at every δ.
    Statement: φ(δ) = E_u f(w + δu) - f(w) = (δ²/2) tr(H) + O(δ⁴). Reference: ours.
    """
    delta, p, m = np.asarray(deltas, float), np.asarray(plus, float), np.asarray(minus, float)
    if p.shape != m.shape or p.ndim != 2 or p.shape[1] != delta.size or p.shape[0] < 2:
        raise UserError(f"phi_trace needs plus and minus [n_dirs >= 2, {delta.size}], got {p.shape} and {m.shape}")
    if not (delta > 0).all():
        raise UserError(f"phi_trace needs deltas > 0, got {delta.tolist()}")
    implied = (p + m) / delta**2
    return implied.mean(axis=0), implied.std(axis=0, ddof=1) / math.sqrt(p.shape[0])


def flat_scale(deltas: ArrayLike, plus: ArrayLike, minus: ArrayLike, tolerance: float = 0.5) -> tuple[float, bool]:
    """(δ, reached): the distance along a random direction up to which the quadratic model holds within `tolerance`.

    Args: as `phi_trace`, deltas increasing; the smallest must still lie on the flat part.
    Statement: the first δ, interpolated in log δ, at which 2φ/δ² has left its value at the smallest δ by the share `tolerance`;
               `reached` is False when it never does, and δ is then the largest one, a lower bound. The same directions serve
               every δ, so the curve's shape is sharp where its level is not.
    Reference: ours.
    """
    delta = np.asarray(deltas, float)
    positive("flat_scale", tolerance=tolerance)
    if not (np.diff(delta) > 0).all():
        raise UserError(f"flat_scale needs increasing deltas, got {delta.tolist()}")
    implied, _ = phi_trace(delta, plus, minus)
    if not implied[0] != 0:
        raise UserError("flat_scale cannot compare with an implied trace of 0 at the smallest delta: take a larger one")
    left = np.abs(implied / implied[0] - 1)
    out = np.flatnonzero(left > tolerance)
    if out.size == 0:
        return float(delta[-1]), False
    k = int(out[0])
    share = (tolerance - left[k - 1]) / (left[k] - left[k - 1])
    return float(delta[k - 1] * (delta[k] / delta[k - 1]) ** share), True


def tail_limited(
    scale: float, g_sq: float, T: int, delta_probability: float = 0.1, variance: float = 0.0, q: int = 1
) -> Step:
    """The step at which none of T steps moves further than `scale` along its direction, with probability 1 - δ.

    Args: scale: distance in units of u that may be trusted (`flat_scale`); g_sq: ‖g‖², the largest along the run; variance: σ²/b.
    Assumptions: independent gaussian slopes c ~ N(0, ‖g‖² + σ²/b), true given the point for gaussian u.
    Statement:   the step is η sqrt(Σ_k c_k²)/q long, so η = q scale/sqrt((‖g‖² + σ²/b) z) with z the quantile of chi²_q that is
                 passed with probability 1 - (1 - δ)^(1/T). Never below scale/(‖g‖ sqrt(2
                 ln(2T/δ))) for q = 1.
    Reference:   ours: the mean of a step does not see its tail, and a run that leaves the flat region does not come back.
    """
    positive("tail_limited", scale=scale, g_sq=g_sq)
    nonnegative("tail_limited", variance=variance)
    count("tail_limited", T=T, q=q)
    if not 0 < delta_probability < 1:
        raise UserError(f"a failure probability must lie in (0, 1), got {delta_probability:.6g}")
    single = -math.expm1(math.log1p(-delta_probability) / T)
    z = float(chi2.isf(single, q))
    value = q * scale / math.sqrt((g_sq + variance) * z)
    return Step(
        value,
        "tail of a step",
        "q scale/(|g| sqrt(z)), z the chi2_q tail over T steps",
        "the flat scale and |g|",
        note=f"for {T} steps with probability {1 - delta_probability:g}, while |g| stays below {math.sqrt(g_sq):.4g}",
    )
