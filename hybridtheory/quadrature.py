"""tr H₋ = Σ max(−λ, 0) from Lanczos runs: Gauss's rule, and the two bounds between which the moments leave it.

k products fix the moments 0 to 2k of the start's spectral measure. The rules of k + 1 nodes that match all of them form a family with one
parameter: the last diagonal entry of the tridiagonal matrix, or, as used here, the place ξ of one node. For a function with a single
kink the family holds the least and the largest integral of *any* measure with those moments (Karlin & Studden 1966, chapter IV): a node
at the kink gives the least, because the polynomial that touches the function there and at the other nodes stays below it. The bulk of
a Hessian near zero is coarser than the nodes, and Gauss's rule then errs by factors in both directions; the bounds say by how much.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.linalg import eigh_tridiagonal
from scipy.optimize import minimize_scalar

from hybridtheory.curvature import Lanczos

# Places of the free node that are tried on either side of zero before the best is refined.
GRID = 24


@dataclass(frozen=True)
class Negative:
    """z'H₋z/‖z‖² of one start z: Gauss's value between the least and the largest that the run's moments allow."""

    lower: float
    value: float
    upper: float


def negative_part(run: Lanczos) -> Negative:
    """Bounds hold in exact arithmetic for the start's own spectral measure; times d they are samples of tr H₋'s bounds."""
    alphas, betas = run.alphas, run.betas
    theta = run.nodes
    value = float(np.sum(run.weights * np.maximum(-theta, 0.0)))
    size = float(np.abs(theta).max())
    if run.last_beta <= 1e-7 * size or size == 0.0:
        return Negative(value, value, value)  # an invariant subspace: the rule is the measure
    k = len(alphas)

    def integral(xi: float) -> float:
        """Of max(−x, 0) under the rule with a node at ξ (Golub 1973: shift, solve for the last row, restore)."""
        diagonal = np.append(alphas, _last(alphas, betas, run.last_beta, xi))
        nodes, vectors = eigh_tridiagonal(diagonal, np.append(betas[: k - 1], run.last_beta))
        return float(np.sum(vectors[0] ** 2 * np.maximum(-nodes, 0.0)))

    # Between two neighbouring Ritz values the free node runs through the whole family; where zero lies outside them all, its
    # range is unbounded on that side, and what it contributes falls with every power of the distance.
    steps = np.geomspace(1e-4, 0.999, GRID)
    far = size * np.geomspace(1e-4, 1e4, 2 * GRID)
    below = theta[theta < 0].max() * steps if (theta < 0).any() else -far
    above = theta[theta > 0].min() * steps if (theta > 0).any() else far
    places = np.concatenate([below[::-1], [0.0], above])
    found = np.array([integral(xi) for xi in places])
    best = int(found.argmax())
    span = places[max(best - 1, 0)], places[min(best + 1, len(places) - 1)]
    refined = minimize_scalar(lambda xi: -integral(xi), bounds=span, method="bounded")
    upper = max(float(found[best]), -float(refined.fun), value)
    return Negative(min(float(found.min()), value), value, upper)


def _last(alphas: np.ndarray, betas: np.ndarray, last_beta: float, xi: float) -> float:
    """The diagonal entry that puts an eigenvalue at ξ: ξ + β_k² e_k'(T − ξ)⁻¹e_k, by the recursion of the pivots."""
    pivot = alphas[0] - xi
    for a, b in zip(alphas[1:], betas, strict=False):
        pivot = (a - xi) - b * b / (pivot if pivot != 0.0 else np.finfo(float).tiny)
    return float(xi + last_beta**2 / (pivot if pivot != 0.0 else np.finfo(float).tiny))
