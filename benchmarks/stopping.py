"""What looking at the spread costs: the rule that ends the directions of a one-step change, simulated; writes docs/reports/stopping.md.

    python benchmarks/stopping.py --out docs/reports/stopping.md

At the best step of a quadratic of effective rank r a sample is -1 + χ²_r/(2r): the skewer the fewer eigenvalues matter. Every simulated
stop draws a pilot and then as many as the rule asks for.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from hybridtheory.descent import AIM, PILOT, further
from hybridtheory.theory.descent import Mean, directions_needed
from probes.markdown import table

PRECISION, MOST, MEAN = 0.03, 4000, -0.5


def stop(rank: float, steadily: bool, rng: np.random.Generator) -> Mean:
    x = samples(rank, PILOT, rng)
    while True:
        wanted = further(mean(x), PRECISION, MOST) if steadily else directions_needed(mean(x), AIM * PRECISION, MOST)
        if wanted > len(x):
            x = np.concatenate([x, samples(rank, wanted - len(x), rng)])
            if steadily:
                continue
        return mean(x)


def samples(rank: float, n: int, rng: np.random.Generator) -> np.ndarray:
    return -1 + rng.chisquare(rank, n) / (2 * rank)


def mean(x: np.ndarray) -> Mean:
    return Mean(float(x.mean()), float(x.std(ddof=1)) / len(x) ** 0.5, len(x))


def row(rank: int, steadily: bool, simulations: int) -> list[str]:
    rng = np.random.default_rng(0)
    found = [stop(rank, steadily, rng) for _ in range(simulations)]
    value, error = (np.array([getattr(m, name) for m in found]) for name in ("value", "stderr"))
    missed = float((error > PRECISION * abs(value)).mean())
    numbers = np.array([m.n for m in found])
    return [
        str(rank), "looked at again" if steadily else "pilot", f"{numbers.mean():.0f} ({np.quantile(numbers, 0.95):.0f})",
        f"{(value.mean() - MEAN) / error.mean():+.2f}", f"{(abs(value - MEAN) < 1.96 * error).mean():.3f}",
        f"{value.std() / error.mean():.2f}", f"{missed:.1%}",
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--simulations", type=int, default=8000)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    head = [
        "effective rank", "number from", "directions (95 % below)", "mean off by", "95 % interval covers", "scatter/error",
        "error above 3 %",
    ]  # fmt: skip
    rows = [row(rank, steadily, args.simulations) for rank in (10, 30, 100, 300) for steadily in (False, True)]
    lines = [
        "# Stopping when the error is small enough", "",
        f"Mean one-step changes take a pilot of {PILOT} directions and then as many as a standard error of {PRECISION:.0%} needs. "
        "“Pilot”: its spread alone says how many. “Looked at again” (what is used): at most twice as many as there are, then the spread "
        "of all of them is asked. “Mean off by” and “scatter” are in units of the mean stated standard error.", "",
        *table(head, rows), "",
        f"{args.simulations:,} simulated stops a row: `python benchmarks/stopping.py --out docs/reports/stopping.md`.",
    ]  # fmt: skip
    text = "\n".join(lines) + "\n"
    if args.out:
        args.out.write_text(text, encoding="utf-8")
    print(text, end="")


if __name__ == "__main__":
    main()
