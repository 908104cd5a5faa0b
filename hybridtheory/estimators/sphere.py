"""u uniform on the sphere of radius √d: a Gaussian direction divided by its norm over the whole block."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from hybridtheory.blocks import Block
from hybridtheory.estimators.law import Law
from hybridtheory.estimators.streams import CHUNK, Key, normal, normal_chunk


@dataclass(frozen=True)
class Sphere(Law):
    """P = I. E‖ĝ‖² = d‖∇f‖². The norm costs one more draw of the block; bounded steps make it the law of pathwise theorems."""

    scales: Mapping[Key, float] = field(default_factory=dict, repr=False, compare=False)

    def bind(self, block: Block, keys: Sequence[Key]) -> Law:
        return replace(self, scales={key: math.sqrt(block.numel / _square(block, key)) for key in keys})

    def fill(self, key: Key, name: str, like: Tensor) -> Tensor:
        return normal(key, name, like.shape, like).mul_(self.scales[key])


def _square(block: Block, key: Key) -> float:
    total = 0.0
    for name, like in block.parameters.items():
        for chunk in range(-(-like.numel() // CHUNK)):
            z = normal_chunk(key, name, like, chunk).double()
            total += float(z @ z)
    return total
