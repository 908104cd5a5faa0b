"""ZO-Adam (ZO-Bench, arXiv 2402.11592): Adam on zeroth-order gradients. Two blocks of memory."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hybridtheory.optimizers.momentum import DenseRule
from hybridtheory.optimizers.rules import State, adam_


class Adam(DenseRule):
    """With ``weight_decay`` in a group it is AdamW. At one query ĝᵢ² is ρ²uᵢ², so v mostly follows the slope's size."""

    def __init__(
        self, *args: Any, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, **options: Any
    ) -> None:
        super().__init__(*args, **options)
        self.betas, self.eps = betas, eps

    def _rule(self, w: Tensor, g: Tensor, state: State, lr: float) -> None:
        adam_(w, g, state, lr, self.betas, self.eps)
