"""Conservative ZO-SGD (ZO-Bench, arXiv 2402.11592): of w, w - ηĝ and w + ηĝ keep the one with the smallest loss on the same minibatch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hybridtheory.estimators.law import Law
from hybridtheory.estimators.streams import Key
from hybridtheory.estimators.zo_gradient import ZOGradient
from hybridtheory.optimizers.base import Closure, ZeroOrder


@dataclass(frozen=True)
class Step(Law):
    """The step of a ZOGradient as a direction, so that its end can be evaluated without moving: u = Σₖ lr ρₖ uₖ / q."""

    zo: ZOGradient | None = None
    lr: Mapping[str, float] = field(default_factory=dict)

    def touches(self, key: Key, name: str) -> bool:
        assert self.zo is not None
        return any(self.zo.law.touches(k, name) for k in self.zo.keys)

    def fill(self, key: Key, name: str, like: Tensor) -> Tensor:
        assert self.zo is not None
        u = self.zo.direction(name, like, [self.lr[name] * s / len(self.zo.slopes) for s in self.zo.slopes])
        return (
            torch.zeros_like(like, dtype=torch.float64 if like.dtype == torch.float64 else torch.float32)
            if u is None
            else u
        )


class Conservative(ZeroOrder):
    """Three evaluations more than the differences themselves (two where f(w) is one of them)."""

    accumulates = False  # the choice is by the loss of one minibatch

    def cost(self) -> dict[str, int]:
        differences = [self.param_groups[u.indices[0]]["difference"] for u in self.units]
        known = any(d != "central" for d in differences)
        return {"forwards": super().cost()["forwards"] + (not known) + 2 * len(self.units), "backwards": 0}

    def _measure(self, closure: Closure) -> tuple[float, list[ZOGradient]]:
        _, zos = super()._measure(closure)
        base = next((z.base for z in zos if z.base is not None), None)
        stay = float(self._loss(closure)) if base is None else base
        self.factors = [self._best(closure, i, zo, stay) for i, zo in enumerate(zos)]
        return stay, zos

    def _best(self, closure: Closure, index: int, zo: ZOGradient, stay: float) -> float:
        """1 to descend, -1 to ascend, 0 to stay."""
        unit = self.units[index]
        step, key = Step(zo, self._per_tensor(unit, "lr")), zo.keys[0]
        losses = {0.0: stay}
        for factor in (1.0, -1.0):
            losses[factor] = float(unit.plan.value(lambda: self._loss(closure), step, key, -factor))
        return min(
            losses, key=lambda k: losses[k]
        )  # a loss that is not a number never wins: comparisons with it are false

    def _update(self, zos: Sequence[ZOGradient]) -> None:
        for unit, zo, factor in zip(self.units, zos, self.factors, strict=True):
            if factor:
                self._descend(unit, zo, factor)
