"""Which subspace a structured law's direction lives in, how its covariance is scaled there, and what of the gradient it captures.

`spectrum` answers for one tensor and one window of a law that keeps its subspace (or mask); the direction is Gaussian given it, so
that `theory.moments_covariance` has its moments. Everything is computed from the law's own factors, never from a dense projector.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hybridtheory.blocks import Block
from hybridtheory.estimators import (
    LOZO,
    Coordinate,
    Gaussian,
    Key,
    Law,
    MagnitudeMask,
    Orthonormal,
    Preconditioned,
    RandomMask,
    Sphere,
    SubZero,
    TeZO,
)
from hybridtheory.estimators.lowrank import LowRank
from hybridtheory.theory.moments_covariance import Spectrum
from hybridtheory.theory.moments_subspace import lozo_second_moment, tezo_second_moment

FULL = (Gaussian, Sphere, Coordinate, Orthonormal)
# More distinct eigenvalues than this are gathered in bins on a log scale: a bin's width, 1 %, then bounds the relative error.
_DISTINCT, _WIDTH = 64, 0.01


def keeps(law: Law) -> bool:
    """Whether the law's subspace outlives a step: its draws then belong to one window, and moments are those given the subspace."""
    return int(getattr(law, "refresh", 1)) > 1 or isinstance(law, TeZO)


def projects(law: Law) -> bool:
    """Whether u lives in a proper subspace of the block."""
    return isinstance(law, SubZero | LOZO | TeZO | MagnitudeMask | RandomMask)


@torch.no_grad()
def spectrum(law: Law, key: Key, name: str, like: Tensor, g: Tensor) -> Spectrum | None:
    """Of u's covariance on one tensor (shape of ``like`` and ``g``) given what ``law`` keeps; None where that is not known."""
    if isinstance(law, Gaussian):
        return Spectrum.of(1.0, g.numel(), square(g))
    if isinstance(law, LowRank):
        shape = law.matrix(like)
        if shape is None:
            return Spectrum.of(1.0, g.numel(), square(g))
        return _low_rank(law, key, name, *shape, like, g.reshape(shape))
    if isinstance(law, MagnitudeMask | RandomMask) and isinstance(law.law, Gaussian):
        mask = law.mask(name, like) if isinstance(law, MagnitudeMask) else law.mask(key, name, like)
        kept = int(mask.sum())
        return Spectrum.of([1.0] * bool(kept), [kept] * bool(kept), [square(g * mask)] * bool(kept))
    if isinstance(law, Preconditioned):
        return _binned(1 / law.h[name].double().reshape(-1), g.double().reshape(-1) ** 2)
    return None


@torch.no_grad()
def captured_energy(law: Law, key: Key, name: str, like: Tensor, g: Tensor) -> float:
    """‖P′g‖² of one tensor (g flat or not) in the subspace of one draw, nan where that is not known."""
    shape = law.matrix(like) if isinstance(law, SubZero) else None
    if isinstance(law, SubZero) and shape is not None:  # all that a draw needs of its spectrum
        u, v = law.subspace(key, name, *shape, like)
        return square(u.T @ g.reshape(shape) @ v)
    found = spectrum(law, key, name, like, g.view(like.shape))
    return math.nan if found is None else found.captured


def square(x: Tensor) -> float:
    """‖x‖²."""
    return float(torch.linalg.vector_norm(x, dtype=torch.float64)) ** 2


def _low_rank(law: LowRank, key: Key, name: str, m: int, n: int, like: Tensor, g: Tensor) -> Spectrum | None:
    r = min(law.rank, m, n)
    if isinstance(law, SubZero):  # u = c U Z V': Σ = c² VV' ⊗ UU'
        u, v = law.subspace(key, name, m, n, like)
        return Spectrum.of(m * n / r**2, r * r, square(u.T @ (g @ v)))
    if isinstance(law, LOZO):  # u = U V'/√r with V kept: Σ = (VV'/r) ⊗ I_m
        _, v = law.factors(key, name, m, n, like)
        lam, w = torch.linalg.eigh((v.T @ v).double() / r)
        parts = (g @ v).double() @ w  # ‖G q‖² for the unit eigenvectors q = V w/√(r λ) of VV'/r
        energy = (parts**2).sum(0) / (r * lam)
        return Spectrum.of(lam.cpu().numpy(), [m] * r, energy.cpu().numpy())
    if isinstance(law, TeZO):  # u = Σ_s τ_s b_s, b_s = u_s v_s'/√r: Σ = BB', and B'B has its eigenvalues
        law.factors(key, name, m, n, like)
        _, left, right = law.cache[name]
        gram = ((left.T @ left) * (right.T @ right)).double() / r
        inner = ((left.T @ g) * right.T).sum(1).double() / math.sqrt(r)
        lam, w = torch.linalg.eigh(gram)
        alive = lam > 1e-9 * lam.max()
        energy = ((w.T @ inner) ** 2 / lam)[alive]
        return Spectrum.of(lam[alive].cpu().numpy(), [1] * int(alive.sum()), energy.cpu().numpy())
    return None


def _binned(lam: Tensor, energy: Tensor) -> Spectrum:
    low, high = float(lam.min()), float(lam.max())
    bins = max(1, math.ceil(math.log(high / low) / _WIDTH)) if high > low else 1
    index = ((lam / low).log_().div_(_WIDTH).long()).clamp_(0, bins - 1)
    counts = torch.bincount(index, minlength=bins).double()
    means = torch.bincount(index, lam, minlength=bins)
    energies = torch.bincount(index, energy, minlength=bins)
    alive = counts > 0
    return Spectrum.of(
        (means[alive] / counts[alive]).cpu().numpy(), counts[alive].cpu().numpy(), energies[alive].cpu().numpy()
    )


def excess(law: Law, block: Block, name: str) -> float | None:
    """x of `composed_second_moment` for one tensor of a law that draws its subspace anew at every step."""
    if not isinstance(law, LowRank):
        return None
    shape = law.matrix(block.parameters[name])
    if shape is None:
        return 2.0
    m, n = shape
    r = min(law.rank, m, n)
    if isinstance(law, SubZero):
        return 2 * m * n / r**2
    if isinstance(law, LOZO):
        return lozo_second_moment(m, n, r) - m * n
    return tezo_second_moment(m, n, r) - m * n
