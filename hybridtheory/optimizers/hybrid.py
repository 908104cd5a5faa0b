"""Hybrid fine-tuning (arXiv 2604.09940, Algorithm 1): zeroth-order on the base weights x, first-order on the PEFT weights y.

    x <- x - ηx (f(x + μu, y) - f(x, y))/μ u,   y <- y - ηy ∇_y f(x, y)        same minibatch, same point

One-sided ("forward") it costs one forward beyond the first-order step, because f(x, y) is the first-order step's own forward. That
number is reused only when it has the bits of a fresh evaluation (attention kernels and dropout may differ with gradients on): the
first step evaluates both and compares. Two-sided ("central") costs two. The paper uses plain SGD on both blocks; AdamW on the PEFT
block and updates in sequence (y's gradient at the new x) are variants of ours. With no base group this is SGD or AdamW; with no PEFT
group and central differences it is MeZO.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from hybridtheory.blocks import Block
from hybridtheory.errors import UserError
from hybridtheory.estimators.zo_gradient import NonFiniteLoss, ZOGradient
from hybridtheory.optimizers.base import Closure, ZeroOrder
from hybridtheory.optimizers.first_order import FirstOrder


class Hybrid(ZeroOrder):
    """groups: see `ZeroOrder`, e.g.

        Hybrid([{"block": base, "kind": "zo", "lr": 1e-6, "law": Gaussian(), "mu": 1e-3, "difference": "forward"},
                {"block": peft, "kind": "fo", "lr": 1e-3}], model=model, seed=0)

    rule     the PEFT block's update: "sgd" or "adamw"; ``rule_options`` go to torch's own optimizer (momentum, betas, ...).
    order    "simultaneous", or "sequential": the base moves first and y's gradient is taken at the new x (one forward more).
    """

    sharded = True

    def __init__(
        self,
        groups: Block | Sequence[Block | Mapping[str, Any]],
        model: nn.Module,
        seed: int = 0,
        *,
        rule: str = "sgd",
        rule_options: Mapping[str, Any] | None = None,
        order: str = "simultaneous",
        **options: Any,
    ) -> None:
        if order not in ("simultaneous", "sequential"):
            raise UserError(f"order must be 'simultaneous' or 'sequential', got {order!r}")
        super().__init__(groups, model, seed, **{"difference": "forward", **options})
        self.order = order
        self.accumulates = order == "simultaneous"
        self.first = FirstOrder(self, rule, rule_options or {}) if self._fo_groups else None
        self.run["reuse"] = None  # has the first-order forward the bits of a fresh one? None: not seen yet

    def cost(self) -> dict[str, int]:
        zo = super().cost()["forwards"]
        if self.first is None:
            return {"forwards": zo, "backwards": 0}
        shared = self.order == "simultaneous" and self.run["reuse"] is not False
        at_w = any(self.param_groups[u.indices[0]]["difference"] == "forward" for u in self.units)
        return {"forwards": zo + 1 - (at_w and shared), "backwards": 1}

    def _measure(self, closure: Closure) -> tuple[float, list[ZOGradient]]:
        if self.first is None:
            return super()._measure(closure)
        if self.order == "sequential":
            _, zos = super()._measure(closure) if self.units else (0.0, [])
            for unit, zo in zip(self.units, zos, strict=True):
                self._descend(unit, zo)
            return self._first_gradient(closure), zos
        loss = self._first_gradient(closure)
        known = loss if self._reusable(closure, loss) else None
        zos = []
        for unit in self.units:
            zos.append(self._evaluate(closure, unit, at_w=known))
            known = zos[-1].base
        return loss, zos

    def _update(self, zos: list[ZOGradient]) -> None:
        if self.order == "simultaneous":
            super()._update(zos)
        if self.first is not None:
            self.first.update(self.minibatches)

    def _first_gradient(self, closure: Closure) -> float:
        assert self.first is not None
        if not self._pending:
            self.first.clear()
        loss = self._gradient(closure)
        if not math.isfinite(loss):
            self.first.clear()
            moved = self.order == "sequential" and self.units
            kept = "the base has taken its zeroth-order step already" if moved else "the parameters are unchanged"
            raise NonFiniteLoss(
                f"the loss is {loss} at w (step {self.steps}); {kept}: lower the learning rates, or look at this batch"
            )
        return loss

    def _reusable(self, closure: Closure, loss: float) -> bool:
        run = self.run
        if run["reuse"] is None and self.units:
            run["reuse"] = float(self._loss(closure)) == loss
        return bool(run["reuse"])
