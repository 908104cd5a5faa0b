"""S-RGF (Nozawa, Poirion, Takeda 2025): u = P ζ/√k, a Gaussian step inside a random k-dimensional subspace of the whole block.

P (d × k) is Gaussian and kept for ``refresh`` steps; ζ ~ N(0, I_k) is new in every direction. Held densely P costs k
times the model's memory; here its columns are seeds, redrawn when they are used: k draws instead of one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from hybridtheory.blocks import Block
from hybridtheory.errors import UserError
from hybridtheory.estimators.law import Law
from hybridtheory.estimators.streams import Key, normal


@dataclass(frozen=True)
class SRGF(Law):
    """E uuᵀ = I over P and ζ; given P it is PPᵀ/k, of rank k."""

    k: int = 8
    refresh: int = 1

    def bind(self, block: Block, keys: Sequence[Key]) -> Law:
        if not 1 <= self.k <= block.numel:
            raise UserError(
                f"a subspace of {self.k} dimensions does not fit the {block.numel} of block {block.name!r}: lower k"
            )
        return replace(self)

    def coefficients(self, key: Key, like: Tensor) -> list[float]:
        """ζ/√k, the same for every tensor."""
        return normal(key, "subspace coefficients", (self.k,), like).div_(math.sqrt(self.k)).tolist()

    def fill(self, key: Key, name: str, like: Tensor) -> Tensor:
        window = key.step // self.refresh
        parts = self.coefficients(key, like)
        u = normal(Key(key.seed, window, 0), f"{name}#P", like.shape, like).mul_(parts[0])
        for column, part in enumerate(parts[1:], 1):
            u.add_(normal(Key(key.seed, window, column), f"{name}#P", like.shape, like), alpha=part)
        return u
