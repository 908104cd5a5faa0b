"""One full point: everything that is measured of every block at the current parameters."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from hybridtheory import curvature, extrapolation, forward, memory
from hybridtheory.blocks import Block
from hybridtheory.difference import Differences
from hybridtheory.errors import UserError
from hybridtheory.estimate import Estimate
from hybridtheory.oracle import Oracle, Products
from hybridtheory.quadrature import negative_part
from hybridtheory.vectors import Tensors, add_, dot
from probes.point_scale import at_finite_scale, at_mu
from probes.rates import coupled
from probes.records import Point
from probes.records_smoothness import BlockPoint, Density

# A group's upper bound on lambda_max lies within this share of the spectrum's width: 14 products at d = 1e6, 16 at 1e8.
BOUND = 0.25
# Steps of the second differences that stand in for products, in mu: small ones are nearer to the Hessian and noisier.
STAND_IN_STEPS = (1.0, 0.25, 0.0625)


@dataclass(frozen=True)
class Settings:
    """What a smoothness run is asked to do; the defaults suit the embedded model.

    points       full points along the reference run, the first at its start
    secants      positions of secants along the run (two gradients a block each, the same rows at both ends)
    run_steps    length of the reference run
    directions   Gaussian directions of the finite-scale rule at each point
    mu           perturbation of the zeroth-order slopes
    batch_size, steps   of the *planned* training, in rows and optimizer steps: what the noise-limited rule needs
    end_tol, trace_tol  relative errors at which eigenvalues and traces stop
    max_steps, max_vectors  caps on Lanczos steps and on Hutchinson vectors
    engine       exact, difference, forward, or auto: the first of them that serves the model
    scales       measure what the loss does at the scale of a step too: phi and the finite-scale rule
    margin       measure the joint margin too
    """

    blocks: str = "group"
    seed: int = 0
    points: int = 3
    secants: int = 30
    run_steps: int = 45
    directions: int = 10
    mu: float = 1e-3
    q: int = 1
    batch_size: int = 16
    steps: int = 1000
    micro_batch: int | None = None
    curvature: str = "hessian"
    end_tol: float = 0.02
    trace_tol: float = 0.1
    max_steps: int = 60
    max_vectors: int = 96
    failure: float = 0.025
    max_memory: int | None = None
    engine: str = "exact"
    scales: bool = True
    margin: bool = True

    def __post_init__(self) -> None:
        for name in (
            "points",
            "secants",
            "run_steps",
            "directions",
            "batch_size",
            "steps",
            "q",
            "max_steps",
            "max_vectors",
        ):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}")
        if self.directions < 4:
            raise UserError(f"--directions must be at least 4 for an interval, got {self.directions}")
        for name in ("mu", "trace_tol", "end_tol"):
            if not (math.isfinite(value := getattr(self, name)) and value > 0):
                raise UserError(f"--{name.replace('_', '-')} must be a positive number, got {value}")


@dataclass(frozen=True)
class GradientPass:
    """One pass over the micro-batches: the loss, the gradients, and how much they differ from micro-batch to micro-batch."""

    loss: float
    gradients: list[Tensors]
    noise: list[Estimate]  # per block: sigma^2, the variance of one row's gradient

    @staticmethod
    def take(oracle: Oracle, blocks: Sequence[Block], rows: int) -> GradientPass:
        """sigma^2 = R/(m-1) sum_i s_i |G_i - g|^2 over m micro-batches with shares s_i of the R rows: unbiased for rows drawn alike."""
        loss = 0.0
        total: list[Tensors] = []
        spread: list[list[float]] = []
        shares: list[float] = []
        own: list[list[float]] = []
        for share, value, parts in oracle.gradients(*blocks):
            own.append([share, value, *(dot(p, p) / share for p in parts)])
            total = [add_(t, p) for t, p in zip(total, parts, strict=True)] if total else parts
            del parts
        total = [oracle.ranks.add_(t) for t in total]
        for share, value, *squares in oracle.ranks.join(own, len(oracle.batches)):
            loss += share * value
            shares.append(share)
            spread.append(squares)
        m = len(shares)
        noise = []
        for i, g in enumerate(total):
            if m < 2:
                noise.append(
                    Estimate(
                        math.nan, n=m, resolved=False, note="one micro-batch: lower --micro-batch to measure the noise"
                    )
                )
                continue
            size = dot(g, g)
            value = rows / (m - 1) * max(sum(s[i] for s in spread) - size, 0.0)
            # Leave-one-out over micro-batches would need m more passes; the spread of |G_i|^2 bounds the error from above.
            parts_of = np.array([s[i] / share for s, share in zip(spread, shares, strict=True)])
            stderr = rows / (m - 1) * float(parts_of.std(ddof=1)) / math.sqrt(m)
            noise.append(Estimate(value, stderr=stderr, n=m, resolved=stderr <= value / 3 if value else False))
        return GradientPass(loss, total, noise)


def measure(
    oracle: Oracle,
    groups: Sequence[Block],
    blocks: Sequence[Block],
    settings: Settings,
    rows: int,
    index: int,
    step: int,
) -> Point:
    """Measure ``groups`` (base, peft: what learning rates belong to) and the finer ``blocks`` inside them."""
    started = time.perf_counter()
    finer = [b for b in blocks if b.name not in {g.name for g in groups}]
    pass_ = GradientPass.take(oracle, groups, rows)
    if not math.isfinite(pass_.loss):
        raise UserError(
            f"the loss is {pass_.loss} at step {step}: nothing can be measured there; check data, dtype and rates"
        )
    noise = {b.name: e for b, e in zip(groups, pass_.noise, strict=True)}
    made: dict[str, BlockPoint] = {}
    coupling = margin = None
    with oracle.products(*groups) as hess:
        along = _along_gradient(hess, groups, finer, pass_.gradients)
        # Only the adapters' gradients are needed again; the base's is as large as the model.
        gradients = {b.name: g for b, g in zip(groups, pass_.gradients, strict=True) if b.group != "base"}
        pass_.gradients.clear()
        for group in groups:
            memory.give_back()
            inner = [b for b in finer if b.group == group.group]
            made |= _curvature(hess, group, inner, along, settings, index)
            made[group.name] = replace(made[group.name], noise=noise[group.name])
        memory.give_back()
        if len(groups) == 2:
            coupling = curvature.coupling(
                hess,
                groups[:1],
                groups[1:],
                settings.seed,
                failure=settings.failure,
                index=index,
                max_steps=settings.max_steps,
            )
            limits = coupled(Point(index, step, pass_.loss, 0.0, made, coupling))
            if settings.margin and limits is not None and all(L > 0 for L in limits.values()):
                memory.give_back()
                # No name for the run: its basis would be held until the point is done.
                margin = curvature.margin(
                    hess,
                    limits,
                    settings.seed,
                    index,
                    max_steps=settings.max_steps,
                    tol=0.05,
                    ends=("max",),
                    below=1.0,  # whether it exceeds 1 is the question
                ).lam_max
    scales: dict[str, Any] = {"phi": {}, "finite_scale": {}}
    for group in groups if settings.scales else ():
        phi, finite = at_finite_scale(
            oracle, group, made[group.name], pass_.loss, gradients.get(group.name, []), settings, rows, index
        )
        if phi is not None:
            scales["phi"][group.name] = phi
        if finite is not None:
            scales["finite_scale"][group.name] = finite
        made[group.name] = replace(made[group.name], at_scale=at_mu(phi, settings.mu))
    return Point(
        index=index,
        step=step,
        loss=pass_.loss,
        grad_norm=math.sqrt(sum(along[g.name][0] ** 2 for g in groups)),
        blocks=made,
        coupling=coupling,
        margin=margin,
        seconds=time.perf_counter() - started,
        **scales,
    )


def _curvature(
    hess: Products,
    group: Block,
    inner: Sequence[Block],
    along: dict[str, tuple[float, float]],
    settings: Settings,
    index: int,
) -> dict[str, BlockPoint]:
    """One group and the finer blocks inside it. Traces of all of them come from the same products."""
    parts = list(inner) or [group]
    zeroth = group.group == "base"
    # No rule rests on an adapter's trace (its steps are first-order), and at B = 0 it is zero: no error bar would ever be small.
    vectors = settings.max_vectors if zeroth else max(settings.max_vectors // 8, 8)
    shares = np.array(hess.oracle.weights) / hess.oracle.total_weight
    found = _run(hess, group, settings, 1000 * index)
    first = _lanczos(found)
    measure_traces: Any = extrapolation.traces if isinstance(hess, Differences) else curvature.traces
    more: dict[str, Any] = {}
    if (
        hess.oracle.engine == "exact"
        and hess.oracle.curvature == "hessian"
        and not inner
        and zeroth
        and first.basis is None
    ):
        # Too large to keep Lanczos's vectors and sample beside them: second differences of the loss do most of the sampling.
        values = forward.Values(hess.oracle, group)
        more["stand_ins"] = [partial(values.quotient, h=settings.mu * share) for share in STAND_IN_STEPS]
    memory.give_back()  # blocks that Lanczos freed are seldom where, or as large as, a trace wants them
    beside = found if len(parts) == 1 else None  # traces of several blocks have no use for the basis
    first = replace(first, basis=None)
    del found
    traces = measure_traces(
        hess, parts, settings.seed, tol=settings.trace_tol, max_vectors=vectors, index=index, beside=beside, **more
    )
    del beside
    if inner:
        forms = np.sum([traces[b.name].forms for b in inner], axis=0)
        squares = [traces[b.name].trace_sq for b in inner]
        trace = curvature.mean_estimate(forms.sum(axis=1))
        open_ = [traces[b.name].trace.numerical for b in inner]
        if all(w is not None for w in open_):
            trace = replace(trace, numerical=math.hypot(*(w for w in open_ if w is not None)))
        # The blocks' squares come from the same vectors: their errors may add up, so they are added and not taken in quadrature.
        trace_sq = Estimate(sum(s.value for s in squares), stderr=sum(s.stderr or 0.0 for s in squares), n=squares[0].n)
    else:
        trace, trace_sq = traces[group.name].trace, traces[group.name].trace_sq
        forms = traces[group.name].forms
    made = {}
    for block in [group, *inner]:
        whole = block is group
        run = first if whole else _lanczos(_run(hess, block, settings, 1000 * index, bounded=False))
        own = trace if whole else traces[block.name].trace
        plus = _trace_plus(run, own, block.numel)
        top = run.lam_max.value
        made[block.name] = BlockPoint(
            grad_norm=along[block.name][0],
            lam_max=run.lam_max,
            lam_min=run.lam_min,
            trace=own,
            trace_plus=plus,
            trace_sq=trace_sq if whole else None,
            effective_rank=plus.times(1 / top) if top > 0 else None,
            density=Density(run.nodes.tolist(), run.weights.tolist(), n=1),
            gHg=Estimate(along[block.name][1], n=1, resolved=math.isfinite(along[block.name][1])),
            rows_stderr=jackknife(forms if whole else traces[block.name].forms, shares),
        )
    return made


def _lanczos(run: curvature.Lanczos | extrapolation.Ends) -> curvature.Lanczos:
    return run.run if isinstance(run, extrapolation.Ends) else run


def _run(
    hess: Products, block: Block, settings: Settings, index: int, bounded: bool = True
) -> curvature.Lanczos | extrapolation.Ends:
    """Lanczos until both ends are resolved, and a group's until they are bounded."""
    measure_ends: Any = extrapolation.spectrum if isinstance(hess, Differences) else curvature.spectrum
    found: curvature.Lanczos | extrapolation.Ends = measure_ends(
        hess,
        block,
        settings.seed,
        index,
        max_steps=settings.max_steps,
        tol=settings.end_tol,
        failure=settings.failure,
        bound=BOUND if bounded else math.inf,
    )
    return found


def _along_gradient(
    hess: Products, groups: Sequence[Block], finer: Sequence[Block], gradients: Sequence[Tensors]
) -> dict[str, tuple[float, float]]:
    """Per block: |g| and g'Hg/|g|^2 of its own part of the gradient (nan where that is zero)."""
    by_name = {n: t for b, g in zip(groups, gradients, strict=True) for n, t in zip(b.names, g, strict=True)}
    found = {}
    for block in (*groups, *finer):
        g = [by_name[n] for n in block.names]
        size = dot(g, g)
        found[block.name] = (math.sqrt(size), dot(g, hess(g, block)) / size if size else math.nan)
    return found


def _trace_plus(run: curvature.Lanczos, trace: Estimate, d: int) -> Estimate:
    """tr H_+ = tr H + tr H_-: the trace from many vectors, the negative part from the Lanczos run, between the bounds that its
    moments set. ``lower`` and ``upper`` take in two standard errors of both; that of one start is sqrt(2 tr H_-^2)."""
    found = negative_part(run)
    squares = d * float(run.weights @ np.minimum(run.nodes, 0.0) ** 2)
    stderr = math.hypot(trace.stderr or 0.0, math.sqrt(2 * squares))
    value = max(trace.value + d * found.value, 0.0)
    lower = max(trace.value + d * found.lower - 2 * stderr, 0.0)
    upper = trace.value + d * found.upper + 2 * stderr
    # Four standard errors wide, were it a normal interval: the same third as everywhere.
    resolved = upper - lower <= 4 * value / 3
    note = "" if resolved else "the bulk near zero is finer than the Lanczos nodes"
    return Estimate(value, stderr, upper=upper, confidence=0.95, n=trace.n, resolved=resolved, note=note, lower=lower)


def jackknife(forms: np.ndarray, shares: np.ndarray) -> float | None:
    """Standard error of a trace from the choice of rows: leave one micro-batch out of forms[vector, micro-batch]."""
    parts, m = forms.mean(axis=0), len(shares)
    if m < 3 or len(parts) != m:
        return None
    left_out = (parts.sum() - parts) / (1 - shares)
    return float(math.sqrt((m - 1) / m * np.sum((left_out - left_out.mean()) ** 2)))
