"""u uniform on {-1, +1}^d, its signs taken from random words: an eleventh of a Gaussian draw's time."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hybridtheory.estimators.law import Law
from hybridtheory.estimators.streams import Key, signs


@dataclass(frozen=True)
class Rademacher(Law):
    """P = I. E‖ĝ‖² = d‖∇f‖²; E ĝᵢ² = ‖∇f‖² for every i."""

    def fill(self, key: Key, name: str, like: Tensor) -> Tensor:
        return signs(key, name, like)
