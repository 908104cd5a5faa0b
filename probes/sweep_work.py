"""From lines to work: the cells that are needed next, with the settings of their runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from hybridtheory.optimizers import METHODS
from probes.records_sweep import Cell, SweepTask
from probes.sweep_cell import Work, identity
from probes.sweep_description import settings_of
from probes.sweep_lines import Lines, State
from probes.sweep_study import Line, Study
from probes.train_settings import TrainSettings

Tasks = Mapping[tuple[str, int], SweepTask]

# Where one rate is zero, the half that moves takes the same steps and ends with the same weights, without the other half's evaluations.
_HALVES: dict[tuple[str, str], tuple[str, dict[str, Any]]] = {
    ("hybrid", "base"): ("mezo", {"difference": "forward"}),
    ("hybrid-two-sided", "base"): ("mezo", {}),
    ("hybrid-adamw", "base"): ("mezo", {"difference": "forward"}),
    ("hybrid-sequential", "base"): ("mezo", {"difference": "forward"}),
    ("hybrid-subzero", "base"): ("subzero", {"difference": "forward"}),
    ("hybrid-lozo", "base"): ("lozo", {"difference": "forward"}),
    **{
        (m, "peft"): ("peft-adamw" if m == "hybrid-adamw" else "peft-sgd", {})
        for m in METHODS
        if m.startswith("hybrid")
    },
}


def needed(
    study: Study, tasks: Tasks, cells: Iterable[Cell], entries: tuple[Mapping[str, Any], ...], task: str, **where: Any
) -> list[Work]:
    """What the lines of one task need now, in a fixed order. Empty: the task is done."""
    lines, found = Lines(study, cells, entries), []
    for line in lines.all_lines():
        state = lines.state(line) if line.task == task else None
        if state is None:
            continue
        for place in state.next_places():
            for seed in line.seeds:
                if seed not in state.cells.get(place, {}):
                    found.append(work(study, tasks, state, place, seed, **where))
    return found


def work(study: Study, tasks: Tasks, state: State, place: float, seed: int, **where: Any) -> Work:
    """The work of one cell; ``where``: folder and until."""
    line = state.line
    source = next(s for s in study.sources if s.name == line.task)
    base, peft = state.rates(place)
    settings = half(line, settings_of(line, base, peft, seed))
    if study.checkpoint is not None:
        settings = replace(settings, checkpoint_every=study.checkpoint)
    task = tasks[source.name, source.seed_of(seed)]
    fields = {
        "task": line.task, "method": line.method, "axis": line.axis, "horizon": line.horizon, "amount": line.amount, "place": place,
        "lr_base": base, "lr_peft": peft, "seed": seed, "around": state.around,
    }  # fmt: skip
    return Work(identity(task, settings, study.threads), source, task, settings, fields, study.threads, **where)


def half(line: Line, settings: TrainSettings) -> TrainSettings:
    """The settings of the half that moves, on the lines where the other rate is zero. Only under a budget of steps: under
    another one the halves, which cost less, would take more steps than the method."""
    found = _HALVES.get((line.method, line.axis))
    if found is None or line.horizon != "steps" or settings.options:
        return settings
    method, options = found
    fo = METHODS[method].kind == "fo"
    return replace(
        settings, method=method, options=options, lr_base=None if fo else settings.lr_base, lr_peft=settings.lr_peft if fo else None,
        law=None if fo else settings.law,
    )  # fmt: skip
