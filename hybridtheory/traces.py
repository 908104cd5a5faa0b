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
FIRST = 24  # stand-ins at least


@dataclass(frozen=True)
class Traces:
    """Of one block: tr H_bb; Σ_c ‖H_bc‖²_F over the blocks that shared the products (tr H² when the block was alone)."""

    trace: Estimate
    trace_sq: Estimate
    forms: np.ndarray = field(
        repr=False
    )  # (n, micro-batches): z'H_i z, the parts of n independent samples (a pair is one)


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
    ranks = hess.oracle.ranks
    flips = {b.name: flipped(b) for b in blocks}
    unit = 2 if any(any(f) for f in flips.values()) else 1  # products in an independent sample
    samples: dict[str, list[list[float]]] = {b.name: [] for b in blocks}
    squares: dict[str, list[float]] = {b.name: [] for b in blocks}
    count = 0
    known = known_sq = 0.0
    known_parts: np.ndarray | None = None
    if beside is not None and beside.basis is not None and len(blocks) == 1:
        known = float(beside.alphas.sum())
        known_sq = float((beside.alphas**2).sum() + 2 * (beside.betas**2).sum() + beside.last_beta**2)
        known_parts = None if beside.forms is None else beside.forms.sum(axis=0)
    else:
        beside = None
    # Vectors that go through one graph together: as many as fit in half a gigabyte, each with its product.
    size_of_one = sum(t.numel() * t.element_size() for b in blocks for t in b.tensors)
    chunk = chunk or max(1, min(8, (1 << 28) // max(size_of_one, 1)))

    def probe(block: Block, number: int, paired: bool) -> Tensors:
        second = paired and number % 2 == 1
        z = streams.rademacher(block, seed, "trace", index, number - second)
        if second:
            z = [-t if flip else t for t, flip in zip(z, flips[block.name], strict=True)]
        return z if beside is None else _outside(z, beside.basis or [])

    def draw(until: int, paired: bool) -> None:
        nonlocal count
        while count < until:
            size = min(chunk, until - count)
            per_block = [[probe(b, count + j, paired) for b in blocks] for j in range(size)]
            vectors = [[t for part in z for t in part] for z in per_block]
            rows: list[list[float]] = []  # per micro-batch of this process: z'H_i z, every block of every vector
            totals: list[Tensors] = [[] for _ in range(size)]
            for _, hvs in hess.each(vectors, blocks):
                rows.append([])
                for j, hv in enumerate(hvs):
                    rows[-1] += [dot(z, part) for part, z in zip(split(hv, blocks), per_block[j], strict=True)]
                    totals[j] = add_(totals[j], hv) if totals[j] else hv
            forms = ranks.join(rows, len(hess.oracle.batches))
            totals = [ranks.add_(t) for t in totals]
            for j in range(size):
                for i, (block, part) in enumerate(zip(blocks, split(totals[j], blocks), strict=True)):
                    samples[block.name].append([row[j * len(blocks) + i] for row in forms])
                    squares[block.name].append(dot(part, part))
            count += size

    most = max(max_vectors // unit, 1) * unit
    draw(min(pilot + pilot % unit, most), paired=unit == 2)
    pilots = [np.array([sum(s) for s in samples[b.name]]) + known for b in blocks]
    paired, wanted = _plan(pilots, unit, tol)

    def near(start: int, stop: int) -> list[np.ndarray]:
        """Stand-ins of those vectors, (micro-batches,) each."""
        return [chosen(probe(blocks[0], number, unit == 2)) for number in range(start, stop)]

    if stand_ins and len(blocks) == 1 and beside is None and count >= 2 * unit:
        name = blocks[0].name
        first = [probe(blocks[0], number, unit == 2) for number in range(2)]

        def miss(candidate: Callable[[Tensors], np.ndarray]) -> float:
            return sum((float(candidate(z).sum()) - sum(e)) ** 2 for z, e in zip(first, samples[name]))

        misses = [miss(c) for c in stand_ins]
        chosen = stand_ins[int(np.argmin(np.nan_to_num(misses, nan=np.inf)))]
        del first
        beside_exact = near(0, count)
        both, alone = _levels(pilots[0], np.array([f.sum() for f in beside_exact]), unit, tol, wanted)
        if alone:
            planned = min(max(both, count), most)
            draw(planned, paired=unit == 2)
            beside_exact += near(len(beside_exact), count)
            # The pilot's four pairs tell the spread of the stand-ins within a factor two; a first part of them tells it better.
            far = near(count, count + min(max(alone, FIRST), 8 * most))
            left = np.array([sum(e) - n.sum() for e, n in zip(samples[name], beside_exact, strict=True)])
            more = _stand_ins(np.array([f.sum() for f in far]), left, pilots[0], unit, tol)
            if more > len(far):
                far += near(count + len(far), count + min(more, 8 * most))
            return {name: _two_levels(samples[name], squares[name], beside_exact, far, unit)}
    draw(min(max(wanted, count), most), paired)
    result = {}
    for b in blocks:
        cut = {len(parts) for parts in samples[b.name]}
        # Where memory ran out midway the micro-batches changed, and only the sums of the parts still compare.
        forms = np.array(samples[b.name] if len(cut) == 1 else [[sum(parts)] for parts in samples[b.name]])
        if known_parts is not None and len(known_parts) == forms.shape[1]:
            forms = forms + known_parts
        elif beside is not None:
            forms = forms.sum(axis=1, keepdims=True) + known
        forms = forms.reshape(-1, unit, forms.shape[1]).mean(axis=1)
        squared = np.array(squares[b.name]).reshape(-1, unit).mean(axis=1) + known_sq
        result[b.name] = Traces(mean_estimate(forms.sum(axis=1), unit), mean_estimate(squared, unit), forms)
    return result


def _two_levels(
    samples: Sequence[Sequence[float]],
    squares: list[float],
    near: Sequence[np.ndarray],
    far: Sequence[np.ndarray],
    unit: int,
) -> Traces:
    """``samples`` and ``near``: z'Hz and its stand-in on the same vectors; ``far``: stand-ins on others."""
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
    return Traces(
        trace, mean_estimate(np.array(squares).reshape(-1, unit).mean(axis=1), unit), left + whole.mean(axis=0)
    )


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


def _outside(z: Tensors, basis: Tensors) -> Tensors:
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
