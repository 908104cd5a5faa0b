"""Every direction law against every closed form of `theory`, by Monte Carlo at five standard errors of the sample itself.

The gradient g is known, so a slope is exactly <g, u>: nothing here depends on mu or on a model.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from hybridtheory.blocks import Block
from hybridtheory.estimators import (
    LOZO,
    SRGF,
    Coordinate,
    Gaussian,
    Key,
    MagnitudeMask,
    Orthonormal,
    Preconditioned,
    Rademacher,
    RandomMask,
    Sphere,
    SubZero,
    TeZO,
)
from hybridtheory.theory import moments, moments_subspace

SHAPES = {"a": (4, 5), "b": (12,)}
D = 32
MATRIX = {"w": (6, 5)}


def block_of(shapes) -> Block:
    torch.manual_seed(3)
    return Block("b", "base", {n: nn.Parameter(torch.randn(s)) for n, s in shapes.items()})


def estimates(
    law, block: Block, g: torch.Tensor, n: int, q: int = 1, seed: int = 0, per_step: bool = True
) -> np.ndarray:
    """n estimates ĝ, shape (n, d), each the mean over q queries."""
    rows = []
    for i in range(n):
        keys = [Key(seed, i, k) for k in range(q)] if per_step else [Key(seed, 0, i * q + k) for k in range(q)]
        bound = law.bind(block, keys)
        u = torch.stack(
            [
                torch.cat([bound.fill(k, name, p.detach()).reshape(-1) for name, p in block.parameters.items()])
                for k in keys
            ]
        )
        rows.append((u @ g) @ u / q)
    return torch.stack(rows).double().numpy()


def agrees(samples: np.ndarray, expected: np.ndarray | float) -> None:
    """Sample mean against the expectation, entry by entry, at five standard errors."""
    error = samples.std(0, ddof=1) / math.sqrt(len(samples)) + 1e-6 * np.abs(expected)
    z = np.abs(samples.mean(0) - expected) / error
    assert np.max(z) < 5, z


LAWS = {
    "gaussian": Gaussian(),
    "sphere": Sphere(),
    "rademacher": Rademacher(),
    "coordinate": Coordinate(),
    "orthonormal": Orthonormal(),
}


@pytest.mark.parametrize(("q", "n"), [(1, 2500), (4, 800), (16, 250)])
@pytest.mark.parametrize("name", list(LAWS))
def test_moments_of_unstructured_laws(name, q, n):
    block, generator = block_of(SHAPES), torch.Generator().manual_seed(1)
    g = torch.randn(D, generator=generator)
    root = torch.randn(D, D, generator=generator)
    h = (root @ root.T / D).double().numpy()
    x, v = estimates(LAWS[name], block, g, n, q), g.double().numpy()
    square = float(v @ v)
    agrees(x, v)
    agrees((x**2).sum(1), moments.second_moment(name, D, q) * square)
    agrees(((x - v) ** 2).sum(1), moments.variance(name, D, q) * square)
    agrees(x**2, moments.coordinate_second_moment(name, v, square, D, q))
    curvature = np.einsum("ni,ij,nj->n", x, h, x)
    agrees(
        curvature,
        moments.curvature_moment(name, D, square, float(v @ h @ v), float(np.trace(h)), float(np.diag(h) @ v**2), q),
    )
    norms = np.sqrt((x**2).sum(1)) * math.sqrt(square)
    cosines = (x @ v)[norms > 0] / norms[norms > 0]  # a coordinate's estimate is never zero here: g has no zero entry
    squared = moments.cosine_squared(name, D, q)
    if squared is not None:
        agrees(cosines**2, squared)
    beta = moments.cosine_beta(name, D, q)
    if beta is not None:
        assert stats.kstest(cosines**2, stats.beta(*beta).cdf).pvalue > 1e-4
        mean = moments.cosine(name, D, q)
        assert mean is not None
        agrees(cosines, mean)


@pytest.mark.parametrize("law", [SubZero(rank=2, refresh=1), LOZO(rank=2, refresh=1), SRGF(k=3, refresh=1)], ids=repr)
def test_structured_laws_are_unbiased_over_their_subspaces(law):
    """SubZero and LOZO: 1/d against the true gradient, whatever the rank. (SRGF too: its direction is isotropic.)"""
    block, g = block_of(MATRIX), torch.randn(30, generator=torch.Generator().manual_seed(2))
    x, v = estimates(law, block, g, 4000), g.double().numpy()
    square = float(v @ v)
    agrees(x, v)
    expected = {
        SubZero: moments_subspace.subzero_second_moment([(6, 5)], [2], [square]),
        LOZO: moments_subspace.lozo_second_moment(6, 5, 2) * square,
        SRGF: moments_subspace.srgf_second_moment(30, 3) * square,
    }[type(law)]
    agrees((x**2).sum(1), expected)
    agrees((x @ v) ** 2 / ((x**2).sum(1) * square), 1 / 30)


def test_tezo_is_unbiased_over_its_fixed_vectors():
    """They are drawn once a run, so the average is over run seeds."""
    block, g = block_of(MATRIX), torch.randn(30, generator=torch.Generator().manual_seed(2))
    v = g.double().numpy()
    x = np.concatenate([estimates(TeZO(rank=3), block, g, 1, seed=seed) for seed in range(4000)])
    agrees(x, v)
    agrees((x**2).sum(1), moments_subspace.tezo_second_moment(6, 5, 3) * float(v @ v))


def test_subzero_inside_one_window_is_a_gaussian_in_its_subspace():
    """Side by side: cos² is 1/r² against the projected gradient, and only the captured share of that against the true one."""
    block, g = block_of(MATRIX), torch.randn(30, generator=torch.Generator().manual_seed(2))
    law, r = SubZero(rank=2, refresh=1000), 2
    x, v = estimates(law, block, g, 3000, per_step=False), g.double().numpy()
    u, w = (t.double().numpy() for t in law.subspace(Key(0), "w", 6, 5, block.parameters["w"]))
    projected = (u @ u.T @ v.reshape(6, 5) @ w @ w.T).reshape(-1)
    scale, energy = 30 / r**2, float(projected @ projected)
    agrees(x, scale * projected)
    agrees((x**2).sum(1), scale**2 * moments_subspace.subspace_second_moment(r**2) * energy)
    to_projected = (x @ projected) ** 2 / ((x**2).sum(1) * energy)
    agrees(to_projected, 1 / r**2)
    alpha, beta = moments_subspace.subspace_cosine_beta(r**2) or (0, 0)
    assert stats.kstest(to_projected, stats.beta(alpha, beta).cdf).pvalue > 1e-4
    agrees((x @ v) ** 2 / ((x**2).sum(1) * float(v @ v)), energy / float(v @ v) / r**2)


def test_lozo_given_v_projects_on_it():
    block, g = block_of(MATRIX), torch.randn(30, generator=torch.Generator().manual_seed(2))
    x = estimates(LOZO(rank=2, refresh=1000), block, g, 3000, per_step=False)
    from hybridtheory.estimators.streams import normal

    v = normal(Key(0), "w#V", (5, 2), block.parameters["w"]).double().numpy()
    agrees(x, (g.double().numpy().reshape(6, 5) @ v @ v.T / 2).reshape(-1))


def test_masks_estimate_the_masked_gradient():
    block, g = block_of(SHAPES), torch.randn(D, generator=torch.Generator().manual_seed(1))
    v = g.double().numpy()
    law = MagnitudeMask.of(block, 0.5)
    mask = torch.cat([law.mask(n, p).reshape(-1) for n, p in block.parameters.items()]).numpy()
    x, k, energy = estimates(law, block, g, 3000), int(mask.sum()), float((mask * v) @ v)
    agrees(x[:, mask], v[mask])
    assert not x[:, ~mask].any()
    agrees((x**2).sum(1), moments_subspace.subspace_second_moment(k) * energy)
    agrees(
        (x @ v) ** 2 / ((x**2).sum(1) * float(v @ v)), moments_subspace.masked_cosine_squared(k, energy / float(v @ v))
    )
    agrees(estimates(RandomMask(0.25), block, g, 3000), 0.25 * v)


def test_preconditioned_directions():
    block, g = block_of(SHAPES), torch.randn(D, generator=torch.Generator().manual_seed(1))
    h = {n: torch.linspace(0.3, 3, p.numel()).view(p.shape) for n, p in block.parameters.items()}
    sigma, v = (1 / torch.cat([t.reshape(-1) for t in h.values()])).double().numpy(), g.double().numpy()
    x = estimates(Preconditioned(h), block, g, 3000)
    agrees(x, sigma * v)
    agrees((x**2).sum(1), moments_subspace.preconditioned_second_moment(v, sigma))
