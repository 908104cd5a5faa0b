"""TeZO (Sun et al. 2025, arXiv 2501.19057): u = (1/√r) Σₛ τₛ uₛ vₛᵀ a matrix; uₛ, vₛ are Gaussian and fixed for the whole run, τ is new in
every direction.

Over time the directions form a tensor of CP rank r. Only τ, r numbers a matrix, is drawn at a step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from torch import Tensor

from hybridtheory.estimators.lowrank import LowRank
from hybridtheory.estimators.streams import Key, normal


@dataclass(frozen=True)
class TeZO(LowRank):
    """P = I over the fixed vectors too. E‖ĝ‖² = (mn + 2 + (2mn + 6(m + n) + 10)/r)‖G‖² for one matrix."""

    rank: int = 24
    cache: dict[str, tuple[object, Tensor, Tensor]] = field(default_factory=dict, repr=False, compare=False)

    def factors(self, key: Key, name: str, m: int, n: int, like: Tensor) -> tuple[Tensor, Tensor]:
        r = min(self.rank, m, n)
        run = Key(key.seed)
        tag = (run, m, n, r, like.dtype, like.device)
        held = self.cache.get(name)
        if held is None or held[0] != tag:
            held = (tag, normal(run, f"{name}#u", (m, r), like), normal(run, f"{name}#v", (n, r), like))
            self.cache[name] = held
        tau = normal(key, name, (r,), like).mul_(1 / math.sqrt(r))
        return held[1] * tau, held[2]
