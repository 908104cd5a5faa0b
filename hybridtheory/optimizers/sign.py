"""ZO-SGD with signs (Liu et al. 2019, "signSGD via zeroth-order oracle"; in ZO-Bench, arXiv 2402.11592).

The papers take the sign of each coordinate of ĝ. ZO-Bench's released code takes the sign of the slope only and moves along sign(ρ) u:
normalised SGD, another method. ``of="slope"`` is that one.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from torch import Tensor

from hybridtheory.errors import UserError
from hybridtheory.estimators.zo_gradient import ZOGradient
from hybridtheory.optimizers.groups import Unit
from hybridtheory.optimizers.momentum import DenseRule
from hybridtheory.optimizers.rules import State


class Sign(DenseRule):
    """w <- w - η sign(ĝ): every coordinate moves by η whatever the gradient's size. of="slope": w <- w - η mean_k sign(ρₖ) uₖ."""

    def __init__(self, *args: Any, of: str = "coordinates", **options: Any) -> None:
        if of not in ("coordinates", "slope"):
            raise UserError(f"the sign is of 'coordinates' or of the 'slope', got {of!r}")
        super().__init__(*args, **options)
        self.of = of

    def _rule(self, w: Tensor, g: Tensor, state: State, lr: float) -> None:
        w.add_(g.sign_(), alpha=-lr)

    def _descend(self, unit: Unit, zo: ZOGradient, factor: float = 1.0) -> None:
        if self.of == "coordinates":
            super()._descend(unit, zo, factor)
        else:
            signs = tuple(math.copysign(1.0, s) if s else 0.0 for s in zo.slopes)
            super(DenseRule, self)._descend(unit, replace(zo, slopes=signs), factor)
