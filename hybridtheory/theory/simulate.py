"""The hybrid method on problems of known constants, all seeds at once: x by zeroth-order steps, y by gradient steps.

One run is one call; seeds (and, where rates differ, rates) are the leading dimension of every array, so that a bound that
speaks of an expectation can be compared with hundreds of runs in a second.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hybridtheory.errors import UserError
from hybridtheory.theory.checks import count
from hybridtheory.theory.problems import Array, Problem


@dataclass(frozen=True)
class Run:
    """What a run visited. [T + 1, S] for `f`, else [T, S]; with reshuffling T counts epochs and rows are epoch starts.

    `slope_sq` is the mean squared finite difference of the step (epoch: of its first step); `noise_x`, `noise_y` are the exact
    variances at the point. `w` [S, d] is where the run ended.
    """

    f: Array
    gx_sq: Array
    gy_sq: Array
    slope_sq: Array
    noise_x: Array
    noise_y: Array
    w: Array

    def averaged(self, c_x: float, c_y: float) -> tuple[float, float]:
        """Mean over seeds of (1/T) Σ_t c_x‖g_x‖² + c_y‖g_y‖², and its standard error (0 for a single run)."""
        per_seed = (c_x * self.gx_sq + c_y * self.gy_sq).mean(0)
        error = float(per_seed.std(ddof=1)) / math.sqrt(per_seed.size) if per_seed.size > 1 else 0.0
        return float(per_seed.mean()), error


def directions(law: str, shape: tuple[int, ...], rng: np.random.Generator) -> Array:
    """[..., d] directions with E uu' = I."""
    if law not in ("gaussian", "sphere", "rademacher"):
        raise UserError(f"simulate knows the laws gaussian, sphere and rademacher, got {law!r}")
    if law == "rademacher":
        return np.where(rng.integers(0, 2, shape) == 1, 1.0, -1.0)
    u = rng.standard_normal(shape)
    if law == "sphere":
        u *= np.sqrt(shape[-1] / (u**2).sum(-1, keepdims=True))
    return u


def estimate(
    problem: Problem,
    w: Array,
    index: NDArray[np.intp] | None,
    gradient: Array,
    law: str,
    difference: str,
    mu: float,
    q: int,
    rng: np.random.Generator,
) -> tuple[Array, Array]:
    """ĝ_x [S, d_x] and the mean squared slope [S], for f (index None) or f_index, whose exact gradient [S, d] is given."""
    S, d_x = w.shape[0], problem.d_x
    ghat, squares = np.zeros((S, d_x)), np.zeros(S)

    def f(points: Array) -> Array:
        return problem.value(points) if index is None else problem.value_at(points, index)

    for _ in range(q if d_x else 0):
        u = directions(law, (S, d_x), rng)
        if difference == "exact":
            slope = np.einsum("sd,sd->s", u, gradient[:, :d_x])
        else:
            move = np.zeros_like(w)
            move[:, :d_x] = mu * u
            if difference == "central":
                slope = (f(w + move) - f(w - move)) / (2 * mu)
            elif difference == "forward":
                slope = (f(w + move) - f(w)) / mu
            else:
                raise UserError(f"difference must be exact, central or forward, got {difference!r}")
        ghat += slope[:, None] * u / q
        squares += slope**2 / q
    return ghat, squares


def simulate(
    problem: Problem,
    w0: ArrayLike,
    eta_x: ArrayLike,
    eta_y: ArrayLike,
    T: int,
    seeds: int = 1,
    seed: int = 0,
    law: str = "gaussian",
    sampling: str = "full",
    difference: str = "exact",
    mu: float = 0.0,
    q: int = 1,
    noise: bool = True,
) -> Run:
    """T steps (epochs where `sampling` is "reshuffle") of the simultaneous hybrid update on S runs.

    Args: w0 [d] or [S, d]; eta_x, eta_y: a number or [S]; seeds: S. sampling: "full" batch, "iid" one row a step, "reshuffle" a
          fresh permutation of the rows an epoch. noise: record the exact variances (costs all n gradients a row of the record).
    """
    count("simulate", T=T, seeds=seeds, q=q)
    if sampling not in ("full", "iid", "reshuffle"):
        raise UserError(f"sampling must be full, iid or reshuffle, got {sampling!r}")
    rng = np.random.default_rng(seed)
    w = np.array(np.broadcast_to(np.asarray(w0, float), (seeds, problem.d)))
    step = np.empty((seeds, problem.d))
    step[:, : problem.d_x] = np.broadcast_to(np.asarray(eta_x, float), (seeds,))[:, None]
    step[:, problem.d_x :] = np.broadcast_to(np.asarray(eta_y, float), (seeds,))[:, None]
    f, kept = np.empty((T + 1, seeds)), np.zeros((5, T, seeds))
    inner = problem.n if sampling == "reshuffle" else 1
    for t in range(T):
        g = problem.gradient(w)
        f[t] = problem.value(w)
        kept[0, t], kept[1, t] = (g[:, : problem.d_x] ** 2).sum(1), (g[:, problem.d_x :] ** 2).sum(1)
        if noise:
            kept[3, t], kept[4, t] = problem.noise(w)
        order = np.argsort(rng.random((seeds, problem.n)), axis=1) if sampling == "reshuffle" else None
        for k in range(inner):
            if sampling == "full":
                index, local = None, g
            else:
                index = order[:, k] if order is not None else rng.integers(0, problem.n, seeds)
                local = problem.gradient_at(w, index)
            ghat, squares = estimate(problem, w, index, local, law, difference, mu, q, rng)
            if k == 0:
                kept[2, t] = squares
            w = w - step * np.concatenate([ghat, local[:, problem.d_x :]], axis=1)
    f[T] = problem.value(w)
    return Run(f, kept[0], kept[1], kept[2], kept[3], kept[4], w)
