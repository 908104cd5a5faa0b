"""Curvature of f from Hessian products: both ends of the spectrum, traces, coupling and the joint margin.

The ends are Lanczos's (``lanczos.py``), the traces Hutchinson's (``traces.py``), tr H₊ is bounded from a run's moments
(``quadrature.py``); what lies between two blocks, or over all of them, is here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from hybridtheory import streams
from hybridtheory.blocks import Block, split
from hybridtheory.errors import UserError
from hybridtheory.estimate import Estimate
from hybridtheory.lanczos import Lanczos, end_excess, lanczos, orthogonalise, spectrum
from hybridtheory.oracle import Products
from hybridtheory.shards import local
from hybridtheory.traces import Traces, mean_estimate, traces
from hybridtheory.vectors import Tensors, add_, norm, scale_

__all__ = [
    "Lanczos",
    "Traces",
    "coupling",
    "end_excess",
    "lanczos",
    "margin",
    "mean_estimate",
    "spectrum",
    "traces",
]


def coupling(
    hess: Products,
    x: Sequence[Block],
    y: Sequence[Block],
    seed: int,
    max_steps: int = 16,
    min_steps: int = 6,
    tol: float = 0.05,
    failure: float = 0.05,
    index: int = 0,
) -> Estimate:
    """‖H_xy‖₂ by Golub-Kahan bidiagonalisation: products with tangents on y give H_xy v, with tangents on x give H_yx u.

    x, y       the two sides; the start is drawn on y, from (seed, index)
    max_steps  pairs of products at most, min_steps at least; tol: relative error at which they stop
    ``upper`` is the bound of ``end_excess`` for H_yx H_xy, whose spectrum starts at zero: σ² ≤ θ²/(1−ε); it fails with probability
    ``failure``. ``n`` counts pairs of products.
    """
    steps = max_steps
    v: Tensors = [t for b in y for t in streams.gaussian(b, seed, "coupling", index)]
    d = sum(t.numel() for t in v)
    scale_(v, 1 / norm(v))
    stored = [torch.empty(steps, local(t).numel(), dtype=t.dtype, device=t.device) for t in v]
    alphas: list[float] = []
    betas: list[float] = []
    u: Tensors | None = None
    agreed = 0
    estimate = Estimate(0.0, residual=0.0, n=0)
    for k in range(min(steps, d)):
        for rows, t in zip(stored, v, strict=True):
            rows[k] = local(t).reshape(-1)
        p = [t.detach() for t in hess(v, y, x)]
        if u is not None:
            add_(p, u, -betas[-1])
        alphas.append(norm(p))
        if alphas[-1] == 0.0:
            break
        u = scale_(p, 1 / alphas[-1])
        r = add_([t.detach() for t in hess(u, x, y)], v, -alphas[-1])
        orthogonalise(r, stored, k + 1)
        betas.append(norm(r))
        bidiagonal = np.diag(alphas) + np.diag(betas[:-1], 1)
        left, sigma, _ = np.linalg.svd(bidiagonal)
        residual = betas[-1] * abs(left[-1, 0])
        gap = (sigma[0] ** 2 - sigma[1] ** 2) / sigma[0] if k else 0.0
        error = min(residual, residual**2 / gap) if gap > 0 else residual
        agreed = agreed + 1 if error <= tol * sigma[0] else 0
        resolved = (agreed >= 2 and k + 1 >= min_steps) or k + 1 == d  # the whole space was searched
        excess = end_excess(d, k + 1, failure)
        upper = float(sigma[0] / math.sqrt(1 - excess)) if excess < 1 else math.inf
        note = "" if resolved else f"error about {error:.2g} after {k + 1} pairs of products"
        estimate = Estimate(
            float(sigma[0]),
            residual=float(residual),
            upper=upper,
            confidence=1 - failure,
            n=k + 1,
            resolved=bool(resolved),
            note=note,
        )
        if resolved or betas[-1] <= 1e-7 * sigma[0]:
            break
        v = scale_(r, 1 / betas[-1])
    return estimate


def margin(hess: Products, limits: dict[str, float], seed: int, index: int = 0, **options: Any) -> Lanczos:
    """Both ends of D^{-1/2} H D^{-1/2}, D = diag(L_b I): the joint condition D ⪰ H ⪰ −D holds when they lie in [−1, 1].

    limits: L_b by block name, for every block of ``hess``. ``options`` of `lanczos`; below=1.0 ends it where the bound already says
    that the upper end lies below 1. Raises UserError for an L that is not positive.
    """
    blocks = hess.blocks
    bad = [b.name for b in blocks if not limits[b.name] > 0]
    if bad:
        raise UserError(f"the joint margin needs a positive L for every block, and it is not for {', '.join(bad)}")

    def scaled(v: Tensors, power: float) -> Tensors:
        for b, part in zip(blocks, split(v, blocks), strict=True):
            scale_(part, limits[b.name] ** power)
        return v

    def matvec(v: Tensors) -> Tensors:
        product = scaled(hess(scaled(v, -0.5)), -0.5)
        scaled(v, 0.5)  # in place and back costs a rounding of v, a copy as many bytes as the model
        return product

    return lanczos(matvec, [t for b in blocks for t in streams.gaussian(b, seed, "margin", index)], **options)
