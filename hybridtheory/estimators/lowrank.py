"""What the low-rank laws share: a tensor as a matrix, and w + alpha A Bᵀ in one pass, without the dense direction."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from hybridtheory.blocks import Block
from hybridtheory.errors import UserError
from hybridtheory.estimators.law import Law
from hybridtheory.estimators.streams import Key, normal


def most_square(numel: int) -> tuple[int, int]:
    """m × n = numel with m <= n and m as large as it can be."""
    m = next(m for m in range(math.isqrt(numel), 0, -1) if numel % m == 0)
    return m, numel // m


@dataclass(frozen=True)
class LowRank(Law):
    """u = A Bᵀ on a matrix, dense N(0, I) where a tensor has no two dimensions to factor. A law gives `factors`.

    reshape  True factors each tensor as the most nearly square matrix of its size (SubZero does this to adapters, whose tensors are
             thin); None does it exactly on PEFT blocks. Otherwise a tensor's first dimension makes the rows.
    The rank is capped at min(m, n), tensor by tensor; a rank above every matrix of the block is refused.
    """

    rank: int = 2
    reshape: bool | None = None
    # the last direction's factors by tensor name: a difference and its update use each three times, and they are r(m + n) numbers of mn
    last: dict[str, tuple[object, tuple[Tensor, Tensor]]] = field(default_factory=dict, repr=False, compare=False)

    def bind(self, block: Block, keys: Sequence[Key]) -> Law:
        bound = self if self.reshape is not None else self._with(reshape=block.group == "peft")
        shapes = [s for s in (bound.matrix(p) for p in block.tensors) if s is not None]
        largest = max((min(s) for s in shapes), default=0)
        if not self.rank >= 1 or (largest and self.rank > largest):
            raise UserError(
                f"rank {self.rank} does not fit block {block.name!r}: its matrices allow ranks from 1 to {largest}; lower the rank"
            )
        return bound

    def _with(self, **changes: Any) -> LowRank:
        return replace(self, **changes)

    def matrix(self, like: Tensor) -> tuple[int, int] | None:
        """(m, n) of the matrix that a tensor is treated as, None for one that is drawn densely."""
        if self.reshape:
            m, n = most_square(like.numel())
        elif like.dim() >= 2:
            m, n = like.shape[0], like.numel() // max(like.shape[0], 1)
        else:
            return None
        return (m, n) if m > 1 and n > 1 else None

    @abstractmethod
    def factors(self, key: Key, name: str, m: int, n: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """A, B, shapes (m, r), (n, r), with r at most the capped rank."""

    def _factors(self, key: Key, name: str, shape: tuple[int, int], like: Tensor) -> tuple[Tensor, Tensor]:
        tag = (key, shape, like.dtype, like.device, self.rank, getattr(self, "refresh", None))
        held = self.last.get(name)
        if held is None or held[0] != tag:
            held = self.last[name] = (tag, self.factors(key, name, *shape, like))
        return held[1]

    def fill(self, key: Key, name: str, like: Tensor) -> Tensor:
        shape = self.matrix(like)
        if shape is None:
            return normal(key, name, like.shape, like)
        a, b = self._factors(key, name, shape, like)
        return (a @ b.T).view(like.shape)

    def shift(self, key: Key, name: str, w: Tensor, alpha: float, out: Tensor | None = None) -> Tensor:
        shape = self.matrix(w)
        if shape is None or w.dtype not in (torch.float32, torch.float64) or not w.is_contiguous():
            return super().shift(key, name, w, alpha, out)
        a, b = self._factors(key, name, shape, w)
        if out is not None:
            torch.addmm(w.view(shape), a, b.T, alpha=alpha, out=out.view(shape))
            return out
        return torch.addmm(w.view(shape), a, b.T, alpha=alpha).view(w.shape)

    def factored(self, key: Key, name: str, w: Tensor) -> tuple[Tensor, Tensor] | None:
        # in low precision the sum w + alpha u is rounded, and that rounding is part of what is evaluated
        if w.dim() != 2 or self.matrix(w) != tuple(w.shape) or w.dtype not in (torch.float32, torch.float64):
            return None
        return self._factors(key, name, (w.shape[0], w.shape[1]), w)
