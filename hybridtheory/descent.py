"""What one hybrid step does to the loss on average, at the current parameters: measured from forward passes, beside what Identity Q says
from infinitesimal curvature and what a finite-scale curve says that was fitted on other directions.

    base   f(x - s η_x c u, y) - f        averaged over Gaussian u, c = <g_x, u>
    peft   f(x, y - s η_y g_y) - f
    both   f(x - s η_x c u, y - s η_y g_y) - f        the same directions, so that what coupling adds is sharp

at fractions s of the step. The slope is the exact derivative (the gradient is known); what a finite difference of size mu would have
measured is reported beside it. Standard errors cover the directions and the rounding of the loss.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch

from hybridtheory import streams
from hybridtheory.blocks import Block
from hybridtheory.curvature import mean_estimate
from hybridtheory.errors import UserError
from hybridtheory.estimate import Estimate
from hybridtheory.estimators.streams import Key, numpy_generator
from hybridtheory.oracle import Oracle
from hybridtheory.theory.checks import Hypothesis, positive
from hybridtheory.theory.descent import Mean, biased_slope, directions_needed, fitted_changes, mean_change, miss
from hybridtheory.theory.one_step import OneStep, identity_q
from hybridtheory.vectors import Tensors, add_, dot, scale

# Fractions of the step at which other directions are looked at; none is a fraction that is predicted.
FITTED_AT = (0.25, 0.5, 0.9)
PILOT, LEAST_OTHER = 12, 16
AIM = 0.85  # of the error asked for: a standard error is itself uncertain
# A displacement at which curvature moves the loss by nothing (tr H/2 times its square).
TINY = 1e-7


What = Literal["base", "peft", "both"]
_MEANS: set[What] = {"base", "both"}


@dataclass(frozen=True)
class StepChange:
    """One step of `what` ("base", "peft", "both") at `factor` of the rates: the mean change of the loss and two predictions.

    broken: the parts of measured - quadratic, each as a hypothesis, and the largest in words. coupling: of "both", what moving both adds to
    base alone and PEFT alone. It is measured on base's own directions, so base's error is not in it.
    """

    what: What
    factor: float
    measured: Mean
    quadratic: Mean
    fitted: Mean
    hypotheses: tuple[Hypothesis, ...] = ()
    broken: str = ""
    coupling: Mean | None = None


@dataclass(frozen=True)
class Local:
    """First and second derivatives that one step meets: ‖g_x‖², g_x'H_xx g_x, tr H_xx, and so on; 0 for a block that is not there.

    slope_error: root mean square of (finite difference of size mu - derivative)/‖g_x‖; kink: mean of u'H_mu u - u'Hu on the same
    directions, where u'H_mu u is the second difference of size mu.
    """

    loss: float
    gx_sq: float = 0.0
    gy_sq: float = 0.0
    xHx: float = 0.0
    yHy: float = 0.0
    xHy: float = 0.0
    trace: Estimate = field(default_factory=lambda: Estimate(0.0, stderr=0.0))
    slope_error: float = 0.0
    kink: Estimate = field(default_factory=lambda: Estimate(0.0, stderr=0.0))
    kink_peft: float = 0.0

    def step(self, eta_x: float, eta_y: float, d: int) -> OneStep:
        """Identity Q for Gaussian directions and exact slopes."""
        return identity_q(eta_x, eta_y, self.gx_sq, self.gy_sq, d, self.trace.value, self.xHx, self.yHy, self.xHy)


def further(so_far: Mean, precision: float, most: int) -> int:
    """How many directions to have next: what the spread so far says, at most twice what there are, since a few say little about it."""
    return min(directions_needed(so_far, AIM * precision, most), 2 * so_far.n)


def one_step(
    oracle: Oracle,
    base: Block | None,
    peft: Block | None,
    eta_base: float,
    eta_peft: float,
    factors: Sequence[float] = (0.03, 0.1, 0.3, 1.0),
    trace: Estimate | None = None,
    seed: int = 0,
    index: int = 0,
    mu: float = 1e-3,
    difference: str = "central",
    precision: float = 0.03,
    most: int = 400,
    curved: int = 8,
) -> tuple[Local, list[StepChange]]:
    """Measure the mean one-step change at each factor of the rates, for base alone, PEFT alone and both.

    trace      tr H_xx where it is known already; otherwise `curved` directions (with a product each) estimate it.
    difference "central", "forward" or "exact": the slope whose error is reported; the steps measured here have exact slopes.
    precision  relative standard error at which the number of directions stops (two stages; at most `most`).
    curved     directions along which the finite difference and the second difference of size mu are compared with derivatives.
    Raises UserError for rates that are not positive numbers, a loss that is not finite, or a zero gradient of every block.
    """
    base, peft = (b if b is not None and eta > 0 else None for b, eta in ((base, eta_base), (peft, eta_peft)))
    positive(
        "one step",
        mu=mu,
        precision=precision,
        **({"lr_base": eta_base} if base else {}),
        **({"lr_peft": eta_peft} if peft else {}),
    )
    if base is None and peft is None:
        raise UserError("there is no step to measure: give a positive rate for a block that the model has")
    probe = _Probe(oracle, base, peft, eta_base if base else 0.0, eta_peft if peft else 0.0, seed, index)
    local = probe.local(trace, mu, difference, max(curved, 2))
    if not math.isfinite(local.loss) or local.gx_sq + local.gy_sq == 0:
        raise UserError(
            f"no step can be measured: the loss is {local.loss} and the squared gradient {local.gx_sq + local.gy_sq:.3g}"
        )
    return local, probe.changes(local, list(factors), precision, most)


class _Probe:
    """The state of one call: blocks, rates and their gradients at the current parameters."""

    def __init__(
        self, oracle: Oracle, base: Block | None, peft: Block | None, eta_x: float, eta_y: float, seed: int, index: int
    ) -> None:
        self.oracle, self.base, self.peft = oracle, base, peft
        self.eta_x, self.eta_y, self.seed, self.index = eta_x, eta_y, seed, index
        self.blocks = [b for b in (base, peft) if b is not None]
        self.loss = oracle.value()
        gradients = dict(zip([b.group for b in self.blocks], oracle.gradient(*self.blocks), strict=True))
        self.g_x: Tensors = gradients.get("base", [])
        self.g_y: Tensors = gradients.get("peft", [])
        self.size = math.sqrt(dot(self.g_x, self.g_x))
        self.common = 0.0
        self.noise = self._rounding()

    # ---- derivatives ----

    def local(self, trace: Estimate | None, mu: float, difference: str, curved: int) -> Local:
        found: dict[str, float] = {"gx_sq": self.size**2, "gy_sq": dot(self.g_y, self.g_y)}
        forms: list[float] = []
        with self.oracle.products(*self.blocks) as hess:
            if self.base is not None:
                parts = hess(self.g_x, self.base, self.blocks)
                found["xHx"] = dot(self.g_x, parts[: len(self.g_x)])
                found["xHy"] = dot(self.g_y, parts[len(self.g_x) :])
                for j in range(curved):
                    u = streams.gaussian(self.base, self.seed, "one step, curvature", self.index, j)
                    forms.append(dot(u, hess(u, self.base)))
            if self.peft is not None:
                found["yHy"] = dot(self.g_y, hess(self.g_y, self.peft))
        errors, kinks = [], []
        for j, form in enumerate(forms):
            assert self.base is not None
            u = streams.gaussian(self.base, self.seed, "one step, curvature", self.index, j)
            up, down = (self._moved(u, by) for by in (mu, -mu))
            slope = {"central": (up - down) / (2 * mu), "forward": up / mu}.get(difference)
            errors.append(0.0 if slope is None else slope - dot(self.g_x, u))
            kinks.append((up + down) / mu**2 - form)
        if self.base is not None:
            found["slope_error"] = math.sqrt(float(np.mean(np.square(errors)))) / self.size if self.size else 0.0
        return Local(
            self.loss, **found, trace=trace or mean_estimate(forms or [0.0, 0.0]), kink=mean_estimate(kinks or [0.0, 0.0]),
            kink_peft=self._kink_peft(found.get("yHy", 0.0)),
        )  # fmt: skip

    def _kink_peft(self, yHy: float) -> float:
        """Second difference of f along g_y less g_y'H_yy g_y, at a tenth of the step: what kinks add; 0 where rounding could make it."""
        if self.peft is None or not self.g_y:
            return 0.0
        by = 0.1 * self.eta_y
        up, down = (self._change(None, 0.0, sign * by) for sign in (1, -1))
        found = (up + down) / by**2 - yHy
        return found if abs(found) * by**2 > 6 * self.noise else 0.0

    def _rounding(self, tries: int = 12) -> float:
        """Root mean square rounding error of one loss: what is left of moves so small that only the derivative moves the loss. Their mean
        is the error of f(w) itself, which would sit in every change: it is taken out, down to 1/√(tries + 1) of one loss's."""
        block, g = self.blocks[0], self.g_x if self.base is not None else self.g_y
        left = []
        for j in range(tries):
            u = streams.gaussian(block, self.seed, "one step, rounding", self.index, j)
            with self.oracle.moved(block, u, TINY):
                left.append(self.oracle.value() - self.loss - TINY * dot(u, g))
        self.loss += float(np.mean(left)) * tries / (tries + 1)
        with torch.no_grad():
            last = torch.finfo(self.oracle.loss(self.oracle.batches[0]).dtype).eps
        # Never below the rounding of the last sum, which moves this small may not stir.
        noise = max(float(np.std(left, ddof=1)), 0.3 * last * abs(self.loss))
        self.common = noise / math.sqrt(tries + 1)
        return noise

    def _along_peft(self, s: float, precision: float) -> Mean:
        """f(x, y - s η_y g_y) - f: from two losses, or, where their rounding would show, by Gauss quadrature of the derivative along the
        step (its error: the difference of two and three nodes)."""
        by = s * self.eta_y
        change = self._change(None, 0.0, by)
        error = math.hypot(self.noise, self.common)
        if error <= 0.5 * precision * abs(change):
            return Mean(change, error, 1)
        assert self.peft is not None
        integrals = []
        for nodes in (2, 3):
            t, weights = np.polynomial.legendre.leggauss(nodes)
            total = 0.0
            for place, weight in zip((1 + t) / 2, weights / 2, strict=True):
                with self.oracle.moved(self.peft, self.g_y, -by * float(place)):
                    (there,) = self.oracle.gradient(self.peft)
                total -= by * float(weight) * dot(there, self.g_y)
            integrals.append(total)
        return Mean(integrals[1], abs(integrals[1] - integrals[0]), 1)

    def _moved(self, u: Tensors, by: float) -> float:
        assert self.base is not None
        with self.oracle.moved(self.base, u, by):
            return self.oracle.value() - self.loss

    # ---- changes ----

    def _change(self, u: Tensors | None, by_x: float, by_y: float) -> float:
        """f(x - by_x u, y - by_y g_y) - f."""
        direction: Tensors = []
        blocks: list[Block] = []
        if u is not None and self.base is not None:
            blocks, direction = [self.base], scale(u, by_x)
        if by_y and self.peft is not None:
            blocks, direction = [*blocks, self.peft], [*direction, *scale(self.g_y, by_y)]
        with self.oracle.moved(blocks, direction, -1.0):
            return self.oracle.value() - self.loss

    def _direction(self, purpose: str, j: int) -> tuple[Tensors, float]:
        """(u, z) with <g, u> = ‖g‖ z and z from the size-biased law (see `theory.descent`)."""
        assert self.base is not None
        rng = numpy_generator(Key(self.seed, self.index, j), f"one step, slope/{purpose}")
        z = biased_slope(float(rng.uniform()), rng.standard_normal(3))
        u = streams.gaussian(self.base, self.seed, f"one step/{purpose}", self.index, j)
        own = dot(u, self.g_x) / self.size
        return add_(u, self.g_x, (z - own) / self.size), z

    def changes(self, local: Local, factors: list[float], precision: float, most: int) -> list[StepChange]:
        nothing = Mean(0.0, 0.0, 1)
        along = [self._along_peft(s, precision) if self.peft is not None else nothing for s in factors]
        along_fit = [self._along_peft(s, precision) if self.peft is not None else nothing for s in FITTED_AT]
        peft, peft_fit = ([m.value for m in table] for table in (along, along_fit))
        measured: dict[What, list[Mean]] = {}
        fitted: dict[What, list[Mean]] = {}
        joint: list[Mean] = []
        start_y = -self.eta_y * local.gy_sq
        if self.peft is not None:
            measured["peft"] = along
            fitted["peft"] = fitted_changes(FITTED_AT, [peft_fit], start_y, factors)
        if self.base is not None and self.size > 0:
            alone, joint = self._stages("measured", factors, peft, precision, most)
            measured["base"] = alone
            # Enough other directions that their error stays within a few percent of the largest step too.
            other = max(LEAST_OTHER, max(m.n for m in alone) // 2)
            # Half of them are enough for a prediction of what moving both adds: it is small beside the base's own change.
            own, extra = self._samples("fitted", FITTED_AT, peft_fit, range(other), range(other // 2))
            start_x = -self.eta_x * local.gx_sq
            fitted["base"] = fitted_changes(FITTED_AT, own[0] / np.square(own[1])[:, None], start_x, factors)
            if self.peft is not None:
                measured["both"] = [a + j + Mean(p, 0.0, 1) for a, j, p in zip(alone, joint, peft, strict=True)]
                cross = fitted_changes(FITTED_AT, extra[0] / np.square(extra[1])[:, None], 0.0, factors)
                fitted["both"] = [a + b + c for a, b, c in zip(fitted["base"], fitted["peft"], cross, strict=True)]
        # The samples' scatter holds the rounding of each loss; what is left of f(w)'s own moves all of them alike.
        for table in (measured, fitted):
            for what in _MEANS & table.keys():
                table[what] = [Mean(m.value, math.hypot(m.stderr, self.common), m.n) for m in table[what]]
        found = []
        order: tuple[What, ...] = ("base", "peft", "both")
        for what in [w for w in order if w in measured]:
            for i, s in enumerate(factors):
                interplay = None
                if what == "both":
                    # Every sample of the joint part holds PEFT's change, and so its error.
                    value = measured["both"][i].value - measured["base"][i].value - peft[i]
                    interplay = Mean(value, math.hypot(joint[i].stderr, along[i].stderr), joint[i].n)
                found.append(self._compared(local, what, s, measured[what][i], fitted[what][i], interplay))
        return found

    def _compared(
        self, local: Local, what: What, s: float, measured: Mean, fitted: Mean, interplay: Mean | None
    ) -> StepChange:
        eta_x = s * self.eta_x if what != "peft" else 0.0
        eta_y = s * self.eta_y if what != "base" else 0.0
        d = self.base.numel if self.base is not None else 1
        step = local.step(eta_x, eta_y, d)
        bend = 0.5 * eta_x**2 * local.gx_sq
        error = bend * (local.trace.stderr or 0.0)
        kinks = 0.5 * eta_y**2 * local.kink_peft
        if local.kink.stderr is not None and abs(local.kink.value) > 3 * local.kink.stderr:
            kinks += bend * local.kink.value
        coupling = interplay.value - step.coupling if interplay is not None else 0.0
        tolerance = 0.1
        tested, words = miss(measured, step.change, kinks, coupling, tolerance)
        return StepChange(what, s, measured, Mean(step.change, error, local.trace.n), fitted, tested, words, interplay)

    def _stages(
        self, purpose: str, factors: list[float], peft: list[float], precision: float, most: int
    ) -> tuple[list[Mean], list[Mean]]:
        """Per factor: mean change of the base alone, and what moving PEFT too adds to base and PEFT, each over as many directions as its
        error asks for (see `further`)."""
        every = range(len(factors))
        alone: list[list[tuple[float, float]]] = [[] for _ in every]  # per factor: (h, z) of direction 0, 1, ...
        joint: list[list[tuple[float, float]]] = [[] for _ in every]
        wanted = [min(PILOT, most)] * len(factors)
        wanted_joint = [min(PILOT, most) if self.peft is not None else 0] * len(factors)
        while True:
            for j in range(max(wanted + wanted_joint)):
                add_joint = {i for i in every if len(joint[i]) <= j < wanted_joint[i]}
                needed = [i for i in every if i in add_joint or len(alone[i]) <= j < wanted[i]]
                if not needed:
                    continue
                both = range(j, j + 1) if add_joint else range(0)
                (row, z), (more, _) = self._samples(
                    purpose, [factors[i] for i in needed], [peft[i] for i in needed], range(j, j + 1), both
                )
                for place, i in enumerate(needed):
                    if len(alone[i]) == j:
                        alone[i].append((row[0, place], z[0]))
                    if i in add_joint:
                        joint[i].append((more[0, place], z[0]))
            own = [mean_change(*zip(*c, strict=True)) for c in alone]
            wanted = [further(m, precision, most) for m in own]
            added = [Mean(0.0, 0.0, m.n) for m in own]
            if self.peft is not None:
                added = [mean_change(*zip(*c, strict=True)) for c in joint]
                # The joint mean is judged against the joint change, and half of its error budget is the base's.
                wanted_joint = [
                    further(Mean(0.7 * (m.value + p + a.value), a.stderr, a.n), precision, most)
                    for m, p, a in zip(own, peft, added, strict=True)
                ]
            if all(len(alone[i]) >= wanted[i] and len(joint[i]) >= wanted_joint[i] for i in every):
                return own, added

    def _samples(
        self, purpose: str, factors: Sequence[float], peft: Sequence[float], alone: range, both: range
    ) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
        """(h, z) of the base alone, [n, k] and [n], and of what both moves add to the sum of each, for the directions in `both`."""
        rows, extra, slopes = [], [], []
        for j in alone:
            u, z = self._direction(purpose, j)
            c = self.size * z
            row = [self._change(u, s * self.eta_x * c, 0.0) for s in factors]
            rows.append(row)
            slopes.append(z)
            if self.peft is not None and j in both:
                extra.append([
                    self._change(u, s * self.eta_x * c, s * self.eta_y) - own - p for s, own, p in zip(factors, row, peft, strict=True)
                ])  # fmt: skip
        z_all = np.array(slopes)
        k = len(factors)
        return (np.array(rows).reshape(-1, k), z_all), (np.array(extra).reshape(-1, k), z_all[: len(extra)])
