"""Moments of structured directions: fixed subspaces, masks, low-rank matrices, preconditioned Gaussians.

Every factor multiplies ‖g‖² (or the energy named) and holds as mu -> 0. Averaged over rotation-invariant factors every
such direction has E cos² = 1/d against the true gradient, whatever its rank (Schur's lemma): only directions that know
the gradient escape it. Against the *projected* gradient the dimension is that of the subspace. Both must be stated
side by side.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hybridtheory.errors import UserError
from hybridtheory.theory.checks import count, nonnegative, positive
from hybridtheory.theory.moments import cosine_beta, second_moment


def averaged(single: float, mean_sq: float = 1.0, q: int = 1) -> float:
    """E‖mean of q independent estimates‖² = (single + (q-1) mean_sq)/q, with mean_sq = ‖E ĝ‖²; exact for any law."""
    count("averaged", q=q)
    nonnegative("averaged", single=single, mean_sq=mean_sq)
    return (single + (q - 1) * mean_sq) / q


def subspace_second_moment(k: int, q: int = 1) -> float:
    """E‖ĝ‖²/‖P'g‖² = (k+q+1)/q for u = Pz, P fixed with k orthonormal columns, z ~ N(0, I_k).

    Assumptions: P fixed (SubZero inside one refresh window without norm alignment, k = Σ r²; a mask of k coordinates).
    Statement:   E ĝ = PP'g, the projected gradient and not g. Reference: SubZero Thm 2 for q = 1 (arXiv 2410.08989,
                 from memory), re-derived.
    """
    return second_moment("gaussian", k, q)


def subspace_cosine_beta(k: int, q: int = 1) -> tuple[float, float] | None:
    """Beta law of cos²(ĝ, P'g) in a fixed k-dimensional subspace: that of a gaussian in k dimensions, mean
    q/(q+k-1).
    """
    return cosine_beta("gaussian", k, q)


def captured_energy(k: int, d: int) -> float:
    """E‖P'g‖²/‖g‖² = k/d for a random subspace of k of d dimensions (SubZero: r²/(mn) per matrix; a random mask:
    k/d).

    Examples:
        >>> captured_energy(k=64, d=6400)
        0.01
    """
    count("captured_energy", k=k, d=d)
    if k > d:
        raise UserError(f"a subspace of k = {k} dimensions does not fit into d = {d}")
    return k / d


def masked_cosine_squared(k: int, energy: float) -> float:
    """E cos²(ĝ, g) = ρ/k for gaussian directions on k masked coordinates that hold the share ρ = ‖m·g‖²/‖g‖² of the
    energy.

    Statement: a gain of ρd/k over all d coordinates; 1 (no gain) for a random mask.
    """
    count("masked_cosine_squared", k=k)
    nonnegative("masked_cosine_squared", energy=energy)
    if energy > 1 + 1e-9:
        raise UserError(f"the captured share of the energy must be <= 1, got {energy:.6g}")
    return energy / k


def subzero_second_moment(
    shapes: Sequence[tuple[int, int]],
    ranks: Sequence[int],
    energies: Sequence[float],
    dense: int = 0,
    dense_energy: float = 0.0,
) -> float:
    """E‖ĝ‖² = d‖g‖² + 2 Σ_l (m_l n_l/r_l²)‖G_l‖² (+ 2‖g_dense‖²) for norm-aligned SubZero, averaged over U, V and Z.

    Args: shapes (m_l, n_l), ranks r_l and ‖G_l‖² of the matrices; `dense` parameters with plain Gaussian directions
          (vectors) and their energy. Units of ‖g‖².
    Assumptions: u_l = (sqrt(mn)/r) U Z V', U and V uniform with orthonormal columns, Z ~ N(0, 1).
    Statement:   unbiased over (U, V, Z), and never below MeZO's (d+2)‖g‖². Ours.
    """
    if not len(shapes) == len(ranks) == len(energies):
        raise UserError(
            f"subzero needs one rank and one energy a matrix, got {len(shapes)}, {len(ranks)}, {len(energies)}"
        )
    d, total, extra = dense, dense_energy, 2 * dense_energy
    for (m, n), r, energy in zip(shapes, ranks, energies):
        _rank("SubZero", m, n, r)
        nonnegative("subzero_second_moment", energy=energy)
        d += m * n
        total += energy
        extra += 2 * m * n / r**2 * energy
    return d * total + extra


def lozo_second_moment(m: int, n: int, r: int) -> float:
    """E‖ĝ‖²/‖G‖² = mn + (2m + 2n + 2r + 2)/r for LOZO: ĝ = <G, UV'> UV'/r, U (m, r) and V (n, r) standard Gaussian.

    Statement: unbiased over (U, V); given V the mean is GVV'/r. The released code omits 1/r: its rate is r times
               larger. Ours.
    """
    _rank("LOZO", m, n, r)
    return m * n + (2 * m + 2 * n + 2 * r + 2) / r


def tezo_second_moment(m: int, n: int, r: int) -> float:
    """E‖ĝ‖²/‖G‖² = mn + 2 + (2mn + 6(m+n) + 10)/r for TeZO: Z = Σ_s τ_s u_s v_s', ĝ = <G, Z> Z/r, all Gaussian.
    Ours.
    """
    _rank("TeZO", m, n, r)
    return m * n + 2 + (2 * m * n + 6 * (m + n) + 10) / r


def srgf_second_moment(d: int, k: int, orthonormal: bool = False) -> float:
    """E‖ĝ‖²/‖g‖² for S-RGF scaled to be unbiased, P (d, k) redrawn every step, z ~ N(0, I_k).

    Statement: Gaussian P, u = Pz/√k: (d+2)(k+2)/k. Orthonormal P, u = sqrt(d/k) Pz: d(k+2)/k. Ours.

    Examples:
        >>> srgf_second_moment(d=98, k=8), srgf_second_moment(d=98, k=8, orthonormal=True)
        (125.0, 122.5)
    """
    count("srgf_second_moment", d=d, k=k)
    if orthonormal and k > d:
        raise UserError(f"S-RGF with orthonormal columns needs k <= d, got k = {k}, d = {d}")
    return (d if orthonormal else d + 2) * (k + 2) / k


def preconditioned_second_moment(g: ArrayLike, sigma: ArrayLike) -> float:
    """E‖ĝ‖² = g'Σg trΣ + 2 g'Σ²g for u ~ N(0, Σ), Σ = diag(sigma) (HiZOO: 1/h); the mean is Σg, not g. Ours."""
    v, s = _pair(g, sigma)
    return float((v**2 * s).sum() * s.sum() + 2 * (v**2 * s**2).sum())


def hizoo_diagonal_mean(h: ArrayLike, H: ArrayLike) -> NDArray[np.float64]:
    """E of HiZOO's estimate of diag(H): ½(tr M + 2 M_ii) h_i with M = Σ^½ H Σ^½, Σ = diag(1/h); H >= 0.

    Statement: what the released code averages, |l₊ + l₋ - 2 l₀|/(2 mu²) h_i u_i²: biased by the trace term, where
               Stein's identity subtracts Σ^{-1}. Ours.
    """
    weights, hessian = np.asarray(h, float), np.asarray(H, float)
    if not (weights > 0).all():
        raise UserError(f"hizoo_diagonal_mean needs h > 0, got a least h of {weights.min():.6g}")
    diagonal = np.diag(hessian) / weights
    out: NDArray[np.float64] = 0.5 * (diagonal.sum() + 2 * diagonal) * weights
    return out


def _rank(name: str, m: int, n: int, r: int) -> None:
    count(name, m=m, n=n, r=r)
    if name == "SubZero" and r > min(m, n):
        raise UserError(
            f"SubZero needs rank <= min(m, n), got r = {r} for a {m} x {n} matrix: lower the rank or reshape"
        )


def _pair(g: ArrayLike, sigma: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    v, s = np.asarray(g, float), np.asarray(sigma, float)
    if v.shape != s.shape or not (s >= 0).all():
        raise UserError(
            f"sigma must be non-negative and shaped like g, got {s.shape} for {v.shape}, least {s.min():.6g}"
        )
    positive("preconditioned_second_moment", trace=float(s.sum()))
    return v, s
