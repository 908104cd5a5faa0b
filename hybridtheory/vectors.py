"""Vectors in parameter space are lists of tensors (one per parameter); inner products are taken in float64. Never one flat vector."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hybridtheory import shards

Tensors = list[Tensor]

# Inner products go through float64 in pieces of this many elements, so the widened copies stay small.
_CHUNK = 1 << 22
DOT_BYTES = 2 * 8 * _CHUNK  # what they take at most


@torch.no_grad()
def dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """Σ aᵢbᵢ, products and sum in float64, over all processes that share the tensors."""
    total = 0.0
    for x, y in zip(a, b, strict=True):
        x, y = shards.local(x).reshape(-1), shards.local(y).reshape(-1)
        for start in range(0, x.numel(), _CHUNK):
            total += float(torch.dot(x[start : start + _CHUNK].double(), y[start : start + _CHUNK].double()))
    return shards.total(total, a)


def components(rows: Sequence[Tensor], v: Sequence[Tensor]) -> Tensor:
    """(k,) inner products of v with k vectors that are kept as the rows of one matrix a tensor."""
    return shards.total(torch.stack([r @ shards.local(t).reshape(-1) for r, t in zip(rows, v, strict=True)]).sum(0), v)


def combined(weights: Tensor, rows: Sequence[Tensor], like: Sequence[Tensor]) -> Tensors:
    """Σₖ weightₖ vₖ of vectors that are kept as rows, in the shapes of ``like``."""
    own = [(weights.to(r) @ r).view(shards.local(t).shape) for r, t in zip(rows, like, strict=True)]
    return [shards.of_parts(x, t) for x, t in zip(own, like, strict=True)]


def norm(a: Sequence[Tensor]) -> float:
    """‖a‖₂, summed in float64."""
    return dot(a, a) ** 0.5


def zeros(like: Sequence[Tensor]) -> Tensors:
    """Zeros in the shapes, dtypes and devices of ``like``."""
    return [torch.zeros_like(t, requires_grad=False) for t in like]


def scale(a: Sequence[Tensor], s: float) -> Tensors:
    """s a, as new tensors without a graph."""
    return list(torch._foreach_mul([t.detach() for t in a], s))


def scale_(a: Tensors, s: float) -> Tensors:
    """a *= s in place; returns a."""
    torch._foreach_mul_(a, s)
    return a


def add_(a: Tensors, b: Sequence[Tensor], alpha: float = 1.0) -> Tensors:
    """a += alpha b in place; returns a."""
    torch._foreach_add_(a, list(b), alpha=alpha)
    return a


def clone(a: Sequence[Tensor]) -> Tensors:
    """Copies without a graph."""
    return [t.detach().clone() for t in a]
