"""One cell of a sweep: a deterministic training run in a worker that keeps its model loaded between cells.

Loading costs more than a short run, so a worker loads a task once and puts the weights back bit for bit before each cell. The numbers
of a cell depend on its own `Work` alone: not on the worker, nor on the cells that it ran before.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hybridtheory.errors import UserError
from probes import rundir, train
from probes.evaluation import evaluate
from probes.jsonl import stable
from probes.places import quiet
from probes.records import Evaluation, Outcome, Record, Step
from probes.records_sweep import Cell, SweepTask
from probes.setup import Probe, header
from probes.sweep_study import Source
from probes.sweep_watch import living
from probes.tasks import Task, load_task
from probes.train_settings import TrainSettings

PARTS = 20  # of a cell's curve: a study of some thousand cells stays a few MB
HELD_OUT = 64  # training rows scored before and after where the runs are scored on other rows


@dataclass(frozen=True)
class Work:
    """What a worker needs for one cell. expected: the task as the sweep knows it; folder: for checkpoints; until: epoch seconds; sign:
    of life (`probes.sweep_watch`).
    """

    id: str
    source: Source
    expected: SweepTask
    settings: TrainSettings
    fields: dict[str, Any]
    threads: int
    folder: str | None = None
    until: float | None = None
    sign: str | None = None

    def __str__(self) -> str:
        f, s = self.fields, self.settings
        rates = ", ".join(f"lr {g} {r:.4g}" for g, r in (("base", s.lr_base), ("PEFT", s.lr_peft)) if r is not None)
        return f"{self.id} ({f['task']}, {f['method']}, axis {f['axis']}, {f['amount']:g} {f['horizon']}, {rates}, seed {f['seed']})"


@dataclass(frozen=True)
class Failed:
    """A cell without a result. reason "": its time was up, and a checkpoint holds what it did."""

    id: str
    reason: str


def identity(task: SweepTask, settings: TrainSettings, threads: int) -> str:
    """Hash of everything that determines the cell's numbers. Names of models and tasks are not: the weights and rows are."""
    same = {k: v for k, v in stable(task).items() if k not in ("name", "model", "notes")}
    run = {k: v for k, v in asdict(settings).items() if k != "checkpoint_every"}
    text = json.dumps([same, run, threads], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# ---- the loaded task ----


@dataclass
class Loaded:
    key: str
    task: Task
    weights: dict[str, Tensor]
    start: float | None = None  # loss of the training rows, where cells are scored on others

    def restore(self) -> None:
        """Parameters and buffers as they were loaded."""
        with torch.no_grad():
            for name, tensor in _tensors(self.task):
                tensor.copy_(self.weights[name])
        for parameter in self.task.model.parameters():
            parameter.grad = None
        self.task.model.eval()


_loaded: list[Loaded] = []  # at most one: two large models would not fit beside each other


def _tensors(task: Task) -> list[tuple[str, Tensor]]:
    return [*task.model.named_parameters(), *task.model.named_buffers()]


def loaded(source: Source, run: int) -> Loaded:
    """The task of ``source`` for runs with this seed, its weights as they were loaded."""
    seed = source.seed_of(run)
    key = json.dumps([asdict(source), seed], sort_keys=True, default=str)
    if not _loaded or _loaded[0].key != key:
        _loaded.clear()
        with quiet():
            task = load_task(source.model, source.data, seed=seed, **source.loading)
        _loaded.append(Loaded(key, task, {n: t.detach().clone() for n, t in _tensors(task)}))
    _loaded[0].restore()
    return _loaded[0]


def unload() -> None:
    """Free what `loaded` keeps in this process."""
    _loaded.clear()


def describe(source: Source, run: int) -> SweepTask | Failed:
    """The task as the records keep it."""
    try:
        task = loaded(source, run).task
    except UserError as error:
        return Failed(source.name, str(error))
    settings = TrainSettings(method="mezo", seed=0)
    head = header(Probe.of(task, settings), "sweep", {})
    peft = {k: v for k, v in (stable(head)["peft"] or {}).items() if v is not None}
    groups = ("base", "peft")
    return SweepTask(
        name=source.name, seed=source.seed_of(run), model=head.model.name, model_sha256=head.model.sha256,
        architecture=head.model.architecture, dtype=head.model.dtype, data=head.data.name, data_sha256=head.data.sha256,
        rows=len(task.rows), tokens=head.data.tokens, loss=head.data.loss, peft=peft,
        d={g: sum(b.d for b in head.blocks if b.name == g) for g in groups}, notes=list(task.notes),
    )  # fmt: skip


# ---- one cell ----


def run_cell(work: Work) -> Cell | Failed:
    """Train once and reduce the run to its cell. What the user can mend comes back as `Failed`; anything else is raised."""
    threads = torch.get_num_threads()
    torch.set_num_threads(work.threads)
    try:
        return _run(work)
    except UserError as error:
        return Failed(work.id, str(error))
    except KeyboardInterrupt:
        if work.until is not None and time.time() >= work.until:
            return Failed(work.id, "")
        raise
    finally:
        torch.set_num_threads(threads)


def _run(work: Work) -> Cell:
    started = time.perf_counter()
    found = loaded(work.source, work.settings.seed)
    _check_same(work, found.task)
    with living(found.task.model, work.sign):
        return replace(_trained(work, found), seconds=time.perf_counter() - started)


def _trained(work: Work, found: Loaded) -> Cell:
    settings, held_out = work.settings, work.settings.eval_data != "train"
    if held_out and found.start is None:
        found.start = _training_loss(found.task, settings)
    records: list[Record] = []
    if work.folder is None:
        outcome = train.run(found.task, settings, records.append)
    else:
        # hybrid-train's own folder and checkpoints: a run that was cut goes on where it stood.
        folder = Path(work.folder) / work.id
        until = work.until or math.inf
        with rundir.RunFolder(folder, (folder / rundir.RECORDS).exists()) as run:
            outcome = train.run(found.task, settings, run.append, folder, stop=lambda: time.time() >= until)
        records = rundir.load(folder)
    ended = outcome.status in ("finished", "budget")
    scored = [r for r in records if isinstance(r, Evaluation)]
    start = found.start if held_out and found.start is not None else scored[0].loss
    final = math.inf if not ended else _training_loss(found.task, settings) if held_out else scored[-1].loss
    cell = _cell(work, records, outcome, start, final, scored[-1] if held_out and ended else None)
    if work.folder is not None:
        shutil.rmtree(Path(work.folder) / work.id, ignore_errors=True)
    return cell


def _training_loss(task: Task, settings: TrainSettings) -> float:
    rows = task.rows[: max(HELD_OUT, settings.eval_rows)]
    return evaluate(task, rows, "train", 0, max(settings.micro_batch or 16, 1)).loss


def _check_same(work: Work, task: Task) -> None:
    for name, now in (("model", task.info["model_sha256"]), ("data", task.info["data_sha256"])):
        known = getattr(work.expected, f"{name}_sha256")
        if now != known:
            raise UserError(
                f"the {name} of task {work.expected.name} is not the one that this sweep began with (sha256 {str(now)[:12]} now, "
                f"{known[:12]} in its records): restore it, or start a new sweep"
            )


def _cell(
    work: Work, records: Sequence[Record], outcome: Outcome, start: float, final: float, held_out: Evaluation | None
) -> Cell:
    steps = [r for r in records if isinstance(r, Step)]
    spent = {r.step: (r.forwards + 2 * r.backwards, r.tokens) for r in steps}
    curve, clock = _curve(steps)
    facts = None
    if held_out is not None:
        facts = {k: v for k, v in stable(held_out).items() if v is not None}
    return Cell(
        id=work.id, **work.fields, ran=work.settings.method,
        status=outcome.status, step=outcome.step, forwards=outcome.forwards, backwards=outcome.backwards,
        equivalents=outcome.equivalents, tokens=outcome.tokens, start=start, final=final, curve=curve,
        scores=_scores([r for r in records if isinstance(r, Evaluation)], spent), held_out=facts,
        weights_sha256=outcome.weights_sha256, reason=outcome.reason, clock=clock,
    )  # fmt: skip


def _curve(steps: Sequence[Step]) -> tuple[dict[str, list[float]], list[float]]:
    """Means of the minibatches' losses over at most `PARTS` stretches of equal length, and the seconds until the end of each."""
    size = max(1, -(-len(steps) // PARTS))
    names = ("step", "loss", "equivalents", "tokens")
    curve: dict[str, list[float]] = {k: [] for k in names}
    clock, seconds = [], 0.0
    for i in range(0, len(steps), size):
        part = steps[i : i + size]
        last = part[-1]
        seconds += sum(s.seconds for s in part)
        mean = sum(s.loss for s in part) / len(part)
        values = (last.step, float(f"{mean:.6g}"), last.forwards + 2 * last.backwards, last.tokens)
        for name, value in zip(names, values, strict=True):
            curve[name].append(float(value))
        clock.append(round(seconds, 4))
    return curve, clock


def _scores(found: Sequence[Evaluation], spent: dict[int, tuple[int, int]]) -> dict[str, list[float]]:
    scores: dict[str, list[float]] = {"step": [], "loss": [], "equivalents": [], "tokens": []}
    if all(e.accuracy is not None for e in found):
        scores["accuracy"] = []
    for e in found:
        equivalents, tokens = spent.get(e.step, (0, 0))
        for name, value in (("step", e.step), ("loss", e.loss), ("equivalents", equivalents), ("tokens", tokens)):
            scores[name].append(float(value))
        if e.accuracy is not None and "accuracy" in scores:
            scores["accuracy"].append(e.accuracy)
    return scores
