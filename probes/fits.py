"""Points and secants -> (L0, L1) per block: spectral and secant evidence apart, upper envelope and quantile line, both arguments."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from hybridtheory.errors import UserError
from hybridtheory.smoothness import Smoothness, fit_envelope, fit_quantile
from probes.records import Fit, Point, Secant, Warning


def fits(points: Sequence[Point], secants: Sequence[Secant], seed: int) -> Iterator[Fit | Warning]:
    """Every fit that the evidence allows, and a Warning for each block whose evidence does not allow one."""
    for name in {b: None for p in points for b in p.blocks}:
        yield from _block(name, points, secants, seed)


def _block(name: str, points: Sequence[Point], secants: Sequence[Secant], seed: int) -> Iterator[Fit | Warning]:
    """The argument is the norm of the full gradient; with the block's own norm the hypothesis is the stronger one."""
    spectral = [
        (p.grad_norm, p.blocks[name].grad_norm, max(abs(b.lam_max.value), abs(b.lam_min.value)))
        for p in points
        if (b := p.blocks.get(name)) is not None and b.lam_max is not None and b.lam_min is not None
    ]
    along = [(s.grad_norm, s.block_grad_norm, s.L_block) for s in secants if s.block == name and s.L_block is not None]
    for data, rows in (("spectral", spectral), ("secant", along)):
        for column, argument in ((0, "full"), (1, "block")):
            kept = [(r[column], r[2]) for r in rows if r[column] > 0]
            if len(kept) < 3:
                if argument == "full" and rows:
                    yield Warning(f"{name}: {len(kept)} {data} points are too few for a line; 3 are needed", name)
                continue
            u, L = [k[0] for k in kept], [k[1] for k in kept]
            for method in ("envelope", "quantile"):
                try:
                    found = fit_envelope(u, L) if method == "envelope" else fit_quantile(u, L, seed=seed)
                except UserError as error:
                    if argument == "full":
                        yield Warning(f"{name}, {data} {method}: {error}", name)
                    continue
                yield _record(name, data, method, argument, found)


def _record(name: str, data: Any, method: Any, argument: Any, found: Smoothness) -> Fit:
    return Fit(
        block=name, data=data, method=method, argument=argument, L0=found.L0, L1=found.L1, n=found.n, span=found.span,
        identified=found.identified, L0_interval=found.L0_interval, L1_interval=found.L1_interval,
        violation_rate=found.violation_rate, violation_interval=found.violation_interval, note=found.note,
    )  # fmt: skip
