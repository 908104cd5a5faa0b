"""Block-cyclic directions: another law's u on one part of the block, zero elsewhere, the parts taking turns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from hybridtheory.blocks import Block
from hybridtheory.errors import UserError
from hybridtheory.estimators.gaussian import Gaussian
from hybridtheory.estimators.law import Law
from hybridtheory.estimators.streams import Key


@dataclass(frozen=True)
class BlockCyclic(Law):
    """Part (step // stay) mod parts is active; parts are runs of consecutive tensors of about equal size. P = that part's projector.

    The inner law sees only the active part's tensors touched; its own scaling (a sphere's radius, say) is that of the whole block.
    """

    parts: int = 4
    stay: int = 1
    law: Law = field(default_factory=Gaussian)
    part_of: Mapping[str, int] = field(default_factory=dict, repr=False, compare=False)

    def bind(self, block: Block, keys: Sequence[Key]) -> Law:
        if not 1 <= self.parts <= len(block.parameters):
            raise UserError(
                f"block {block.name!r} has {len(block.parameters)} tensors and cannot be cut into {self.parts} parts"
            )
        return replace(self, law=self.law.bind(block, keys), part_of=_cut(block, self.parts))

    def touches(self, key: Key, name: str) -> bool:
        active = (key.step // self.stay) % self.parts
        return self.part_of[name] == active and self.law.touches(key, name)

    def fill(self, key: Key, name: str, like: Tensor) -> Tensor:
        u = self.law.fill(key, name, like)
        return u if self.touches(key, name) else u.zero_()


def _cut(block: Block, parts: int) -> dict[str, int]:
    """Consecutive tensors to parts 0 .. parts - 1, each part non-empty: a tensor goes where its middle lies, as far as that allows."""
    found: dict[str, int] = {}
    done, last, left = 0, 0, len(block.parameters)
    for i, (name, p) in enumerate(block.parameters.items()):
        wanted = min(parts - 1, int((done + p.numel() / 2) * parts / block.numel))
        earliest = parts - left  # so that enough tensors are left for the parts after this one
        last = max(last, min(wanted, last + 1 if i else 0), earliest, 0)
        found[name] = last
        done += p.numel()
        left -= 1
    return found
