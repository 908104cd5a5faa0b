"""Traces of Hessian blocks by Hutchinson's estimator, with standard errors and a stopping rule.

What a trace costs is the noise of its samples, Var z'Hz = 2 Σ_{i≠j} H_ij² for random signs z. In a network nearly all of it comes from
matrices that multiply each other (attention's with the projection behind them, the two of an MLP, the two of LoRA): the mixed
derivative of a product is large and random, and has no trace. So the vectors come in pairs z, s∘z, where s flips every other
matrix of a block: in the mean of the two samples every term between a flipped and an unflipped tensor cancels exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy import stats

from hybridtheory import streams
from hybridtheory.blocks import Block, split
from hybridtheory.estimate import Estimate
from hybridtheory.lanczos import Lanczos
from hybridtheory.oracle import Products
from hybridtheory.vectors import Tensors, add_, combined, components, dot

# What a product costs in second differences of the loss (two values each): on SmolLM2-135M 9.7 s against 2 x 1.4 s with the allocator's
# defaults, 6.2 s against 2 x 1.0 s in the commands. A constant between theirs and what shorter rows give, not a clock:
# how many vectors are drawn must not differ between two runs.
PRODUCT = 4.0
FIRST = 24  # stand-ins that are drawn before their number is planned again


@dataclass(frozen=True)
class Traces:
    """Of one block: tr H_bb; Σ_c ‖H_bc‖²_F over the blocks that shared the products (tr H² when the block was alone)."""

    trace: Estimate
    trace_sq: Estimate
    # (n, micro-batches): z'H_i z, the parts of n independent samples (a pair is one)
    forms: np.ndarray = field(repr=False)


def traces(
    hess: Products,
    blocks: Sequence[Block],
    seed: int,
    tol: float = 0.1,
    pilot: int = 8,
    max_vectors: int = 128,
    chunk: int | None = None,
    index: int = 0,
    beside: Lanczos | None = None,
    stand_ins: Sequence[Callable[[Tensors], np.ndarray]] = (),
) -> dict[str, Traces]:
    """Hutchinson's trace of every block out of shared products: z_b'(Hz)_b with Rademacher z over all ``blocks``.

    ``beside``: a Lanczos run on the same single block, with its basis V. On its span the trace is known (tr V'HV, no product
    needed), so the vectors sample the rest only: with the extreme eigenvalues gone their variance is what the bulk leaves (the
    idea of Hutch++, Meyer et al. 2021).

    ``stand_ins``: z'Hz of a single block, roughly and cheaply, by micro-batch (second differences of the loss, of several steps). The one
    that is nearest on the first vectors is taken; where the pilot says that it pays, the trace is the mean of many stand-ins plus that
    of what they leave out, z'Hz less its stand-in, on fewer vectors that have both (two-level Monte Carlo, Giles 2008): unbiased
    however rough the stand-in is, and the standard error holds both parts.

    Each sample is unbiased for every block at once; the price is the noise of the coupling between blocks, so PEFT and base blocks
    are measured in separate calls. Two stages, so that the stopping rule cannot bias the answer: ``pilot`` vectors, in pairs, say
    what pairs cancel, hence whether pairs or independent vectors need fewer products, and the number that reaches the relative
    standard error ``tol`` for every block (capped by ``max_vectors``); then all of them are averaged. "Not resolved" means a standard
    error above a third of the value.
    """
    known = _known(beside, blocks)
    drawn = _Samples(hess, blocks, seed, index, chunk, [] if known is None else known.basis)
    unit, most = drawn.unit, max(max_vectors // drawn.unit, 1) * drawn.unit
    drawn.draw(min(pilot + pilot % unit, most), paired=unit == 2)
    pilots = [drawn.totals(b.name) + (0.0 if known is None else known.trace) for b in blocks]
    paired, wanted = _plan(pilots, unit, tol)
    if stand_ins and len(blocks) == 1 and known is None and drawn.count >= 2 * unit:
        found = _with_stand_ins(drawn, stand_ins, pilots[0], wanted, tol, most)
        if found is not None:
            return {blocks[0].name: found}
    drawn.draw(min(max(wanted, drawn.count), most), paired)
    return {b.name: drawn.traces(b.name, known) for b in blocks}


@dataclass(frozen=True)
class _Known:
    """On the span of a Lanczos basis: tr V'HV, what it adds to Σ‖H‖²_F, and the trace by micro-batch where the run kept it."""

    basis: Tensors
    trace: float
    trace_sq: float
    parts: np.ndarray | None


def _known(beside: Lanczos | None, blocks: Sequence[Block]) -> _Known | None:
    if beside is None or beside.basis is None or len(blocks) != 1:
        return None
    squared = float((beside.alphas**2).sum() + 2 * (beside.betas**2).sum() + beside.last_beta**2)
    parts = None if beside.forms is None else beside.forms.sum(axis=0)
    return _Known(beside.basis, float(beside.alphas.sum()), squared, parts)


class _Samples:
    """The vectors of one call, each a function of its number, and z_b'(Hz)_b of those that were drawn so far.

    unit   products in an independent sample: 2 where vectors come in pairs
    basis  what the vectors leave out ([]: nothing)
    """

    def __init__(
        self, hess: Products, blocks: Sequence[Block], seed: int, index: int, chunk: int | None, basis: Tensors
    ) -> None:
        self.hess, self.blocks, self.seed, self.index, self.basis = hess, blocks, seed, index, basis
        self.flips = {b.name: flipped(b) for b in blocks}
        self.unit = 2 if any(any(f) for f in self.flips.values()) else 1
        self.samples: dict[str, list[list[float]]] = {b.name: [] for b in blocks}  # z'H_i z by micro-batch
        self.squares: dict[str, list[float]] = {b.name: [] for b in blocks}
        self.count = 0
        self.chunk = chunk or together(sum(t.numel() * t.element_size() for b in blocks for t in b.tensors))

    def vector(self, block: Block, number: int, paired: bool) -> Tensors:
        """The block's part of the vector of that number; ``paired``: odd ones are the flips of those before them."""
        second = paired and number % 2 == 1
        z = streams.rademacher(block, self.seed, "trace", self.index, number - second)
        if second:
            z = [-t if flip else t for t, flip in zip(z, self.flips[block.name], strict=True)]
        return outside(z, self.basis) if self.basis else z

    def draw(self, until: int, paired: bool) -> None:
        """Products with the vectors up to number ``until``."""
        blocks, ranks = self.blocks, self.hess.oracle.ranks
        while self.count < until:
            size = min(self.chunk, until - self.count)
            per_block = [[self.vector(b, self.count + j, paired) for b in blocks] for j in range(size)]
            vectors = [[t for part in z for t in part] for z in per_block]
            rows: list[list[float]] = []  # per micro-batch of this process: z'H_i z, every block of every vector
            totals: list[Tensors] = [[] for _ in range(size)]
            for _, hvs in self.hess.each(vectors, blocks):
                rows.append([])
                for j, hv in enumerate(hvs):
                    rows[-1] += [dot(z, part) for part, z in zip(split(hv, blocks), per_block[j], strict=True)]
                    totals[j] = add_(totals[j], hv) if totals[j] else hv
                del hv, hvs
            forms = ranks.join(rows, len(self.hess.oracle.batches))
            totals = [ranks.add_(t) for t in totals]
            for j in range(size):
                for i, (block, part) in enumerate(zip(blocks, split(totals[j], blocks), strict=True)):
                    self.samples[block.name].append([row[j * len(blocks) + i] for row in forms])
                    self.squares[block.name].append(dot(part, part))
            self.count += size
            del per_block, vectors, totals, part  # before the next ones are drawn

    def totals(self, name: str) -> np.ndarray:
        """z'Hz of every vector so far, (n,)."""
        return np.array([sum(parts) for parts in self.samples[name]])

    def traces(self, name: str, known: _Known | None) -> Traces:
        """The mean over all samples, with what is ``known`` of the part that they leave out."""
        samples = self.samples[name]
        cut = {len(parts) for parts in samples}
        # Where memory ran out midway the micro-batches changed, and only the sums of the parts still compare.
        forms = np.array(samples if len(cut) == 1 else [[sum(parts)] for parts in samples])
        if known is not None and known.parts is not None and len(known.parts) == forms.shape[1]:
            forms = forms + known.parts
        elif known is not None:
            forms = forms.sum(axis=1, keepdims=True) + known.trace
        forms = forms.reshape(-1, self.unit, forms.shape[1]).mean(axis=1)
        squared = self.squared(name) + (0.0 if known is None else known.trace_sq)
        return Traces(mean_estimate(forms.sum(axis=1), self.unit), mean_estimate(squared, self.unit), forms)

    def squared(self, name: str) -> np.ndarray:
        """‖Hz‖² of every independent sample."""
        return np.array(self.squares[name]).reshape(-1, self.unit).mean(axis=1)


def _with_stand_ins(
    drawn: _Samples,
    stand_ins: Sequence[Callable[[Tensors], np.ndarray]],
    pilot: np.ndarray,
    wanted: int,
    tol: float,
    most: int,
) -> Traces | None:
    """Two-level Monte Carlo with the stand-in that is nearest on the first vectors; None where ``wanted`` products cost less.

    pilot: z'Hz of the vectors drawn so far; most: products allowed (eight times as many stand-ins).
    """
    (block,), unit = drawn.blocks, drawn.unit
    samples = drawn.samples[block.name]
    chosen = _nearest(stand_ins, [drawn.vector(block, n, unit == 2) for n in range(2)], samples)

    def near(start: int, stop: int) -> list[np.ndarray]:
        """Stand-ins of those vectors, (micro-batches,) each."""
        return [chosen(drawn.vector(block, number, unit == 2)) for number in range(start, stop)]

    beside_exact = near(0, drawn.count)
    both, alone = _levels(pilot, np.array([f.sum() for f in beside_exact]), unit, tol, wanted)
    if not alone:
        return None
    drawn.draw(min(max(both, drawn.count), most), paired=unit == 2)
    count = drawn.count
    beside_exact += near(len(beside_exact), count)
    # The pilot's four pairs tell the spread of the stand-ins within a factor two; a first part of them tells it better.
    far = near(count, count + min(FIRST, 8 * most))
    left = np.array([sum(e) - n.sum() for e, n in zip(samples, beside_exact, strict=True)])
    more = _stand_ins(np.array([f.sum() for f in far]), left, pilot, unit, tol)
    if more > len(far):
        far += near(count + len(far), count + min(more, 8 * most))
    return _two_levels(samples, drawn.squared(block.name), beside_exact, far, unit)


def _nearest(
    stand_ins: Sequence[Callable[[Tensors], np.ndarray]], vectors: Sequence[Tensors], samples: Sequence[Sequence[float]]
) -> Callable[[Tensors], np.ndarray]:
    """The one with the least squared error against ``samples``, z'Hz of the first vectors."""
    misses = [sum((float(c(z).sum()) - sum(e)) ** 2 for z, e in zip(vectors, samples)) for c in stand_ins]
    return stand_ins[int(np.argmin(np.nan_to_num(misses, nan=np.inf)))]


def _two_levels(
    samples: Sequence[Sequence[float]],
    squares: np.ndarray,
    near: Sequence[np.ndarray],
    far: Sequence[np.ndarray],
    unit: int,
) -> Traces:
    """``samples`` and ``near``: z'Hz and its stand-in on the same vectors; ``squares``: their ‖Hz‖²; ``far``: stand-ins on others."""
    widths = {len(x) for part in (samples, near, far) for x in part}
    if len(widths) > 1:  # memory ran out midway: only sums over the micro-batches compare
        samples = [[sum(s)] for s in samples]
        near, far = ([x.sum(keepdims=True) for x in part] for part in (near, far))
    width = len(far[0])
    left = (np.array(samples) - np.array(near)).reshape(-1, unit, width).mean(axis=1)
    whole = np.array(far).reshape(-1, unit, width).mean(axis=1)
    parts = [mean_estimate(x.sum(axis=1), unit) for x in (left, whole)]
    value, stderr = sum(p.value for p in parts), math.hypot(*(p.stderr or 0.0 for p in parts))
    resolved = stderr <= abs(value) / 3
    trace = Estimate(
        value,
        stderr=stderr,
        n=len(samples) + len(far),
        resolved=resolved,
        note=""
        if resolved
        else f"standard error {stderr:.2g} after {len(samples)} products and {len(far)} second differences",
    )
    return Traces(trace, mean_estimate(squares, unit), left + whole.mean(axis=0))


def _levels(exact: np.ndarray, near: np.ndarray, unit: int, tol: float, wanted: int) -> tuple[int, int]:
    """Vectors with both and vectors with a stand-in alone that reach ``tol`` at the least cost; (0, 0) where ``wanted`` products do.

    exact, near: z'Hz of the pilot's vectors and their stand-ins.
    """
    if not np.isfinite(near).all():
        return 0, 0
    whole, left = exact.reshape(-1, unit).mean(axis=1), (exact - near).reshape(-1, unit).mean(axis=1)
    n = len(whole)
    variance = near.reshape(-1, unit).mean(axis=1).var(ddof=1), left.var(ddof=1)
    target = tol * max(abs(float(whole.mean())), math.sqrt(whole.var(ddof=1) / n), 1e-300)
    excess = (n - 1) / float(stats.chi2.ppf(0.25, n - 1))
    # Least cost a n + b N under s_left^2/n + s_near^2/N <= target^2.
    costs = 1.0, PRODUCT + 1
    total = sum(math.sqrt(c * v) for c, v in zip(costs, variance, strict=True))
    alone, both = (
        max(math.ceil(min(excess * math.sqrt(v / c) * total / target**2, 1e9)), 2)
        for c, v in zip(costs, variance, strict=True)
    )
    both = max(both, n)
    if alone * costs[0] + both * costs[1] - n >= max(wanted / unit, n) * PRODUCT:
        return 0, 0
    return both * unit, alone * unit


def _stand_ins(far: np.ndarray, left: np.ndarray, exact: np.ndarray, unit: int, tol: float) -> int:
    """How many vectors with a stand-in alone reach ``tol`` beside what is ``left`` over on those with both."""
    far, left, exact = (x.reshape(-1, unit).mean(axis=1) for x in (far, left, exact))
    n = len(far)
    mean = float(far.mean() + left.mean())
    room = (tol * max(abs(mean), math.sqrt(exact.var(ddof=1) / len(exact)))) ** 2 - left.var(ddof=1) / len(left)
    excess = (n - 1) / float(stats.chi2.ppf(0.25, n - 1))
    # What the leftovers take cannot be won back here: at least half of the target is left to the stand-ins.
    return unit * math.ceil(min(excess * far.var(ddof=1) / max(room, (tol * mean) ** 2 / 2, 1e-300), 1e9))


def together(size: int) -> int:
    """Vectors of ``size`` bytes that go through one graph together: as many as fit in a quarter of a gigabyte. Beside them stand their
    sums and the products of one micro-batch."""
    return max(1, min(8, (1 << 28) // max(size, 1)))


def flipped(block: Block) -> list[bool]:
    """Every other matrix of a block, in its order (every other tensor where no two are matrices): what a pair's second vector negates."""
    matrices = [t.dim() > 1 for t in block.tensors]
    chosen = matrices if sum(matrices) > 1 else [True] * len(matrices)
    order = np.cumsum(chosen)
    return [bool(c and k % 2 == 0) for c, k in zip(chosen, order, strict=True)]


def _plan(pilots: Sequence[np.ndarray], unit: int, tol: float) -> tuple[bool, int]:
    """Whether vectors go on in pairs, and how many are needed for every block; ``pilots``: z'Hz of the pilot's vectors, a block each."""
    if len(pilots[0]) < 2 * unit:  # the cap left room for one sample: nothing to plan from
        return unit == 2, 0
    needed = {True: 0, False: 0}
    for values in pilots:
        samples = values.reshape(-1, unit)
        means = samples.mean(axis=1)
        within = float(means.var(ddof=1))
        # Half a pair's difference is what cancels: its mean is zero, so its mean square is its variance.
        between = float(((samples[:, 0] - samples[:, -1]) ** 2).mean() / 4)
        # The pilot's own mean may be near zero by chance: what it can at least be told from is its standard error.
        target = tol * max(abs(float(means.mean())), math.sqrt(within / len(means)), 1e-300)
        # The spread of a few samples may be small by chance: the variance is below this many times theirs three times in four.
        freedom = len(means) - 1
        excess = freedom / float(stats.chi2.ppf(0.25, freedom))
        for pairs, variance in ((True, unit * within), (False, within + between)):
            vectors = min(excess * variance / target**2, 1e9)
            needed[pairs] = max(needed[pairs], unit * math.ceil(vectors / unit))
    paired = unit == 2 and needed[True] <= needed[False]
    return paired, needed[paired]


def outside(z: Tensors, basis: Tensors) -> Tensors:
    """z minus its part in the span of the basis."""
    return [t - x for t, x in zip(z, combined(components(basis, z), basis, z), strict=True)]


def mean_estimate(values: Sequence[float] | np.ndarray, each: int = 1) -> Estimate:
    """Mean with its standard error; not resolved above a third of the value, or with fewer than two samples.

    ``each``: vectors behind one value. They are what n counts; the standard error rests on the values.
    """
    array = np.asarray(values, dtype=float)
    n = len(array)
    stderr = float(array.std(ddof=1) / math.sqrt(n)) if n > 1 else None
    value = float(array.mean())
    resolved = stderr is not None and stderr <= abs(value) / 3
    note = (
        "" if resolved else f"standard error {stderr if stderr is not None else math.nan:.2g} after {n * each} vectors"
    )
    return Estimate(value, stderr=stderr, n=n * each, resolved=resolved, note=note)
