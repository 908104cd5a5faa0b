"""Probe vectors: random tensors as a pure function of (seed, purpose, indices, tensor name). The caller's generators are never touched."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor

from hybridtheory.blocks import Block
from hybridtheory.vectors import Tensors


def _generator(seed: int, path: tuple[str | int, ...], name: str) -> np.random.Generator:
    # The text is unambiguous (repr quotes every part); a 128-bit digest of it keys a counter-based stream.
    digest = hashlib.blake2b(repr((seed, *path, name)).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


def gaussian(block: Block, seed: int, *path: str | int) -> Tensors:
    """N(0, I), drawn in float32 (float64 for float64 parameters) and cast to the parameter's dtype and device."""

    def draw(name: str, t: Tensor) -> Tensor:
        wide = np.float64 if t.dtype == torch.float64 else np.float32
        values = _generator(seed, path, name).standard_normal(tuple(t.shape), dtype=wide)
        return torch.as_tensor(values).to(device=t.device, dtype=t.dtype)

    return [draw(n, p) for n, p in block.parameters.items()]


def rademacher(block: Block, seed: int, *path: str | int) -> Tensors:
    """Independent signs."""

    def draw(name: str, t: Tensor) -> Tensor:
        words = _generator(seed, path, name).bytes((t.numel() + 7) // 8)
        bits = np.unpackbits(np.frombuffer(words, dtype=np.uint8), count=t.numel())
        return torch.from_numpy(bits).view(t.shape).to(device=t.device, dtype=t.dtype).mul_(2).sub_(1)

    return [draw(n, p) for n, p in block.parameters.items()]
