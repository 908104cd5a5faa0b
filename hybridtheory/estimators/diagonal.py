"""u ~ N(0, diag(h)⁻¹): HiZOO's preconditioned direction (Zhao et al. 2024, arXiv 2402.15173), h an estimate of the Hessian's diagonal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from hybridtheory.estimators.law import Law
from hybridtheory.estimators.streams import Key, normal


@dataclass(frozen=True)
class Preconditioned(Law):
    """P = Σ = diag(1/h): E ĝ = Σ∇f, E‖ĝ‖² = gᵀΣg tr Σ + 2gᵀΣ²g. ``h`` is held by its owner, by tensor name, positive."""

    h: Mapping[str, Tensor] = field(default_factory=dict, repr=False, compare=False)

    def fill(self, key: Key, name: str, like: Tensor) -> Tensor:
        return normal(key, name, like.shape, like).mul_(self.h[name].rsqrt())
