"""Coverage of the quantile fit's intervals on simulated trajectories; writes docs/reports/coverage.md.

    OMP_NUM_THREADS=1 python benchmarks/coverage.py --simulations 2000 --out docs/reports/coverage.md

Every case draws a trajectory of gradient norms u and values L = (L0 + L1 u) · noise whose tau quantile is exactly on the line, fits, and
counts how often the interval holds the truth. The plain moving-block percentile interval is counted on the same data for comparison, as is
the Clopper-Pearson interval of the envelope's held-out violation rate.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from scipy import stats

from hybridtheory import smoothness
from hybridtheory.intervals import block_weights, bounded_interval, line_intervals

TAU = 0.9


@dataclass(frozen=True)
class Case:
    """One simulated situation. ``law``: lognormal, gamma (skewed), hetero (relative noise grows threefold with u), additive."""

    name: str
    rho: float = 0.3  # lag-one correlation of the noise's normal scores
    law: str = "lognormal"
    sigma: float = 0.25
    L0: float = 1.0
    L1: float = 2.0
    design: str = "decay"  # u falls along the run; "wander": a stationary AR(1); "scatter": independent
    span: float = 6.0
    n: int = 30


CASES = (
    Case("independent noise", rho=0.0),
    Case("correlation 0.3"),
    Case("correlation 0.5", rho=0.5),
    Case("skewed noise", law="gamma", sigma=0.5),
    Case("noise grows with u", law="hetero"),
    Case("additive noise", law="additive", sigma=0.2),
    Case("boundary L0 = 0", L0=0.0),
    Case("boundary L1 = 0", L0=3.0, L1=0.0),
    Case("u wanders", design="wander", span=4.0),
    Case("u scattered", design="scatter"),
)


def trajectory(case: Case, rng: np.random.Generator) -> np.ndarray:
    """(n,) gradient norms."""
    if case.design == "decay":
        log = -np.log(case.span) * np.linspace(0, 1, case.n) + 0.15 * rng.standard_normal(case.n)
    elif case.design == "wander":
        log = np.log(case.span) / 4 * autoregression(case.n, 0.7, rng)
    else:
        log = rng.uniform(-np.log(case.span), 0, case.n)
    return np.exp(log)


def autoregression(n: int, rho: float, rng: np.random.Generator) -> np.ndarray:
    z = rng.standard_normal(n)
    for i in range(1, n):
        z[i] = rho * z[i - 1] + np.sqrt(1 - rho * rho) * z[i]
    return z


def values(case: Case, u: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(n,) L_i with P(L_i <= L0 + L1 u_i) = TAU."""
    z = autoregression(case.n, case.rho, rng)
    line = case.L0 + case.L1 * u
    above = z - stats.norm.ppf(TAU)
    if case.law == "lognormal":
        return line * np.exp(case.sigma * above)
    if case.law == "hetero":
        return line * np.exp(case.sigma * (0.5 + u / u.max()) * above)
    if case.law == "additive":
        return np.maximum(line + case.sigma * line.mean() * above, 0.05 * line)
    shape = 1 / case.sigma**2
    return line * stats.gamma.ppf(stats.norm.cdf(z), shape) / stats.gamma.ppf(TAU, shape)


def study(case: Case, simulations: int, seed: int) -> dict[str, float]:
    """Shares of simulations whose intervals hold the truth, and median widths relative to the line at mean u.

    The intervals are those that ``fit_quantile`` reports, without the linear programs of its point fit and held-out rate.
    """
    rng = np.random.default_rng(seed)
    hits, plain, widths = [], [], []
    for k in range(simulations):
        u = trajectory(case, rng)
        L = values(case, u, rng)
        truth = (case.L0, case.L1, case.L0 + case.L1 * u.mean())
        centre, half, _ = line_intervals(u, L, TAU, seed=k)
        found = [bounded_interval(c, h) for c, h in zip(centre, half)]
        hits.append([low <= t <= high for (low, high), t in zip(found, truth)])
        widths.append([(high - low) / truth[2] * scale for (low, high), scale in zip(found, (1.0, u.mean(), 1.0))])
        plain.append(percentile_covers(u, L, truth, rng))
    return {
        **dict(zip(("L0", "L1", "mean"), np.mean(hits, axis=0))),
        **dict(zip(("w0", "w1", "wm"), np.median(widths, axis=0))),
        **dict(zip(("p0", "p1", "pm"), np.mean(plain, axis=0))),
    }


def percentile_covers(u: np.ndarray, L: np.ndarray, truth: tuple[float, ...], rng: np.random.Generator) -> list[bool]:
    """The textbook interval: 2.5 and 97.5 % points of 400 moving-block resamples."""
    i, j = np.triu_indices(len(u), 1)
    b = (L[j] - L[i]) / (u[j] - u[i])
    a = L[i] - b * u[i]
    r = L - a[:, None] - b[:, None] * u
    best = (block_weights(len(u), 400, rng) @ np.maximum(TAU * r, (TAU - 1) * r).T.astype(np.float32)).argmin(axis=1)
    lines = (a[best], b[best], a[best] + b[best] * u.mean())
    return [bool(np.quantile(x, 0.025) <= t <= np.quantile(x, 0.975)) for x, t in zip(lines, truth)]


def envelope_study(case: Case, simulations: int, seed: int) -> tuple[float, float, float, float]:
    """How often the held-out rate's interval holds the true chance that a fresh point at the same u lies above the full fit."""
    rng = np.random.default_rng(seed)
    hits, rates, truths = [], [], []
    for _ in range(simulations):
        u = trajectory(case, rng)
        fit = smoothness.fit_envelope(u, values(case, u, rng))
        fresh = np.concatenate([values(case, u, rng) > fit.L0 + fit.L1 * u for _ in range(20)])
        truths.append(fresh.mean())
        rates.append(fit.violation_rate)
        hits.append(fit.violation_interval[0] <= truths[-1] <= fit.violation_interval[1])
    return float(np.mean(hits)), float(np.mean(rates)), float(np.mean(truths)), 2 / (case.n + 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--simulations", type=int, default=2000)
    parser.add_argument("--points", type=int, default=30)
    parser.add_argument("--more-points", type=int, nargs="*", default=[60], help="for the cases at the edges")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    edges = ("independent", "0.5", "boundary")
    cases = [replace(c, n=args.points) for c in CASES]
    cases += [replace(c, n=n) for n in args.more_points for c in CASES if any(part in c.name for part in edges)]
    standard_error = np.sqrt(0.95 * 0.05 / args.simulations)
    lines = [
        "| case | n | L0 | L1 | line at mean u | plain percentile (L0, L1, line) | width of L0, L1 ū, line |",
        "|---|---|---|---|---|---|---|",
    ]
    for case in cases:
        started = time.process_time()
        s = study(case, args.simulations, seed=1)
        lines.append(
            f"| {case.name} | {case.n} | {s['L0']:.3f} | {s['L1']:.3f} | {s['mean']:.3f} "
            f"| {s['p0']:.2f}, {s['p1']:.2f}, {s['pm']:.2f} | {s['w0']:.2f}, {s['w1']:.2f}, {s['wm']:.2f} |"
        )
        print(lines[-1], f"{time.process_time() - started:.0f} s", file=sys.stderr, flush=True)
    lines += ["", "| envelope: case | n | interval covers | held-out rate | true rate of the full fit | 2/(n+1) |"]
    lines += ["|---|---|---|---|---|---|"]
    for case in cases:
        covers, rate, truth, bound = envelope_study(case, max(100, args.simulations // 4), seed=2)
        lines.append(f"| {case.name} | {case.n} | {covers:.3f} | {rate:.3f} | {truth:.3f} | {bound:.3f} |")
        print(lines[-1], file=sys.stderr, flush=True)
    head = f"{args.simulations} simulations a row: one standard error of a coverage near 0.95 is {standard_error:.4f}."
    report = "\n".join([head, "", *lines])
    if args.out:
        text = args.out.read_text() if args.out.exists() else "<!-- table -->\n"
        before = text.split("<!-- table -->")[0]
        args.out.write_text(f"{before}<!-- table -->\n{report}\n")
    else:
        print(report)


if __name__ == "__main__":
    main()
