"""One block at the scale of a step: the mean change of the loss under displacements, and the best single step, from forward passes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from hybridtheory import streams
from hybridtheory.blocks import Block
from hybridtheory.estimate import Estimate
from hybridtheory.forward import Slopes
from hybridtheory.oracle import Oracle
from hybridtheory.theory.finite_scale import finite_scale, least, phi_trace
from hybridtheory.vectors import Tensors
from probes.records_smoothness import AtScale, BlockPoint, FiniteScale, Phi

if TYPE_CHECKING:
    from probes.point import Settings


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
    plus, minus, slopes, changes, shares = [], [], [], [], []
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
            # Another batch for each direction: the control variate's mean is that over batches too.
            batch, share = training_batch(oracle, settings.batch_size, rows, first=j)
            shares.append(share)
            c = (change(settings.mu, batch) - change(-settings.mu, batch)) / (2 * settings.mu)
            slopes.append(c)
            changes.append([change(-eta * c) - loss for eta in etas])
    phi = _phi(deltas, np.array(plus), np.array(minus))
    if not zeroth:
        return phi, _line_search(oracle, group, gradient, point, loss) if gradient else None
    if not len(etas):
        return phi, None
    noise = point.noise.value if point.noise is not None and math.isfinite(point.noise.value) else 0.0
    mean = slopes_sq or Slopes(point.grad_norm**2 + batch_variance(noise, rows, shares), 0.0, 0)
    return phi, _zo_rule(np.asarray(etas), np.array(changes), np.array(slopes), mean, settings.seed)


def training_batch(oracle: Oracle, batch_size: int, rows: int, first: int = 0) -> tuple[list[int] | None, float]:
    """Micro-batches that make up one training batch (None: all), counted round from ``first``, and their share of the weight."""
    if batch_size >= rows:
        return None, 1.0
    count, picked, share = len(oracle.batches), list[int](), 0.0
    while share * rows < batch_size - 1e-9 and len(picked) < count:
        picked.append((first + len(picked)) % count)
        share += oracle.weights[picked[-1]] / oracle.total_weight
    return (None, 1.0) if len(picked) == count else (sorted(picked), share)


def batch_variance(noise: float, rows: int, shares: Sequence[float]) -> float:
    """E‖g_batch − g‖², in the mean over batches with these ``shares`` of the measured ``rows``; noise: σ² of one row's gradient.

    Rows are drawn without replacement: the variance of their mean, σ²/m (1 − m/n), shrinks to zero as they become all of them.
    """
    return noise / rows * float(np.mean([(1 - share) / share for share in shares]))


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
