"""Scoring rows with the task's prompts and label words: one forward pass gives the loss and every option's log-likelihood.

Also the objectives without a derivative, for zeroth-order methods: what is reported is then what is descended.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hybridtheory.errors import UserError
from probes import metrics
from probes.encoding import Row, collate
from probes.objectives import IGNORE, Batch, ClassLoss, LabelLoss, TokenLoss
from probes.records import Evaluation
from probes.tasks import Task

OBJECTIVES = ("loss", "accuracy", "f1")


class Undifferentiable:
    """1 - accuracy or 1 - macro F1 of a minibatch, times its rows: a staircase in the weights, so differences of it are its only slopes.

    F1 is not a mean over rows: it is of the whole minibatch, which must not be cut.
    """

    per_row = True

    def __init__(self, scorer: LabelLoss | ClassLoss, metric: str) -> None:
        self.scorer, self.metric, self.select = scorer, metric, scorer.select
        self.name = f"1 - {metric}"

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        return self.scorer.forward(model, batch)

    def loss(self, z: Tensor, batch: Batch) -> Tensor:
        predicted, label = self.scorer.scores(z, batch).argmax(1), batch["label"]
        if self.metric == "accuracy":
            return (predicted != label).sum().float()
        f1 = metrics.macro_f1(predicted.cpu().numpy(), label.cpu().numpy(), self.scorer.scores(z, batch).shape[1])
        return torch.tensor((1 - f1) * len(label))

    def weight(self, batch: Batch) -> float:
        return float(len(batch["label"]))


def scorer(task: Task) -> LabelLoss | ClassLoss:
    """What gives the options' log-likelihoods under this task's own prompts."""
    return task.objective if isinstance(task.objective, ClassLoss) else LabelLoss(select=task.objective.select)


def objective(task: Task, name: str) -> TokenLoss | ClassLoss | Undifferentiable:
    """``name`` "loss" (the task's own), "accuracy" or "f1"."""
    if name not in OBJECTIVES:
        raise UserError(f"--objective is {', '.join(OBJECTIVES)}, not {name!r}")
    if name == "loss":
        return task.objective
    if task.info["labels"] is None:
        raise UserError(f"--objective {name} needs labelled data, and {task.info['data']} has no labels")
    return Undifferentiable(scorer(task), name)


def batch_of(task: Task, rows: Sequence[Row], options: bool) -> dict[str, Tensor]:
    """Rows as one batch, with ``options`` True every option of each row."""
    device = next(task.model.parameters()).device
    return collate(rows, task.tokenizer.pad_token_id, options or isinstance(task.objective, LabelLoss), device)


@torch.no_grad()
def evaluate(task: Task, rows: Sequence[Row], split: str, step: int, size: int = 16, seed: int = 0) -> Evaluation:
    """Loss of ``rows`` and, for labelled data, everything in `probes.metrics`. The model is in evaluation mode inside."""
    model, labelled = task.model, task.info["labels"] is not None
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        total, weight, found = 0.0, 0.0, []
        size = size if task.padding_exact else 1
        for i in range(0, len(rows), size):
            batch = batch_of(task, rows[i : i + size], labelled)
            if not labelled:
                z = task.objective.forward(model, batch)
                total += float(task.objective.loss(z, batch))
                weight += task.objective.weight(batch)
                continue
            score = scorer(task)
            z = score.forward(model, batch)
            scores = score.scores(z, batch)
            found.append(scores.double().cpu().numpy())
            total += float(_loss(task, z, scores, batch))
            weight += len(batch["label"])
    finally:
        for module, mode in modes:
            module.training = mode
    facts: dict[str, Any] = {}
    if labelled:
        label = np.array([r["label"] for r in rows])
        facts = metrics.summary(np.concatenate(found), label, _same_options(rows), seed)
    return Evaluation(step=step, split=split, rows=len(rows), loss=total / weight, **facts)


def _loss(task: Task, z: Tensor, scores: Tensor, batch: Batch) -> Tensor:
    """The task's own loss, summed, from the forward pass that scored the options."""
    if isinstance(task.objective, ClassLoss | LabelLoss):
        return task.objective.loss(z, batch)
    if "candidates" in batch:  # one position a row, all options read from it
        return task.objective.loss(z, batch)
    return -scores.gather(1, batch["label"][:, None]).sum()  # log-likelihoods over the vocabulary already


def _same_options(rows: Sequence[Row]) -> bool:
    """Whether every row chooses among the same words (COPA's and WinoGrande's do not): calibration is over fixed words."""

    def words(row: Row) -> Any:
        return (
            [[t for t in o["targets"] if t != IGNORE] for o in row["options"]]
            if "targets" in row["options"][0]
            else None
        )

    first = words(rows[0])
    return all(words(r) == first for r in rows)
