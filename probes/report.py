"""Records -> Report: the numbers of one run as one object, and the files that a run folder holds.

A Report holds the records and nothing else: report.json, report.md, trainer.toml, the tables and the figures are
functions of them, so a report can be made again, elsewhere and later, from records.jsonl alone. docs/records.md
documents report.json.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from hybridtheory.errors import UserError
from hybridtheory.estimate import Estimate
from probes import jsonl, rundir
from probes.records import (
    SCHEMA,
    Allocation,
    BlockInfo,
    Budget,
    Cost,
    Estimator,
    Fit,
    Header,
    Point,
    Preflight,
    Rates,
    Recommendation,
    Record,
    Secant,
    StepMemory,
    StepTime,
    TrainStep,
    Warning,
)
from probes.records_smoothness import Rate

if TYPE_CHECKING:
    import pandas as pd

T = TypeVar("T")
RULES = ("worst_case", "measured", "noise_limited", "finite_scale", "tail")
GROUPS = ("base", "peft", "ratio")


@dataclass(frozen=True)
class Report:
    """One run, read from its records.

    report.points, report.fits, report.recommendation ... are the records; report.json() is report.json;
    report.frames() are pandas tables.
    """

    records: tuple[Record, ...]

    @classmethod
    def of(cls, records: Iterable[Record]) -> Report:
        """A report of these records; UserError when they measured nothing."""
        report = cls(tuple(records))
        if not report.all(Header):
            raise UserError("no header among the records: a report starts from a whole run")
        if not any(isinstance(r, rundir.MEASUREMENTS) for r in report.records):
            raise UserError("the records hold no measurement, so there is nothing to report")
        return report

    @classmethod
    def load(cls, folder: Path | str) -> Report:
        """The report of a run folder, finished or not."""
        return cls.of(rundir.load(folder))

    def all(self, kind: type[T]) -> list[T]:
        """Every record of one kind, in order."""
        return [r for r in self.records if isinstance(r, kind)]

    def last(self, kind: type[T]) -> T | None:
        """The last record of one kind: after a resume it is the one that counts."""
        found = self.all(kind)
        return found[-1] if found else None

    @property
    def header(self) -> Header:
        return self.all(Header)[0]

    @cached_property
    def blocks(self) -> list[BlockInfo]:
        return self.header.blocks

    def finest(self, group: str) -> list[BlockInfo]:
        """The blocks that a group was cut into; the group itself where it was not cut."""
        found = [b for b in self.blocks if b.group == group]
        return [b for b in found if b.name != group] or found

    @property
    def preflight(self) -> Preflight | None:
        return self.last(Preflight)

    @cached_property
    def points(self) -> list[Point]:
        return self.all(Point)

    @cached_property
    def secants(self) -> list[Secant]:
        return self.all(Secant)

    @cached_property
    def steps(self) -> list[TrainStep]:
        return self.all(TrainStep)

    @cached_property
    def fits(self) -> list[Fit]:
        return self.all(Fit)

    @property
    def recommendation(self) -> Recommendation | None:
        return self.last(Recommendation)

    @property
    def warnings(self) -> list[Warning]:
        return list({w.text: w for w in self.all(Warning)}.values())  # a resumed run may say a thing twice

    @property
    def coupling(self) -> Estimate | None:
        """|H_xy|_2 at the last point that has it."""
        return next((p.coupling for p in reversed(self.points) if p.coupling is not None), None)

    @property
    def finished(self) -> bool:
        return rundir.finished(self.records)

    def cost(self, phase: str) -> Cost | None:
        """The estimate, or the sum of what the parts of a resumed run took."""
        costs = [c for c in self.all(Cost) if c.phase == phase]
        if not costs or phase == "estimated":
            return costs[0] if costs else None
        total = {k: sum(getattr(c, k) for c in costs) for k in ("gradients", "products", "values", "seconds")}
        return Cost("actual", **total, memory_bytes=max(c.memory_bytes for c in costs), note=costs[-1].note)

    def rates(self, rule: str, where: str = "envelope") -> Rates | None:
        """One rule's rates; where "envelope" is not there (a single point), the first point's are the envelope."""
        found: dict[str, Rates] = {r.where: r for r in self.all(Rates) if r.rule == rule}
        return found.get(where) or (found.get("first") if where == "envelope" else None)

    def rate(self, rule: str, group: str, where: str = "envelope") -> Rate | None:
        rates = self.rates(rule, where)
        found: Rate | None = getattr(rates, group) if rates else None
        return found

    def chosen_fit(self, block: str) -> Fit | None:
        """The fit behind the block's headline L0 and L1: upper envelope in the full gradient's norm, of secants
        before spectral points.
        """
        fits = [f for f in self.fits if f.block == block and f.argument == "full"]
        order = [("secant", "envelope"), ("spectral", "envelope"), ("secant", "quantile"), ("spectral", "quantile")]
        return next((f for kind in order for f in fits if (f.data, f.method) == kind), None)

    def json(self) -> dict[str, Any]:
        """report.json as plain Python values (docs/records.md); floats that are not finite are strings."""
        head = self.header
        document = {
            "schema": SCHEMA,
            "probe": head.probe,
            "run": {
                "seed": head.seed,
                "options": head.options,
                "versions": head.versions,
                "threads": head.threads,
                "git": head.git,
                "argv": head.argv,
                "started": head.started,
                "finished": self.finished,
            },
            "model": head.model,
            "data": head.data,
            "peft": head.peft,
            "preflight": self.preflight,
            "blocks": [self._block(block) for block in self.blocks],
            "points": self.points,
            "secants": self.secants,
            "coupling": self.coupling,
            "learning_rates": {rule: self._rule(rule) for rule in RULES},
            "recommendation": self.recommendation,
            "cost": {phase: self.cost(phase) for phase in ("estimated", "actual")},
            "warnings": self.warnings,
        }
        if head.probe == "estimators":
            shared = ("schema", "probe", "run", "model", "data", "peft", "cost", "warnings")
            document = {name: document[name] for name in shared} | {
                "blocks": self.blocks,
                "estimators": self.all(Estimator),
                "budgets": self.all(Budget),
                "allocations": self.all(Allocation),
            }
        if head.probe == "cost":
            document = {
                n: v
                for n, v in document.items()
                if n in {"schema", "probe", "run", "model", "data", "cost", "warnings"}
            } | {
                "memory": self.all(StepMemory),
                "time": self.all(StepTime),
            }
        out: dict[str, Any] = jsonl.plain(document)
        return out

    def _block(self, block: BlockInfo) -> dict[str, Any]:
        fit = self.chosen_fit(block.name)
        fits = [f for f in self.fits if f.block == block.name]
        out = {**jsonl.plain(block), "L0": None, "L1": None, "intervals": {"L0": None, "L1": None}, "identified": False}
        out |= {"violation_rate": None, "violation_interval": None, "points": 0, "fit": None, "fits": fits}
        if fit is not None:
            out |= {
                name: getattr(fit, name) for name in ("L0", "L1", "identified", "violation_rate", "violation_interval")
            }
            out |= {"intervals": {"L0": fit.L0_interval, "L1": fit.L1_interval}, "points": fit.n}
            out["fit"] = {"data": fit.data, "method": fit.method, "argument": fit.argument}
        return out

    def _rule(self, rule: str) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for group in GROUPS:
            rate, first = self.rate(rule, group), self.rate(rule, group, "first")
            out[group] = None if rate is None else {**jsonl.plain(rate), "first": jsonl.plain(first)}
        return out

    def markdown(self) -> str:
        """report.md."""
        from probes import markdown_cost, markdown_estimators, markdown_smoothness

        own = {"estimators": markdown_estimators.text, "cost": markdown_cost.text}
        return own.get(self.header.probe, markdown_smoothness.text)(self)

    def trainer_toml(self) -> str:
        """trainer.toml: the recommended rates and what they assume."""
        from probes import trainer_toml

        return trainer_toml.text(self)

    def frames(self) -> dict[str, pd.DataFrame]:
        """pandas tables: points (a row per point and block), secants, steps, fits, rates; or those of the estimators."""
        from probes import frames

        return frames.frames(self)

    def _repr_markdown_(self) -> str:
        """What a notebook shows."""
        return self.markdown()

    def save(self, folder: Path | str | rundir.RunFolder) -> list[Path]:
        """Write report.json, report.md, trainer.toml and the figures into a run folder; each file appears whole or
        not at all.

        A folder path that holds no run gets the records as well, so that what was measured in Python can be read back.
        """
        from probes import figures

        if not isinstance(folder, rundir.RunFolder):
            path = Path(folder)
            with rundir.RunFolder(path, resume=(path / rundir.RECORDS).exists()) as run:
                if not run.done:
                    for record in self.records:
                        run.append(record)
                return self.save(run)
        text = json.dumps(self.json(), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        paths = figures.save(self, folder)
        if self.header.probe == "smoothness":
            paths.append(folder.write("trainer.toml", lambda path: _save(path, self.trainer_toml())))
        paths.append(folder.write("report.json", lambda path: _save(path, text)))
        paths.append(folder.write("report.md", lambda path: _save(path, self.markdown())))
        return paths


def _save(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
