"""Test problems whose constants are known exactly: the ground on which every theorem is held to account.

A problem is a finite sum f = (1/n) Σ f_i over w = (x, y): x the first d_x coordinates (the zeroth-order block), y the d_y that
follow (the first-order block). Points are batched: w has shape [..., d], values [...], and seeds are a leading dimension.

T1 `quadratic`, T2 `pseudo_huber` and T3 `cosh` are one class with three scalar functions; `logistic` and
`softmax` regression and the LoRA-shaped `bilinear` problem are the realistic ones. `L_x`, `L_y` satisfy
-diag(L_x I, L_y I) <= Hess f_i <= diag(L_x I, L_y I) jointly, everywhere (where they exist), for every f_i.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hybridtheory.errors import UserError
from hybridtheory.theory.checks import count, positive

Array = NDArray[np.float64]
Law = Callable[[float], float]  # l(u): curvature allowed where the full gradient has norm u


class Problem(ABC):
    """What every problem offers; subclasses give `values`, `gradients` and `hessian`.

    Attributes: d_x, d_y, n; f_star (exact minimum or infimum); L_x, L_y (NaN where no global constant exists); l_x, l_y (the
    generalized smoothness laws; constant where f is smooth); noise_sup (suprema of the two variances, inf where unbounded).
    """

    d_x: int
    d_y: int
    n: int
    f_star: float
    L_x: float
    L_y: float
    l_x: Law
    l_y: Law
    noise_sup: tuple[float, float] = (math.inf, math.inf)

    @property
    def d(self) -> int:
        return self.d_x + self.d_y

    @abstractmethod
    def values(self, w: Array) -> Array:
        """[..., d] -> [..., n], every f_i."""

    @abstractmethod
    def gradients(self, w: Array) -> Array:
        """[..., d] -> [..., n, d], every gradient."""

    @abstractmethod
    def hessian(self, w: Array) -> Array:
        """[d] -> [d, d], Hessian of f."""

    def value(self, w: Array) -> Array:
        """[..., d] -> [...], f."""
        out: Array = self.values(w).mean(-1)
        return out

    def gradient(self, w: Array) -> Array:
        """[..., d] -> [..., d], gradient of f."""
        out: Array = self.gradients(w).mean(-2)
        return out

    def value_at(self, w: Array, i: NDArray[np.intp]) -> Array:
        """f_i for one index a point: [S, d], [S] -> [S]."""
        return np.take_along_axis(self.values(w), i[:, None], 1)[:, 0]

    def gradient_at(self, w: Array, i: NDArray[np.intp]) -> Array:
        """Gradient of f_i for one index a point: [S, d], [S] -> [S, d]."""
        return np.take_along_axis(self.gradients(w), i[:, None, None], 1)[:, 0]

    def noise(self, w: Array) -> tuple[Array, Array]:
        """Exact (1/n) Σ_i ‖∇_k f_i - ∇_k f‖² of the blocks at w: [..., d] -> [...], [...]."""
        g = self.gradients(w)
        spread = ((g - g.mean(-2, keepdims=True)) ** 2).mean(-2)
        return spread[..., : self.d_x].sum(-1), spread[..., self.d_x :].sum(-1)


@dataclass(frozen=True)
class Scalar:
    """A convex even function of one variable with its first two derivatives."""

    value: Callable[[Array], Array]
    first: Callable[[Array], Array]
    second: Callable[[Array], Array]


SQUARE = Scalar(lambda t: 0.5 * t**2, lambda t: t, np.ones_like)
PSEUDO_HUBER = Scalar(lambda t: np.sqrt(1 + t**2), lambda t: t / np.sqrt(1 + t**2), lambda t: (1 + t**2) ** -1.5)


def cosh_scalar(a: float, b: float) -> Scalar:
    """a(cosh(bt) - 1): second derivative <= ab² + b|first derivative|, with equality in the limit."""
    return Scalar(
        lambda t: a * (np.cosh(b * t) - 1), lambda t: a * b * np.sinh(b * t), lambda t: a * b**2 * np.cosh(b * t)
    )


@dataclass
class Separable(Problem):
    """f_i(w) = Σ_k φ((A w - b_i)_k) with A square and invertible (or φ a square): f* is one scalar problem a coordinate."""

    A: Array  # [K, d]
    b: Array  # [n, K]
    phi: Scalar
    d_x: int
    d_y: int
    L_x: float
    L_y: float
    l_x: Law
    l_y: Law
    noise_sup: tuple[float, float] = (math.inf, math.inf)
    n: int = field(init=False)
    f_star: float = field(init=False)
    minimiser: Array = field(init=False)

    def __post_init__(self) -> None:
        self.n = self.b.shape[0]
        # (1/n) Σ φ'(t - b_i) grows with t and changes sign between the extreme b: bisect every coordinate at once.
        low, high = self.b.min(0), self.b.max(0)
        for _ in range(200):
            mid = (low + high) / 2
            left = self.phi.first(mid - self.b).mean(0) < 0
            low, high = np.where(left, mid, low), np.where(left, high, mid)
        best = (low + high) / 2
        self.minimiser = np.linalg.lstsq(self.A, best, rcond=None)[0]
        self.f_star = float(self.value(self.minimiser))

    def values(self, w: Array) -> Array:
        return self.phi.value((w @ self.A.T)[..., None, :] - self.b).sum(-1)

    def gradients(self, w: Array) -> Array:
        return self.phi.first((w @ self.A.T)[..., None, :] - self.b) @ self.A

    def gradient(self, w: Array) -> Array:
        # Averaging before the product with A saves a factor n.
        out: Array = self.phi.first((w @ self.A.T)[..., None, :] - self.b).mean(-2) @ self.A
        return out

    def value_at(self, w: Array, i: NDArray[np.intp]) -> Array:
        return self.phi.value(w @ self.A.T - self.b[i]).sum(-1)

    def gradient_at(self, w: Array, i: NDArray[np.intp]) -> Array:
        return self.phi.first(w @ self.A.T - self.b[i]) @ self.A

    def hessian(self, w: Array) -> Array:
        weight = self.phi.second(w @ self.A.T - self.b).mean(0)
        return (self.A.T * weight) @ self.A


def rotation(d: int, rng: np.random.Generator) -> Array:
    """A uniformly random orthogonal matrix [d, d]."""
    q, r = np.linalg.qr(rng.standard_normal((d, d)))
    out: Array = q * np.sign(np.diag(r))
    return out


def _scales(d_x: int, d_y: int, x: float, y: float) -> Array:
    if d_x + d_y < 1:
        raise UserError(f"a problem needs at least one parameter, got d_x = {d_x}, d_y = {d_y}")
    return np.r_[np.full(d_x, x), np.full(d_y, y)]


def quadratic(
    d_x: int,
    d_y: int = 0,
    L_x: float = 1.0,
    L_y: float = 1.0,
    n: int = 1,
    spread: float = 0.0,
    spectrum: ArrayLike | None = None,
    coupled: bool = True,
    seed: int = 0,
) -> Separable:
    """T1: f_i = ½ (w - c_i)' H (w - c_i), H = S Q S, S = diag(√L_x, √L_y), 0 <= Q <= I, so diag(L_x, L_y) >= H exactly.

    Args: spectrum: eigenvalues of Q in [0, 1], shape (d,) (default: all ones, H diagonal); spread: standard deviation of the
          centres c_i, so both variances are constants. Not coupled: Q has no cross block; the first d_x eigenvalues belong to x.
    """
    positive("quadratic", L_x=L_x, L_y=L_y)
    count("quadratic", n=n)
    rng = np.random.default_rng(seed)
    d = d_x + d_y
    q = np.ones(d) if spectrum is None else np.asarray(spectrum, float)
    if q.shape != (d,) or not ((q >= 0) & (q <= 1)).all():
        raise UserError(
            f"quadratic needs {d} eigenvalues in [0, 1], got shape {q.shape} in [{q.min():.4g}, {q.max():.4g}]"
        )
    R = rotation(d, rng)
    if not coupled:
        R = np.zeros((d, d))
        R[:d_x, :d_x], R[d_x:, d_x:] = rotation(d_x, rng), rotation(d_y, rng)
    A = np.sqrt(q)[:, None] * R.T * np.sqrt(_scales(d_x, d_y, L_x, L_y))
    centres = spread * rng.standard_normal((n, d)) if spread else np.zeros((n, d))
    p = Separable(A, centres @ A.T, SQUARE, d_x, d_y, L_x, L_y, lambda u: L_x, lambda u: L_y)
    p.noise_sup = tuple(float(v) for v in p.noise(np.zeros(d)))  # type: ignore[assignment]
    return p


def pseudo_huber(
    d_x: int, d_y: int = 0, alpha: float = 1.0, beta: float = 1.0, n: int = 1, spread: float = 1.0, seed: int = 0
) -> Separable:
    """T2: f_i = Σ_k sqrt(1 + ((CSw)_k - b_ik)²), C orthogonal, S = diag(alpha, beta): L_x = alpha², L_y = beta².

    Both variances are at most d (alpha², beta²): each derivative lies in [-1, 1].
    """
    positive("pseudo_huber", alpha=alpha, beta=beta)
    count("pseudo_huber", n=n)
    rng = np.random.default_rng(seed)
    A = rotation(d_x + d_y, rng) * _scales(d_x, d_y, alpha, beta)
    b = spread * rng.standard_normal((n, d_x + d_y))
    sup = ((d_x + d_y) * alpha**2, (d_x + d_y) * beta**2)
    return Separable(A, b, PSEUDO_HUBER, d_x, d_y, alpha**2, beta**2, lambda u: alpha**2, lambda u: beta**2, sup)


def cosh(
    d_x: int, d_y: int = 0, alpha: float = 1.0, beta: float = 1.0, a: float = 1.0, b: float = 1.0, seed: int = 0
) -> Separable:
    """T3: f = Σ_k a (cosh(b (CSw)_k) - 1), exactly (L0, L1)-smooth and not smooth; f* = 0.

    l_x(u) = alpha² (ab² + b u/min(alpha, beta)), l_y(u) = beta² (...): L0 = alpha² ab², L1 = alpha² b/min(alpha, beta) for x.
    """
    positive("cosh", alpha=alpha, beta=beta, a=a, b=b)
    rng = np.random.default_rng(seed)
    A = rotation(d_x + d_y, rng) * _scales(d_x, d_y, alpha, beta)
    # With one block only its own scale is the least singular value of the map from margins to gradients.
    least = min([alpha] * (d_x > 0) + [beta] * (d_y > 0))

    def law(scale: float) -> Law:
        return lambda u: scale**2 * (a * b**2 + b * u / least)

    zero = np.zeros((1, d_x + d_y))
    return Separable(A, zero, cosh_scalar(a, b), d_x, d_y, math.nan, math.nan, law(alpha), law(beta), (0.0, 0.0))
