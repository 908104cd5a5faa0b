"""LOZO (Chen et al. 2024, arXiv 2410.07698): u = U Vᵀ/√r a matrix, U (m × r) new in every direction, V (n × r) kept ``refresh`` steps.

The paper perturbs by ε U Vᵀ and moves by the slope times U Vᵀ/r; with μ = ε√r that is slope times u here, factor 1/r included (the
released code drops it, and on refresh steps it moves along another direction than it evaluated).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from hybridtheory.estimators.lowrank import LowRank
from hybridtheory.estimators.streams import Key, normal


@dataclass(frozen=True)
class LOZO(LowRank):
    """P = I over U and V; given V, E ĝ = G VVᵀ/r. E‖ĝ‖² = (mn + (2m + 2n + 2r + 2)/r)‖G‖² for one matrix."""

    rank: int = 2
    refresh: int = 50

    def factors(self, key: Key, name: str, m: int, n: int, like: Tensor) -> tuple[Tensor, Tensor]:
        r = min(self.rank, m, n)
        window = Key(key.seed, key.step // self.refresh)
        u = normal(key, name, (m, r), like).mul_(1 / math.sqrt(r))
        return u, normal(window, f"{name}#V", (n, r), like)
