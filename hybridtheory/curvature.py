"""Curvature of f from Hessian products: both ends of the spectrum, traces, density, coupling and the joint margin.

Extreme eigenvalues come from three-term Lanczos. A Ritz value approaches its end from inside, and its residual only says that *some*
eigenvalue lies that near; where a theorem needs an upper bound on the spectrum, ``Estimate.upper`` is one that holds with a stated
probability over the random start (see ``end_excess``). Traces are Hutchinson's, with a standard error; parts of the trace that are not
linear in H (tr H₊) come from the same Lanczos runs by quadrature (Golub & Meurant; Ubaru, Chen & Saad 2017).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from scipy.linalg import eigh_tridiagonal

from hybridtheory import streams
from hybridtheory.blocks import Block, split
from hybridtheory.errors import UserError
from hybridtheory.estimate import Estimate
from hybridtheory.oracle import Products
from hybridtheory.vectors import Tensors, add_, clone, dot, norm, scale_

Matvec = Callable[[Tensors], Tensors]

# A basis up to this many elements (512 MiB in float32) is kept: orthogonality is then exact, Ritz vectors come for free, and a trace
# can leave out what the basis already spans.
BASIS_ELEMENTS = 1 << 27


@dataclass(frozen=True)
class Lanczos:
    """What k products with one start vector tell. ``nodes`` are Ritz values (ascending), ``weights`` squared first components."""

    nodes: np.ndarray  # (k,)
    weights: np.ndarray  # (k,), sum to 1
    lam_max: Estimate
    lam_min: Estimate
    alphas: np.ndarray = field(repr=False)  # (k,) diagonal of the tridiagonal matrix
    betas: np.ndarray = field(repr=False)  # (k-1,) its off-diagonal
    warm: Tensors | None = field(
        default=None, repr=False
    )  # sum of the two end Ritz vectors: a start for the next point
    last_beta: float = 0.0
    basis: Tensors | None = field(
        default=None, repr=False
    )  # per tensor (k, numel), orthonormal over all tensors together
    forms: np.ndarray | None = field(default=None, repr=False)  # (k, micro-batches): v_j'H_i v_j of the basis vectors

    @property
    def steps(self) -> int:
        return len(self.nodes)

    def quadrature(self, f: Callable[[np.ndarray], np.ndarray], d: int, drop: int = 0) -> float:
        """d Σ wᵢ f(θᵢ): an estimate of tr f(H), unbiased for a random start up to the quadrature error.

        With ``drop`` the rule of k − drop nodes from the same products: what changes tells the size of that error.
        """
        k = max(self.steps - drop, 1)
        theta, s = _tridiagonal(self.alphas[:k].tolist(), self.betas.tolist())
        return float(d * np.sum(s[0] ** 2 * f(theta)))


def end_excess(d: int, steps: int, failure: float, mixed: bool = False) -> float:
    """ε with P(λ_max − θ_max > ε (λ_max − λ_min)) ≤ failure, after ``steps`` Lanczos steps from a random start.

    Assumptions: exact arithmetic (a kept basis, or few enough steps); start uniform on the sphere of R^d. ``mixed``: the start is
                 (a + z/‖z‖)/√2 with a fixed unit vector a instead; a shifted Gaussian is no likelier to miss the top eigenvector
                 than a centred one (Anderson's inequality), which costs a factor 2 inside the logarithm.
    Statement:   with U the Chebyshev polynomial of the second kind, U_{2k−2}(√x) has degree k−1 in x, and testing the Krylov
                 space with it gives: failure implies |<start, v₁>| < 1/sinh((2k−1) artanh √ε). A component of a uniform
                 direction is below τ with probability at most τ √(2d/π). Solved for ε; capped at 1.
    Reference:   the shape is Kuczyński & Woźniakowski 1992, Theorem 4.2; this short proof and its constants are ours.
    """
    if steps >= d:
        return 0.0
    if not 0 < failure < 1:
        raise UserError(f"a probability of failure lies strictly between 0 and 1, got {failure}")
    factor = math.sqrt(2 * d / math.pi) * (2.0 if mixed else 1.0) / failure
    return math.tanh(math.asinh(factor) / (2 * steps - 1)) ** 2


def lanczos(
    matvec: Matvec,
    start: Tensors,
    max_steps: int = 60,
    tol: float = 0.02,
    ends: Sequence[str] = ("max", "min"),
    min_steps: int = 8,
    failure: float = 0.05,
    bound: float = math.inf,
    mixed: bool = False,
    basis: bool | None = None,
) -> Lanczos:
    """Both ends of the spectrum of a symmetric map, until each end in ``ends`` is resolved to the relative error ``tol`` and the
    one-sided bounds (each holds with probability 1 - 2 ``failure``) lie within ``bound`` spreads of the Ritz values.

    The error of a Ritz value is estimated as min(r, r²/gap) from its residual r and the gap to its neighbour, and must be small twice
    in a row (docs/log.md has what simpler rules miss); what the last three products moved it bounds that estimate from below, since an
    end that is a cluster creeps while its residual looks settled. ``ends`` = ("modulus",) resolves |λ|max alone: the larger end, and
    the other one far enough to know that it is the smaller. Without a kept
    basis the vectors lose orthogonality and converged values reappear as copies: ends stay right, copies only waste steps.
    ``start`` is overwritten: on a large model every vector counts.
    """
    d = sum(t.numel() for t in start)
    steps_allowed = min(max_steps, d)
    keep = d * steps_allowed <= BASIS_ELEMENTS if basis is None else basis
    shapes = [t.shape for t in start]
    q = scale_(start, 1 / norm(start))
    del start
    previous: Tensors | None = None
    stored: list[torch.Tensor] = (
        [torch.empty(steps_allowed, t.numel(), dtype=t.dtype, device=t.device) for t in q] if keep else []
    )
    alphas: list[float] = []
    betas: list[float] = []
    beta = 0.0
    trail: list[tuple[float, float]] = []  # both ends after every product
    agreed = (
        0  # consecutive steps at which every wanted end was resolved: one alone may rest on a neighbour not yet seen
    )
    while True:
        k = len(alphas)
        for rows, t in zip(stored, q, strict=False):
            rows[k] = t.reshape(-1)
        w = [t.detach() for t in matvec(q)]
        alphas.append(dot(w, q))
        if not math.isfinite(alphas[-1]):
            raise UserError(
                "a Hessian product is not finite: lower the dtype's load (use float32) or check the loss at this point"
            )
        add_(w, q, -alphas[-1])
        if previous is not None:
            add_(w, previous, -beta)
        if stored:
            _orthogonalise(w, stored, k + 1)
        beta = norm(w)
        theta, s = _tridiagonal(alphas, betas)
        spread = max(abs(theta[0]), abs(theta[-1]))
        # An invariant subspace: every Ritz value is an eigenvalue, and there is no next direction.
        exhausted = k + 1 == d or beta <= 1e-7 * spread or spread == 0.0
        # The relative errors are floored at the noise of products in the vectors' precision.
        trail.append((theta[0], theta[-1]))
        past = trail[-4] if k > 2 else (math.inf, math.inf)
        moved = {end: abs(theta[end] - past[end]) for end in (0, -1)}
        errors = {end: 0.0 if exhausted else max(moved[end], _error(theta, np.abs(beta * s[-1]), end)) for end in moved}
        enough = all(errors[end] <= _allowed(theta, end, tol) for end in _wanted(theta, ends))
        if "modulus" in ends:
            rival = -1 - _wanted(theta, ends)[0]
            enough = enough and abs(theta[rival]) + errors[rival] <= (1 + tol) * spread
        agreed = agreed + 1 if enough else 0
        bounded = _outer(end_excess(d, k + 1, failure, mixed)) <= bound
        if exhausted or (agreed >= 2 and bounded and k + 1 >= min_steps) or k + 1 == steps_allowed:
            break
        betas.append(beta)
        previous, q = q, scale_(w, 1 / beta)
    residuals = np.zeros_like(theta) if exhausted else np.abs(beta * s[-1])
    excess = 0.0 if exhausted and k + 1 == d else end_excess(d, k + 1, failure, mixed)
    spread = theta[-1] - theta[0]
    outer = _outer(excess) * spread if spread else 0.0

    def end_estimate(end: int) -> Estimate:
        resolved = errors[end] <= _allowed(theta, end, tol)
        wanted = f"wanted {tol * abs(theta[end]):.2g}"
        note = "" if resolved else f"error about {errors[end]:.2g} after {k + 1} products, {wanted}"
        return Estimate(
            float(theta[end]),
            residual=float(residuals[end]),
            upper=float(theta[end] + (outer if end else -outer)),
            confidence=1 - 2 * failure,
            n=k + 1,
            resolved=bool(resolved) or end not in _wanted(theta, ends),
            note=note,
        )

    warm = None
    if stored:
        combo = s[:, -1] / np.linalg.norm(s[:, -1]) + s[:, 0] / np.linalg.norm(s[:, 0])
        coefficients = torch.as_tensor(combo / np.linalg.norm(combo))
        warm = [(coefficients.to(r) @ r[: k + 1]).view(shape) for r, shape in zip(stored, shapes, strict=True)]
    ends_found = end_estimate(-1), end_estimate(0)
    coefficients_of_T = np.array(alphas), np.array(betas[: len(alphas) - 1])
    basis_found = [rows[: k + 1] for rows in stored] or None
    return Lanczos(theta, s[0] ** 2, *ends_found, *coefficients_of_T, warm, beta, basis_found)


def _outer(excess: float) -> float:
    """Each end may lie beyond its Ritz value by ε times the *true* spread, which both ends together bound by the measured one/(1−2ε)."""
    return excess / (1 - 2 * excess) if excess < 0.5 else math.inf


def _tridiagonal(alphas: Sequence[float], betas: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    if len(alphas) == 1:
        return np.array(alphas), np.ones((1, 1))
    theta, s = eigh_tridiagonal(np.array(alphas), np.array(betas[: len(alphas) - 1]))
    return theta, s


def _wanted(theta: np.ndarray, ends: Sequence[str]) -> list[int]:
    """The ends to resolve as indices into the Ritz values: -1 (max), 0 (min)."""
    if "modulus" in ends:
        return [-1 if abs(theta[-1]) >= abs(theta[0]) else 0]
    return [end for end, name in ((-1, "max"), (0, "min")) if name in ends]


def _allowed(theta: np.ndarray, end: int, tol: float) -> float:
    """Relative to the end itself, and no less than what products in single precision resolve beside the other end."""
    return float(max(tol * abs(theta[end]), 1e-3 * tol * max(abs(theta[0]), abs(theta[-1]))))


def _error(theta: np.ndarray, residuals: np.ndarray, end: int) -> float:
    """min(r, r²/gap) for the Ritz value at one end. The gap is to the neighbour, less the neighbour's own residual: it too is still
    on its way outwards. Copies of the value (lost orthogonality) are no neighbours."""
    r = float(residuals[end])
    distance = np.abs(theta - theta[end])
    others = np.flatnonzero(distance > 1e-5 * np.abs(theta).max())
    if len(others) == 0:
        return r
    nearest = others[np.argmin(distance[others])]
    gap = float(distance[nearest] - residuals[nearest])
    return r * r / gap if gap > r else r


def _orthogonalise(w: Tensors, stored: list[torch.Tensor], k: int) -> None:
    """w minus its part in the first k stored vectors; once more where that part was not small (Daniel, Gragg, Kaufman & Stewart 1976).

    The caller has already taken out the vectors that carry most of it, so once is the rule: a pass reads the whole basis and costs
    as much as a product of a late layer.
    """
    for _ in range(2):
        coefficients = torch.stack([rows[:k] @ t.reshape(-1) for rows, t in zip(stored, w, strict=True)]).sum(0)
        for rows, t in zip(stored, w, strict=True):
            t.sub_((coefficients @ rows[:k]).view_as(t))
        if float(coefficients.norm()) <= norm(w):
            return


def spectrum(
    hess: Products,
    block: Block,
    seed: int,
    index: int = 0,
    warm: Tensors | None = None,
    **options: Any,
) -> Lanczos:
    """Lanczos on one diagonal block H_bb from a random start, mixed with the last point's end vectors where they are given."""
    start = streams.gaussian(block, seed, "lanczos", index)
    if warm is not None:
        start = add_(scale_(start, 1 / norm(start)), warm, 1 / norm(warm))
    forms: list[list[float]] = []

    def matvec(v: Tensors) -> Tensors:
        total: Tensors = []
        forms.append([])
        for _, (hv,) in hess.each([v], block):
            forms[-1].append(dot(v, hv))
            total = add_(total, hv) if total else hv
        return total

    run = lanczos(matvec, start, mixed=warm is not None, **options)
    whole = len({len(parts) for parts in forms}) == 1  # not where memory ran out midway and the micro-batches changed
    return replace(run, forms=np.array(forms) if whole else None)


@dataclass(frozen=True)
class Traces:
    """Of one block: tr H_bb; Σ_c ‖H_bc‖²_F over the blocks that shared the products (tr H² when the block was alone)."""

    trace: Estimate
    trace_sq: Estimate
    forms: np.ndarray = field(repr=False)  # (n, micro-batches): z'H_i z, the parts of each sample


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
) -> dict[str, Traces]:
    """Hutchinson's trace of every block out of shared products: z_b'(Hz)_b with Rademacher z over all ``blocks``.

    ``beside``: a Lanczos run on the same single block, with its basis V. On its span the trace is known (tr V'HV, no product
    needed), so the vectors sample the rest only: with the extreme eigenvalues gone their variance is what the bulk leaves (the
    idea of Hutch++, Meyer et al. 2021).

    Each sample is unbiased for every block at once; the price is the noise of the coupling between blocks, so PEFT and base blocks
    are measured in separate calls. Two stages, so that the stopping rule cannot bias the answer: ``pilot`` vectors set the number of
    vectors that reaches the relative standard error ``tol`` for every block (capped), then all of them are averaged. "Not resolved"
    means a standard error above a third of the value.
    """
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

    def draw(until: int) -> None:
        nonlocal count
        while count < until:
            size = min(chunk, until - count)
            per_block = [[streams.rademacher(b, seed, "trace", index, count + j) for b in blocks] for j in range(size)]
            if beside is not None:
                per_block = [[_outside(z, beside.basis or [])] for (z,) in per_block]
            vectors = [[t for part in z for t in part] for z in per_block]
            forms: list[list[list[float]]] = [[[] for _ in blocks] for _ in range(size)]
            totals: list[Tensors] = [[] for _ in range(size)]
            for _, hvs in hess.each(vectors, blocks):
                for j, hv in enumerate(hvs):
                    for i, (part, z) in enumerate(zip(split(hv, blocks), per_block[j], strict=True)):
                        forms[j][i].append(dot(z, part))
                    totals[j] = add_(totals[j], hv) if totals[j] else hv
            for j in range(size):
                for i, (block, part) in enumerate(zip(blocks, split(totals[j], blocks), strict=True)):
                    samples[block.name].append(forms[j][i])
                    squares[block.name].append(dot(part, part))
            count += size

    draw(min(pilot, max_vectors))
    wanted = pilot
    for b in blocks:
        values = np.array([sum(s) for s in samples[b.name]]) + known
        mean = abs(values.mean())
        # The pilot's own mean may be near zero by chance: what it can at least be told from is its standard error.
        target = tol * max(mean, values.std(ddof=1) / math.sqrt(len(values)), 1e-300)
        # A fifth more than the pilot asks for: its own spread is uncertain by that much.
        wanted = max(wanted, math.ceil(1.2 * (values.std(ddof=1) / target) ** 2))
    draw(min(wanted, max_vectors))
    result = {}
    for b in blocks:
        cut = {len(parts) for parts in samples[b.name]}
        # Where memory ran out midway the micro-batches changed, and only the sums of the parts still compare.
        forms = np.array(samples[b.name] if len(cut) == 1 else [[sum(parts)] for parts in samples[b.name]])
        if known_parts is not None and len(known_parts) == forms.shape[1]:
            forms = forms + known_parts
        elif beside is not None:
            forms = forms.sum(axis=1, keepdims=True) + known
        result[b.name] = Traces(
            mean_estimate(forms.sum(axis=1)), mean_estimate(np.array(squares[b.name]) + known_sq), forms
        )
    return result


def _outside(z: Tensors, basis: Tensors) -> Tensors:
    """z minus its part in the span of the basis."""
    coefficients = torch.stack([rows @ t.reshape(-1) for rows, t in zip(basis, z, strict=True)]).sum(0)
    return [t - (coefficients @ rows).view_as(t) for rows, t in zip(basis, z, strict=True)]


def mean_estimate(values: Sequence[float] | np.ndarray) -> Estimate:
    """Mean with its standard error; not resolved above a third of the value, or with fewer than two samples."""
    array = np.asarray(values, dtype=float)
    n = len(array)
    stderr = float(array.std(ddof=1) / math.sqrt(n)) if n > 1 else None
    value = float(array.mean())
    resolved = stderr is not None and stderr <= abs(value) / 3
    note = "" if resolved else f"standard error {stderr if stderr is not None else math.nan:.2g} after {n} vectors"
    return Estimate(value, stderr=stderr, n=n, resolved=resolved, note=note)


def coupling(
    hess: Products,
    x: Sequence[Block],
    y: Sequence[Block],
    seed: int,
    max_steps: int = 16,
    min_steps: int = 6,
    tol: float = 0.05,
    failure: float = 0.05,
    index: int = 0,
) -> Estimate:
    """‖H_xy‖₂ by Golub-Kahan bidiagonalisation: products with tangents on y give H_xy v, with tangents on x give H_yx u.

    ``upper`` is the bound of ``end_excess`` for H_yx H_xy, whose spectrum starts at zero: σ² ≤ θ²/(1−ε).
    """
    steps = max_steps
    v: Tensors = [t for b in y for t in streams.gaussian(b, seed, "coupling", index)]
    d = sum(t.numel() for t in v)
    scale_(v, 1 / norm(v))
    stored = [torch.empty(steps, t.numel(), dtype=t.dtype, device=t.device) for t in v]
    alphas: list[float] = []
    betas: list[float] = []
    u: Tensors | None = None
    agreed = 0
    estimate = Estimate(0.0, residual=0.0, n=0)
    for k in range(min(steps, d)):
        for rows, t in zip(stored, v, strict=True):
            rows[k] = t.reshape(-1)
        p = [t.detach() for t in hess(v, y, x)]
        if u is not None:
            add_(p, u, -betas[-1])
        alphas.append(norm(p))
        if alphas[-1] == 0.0:
            break
        u = scale_(p, 1 / alphas[-1])
        r = add_([t.detach() for t in hess(u, x, y)], v, -alphas[-1])
        _orthogonalise(r, stored, k + 1)
        betas.append(norm(r))
        bidiagonal = np.diag(alphas) + np.diag(betas[:-1], 1)
        left, sigma, _ = np.linalg.svd(bidiagonal)
        residual = betas[-1] * abs(left[-1, 0])
        gap = (sigma[0] ** 2 - sigma[1] ** 2) / sigma[0] if k else 0.0
        error = min(residual, residual**2 / gap) if gap > 0 else residual
        agreed = agreed + 1 if error <= tol * sigma[0] else 0
        resolved = agreed >= 2 and k + 1 >= min_steps
        excess = end_excess(d, k + 1, failure)
        upper = float(sigma[0] / math.sqrt(1 - excess)) if excess < 1 else math.inf
        note = "" if resolved else f"error about {error:.2g} after {k + 1} pairs of products"
        estimate = Estimate(
            float(sigma[0]),
            residual=float(residual),
            upper=upper,
            confidence=1 - failure,
            n=k + 1,
            resolved=bool(resolved),
            note=note,
        )
        if resolved or betas[-1] <= 1e-7 * sigma[0]:
            break
        v = scale_(r, 1 / betas[-1])
    return estimate


def margin(hess: Products, limits: dict[str, float], seed: int, index: int = 0, **options: Any) -> Lanczos:
    """Both ends of D^{-1/2} H D^{-1/2}, D = diag(L_b I): the joint condition D ⪰ H ⪰ −D holds when they lie in [−1, 1]."""
    blocks = hess.blocks
    bad = [b.name for b in blocks if not limits[b.name] > 0]
    if bad:
        raise UserError(f"the joint margin needs a positive L for every block, and it is not for {', '.join(bad)}")

    def root(v: Tensors) -> Tensors:
        for b, part in zip(blocks, split(v, blocks), strict=True):
            scale_(part, limits[b.name] ** -0.5)
        return v

    start = [t for b in blocks for t in streams.gaussian(b, seed, "margin", index)]
    return lanczos(lambda v: root(hess(root(clone(v)))), start, **options)
