"""The lines of a sweep as far as they were run: scores, optimum, boundary, and which cells come next.

Everything is a pure function of the study and of the finished cells, so a resumed sweep asks for what an uninterrupted one would have
asked for. What a joint line goes around is settled when it begins and read from its cells from then on. No model here: reports and
figures read lines where torch is not.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from hybridtheory.optimum import Optimum, boundary, ceiling, clipped, optimum
from probes.records import Warning
from probes.records_sweep import Cell
from probes.sweep_grid import Score, best_of, canonical, edge, ends, wanted
from probes.sweep_study import Line, Study

ENDED = ("finished", "budget")
JOINT = ("scale", "ratio")
CENTRES = "centres of joint lines"  # what the warning of `Lines.warnings` is about


@dataclass(frozen=True)
class Place:
    """A point of a line: the rates of its cells, and the cells by seed as far as they were run."""

    place: float
    lr_base: float | None
    lr_peft: float | None
    cells: dict[int, Cell]

    @property
    def diverged(self) -> bool:
        return any(c.status not in ENDED for c in self.cells.values())

    @property
    def final(self) -> float:
        """Mean over seeds; not finite where one diverged."""
        return float(np.mean([c.final for c in self.cells.values()]))

    @property
    def spent(self) -> float:
        """Forward-equivalents of a run, mean over seeds: under a budget a run ends with the step that reaches it."""
        return float(np.mean([c.equivalents for c in self.cells.values()]))

    @property
    def lost(self) -> dict[int, Cell]:
        """By seed, the runs that ended no lower than they began, or not at all."""
        return {s: c for s, c in self.cells.items() if not c.final < c.start}

    @property
    def blown(self) -> dict[int, Cell]:
        """Those of the lost runs that diverged or ended above `optimum.ceiling`."""
        return {s: c for s, c in self.lost.items() if c.status not in ENDED or not c.final <= ceiling(c.start)}


@dataclass
class State:
    """A line with what was run of it. around: (B, P, c), the rates and the scale that a joint line goes around; None on other lines."""

    line: Line
    cells: dict[float, dict[int, Cell]]  # by place and seed
    extra: tuple[float, ...] = ()
    around: tuple[float, float, float] | None = None

    def rates(self, place: float) -> tuple[float | None, float | None]:
        """(lr_base, lr_peft) at a place; None for a block that the method does not move."""
        axis, groups = self.line.axis, self.line.groups
        if axis in ("base", "peft"):
            base, peft = (place, 0.0) if axis == "base" else (0.0, place)
        elif axis in ("fixed", "predicted"):
            base, peft = (self.line.rates.get(g, 0.0) for g in ("base", "peft"))
        else:
            assert self.around is not None
            b, p, c = self.around
            spread = math.sqrt(place) if axis == "ratio" else 1.0
            scale = place if axis == "scale" else c
            base, peft = canonical(scale * b / spread), canonical(scale * p * spread)
        return base if "base" in groups else None, peft if "peft" in groups else None

    @cached_property
    def start(self) -> float:
        """Mean loss before the first step; infinite while no cell was run."""
        found = [c.start for by in self.cells.values() for c in by.values()]
        return float(np.mean(found)) if found else math.inf

    @cached_property
    def whole(self) -> list[Place]:
        """Places at which every seed was run, in increasing order, with the rates that were run: where a joint line goes around another
        optimum today than it did then, its places mean other rates.
        """
        full = [(p, by) for p, by in sorted(self.cells.items()) if all(s in by for s in self.line.seeds)]
        found = []
        for p, by in full:
            cells = {s: by[s] for s in self.line.seeds}
            run = cells[self.line.seeds[0]]
            found.append(Place(p, run.lr_base, run.lr_peft, cells))
        return found

    @cached_property
    def known(self) -> dict[float, Score]:
        if not self.whole:
            return {}
        losses = clipped(self.finals, self.start).mean(axis=0)
        return {p.place: Score(float(loss), p.diverged) for p, loss in zip(self.whole, losses)}

    @property
    def finals(self) -> np.ndarray:
        """(seeds, places): losses at the end."""
        return np.array([[c.final for c in p.cells.values()] for p in self.whole]).T

    def next_places(self) -> list[float]:
        """Places that are needed now; those of a round that was begun come first. Empty: the line is done."""
        begun = [p for p in sorted(self.cells) if any(s not in self.cells[p] for s in self.line.seeds)]
        if self.line.grid is None:
            return [] if 1.0 in {p.place for p in self.whole} else [1.0]
        asked = wanted(self.line.grid, self.known, self.start, self.extra)
        return [*begun, *(p for p in asked if p not in begun)]

    @property
    def done(self) -> bool:
        return bool(self.cells) and not self.next_places()

    @cached_property
    def optimum(self) -> Optimum | None:
        """None while fewer than 3 places are whole, and on lines without a grid."""
        if self.line.grid is None or len(self.whole) < 3:
            return None
        return optimum([p.place for p in self.whole], self.finals, self.start)

    @property
    def best(self) -> Place | None:
        """The place of the least mean loss."""
        known = self.known
        return next((p for p in self.whole if p.place == best_of(known)), None) if known else None

    @property
    def boundary(self) -> tuple[float | None, float | None]:
        return boundary([p.place for p in self.whole], [p.diverged for p in self.whole])

    @property
    def at_edge(self) -> str:
        """A sentence where the best place lies on the edge of a grid that may not be extended any more."""
        grid, known = self.line.grid, self.known
        if grid is None or not known or not self.done:
            return ""
        side = edge(known, self.start)
        if not side:
            return ""
        low, high = ends(grid, known)
        made = grid.first[0] - low if side == "lowest" else high - grid.first[-1]
        return f"the best place is the {side} of the grid, after {made} of at most {grid.extensions} extensions on that side"


@dataclass
class Lines:
    """All lines of a study with their cells. predicted: by (task, horizon, amount), the entry of the rule that is scored."""

    study: Study
    cells: Iterable[Cell]
    entries: tuple[Mapping[str, Any], ...] = ()
    _by: dict[tuple[Any, ...], dict[float, dict[int, Cell]]] = field(init=False)

    def __post_init__(self) -> None:
        self._by = {}
        for c in self.cells:
            line = self._by.setdefault((c.task, c.method, c.axis, c.horizon, c.amount), {})
            line.setdefault(c.place, {})[c.seed] = c

    def state(self, line: Line) -> State | None:
        """None where the line must wait for others: a joint line for the optima that it goes around."""
        around = None
        if line.axis in JOINT:
            around = self._around(line)
            if around is None:
                return None
        return State(line, self._by.get(line.key, {}), self._extra(line, around), around)

    def states(self) -> list[State]:
        """Of every line that was begun."""
        found = [self.state(line) for line in self.all_lines()]
        return [s for s in found if s is not None and s.cells]

    def all_lines(self) -> list[Line]:
        """The study's lines, and one with both predicted rates for every method that a prediction is of."""
        more = []
        for line in self.study.lines:
            entry = self.scored(line)
            if entry is None or line.axis != "scale":
                continue
            rates = {g: entry[g]["value"] for g in ("base", "peft") if entry.get(g) and entry[g]["value"]}
            if len(rates) == 2:
                rates = {g: canonical(r) for g, r in rates.items()}
                more.append(replace(line, axis="predicted", grid=None, rates=rates))
        return [*self.study.lines, *more]

    def predictions(self, line: Line) -> list[Mapping[str, Any]]:
        """Entries about this line's task and horizon, for methods whose steps the rules are about."""
        if not line.plain:
            return []
        steps = line.amount if line.horizon == "steps" else None
        return [e for e in self.entries if e["task"] == line.task and e.get("steps") in (None, steps)]

    def scored(self, line: Line) -> Mapping[str, Any] | None:
        """The prediction that is held to account."""
        return next((e for e in self.predictions(line) if e["scored"]), None)

    def predicted(
        self, line: Line, entry: Mapping[str, Any], around: tuple[float, float, float] | None
    ) -> tuple[float, Any] | None:
        """(place, interval) of an entry on this line."""
        found = entry.get({"base": "base", "peft": "peft", "ratio": "ratio"}.get(line.axis, ""))
        if not found or not found["value"]:
            return None
        unit = around[1] / around[0] if line.axis == "ratio" and around else 1.0
        interval = [v / unit for v in found["interval"]] if found.get("interval") else None
        return found["value"] / unit, interval

    def _extra(self, line: Line, around: tuple[float, float, float] | None) -> tuple[float, ...]:
        entry = self.scored(line)
        found = self.predicted(line, entry, around) if entry is not None and line.grid is not None else None
        return (canonical(found[0]),) if found else ()

    def warnings(self) -> list[Warning]:
        """One, where cells of an older version do not say what their line goes around."""
        joint = [x for x in self.study.lines if x.axis in JOINT]
        silent = [x for x in joint if (run := self._run(x)) and all(c.around is None for c in run)]
        listed = ", ".join(f"{x.task} {x.method} {x.until} {x.axis}" for x in silent)
        text = (
            f"runs of {len(silent)} joint line{'s'[: len(silent) != 1]} do not say which rates their places are factors on, as an older "
            f"version wrote them ({listed}): those are today's optima, or what was run, where today's optima are others"
        )
        return [Warning(text, CENTRES)] if silent else []

    def _run(self, line: Line) -> list[Cell]:
        return [c for by in self._by.get(line.key, {}).values() for c in by.values()]

    def _around(self, line: Line) -> tuple[float, float, float] | None:
        """What a joint line goes around: today's optima where it has not begun, and what it began with where it has.

        Today's optima may be others than those of the day on which the line began, since the code that finds them changes: the cells to
        come would then be run at other rates than their places say.
        """
        run = self._run(line)
        said = next((c.around for c in run if c.around is not None), None)
        if said is not None:
            return said
        today = self._optima(line)
        if not run:
            return today
        if today is not None:
            state = State(line, {}, around=today)
            if all(state.rates(c.place) == (c.lr_base, c.lr_peft) for c in run):
                return today
        first = run[0]
        assert first.lr_base is not None and first.lr_peft is not None  # a joint line has both
        if line.axis == "scale":
            return canonical(first.lr_base / first.place), canonical(first.lr_peft / first.place), 1.0
        spread = math.sqrt(first.place)
        return canonical(first.lr_base * spread), canonical(first.lr_peft / spread), 1.0

    def _optima(self, line: Line) -> tuple[float, float, float] | None:
        """Of the lines that a joint line goes around; None while one of them is not done."""
        found = []
        for axis in ("base", "peft", *(["scale"] if line.axis == "ratio" else [])):
            other = next(
                x for x in self.study.lines if x.key == (line.task, line.method, axis, line.horizon, line.amount)
            )
            state = self.state(other)
            if state is None or not state.done or state.optimum is None:
                return None
            # Where no optimum is identified its best rate stands in: a joint sweep around it is as good as any.
            found.append(canonical(state.optimum.rate if state.optimum.identified else state.optimum.best))
        return found[0], found[1], found[2] if len(found) > 2 else 1.0
