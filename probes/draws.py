"""Estimates of a known gradient as numbers, never as vectors: with ∇f known a slope is ⟨∇f, u⟩, and all that a comparison needs of
ĝ = Σ a_k u_k are inner products of the u_k with a few fixed vectors and with each other.

Directions are drawn in batches and streamed tensor by tensor (Gaussian ones 2^18 entries at a time): a batch leaves behind, per
finest block, `dots` (Q, columns) and `gram` (Q, Q), which add up over blocks. Sums within a piece are in the directions' precision
(relative error 1e-6), across pieces in float64. One Gaussian batch serves every law that is a function of it: averages of q,
spheres, orthonormal sets, masks, preconditioners.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from hybridtheory.blocks import Block
from hybridtheory.estimators import Coordinate, Gaussian, Key, Law, MagnitudeMask, Preconditioned, RandomMask
from hybridtheory.estimators.lowrank import LowRank
from hybridtheory.estimators.masks import as_numbers
from hybridtheory.estimators.streams import CHUNK, chunk_size, normal_chunk, signs
from hybridtheory.vectors import Tensors
from probes.subspaces import captured_energy, keeps, projects, square

TESTS = 8  # fixed random unit vectors
G, HG, R, CAPTURED, COLUMNS = 0, 1, 2, 2 + TESTS, 3 + TESTS
# A fixed random vector is rows of _PATTERN signs, each row the same pattern times a sign of its own: entries ±1 that cost no memory.
_PATTERN = 1 << 12
# Entries that are looked at together: 16 directions of 2^13 to 2^15 of them take the same time an entry; fewer pieces are fewer calls.
PIECE = 1 << 15
# Weights of a group up to which its columns are kept (100 MB) instead of being made for each batch.
KEPT = 1 << 21


def _pieces(n: int) -> Iterator[tuple[int, int]]:
    return ((start, min(start + PIECE, n)) for start in range(0, n, PIECE))


Sums = dict[str, tuple[np.ndarray, np.ndarray]]  # block -> dots (Q, COLUMNS), gram (Q, Q)
Scaling = Callable[[Sequence[Key], str, Tensor, int], Tensor]  # keys, tensor, chunk -> (1 or Q, chunk)


@dataclass(frozen=True)
class Reference:
    """What the estimates of one group are compared with: g, Hg and the fixed vectors.

    part  the finest block of each tensor, by the tensor's name.
    """

    group: Block
    part: dict[str, str]
    g: dict[str, Tensor]
    Hg: dict[str, Tensor]
    patterns: Tensor  # (TESTS, _PATTERN)
    row_signs: dict[str, Tensor]  # (rows, TESTS)
    kept: dict[tuple[str, int, int], Tensor] = field(default_factory=dict)  # columns of small groups, made once

    @classmethod
    def of(cls, group: Block, part: dict[str, str], g: Tensors, Hg: Tensors, seed: int) -> Reference:
        # Laws draw in float32 for 16-bit weights, and sums over millions of entries need it.
        g, Hg = ([t.float() if t.dtype in (torch.bfloat16, torch.float16) else t for t in v] for v in (g, Hg))
        like = g[0]
        key = Key(seed)
        patterns = signs(key, "fixed test vectors", torch.empty(TESTS, _PATTERN, dtype=like.dtype, device=like.device))
        rows = {
            n: signs(key, f"fixed test vectors/{n}", torch.empty(-(-p.numel() // _PATTERN), TESTS, dtype=like.dtype, device=like.device))
            for n, p in group.parameters.items()
        }  # fmt: skip
        first, second = ({n: t.reshape(-1) for n, t in zip(group.names, v, strict=True)} for v in (g, Hg))
        return cls(group, part, first, second, patterns, rows)

    def columns(self, name: str, start: int, stop: int) -> Tensor:
        """g, Hg and the fixed vectors on some entries of one tensor, (2 + TESTS, stop - start); ``start`` is a multiple of PIECE."""
        if (name, start, stop) in self.kept:
            return self.kept[name, start, stop]
        out = torch.empty(2 + TESTS, stop - start, dtype=self.patterns.dtype, device=self.patterns.device)
        out[G], out[HG] = self.g[name][start:stop], self.Hg[name][start:stop]
        row, whole = start // _PATTERN, (stop - start) // _PATTERN
        ours = self.row_signs[name][row : row + whole + 1].T  # (TESTS, rows)
        cut = whole * _PATTERN
        torch.mul(
            self.patterns[:, None, :], ours[:, :whole, None], out=out[R:, :cut].unflatten(1, (whole, _PATTERN))
        ) if whole else None
        if cut < stop - start:
            torch.mul(self.patterns[:, : stop - start - cut], ours[:, whole:], out=out[R:, cut:])
        if self.group.numel <= KEPT:
            self.kept[name, start, stop] = out
        return out

    def column(self, name: str, index: int) -> Tensor:
        """One column on a whole tensor, flat."""
        if index in (G, HG):
            return (self.g, self.Hg)[index][name]
        signs_of = self.row_signs[name][:, index - R]
        return (signs_of[:, None] * self.patterns[index - R]).reshape(-1)[: self.g[name].numel()]

    def inner(self, block: Block) -> dict[str, float]:
        """‖g‖², ‖Hg‖², ⟨g, Hg⟩ on a block, and ⟨g, r_j⟩ of the fixed vectors (‖r_j‖² = d)."""
        out = {"gg": 0.0, "HH": 0.0, "gH": 0.0, **{f"r{j}": 0.0 for j in range(TESTS)}}
        for n, p in block.parameters.items():
            for start, stop in _pieces(p.numel()):
                columns = self.columns(n, start, stop).double()
                g, h, *tests = (columns @ columns[:HG].T)[:, 0].tolist()
                out["gg"], out["gH"] = out["gg"] + g, out["gH"] + h
                out["HH"] += float(columns[HG] @ columns[HG])
                for j, x in enumerate(tests):
                    out[f"r{j}"] += x
        return out


@dataclass
class Collected:
    """Batches of one law: dots (batches, Q, COLUMNS) and gram (batches, Q, Q) per finest block."""

    dots: dict[str, list[np.ndarray]] = field(default_factory=dict)
    gram: dict[str, list[np.ndarray]] = field(default_factory=dict)

    def add(self, sums: Sums) -> None:
        for name, (dots, gram) in sums.items():
            self.dots.setdefault(name, []).append(dots)
            self.gram.setdefault(name, []).append(gram)

    def of(self, names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Of the union of finest blocks."""
        return tuple(sum(np.array(kept[n]) for n in names) for kept in (self.dots, self.gram))  # type: ignore[return-value]


def keys(law: Law, seed: int, stage: int, start: int, count: int) -> list[Key]:
    """Keys of independent estimates: queries of one step for a law that keeps its subspace, one step each for the others."""
    if keeps(law):
        return [Key(seed, 0, (stage << 22) + start + i) for i in range(count)]
    return [Key(seed, (stage << 32) + start + i) for i in range(count)]


def scaling(law: Law) -> Scaling | None:
    """u = scaling * z with z the Gaussian direction of the same key, chunk by chunk; None for the Gaussian itself."""
    if isinstance(law, MagnitudeMask):
        return lambda keys, name, like, chunk: law.mask_chunk(name, like, chunk)[None]
    if isinstance(law, Preconditioned):
        return lambda keys, name, like, chunk: (
            law.h[name].reshape(-1)[None, chunk * CHUNK : (chunk + 1) * CHUNK].rsqrt()
        )
    if isinstance(law, RandomMask):
        return lambda keys, name, like, chunk: torch.stack([law.mask_chunk(k, name, like, chunk) for k in keys])
    return None


def shares(law: Law) -> bool:
    """Whether the law's direction is made from the Gaussian one of the same key."""
    inner = getattr(law, "law", None)
    return isinstance(law, Gaussian | Preconditioned) or (
        isinstance(law, MagnitudeMask | RandomMask) and isinstance(inner, Gaussian) and not keeps(law)
    )


@torch.no_grad()
def gaussian_batch(reference: Reference, laws: dict[str, Law], batch: Sequence[Key]) -> dict[str, Sums]:
    """One batch of Gaussian directions, and what each of ``laws`` (label -> law that `shares` them) makes of it."""
    found: dict[str, dict[str, list[Tensor]]] = {label: {} for label in laws}
    scales = {label: scaling(law) for label, law in laws.items()}
    for name, like in reference.group.parameters.items():
        part = reference.part[name]
        for chunk in range(-(-like.numel() // CHUNK)):
            z = _gaussian_chunk(batch, name, like, chunk)
            by = {label: None if s is None else s(batch, name, like, chunk) for label, s in scales.items()}
            for at, end in _pieces(z.shape[1]):
                columns = reference.columns(name, chunk * CHUNK + at, chunk * CHUNK + end)
                for label, s in by.items():
                    u, energy = z[:, at:end], None
                    if s is not None:
                        here, mask = s[:, at:end], s.dtype == torch.bool
                        here = as_numbers(here, z.dtype) if mask else here.to(z.dtype)
                        u = u * here
                        energy = here @ (columns[G] ** 2) if mask else None
                    _add(found[label], part, u, columns, energy)
    return {label: _numbers(sums) for label, sums in found.items()}


def _gaussian_chunk(batch: Sequence[Key], name: str, like: Tensor, chunk: int) -> Tensor:
    """(Q, chunk): drawn side by side, not drawn and then gathered."""
    z = torch.empty(len(batch), chunk_size(like, chunk), dtype=torch.float32, device=like.device)
    for key, row in zip(batch, z, strict=True):
        normal_chunk(key, name, like, chunk, out=row)
    return z.double() if like.dtype == torch.float64 else z


Factored = dict[
    str, tuple[Tensor, Tensor, Tensor]
]  # tensor -> B (n, r), columns' matrices times B (2 + TESTS, m, r), B'B


@torch.no_grad()
def factored(reference: Reference, law: Law, key: Key) -> Factored:
    """For a law u = A B' that keeps B: ⟨u, W⟩ = ⟨A, W B⟩, so that with W B known the dense u need never be made."""
    assert isinstance(law, LowRank)
    found: Factored = {}
    for name, like in reference.group.parameters.items():
        shape = law.matrix(like)
        if shape is None:
            continue
        _, b = law.factors(key, name, *shape, like)
        # W B one row of pieces at a time would need B cut too; W, 2 + TESTS of them, is made one at a time instead.
        columns = [reference.column(name, i).view(shape) @ b for i in range(2 + TESTS)]
        found[name] = (b, torch.stack(columns), b.T @ b)
    return found


@torch.no_grad()
def factored_batch(reference: Reference, law: Law | None, known: Factored, batch: Sequence[Key]) -> Sums:
    """As `law_batch`, from the factors alone; tensors that the law draws densely (vectors) are."""
    assert isinstance(law, LowRank)
    found: dict[str, list[Tensor]] = {}
    for name, like in reference.group.parameters.items():
        shape = law.matrix(like)
        if shape is None:
            u = torch.stack([law.fill(k, name, like).reshape(-1) for k in batch])
            _add(found, reference.part[name], u, reference.columns(name, 0, like.numel()))
            continue
        _, columns, gram = known[name]
        a = torch.stack([law.factors(k, name, *shape, like)[0] for k in batch])  # (Q, m, r)
        flat = a.flatten(1)
        _add_sums(found, reference.part[name], flat @ (a @ gram).flatten(1).T, flat @ columns.flatten(1).T)
    return _numbers(found)


@torch.no_grad()
def law_batch(reference: Reference, law: Law, batch: Sequence[Key]) -> Sums:
    """One batch of any law's directions: a tensor's Q directions are held while that tensor is looked at."""
    bound = law.bind(reference.group, batch)
    found: dict[str, list[Tensor]] = {}
    per_step = projects(law) and not keeps(law)
    for name, like in reference.group.parameters.items():
        captured: list[float] = []
        shape = bound.matrix(like) if isinstance(bound, LowRank) else None
        if isinstance(bound, LowRank) and shape is not None:
            made = []
            for key in batch:
                made.append(bound.factors(key, name, *shape, like))
                if per_step:  # now, while the law remembers this draw's subspace
                    captured.append(captured_energy(bound, key, name, like, reference.g[name]))
            held = torch.bmm(torch.stack([a for a, _ in made]), torch.stack([b for _, b in made]).mT).flatten(1)
        else:
            held = torch.empty(len(batch), like.numel(), dtype=reference.g[name].dtype, device=like.device)
            for key, row in zip(batch, held, strict=True):
                row.copy_(bound.fill(key, name, like).reshape(-1))
            if per_step and isinstance(bound, LowRank):  # drawn densely
                captured = [square(reference.g[name])] * len(batch)
            elif per_step:
                captured = [captured_energy(bound, key, name, like, reference.g[name]) for key in batch]
        for start, stop in _pieces(like.numel()):
            _add(found, reference.part[name], held[:, start:stop], reference.columns(name, start, stop))
        if per_step:
            found[reference.part[name]][0][:, CAPTURED] += torch.tensor(
                captured, dtype=torch.float64, device=like.device
            )
    return _numbers(found)


def _add(found: dict[str, list[Tensor]], part: str, u: Tensor, columns: Tensor, energy: Tensor | None = None) -> None:
    """Add the inner products of a piece of directions (Q, n) to its block's sums; with the columns on the left it takes 3/4 of the time."""
    _add_sums(found, part, u @ u.T, (columns @ u.T).T, energy)


def _add_sums(
    found: dict[str, list[Tensor]], part: str, gram: Tensor, dots: Tensor, energy: Tensor | None = None
) -> None:
    """As `_add`, of sums (Q, Q) and (Q, 2 + TESTS) that are known."""
    if part not in found:
        q, kind = len(gram), {"dtype": torch.float64, "device": gram.device}
        found[part] = [torch.zeros(q, COLUMNS, **kind), torch.zeros(q, q, **kind)]  # type: ignore[call-overload]
    found[part][0][:, :CAPTURED] += dots
    found[part][1].add_(gram)
    if energy is not None:
        found[part][0][:, CAPTURED] += energy


def _numbers(found: dict[str, list[Tensor]]) -> Sums:
    return {part: (dots.cpu().numpy(), gram.cpu().numpy()) for part, (dots, gram) in found.items()}


@torch.no_grad()
def coordinate_draws(reference: Reference, block: Block, batch: Sequence[Key]) -> tuple[np.ndarray, np.ndarray]:
    """dots (n, 1, COLUMNS) and gram (n, 1, 1) of n coordinate directions on one block: one entry is looked up, nothing is drawn."""
    law = Coordinate().bind(block, batch)
    assert isinstance(law, Coordinate)
    names, size = block.names, block.numel**0.5
    first = [law.starts[n] for n in names]
    where = [law._place(k, names[0]) + first[0] for k in batch]
    by_tensor: dict[int, list[tuple[int, int]]] = {}
    for i, j in enumerate(where):
        tensor = bisect_right(first, j) - 1
        by_tensor.setdefault(tensor, []).append((i, j - first[tensor]))
    dots = np.zeros((len(batch), 1, COLUMNS))
    for tensor, found in by_tensor.items():
        name = names[tensor]
        index, at = torch.tensor(found).T
        at = at.to(reference.patterns.device)
        columns = [
            reference.g[name][at],
            reference.Hg[name][at],
            *(reference.patterns[:, at % _PATTERN] * reference.row_signs[name][at // _PATTERN].T),
        ]
        dots[index.numpy(), 0, :CAPTURED] = size * torch.stack(columns, 1).double().cpu().numpy()
    return dots, np.full((len(batch), 1, 1), float(block.numel))


def coordinate_spread(reference: Reference, block: Block) -> float:
    """Var‖ĝ‖²/(E‖ĝ‖²)² = d Σ gᵢ⁴/‖g‖⁴ − 1 of the coordinate law, exactly: a handful of large entries carry its moments."""
    square = sum(float((reference.g[n].double() ** 2).sum()) for n in block.names)
    fourth = sum(float((reference.g[n].double() ** 4).sum()) for n in block.names)
    return block.numel * fourth / square**2 - 1 if square > 0 else 0.0
