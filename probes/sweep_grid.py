"""Which rates a one-dimensional sweep still needs: a pure function of what it has, so a resumed sweep goes on as it would have.

A grid of factor 3 is extended where the best rate lies on its edge, and upward until some rate diverges, at most ``extensions`` times
a side; then it is refined next to the best rate until both neighbours are within a factor 1.5.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hybridtheory.errors import UserError

NEAR = 1.02  # two rates within 2 % are one


@dataclass(frozen=True)
class Grid:
    """``points`` rates a ``factor`` apart around ``centre``.

    boundary  also go up until a rate diverges, so that the boundary is bracketed.
    """

    centre: float
    points: int = 5
    factor: float = 3.0
    refine: float = 1.5
    extensions: int = 4
    boundary: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.centre < math.inf:
            raise UserError(f"the centre of a grid is a positive learning rate, not {self.centre}")
        if not (self.points >= 3 and self.extensions >= 0 and 1 < self.refine <= self.factor < math.inf):
            raise UserError(
                f"a grid has at least 3 points, 1 < refine <= factor and extensions >= 0, not points = {self.points}, "
                f"refine = {self.refine:g}, factor = {self.factor:g}, extensions = {self.extensions}"
            )

    def rate(self, i: int) -> float:
        return canonical(self.centre * self.factor**i)

    @property
    def first(self) -> range:
        """Places of the first points; the centre is 0."""
        return range(-((self.points - 1) // 2), self.points // 2 + 1)


@dataclass(frozen=True)
class Score:
    """What the runs at one rate gave: the mean over seeds of `hybridtheory.optimum.clipped` losses, and whether any diverged."""

    loss: float
    diverged: bool


def canonical(rate: float) -> float:
    """Six significant digits: the same rate has the same bits however it was computed."""
    return float(f"{rate:.6g}")


def wanted(grid: Grid, known: Mapping[float, Score], start: float, extra: Sequence[float] = ()) -> list[float]:
    """The rates to run next, empty when the grid is done.

    known  by rate. Once it holds the first points, one rate is asked for at a time: of two that are asked for together the second
           could be one that the result of the first makes needless, and a sweep that is resumed between them would not run it.
    start  the loss before the first step.
    extra  rates that are run whatever the grid does (predictions).
    """
    missing = [r for r in (*(grid.rate(i) for i in grid.first), *extra) if r not in known]
    return list(dict.fromkeys(missing)) or (_extension(grid, known, start) or _refinement(grid, known, start))[:1]


def ends(grid: Grid, known: Mapping[float, Score]) -> tuple[int, int]:
    """Places of the lowest and the highest point of the coarse grid, as far as it was extended."""
    low, high = grid.first[0], grid.first[-1]
    while grid.rate(low - 1) in known and grid.first[0] - low < grid.extensions:
        low -= 1
    while grid.rate(high + 1) in known and high - grid.first[-1] < grid.extensions:
        high += 1
    return low, high


def best_of(known: Mapping[float, Score]) -> float:
    """The rate of the least loss; the highest of equals, since rates too small to move anything are equal."""
    return min(sorted(known, reverse=True), key=lambda r: known[r].loss)


def _extension(grid: Grid, known: Mapping[float, Score], start: float) -> list[float]:
    best, (low, high), side = best_of(known), ends(grid, known), edge(known, start)
    gained, found = known[best].loss < start, []
    if (side == "lowest" or (gained and best <= grid.rate(low))) and grid.first[0] - low < grid.extensions:
        found.append(grid.rate(low - 1))
    quiet = grid.boundary and not any(s.diverged for s in known.values())
    if (quiet or side == "highest" or (gained and best >= grid.rate(high))) and high - grid.first[-1] < grid.extensions:
        found.append(grid.rate(high + 1))
    return [r for r in found if r not in known]


def _refinement(grid: Grid, known: Mapping[float, Score], start: float) -> list[float]:
    best, order = best_of(known), sorted(known)
    if known[best].loss >= start:
        return []
    k, found = order.index(best), []
    if k > 0 and best / order[k - 1] > grid.refine * NEAR:
        found.append(canonical(best / grid.refine))
    if k < len(order) - 1 and order[k + 1] / best > grid.refine * NEAR:
        found.append(canonical(best * grid.refine))
    return found


def edge(known: Mapping[float, Score], start: float) -> str:
    """ "lowest" or "highest" where the best rate is the last of the grid on that side, else "".

    Where no rate gains anything all are too large, or, if the lowest does not even lose, too small.
    """
    best, order = best_of(known), sorted(known)
    if known[best].loss >= start:
        return "lowest" if known[order[0]].loss > start else "highest"
    return {order[0]: "lowest", order[-1]: "highest"}.get(best, "")
