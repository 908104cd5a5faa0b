"""Smoothness: fits of L ≤ L0 + L1 u to measured pairs (u_i, L_i), with the evidence that a fit can carry.

u_i is the norm of the *full* gradient at a point of a trajectory and L_i a local Lipschitz constant of one block's gradient there (a secant
or a spectral norm), in the order of the trajectory. With the block's own gradient norm for u the same functions fit the stronger, per-block
hypothesis. Zhang, He, Sra & Jadbabaie 2020 (arXiv 1905.11881) is where the affine law comes from.

Two fits, because they answer two questions:

- ``fit_envelope``: the least line above *every* point. It is what a theorem needs, and an extreme value: no bootstrap interval covers it
  (measured 0.43 to 0.73 at nominal 0.95), so its evidence is how often points that it did not see lie above it.
- ``fit_quantile``: the line below which a share tau of the points lies. It is a statistic, so it has an interval.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, stats

from hybridtheory.errors import UserError
from hybridtheory.intervals import block_length, bounded_interval, line_intervals

Array = NDArray[np.float64]
Interval = tuple[float, float]

MIN_SPAN = 3.0  # max u / min u below this and a slope is an extrapolation of noise
FOLDS = 5


@dataclass(frozen=True)
class Smoothness:
    """The line L0 + L1 u with its evidence. L0 has the unit of L, L1 that of L/u; both are ≥ 0.

    n                   points
    L0_interval, L1_interval, L_mean_interval
                        two-sided intervals at ``confidence`` (for the line at u_mean the third); None where the fit has none
    violation_rate      share of held-out points above a line fitted without them
    violation_interval  Clopper-Pearson at ``confidence``: exact for independent held-out points, too short for strongly dependent ones
    span                max u / min u of the region sampled: the line says nothing outside it
    identified          False below a span of 3: L1 is then not identified, and L0 with it; the value at u_mean still is
    """

    L0: float
    L1: float
    kind: str  # "envelope" or "quantile"
    n: int
    L0_interval: Interval | None
    L1_interval: Interval | None
    violation_rate: float
    violation_interval: Interval
    span: float
    identified: bool
    note: str = ""
    u_mean: float = math.nan
    L_mean_interval: Interval | None = None
    tau: float | None = None
    confidence: float = 0.95

    @property
    def L_mean(self) -> float:
        """The line at the mean of the u_i: the number that even a short span determines."""
        return self(self.u_mean)

    def __call__(self, u: float) -> float:
        return self.L0 + self.L1 * u


def fit_envelope(u: ArrayLike, L: ArrayLike, folds: int = FOLDS, confidence: float = 0.95) -> Smoothness:
    """The line L0 + L1 u ≥ L_i for all i, L0, L1 ≥ 0, that is least at the mean of u (a linear program).

    u, L  (n,) in trajectory order, at least 3 points, u > 0, L >= 0; UserError otherwise, and for folds that leave none to fit.
    For exchangeable points a new one lies above the envelope of n others with probability at most 2/(n+1) (two support points; Campi &
    Garatti 2008). The held-out rate is measured beside that number: well above it, the trajectory was still moving.
    """
    u, L = _checked(u, L)
    L0, L1 = _envelope(u, L)
    rate, interval = _held_out(_envelope, u, L, folds, confidence)
    fitted_on = len(u) - len(u) // folds
    note = f"exchangeable points would violate with probability at most {2 / (fitted_on + 1):.2g}"
    return _smoothness(L0, L1, "envelope", u, rate, interval, confidence, [note])


def fit_quantile(
    u: ArrayLike,
    L: ArrayLike,
    tau: float = 0.9,
    confidence: float = 0.95,
    seed: int = 0,
    folds: int = FOLDS,
    draws: int = 199,
) -> Smoothness:
    """Quantile regression (Koenker & Bassett 1978): L0, L1 ≥ 0 minimise Σ ρ_tau(L_i − L0 − L1 u_i).

    u, L  (n,) in trajectory order, at least 3 points, u > 0, L >= 0; tau in (0, 1). UserError otherwise.
    The intervals are those of ``intervals.line_intervals`` (a calibrated moving-block bootstrap; measured coverage in
    docs/reports/coverage.md), a pure function of the data and ``seed``. They are left out, with a note, when fewer than
    three points are expected above the line.
    """
    u, L = _checked(u, L)
    if not 0 < tau < 1:
        raise UserError(f"tau is the share of points below the line, strictly between 0 and 1, got {tau}")
    L0, L1 = _quantile(u, L, tau)
    rate, interval = _held_out(lambda a, b: _quantile(a, b, tau), u, L, folds, confidence)
    notes = []
    intervals: list[Interval | None] = [None, None, None]
    above = len(u) * min(tau, 1 - tau)
    if len(np.unique(u)) < 3:
        notes.append("no interval: fewer than 3 distinct gradient norms")
    elif above < 2.99:
        notes.append(f"no interval: n = {len(u)} leaves {above:.1f} points beyond the {tau:g} quantile, 3 are needed")
    else:
        centre, half, lag = line_intervals(u, L, tau, confidence, seed, draws)
        intervals = [bounded_interval(float(c), float(h), confidence) for c, h in zip(centre, half)]
        if lag > 0.6:
            notes.append(
                f"neighbours correlate by {lag:.2f}: the intervals were tested up to 0.5, take points further apart"
            )
    return _smoothness(L0, L1, "quantile", u, rate, interval, confidence, notes, tau, intervals)


def _smoothness(
    L0: float,
    L1: float,
    kind: str,
    u: Array,
    rate: float,
    violation_interval: Interval,
    confidence: float,
    notes: list[str],
    tau: float | None = None,
    intervals: list[Interval | None] | None = None,
) -> Smoothness:
    span = float(u.max() / u.min())
    identified = span >= MIN_SPAN
    if not identified:
        notes = [f"L1 not identified: gradient norms span a factor {span:.2g}, {MIN_SPAN:g} is needed", *notes]
    of_L0, of_L1, of_mean = intervals or [None, None, None]
    return Smoothness(
        L0,
        L1,
        kind,
        len(u),
        of_L0,
        of_L1,
        rate,
        violation_interval,
        span,
        identified,
        "; ".join(notes),
        float(u.mean()),
        of_mean,
        tau,
        confidence,
    )


def _checked(u: ArrayLike, L: ArrayLike) -> tuple[Array, Array]:
    a, b = np.asarray(u, dtype=float), np.asarray(L, dtype=float)
    if a.ndim != 1 or a.shape != b.shape:
        raise UserError(f"gradient norms and smoothness values come in pairs: got shapes {a.shape} and {b.shape}")
    if len(a) < 3:
        raise UserError(f"a line needs at least 3 points, got {len(a)}: take more secants")
    if not (np.isfinite(a).all() and np.isfinite(b).all() and (a > 0).all() and (b >= 0).all() and b.max() > 0):
        raise UserError(
            "gradient norms must be positive and finite, smoothness values non-negative, finite and not all zero"
        )
    return a, b


def _envelope(u: Array, L: Array) -> tuple[float, float]:
    s, t = u.mean(), L.max()  # a program with entries near 1, whatever the units
    found = optimize.linprog([1.0, 1.0], A_ub=-np.column_stack([np.ones_like(u), u / s]), b_ub=-L / t, method="highs")
    a, b = float(found.x[0] * t), float(found.x[1] * t / s)
    # The solver is feasible to 1e-7; the line is lifted so that it is an envelope of the points to the last bit.
    line = a + b * u
    lift = max(1.0, float(np.max(L[line > 0] / line[line > 0], initial=1.0)))  # by a factor: a zero stays a zero
    return a * lift, b * lift


def _quantile(u: Array, L: Array, tau: float) -> tuple[float, float]:
    """min Σ tau p_i + (1−tau) m_i  s.t.  L0 + L1 u_i + p_i − m_i = L_i, all variables ≥ 0."""
    s, t, n = u.mean(), L.max(), len(u)
    cost = np.concatenate([[0.0, 0.0], np.full(n, tau), np.full(n, 1 - tau)])
    equations = np.hstack([np.ones((n, 1)), (u / s)[:, None], np.eye(n), -np.eye(n)])
    found = optimize.linprog(cost, A_eq=equations, b_eq=L / t, method="highs")
    return float(found.x[0] * t), float(found.x[1] * t / s)


def _held_out(
    fit: Callable[[Array, Array], tuple[float, float]], u: Array, L: Array, folds: int, confidence: float
) -> tuple[float, Interval]:
    """Share of points above a line fitted without their fold, with its exact binomial interval.

    Neighbours on a trajectory are alike, and a point whose neighbours were fitted is no held-out point: folds are made of blocks of
    consecutive points, dealt in turn so that every fold sees the whole range of u.
    """
    n = len(u)
    if not 2 <= folds:
        raise UserError(f"holding out needs at least 2 folds, got {folds}")
    length = min(block_length(n), max(1, n // folds))
    fold = (np.arange(n) // length) % folds
    above = 0
    for k in np.unique(fold):
        out = fold == k
        if (~out).sum() < 2:
            raise UserError(f"{n} points in blocks of {length} leave a fold without a fit: take more secants")
        a, b = fit(u[~out], L[~out])
        above += int(np.sum(L[out] > (a + b * u[out]) * (1 + 1e-9)))
    low, high = stats.binomtest(above, n).proportion_ci(confidence, method="exact")
    return above / n, (float(low), float(high))
