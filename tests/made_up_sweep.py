"""The records of a sweep without its runs: every loss is a function of the line, the rates and the seed."""

from __future__ import annotations

import json
import math

from probes import records as R
from probes.sweep_lines import Lines
from probes.sweep_work import work

TASK = R.SweepTask(
    "a", 0, "m", "0" * 64, "Made", "float32", "made-up", "1" * 64, 8, 80.0, "nats", {"type": "lora", "rank": 4, "scale": 2.0},
    {"base": 100, "peft": 10},
)  # fmt: skip


def made_up_cell(f, final: float, spent: int = 8) -> R.Cell:
    ended = math.isfinite(final)
    loss = [2 - (2 - min(final, 9)) * k / 4 for k in (1, 2, 3, 4)]
    return R.Cell(
        f.id, **f.fields, ran=f.settings.method,
        status="finished" if ended else "diverged", step=4, forwards=8, backwards=0, equivalents=spent, tokens=80, start=2.0, final=final,
        curve={"step": [1, 2, 3, 4], "loss": loss, "equivalents": [2, 4, 6, 8], "tokens": [20, 40, 60, 80]},
        scores={"step": [0, 4], "loss": [2.0, final]}, held_out=None, weights_sha256=None, seconds=1.0, clock=[1, 2, 3, 4],
    )  # fmt: skip


def made_up(made, loss, entries=(), tasks=(TASK,), spent=lambda line: 8) -> list[R.Record]:
    """The records of a sweep whose runs end at loss(line, lr_base, lr_peft, seed), from 2.0; infinite: diverged. spent(line):
    forward-equivalents of a run.
    """
    found: list[R.Cell] = []
    known = {(t.name, t.seed): t for t in tasks}
    while True:
        lines = Lines(made, found, entries)
        asked = [(s, p) for x in lines.all_lines() if (s := lines.state(x)) is not None for p in s.next_places()]
        if not asked:
            break
        for state, place in asked:
            for seed in state.line.seeds:
                f = work(made, known, state, place, seed)
                final = loss(state.line, *(x or 0.0 for x in state.rates(place)), seed)
                found.append(made_up_cell(f, final, spent(state.line)))
    options = made.options()
    head = R.Header(
        "sweep", 0, R.ModelInfo("m", "", 0), R.DataInfo("d", ""), [], options=json.loads(json.dumps(options))
    )
    return [head, *tasks, *found, R.End("finished")]
