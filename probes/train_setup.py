"""The parts that a training run is put together from: optimizer, schedule, rows to score, dropout."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from hybridtheory.errors import UserError
from hybridtheory.estimators.catalogue import parse
from hybridtheory.optimizers import ZeroOrder, build
from probes.encoding import Row
from probes.setup import Probe
from probes.sources import load_source
from probes.splits import Splits, encode, order
from probes.tasks import Task
from probes.train_settings import TrainSettings


def equivalents(counts: dict[str, int]) -> int:
    """A forward pass counts 1, a backward pass 2."""
    return counts["forwards"] + 2 * counts["backwards"]


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
    if settings.eval_data == "train":
        splits, names = (task.rows, task.rows), ("train", "train")
    elif settings.eval_data is not None:
        source, encoder = load_source(settings.eval_data), task.splits.encoder  # type: ignore[attr-defined]
        if len(source.splits) == 1 and not source.running:
            # A set without a split of its own for testing is here to be tested on: all of it.
            rows = encode(source, next(iter(source.splits.values())), encoder, None, 0)[0]
        else:
            other = Splits(source, encoder, 0)
            rows = other["test"] if "test" in other else other["dev"]
        splits, names = (rows, rows), (settings.eval_data, settings.eval_data)
    else:
        test = task.splits["test"] if "test" in task.splits else task.splits["dev"]
        names = ("dev" if "dev" in task.splits else "test", "test" if "test" in task.splits else "dev")
        splits = (task.splits[names[0]], test)
    shown, final = ([rows[i] for i in order(len(rows), 0)] for rows in splits)
    if not shown or not final:
        raise UserError(f"the data {settings.eval_data or task.info['data']} has no row to evaluate on")
    return shown[: settings.eval_rows], names[0], final[: settings.final_rows], names[1]


def dev_rows(task: Task, settings: TrainSettings) -> list[Row]:
    """Rows of the dev split that choose the best weights: never those of the test, whose scores would then flatter."""
    if "dev" not in task.splits:
        raise UserError(
            f"--keep best chooses by the dev split, and {task.info['data']} has none (its splits: {', '.join(task.splits)}): "
            "leave --keep out, or give data with a dev split"
        )
    rows = task.splits["dev"]
    return [rows[i] for i in order(len(rows), 0)][: settings.eval_rows]


def levels(rows: list[Row], settings: TrainSettings, inner_steps: int) -> tuple[list[Row], list[Row] | None]:
    """(rows of the upper level, rows of the lower one): of a bilevel method disjoint, otherwise (all, None).

    The two levels are two objectives: an adapter that fits the lower rows has to help on rows that it was not fitted to. The rows come in
    a seeded order, so the first of them are a random part.
    """
    if not inner_steps or not settings.lower_share:
        return rows, None
    cut = round(settings.lower_share * len(rows))
    if not 0 < cut < len(rows):
        raise UserError(
            f"--lower-share {settings.lower_share:g} of {len(rows)} training rows leaves one level without a row: give more --rows, or "
            "--lower-share 0 for the same rows in both levels"
        )
    return rows[cut:], rows[:cut]


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
