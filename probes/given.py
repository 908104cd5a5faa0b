"""Any nn.Module with a loss as a task: the same probe from Python, without files, hub or tokenizer.

from probes import probe_smoothness
report = probe_smoothness(model, batches, loss_fn)
report.json()["learning_rates"]["finite_scale"]["base"]
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybridtheory.errors import UserError
from hybridtheory.oracle import Batch, MeanLoss, Objective, microbatches, rows_in
from probes.adapters import describe, is_peft
from probes.models import state_sha256

IGNORE = -100


@dataclass
class Given:
    """What a smoothness run asks of a task (see `probes.tasks.Task`), made from a module, its batches and its loss."""

    model: nn.Module
    objective: Objective
    given: list[Batch]
    peft_info: dict[str, Any] = field(default_factory=dict)
    base: bool = True
    notes: list[str] = field(default_factory=list)

    def is_peft(self, name: str) -> bool:
        return is_peft(name)

    @property
    def rows(self) -> range:
        return range(sum(rows_in(b) for b in self.given))

    @property
    def info(self) -> dict[str, Any]:
        return {
            "model": type(self.model).__name__,
            "model_sha256": state_sha256(self.model),
            "data": f"{len(self.given)} batches given in Python",
            "data_sha256": _digest(self.given),
            "loss": getattr(self.objective, "name", "given in Python"),
        }

    def batches(self, size: int) -> list[Batch]:
        return [piece for b in self.given for piece in microbatches(b, size)]


class Labelled:
    """The loss of a transformers model, or of a plain classifier, from logits and labels: cross-entropy, ignoring -100.

    Batches are mappings with "labels", or pairs (inputs, class indices). A causal language model's labels are its inputs, shifted here.
    """

    name = "cross-entropy of the labels"

    def __init__(self, causal: bool) -> None:
        self.causal = causal

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        if not isinstance(batch, Mapping):
            return model(batch[0])
        inputs = {k: v for k, v in batch.items() if k != "labels"}
        # An encoder-decoder makes its decoder's inputs from the labels; the loss that it computes beside is not used.
        if "labels" in batch and "decoder_input_ids" not in inputs and _shifts_labels(model):
            inputs["labels"] = batch["labels"]
        logits = model(**inputs).logits
        return logits[:, :-1] if self.causal else logits

    def _targets(self, batch: Batch) -> Tensor:
        labels = batch["labels"] if isinstance(batch, Mapping) else batch[1]
        return labels[:, 1:] if self.causal else labels

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        targets = self._targets(batch)
        outputs = outputs[:, -targets.shape[1] :] if targets.dim() > 1 else outputs  # virtual tokens come first
        z = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
        return F.cross_entropy(z.flatten(0, -2), targets.flatten(), ignore_index=IGNORE, reduction="sum")

    def weight(self, batch: Batch) -> float:
        return float((self._targets(batch) != IGNORE).sum())


def given(
    model: nn.Module, batches: Sequence[Batch], loss_fn: Callable[[nn.Module, Batch], Tensor] | None = None
) -> Given:
    """``loss_fn(model, batch)`` returns the mean loss over a batch's rows; without one the labels in the batches say what it is."""
    batches = list(batches)
    if not batches:
        raise UserError("batches is empty: pass at least one batch (a tensor, a tuple or a mapping of tensors)")
    objective: Objective
    if loss_fn is not None:
        objective = MeanLoss(loss_fn)
    elif all(_labelled(b) for b in batches):
        inner: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
        objective = Labelled(causal=type(inner).__name__.endswith(("ForCausalLM", "LMHeadModel")))
    else:
        raise UserError(
            'the batches carry no labels, so loss_fn must be given: batches are mappings with "labels" or pairs (inputs, class indices), '
            "or loss_fn(model, batch) returns the mean loss"
        )
    info = describe(model) if hasattr(model, "peft_config") else {}
    return Given(model, objective, batches, info)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, each submodule's own mode afterwards."""
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for m, mode in modes:
            m.training = mode


def _labelled(batch: Batch) -> bool:
    if isinstance(batch, Mapping):
        return isinstance(batch.get("labels"), Tensor)
    return (
        isinstance(batch, (tuple, list))
        and len(batch) == 2
        and isinstance(batch[1], Tensor)
        and not batch[1].is_floating_point()
    )


def _shifts_labels(model: Any) -> bool:
    config = getattr(model, "config", None)
    return (
        bool(getattr(config, "is_encoder_decoder", False)) and "labels" in inspect.signature(model.forward).parameters
    )


def _digest(batches: Sequence[Batch]) -> str:
    digest = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            digest.update(str((tuple(value.shape), value.dtype)).encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(value, Mapping):
            for k in sorted(value):
                digest.update(repr(k).encode())
                add(value[k])
        elif isinstance(value, (tuple, list)):
            for v in value:
                add(v)

    for b in batches:
        add(b)
    return digest.hexdigest()
