"""The one training loop: minibatches in, ``optimizer.step(closure)``, everything worth keeping to a sink.

The order of the data is a pure function of (seed, epoch), so a run that starts again at step t sees exactly the batches it would
have seen; the caller's random generators are never touched. Sampling is by exact reshuffled epochs (the setting of
the hybrid paper's theorem: every row once an epoch, a new permutation each) or i.i.d. with replacement.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hybridtheory.errors import UserError
from hybridtheory.estimators.streams import Key, numpy_generator
from hybridtheory.estimators.zo_gradient import NonFiniteLoss
from hybridtheory.optimizers.base import ZeroOrder
from hybridtheory.optimum import ceiling as highest
from hybridtheory.oracle import Objective, microbatches
from hybridtheory.ranks import ALONE, Ranks, checksum


class Sink(Protocol):
    """What the loop reports to; the loop itself writes and prints nothing."""

    def epoch(self, epoch: int, order: list[int]) -> None:
        """A new epoch starts, with this permutation of the row indices (i.i.d. sampling reports none)."""

    def step(self, step: int, loss: float, info: dict[str, Any]) -> bool | None:
        """Step ``step`` (from 0) was made from a point with this minibatch loss. True asks the loop to stop."""


@dataclass(frozen=True)
class Outcome:
    """status: "finished", "stopped" (the sink asked), "diverged" or "not finite"; ``step`` is the number of the next step."""

    status: str
    step: int
    reason: str = ""


def closure_of(
    model: nn.Module, objective: Objective, batches: Sequence[Any], ranks: Ranks = ALONE
) -> Callable[..., Tensor]:
    """closure(backward=False) -> mean loss of one minibatch that is given in micro-batches, weighted as `Oracle` weighs them, and
    shared by the processes of ``ranks``.
    """
    total = sum(objective.weight(b) for b in batches)
    own = [b for i, b in enumerate(batches) if ranks.mine(i)]

    def closure(backward: bool = False) -> Tensor | None:
        loss = None
        for batch in own:
            part = objective.loss(objective.forward(model, batch), batch) / total
            if backward:
                part.backward()
            if torch.is_grad_enabled():
                part = part.detach()  # not otherwise: a forward derivative must stay on the loss
            loss = part if loss is None else loss + part
        return loss

    return ranks.closure(closure, model) if ranks.size > 1 else closure  # type: ignore[return-value]


def permutation(n: int, seed: int, epoch: int, purpose: str = "") -> list[int]:
    """The order of n rows in an epoch; different purposes have different orders."""
    return [int(i) for i in numpy_generator(Key(seed, epoch), f"epoch's permutation{purpose}").permutation(n)]


def minibatches(
    n: int, size: int, seed: int, start: int = 0, sampling: str = "reshuffle", purpose: str = ""
) -> Iterator[tuple[int, list[int], list[int] | None]]:
    """(epoch, row indices, the epoch's permutation where the epoch starts), from step ``start`` on, without end.

    n, size   rows there are, rows of a minibatch (1 to n); sampling: "reshuffle" or "iid". UserError otherwise.
    The last minibatch of an epoch holds what is left of it.
    """
    if sampling not in ("reshuffle", "iid"):
        raise UserError(f"sampling must be 'reshuffle' or 'iid', got {sampling!r}")
    if not 1 <= size <= n:
        raise UserError(f"a minibatch of {size} rows cannot be drawn from {n} rows: lower --batch or give more data")
    per_epoch = -(-n // size)
    step, order = start, None
    while True:
        epoch, place = divmod(step, per_epoch)
        if sampling == "iid":
            rows = numpy_generator(Key(seed, step), f"minibatch's rows{purpose}").integers(0, n, size)
            yield epoch, [int(i) for i in rows], None
        else:
            fresh = place == 0 or order is None
            if order is None or place == 0:
                order = permutation(n, seed, epoch, purpose)
            yield epoch, order[place * size : (place + 1) * size], order if fresh else None
        step += 1


def train(
    optimizer: ZeroOrder,
    objective: Objective,
    rows: Sequence[Any],
    collate: Callable[[list[Any]], Any],
    sink: Sink,
    *,
    steps: int,
    batch: int,
    seed: int,
    sampling: str = "reshuffle",
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
    micro: int | None = None,
    accumulate: int = 1,
    ceiling: float | None = None,
    patience: int = 5,
    lower_rows: Sequence[Any] | None = None,
    ranks: Ranks = ALONE,
) -> Outcome:
    """Run up to step ``steps`` (counted from the start of the run: a loaded optimizer goes on where it stopped).

    batch       rows of a minibatch; ``accumulate`` minibatches make one step (each with directions of its own).
    micro       rows of a forward pass (None: the whole minibatch); changes memory and nothing else beyond rounding.
    ceiling     the run has diverged when the loss is above it ``patience`` times in a row; None: `optimum.ceiling` of the first
                loss.
    ranks       processes that share every minibatch: slopes, directions and weights are the same on all, which each step checks.
    lower_rows  what the inner steps of a bilevel method draw their minibatches from (None: ``rows``), in an order of its own.
    The model stays in the mode (train or eval) that it is in. Parameters are those before the step that failed when the outcome
    is "not finite" (after a sequential hybrid step the base may have moved; the note says so). Raises UserError for settings of
    `minibatches` that cannot be.
    """
    model, high = optimizer.model, optimizer.run.get("high", 0)
    batches = minibatches(len(rows), batch, seed, optimizer.steps * accumulate, sampling)
    limit = optimizer.run.get("ceiling", ceiling)
    below = rows if lower_rows is None else lower_rows
    inner = minibatches(
        len(below),
        min(batch, len(below)),
        seed,
        optimizer.steps * optimizer.inner_steps,
        sampling,
        " of the lower level",
    )

    def closure_on(source: Sequence[Any], chosen: list[int]) -> Callable[..., Tensor]:
        whole = collate([source[i] for i in chosen])
        most = len(chosen) if micro is None else micro
        size = min(most, -(-len(chosen) // ranks.size))
        return closure_of(model, objective, [whole] if size == len(chosen) else microbatches(whole, size), ranks)

    while optimizer.steps < steps:
        step = optimizer.steps
        for turn in range(accumulate):
            epoch, chosen, order = next(batches)
            if order is not None:
                sink.epoch(epoch, order)
            closure = closure_on(rows, chosen)
            lower = [closure_on(below, next(inner)[1]) for _ in range(optimizer.inner_steps)]
            try:
                if turn < accumulate - 1:
                    loss = float(optimizer.accumulate(closure))
                else:
                    loss = float(optimizer.step(closure, lower=lower) if lower else optimizer.step(closure))
            except NonFiniteLoss as error:
                return Outcome("not finite", step, str(error))
        if ranks.size > 1:
            slopes = [struct.unpack("<q", struct.pack("<d", s))[0] for zo in optimizer.measured for s in zo.slopes]
            ranks.agree(f"step {step}", checksum(list(model.parameters())), sum(slopes) % (1 << 64))
        if scheduler is not None:
            scheduler.step()
        if limit is None:
            limit = optimizer.run["ceiling"] = highest(loss)
        high = optimizer.run["high"] = high + 1 if not loss <= limit else 0  # before the sink, which may keep the state
        asked = sink.step(step, loss, optimizer.report())
        if high >= patience or not math.isfinite(loss):
            return Outcome(
                "diverged",
                step + 1,
                f"the loss was above {limit:.4g} on {high} steps in a row (last "
                f"{loss:.4g} at step {step}): lower the learning rates",
            )
        if asked:
            return Outcome("stopped", step + 1, "the sink asked")
    return Outcome("finished", optimizer.steps)
