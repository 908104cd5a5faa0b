"""u ~ N(0, I_d): the direction of MeZO (arXiv 2305.17333) and of hybrid fine-tuning (arXiv 2604.09940, Algorithm 1)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hybridtheory.estimators.law import Law
from hybridtheory.estimators.streams import Key, normal


@dataclass(frozen=True)
class Gaussian(Law):
    """P = I. E‖ĝ‖² = (d + 2)‖∇f‖² for one query, (d + q + 1)/q ‖∇f‖² for q averaged ones."""

    def fill(self, key: Key, name: str, like: Tensor) -> Tensor:
        return normal(key, name, like.shape, like)
