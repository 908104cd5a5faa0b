"""The best learning rate of a sweep: a parabola in log rate near the best rate, with an interval whose unit is the seed.

At a trial rate z (in log) the slope of every seed's own parabola, d_s(z) = b_s + 2 c_s z, is one number a seed. The interval holds the
z at which a t test over the seeds does not refuse a mean slope of zero (Fieller 1954, J. R. Stat. Soc. B 16, 175, with the seeds as
units). Whatever the runs of one seed share (order of rows, directions) makes their losses at neighbouring rates depend on each other;
the test does not mind, where an interval from the residuals of one joint fit would be too short. Where the parabolas are not surely
convex the set is not bounded: no optimum is identified, which is an answer too. Resampling three seeds is no alternative: they have
ten distinct resamples.

A run that diverges counts as having lost `LOST` times what the best rate gains, and no run counts as worse: a mean over seeds then stays
a number that a few seeds can say something about, where one loss of 50 in the wall before divergence would be all that it says. Coverage
by simulation: docs/sweeps.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from hybridtheory.errors import UserError

Array = NDArray[np.float64]

WIDEST = 3.0  # an interval with a larger ratio of its ends identifies nothing
REACH = 3.2  # rates within this factor of the best one are fitted: a grid of factor 3 gives its neighbours
# And that lose at most this share of the best decrease: further up, the wall before divergence is no parabola.
SHARE = 0.25
LOST = 4.0  # in units of the best decrease; a rate that loses one seed in five is then not worth twice the decrease
REFINED = 1.6  # a fitted rate further from the best one than this must not have lost a run: what that counts as would place the minimum
SHAPE = 0.1  # added to both ends, in log: the minimum of a parabola through an asymmetric curve is off by up to 9 % (docs/sweeps.md)


def ceiling(first: float) -> float:
    """The loss above which a run is lost, from its first loss: where training calls it diverged once it stays there."""
    return 2 * first + 1


@dataclass(frozen=True)
class Optimum:
    """rate: where the parabola is least; the best rate of the grid where there is no parabola. interval: over seeds.

    identified  the interval is there and its ends differ by at most a factor `WIDEST`; note says why not.
    best        the best rate that was run.
    fit         (a, b, c) of loss = a + b z + c z², z = log(rate / best), mean over the seeds; on the rates ``used``.
    """

    rate: float
    interval: tuple[float, float] | None
    identified: bool
    best: float
    fit: tuple[float, float, float] | None = None
    used: tuple[float, ...] = ()
    note: str = ""


def clipped(losses: Sequence[Sequence[float]] | Array, start: float) -> Array:
    """(S, R) losses at the end of runs, none further above ``start`` than `LOST` times what the best rate gains; no nan or infinity."""
    y = np.asarray(losses, float)
    below = np.where(np.isfinite(y), np.minimum(y, start), start)
    limit = start + LOST * (start - below.mean(axis=0).min())
    return np.where(np.isfinite(y), np.minimum(y, limit), limit)


def optimum(
    rates: Sequence[float], losses: Sequence[Sequence[float]] | Array, start: float, confidence: float = 0.95
) -> Optimum:
    """Where the mean loss is least over the learning rate.

    rates   (R,) increasing, positive.
    losses  (S, R) at the end of the run, a row for each seed; not finite where it diverged.
    start   the loss before the first step.
    Raises UserError when shapes do not match.
    """
    z, y = np.log(np.asarray(rates, float)), clipped(losses, start)
    if y.ndim != 2 or y.shape[1] != len(z) or not y.size or not (np.diff(z) > 0).all():
        raise UserError(f"an optimum needs losses of shape (seeds, rates), got {y.shape} for {len(z)} increasing rates")
    mean = y.mean(axis=0)
    k = int(mean.argmin())
    best = float(rates[k])

    def none(note: str, **shown: Any) -> Optimum:
        return Optimum(best, None, False, best, note=note, **shown)

    if mean[k] >= start:
        return none("no rate lowers the loss")
    if k in (0, len(z) - 1):
        return none(f"the best rate is the {'lowest' if k == 0 else 'highest'} of the grid")
    used = _window(z, mean, k, start)
    x = z[used] - z[k]
    held = (np.asarray(losses, float) == y).all(axis=0)  # nothing was put in place of a loss
    lost = [i for i in used if abs(z[i] - z[k]) > math.log(REFINED) and not held[i]]
    if lost:
        return none(
            f"at {float(rates[lost[0]]):.3g}, beside the best rate, a run was lost: rates within a factor {REFINED:g} are needed"
        )
    coefficients = np.polynomial.polynomial.polyfit(x, y[:, used].T, 2)  # (3, S)
    a, b, c = (float(v) for v in coefficients.mean(axis=1))
    shown: dict[str, Any] = {"fit": (a, b, c), "used": tuple(float(rates[i]) for i in used)}
    lowest = -b / (2 * c) if c > 0 else math.nan
    if not x[0] <= lowest <= x[-1]:
        return none("the parabola has no minimum between the rates", **shown)
    if len(y) < 2:
        return Optimum(best * math.exp(lowest), None, False, best, note="one seed has no interval", **shown)
    found = _zero_slope(coefficients[1], coefficients[2], confidence)
    if found is None:
        return none("the seeds do not agree on a minimum", **shown)
    low, high = (min(max(v, -50.0), 50.0) for v in (found[0] - SHAPE, found[1] + SHAPE))
    wide = high - low > math.log(WIDEST)
    note = f"the interval is wider than a factor {WIDEST:g}" if wide else ""
    return Optimum(
        best * math.exp(lowest), (best * math.exp(low), best * math.exp(high)), not wide, best, note=note, **shown
    )


def _window(z: Array, mean: Array, k: int, start: float) -> list[int]:
    """Neighbours of the best rate k, and what joins on to them within `REACH` that loses at most `SHARE`."""
    chosen = {k - 1, k, k + 1}
    for step in (-1, 1):
        i = k + step
        while (
            0 <= i < len(z) and abs(z[i] - z[k]) <= math.log(REACH) and mean[i] - mean[k] <= SHARE * (start - mean[k])
        ):
            chosen.add(i)
            i += step
    return sorted(chosen)


def _zero_slope(b: Array, c: Array, confidence: float) -> tuple[float, float] | None:
    """All z at which the mean over seeds of b + 2 c z is not refused to be zero; None where that is no bounded interval."""
    n = len(b)
    k = stats.t.ppf((1 + confidence) / 2, n - 1) ** 2 / n
    cov = np.cov(b, c)
    mb, mc = b.mean(), c.mean()
    p2, p1, p0 = 4 * (mc * mc - k * cov[1, 1]), 4 * (mb * mc - k * cov[0, 1]), mb * mb - k * cov[0, 0]
    if not (p2 > 0 and mc > 0):
        return None
    half = math.sqrt(max(p1 * p1 - 4 * p2 * p0, 0.0)) / (2 * p2)
    centre = -p1 / (2 * p2)
    return float(centre - half), float(centre + half)


def boundary(rates: Sequence[float], diverged: Sequence[bool]) -> tuple[float | None, float | None]:
    """(the largest rate below which and at which nothing diverges, the smallest that diverges); None where there is none.

    diverged  for each rate, whether some seed did.
    """
    finite: float | None = None
    for rate, lost in sorted(zip(rates, diverged)):
        if lost:
            return finite, rate
        finite = rate
    return finite, None
