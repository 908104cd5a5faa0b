"""The losses: taken from the model's logits by us, at the positions that count only, summed over tokens or rows, in
float32.

A batch is a mapping of tensors with one row of data in front (so that it can be cut into micro-batches along
dimension 0):

    input_ids, attention_mask  [B, T]  (decoder_input_ids, decoder_attention_mask too for seq2seq; token_type_ids
    where a classifier has them)
    targets                    [B, T]  token to be predicted from the logits AT this position (already shifted);
                               IGNORE where none is
    label                      [B]     index of the right option or class
    candidates                 [B, K]  the one token of each option, when every option is one token after one prompt

With options of several tokens the first four are [B, K, T], one sequence per option.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

IGNORE = -100  # torch's own ignore_index
Batch = Mapping[str, Tensor]
INPUTS = ("input_ids", "attention_mask", "decoder_input_ids", "decoder_attention_mask", "token_type_ids")


def _inputs(batch: Batch) -> dict[str, Tensor]:
    """What the model reads, with [B, K, T] flattened to [B K, T]."""
    return {k: batch[k].flatten(0, -2) for k in INPUTS if k in batch}


def _wide(z: Tensor) -> Tensor:
    return z if z.dtype == torch.float64 else z.float()


@contextmanager
def _only(model: nn.Module, needed: Tensor) -> Iterator[None]:
    """Inside, the output layer sees the hidden states of the ``needed`` [B, T] positions alone, as one row [1, N, H].

    The logits of a whole batch are B T V numbers and the output layer is a large part of a small model's cost; a
    prompt with one label word needs one position in twenty. Prompt tuning puts virtual tokens in front, so positions
    are counted from the end.
    """

    def select(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden = args[0]
        return (hidden[:, -needed.shape[1] :][needed].unsqueeze(0), *args[1:])

    handle = model.get_output_embeddings().register_forward_pre_hook(select)  # type: ignore[operator]
    try:
        yield
    finally:
        handle.remove()


@dataclass
class TokenLoss:
    """Cross-entropy over the whole vocabulary at the target positions: plain text, or the right label word's tokens,
    summed.

    per_row  True: f is a mean over rows (an option's tokens are summed); False: a mean over tokens.
    select   compute only the needed positions' logits; the task checks that the model allows it.
    """

    per_row: bool = False
    select: bool = True
    name = "cross-entropy over the vocabulary"

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        """Logits [N, V] at the N target positions, in row-major order."""
        needed = batch["targets"].flatten(0, -2) != IGNORE
        if self.select:
            with _only(model, needed):
                return model(**_inputs(batch), use_cache=False, return_dict=True).logits.squeeze(0)
        logits = model(**_inputs(batch), use_cache=False, return_dict=True).logits
        return logits[:, -needed.shape[1] :][needed]

    def loss(self, z: Tensor, batch: Batch) -> Tensor:
        targets = batch["targets"]
        return F.cross_entropy(_wide(z), targets[targets != IGNORE], reduction="sum")

    def weight(self, batch: Batch) -> float:
        return float(len(batch["targets"]) if self.per_row else (batch["targets"] != IGNORE).sum())


@dataclass
class LabelLoss(TokenLoss):
    """Cross-entropy among the options only: softmax over the options' log-likelihoods (an option's tokens summed)."""

    per_row: bool = True
    name = "cross-entropy over the label words"

    def scores(self, z: Tensor, batch: Batch) -> Tensor:
        """Log-likelihood of each option [B, K] (up to one constant per row where options are single tokens)."""
        if "candidates" in batch:
            return _wide(z).gather(1, batch["candidates"])
        targets = batch["targets"]
        flat = targets.flatten(0, 1)
        rows, _ = (flat != IGNORE).nonzero(as_tuple=True)
        logp = -F.cross_entropy(_wide(z), flat[flat != IGNORE], reduction="none")
        total = torch.zeros(len(flat), dtype=logp.dtype, device=logp.device).index_add(0, rows, logp)
        return total.view(targets.shape[:2])

    def loss(self, z: Tensor, batch: Batch) -> Tensor:
        return F.cross_entropy(self.scores(z, batch), batch["label"], reduction="sum")


@dataclass
class ClassLoss:
    """Cross-entropy over a classification head's logits [B, C]."""

    per_row: bool = True
    select: bool = False
    name = "cross-entropy over the classes"

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        return model(**_inputs(batch), return_dict=True).logits

    def scores(self, z: Tensor, batch: Batch) -> Tensor:
        return _wide(z)

    def loss(self, z: Tensor, batch: Batch) -> Tensor:
        return F.cross_entropy(_wide(z), batch["label"], reduction="sum")

    def weight(self, batch: Batch) -> float:
        return float(len(batch["label"]))
