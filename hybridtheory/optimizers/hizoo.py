"""HiZOO (Zhao et al. 2024, arXiv 2402.15173): zeroth-order SGD preconditioned by a running estimate h of the Hessian's diagonal.

    u = z/√h,  ĝ = (f(w + μu) - f(w - μu))/2μ u,   h <- (1 - s) h + s |f₊ + f₋ - 2f|/(2μ²) h z²

Three evaluations a step. The direction applied is the one evaluated, with the h of the evaluation; the released code updates h first
and moves along another direction. The estimate is biased by the trace (its mean is ½(tr M + 2Mᵢᵢ)hᵢ, M = the Hessian in the
preconditioned coordinates) and the modulus hides negative curvature: both are the paper's.
"""

from __future__ import annotations

from typing import Any

import torch

from hybridtheory.errors import UserError
from hybridtheory.estimators.diagonal import Preconditioned
from hybridtheory.estimators.streams import normal
from hybridtheory.estimators.zo_gradient import ZOGradient
from hybridtheory.optimizers.base import Closure, ZeroOrder


class HiZOO(ZeroOrder):
    """smoothing   s above (the paper's runs use 1e-8 to 1e-5). h starts at one and costs a float32 block."""

    accumulates = False  # h is updated from the losses of one minibatch

    def __init__(self, *args: Any, smoothing: float = 1e-6, **options: Any) -> None:
        if not 0 <= smoothing < 1:
            raise UserError(f"HiZOO's smoothing must be in [0, 1), got {smoothing:g}")
        if options.get("difference", "central") != "central":
            raise UserError(
                f"HiZOO reads curvature off both sides of a difference: it must be central, got {options['difference']!r}"
            )
        super().__init__(*args, **{**options, "law": Preconditioned(), "difference": "central"})
        self.smoothing = smoothing
        self.named_state["h"] = {
            n: torch.ones_like(p, dtype=torch.float64 if p.dtype == torch.float64 else torch.float32)
            for unit in self.units
            for n, p in unit.plan.block.parameters.items()
        }

    def cost(self) -> dict[str, int]:
        return {"forwards": super().cost()["forwards"] + 1, "backwards": 0}

    def _measure(self, closure: Closure) -> tuple[float, list[ZOGradient]]:
        self.base = float(self._loss(closure))
        zos = [self._evaluate(closure, unit, law=Preconditioned(self.named_state["h"])) for unit in self.units]
        return self.base, zos

    @torch.no_grad()
    def _update(self, zos: list[ZOGradient]) -> None:
        h, s = self.named_state["h"], self.smoothing
        for unit, zo in zip(self.units, zos, strict=True):
            mu = self.param_groups[unit.indices[0]]["mu"]
            curvatures = [abs(plus + minus - 2 * self.base) / (2 * mu**2) for plus, minus in zo.losses]
            self._descend(unit, zo)
            for name, p in unit.plan.block.parameters.items():
                gain = torch.zeros_like(h[name])
                for key, c in zip(zo.keys, curvatures, strict=True):
                    gain.add_(normal(key, name, p.shape, h[name]).square_(), alpha=s * c / len(zo.keys))
                h[name].mul_(gain.add_(1 - s))
