"""Sparse directions: another law's u with a 0/1 mask over it. The estimate is of the masked gradient, P = diag(m)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from hybridtheory.blocks import Block
from hybridtheory.errors import UserError
from hybridtheory.estimators.gaussian import Gaussian
from hybridtheory.estimators.law import Law
from hybridtheory.estimators.streams import CHUNK, Key, coins, coins_chunk
from hybridtheory.shards import whole


@dataclass(frozen=True)
class RandomMask(Law):
    """Each entry is kept with probability ``keep``; the mask is redrawn every ``refresh`` steps (ZO-Bench's sparse variant).

    Expected squared cosine 1/d whatever ``keep`` is: a random mask captures the share of ∇f that it keeps of the entries.
    """

    keep: float = 0.25
    refresh: int = 1
    law: Law = field(default_factory=Gaussian)

    def bind(self, block: Block, keys: Sequence[Key]) -> Law:
        _check_share(self.keep)
        return replace(self, law=self.law.bind(block, keys))

    def fill(self, key: Key, name: str, like: Tensor) -> Tensor:
        return masked_(self.law.fill(key, name, like), self.mask(key, name, like))

    def mask(self, key: Key, name: str, like: Tensor) -> Tensor:
        return coins(Key(key.seed, key.step // self.refresh), f"{name}#mask", like, self.keep)

    def mask_chunk(self, key: Key, name: str, like: Tensor, chunk: int) -> Tensor:
        """That chunk of the mask (`streams.CHUNK` elements), flat, without the rest."""
        return coins_chunk(Key(key.seed, key.step // self.refresh), f"{name}#mask", like, chunk, self.keep)


@dataclass(frozen=True)
class MagnitudeMask(Law):
    """Only entries with |w| at or below the tensor's threshold move (Sparse MeZO, Liu et al. 2024, arXiv 2402.15751).

    The thresholds are fixed before training (`of`), the mask follows the weights: it is read off the very weights that are perturbed,
    so it costs no memory, and evaluation and update see the same one.
    """

    thresholds: Mapping[str, float] = field(default_factory=dict, repr=False)
    law: Law = field(default_factory=Gaussian)

    @classmethod
    def of(cls, block: Block, keep: float = 0.25, law: Law | None = None) -> MagnitudeMask:
        """Thresholds that keep the smallest ``keep`` of each tensor's entries now."""
        _check_share(keep)
        found = {}
        for name, w in block.parameters.items():
            flat = whole(w.detach()).reshape(-1).abs()
            found[name] = float(flat.kthvalue(max(1, round(keep * flat.numel()))).values)
        return cls(found, law or Gaussian())

    def bind(self, block: Block, keys: Sequence[Key]) -> Law:
        missing = block.parameters.keys() - self.thresholds.keys()
        if missing:
            raise UserError(
                f"the magnitude mask has no threshold for {min(missing)!r}: build it with MagnitudeMask.of(block, keep)"
            )
        return replace(self, law=self.law.bind(block, keys))

    def state(self) -> dict[str, float]:
        return dict(self.thresholds)

    def restored(self, state: Mapping[str, float]) -> Law:
        return replace(self, thresholds=dict(state))

    def touches(self, key: Key, name: str) -> bool:
        return self.law.touches(key, name)

    def fill(self, key: Key, name: str, like: Tensor) -> Tensor:
        return masked_(self.law.fill(key, name, like), self.mask(name, like))

    def mask(self, name: str, like: Tensor) -> Tensor:
        return torch.abs(like.detach()) <= self.thresholds[name]

    def mask_chunk(self, name: str, like: Tensor, chunk: int) -> Tensor:
        """That chunk of the mask (`streams.CHUNK` elements), flat."""
        return self.mask(name, like.reshape(-1)[chunk * CHUNK : (chunk + 1) * CHUNK])


def masked_(u: Tensor, mask: Tensor) -> Tensor:
    """u, zero where the mask is False, in place."""
    return u.mul_(as_numbers(mask, u.dtype))


def as_numbers(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """0 and 1: by way of bytes, which torch converts seven times as fast as booleans, and multiplies by three times as fast."""
    return mask.view(torch.uint8).to(dtype)


def _check_share(keep: float) -> None:
    if not 0 < keep <= 1:
        raise UserError(f"a mask must keep a share of the entries in (0, 1], got {keep:g}")
