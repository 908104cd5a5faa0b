"""Moments of Gaussian directions u ~ N(0, Σ), Σ singular or not, and of laws that are independent from tensor to tensor.

A kept subspace, a fixed mask and a diagonal preconditioner are all Gaussian with some covariance Σ; what their estimates do to a
gradient depends on Σ only through its *spectrum*: eigenvalues λ, their multiplicities, and the energy of g in each eigenspace.
ĝ = (1/q) Σ_k (g'u_k) u_k as mu -> 0. Statements are ours (Isserlis' theorem) and exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.integrate import quad

from hybridtheory.errors import UserError
from hybridtheory.theory.checks import count, nonnegative, positive


@dataclass(frozen=True)
class Spectrum:
    """Eigenvalues λ > 0 of Σ, shape (n,), how often each occurs, and ‖P_λ g‖² in each eigenspace (u has no part where λ = 0)."""

    value: NDArray[np.float64]
    count: NDArray[np.float64]
    energy: NDArray[np.float64]

    @classmethod
    def of(cls, value: ArrayLike, count: ArrayLike, energy: ArrayLike) -> Spectrum:
        """From numbers or arrays of one shape; UserError for eigenvalues that are not positive or energies below 0."""
        arrays = [np.atleast_1d(np.asarray(a, float)) for a in (value, count, energy)]
        if len({a.shape for a in arrays}) != 1 or not (arrays[0] > 0).all() or not (arrays[2] >= 0).all():
            raise UserError(
                f"a spectrum needs positive eigenvalues with one multiplicity and one energy each, got {[a.shape for a in arrays]}"
            )
        return cls(*arrays)

    @classmethod
    def joined(cls, parts: Sequence[Spectrum]) -> Spectrum:
        """Of the block-diagonal Σ of several tensors."""
        return cls(*(np.concatenate([getattr(p, f) for p in parts]) for f in ("value", "count", "energy")))

    @property
    def dimension(self) -> float:
        """Dimensions of the subspace that u lives in."""
        return float(self.count.sum())

    @property
    def captured(self) -> float:
        """‖P'g‖²: the gradient's energy in that subspace."""
        return float(self.energy.sum())

    @property
    def isotropic(self) -> bool:
        """Whether Σ is one multiple of a projector: then cosines follow the Beta law of the subspace's dimension."""
        return bool(np.ptp(self.value) <= 1e-6 * self.value.max())


def covariance_mean(s: Spectrum) -> tuple[float, float]:
    """⟨E ĝ, g⟩ = g'Σg and ‖E ĝ‖² = g'Σ²g."""
    return float(s.value @ s.energy), float(s.value**2 @ s.energy)


def covariance_second_moment(s: Spectrum, q: int = 1) -> float:
    """E‖ĝ‖² = (g'Σg tr Σ + (q + 1) g'Σ²g)/q for q independent queries."""
    count("covariance_second_moment", q=q)
    along, square = covariance_mean(s)
    return (along * float(s.value @ s.count) + (q + 1) * square) / q


def covariance_cosine_squared(s: Spectrum, g_sq: float) -> float:
    """E cos²(u, v) for one query, v = g (g_sq = ‖g‖²) or v = P'g (g_sq = s.captured).

    Statement: u = Σ^½ z, cos² = (v'u)²/(‖u‖²‖v‖²) and 1/x = ∫₀^∞ e^{-xt} dt give
               E cos² = ‖v‖⁻² ∫₀^∞ Σ_λ λ e_λ/(1 + 2tλ) Π_λ (1 + 2tλ)^{-n_λ/2} dt: one quadrature, exact. For one λ it is
               captured/(k ‖v‖²).
    """
    positive("covariance_cosine_squared", g_sq=g_sq)
    # In units in which tr Σ = 1/2 the product falls like e^{-t/2}, whatever the scale; substitute t = x/(1 - x).
    lam = s.value / (2 * float(s.value @ s.count))
    energy = s.energy / g_sq

    def integrand(x: float) -> float:
        if x >= 1.0:
            return 0.0
        t = x / (1 - x)
        grown = 2 * t * lam
        return (
            float((lam * energy / (1 + grown)).sum() * np.exp(-0.5 * (s.count * np.log1p(grown)).sum())) / (1 - x) ** 2
        )

    return float(quad(integrand, 0.0, 1.0, epsabs=0.0, epsrel=1e-9, limit=200)[0])


def composed_second_moment(d: int, g_sq: float, excess: Sequence[float], energies: Sequence[float]) -> float:
    """E‖ĝ‖² = d‖g‖² + Σ_l x_l ‖G_l‖² for directions independent and unbiased tensor by tensor, with E‖u‖² = d.

    Args: x_l = (E‖ĝ_l‖² of tensor l alone)/‖G_l‖² - d_l: 2 for a Gaussian, 2mn/r² SubZero, (2m+2n+2r+2)/r LOZO.
    Statement: ĝ = Σ_l c_l u; E c_l² = ‖G_l‖², E c_l c_m ‖u_k‖² = 0 for l ≠ m by symmetry of u_l alone.
    """
    count("composed_second_moment", d=d)
    nonnegative("composed_second_moment", g_sq=g_sq)
    return d * g_sq + float(np.dot(excess, energies))


def random_mask_second_moment(d: int, keep: float) -> float:
    """E‖ĝ‖²/‖g‖² = p(p(d-1) + 3) for a Gaussian under a fresh mask that keeps each entry with probability p; E ĝ = p g."""
    count("random_mask_second_moment", d=d)
    positive("random_mask_second_moment", keep=keep)
    if keep > 1:
        raise UserError(f"a mask keeps a share of at most 1 of the entries, got {keep:.6g}")
    return keep * (keep * (d - 1) + 3)
