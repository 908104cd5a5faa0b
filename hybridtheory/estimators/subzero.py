"""SubZero (Yu et al. 2024, arXiv 2410.08989): u = c U Z Vᵀ a matrix, in a random subspace that is kept for a while.

U (m × r) and V (n × r) have orthonormal columns and are redrawn every ``refresh`` steps; Z (r × r) is Gaussian and new in every
direction; c = √(mn)/r ("norm alignment") gives u the expected squared norm of a Gaussian, so that MeZO's lr and μ carry over.
Vectors (biases, norms) are dense Gaussian. Adapters' tensors are reshaped to nearly square matrices first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hybridtheory.estimators.lowrank import LowRank
from hybridtheory.estimators.streams import Key, normal


@dataclass(frozen=True)
class SubZero(LowRank):
    """Given U, V: E ĝ = (mn/r²) UUᵀ G VVᵀ. Over U and V too P = I, and E cos² with the true gradient is 1/d, as for a Gaussian.

    U and V are a function of (seed, step // refresh, name); the last ones are remembered only to save their QR factorisation.
    """

    rank: int = 8
    refresh: int = 1000
    cache: dict[str, tuple[object, Tensor, Tensor]] = field(default_factory=dict, repr=False, compare=False)

    def factors(self, key: Key, name: str, m: int, n: int, like: Tensor) -> tuple[Tensor, Tensor]:
        u, v = self.subspace(key, name, m, n, like)
        r = u.shape[1]
        z = normal(key, name, (r, r), like).mul_(math.sqrt(m * n) / r)
        return u @ z, v

    def subspace(self, key: Key, name: str, m: int, n: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """U, V with orthonormal columns, shapes (m, r), (n, r), in float32 or float64."""
        r = min(self.rank, m, n)
        window = Key(key.seed, key.step // self.refresh)
        tag = (window, m, n, r, like.dtype, like.device)
        held = self.cache.get(name)
        if held is None or held[0] != tag:
            u, v = (
                torch.linalg.qr(normal(window, f"{name}#{side}", (k, r), like))[0].contiguous()
                for side, k in (("U", m), ("V", n))
            )
            held = self.cache[name] = (tag, u, v)
        return held[1], held[2]
