"""ZO-SGD with momentum (the "MMT" of ZO-Bench, Zhang et al. 2024, arXiv 2402.11592): heavy ball on zeroth-order gradients."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from hybridtheory.estimators.zo_gradient import ZOGradient
from hybridtheory.optimizers.base import ZeroOrder
from hybridtheory.optimizers.groups import Unit
from hybridtheory.optimizers.rules import State, momentum_


class DenseRule(ZeroOrder, ABC):
    """A rule that needs ĝ as a tensor: it is made dense one tensor at a time, only the rule's own memory spans the block."""

    @abstractmethod
    def _rule(self, w: Tensor, g: Tensor, state: State, lr: float) -> None:
        """Move ``w`` in place by the rule, given ĝ and what the rule remembers of this tensor."""

    @torch.no_grad()
    def _descend(self, unit: Unit, zo: ZOGradient, factor: float = 1.0) -> None:
        lr, kept, targets = self._per_tensor(unit, "lr"), self._decay(unit), self._targets(unit)
        memory = self.named_state.setdefault("memory", {})
        for name, p in unit.plan.block.parameters.items():
            g = zo.direction(name, p, [s / len(zo.keys) for s in zo.slopes])
            if g is None:
                g = torch.zeros_like(p, dtype=torch.float64 if p.dtype == torch.float64 else torch.float32)
            targets[name].mul_(kept.get(name, 1.0))
            self._rule(targets[name], g.mul_(factor), memory.setdefault(name, {}), lr[name])
        self._publish(unit)


class Momentum(DenseRule):
    """m <- β m + ĝ, w <- w - η m. One block of memory. Compare at equal η/(1 - β), not at equal η."""

    def __init__(self, *args: Any, beta: float = 0.9, **options: Any) -> None:
        super().__init__(*args, **options)
        self.beta = beta

    def _rule(self, w: Tensor, g: Tensor, state: State, lr: float) -> None:
        momentum_(w, g, state, lr, self.beta)
