"""The mean change of the loss in one zeroth-order step from few directions, a prediction of it from other directions, and what a miss
of the quadratic model is made of. Numbers in, numbers out.

A Gaussian direction is u = z ĝ + u⊥ with ĝ = g/‖g‖, z = <ĝ, u> ~ N(0, 1) and u⊥ independent of z; the slope is c = ‖g‖ z, and the change
h(u) = f(w - η c u) - f(w) begins with z². So z is drawn from the density z² exp(-z²/2)/√(2π) (a random sign times chi_3) instead:

    E h = E_biased[h/z²],    h/z² = -η‖g‖² (1 - η u'Hu/2 + ...)

At small steps the samples do not vary at all, and at the best step only the curvature u'Hu does. Directions for a standard error of 3 % at
0.03, 0.1, 0.3 and 1 of the best step, quadratic of effective rank 7: 2200, 2200, 2000, 1700 plain; 1, 11, 125, 4000 with the control
variate c² - ‖g‖²; 1, 2, 16, 520 with its coefficient fitted; 1, 1, 6, 170 this way.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import t as student

from hybridtheory.errors import UserError
from hybridtheory.theory.checks import Check, Hypothesis, at_most, positive

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Mean:
    """A mean over n directions with its standard error."""

    value: float
    stderr: float
    n: int

    def __add__(self, other: Mean) -> Mean:
        """Sum of independent means; n is the larger one."""
        return Mean(self.value + other.value, math.hypot(self.stderr, other.stderr), max(self.n, other.n))


def biased_slope(uniform: float, normals: ArrayLike) -> float:
    """z with density z² exp(-z²/2)/√(2π): a fair sign (from one uniform number) times the norm of three standard normals."""
    return math.copysign(float(np.linalg.norm(np.asarray(normals, float))), uniform - 0.5)


def mean_change(changes: ArrayLike, z: ArrayLike) -> Mean:
    """E h of plain Gaussian directions, from changes h [n] at directions whose slope z [n] was drawn by `biased_slope`."""
    h, slope = np.asarray(changes, float), np.asarray(z, float)
    if h.shape != slope.shape or h.ndim != 1 or h.size < 2:
        raise UserError(f"mean_change needs changes and slopes [n >= 2], got {h.shape} and {slope.shape}")
    if not (np.isfinite(h).all() and np.isfinite(slope).all() and (slope != 0).all()):
        raise UserError(
            "mean_change needs finite changes and slopes other than 0: a step overflowed, lower the learning rate"
        )
    samples = h / slope**2
    return Mean(float(samples.mean()), float(samples.std(ddof=1)) / math.sqrt(h.size), h.size)


def directions_needed(pilot: Mean, precision: float, most: int) -> int:
    """How many directions bring the standard error below `precision` times the mean, from a pilot; at least the pilot's, at most `most`."""
    positive("directions_needed", precision=precision)
    if pilot.value == 0:
        return most
    wanted = pilot.n * (pilot.stderr / (precision * abs(pilot.value))) ** 2
    return int(min(max(math.ceil(wanted), pilot.n), most))


def fitted_changes(scales: ArrayLike, samples: ArrayLike, start: float, targets: ArrayLike) -> list[Mean]:
    """The finite-scale prediction: mean changes at `targets` from a curve through what other directions did at `scales`.

    Args: scales [k >= 2]: steps in units of one step; samples [n, k]: h/z² there; start < 0: the exact derivative of the change with
          respect to the scale at 0 (-η‖g‖², less η_y‖g_y‖² where both blocks move); targets [m].
    Statement: change(s) = start s + a s² + b s³, least squares in change/s² per direction, so that every prediction is linear in the
               directions and its standard error is theirs.
    """
    s, h, at = np.asarray(scales, float), np.asarray(samples, float), np.asarray(targets, float)
    if h.ndim != 2 or h.shape[1] != s.size or s.size < 2 or not np.isfinite(h).all():
        raise UserError(f"fitted_changes needs finite samples [n, {s.size}] at 2 or more scales, got {h.shape}")
    design = np.stack([np.ones_like(s), s], axis=1)
    curves = ((h - start * s) / s**2) @ np.linalg.pinv(design).T  # [n, 2]: a, b
    found = start * at + curves[:, :1] * at**2 + curves[:, 1:] * at**3
    n = h.shape[0]
    error = found.std(axis=0, ddof=1) / math.sqrt(n) if n > 1 else np.zeros(at.size)
    return [Mean(float(m), float(e), n) for m, e in zip(found.mean(axis=0), error, strict=True)]


def miss(
    measured: Mean, predicted: float, kinks: float, coupling: float, tolerance: float
) -> tuple[tuple[Hypothesis, ...], str]:
    """What a difference from Identity Q is made of, as hypotheses (size over the prediction, against `tolerance`), and the largest
    in words.

    kinks: change that curvature at the smallest scale adds beyond the infinitesimal one; coupling: joint change beyond the two blocks'
    own and g_x'H_xy g_y; the rest is third order and higher.
    """
    size = abs(predicted) or 1.0
    rest = measured.value - predicted - kinks - coupling
    parts = {"third order": rest, "kinks": kinks, "coupling": coupling}
    tested = tuple(
        at_most(f"{name} below {tolerance:.0%} of the prediction", abs(part) / size, tolerance)
        for name, part in parts.items()
    )
    largest = max(parts, key=lambda name: abs(parts[name]))
    return tested, f"{largest} ({parts[largest] / size:+.0%} of the prediction)"


def compare(
    claim: str,
    measured: Mean,
    predicted: Mean,
    tolerance: float,
    hypotheses: tuple[Hypothesis, ...] = (),
    broken: str = "",
    binding: bool = True,
) -> Check:
    """measured ~ predicted within `tolerance`, decided only where the errors carry it.

    True: inside, with a joint standard error of at most half the tolerance. False: outside by more than three standard errors. None
    otherwise, or where the claim is shown without being held to it (`binding` False).
    """
    error = math.hypot(measured.stderr, predicted.stderr)
    size, off = abs(predicted.value), abs(measured.value - predicted.value)
    if not (math.isfinite(off) and size > 0):
        return Check(
            claim, measured.value, "~", predicted.value, None, hypotheses, None, "there is no finite prediction", error
        )
    ratio = f"measured/predicted {measured.value / predicted.value:.3f} ± {error / size:.3f}"
    if off <= tolerance * size:
        holds = True if error <= 0.5 * tolerance * size else None
        note = ratio if holds else f"{ratio}: too few directions to tell"
    else:
        holds = False if off - 3 * error > tolerance * size else None
        note = f"{ratio}; broken: {broken}" if broken else ratio
        note = note if holds is False else f"{note}; within three standard errors of the tolerance"
    return Check(claim, measured.value, "~", predicted.value, None, hypotheses, holds if binding else None, note, error)


@dataclass(frozen=True)
class Exponent:
    """Slope of log(running average of the squared gradient) against log T over T = start .. T, with a 95 % interval over runs."""

    value: float
    interval: tuple[float, float] | None
    start: int
    runs: int


def rate_exponent(squares: ArrayLike, start: int | None = None) -> Exponent:
    """How fast (1/T) Σ_{t<T} ‖g_t‖² falls: squares [runs, steps], fitted on log-spaced T from `start` (default an eighth of the steps).

    Statement: never below -1, because the sum does not shrink; theory's bounds fall as T^-1 (no noise) and T^-1/2 (noise-limited rates).
    The points of one running average depend on each other, so the interval is Student's over runs, and one run has none.
    """
    square = np.asarray(squares, float)
    if square.ndim != 2 or square.shape[1] < 8 or not (np.isfinite(square).all() and (square >= 0).all()):
        raise UserError(f"rate_exponent needs finite squared gradients [runs, steps >= 8], got {square.shape}")
    steps = square.shape[1]
    first = max(2, steps // 8) if start is None else start
    at = np.unique(np.round(np.geomspace(first, steps, 12)).astype(int))
    average = np.cumsum(square, axis=1)[:, at - 1] / at
    if not (average > 0).all():
        raise UserError("rate_exponent needs a positive running average: the gradient is 0 from the start")
    slopes = np.polyfit(np.log(at), np.log(average).T, 1)[0]
    value, runs = float(slopes.mean()), slopes.size
    if runs == 1:
        return Exponent(value, None, first, 1)
    half = float(student.ppf(0.975, runs - 1) * slopes.std(ddof=1) / math.sqrt(runs))
    return Exponent(value, (value - half, value + half), first, runs)
