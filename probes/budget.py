"""Where the squared error of one zeroth-order estimate comes from: directions, minibatch, truncation, rounding of loss and weights.

    ‖ĝ - ∇f‖²/‖∇f‖² ≈ (d + 1) + (d + 2) σ²/(b‖∇f‖²) + d E(ρ(mu) - ⟨∇f, u⟩)²/‖∇f‖²       Gaussian u, one query, central difference

The last term is measured: the same directions at every mu, forward passes against the exact slope. It is split by what each part can
be: rounding of the weights is ⟨∇f, ũ - u⟩ with the realised direction ũ = (fl(w + mu u) - fl(w - mu u))/2mu, known without a forward
pass; the rest is truncation, which grows like mu⁴, and rounding of the loss, which falls like 1/mu² (a fit of the two).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy.optimize import least_squares

from hybridtheory.blocks import Block
from hybridtheory.errors import UserError
from hybridtheory.estimate import Estimate
from hybridtheory.estimators import Gaussian, Kept, Key, Law, Perturbation, absorbed_fraction, inner
from hybridtheory.oracle import Oracle
from hybridtheory.theory.moments import second_moment, variance
from hybridtheory.theory.moments_error import minibatch_second_moment
from hybridtheory.vectors import Tensors, dot
from probes.records import Allocation, Budget, Warning
from probes.records_estimators import PublishedMu
from probes.records_parts import Interval

if TYPE_CHECKING:
    from probes.estimators import Settings
    from probes.setup import Probe

# Where MeZO's published settings lie (arXiv 2305.17333): full fine-tuning, LoRA, prefix.
PUBLISHED = {"full": 1e-3, "LoRA": 1e-2, "prefix": 1e-1}
LARGE = 10_000_000
# A mu is in the flat range where it adds at most this share to what directions and minibatch cost anyway.
FLAT = 0.05
# Share of the squared slope up to which its squared error is taken to follow the expansion.
EXPANDS = 0.03
FINE = 400
ROWS, QUERIES = (1, 4, 16, 64), (1, 4, 16)


def grid(mus: Sequence[float] | None, d: int) -> list[float]:
    """The mus of the sweep: half decades, whole ones for models of more than LARGE weights d; the published defaults are among them."""
    if mus is not None:
        return sorted(set(mus))
    per = 1 if d > LARGE else 2
    return [float(f"{10 ** (e / per):.2g}") for e in range(-5 * per, (0 if d > LARGE else 1) * per)]


def directions(wanted: int | None, d: int) -> int:
    return wanted or (4 if d > LARGE else 8)


def losses_of(probe: Probe[Settings]) -> Oracle:
    """The loss as training evaluates it, a minibatch at a time: forward passes of few rows are mostly overhead. One count of calls."""
    s, task = probe.settings, probe.task
    oracle = Oracle(task.model, task.objective, task.batches(s.micro_batch or s.batch_size), probe.groups)
    oracle.calls = probe.oracle.calls
    return oracle


def measure(
    probe: Probe[Settings], group: Block, gradient: Tensors, noise: Estimate
) -> Iterator[Budget | Allocation | Warning]:
    """The error budget of one group, and what more forward passes would best be spent on."""
    s, d = probe.settings, group.numel
    size = sum(g.numel for g in probe.groups)  # a forward pass costs by the model, whatever is moved
    mus = grid(s.mus, size)
    gg = dot(gradient, gradient)
    plan, value = Perturbation(probe.task.model, group), losses_of(probe).value
    errors, weights, slopes, broken = [], [], [], ""
    for i in range(directions(s.directions, size)):
        key = Key(s.seed, (3 << 32) + i)
        # Drawn once for all its mus: a block of float32 beside the model, dropped before the next direction.
        law = Kept(Gaussian()).bind(group, [key])
        slope = inner(law, key, group, gradient)
        slopes.append(slope)
        rows = [_sides(plan, value, law, key, mu) for mu in mus]
        broken = broken or _not_finite(rows, mus, key)
        errors.append([(a - b) / (2 * mu) - slope for (a, b), mu in zip(rows, mus, strict=True)])
        weights.append([_realised_error(law, key, group, gradient, mu) for mu in mus])
    e, w = np.array(errors), np.array(weights)
    finite = np.isfinite(e).all(axis=0)
    if not finite.any():
        raise UserError(
            f"the loss is not finite on both sides of {group.name} for any mu from {mus[0]:g} to {mus[-1]:g} ({broken}); "
            f"the parameters are unchanged: give smaller --mus"
        )
    notes = [f"{broken}: left out there"] if broken else []
    kept = [m for m, ok in zip(mus, finite, strict=True) if ok]
    e, w = e[:, finite], w[:, finite]
    added = d * (e**2) / gg
    mean, stderr = added.mean(0), added.std(0, ddof=1) / math.sqrt(len(e))
    by_weights = d * (w**2).mean(0) / gg
    absorbed = [absorbed_fraction(group, mu) for mu in kept]
    if min(absorbed) > 0.5:
        raise UserError(
            f"every mu of the sweep is absorbed by the weights of {group.name}: at {kept[-1]:g} "
            f"{absorbed[-1]:.0%} of them do not move: raise --mus"
        )
    # Where a slope's error is not small beside the slope, the expansion in mu says nothing.
    inside = (e**2).mean(0) < EXPANDS * float(np.mean(np.array(slopes) ** 2))
    curve = _fit(np.array(kept), d * ((e - w) ** 2).mean(0) / gg, inside)
    direction = variance("gaussian", d)
    sigma_sq = max(noise.value, 0.0) if math.isfinite(noise.value) else 0.0
    minibatch = minibatch_second_moment("gaussian", d, 0.0, sigma_sq / s.batch_size) / gg
    best = _recommend(curve, np.array(kept), mean, direction + minibatch)
    if float(np.min(mean)) > 0.1 * d:
        least = kept[int(np.argmin(mean))]
        yield Warning(
            f"the loss differences of {group.name} never come near the exact slopes: at best (mu = {least:g}) the squared slope error is "
            f"{np.min(mean) / d:.2g} of ‖∇f‖²; the gradient or the loss is too imprecise in this dtype", group.name,
        )  # fmt: skip
    published = [
        PublishedMu(name, mu, best.added(mu), best.flat is not None and best.flat[0] <= mu <= best.flat[1])
        for name, mu in PUBLISHED.items()
    ]
    yield Budget(
        block=group.name, group=group.group, d=d, dtype=_dtypes(group), rows=s.batch_size, n=len(e), grad_norm=math.sqrt(gg),
        direction=direction, minibatch=minibatch, noise=noise, mu=kept, added=mean.tolist(), stderr=stderr.tolist(),
        weights=by_weights.tolist(), absorbed=absorbed,
        truncation=None if curve is None else curve[0], loss_rounding=None if curve is None else curve[1],
        loss_noise=None if curve is None else math.sqrt(2 * curve[1] * gg / d),
        recommended=best.mu, flat=best.flat, published=published, note="; ".join(notes),
    )  # fmt: skip
    yield _allocation(s, group, gg, noise)


def _not_finite(rows: Sequence[tuple[float, float]], mus: Sequence[float], key: Key) -> str:
    """The first side of a difference that is not finite, in words."""
    for (plus, minus), mu in zip(rows, mus, strict=True):
        for loss, side in ((plus, "w + mu u"), (minus, "w - mu u")):
            if not math.isfinite(loss):
                return f"the loss is {loss} at {side} (mu = {mu:g}, seed {key.seed}, step {key.step})"
    return ""


def _sides(plan: Perturbation, f: Any, law: Law, key: Key, mu: float) -> tuple[float, float]:
    return float(plan.value(f, law, key, mu)), float(plan.value(f, law, key, -mu))


@torch.no_grad()
def _realised_error(law: Law, key: Key, group: Block, gradient: Tensors, mu: float) -> float:
    """⟨g, ũ - u⟩, one tensor at a time, in float64."""
    total = 0.0
    for (name, w), g in zip(group.parameters.items(), gradient, strict=True):
        held = w.detach()
        moved = law.shift(key, name, held, mu).double() - law.shift(key, name, held, -mu).double()
        total += float(
            torch.dot((moved / (2 * mu) - law.fill(key, name, held).double()).reshape(-1), g.reshape(-1).double())
        )
    return total


def _fit(mu: np.ndarray, y: np.ndarray, inside: np.ndarray) -> tuple[float, float] | None:
    """(a, b) of a mu⁴ + b/mu² by least squares of logarithms over the mus where the expansion holds: y spans ten decades."""
    use = inside & (y > 0)
    if use.sum() < 2:
        return None
    x, target = np.log(mu[use]), np.log(y[use])

    def residual(p: np.ndarray) -> np.ndarray:
        out: np.ndarray = np.logaddexp(p[0] + 4 * x, p[1] - 2 * x) - target
        return out

    # Either part alone must reach the end that it owns.
    found = least_squares(residual, [target[-1] - 4 * x[-1], target[0] + 2 * x[0]]).x
    return float(np.exp(found[0])), float(np.exp(found[1]))


@dataclass(frozen=True)
class _Best:
    """What a finite mu adds, as measured (log-log interpolation inside the sweep), its best mu, and where it does not matter."""

    mus: np.ndarray
    measured: np.ndarray
    mu: float
    flat: Interval | None

    def added(self, mu: float) -> float:
        """nan outside of the sweep."""
        inside = self.mus[0] <= mu <= self.mus[-1] * (1 + 1e-9)
        return float(_interpolated(self.mus, self.measured, np.array([mu]))[0]) if inside else math.nan


def _interpolated(mus: np.ndarray, added: np.ndarray, at: np.ndarray) -> np.ndarray:
    out: np.ndarray = np.exp(np.interp(np.log(at), np.log(mus), np.log(np.maximum(added, 1e-300))))
    return out


def _recommend(curve: tuple[float, float] | None, mus: np.ndarray, measured: np.ndarray, base: float) -> _Best:
    """The best mu is where the two fitted parts balance (4a mu⁴ = 2b/mu²), inside the sweep; the flat range needs no fit."""
    best = float(mus[int(np.argmin(measured))])
    if curve is not None and min(curve) > 0:
        best = float(np.clip((curve[1] / (2 * curve[0])) ** (1 / 6), mus[0], mus[-1]))
    fine = np.geomspace(mus[0], mus[-1], FINE)
    flat = _interpolated(mus, measured, fine) <= FLAT * base
    at = int(np.argmin(np.abs(np.log(fine / best))))
    if not flat[at]:
        return _Best(mus, measured, best, None)
    left, right = at, at
    while left > 0 and flat[left - 1]:
        left -= 1
    while right + 1 < FINE and flat[right + 1]:
        right += 1
    return _Best(mus, measured, best, (float(fine[left]), float(fine[right])))


def _allocation(s: Settings, group: Block, gg: float, noise: Estimate) -> Allocation:
    """E‖ĝ - ∇f‖²/‖∇f‖² = (M - 1) + M σ²/(b‖∇f‖²), M the second moment of q queries that share their b rows."""
    d = group.numel
    known = math.isfinite(noise.value)
    ratio = max(noise.value, 0.0) / gg if known else 0.0

    def error(rows: int, q: int) -> float:
        m = second_moment("gaussian", d, q)
        return m - 1 + m * ratio / rows

    now = error(s.batch_size, s.q)
    spread = None if noise.stderr is None else noise.stderr / gg
    return Allocation(
        block=group.name, group=group.group, rows=s.batch_size, q=s.q, more_rows=error(2 * s.batch_size, s.q) / now,
        more_queries=error(s.batch_size, 2 * s.q) / now, more_steps=0.5,
        critical_rows=Estimate(ratio, stderr=spread, n=noise.n, resolved=noise.resolved and known, note=noise.note),
        errors=[(b, q, error(b, q)) for b in ROWS for q in QUERIES],
        note="" if known else "the rows' noise was not measured: with one micro-batch nothing differs; lower --micro-batch",
    )  # fmt: skip


def _dtypes(group: Block) -> str:
    return ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in group.tensors}))
