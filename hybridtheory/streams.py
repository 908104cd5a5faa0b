"""Probe vectors: random tensors for a block as a pure function of (seed, purpose, index, number, tensor name)."""

from __future__ import annotations

from hybridtheory.blocks import Block
from hybridtheory.estimators.streams import Key, normal, signs
from hybridtheory.shards import part
from hybridtheory.vectors import Tensors


def gaussian(block: Block, seed: int, purpose: str, index: int = 0, number: int = 0) -> Tensors:
    """N(0, I) in the parameters' dtypes (drawn in float32, or float64 for float64 parameters)."""
    key = Key(seed, index, number)
    return [part(normal(key, f"{purpose}/{n}", p.shape, p).to(p.dtype), p) for n, p in block.parameters.items()]


def rademacher(block: Block, seed: int, purpose: str, index: int = 0, number: int = 0) -> Tensors:
    """Independent signs in the parameters' dtypes."""
    key = Key(seed, index, number)
    return [part(signs(key, f"{purpose}/{n}", p).to(p.dtype), p) for n, p in block.parameters.items()]
