"""q orthogonal directions of length √d: the columns of a Haar-random orthonormal d × q matrix, without ever holding it.

Gaussian columns Z have the Gram matrix ZᵀZ = RᵀR (Cholesky), and Z R⁻¹ is the orthonormal factor of Z, Haar distributed. Only the
q × q matrix is kept: it is summed over chunks of the tensors, and a direction is a mixture of q Gaussian draws from seeds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from hybridtheory.blocks import Block
from hybridtheory.errors import UserError
from hybridtheory.estimators.law import Law
from hybridtheory.estimators.streams import CHUNK, Key, normal, normal_chunk


@dataclass(frozen=True)
class Orthonormal(Law):
    """The keys of one evaluation are orthogonal to each other: with q of them ĝ = (d/q) V Vᵀ ∇f, E cos² = q/d.

    An evaluation needs 2q draws of the block for its Gram matrix and about q²/2 for each side of the differences.
    """

    mixtures: Mapping[Key, tuple[tuple[Key, float], ...]] = field(default_factory=dict, repr=False, compare=False)

    def bind(self, block: Block, keys: Sequence[Key]) -> Law:
        q, d = len(keys), block.numel
        if q > d:
            raise UserError(
                f"{q} orthonormal directions do not exist in the {d} dimensions of block {block.name!r}: lower q"
            )
        gram = torch.zeros(q, q, dtype=torch.float64, device="cpu")
        for name, like in block.parameters.items():
            for chunk in range(-(-like.numel() // CHUNK)):
                z = torch.stack([normal_chunk(key, name, like, chunk).double() for key in keys])  # (q, chunk)
                gram += (z @ z.T).cpu()
        mix = torch.linalg.inv(torch.linalg.cholesky(gram, upper=True)) * math.sqrt(
            d
        )  # upper triangular: column k is direction k
        columns = {k: tuple((keys[j], float(mix[j, i])) for j in range(i + 1)) for i, k in enumerate(keys)}
        return replace(self, mixtures=columns)

    def fill(self, key: Key, name: str, like: Tensor) -> Tensor:
        return self._mix(dict(self.mixtures[key]), name, like)

    def combine(self, keys: Sequence[Key], name: str, like: Tensor, weights: Sequence[float]) -> Tensor:
        total: dict[Key, float] = {}
        for key, weight in zip(keys, weights, strict=True):
            for z, part in self.mixtures[key]:
                total[z] = total.get(z, 0.0) + weight * part
        return self._mix(total, name, like)  # q draws instead of q²/2

    def _mix(self, parts: Mapping[Key, float], name: str, like: Tensor) -> Tensor:
        out: Tensor | None = None
        for key, part in parts.items():
            z = normal(key, name, like.shape, like)
            out = z.mul_(part) if out is None else out.add_(z, alpha=part)
        assert out is not None
        return out
