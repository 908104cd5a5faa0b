"""Predicted rates beside the swept ones: ratio, coverage, loss penalty, and where the prediction stands against divergence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from probes.sweep_grid import canonical
from probes.sweep_lines import Lines, Place, State

QUANTITY = {"base": "eta_base", "peft": "eta_peft", "ratio": "ratio", "predicted": "both rates"}
FACTOR = 2.0


@dataclass(frozen=True)
class Score:
    """One rule's prediction of one quantity. swept is the optimum and identified says whether it is one; ratio = predicted/swept.

    inside    the swept optimum lies in the prediction's own interval.
    penalty   (loss at the prediction - loss at the best place)/(decrease at the best place), both run; None: not run.
    diverges  the prediction is at or above the smallest rate that diverged; None between the two ends of the boundary.
    """

    task: str
    method: str
    horizon: str
    amount: float
    quantity: str
    rule: str
    where: str
    scored: bool
    predicted: float
    interval: tuple[float, float] | None
    swept: float | None
    swept_interval: tuple[float, float] | None
    identified: bool
    ratio: float | None
    within: bool | None
    inside: bool | None
    penalty: float | None
    diverges: bool | None


def unit(state: State) -> float:
    """What a place of this line is a multiple of: the ratio of both optima for the axis "ratio", else 1."""
    return state.around[1] / state.around[0] if state.line.axis == "ratio" and state.around else 1.0


def scores(lines: Lines) -> list[Score]:
    """Every rule on every line that it says something about."""
    found = []
    states = lines.states()
    for state in states:
        line = state.line
        if line.axis == "predicted":
            found += _joint(state, states)
        for entry in lines.predictions(line) if line.grid is not None else []:
            said = lines.predicted(line, entry, state.around)
            if said is None:
                continue
            place, ends = said
            best, k = state.optimum, unit(state)
            sure = best is not None and best.identified
            low, high = state.boundary
            diverges = (
                True if high is not None and place >= high else False if low is not None and place <= low else None
            )
            ratio = place / best.rate if best is not None else None
            found.append(
                Score(
                    line.task, line.method, line.horizon, line.amount, QUANTITY[line.axis], entry["rule"], entry.get("where", ""),
                    entry["scored"], place * k, (ends[0] * k, ends[1] * k) if ends else None,
                    best.rate * k if best else None, (best.interval[0] * k, best.interval[1] * k) if best and best.interval else None,
                    sure, ratio, (1 / FACTOR <= ratio <= FACTOR) if sure and ratio is not None else None,
                    (ends[0] <= best.rate <= ends[1]) if ends and best is not None and sure else None,
                    _penalty(state, state, place), diverges,
                )
            )  # fmt: skip
    return found


def _joint(state: State, states: Sequence[State]) -> list[Score]:
    """Both predicted rates at once, against the best place of the joint lines."""
    line = state.line
    same = [
        s
        for s in states
        if s.line.axis in ("scale", "ratio") and s.line.key[:2] + s.line.key[3:] == line.key[:2] + line.key[3:]
    ]
    bests = [(s.known[b.place].loss, s) for s in same if (b := s.best) is not None]
    if not bests or not state.whole:
        return []
    against = min(bests, key=lambda x: x[0])[1]
    return [
        Score(
            line.task, line.method, line.horizon, line.amount, QUANTITY["predicted"], "recommended", "run", True, 1.0, None, None, None,
            False, None, None, None, _penalty(against, state, 1.0), state.whole[0].diverged,
        )
    ]  # fmt: skip


def _penalty(against: State, state: State, place: float) -> float | None:
    best = against.best
    run: Place | None = next((p for p in state.whole if p.place == canonical(place)), None)
    if best is None or run is None or best.final >= against.start:
        return None
    return (run.final - best.final) / (against.start - best.final)
