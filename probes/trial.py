"""The trial run: before anything is measured, one small forward and backward pass says whether it can be."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from hybridtheory import memory
from hybridtheory.errors import UserError
from probes.adapters import TYPES
from probes.encoding import Row
from probes.objectives import ClassLoss, TokenLoss

if TYPE_CHECKING:
    from probes.tasks import Task


def try_out(task: Task, peft: str) -> None:
    """Does the pair of model and adapter run, is the loss finite, does the adapter take part, and are the logits of the
    needed positions those of the full ones? Two short rows of different length, so that padding is tried too: where it
    changes the loss, the task's batches are of single rows.

    Raises UserError with the upstream cause; falls back to full logits where only the selection fails.
    """
    known = task.model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    largest = max(max(o["input_ids"]) for r in task.rows for o in r["options"])
    if largest >= known:
        raise UserError(
            f"the tokenizer gives token {largest} and {task.info['model']} knows {known}: it is another model's tokenizer"
        )
    by_length = sorted(task.rows, key=length)
    other = next((r for r in by_length if length(r) > length(by_length[0])), by_length[-1])
    batch = task.collate([by_length[0], other])
    objective = task.objective
    try:
        loss, gradient = _loss_and_adapter_gradient(task, batch)
        if not isinstance(objective, ClassLoss) and not _selection_is_exact(task.model, objective, batch):
            objective.select = False
            task.notes.append("this output layer needs all positions: the logits of whole rows are computed")
        task.padding_exact = _padding_is_exact(task, [by_length[0], other], loss)
    except (ValueError, TypeError, RuntimeError, AttributeError, IndexError, NotImplementedError, KeyError) as error:
        if memory.exhausted(error):
            raise  # not this pair's fault: whoever chose the sizes handles it
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:240]
        raise UserError(
            f"{task.info['model']} does not run with --peft {peft} ({type(error).__name__}: {reason}): "
            f"choose another of {', '.join(TYPES)}"
        ) from error
    if not task.padding_exact and math.isfinite(loss):
        task.notes.append("padding changes this model's loss, so every batch holds one row")
    if not math.isfinite(loss):
        raise UserError(
            f"the loss of {task.info['model']} is {loss} on the first rows: the weights hold no finite number there, "
            f"or --dtype is too narrow (float32 is the default)"
        )
    if gradient == 0.0:
        raise UserError(
            f"the loss of {task.info['model']} does not depend on its {task.peft_info['type']} adapter (its gradient is "
            f"zero): the architecture ignores it, choose another of {', '.join(TYPES)}"
        )


def length(row: Row) -> int:
    """Tokens that the model reads for the right option of a row."""
    return len(row["options"][row["label"] if len(row["options"]) > 1 else 0]["input_ids"])


def _loss_and_adapter_gradient(task: Task, batch: dict[str, Tensor]) -> tuple[float, float | None]:
    """The loss of a batch, from full logits, and the largest entry of the adapter's gradient (None without an adapter)."""
    found = [p for n, p in task.model.named_parameters() if p.is_floating_point() and task.is_peft(n)]
    before = [p.requires_grad for p in task.model.parameters()]
    objective = task.objective if isinstance(task.objective, ClassLoss) else _full(task.objective)
    try:
        task.model.requires_grad_(False)
        for p in found:
            p.requires_grad_(True)
        loss = objective.loss(objective.forward(task.model, batch), batch)
        grads = torch.autograd.grad(loss, found, allow_unused=True) if loss.requires_grad else []
    finally:
        for p, flag in zip(task.model.parameters(), before, strict=True):
            p.requires_grad_(flag)
    largest = max((float(g.abs().max()) for g in grads if g is not None), default=0.0)
    return float(loss.detach()), largest if found else None


@torch.no_grad()
def _selection_is_exact(model: nn.Module, objective: TokenLoss, batch: dict[str, Tensor]) -> bool:
    z = _full(objective).forward(model, batch).double()
    try:
        few = objective.forward(model, batch).double()
    except Exception:  # an output layer that wants its input whole
        return False
    eps = torch.finfo(next(model.parameters()).dtype).eps
    return few.shape == z.shape and float((few - z).abs().max()) <= 100 * eps * float(z.abs().max())


@torch.no_grad()
def _padding_is_exact(task: Task, rows: list[Row], together: float) -> bool:
    """Whether two rows cost the same in one padded batch as one by one (to 1e-4, or the width of the model's numbers)."""
    batches = [task.collate([r]) for r in rows]
    alone = sum(float(task.objective.loss(task.objective.forward(task.model, b), b)) for b in batches)
    eps = torch.finfo(next(task.model.parameters()).dtype).eps
    return abs(alone - together) <= max(1e-4, 20 * eps) * abs(together)


def _full(objective: TokenLoss) -> TokenLoss:
    return type(objective)(per_row=objective.per_row, select=False)
