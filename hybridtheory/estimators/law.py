"""A direction law: how u is drawn, tensor by tensor, as a pure function of (seed, step, query, tensor name).

Every law here is scaled so that the estimator is slope times u, with slope = the directional derivative of f along u:
E uuᵀ = P, and E ĝ = P ∇f (P = I for the unbiased laws; each law's docstring says what its P is). A law is a small
frozen dataclass; a new estimator is a new law.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hybridtheory.blocks import Block
from hybridtheory.estimators.streams import Key


@dataclass(frozen=True)
class Law(ABC):
    """Only `fill` must be given. ``like`` is the parameter itself: its shape, dtype and device, and for masks its
    values.
    """

    @abstractmethod
    def fill(self, key: Key, name: str, like: Tensor) -> Tensor:
        """u for one tensor, in its shape: float32, or float64 for a float64 parameter."""

    def bind(self, block: Block, keys: Sequence[Key]) -> Law:
        """The law for these keys on this block, for laws where one tensor's u depends on the others (a norm, a Gram
        matrix). UserError where the law does not fit the block (a rank above its matrices, more parts than tensors).
        """
        return self

    def state(self) -> Any:
        """What a checkpoint must keep beside the law's own fields, None for nothing."""
        return None

    def restored(self, state: Any) -> Law:
        """The law with a checkpoint's state."""
        return self

    def touches(self, key: Key, name: str) -> bool:
        """False where u is known to be zero on the whole tensor, so that nothing need be done there."""
        return True

    def shift(self, key: Key, name: str, w: Tensor, alpha: float, out: Tensor | None = None) -> Tensor:
        """w + alpha u, rounded once to w's dtype; written to ``out`` (which may be w). Low-rank laws need no dense u
        for it.
        """
        u = self.fill(key, name, w)
        if out is not None:
            return torch.add(w, u, alpha=alpha, out=out)
        if torch.is_grad_enabled() and w.requires_grad:
            return torch.add(w, u, alpha=alpha).to(w.dtype)
        # u is ours alone: the sum takes its place, and one tensor is allocated instead of two
        return torch.add(w, u, alpha=alpha, out=u if u.dtype == w.dtype else torch.empty_like(w))

    def factored(self, key: Key, name: str, w: Tensor) -> tuple[Tensor, Tensor] | None:
        """A (m, r), B (n, r) with u = A Bᵀ in w's own shape, where that is how u is made: a linear layer can then apply u to its input."""
        return None

    def combine(self, keys: Sequence[Key], name: str, like: Tensor, weights: Sequence[float]) -> Tensor:
        """Σₖ weightₖ uₖ, in u's dtype."""
        total = self.fill(keys[0], name, like).mul_(weights[0])
        for key, weight in zip(keys[1:], weights[1:], strict=True):
            if self.touches(key, name):
                total.add_(self.fill(key, name, like), alpha=weight)
        return total


SMALL = 4096  # elements


@dataclass(frozen=True)
class Kept(Law):
    """Another law whose directions are drawn once and kept while this object lives.

    limit  keep tensors up to this many elements (None: all). With all kept, one block of extra memory buys two of the three draws of a
           central difference. With `SMALL`, it is the norms and biases: a thousandth of a model's memory and much of its count of draws.
    """

    law: Law
    limit: int | None = None
    store: dict[tuple[Key, str], Tensor] = field(default_factory=dict, repr=False, compare=False)

    def bind(self, block: Block, keys: Sequence[Key]) -> Law:
        return Kept(self.law.bind(block, keys), self.limit)

    def touches(self, key: Key, name: str) -> bool:
        return self.law.touches(key, name)

    def _kept(self, key: Key, name: str, like: Tensor) -> Tensor | None:
        if self.limit is not None and like.numel() > self.limit:
            return None
        u = self.store.get((key, name))
        if u is None:
            u = self.store[key, name] = self.law.fill(key, name, like)
        return u

    def fill(self, key: Key, name: str, like: Tensor) -> Tensor:
        u = self._kept(key, name, like)
        return self.law.fill(key, name, like) if u is None else u.clone()

    def shift(self, key: Key, name: str, w: Tensor, alpha: float, out: Tensor | None = None) -> Tensor:
        u = self._kept(key, name, w)
        if u is None:
            return self.law.shift(key, name, w, alpha, out)
        if out is not None:
            return torch.add(w, u, alpha=alpha, out=out)
        return torch.add(w, u, alpha=alpha).to(w.dtype)

    def factored(self, key: Key, name: str, w: Tensor) -> tuple[Tensor, Tensor] | None:
        return self.law.factored(key, name, w)

    def combine(self, keys: Sequence[Key], name: str, like: Tensor, weights: Sequence[float]) -> Tensor:
        if self._kept(keys[0], name, like) is None:
            return self.law.combine(keys, name, like, weights)
        return super().combine(keys, name, like, weights)


def merged(blocks: Block | Sequence[Block]) -> Block:
    """Several blocks as one, for a perturbation of all of them together; ValueError where they share a tensor."""
    if isinstance(blocks, Block):
        return blocks
    parameters: dict[str, torch.nn.Parameter] = {}
    for block in blocks:
        for name, parameter in block.parameters.items():
            if name in parameters:
                raise ValueError(
                    f"the tensor {name!r} is in two of the blocks ({', '.join(b.name for b in blocks)}): blocks "
                    f"must be disjoint"
                )
            parameters[name] = parameter
    groups = sorted({b.group for b in blocks})
    return Block("+".join(b.name for b in blocks), "+".join(groups), parameters)


def offsets(block: Block | Mapping[str, Tensor]) -> dict[str, int]:
    """Where each tensor starts in the block's d coordinates."""
    found, total = {}, 0
    items = block.parameters if isinstance(block, Block) else block
    for name, tensor in items.items():
        found[name] = total
        total += tensor.numel()
    return found
