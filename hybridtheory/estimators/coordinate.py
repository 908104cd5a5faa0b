"""u = √d eⱼ with j uniform: one coordinate at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from hybridtheory.blocks import Block
from hybridtheory.estimators.law import Law, offsets
from hybridtheory.estimators.streams import Key, integer


@dataclass(frozen=True)
class Coordinate(Law):
    """P = I. E‖ĝ‖² = d‖∇f‖², E ĝᵢ² = d gᵢ². The perturbation has size μ√d in a single weight."""

    d: int = field(default=0, repr=False, compare=False)
    starts: Mapping[str, int] = field(default_factory=dict, repr=False, compare=False)
    sizes: Mapping[str, int] = field(default_factory=dict, repr=False, compare=False)

    def bind(self, block: Block, keys: Sequence[Key]) -> Law:
        sizes = {n: p.numel() for n, p in block.parameters.items()}
        return replace(self, d=block.numel, starts=offsets(block), sizes=sizes)

    def _place(self, key: Key, name: str) -> int:
        """Where j lies in the tensor, counted from its first entry."""
        return integer(key, "coordinate", self.d) - self.starts[name]

    def touches(self, key: Key, name: str) -> bool:
        return 0 <= self._place(key, name) < self.sizes[name]

    def fill(self, key: Key, name: str, like: Tensor) -> Tensor:
        u = torch.zeros(
            like.shape, dtype=torch.float64 if like.dtype == torch.float64 else torch.float32, device=like.device
        )
        if self.touches(key, name):
            u.view(-1)[self._place(key, name)] = math.sqrt(self.d)
        return u
