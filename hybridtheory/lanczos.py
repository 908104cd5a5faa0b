"""Both ends of the spectrum of a symmetric map by three-term Lanczos.

A Ritz value approaches its end from inside, and its residual only says that *some* eigenvalue lies that near; where a theorem needs an
upper bound on the spectrum, ``Estimate.upper`` is one that holds with a stated probability over the random start (see ``end_excess``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from scipy.linalg import eigh_tridiagonal

from hybridtheory import streams
from hybridtheory.blocks import Block
from hybridtheory.errors import UserError
from hybridtheory.estimate import Estimate
from hybridtheory.oracle import Products
from hybridtheory.shards import local
from hybridtheory.vectors import Tensors, add_, combined, components, dot, norm, scale_

Matvec = Callable[[Tensors], Tensors]

# A basis up to this many elements (512 MiB in float32) is kept: orthogonality is then exact, Ritz vectors come for free, and a trace
# can leave out what the basis already spans.
BASIS_ELEMENTS = 1 << 27


@dataclass(frozen=True)
class Lanczos:
    """What k products with one start vector tell. ``nodes`` are Ritz values (ascending), ``weights`` squared first components."""

    nodes: np.ndarray  # (k,)
    weights: np.ndarray  # (k,), sum to 1
    lam_max: Estimate
    lam_min: Estimate
    alphas: np.ndarray = field(repr=False)  # (k,) diagonal of the tridiagonal matrix
    betas: np.ndarray = field(repr=False)  # (k-1,) its off-diagonal
    warm: Tensors | None = field(
        default=None, repr=False
    )  # sum of the two end Ritz vectors: a start for the next point
    last_beta: float = 0.0
    basis: Tensors | None = field(
        default=None, repr=False
    )  # per tensor (k, numel), orthonormal over all tensors together
    forms: np.ndarray | None = field(default=None, repr=False)  # (k, micro-batches): v_j'H_i v_j of the basis vectors

    @property
    def steps(self) -> int:
        return len(self.nodes)


def end_excess(d: int, steps: int, failure: float, mixed: bool = False) -> float:
    """ε with P(λ_max − θ_max > ε (λ_max − λ_min)) ≤ failure, after ``steps`` Lanczos steps from a random start.

    Assumptions: exact arithmetic (a kept basis, or few enough steps); start uniform on the sphere of R^d. ``mixed``: the start is
                 (a + z/‖z‖)/√2 with a fixed unit vector a instead; a shifted Gaussian is no likelier to miss the top eigenvector
                 than a centred one (Anderson's inequality), which costs a factor 2 inside the logarithm.
    Statement:   with U the Chebyshev polynomial of the second kind, U_{2k−2}(√x) has degree k−1 in x, and testing the Krylov
                 space with it gives: failure implies |<start, v₁>| < 1/sinh((2k−1) artanh √ε). A component of a uniform
                 direction is below τ with probability at most τ √(2d/π). Solved for ε; capped at 1.
    Reference:   the shape is Kuczyński & Woźniakowski 1992, Theorem 4.2; this short proof and its constants are ours.
    """
    if steps >= d:
        return 0.0
    if not 0 < failure < 1:
        raise UserError(f"a probability of failure lies strictly between 0 and 1, got {failure}")
    factor = math.sqrt(2 * d / math.pi) * (2.0 if mixed else 1.0) / failure
    return math.tanh(math.asinh(factor) / (2 * steps - 1)) ** 2


def least_steps(d: int, failure: float, bound: float) -> int:
    """Steps of a random start after which each end's one-sided bound lies within ``bound`` spreads of its Ritz value; d at most."""
    steps = 1
    while steps < d and _outer(end_excess(d, steps, failure)) > bound:
        steps += 1
    return steps


def lanczos(
    matvec: Matvec,
    start: Tensors,
    max_steps: int = 60,
    tol: float = 0.02,
    ends: Sequence[str] = ("max", "min"),
    min_steps: int = 8,
    failure: float = 0.05,
    bound: float = math.inf,
    mixed: bool = False,
    basis: bool | None = None,
    below: float = -math.inf,
) -> Lanczos:
    """Both ends of the spectrum of a symmetric map, until each end in ``ends`` is resolved to the relative error ``tol`` and the
    one-sided bounds (each holds with probability 1 - 2 ``failure``) lie within ``bound`` spreads of the Ritz values.

    The error of a Ritz value is estimated as min(r, r²/gap) from its residual r and the gap to its neighbour, and must be small twice
    in a row (docs/log.md has what simpler rules miss); what the last two products moved it bounds that estimate from below, since an
    end that is a cluster creeps while its residual looks settled. ``ends`` = ("modulus",) resolves |λ|max alone: the larger end, and
    the other one far enough to know that it is the smaller. Without a kept
    basis the vectors lose orthogonality and converged values reappear as copies: ends stay right, copies only waste steps.
    ``below``: it is enough to know, with the bound's probability, that the upper end lies below this.
    ``start`` is taken over, and the list is empty after it: on a large model every vector counts.
    Raises UserError for a product that is not finite.
    """
    d = sum(t.numel() for t in start)
    steps_allowed = min(max_steps, d)
    keep = d * steps_allowed <= BASIS_ELEMENTS if basis is None else basis
    q = scale_(list(start), 1 / norm(start))
    start.clear()  # a caller's frame may hold the list until this returns
    previous: Tensors | None = None
    stored: list[torch.Tensor] = (
        [torch.empty(steps_allowed, local(t).numel(), dtype=t.dtype, device=t.device) for t in q] if keep else []
    )
    alphas: list[float] = []
    betas: list[float] = []
    beta = 0.0
    trail: list[tuple[float, float]] = []  # both ends after every product
    agreed = (
        0  # consecutive steps at which every wanted end was resolved: one alone may rest on a neighbour not yet seen
    )
    while True:
        k = len(alphas)
        for rows, t in zip(stored, q, strict=False):
            rows[k] = local(t).reshape(-1)
        w = [t.detach() for t in matvec(q)]
        alphas.append(dot(w, q))
        if not math.isfinite(alphas[-1]):
            raise UserError(
                "a Hessian product is not finite: lower the dtype's load (use float32) or check the loss at this point"
            )
        add_(w, q, -alphas[-1])
        if previous is not None:
            add_(w, previous, -beta)
        if stored:
            orthogonalise(w, stored, k + 1)
        beta = norm(w)
        theta, s = _tridiagonal(alphas, betas)
        spread = max(abs(theta[0]), abs(theta[-1]))
        # An invariant subspace: every Ritz value is an eigenvalue, and there is no next direction.
        exhausted = k + 1 == d or beta <= 1e-7 * spread or spread == 0.0
        # The relative errors are floored at the noise of products in the vectors' precision.
        trail.append((theta[0], theta[-1]))
        past = trail[-3] if k > 1 else (math.inf, math.inf)
        moved = {end: abs(theta[end] - past[end]) for end in (0, -1)}
        errors = {end: 0.0 if exhausted else max(moved[end], _error(theta, np.abs(beta * s[-1]), end)) for end in moved}
        enough = all(errors[end] <= _allowed(theta, end, tol) for end in _wanted(theta, ends))
        if "modulus" in ends:
            rival = -1 - _wanted(theta, ends)[0]
            enough = enough and abs(theta[rival]) + errors[rival] <= (1 + tol) * spread
        agreed = agreed + 1 if enough else 0
        beyond = _outer(end_excess(d, k + 1, failure, mixed))
        decided = math.isfinite(beyond) and theta[-1] + beyond * (theta[-1] - theta[0]) < below
        if (
            exhausted
            or ((decided or (agreed >= 2 and beyond <= bound)) and k + 1 >= min_steps)
            or k + 1 == steps_allowed
        ):
            break
        betas.append(beta)
        previous, q = q, scale_(w, 1 / beta)
    residuals = np.zeros_like(theta) if exhausted else np.abs(beta * s[-1])
    excess = 0.0 if exhausted and k + 1 == d else end_excess(d, k + 1, failure, mixed)
    spread = theta[-1] - theta[0]
    outer = _outer(excess) * spread if spread else 0.0

    def end_estimate(end: int) -> Estimate:
        resolved = errors[end] <= _allowed(theta, end, tol)
        wanted = f"wanted {tol * abs(theta[end]):.2g}"
        note = "" if resolved else f"error about {errors[end]:.2g} after {k + 1} products, {wanted}"
        if not resolved and end == -1 and decided:
            resolved, note = (
                True,
                f"error about {errors[end]:.2g} after {k + 1} products; that it lies below {below:g} is certain enough",
            )
        return Estimate(
            float(theta[end]),
            residual=float(residuals[end]),
            upper=float(theta[end] + (outer if end else -outer)),
            confidence=1 - 2 * failure,
            n=k + 1,
            resolved=bool(resolved) or end not in _wanted(theta, ends),
            note=note,
        )

    warm = None
    if stored:
        combo = s[:, -1] / np.linalg.norm(s[:, -1]) + s[:, 0] / np.linalg.norm(s[:, 0])
        coefficients = torch.as_tensor(combo / np.linalg.norm(combo))
        warm = combined(coefficients, [r[: k + 1] for r in stored], q)
    ends_found = end_estimate(-1), end_estimate(0)
    coefficients_of_T = np.array(alphas), np.array(betas[: len(alphas) - 1])
    basis_found = [rows[: k + 1] for rows in stored] or None
    return Lanczos(theta, s[0] ** 2, *ends_found, *coefficients_of_T, warm, beta, basis_found)


def _outer(excess: float) -> float:
    """Each end may lie beyond its Ritz value by ε times the *true* spread, which both ends together bound by the measured one/(1−2ε)."""
    return excess / (1 - 2 * excess) if excess < 0.5 else math.inf


def _tridiagonal(alphas: Sequence[float], betas: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    if len(alphas) == 1:
        return np.array(alphas), np.ones((1, 1))
    theta, s = eigh_tridiagonal(np.array(alphas), np.array(betas[: len(alphas) - 1]))
    return theta, s


def _wanted(theta: np.ndarray, ends: Sequence[str]) -> list[int]:
    """The ends to resolve as indices into the Ritz values: -1 (max), 0 (min)."""
    if "modulus" in ends:
        return [-1 if abs(theta[-1]) >= abs(theta[0]) else 0]
    return [end for end, name in ((-1, "max"), (0, "min")) if name in ends]


def _allowed(theta: np.ndarray, end: int, tol: float) -> float:
    """Relative to the end itself, and no less than what products in single precision resolve beside the other end."""
    return float(max(tol * abs(theta[end]), 1e-3 * tol * max(abs(theta[0]), abs(theta[-1]))))


def _error(theta: np.ndarray, residuals: np.ndarray, end: int) -> float:
    """min(r, r²/gap) for the Ritz value at one end. The gap is to the neighbour, less the neighbour's own residual: it too is still
    on its way outwards. Copies of the value (lost orthogonality) are no neighbours."""
    r = float(residuals[end])
    distance = np.abs(theta - theta[end])
    others = np.flatnonzero(distance > 1e-5 * np.abs(theta).max())
    if len(others) == 0:
        return r
    nearest = others[np.argmin(distance[others])]
    gap = float(distance[nearest] - residuals[nearest])
    return r * r / gap if gap > r else r


def orthogonalise(w: Tensors, stored: list[torch.Tensor], k: int) -> None:
    """w minus its part in the first k stored vectors; once more where that part was not small (Daniel, Gragg, Kaufman & Stewart 1976).

    The caller has already taken out the vectors that carry most of it, so once is the rule: a pass reads the whole basis and costs
    as much as a product of a late layer.
    """
    for _ in range(2):
        coefficients = components([rows[:k] for rows in stored], w)
        for rows, t in zip(stored, map(local, w), strict=True):
            t.sub_((coefficients @ rows[:k]).view_as(t))
        if float(coefficients.norm()) <= norm(w):
            return


def spectrum(
    hess: Products,
    block: Block,
    seed: int,
    index: int = 0,
    warm: Tensors | None = None,
    **options: Any,
) -> Lanczos:
    """Lanczos on one diagonal block H_bb from a random start, half of it ``warm`` where that is given.

    Good choices for ``warm`` are the last point's end vectors and the block's gradient, which leans towards the top eigenvectors
    (Gur-Ari, Roberts & Dyer 2018) and costs nothing where it is known. The random half keeps the one-sided bound; what rests
    on a random start alone (density, tr H₊ by quadrature) must not use such a run.
    """

    def start() -> Tensors:
        drawn = streams.gaussian(block, seed, "lanczos", index)
        return drawn if warm is None else add_(scale_(drawn, 1 / norm(drawn)), warm, 1 / norm(warm))

    forms: list[list[float]] = []
    ranks = hess.oracle.ranks

    def matvec(v: Tensors) -> Tensors:
        total: Tensors = []
        own: list[list[float]] = []
        for _, (hv,) in hess.each([v], block):
            own.append([dot(v, hv)])
            total = add_(total, hv) if total else hv
            del hv
        forms.append([form for (form,) in ranks.join(own, len(hess.oracle.batches))])
        return ranks.add_(total)

    run = lanczos(matvec, start(), mixed=warm is not None, **options)
    whole = len({len(parts) for parts in forms}) == 1  # not where memory ran out midway and the micro-batches changed
    return replace(run, forms=np.array(forms) if whole else None)
