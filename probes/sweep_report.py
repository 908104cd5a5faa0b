"""Records of hybrid-sweep -> report.md, report.json and figures, and what the terminal shows. No model here."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from probes import jsonl, rundir
from probes.markdown import interval, number, percent, seconds, table
from probes.records import Header, Record, Warning
from probes.records_sweep import Cell, Predictions, SweepTask
from probes.sweep_compare import Compared, Table, over_tasks, tables
from probes.sweep_lines import Lines, State
from probes.sweep_scores import QUANTITY, Score, scores, unit
from probes.sweep_study import Study, from_options, in_words

T = TypeVar("T")
AXES = {
    "base": "η base (η PEFT = 0)", "peft": "η PEFT (η base = 0)", "scale": "scale of both", "ratio": "ratio PEFT/base",
    "fixed": "given rates", "predicted": "predicted rates",
}  # fmt: skip


class SweepReport:
    """A sweep, finished or not, read from its records."""

    def __init__(self, records: Sequence[Record]) -> None:
        self.records = records
        self.head = self.all(Header)[0]
        self.study: Study = from_options(self.head.options)
        self.registered = next(iter(self.all(Predictions)), None)
        self.cells = self.all(Cell)
        self.lines = Lines(self.study, self.cells, tuple(self.registered.entries) if self.registered else ())
        self.finished = rundir.finished(records)

    def all(self, kind: type[T]) -> list[T]:
        return [r for r in self.records if isinstance(r, kind)]

    @cached_property
    def states(self) -> list[State]:
        return self.lines.states()

    @cached_property
    def tables(self) -> list[Table]:
        return tables(self.states, self.study.target)

    @cached_property
    def scores(self) -> list[Score]:
        return scores(self.lines)

    @cached_property
    def warnings(self) -> list[str]:
        """Those of the sweep itself, and what the lines say of their cells where the sweep, not resumed since, could not."""
        told = self.all(Warning)
        about = {w.about for w in told}
        return [w.text for w in (*told, *(w for w in self.lines.warnings() if w.about not in about))]

    # ---- report.json ----

    def json(self) -> dict[str, Any]:
        """Everything that report.md says, as numbers."""
        return {
            "schema": 0, "probe": "sweep", "finished": self.finished, "cells": len(self.cells),
            "seconds": sum(c.seconds for c in self.cells), "tasks": [jsonl.plain(t) for t in self.all(SweepTask)],
            "predictions": {k: v for k, v in asdict(self.registered).items() if k != "entries"} if self.registered else None,
            "lines": [self._line(s) for s in self.states], "scores": [jsonl.plain(s) for s in self.scores],
            "methods": [self._table(t) for t in self.tables],
            "over_tasks": {m: {"share": v, "interval": jsonl.plain(i), "tasks": n} for m, (v, i, n) in over_tasks(self.tables).items()},
            "warnings": self.warnings,
        }  # fmt: skip

    def _line(self, state: State) -> dict[str, Any]:
        line, best, k = state.line, state.optimum, unit(state)
        found = {n: getattr(line, n) for n in ("task", "method", "axis", "horizon", "amount", "seeds")}
        found |= {"unit": k, "start": state.start, "done": state.done, "edge": state.at_edge, "around": state.around}
        found |= {"optimum": asdict(best) if best else None, "boundary": state.boundary}
        places = [
            {
                "place": p.place, "lr_base": p.lr_base, "lr_peft": p.lr_peft, "final": p.final, "diverged": p.diverged,
                "finals": [c.final for c in p.cells.values()],
            } for p in state.whole
        ]  # fmt: skip
        return jsonl.plain({**found, "places": places})  # type: ignore[no-any-return]

    def _table(self, found: Table) -> dict[str, Any]:
        rows = []
        for row in found.rows:
            kept = {k: v for k, v in vars(row).items() if k != "place"}
            rows.append(
                {**kept, "lr_base": row.place.lr_base, "lr_peft": row.place.lr_peft, "seeds": list(row.place.cells)}
            )
        return jsonl.plain({**{k: v for k, v in vars(found).items() if k != "rows"}, "rows": rows})  # type: ignore[no-any-return]

    def summary(self) -> list[str]:
        """A line for every swept line, the best method of every table, and the warnings."""
        out = []
        for s in self.states:
            best, k = s.optimum, unit(s)
            if best is None:
                continue
            where = f"{s.line.task}, {s.line.method}, {s.line.until}: {AXES[s.line.axis]}"
            ends = f" ({interval((best.interval[0] * k, best.interval[1] * k))})" if best.interval else ""
            sure = (
                f"{number(best.rate * k)}{ends}"
                if best.identified
                else f"not identified, best run {number(best.best * k)}"
            )
            high = s.boundary[1]
            out.append(f"{where} {sure}" + (f"; diverges at {number(high * k)}" if high else ""))
        for t in self.tables:
            ranked = [r.method for r in t.rows if r.ranked]
            out.append(
                f"{t.task}, {in_words(t.horizon, t.amount)}: "
                + (" < ".join(ranked) or "no method moved by five standard errors")
            )
        return [*out, *(f"warning: {text}" for text in self.warnings)]

    # ---- report.md ----

    def text(self) -> str:
        parts = [self.opening(), self.rates(), self.predicted(), self.methods(), self.across(), self.repeat()]
        return "\n".join(x for part in parts for x in part).rstrip() + "\n"

    def opening(self) -> list[str]:
        out = [f"# Sweep of {', '.join(s.name for s in self.study.sources)}", ""]
        if not self.finished:
            out += ["**This sweep is not finished: what follows is what was run until now.**", ""]
        seeds = sorted({x for line in self.study.lines for x in line.seeds})
        out.append(
            f"{len(self.cells)} training runs on {len(self.states)} line{'s'[: len(self.states) != 1]}, "
            f"seeds {', '.join(map(str, seeds))}, {seconds(sum(c.seconds for c in self.cells))} of runs. "
            "Loss: of the same training rows before and after each run. "
            "Rows and adapter initialisation are the same in every run of a task; a seed draws the order of rows and the directions."
        )
        if again := [s.name for s in self.study.sources if s.reseed]:
            out[-1] += f" Not so in {', '.join(again)}: there a seed draws rows and adapter as well."
        for t in self.all(SweepTask):
            adapter = (
                f"{t.peft.get('type')}" + (f" r = {t.peft['rank']}" if t.peft.get("rank") else "")
                if t.peft
                else "no adapter"
            )
            sizes = f"d base = {t.d['base']:,}, d PEFT = {t.d['peft']:,}"
            out.append(
                f"- **{t.name}**: {t.model} ({t.architecture}, {t.dtype}), {adapter}, {sizes}; {t.rows} rows of {t.data}."
            )
        return [*out, "", *(x for text in self.warnings for x in (f"**Warning:** {text}.", ""))]

    def rates(self) -> list[str]:
        states = [s for s in self.states if s.line.grid is not None and s.whole]
        if not states:
            return []
        out = ["## Swept rates", ""]
        rows = []
        for s in states:
            best, k = s.optimum, unit(s)
            low, high = s.boundary
            if best is None:
                value = "fewer than 3 places yet"
            elif best.identified and best.interval:
                value = f"**{number(best.rate * k)}** ({interval((best.interval[0] * k, best.interval[1] * k))})"
            else:
                value = f"not identified (best run {number(best.best * k)}): {best.note}"
            bound = (
                f"{number(low and low * k)} | {number(high and high * k)}".replace("|", "to") if high else "none found"
            )
            loss = _loss(s)
            rows.append(
                [s.line.task, s.line.method, s.line.until, AXES[s.line.axis], value, loss, bound, str(len(s.whole))]
            )
        head = [
            "task",
            "method",
            "budget",
            "swept",
            "optimum (95 % over seeds)",
            "loss at the best",
            "diverges between",
            "places",
        ]
        out += table(head, rows)
        out += [
            "Optimum: a parabola in log rate; *not identified*: its interval is wider than a factor 3, or there is none. "
            "Diverges between: the largest rate at which every seed ends finite, and the smallest at which some seed diverges.",
            "",
        ]
        edges = [f"- {s.line.task}, {s.line.method}, {AXES[s.line.axis]}: {s.at_edge}." for s in states if s.at_edge]
        return [*out, *(["**At the edge of their grid:**", "", *edges, ""] if edges else [])]

    def predicted(self) -> list[str]:
        if self.registered is None or not self.scores:
            return []
        out = ["## Predicted and swept", ""]
        r = self.registered
        out += [f"`{r.path}`, sha256 `{r.sha256[:16]}…`, committed as `{r.commit[:12]}` before the sweep.", ""]
        rows = []
        for s in sorted(
            self.scores,
            key=lambda s: (s.task, s.method, s.amount, list(QUANTITY.values()).index(s.quantity), not s.scored),
        ):
            rule = f"**{s.rule}**" if s.scored else f"{s.rule} ({s.where})"
            swept = "–" if s.swept is None else number(s.swept) + ("" if s.identified else " (not identified)")
            verdict = {True: "diverges", False: "", None: ""}[s.diverges]
            joint = s.quantity == QUANTITY["predicted"]
            rows.append([
                s.task, in_words(s.horizon, s.amount), s.quantity, rule,
                "–" if joint else number(s.predicted) + (f" ({interval(s.interval)})" if s.interval else ""), swept,
                number(s.ratio), {True: "yes", False: "no", None: "–"}[s.within], {True: "yes", False: "no", None: "–"}[s.inside],
                percent(s.penalty) if s.penalty is None or abs(s.penalty) < 10 else "over 1000 %", verdict,
            ])  # fmt: skip
        head = [
            "task",
            "budget",
            "quantity",
            "rule",
            "predicted",
            "swept",
            "predicted/swept",
            "within 2×",
            "interval covers",
            "loss penalty",
            "",
        ]
        out += table(head, rows)
        return [*out, "Loss penalty: loss at the predicted rate less the best loss, over the best decrease; run, not read off a fit. "
                "In bold the rule that is scored.", ""]  # fmt: skip

    def methods(self) -> list[str]:
        out = []
        for found in self.tables:
            out += [f"## Methods on {found.task} at {in_words(found.horizon, found.amount)}", ""]
            words = [w for w in found.rows[0].means if all(w in r.means for r in found.rows)]
            rows = [self._row(r, words, found) for r in found.rows]
            head = [
                "method",
                "lr base",
                "lr PEFT",
                *words,
                "worse than the best by",
                "p (Holm)",
                "forwards / tokens / s to target",
            ]
            out += table(head, rows)
            if found.target is not None:
                out += [
                    f"Means over seeds with 95 % t intervals; each method at its best rates, chosen on the same seeds (which flatters "
                    f"all of them). Differences are paired over seeds. Target: a training loss of {number(found.target, 4)} "
                    f"({percent(self.study.target)} of the best decrease), read off the curve of the minibatches.",
                    "",
                ]
        return out

    def _row(self, row: Compared, words: Sequence[str], found: Table) -> list[str]:
        values = [
            number(row.means[w], 4) + (f" ({interval(ends)})" if (ends := row.intervals[w]) else "") for w in words
        ]
        rates = [number(row.place.lr_base), number(row.place.lr_peft)]
        if not row.ranked:
            return [
                row.method,
                *rates,
                *values,
                f"**budget too small** (moved {row.moved:.1f} standard errors)",
                "–",
                "–",
            ]
        worse = (
            "best"
            if row is found.rows[0]
            else number(row.worse) + (f" ({interval(row.worse_interval)})" if row.worse_interval else "")
        )
        n = len(row.place.cells)
        reached = (
            f"{row.reached[0]:,.0f} / {row.reached[1]:,.0f} / {number(row.reached[2])}"
            if row.reached
            else "not reached"
        )
        if row.reached and row.reaching < n:
            reached += f" ({row.reaching} of {n} seeds)"
        return [row.method, *rates, *values, worse, number(row.p), reached]

    def across(self) -> list[str]:
        found = over_tasks(self.tables)
        if len({t.task for t in self.tables}) < 2:
            return []
        rows = [
            [m, percent(v) + (f" ({percent(i[0])} to {percent(i[1])})" if i else ""), str(n)]
            for m, (v, i, n) in found.items()
        ]
        rows.sort(key=lambda r: -found[r[0]][0])
        return [
            "## Over tasks", "",
            *table(["method", "share of the best method's decrease", "tasks"], rows),
            "Means over tasks of a share that has no unit; losses of unlike tasks are not averaged. 95 % t intervals over tasks.", "",
        ]  # fmt: skip

    def repeat(self) -> list[str]:
        head = self.head
        out = ["## To repeat it", "", *(["```", shlex.join(head.argv), "```", ""] if head.argv else [])]
        listed = ", ".join(f"{k} {v}" for k, v in head.versions.items())
        out.append(f"{head.threads} thread{'s' if head.threads > 1 else ''} a run{f', {listed}' if listed else ''}"
                   f"{f', commit {head.git[:12]}' if head.git else ''}.")  # fmt: skip
        return [*out, "Every run stands in `records.jsonl`, every number above in `report.json`.", ""]


def _loss(state: State) -> str:
    """Before and after at the best place, with the seeds that ended above their start."""
    best = state.best
    if best is None:
        return "–"
    after = f" ({len(best.lost)} of {len(best.cells)} seeds gained nothing)" if best.lost else ""
    return f"{number(state.start, 4)} → {number(state.known[best.place].loss, 4)}{after}"


def load(folder: Path) -> SweepReport:
    """The report of a run folder, finished or not."""
    return SweepReport(rundir.load(folder))


def save(records: Sequence[Record], folder: rundir.RunFolder) -> SweepReport:
    """report.md, report.json and the figures, each whole or not at all."""
    from probes import sweep_figures

    report = SweepReport(records)
    sweep_figures.save(report, folder)
    content = json.dumps(report.json(), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    for name, text in (("report.json", content), ("report.md", report.text())):
        folder.write(name, lambda path, text=text: path.write_text(text, encoding="utf-8"))  # type: ignore[misc]
    return report
