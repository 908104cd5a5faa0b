"""Ends of the spectrum and traces from differences of gradients, with the interval that the differences themselves leave open.

`spectrum` and `traces` take and return what their namesakes of the exact engine do; ``Estimate.numerical`` is then the half-width of a
95 % interval around what the exact engine gives for the same vectors. It says nothing of the vectors themselves: that is what
``stderr`` and ``residual`` are for.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hybridtheory import lanczos, streams
from hybridtheory import traces as exact
from hybridtheory.blocks import Block
from hybridtheory.difference import CHEAP, MULTIPLES, PILOT, Differences, Form, coefficients, level
from hybridtheory.estimate import Estimate
from hybridtheory.lanczos import Lanczos
from hybridtheory.shards import local
from hybridtheory.traces import Traces
from hybridtheory.vectors import Tensors, add_, combined, dot, norm, scale, scale_

# A quotient may be off by this share of the spectrum's larger end before Lanczos is run again with smaller steps: a Ritz vector is then
# off by about as much, and its Rayleigh quotient by the square.
TRUNCATION = 0.02
STEP = 6.0  # of plain quotients, times eps^(1/3), in units of what `Differences.radius` finds: in float32 off by a thousandth there


@dataclass(frozen=True)
class Ends:
    """A Lanczos run whose two ends are v'Hv at their Ritz vectors, and what a trace needs to leave these out."""

    run: Lanczos
    forms: tuple[Form, Form]  # at the smallest and the largest
    beside: Lanczos = field(repr=False)


def spectrum(
    hess: Differences, block: Block, seed: int, index: int = 0, warm: Tensors | None = None, **options: Any
) -> Ends:
    """Lanczos on plain quotients, then both ends again from a fit at their Ritz vectors."""
    usual = hess.share

    def run(products: Any) -> Lanczos:
        return lanczos.spectrum(products, block, seed, index, warm, **options)

    # The gradient leans towards the top eigenvectors (Gur-Ari, Roberts & Dyer 2018): along it curvature changes about as fast.
    gradient = hess.gradient(block)
    if norm(gradient) > 0:
        step = STEP * hess.precision ** (1 / 3)
        hess.share = step * min(hess.radius(gradient, block)[0], 1.0)
    del gradient
    try:
        for _ in range(3):
            found = run(hess)
            vectors = _ritz_vectors(found, run, hess, block)
            forms = hess.form(vectors[0], block), hess.form(vectors[1], block)
            size = max(abs(f.value) for f in forms) or 1.0
            off = max(abs(f.value) * (hess.share / f.radius) ** 2 / size for f in forms)
            if off <= TRUNCATION:
                break
            hess.share *= math.sqrt(0.1 * TRUNCATION / off)
    finally:
        hess.share = usual
    low, high = (_end(e, f) for e, f in zip((found.lam_min, found.lam_max), forms, strict=True))
    refined = replace(found, lam_min=low, lam_max=high)
    # V'HV is diagonal on Ritz vectors; what of H V lies outside their span are the residuals.
    left = sum(e.residual**2 for e in (low, high) if e.residual is not None)
    beside = replace(
        refined,
        basis=[torch.stack([local(t).reshape(-1) for t in pair]) for pair in zip(*vectors, strict=True)],
        alphas=np.array([f.value for f in forms]),
        betas=np.zeros(1),
        last_beta=math.sqrt(left),
        forms=np.stack([f.parts for f in forms]),
    )
    # A trace leaves out the vectors of the two ends, and nobody asks for the basis again.
    return Ends(replace(refined, basis=None), forms, beside)


def _end(end: Estimate, form: Form) -> Estimate:
    moved = form.value - end.value
    upper = None if end.upper is None else end.upper + moved
    certain = form.halfwidth <= abs(form.value) / 3
    note = end.note if certain else f"differences of gradients leave {form.halfwidth:.2g} open; {end.note}".rstrip("; ")
    return replace(
        end, value=form.value, upper=upper, numerical=form.halfwidth, resolved=end.resolved and certain, note=note
    )


def _ritz_vectors(run: Lanczos, again: Callable[[Any], Lanczos], hess: Differences, block: Block) -> list[Tensors]:
    """The unit vectors of the smallest and the largest Ritz value; without a kept basis the run is repeated to add them up."""
    _, s = lanczos._tridiagonal(run.alphas.tolist(), run.betas.tolist())
    weights = [s[:, 0], s[:, -1]]
    if run.basis is not None:
        vectors = [combined(torch.as_tensor(w), run.basis, block.tensors) for w in weights]
    else:
        repeat = _Repeat(hess, weights)
        again(repeat)
        vectors = repeat.sums
    return [scale_(v, 1 / norm(v)) for v in vectors]


class _Repeat:
    """Products that add up the vectors they are asked for, each with its weights."""

    def __init__(self, hess: Differences, weights: Sequence[np.ndarray]) -> None:
        self.hess, self.oracle, self.weights, self.step = hess, hess.oracle, weights, 0
        self.sums: list[Tensors] = [[] for _ in weights]

    def each(self, vectors: Sequence[Tensors], *blocks: Any) -> Iterator[tuple[float, list[Tensors]]]:
        (q,) = vectors
        parts = [float(w[self.step]) for w in self.weights]
        self.sums = [
            add_(total, q, part) if total else scale(q, part) for total, part in zip(self.sums, parts, strict=True)
        ]
        self.step += 1
        yield from self.hess.each(vectors, *blocks)


class Extrapolated(Differences):
    """(4 D(h) − D(2h))/3 v, and for the first `PILOT` vectors the fit over all `MULTIPLES`, whose quadratic forms are kept."""

    def __init__(self, hess: Differences, share: float) -> None:
        super().__init__(hess.oracle, hess.blocks)
        self.share = share
        self.kept: dict[int, dict[int, np.ndarray]] = {}  # vector -> micro-batch -> (steps, tensors)
        self._seen: list[weakref.ref[Tensor]] = []  # a vector comes once for every micro-batch

    def _difference(self, i: int, v: Tensors, rows: list[int], wanted: list[Tensor]) -> Tensors:
        h = self.share / self.relative(v, rows)
        number = next((n for n, seen in enumerate(self._seen) if seen() is v[0]), PILOT)
        if number == PILOT and len(self._seen) < PILOT:
            number = len(self._seen)
            self._seen.append(weakref.ref(v[0]))
        steps, weights = (MULTIPLES, coefficients()) if number < PILOT else CHEAP[1]
        total: Tensors = []
        forms = []
        for multiple, weight in zip(steps, weights, strict=True):
            quotient = self._quotient(i, v, rows, wanted, float(multiple) * h)
            if number < PILOT:
                forms.append([dot([x], [q]) for x, q in zip(v, quotient, strict=True)])
            scale_(quotient, float(weight))
            total = add_(total, quotient) if total else quotient
        if number < PILOT:
            self.kept.setdefault(number, {})[i] = np.array(forms)
        return total


def traces(
    hess: Differences, blocks: Sequence[Block], seed: int, index: int = 0, beside: Ends | None = None, **options: Any
) -> dict[str, Traces]:
    """The traces of the blocks from extrapolated quotients, with ``trace.numerical``."""
    alone = beside if len(blocks) == 1 else None
    first = [t for b in blocks for t in streams.rademacher(b, seed, "trace", index, 0)]
    if alone:
        first = exact.outside(first, alone.beside.basis or [])
    finer = Extrapolated(hess, hess.form(first, blocks).share)
    found = exact.traces(finer, blocks, seed, index=index, beside=alone.beside if alone else None, **options)
    kept = np.array([np.sum(list(parts.values()), axis=0) for parts in finer.kept.values()])  # (pilots, steps, tensors)
    kept = np.array(hess.oracle.ranks.sum(*kept.ravel())).reshape(kept.shape)
    places = np.cumsum([len(b.tensors) for b in blocks])[:-1]
    result = {}
    for b, own in zip(blocks, np.split(kept, places, axis=2), strict=True):
        t = found[b.name]
        correction, width = level(own.sum(axis=2), t.trace.n)
        width = math.hypot(width, *(f.halfwidth for f in alone.forms)) if alone else width
        result[b.name] = replace(t, trace=replace(t.trace, value=t.trace.value + correction, numerical=width))
    return result
