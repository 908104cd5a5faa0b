"""One full point: everything that is measured of every block at the current parameters."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from hybridtheory import curvature, extrapolation, forward, streams
from hybridtheory.blocks import Block
from hybridtheory.difference import Differences
from hybridtheory.errors import UserError
from hybridtheory.estimate import Estimate
from hybridtheory.forward import Slopes
from hybridtheory.oracle import Oracle, Products
from hybridtheory.quadrature import negative_part
from hybridtheory.theory.finite_scale import finite_scale, least, phi_trace
from hybridtheory.vectors import Tensors, add_, dot
from probes.rates import coupled
from probes.records import Point
from probes.records_smoothness import AtScale, BlockPoint, Density, FiniteScale, Phi

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
            inner = [b for b in finer if b.group == group.group]
            made |= _curvature(hess, group, inner, along, settings, index)
            made[group.name] = replace(made[group.name], noise=noise[group.name])
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
            if limits is not None and all(L > 0 for L in limits.values()):
                run = curvature.margin(
                    hess,
                    limits,
                    settings.seed,
                    index,
                    max_steps=settings.max_steps,
                    tol=0.05,
                    ends=("max",),
                    below=1.0,  # whether it exceeds 1 is the question
                )
                margin = run.lam_max
    scales: dict[str, Any] = {"phi": {}, "finite_scale": {}}
    for group in groups:
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


def at_mu(phi: Phi | None, mu: float) -> AtScale | None:
    """The trace that a step of size mu sees."""
    if phi is None or mu not in phi.delta:
        return None
    at = phi.delta.index(mu)
    trace = Estimate(
        2 * phi.mean[at] / mu**2,
        stderr=2 * phi.stderr[at] / mu**2,
        n=phi.n,
        resolved=phi.stderr[at] <= abs(phi.mean[at]) / 3,
    )
    return AtScale(mu, {"trace": trace})


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
    traces = measure_traces(
        hess, parts, settings.seed, tol=settings.trace_tol, max_vectors=vectors, index=index, beside=found, **more
    )
    first = replace(first, basis=None)
    del found
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


def at_finite_scale(
    oracle: Oracle,
    group: Block,
    point: BlockPoint,
    loss: float,
    gradient: Tensors,
    settings: Settings,
    rows: int,
    index: int,
    slopes_sq: Slopes | None = None,
) -> tuple[Phi | None, FiniteScale | None]:
    """phi(delta) and the finite-scale rule: forward passes along the same Gaussian directions.

    ``slopes_sq``: the mean square of the slopes, from other directions, where the gradient and its noise are not known.
    """
    trace = point.trace.value if point.trace is not None else math.nan
    deltas = _deltas(loss, trace, settings.mu)
    curved = abs(trace) + (settings.q + 1) * abs(point.gHg.value if point.gHg is not None else 0.0)
    zeroth = group.group == "base"
    few = settings.directions if zeroth else max(settings.directions // 3, 4)
    with_phi = max(few // 3, 2)
    etas = (1.0 / curved) * 2.0 ** np.arange(-4, 4) if curved > 0 else np.array([])
    batch, share = training_batch(oracle, settings.batch_size, rows)
    plus, minus, slopes, changes = [], [], [], []
    for j in range(few):
        if not zeroth and j >= with_phi:
            break
        u = streams.gaussian(group, settings.seed, "finite scale", index, j)

        def change(by: float, picked: list[int] | None = None, u: Tensors = u) -> float:
            with oracle.moved(group, u, by):
                return oracle.value(picked)

        if j < with_phi:
            up, down = ([change(sign * d) - loss for d in deltas] for sign in (1, -1))
            plus.append(up)
            minus.append(down)
        if zeroth and len(etas):
            c = (change(settings.mu, batch) - change(-settings.mu, batch)) / (2 * settings.mu)
            slopes.append(c)
            changes.append([change(-eta * c) - loss for eta in etas])
    phi = _phi(deltas, np.array(plus), np.array(minus))
    if not zeroth:
        return phi, _line_search(oracle, group, gradient, point, loss) if gradient else None
    if not len(etas):
        return phi, None
    noise = point.noise.value if point.noise is not None and math.isfinite(point.noise.value) else 0.0
    # Rows drawn without replacement from the measured ones: the variance of their mean shrinks to zero as they become all of them.
    variance = noise / (share * rows) * (1 - share) if share < 1 else 0.0
    mean = slopes_sq or Slopes(point.grad_norm**2 + variance, 0.0, 0)
    return phi, _zo_rule(np.asarray(etas), np.array(changes), np.array(slopes), mean, settings.seed)


def training_batch(oracle: Oracle, batch_size: int, rows: int) -> tuple[list[int] | None, float]:
    """Micro-batches that make up one training batch (None: all), and their share of the weight."""
    if batch_size >= rows:
        return None, 1.0
    picked: list[int] = []
    share = 0.0
    while share * rows < batch_size - 1e-9 and len(picked) < len(oracle.batches):
        share += oracle.weights[len(picked)] / oracle.total_weight
        picked.append(len(picked))
    return (None, 1.0) if len(picked) == len(oracle.batches) else (picked, share)


def _deltas(loss: float, trace: float, mu: float) -> list[float]:
    """mu, and the displacements at which the quadratic model changes the loss by 1e-4 to 1 times itself."""
    if not (math.isfinite(trace) and trace != 0):
        return [mu]
    wanted = [math.sqrt(2 * part * max(loss, 1e-2) / abs(trace)) for part in (1e-4, 1e-3, 1e-2, 1e-1, 0.5)]
    return sorted({float(f"{d:.3g}") for d in wanted} | {mu})


def _phi(deltas: list[float], plus: np.ndarray, minus: np.ndarray) -> Phi | None:
    finite = np.isfinite(plus).all(axis=0) & np.isfinite(minus).all(axis=0)
    if not finite.any():
        return None
    kept = [d for d, ok in zip(deltas, finite, strict=True) if ok]
    implied, stderr = phi_trace(kept, plus[:, finite], minus[:, finite])
    half = np.array(kept) ** 2 / 2
    # The fit's region: resolved rungs whose implied trace is within a fifth of the smallest one's.
    resolved = [i for i in range(len(kept)) if stderr[i] <= abs(implied[i])]
    anchor = resolved[0] if resolved else 0
    same = [i for i in resolved if abs(implied[i] - implied[anchor]) <= 0.2 * abs(implied[anchor])]
    # A first resolved rung that the unresolved ones below it contradict lies beyond the quadratic region: there is no fit.
    if any(abs(implied[i] - implied[anchor]) > 3 * stderr[i] for i in range(anchor)):
        same = []
    fit = None
    if same:
        at = same[len(same) // 2]
        fit = Estimate(
            float(implied[at]), stderr=float(stderr[at]), n=len(plus), resolved=bool(stderr[at] <= abs(implied[at]) / 3)
        )
    return Phi(
        delta=kept,
        mean=(implied * half).tolist(),
        stderr=(stderr * half).tolist(),
        n=len(plus),
        trace=fit,
        fit_up_to=max(kept[i] for i in same) if same else None,
    )


def _zo_rule(etas: np.ndarray, changes: np.ndarray, slopes: np.ndarray, mean: Slopes, seed: int) -> FiniteScale | None:
    finite = np.isfinite(changes).all(axis=0)
    if finite.sum() < 3 or mean.g_sq <= 0:
        return None
    rule = finite_scale(etas[finite], changes[:, finite], slopes, mean.g_sq, mean.stderr, seed=seed)
    note = "" if finite.all() else f"the loss overflowed at eta = {etas[~finite][0]:.2g} and above"
    return FiniteScale(
        eta=list(rule.etas),
        change=list(rule.change),
        stderr=list(rule.stderr),
        eta_star=rule.step.value,
        interval=rule.step.interval,
        slopes_rms=float(np.sqrt(np.mean(slopes**2))),
        n=rule.n,
        at_edge=bool(rule.edge),
        note="; ".join(
            n for n in (rule.step.note, note, "" if rule.significant else "no significant decrease on the grid") if n
        ),
    )


def _line_search(oracle: Oracle, group: Block, gradient: Tensors, point: BlockPoint, loss: float) -> FiniteScale | None:
    """The first-order twin of the rule: f(y - eta g_y) on a grid around 1/lambda_max; one direction, no sampling error."""
    top = point.lam_max.value if point.lam_max is not None else 0.0
    if not top > 0 or point.grad_norm == 0:
        return None
    etas: list[float] = []
    changes: list[float] = []
    # From an eighth of 1/lambda_max on by factors of two, until the loss has risen twice in a row: at B = 0 an adapter's
    # curvature says little about how far its gradient leads.
    for k in range(-3, 13):
        etas.append(2.0**k / top)
        with oracle.moved(group, gradient, -etas[-1]):
            changes.append(oracle.value() - loss)
        if not math.isfinite(changes[-1]) or (k >= 1 and changes[-1] > changes[-2] > changes[-3]):
            break
    finite = np.isfinite(changes)
    if finite.sum() < 3:
        return None
    kept, curve = np.array(etas)[finite], np.array(changes)[finite]
    best, edge = least(kept, curve)
    return FiniteScale(
        eta=kept.tolist(), change=curve.tolist(), stderr=[0.0] * len(kept), eta_star=best, interval=None,
        slopes_rms=point.grad_norm, n=1, at_edge=edge, note="along the gradient itself: one direction, no sampling error",
    )  # fmt: skip
