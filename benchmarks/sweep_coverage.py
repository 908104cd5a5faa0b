"""Coverage of a swept optimum's interval on simulated sweeps; writes docs/reports/sweep-coverage.md.

    OMP_NUM_THREADS=1 python benchmarks/sweep_coverage.py --sweeps 1000 --out docs/reports/sweep-coverage.md

The loss after 40 noisy steps on a quadratic of 29 eigenvalues 1/n is known for every learning rate, wall before divergence included. Each
seed has this curve, moved in log rate by a normal number of standard deviation s, with losses of noise n; the adaptive grid of hybrid-sweep
(`probes.sweep_grid.wanted`) asks for rates one by one from a centre within a factor 3 of the optimum, and `hybridtheory.optimum.optimum` is
asked for the optimum of the seeds' mean curve.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hybridtheory.optimum import LOST, Optimum, clipped, optimum
from probes.sweep_grid import Grid, Score, wanted

Array = NDArray[np.float64]
EIGENVALUES = 1 / np.arange(1, 30)
STEPS, ROWS_NOISE, CENTRE = 40, 0.05, 0.1
START = float(0.5 * EIGENVALUES.sum())
LEVELS = 0.05  # of the seeds' losses against each other, at every rate alike
SPREADS, NOISES, SEEDS = (0.05, 0.15, 0.3, 0.5), (0.001, 0.03, 0.1), (3, 5)


def curve(log_rate: Array) -> Array:
    """Expected loss after the run, in the shape of ``log_rate``; infinite where the run blows up."""
    rate = np.exp(np.asarray(log_rate))[..., None]
    # E|1 - rate a(u)|² of one coordinate: contraction, and the spill of a zeroth-order step from all the others
    factor = (1 - rate * EIGENVALUES) ** 2 + rate**2 * 0.02 * EIGENVALUES * EIGENVALUES.sum()
    with np.errstate(all="ignore"):
        series = np.where(np.abs(1 - factor) < 1e-9, STEPS, (1 - factor**STEPS) / (1 - factor))
        value: Array = 0.5 * (EIGENVALUES * (factor**STEPS + rate**2 * ROWS_NOISE * series)).sum(-1)
    return np.where(value > 2 * START + 1, np.inf, value)


def sweep(spread: float, noise: float, seeds: int, number: int) -> Optimum:
    """One simulated sweep."""
    rng = np.random.default_rng([number, seeds, round(1e4 * spread), round(1e4 * noise)])
    moved, level = rng.normal(0, spread, seeds), rng.normal(0, LEVELS, seeds)
    grid = Grid(centre=CENTRE * math.exp(rng.uniform(-1, 1) * math.log(3)))
    losses: dict[float, Array] = {}
    known: dict[float, Score] = {}
    while asked := wanted(grid, known, START):
        for rate in asked:
            losses[rate] = curve(math.log(rate) + moved) + level + rng.normal(0, noise, seeds)
        rates = sorted(losses)
        bounded = clipped(np.array([losses[r] for r in rates]).T, START).mean(axis=0)
        known = {r: Score(float(v), not np.isfinite(losses[r]).all()) for r, v in zip(rates, bounded, strict=True)}
    rates = sorted(losses)
    return optimum(rates, np.array([losses[r] for r in rates]).T, START)


def truth(spread: float) -> float:
    """The rate at which the mean over seeds, diverged runs counted as the analysis counts them, is least."""
    z = np.linspace(math.log(1e-3), math.log(4), 8000)
    nodes, weights = np.polynomial.hermite_e.hermegauss(61)
    lowest = float(curve(z).min())
    limit = START + LOST * (START - lowest)
    mean = sum(
        w * np.minimum(curve(z + spread * x), limit) for x, w in zip(nodes, weights / weights.sum(), strict=True)
    )
    return float(np.exp(z[int(np.argmin(mean))]))


def row(spread: float, noise: float, seeds: int, sweeps: int) -> str:
    target = truth(spread)
    found = [sweep(spread, noise, seeds, i) for i in range(sweeps)]

    def share(picked: list[Optimum]) -> str:
        if not picked:
            return "-"
        inside = [o.interval is not None and o.interval[0] <= target <= o.interval[1] for o in picked]
        return f"{np.mean(inside):.3f}"

    having, identified = [o for o in found if o.interval], [o for o in found if o.identified]
    off = np.exp(np.median([math.log(o.rate / target) for o in identified])) if identified else math.nan
    return (
        f"| {spread:g} | {noise:g} | {seeds} | {len(having) / sweeps:.2f} | {share(having)} | {len(identified) / sweeps:.2f} | "
        f"{share(identified)} | {off:.2f} |"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sweeps", type=int, default=1000)
    parser.add_argument("--out", type=Path)
    wanted_ = parser.parse_args()
    lines = [
        "# Coverage of swept optima on simulated sweeps",
        "",
        f"`python benchmarks/sweep_coverage.py --sweeps {wanted_.sweeps}`: {wanted_.sweeps} adaptive sweeps a row. s: standard deviation",
        "of the seeds' curves in log rate; n: noise of a loss (the curve falls from 1.98 to 0.2). Nominal 0.95; an interval wider than",
        "a factor 3 is not identified. A share p of N sweeps is known to sqrt(p (1 - p) / N).",
        "",
        "| s | n | seeds | has an interval | covers | identified | of those, covers | median estimate / truth |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for case in itertools.product(SPREADS, NOISES, SEEDS):
        lines.append(row(*case, wanted_.sweeps))
        print(lines[-1], flush=True)
    if wanted_.out:
        wanted_.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
