"""A sweep as its header keeps it: tasks and lines. No torch here: reports and figures read sweeps where it is not.

A *line* is a one-dimensional sweep: one task, method, axis and horizon. Its *cells* are training runs: a place on the line, and a seed.

    axis      lr_base        lr_peft        place
    base      place          0              the rate (methods that move the base alone have no lr_peft)
    peft      0              place          the rate
    scale     place B        place P        factor on both; B and P are the optima of the base and peft lines
    ratio     c B/√place     c P √place     factor on P/B, at the best scale c
    fixed     given          given          1
    predicted predicted      predicted      1 (added where rates were predicted)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from hybridtheory.errors import UserError
from probes.sweep_grid import Grid

UNITS = {"steps": "steps", "budget": "forward-equivalents", "tokens": "tokens", "seconds": "seconds of steps"}


def in_words(horizon: str, amount: float) -> str:
    """("budget", 80) as "80 forward-equivalents"."""
    return f"{amount:g} {UNITS[horizon]}"


@dataclass(frozen=True)
class Source:
    """What a task is loaded from. reseed: every seed of the runs draws its own rows and adapter, not those of ``seed`` alone."""

    name: str
    model: str | None
    data: str | None
    seed: int
    reseed: bool
    loading: dict[str, Any]

    def seed_of(self, run: int) -> int:
        return run if self.reseed else self.seed


@dataclass(frozen=True)
class Line:
    """A one-dimensional sweep. train: settings of its runs; rates: given rates of the axis "fixed"; grid: None there.

    groups  what the method moves: "base", "peft".
    plain   whether its steps are those that the rules of probes are about, for all of these groups.
    """

    task: str
    method: str
    axis: str
    horizon: str
    amount: float
    seeds: tuple[int, ...]
    groups: tuple[str, ...]
    plain: bool
    train: dict[str, Any]
    grid: Grid | None
    rates: dict[str, float] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, str, str, str, float]:
        return self.task, self.method, self.axis, self.horizon, self.amount

    @property
    def until(self) -> str:
        """What a run of it lasts, in words."""
        return in_words(self.horizon, self.amount)


@dataclass(frozen=True)
class Study:
    """A whole sweep: what its header keeps, so that a resumed sweep is the same one.

    threads     of torch in every run, whatever n_jobs is: numbers depend on it.
    checkpoint  steps between checkpoints of a run, so that a slice may end inside it; None: runs are repeated from their start.
    target      share of the best method's decrease of the loss that the time to a target is counted to.
    """

    sources: tuple[Source, ...]
    lines: tuple[Line, ...]
    threads: int = 1
    checkpoint: int | None = None
    target: float = 0.5

    def options(self) -> dict[str, Any]:
        """The header's options: everything that changes a number or what is run."""
        found = asdict(self)
        found.pop("checkpoint")
        return found


def from_options(options: Mapping[str, Any]) -> Study:
    """The study that a header's options are of. UserError where they are of no sweep, or of another version's."""
    try:
        return Study(
            tuple(Source(**s) for s in options["sources"]), tuple(_line(x) for x in options["lines"]), options["threads"], None,
            options["target"],
        )  # fmt: skip
    except (KeyError, TypeError) as error:
        raise UserError(
            f"these records are of no sweep that this version reads ({error}): read them with the version in their header"
        ) from None


def _line(kept: Mapping[str, Any]) -> Line:
    grid = Grid(**kept["grid"]) if kept["grid"] else None
    return Line(**{**kept, "seeds": tuple(kept["seeds"]), "groups": tuple(kept["groups"]), "grid": grid})
