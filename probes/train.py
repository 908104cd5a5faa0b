"""hybrid-train: one method on one task, with evaluations, checkpoints and an exact resume.

    header -> evaluation -> [epoch, steps, evaluations; a checkpoint every N steps] -> outcome

Records go to ``emit`` as they come. The run is a pure function of the task and the settings, so a resumed run takes the steps since
its last checkpoint again and says what it had said: the folder drops the repetition, and a run that was interrupted leaves the
file and the weights of one that was not.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hybridtheory.errors import UserError
from hybridtheory.estimators.catalogue import parse
from hybridtheory.optimizers import ZeroOrder, build
from hybridtheory.training import train
from probes import checkpoints
from probes.encoding import Row
from probes.evaluation import batch_of, evaluate, objective
from probes.records import Epoch, Evaluation, Outcome, Record, Step, Warning
from probes.setup import Probe, header
from probes.sources import load_source
from probes.splits import Splits, order
from probes.tasks import Task
from probes.train_settings import TrainSettings

Emit = Callable[[Record], None]
Progress = Callable[[str, float], None]


@dataclass
class Run:
    """One training run: what its parts share, and the sink that `hybridtheory.training.train` reports to."""

    task: Task
    settings: TrainSettings
    optimizer: ZeroOrder
    scheduler: torch.optim.lr_scheduler.LRScheduler | None
    emit: Emit
    folder: Path | None
    shown: list[Row]
    split: str
    stop: Callable[[], bool]
    progress: Progress
    saved: int | None = None
    why: str = ""
    clock: float = 0.0

    # ---- what the loop reports ----

    def epoch(self, epoch: int, order: list[int]) -> None:
        self.emit(Epoch(epoch, order))

    def step(self, step: int, loss: float, info: dict[str, Any]) -> bool:
        info = dict(info)
        names = [g["block"].name for g in self.optimizer.param_groups]
        lr = dict(zip(names, (float(x) for x in info.pop("lr")), strict=True))
        slopes = [float(s) for s in info.pop("slopes")]
        counts = {k: int(info.pop(k)) for k in ("forwards", "backwards")}
        extra = {k: float(v) for k, v in info.items() if isinstance(v, int | float)}
        now = time.perf_counter()
        self.emit(Step(step + 1, loss, lr, slopes, **counts, tokens=self.tokens, extra=extra, seconds=now - self.clock))
        made, every = step + 1, self.settings.eval_every
        self.why = "budget" if self.budget_spent() else "interrupted" if self.stop() else ""
        if every and made % every == 0:
            self.evaluate(made)
        # A step on the way to divergence is no place to go back to.
        if made % self.settings.checkpoint_every == 0 and loss <= self.optimizer.run["ceiling"]:
            self.save()
        self.progress(f"step {made}, loss {loss:.4g}", self.share(made))
        self.clock = time.perf_counter()
        return bool(self.why)

    # ---- the parts ----

    @property
    def blocks(self) -> list[Any]:
        return [g["block"] for g in self.optimizer.param_groups]

    @property
    def tokens(self) -> int:
        return int(self.optimizer.run.get("tokens", 0))

    @property
    def equivalents(self) -> int:
        return equivalents(self.optimizer.counts)

    @property
    def identity(self) -> dict[str, Any]:
        """What a checkpoint must agree on before it is loaded."""
        info = self.task.info
        return {"model": info["model_sha256"], "adapter": str(self.task.peft_info), "method": self.settings.method}

    def budget_spent(self) -> bool:
        return self.settings.budget is not None and self.equivalents >= self.settings.budget

    def share(self, made: int) -> float:
        s = self.settings
        return max(made / s.steps if s.steps else 0.0, self.equivalents / s.budget if s.budget else 0.0)

    def collate(self, rows: list[Row]) -> dict[str, Tensor]:
        batch = batch_of(self.task, rows, self.settings.objective != "loss")
        self.optimizer.run["tokens"] = self.tokens + int(batch["attention_mask"].sum())
        return batch

    def evaluate(self, step: int, rows: Sequence[Row] | None = None, split: str | None = None) -> Evaluation:
        self.progress("evaluation", self.share(step))
        start = time.perf_counter()
        found = evaluate(
            self.task, rows or self.shown, split or self.split, step, max(self.settings.micro_batch or 16, 1)
        )
        found = replace(found, seconds=time.perf_counter() - start)
        self.emit(found)
        return found

    def save(self) -> None:
        if self.folder is None or self.saved == self.optimizer.steps:
            return
        state = {"optimizer": self.optimizer.state_dict(), "scheduler": self.scheduler and self.scheduler.state_dict()}
        checkpoints.save(self.folder / "checkpoints", self.optimizer.steps, self.blocks, state, self.identity)
        self.saved = self.optimizer.steps

    def restore(self) -> bool:
        """Go back to the last checkpoint, if there is one."""
        found = None if self.folder is None else checkpoints.latest(self.folder / "checkpoints")
        if found is None:
            return False
        self.saved, state = checkpoints.load(found, self.blocks, self.identity)
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        return True


def run(
    task: Task,
    settings: TrainSettings,
    emit: Emit,
    folder: Path | None = None,
    *,
    origin: dict[str, Any] | None = None,
    notes: Sequence[str] = (),
    stop: Callable[[], bool] = lambda: False,
    progress: Progress = lambda what, share: None,
    finish: Callable[[Task, bool], list[str]] = lambda task, moved_base: [],
) -> Outcome:
    """Train ``task.model`` in place; the same call goes on where the last checkpoint in ``folder`` stands (None: no checkpoints).

    notes   warnings for the reader of the records.
    stop    asked after every step; True makes a checkpoint and raises KeyboardInterrupt.
    finish  exports, given the task and whether base weights moved; called once the run has ended well.
    A run that diverges is an `Outcome`, not an error: the model then holds the last good checkpoint.
    """
    started = time.perf_counter()
    setup = Probe.of(task, settings)
    emit(header(setup, "train", origin or {}))
    rows, split, final, final_split = evaluation_rows(task, settings)
    for note in (*task.notes, *notes, *overlap(task.rows, final)):
        emit(Warning(note))
    optimizer = optimizer_of(task, settings, setup)
    job = Run(task, settings, optimizer, schedule(optimizer, settings), emit, folder, rows, split, stop, progress)
    with dropping(task.model, settings.dropout):
        resumed = job.restore()
        if not resumed:
            job.evaluate(0)
            job.save()  # a disk that is full or read-only is found now, not after hours
        status, step, reason = _train(job)
    if status == "interrupted":
        job.save()
        raise KeyboardInterrupt
    sha, exports = None, []
    if status in ("finished", "budget"):
        job.save()
        job.evaluate(step, final, final_split)
        exports = finish(task, any(b.group == "base" for b in job.blocks))
        sha = checkpoints.sha256(checkpoints.weights_of(job.blocks))
    counts, tokens = optimizer.counts, job.tokens
    if sha is None and job.restore():
        reason += f"; the last good checkpoint, of step {job.saved}, is kept"
        sha = checkpoints.sha256(checkpoints.weights_of(job.blocks))
    outcome = Outcome(
        status, step, **counts, equivalents=equivalents(counts), tokens=tokens,
        weights_sha256=sha, reason=reason, exports=exports, seconds=time.perf_counter() - started,
    )  # fmt: skip
    emit(outcome)
    return outcome


def equivalents(counts: dict[str, int]) -> int:
    """A forward pass counts 1, a backward pass 2."""
    return counts["forwards"] + 2 * counts["backwards"]


def _train(job: Run) -> tuple[Any, int, str]:
    """The loop, until its status is one that a record has; "interrupted" where the user asked."""
    s, task, optimizer = job.settings, job.task, job.optimizer
    if job.budget_spent():
        return "budget", optimizer.steps, ""
    job.clock = time.perf_counter()
    ended = train(
        optimizer, objective(task, s.objective), task.rows, job.collate, job,
        steps=s.steps if s.steps is not None else 2**62, batch=min(s.batch, len(task.rows)), seed=s.seed, sampling=s.sampling,
        scheduler=job.scheduler, micro=s.micro_batch if task.padding_exact else 1, accumulate=s.accumulate,
    )  # fmt: skip
    if ended.status == "stopped":
        return job.why, ended.step, ""
    return ended.status, ended.step, ended.reason


def optimizer_of(task: Task, settings: TrainSettings, setup: Probe[TrainSettings]) -> ZeroOrder:
    """The method's optimizer on the task's blocks."""
    blocks = {b.group: b for b in setup.groups}
    law = parse(settings.law) if settings.law is not None else None
    try:
        return build(
            settings.method, task.model, blocks.get("base"), blocks.get("peft"), lr_base=settings.lr_base, lr_peft=settings.lr_peft,
            seed=settings.seed, law=law, **settings.optimizer_options(),
        )  # fmt: skip
    except TypeError as error:
        raise UserError(f"{settings.method} cannot be made with these options ({error}): see --option") from None


def schedule(optimizer: ZeroOrder, settings: TrainSettings) -> torch.optim.lr_scheduler.LRScheduler | None:
    """None for constant rates; "linear" falls to zero at the end of the run."""
    if settings.schedule == "constant":
        return None
    cost = equivalents(optimizer.cost()) * settings.accumulate
    ends = [settings.steps, math.ceil(settings.budget / cost) if settings.budget else None]
    total = min(e for e in ends if e is not None)
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: max(0.0, 1 - t / total))


def evaluation_rows(task: Task, settings: TrainSettings) -> tuple[list[Row], str, list[Row], str]:
    """(rows scored during the run, their name, rows scored at its end, their name).

    Which rows are shown during a run does not depend on its seed, so that runs can be compared.
    """
    if settings.eval_data is not None:
        source = load_source(settings.eval_data)
        other = Splits(source, task.splits.encoder, 0)  # type: ignore[attr-defined]
        # A set without a split of its own for testing is here to be tested on: all of it.
        rows = other["test"] if len(source.splits) > 1 else [r for name in ("train", "test") for r in other[name]]
        splits, names = (rows, rows), (settings.eval_data, settings.eval_data)
    else:
        test = task.splits["test"] if "test" in task.splits else task.splits["dev"]
        names = ("dev" if "dev" in task.splits else "test", "test" if "test" in task.splits else "dev")
        splits = (task.splits[names[0]], test)
    shown, final = ([rows[i] for i in order(len(rows), 0)] for rows in splits)
    if not shown or not final:
        raise UserError(f"the data {settings.eval_data or task.info['data']} has no row to evaluate on")
    return shown[: settings.eval_rows], names[0], final[: settings.final_rows], names[1]


def overlap(training: Sequence[Row], held_out: Sequence[Row]) -> list[str]:
    """A warning when rows that are evaluated are trained on."""

    def key(row: Row) -> tuple[int, ...]:
        return tuple(row["options"][0]["input_ids"])

    seen = {key(r) for r in training}
    count = sum(key(r) in seen for r in held_out)
    return [f"{count} of the {len(held_out)} test rows are training rows too"] if count else []


@contextmanager
def dropping(model: nn.Module, p: float) -> Iterator[None]:
    """Dropout of probability ``p`` while training (0: none, and evaluation mode). What is dropped is a function of (seed, step)."""
    if p == 0:
        model.eval()
        yield
        return
    if any(t.device.type != "cpu" for t in model.parameters()):
        raise UserError("--dropout can be repeated exactly on the CPU alone: leave it out on an accelerator")
    found: list[tuple[Any, str, Any]] = []
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            found.append((module, "p", module.p))
        # Attention keeps its probability as a number; "layerdrop" skips whole layers and is another method.
        found += [
            (module, k, v) for k, v in vars(module).items()
            if isinstance(v, float) and "dropout" in k and "layer" not in k
        ]  # fmt: skip
    if not found:
        raise UserError("--dropout was asked for and this model has no dropout")
    try:
        for module, name, _ in found:
            setattr(module, name, p)
        model.train()
        yield
    finally:
        for module, name, before in found:
            setattr(module, name, before)
        model.eval()
