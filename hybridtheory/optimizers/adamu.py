"""ZO-AdaMU (Jiang et al. 2024, AAAI, arXiv 2312.15184): the perturbation itself carries momentum.

    ż ~ N(0, α),  z̈ ~ m + N(0, 1 - α),  u = β₁ż + (1 - β₁)z̈,  m <- u,  v = β₂ż² + (1 - β₂)z̈²,  w <- w - ηρ u/√(v + 10⁻⁸)

The direction applied is the one evaluated; the released code perturbs with other weights than it moves with. The
paper anneals α, β₁ and β₂: they are entries of the param groups, for a scheduler to set. E uuᵀ is not a multiple of
I: ĝ is biased towards the last directions, which is the method's idea.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hybridtheory.errors import UserError
from hybridtheory.estimators.law import Kept, Law
from hybridtheory.estimators.streams import Key, normal
from hybridtheory.estimators.zo_gradient import ZOGradient
from hybridtheory.optimizers.base import Closure, ZeroOrder


@dataclass(frozen=True)
class Momentous(Law):
    """u of ZO-AdaMU, given m (held by its owner, by tensor name)."""

    alpha: float = 0.5
    beta1: float = 0.9
    m: Mapping[str, Tensor] = field(default_factory=dict, repr=False, compare=False)

    def parts(self, key: Key, name: str, like: Tensor) -> tuple[Tensor, Tensor]:
        """ż, z̈."""
        still = normal(key, name, like.shape, like).mul_(self.alpha**0.5)
        moving = normal(key, f"{name}#moving", like.shape, like).mul_((1 - self.alpha) ** 0.5).add_(self.m[name])
        return still, moving

    def fill(self, key: Key, name: str, like: Tensor) -> Tensor:
        still, moving = self.parts(key, name, like)
        return still.mul_(self.beta1).add_(moving, alpha=1 - self.beta1)


class AdaMU(ZeroOrder):
    """Group entries: ``alpha`` (0.5), ``beta1`` (0.9), ``beta2`` (0.01). One block of memory for m; one query a step."""

    accumulates = False  # m is the direction of one step

    def __init__(self, *args: Any, alpha: float = 0.5, beta1: float = 0.9, beta2: float = 0.01, **options: Any) -> None:
        if options.get("q", 1) != 1:
            raise UserError(f"ZO-AdaMU moves along one direction a step: q must be 1, got {options['q']}")
        own = {"alpha": alpha, "beta1": beta1, "beta2": beta2, "law": Momentous(), "q": 1}
        super().__init__(*args, **{**options, **own})
        self.named_state["m"] = {
            n: torch.zeros_like(p, dtype=torch.float64 if p.dtype == torch.float64 else torch.float32)
            for unit in self.units
            for n, p in unit.plan.block.parameters.items()
        }

    def _measure(self, closure: Closure) -> tuple[float, list[ZOGradient]]:
        zos = []
        for unit in self.units:
            g = self.param_groups[unit.indices[0]]
            zos.append(self._evaluate(closure, unit, law=Momentous(g["alpha"], g["beta1"], self.named_state["m"])))
        return sum(a + b for z in zos for a, b in z.losses) / (2 * len(zos)), zos

    @torch.no_grad()
    def _update(self, zos: list[ZOGradient]) -> None:
        for unit, zo in zip(self.units, zos, strict=True):
            beta2 = self.param_groups[unit.indices[0]]["beta2"]
            lr, kept, targets = self._per_tensor(unit, "lr"), self._decay(unit), self._targets(unit)
            law = zo.law.law if isinstance(zo.law, Kept) else zo.law
            assert isinstance(law, Momentous)
            for name, p in unit.plan.block.parameters.items():
                still, moving = law.parts(zo.keys[0], name, p)
                root = (still.square_().mul_(beta2) + moving.square_().mul_(1 - beta2)).add_(1e-8).sqrt_()
                g = zo.direction(name, p, [1.0])
                assert g is not None
                targets[name].mul_(kept.get(name, 1.0)).addcdiv_(g, root, value=-lr[name] * zo.slopes[0])
                self.named_state["m"][name].copy_(law.fill(zo.keys[0], name, p))
            self._publish(unit)
