"""hybrid-sweep: the cells of a study, one after another or by joblib's workers, and what of them is finished at any moment.

    header -> [predictions] -> for each task: sweep_task, then cells as they finish

Cells are handed out until every line of the task is done; which ones are needed is a pure function of those that are finished
(`probes.sweep_lines`), so a sweep that was killed and resumed runs the cells that it would have run, with the same numbers. With one job
they also come in the same order; workers finish in an order of their own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import joblib

from hybridtheory.errors import UserError
from probes.predictions import refuse_other
from probes.records import DataInfo, Header, ModelInfo, Record
from probes.records_sweep import Cell, Predictions, SweepTask
from probes.sweep_cell import Failed, Work, describe, run_cell, unload
from probes.sweep_lines import Lines
from probes.sweep_study import Study
from probes.sweep_watch import Watch
from probes.sweep_work import needed

T = TypeVar("T")
DIED = ("TerminatedWorkerError", "BrokenProcessPool", "KilledWorker", "CommClosedError")
BACKENDS = ("loky", "dask")


@dataclass(frozen=True)
class Pool:
    """Who runs the cells: ``jobs`` processes of this machine, or the workers of a Dask scheduler (None: a cluster on this machine).

    timeout  seconds without progress after which a worker of this machine is ended; those of Dask are Dask's to watch.
    """

    jobs: int = 1
    backend: str = "loky"
    scheduler: str | None = None
    timeout: float = 120.0

    def __post_init__(self) -> None:
        if self.jobs < 1:
            raise UserError(f"--n-jobs is a whole number of at least 1, not {self.jobs}")
        if self.backend not in BACKENDS:
            raise UserError(f"--backend is {' or '.join(BACKENDS)}, not {self.backend!r}")
        if self.scheduler is not None and self.backend != "dask":
            raise UserError("--scheduler is the address of a Dask scheduler: add --backend dask")

    @contextmanager
    def open(self) -> Iterator[Callable[[Callable[..., T], Iterator[Any]], Iterator[T]]]:
        """A function (call, arguments) -> results as they finish; arguments are taken one by one as workers come free."""
        if self.backend == "loky" and self.jobs == 1:
            try:
                yield lambda call, arguments: map(call, arguments)
            finally:
                unload()
            return
        with self._backend() as jobs:
            parallel = joblib.Parallel(jobs, batch_size=1, pre_dispatch="n_jobs", return_as="generator_unordered")
            yield lambda call, arguments: parallel(joblib.delayed(call)(a) for a in arguments)

    @contextmanager
    def _backend(self) -> Iterator[int]:
        if self.backend == "dask":
            try:
                from distributed import Client
            except ImportError:
                raise UserError(
                    "--backend dask needs the package distributed: pip install 'hybridtheory[dask]'"
                ) from None
            local: dict[str, Any] = {"n_workers": self.jobs, "threads_per_worker": 1, "dashboard_address": None}
            try:
                client = Client(self.scheduler, timeout=30) if self.scheduler else Client(**local)
            except OSError as error:
                raise UserError(
                    f"no Dask scheduler answers at {self.scheduler} ({error}): start one, or leave --scheduler out"
                ) from None
            with client, joblib.parallel_config("dask", client=client, wait_for_workers_timeout=60):
                yield self.jobs if self.scheduler is None else -1
            return
        with joblib.parallel_config("loky"):
            try:
                yield self.jobs
            finally:
                from joblib.externals.loky import get_reusable_executor

                get_reusable_executor().shutdown(wait=True, kill_workers=True)


@dataclass
class Sweep:
    """A study being run. emit writes a record; said tells the user: (what, cells done, cells known of, seconds left or None).

    until   epoch seconds at which no new cell starts, and a cell with checkpoints stops; None: run to the end.
    folder  for the checkpoints of running cells, where the study has them.
    """

    study: Study
    emit: Callable[[Record], object]
    said: Callable[[str, int, int, float | None], None]
    pool: Pool = field(default_factory=Pool)
    until: float | None = None
    folder: str | None = None
    registered: Predictions | None = None
    tasks: dict[tuple[str, int], SweepTask] = field(default_factory=dict)
    cells: dict[tuple[Any, ...], Cell] = field(default_factory=dict)  # by line, place and seed
    watch: Watch = field(default_factory=Watch)
    _by_id: dict[str, Cell] = field(default_factory=dict)
    _took: dict[str, list[float]] = field(default_factory=dict)

    def run(self, done: Sequence[Record], origin: dict[str, Any]) -> bool:
        """Whether every line is done; False where the time was up."""
        self.emit(self.header(origin))
        self._register(done)
        for record in done:
            if isinstance(record, SweepTask):
                self.tasks[record.name, record.seed] = record
            elif isinstance(record, Cell):
                self._keep(record)
        for warning in Lines(self.study, self.cells.values()).warnings():
            self.emit(warning)
        watched = self.pool.backend == "loky" and self.pool.jobs > 1
        with self.pool.open() as every, self.watch.watching(self.pool.timeout) if watched else nullcontext():
            for source in self.study.sources:
                if not self._task(source.name, every):
                    return False
        return True

    def _register(self, done: Sequence[Record]) -> None:
        """The predictions of this sweep: a resumed one keeps those that it began with, or none."""
        known = next((r for r in done if isinstance(r, Predictions)), None)
        given = self.registered
        if (
            given is not None
            and any(isinstance(r, Cell) for r in done)
            and (known is None or known.sha256 != given.sha256)
        ):
            began = "without predictions" if known is None else f"with the predictions {known.sha256[:12]}"
            raise UserError(
                f"--predictions: this sweep began {began}: start a new one for {given.path} ({given.sha256[:12]})"
            )
        self.registered = known or given
        if self.registered is not None:
            self.emit(self.registered)

    def header(self, origin: dict[str, Any]) -> Header:
        sources = self.study.sources
        models, data = (
            {getattr(s, k) or d: None for s in sources} for k, d in (("model", "embedded"), ("data", "sentiment"))
        )
        return Header(
            probe="sweep", seed=sources[0].seed, model=ModelInfo(", ".join(map(str, models)), "", 0),
            data=DataInfo(", ".join(map(str, data)), ""), blocks=[], options=self.study.options(), threads=self.study.threads, **origin,
        )  # fmt: skip

    # ---- one task ----

    def _task(self, name: str, every: Callable[..., Iterator[Any]]) -> bool:
        """Run what the task's lines need until they need nothing more."""
        source = next(s for s in self.study.sources if s.name == name)
        seeds = sorted({x for line in self.study.lines if line.task == name for x in line.seeds})
        unknown = {source.seed_of(x): x for x in seeds if (name, source.seed_of(x)) not in self.tasks}
        if unknown:
            self.said(f"loading {name}", len(self.cells), self.expected(), None)
            for found in every(_described, iter([(source, x) for x in unknown.values()])):
                if isinstance(found, Failed):
                    raise UserError(f"task {name}: {found.reason}")
                if self.registered is not None:
                    refuse_other(self.registered, [found])
                self.tasks[found.name, found.seed] = found
                self.emit(found)
        # A run that two lines share (the middle of a ratio line is a place of the scale line) is made once and stands in both.
        alone = self.pool.backend == "loky" and self.pool.jobs == 1
        while works := self._needed(name):
            if self._over() or not self._run(works[:1] if alone else works, every):
                return False
        return True

    def _needed(self, name: str) -> list[Work]:
        entries = tuple(self.registered.entries) if self.registered else ()
        folder = self.folder if self.study.checkpoint is not None else None
        return needed(
            self.study,
            self.tasks,
            self.cells.values(),
            entries,
            name,
            folder=folder,
            until=self.until if folder else None,
        )

    def _run(self, works: Sequence[Work], every: Callable[..., Iterator[Any]]) -> bool:
        """Run these cells, as far as the time allows; False where one of them stopped in its middle."""
        running: dict[str, Work] = {}
        fresh: dict[str, Work] = {}
        for work in works:
            if work.id in self._by_id:
                self._finish(replace(self._by_id[work.id], **work.fields, seconds=0.0))
            else:
                fresh.setdefault(work.id, work)

        def handed() -> Iterator[Work]:
            for work in fresh.values():
                if self._over():
                    return
                running[work.id] = work
                yield replace(work, sign=self.watch.sign(work.id))

        missed = False
        try:
            for found in every(run_cell, handed()):
                work = running.pop(found.id)
                if isinstance(found, Failed):
                    if found.reason:
                        raise UserError(f"cell {work}: {found.reason}")
                    missed = True
                    continue
                self._finish(found)
        except Exception as error:
            if type(error).__name__ not in DIED:
                for work in running.values():
                    error.add_note(f"while cell {work} ran")
                raise
            for hung in self.watch.hung & running.keys():
                raise UserError(
                    f"the worker of cell {running[hung]} made no progress for {self.pool.timeout:g} s and was ended; finished cells are "
                    f"kept: --resume goes on (with a longer --timeout, where one forward pass takes that long)"
                ) from None
            listed = " or ".join(map(str, running.values())) or "none"
            raise UserError(
                f"a worker died while it ran cell {listed}; finished cells are kept. Where memory was short, lower --n-jobs or "
                f"train.micro_batch; then --resume"
            ) from None
        return not missed

    def _finish(self, cell: Cell) -> None:
        if self.registered is not None:
            cell = replace(cell, predictions=self.registered.sha256, predictions_commit=self.registered.commit)
        self.emit(cell)
        self._keep(cell)
        rate = {"base": "lr base", "peft": "lr PEFT"}.get(cell.axis, cell.axis)
        what = f"{cell.task}, {cell.method}, {rate} {cell.place:.3g}, seed {cell.seed}: loss {cell.start:.4g} -> {cell.final:.4g}"
        self.said(what, len(self.cells), self.expected(), self.left())

    def _keep(self, cell: Cell) -> None:
        self.cells[cell.task, cell.method, cell.axis, cell.horizon, cell.amount, cell.place, cell.seed] = cell
        self._by_id[cell.id] = cell
        if cell.seconds and cell.status in ("finished", "budget"):
            self._took.setdefault(cell.task, []).append(cell.seconds)

    def _over(self) -> bool:
        return self.until is not None and time.time() >= self.until

    # ---- how much is left ----

    def expected(self) -> int:
        """Cells that are known of: finished ones, and the first points of every line; extensions and refinements come on top."""
        return len(self.cells) + sum(self._open().values())

    def _open(self) -> dict[str, int]:
        """Unfinished cells among the first points of the lines, by task."""
        ran: dict[tuple[Any, ...], set[tuple[float, int]]] = {}
        for c in self.cells.values():
            ran.setdefault((c.task, c.method, c.axis, c.horizon, c.amount), set()).add((c.place, c.seed))
        found: dict[str, int] = {}
        for line in self.study.lines:
            places = [line.grid.rate(i) for i in line.grid.first] if line.grid else [1.0]
            missing = {(p, s) for p in places for s in line.seeds} - ran.get(line.key, set())
            found[line.task] = found.get(line.task, 0) + len(missing)
        return found

    def left(self) -> float | None:
        """Seconds for the cells that are known of; a task that was not begun counts as the mean of the others."""
        every = [x for took in self._took.values() for x in took]
        if not every:
            return None
        mean = {t: sum(x) / len(x) for t, x in self._took.items()}
        overall = sum(every) / len(every)
        return sum(n * mean.get(t, overall) for t, n in self._open().items()) / self.pool.jobs


def _described(asked: tuple[Any, int]) -> SweepTask | Failed:
    return describe(*asked)
