"""hybrid-train: one method on one task, with evaluations, checkpoints and an exact resume.

    header -> evaluation -> [epoch, steps, evaluations; a checkpoint every N steps] -> outcome

Records go to ``emit`` as they come. The run is a pure function of the task and the settings, so a resumed run takes the steps since
its last checkpoint again and says what it had said: the folder drops the repetition, and a run that was interrupted leaves the
file and the weights of one that was not.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hybridtheory.errors import UserError
from hybridtheory.optimizers import ZeroOrder
from hybridtheory.ranks import Ranks, joined
from hybridtheory.training import train
from probes import checkpoints
from probes.encoding import Row
from probes.evaluation import batch_of, evaluate, objective
from probes.records import Epoch, Evaluation, Outcome, Record, Step, Warning
from probes.setup import Probe, header
from probes.tasks import Task
from probes.train_settings import TrainSettings
from probes.train_setup import dev_rows, dropping, equivalents, evaluation_rows, levels, optimizer_of, overlap, schedule

Emit = Callable[[Record], object]
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
    dev: list[Row] | None = None  # that choose the best weights, where those are to be kept
    saved: int | None = None  # step of the newest checkpoint
    trusted: bool = False  # has a loss been seen at its weights?
    why: str = ""
    clock: float = 0.0

    # ---- what the loop reports ----

    def epoch(self, epoch: int, order: list[int]) -> None:
        self.emit(Epoch(epoch, order))

    def step(self, step: int, loss: float, info: dict[str, Any]) -> bool:
        good = loss <= self.optimizer.run["ceiling"]
        if self.saved == step and good:  # this step started at the checkpoint's weights
            self.trust()
        info = dict(info)
        names = [g["block"].name for g in self.optimizer.param_groups]
        lr = dict(zip(names, (float(x) for x in info.pop("lr")), strict=True))
        slopes = [float(s) for s in info.pop("slopes")]
        counts = {k: int(info.pop(k)) for k in ("forwards", "backwards")}
        extra = {k: float(v) for k, v in info.items() if isinstance(v, int | float)}
        now = time.perf_counter()
        if self.settings.seconds is not None:
            self.optimizer.run["seconds"] = self.spent + now - self.clock
        self.emit(Step(step + 1, loss, lr, slopes, **counts, tokens=self.tokens, extra=extra, seconds=now - self.clock))
        made, every = step + 1, self.settings.eval_every
        self.why = self.ends()
        if every and made % every == 0:
            self.look(made)
        # A step on the way to divergence is no place to go back to.
        if made % self.settings.checkpoint_every == 0 and good:
            self.save()
        self.progress(f"step {made}, loss {loss:.4g}", self.share(made))
        self.clock = time.perf_counter()
        return bool(self.why)

    # ---- the parts ----

    @property
    def ranks(self) -> Ranks:
        """The processes that share every minibatch."""
        return joined(next(self.task.model.parameters()).device)

    @property
    def blocks(self) -> list[Any]:
        return [g["block"] for g in self.optimizer.param_groups]

    @property
    def tokens(self) -> int:
        return int(self.optimizer.run.get("tokens", 0))

    @property
    def spent(self) -> float:
        """Seconds of the steps so far; counted only where they are the budget."""
        return float(self.optimizer.run.get("seconds", 0.0))

    @property
    def equivalents(self) -> int:
        return equivalents(self.optimizer.counts)

    @property
    def identity(self) -> dict[str, Any]:
        """What a checkpoint must agree on before it is loaded."""
        info = self.task.info
        adapter, s = str(self.task.peft_info), self.settings
        return {
            "model": info["model_sha256"],
            "adapter": adapter,
            "method": s.method,
            "law": s.law,
            "options": s.options,
        }

    def ends(self) -> str:
        """Why the run ends here, "" where it goes on. Processes agree: the first one's clock counts, and whoever is asked to stop."""
        spent, asked = self.ranks.sum(float(self.ranks.writes and self.budget_spent()), float(self.stop()))
        return "budget" if spent else "interrupted" if asked else ""

    def budget_spent(self) -> bool:
        s = self.settings
        ends = ((s.budget, self.equivalents), (s.tokens, self.tokens), (s.seconds, self.spent))
        return any(end is not None and spent >= end for end, spent in ends)

    def share(self, made: int) -> float:
        s = self.settings
        ends = ((s.steps, made), (s.budget, self.equivalents), (s.tokens, self.tokens), (s.seconds, self.spent))
        return max(spent / end for end, spent in ends if end is not None)

    def collate(self, rows: list[Row]) -> dict[str, Tensor]:
        batch = batch_of(self.task, rows, self.settings.objective != "loss")
        self.optimizer.run["tokens"] = self.tokens + int(batch["attention_mask"].sum())
        return batch

    def evaluate(
        self, step: int, rows: Sequence[Row] | None = None, split: str | None = None, final: bool = False
    ) -> Evaluation:
        self.progress("evaluation", self.share(step))
        start = time.perf_counter()
        found = evaluate(
            self.task, rows or self.shown, split or self.split, step, max(self.settings.micro_batch or 16, 1)
        )
        found = replace(found, final=final, seconds=time.perf_counter() - start)
        self.emit(found)
        return found

    def look(self, step: int) -> None:
        """An evaluation during the run; the weights are kept where they are the best so far."""
        found = self.evaluate(step)
        if self.dev is None:
            return
        if self.split != "dev":  # other rows are shown during the run: these are scored besides
            found = self.evaluate(step, self.dev, "dev")
        score = {"loss": found.loss, "accuracy": -(found.accuracy or 0.0), "f1": -(found.f1 or 0.0)}[
            self.settings.objective
        ]
        (score,) = self.ranks.first(score)  # another machine may round differently
        if score < self.optimizer.run.get("best", math.inf):
            self.optimizer.run.update({"best": score, "best_step": step})
            assert self.folder is not None
            checkpoints.save(self.folder / "best", step, self.blocks, {}, self.identity)
            checkpoints.keep(self.folder / "best", step)

    def choose(self) -> int | None:
        """Put the best weights in place of the last; their step, None where the last are kept as they are."""
        if self.dev is None or self.folder is None:
            return None
        if not self.settings.eval_every or self.optimizer.steps % self.settings.eval_every:
            self.look(self.optimizer.steps)
        step = self.optimizer.run.get("best_step")
        if step is not None:
            checkpoints.load(self.folder / "best" / f"step-{step:09d}", self.blocks, self.identity)
        return step

    def save(self) -> None:
        if self.folder is None or self.saved == self.optimizer.steps:
            return
        state = {"optimizer": self.optimizer.state_dict(), "scheduler": self.scheduler and self.scheduler.state_dict()}
        checkpoints.save(self.folder / "checkpoints", self.optimizer.steps, self.blocks, state, self.identity)
        self.saved, self.trusted = self.optimizer.steps, False

    def trust(self) -> None:
        """The newest checkpoint's weights have a good loss: the one before it is not needed any more."""
        if self.folder is not None and self.saved is not None and not self.trusted:
            checkpoints.keep(self.folder / "checkpoints", self.saved)
            self.trusted = True

    def restore_good(self) -> bool:
        """Go back to the last checkpoint that a loss has shown to be good; one that came after it is removed."""
        if self.folder is None or self.saved is None:
            return False
        if not self.trusted and len(checkpoints.steps(self.folder / "checkpoints")) > 1:
            checkpoints.drop(self.folder / "checkpoints", self.saved)
        return self.restore()

    def restore(self) -> bool:
        """Go back to the last checkpoint, if there is one."""
        found = None if self.folder is None else checkpoints.latest(self.folder / "checkpoints")
        self.ranks.meet()  # or a process that comes late finds what the first one has written meanwhile
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
    both = [] if final_split == "train" else overlap(task.rows, final)
    for note in (*task.notes, *notes, *both):
        emit(Warning(note))
    optimizer = optimizer_of(task, settings, setup)
    dev = dev_rows(task, settings) if settings.keep == "best" else None
    if dev is not None and folder is None:
        raise UserError("keep='best' writes the best weights to the run folder: give one")
    upper, lower = levels(task.rows, settings, optimizer.inner_steps)
    if lower is not None:
        emit(
            Warning(
                f"{len(lower)} training rows are the lower level's and {len(upper)} the upper level's (--lower-share)",
                "bilevel",
            )
        )
    job = Run(task, settings, optimizer, schedule(optimizer, settings), emit, folder, rows, split, stop, progress, dev)
    with dropping(task.model, settings.dropout):
        resumed = job.restore()
        if not resumed:
            job.look(0)
            job.save()  # a disk that is full or read-only is found now, not after hours
        status, step, reason = _train(job, upper, lower)
    if status == "interrupted":
        job.save()
        raise KeyboardInterrupt
    sha, exports = None, []
    if status in ("finished", "budget"):
        job.save()
        best = job.choose()
        if best is not None:
            reason = f"the weights of step {best}, the best on {len(job.dev or ())} dev rows, are kept"
        last = job.evaluate(step if best is None else best, final, final_split, True)
        if math.isfinite(*job.ranks.first(last.loss)):
            job.trust()
            exports = finish(task, any(b.group == "base" for b in job.blocks))
        else:
            status, reason = (
                "not finite",
                f"the loss of the {final_split} rows is {last.loss} after the last step: lower the learning rates",
            )
    counts, tokens = optimizer.counts, job.tokens
    if status not in ("finished", "budget") and job.restore_good():
        reason += f"; the last good checkpoint, of step {job.saved}, is kept"
    if status in ("finished", "budget") or job.saved is not None:
        sha = checkpoints.sha256(checkpoints.weights_of(job.blocks))
    outcome = Outcome(
        status, step, **counts, equivalents=equivalents(counts), tokens=tokens,
        weights_sha256=sha, reason=reason, exports=exports, seconds=time.perf_counter() - started,
    )  # fmt: skip
    emit(outcome)
    return outcome


def _train(job: Run, upper: list[Row], lower: list[Row] | None) -> tuple[Any, int, str]:
    """The loop, until its status is one that a record has; "interrupted" where the user asked."""
    s, task, optimizer = job.settings, job.task, job.optimizer
    if job.budget_spent():
        return "budget", optimizer.steps, ""
    job.clock = time.perf_counter()
    ended = train(
        optimizer, objective(task, s.objective), upper, job.collate, job,
        steps=s.steps if s.steps is not None else 2**62, batch=min(s.batch, len(upper)), seed=s.seed, sampling=s.sampling,
        scheduler=job.scheduler, micro=s.micro_batch if task.padding_exact else 1, accumulate=s.accumulate, lower_rows=lower,
        ranks=job.ranks,
    )  # fmt: skip
    if ended.status == "stopped":
        return job.why, ended.step, ""
    return ended.status, ended.step, ended.reason
