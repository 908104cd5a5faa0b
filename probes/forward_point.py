"""One point of a run with ``--engine forward``: what values of the loss tell, and nothing else.

‖g‖ comes from slopes along random directions, the trace from second differences, φ(δ) and the finite-scale rule of the base as with
any engine. Both ends of the spectrum, g'Hg, the coupling, minibatch noise and the adapter's first-order rate need gradients: they stay
unmeasured, and the rules that rest on them say so.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from hybridtheory import forward
from hybridtheory.blocks import Block
from hybridtheory.errors import UserError
from hybridtheory.oracle import Oracle
from probes import point, point_scale
from probes.records import Point, Warning
from probes.records_smoothness import BlockPoint

# Directions of ‖g‖² in units of those of the finite-scale rule, whose control variate rests on it: a slope costs two values, a rung of
# the rule as many as it has rates.
SLOPES = 4


def measure(
    oracle: Oracle,
    groups: Sequence[Block],
    blocks: Sequence[Block],
    settings: point.Settings,
    rows: int,
    index: int,
    step: int,
) -> Point:
    """Groups and finer blocks alike; norms of gradients are estimates with about 1/sqrt(2 directions) relative error."""
    started = time.perf_counter()
    loss = oracle.value()
    if not math.isfinite(loss):
        raise UserError(
            f"the loss is {loss} at step {step}: nothing can be measured there; check data, dtype and rates"
        )
    made: dict[str, BlockPoint] = {}
    scales: dict[str, Any] = {"phi": {}, "finite_scale": {}}

    def batch(number: int) -> list[int] | None:
        return point_scale.training_batch(oracle, settings.batch_size, rows, number)[0]

    for block in (*groups, *(b for b in blocks if b.name not in {g.name for g in groups})):
        directions = SLOPES * settings.directions
        found = forward.slopes(oracle, block, settings.seed, settings.mu, directions, index)
        vectors = max(settings.max_vectors // 4, 8) if block.group == "base" else 8
        trace, forms = forward.trace(oracle, block, settings.seed, vectors, index)
        made[block.name] = BlockPoint(
            grad_norm=math.sqrt(found.g_sq),
            trace=trace,
            rows_stderr=point.jackknife(forms, np.array(oracle.weights) / oracle.total_weight),
        )
        if block not in groups:
            continue
        if batch(0) is not None and block.group == "base":
            found = forward.slopes(oracle, block, settings.seed, settings.mu, directions, index, batch)
        phi, finite = point_scale.at_finite_scale(
            oracle, block, made[block.name], loss, [], settings, rows, index, found
        )
        if phi is not None:
            scales["phi"][block.name] = phi
        if finite is not None:
            scales["finite_scale"][block.name] = finite
        made[block.name] = replace(made[block.name], at_scale=point_scale.at_mu(phi, settings.mu))
    norm = math.sqrt(sum(made[g.name].grad_norm ** 2 for g in groups))
    return Point(index, step, loss, norm, made, seconds=time.perf_counter() - started, **scales)


def unknown(groups: Sequence[Block]) -> Iterator[Warning]:
    """What a run without gradients cannot say."""
    yield Warning(
        "--engine forward takes no gradient: both ends of the spectrum, tr(H+), g'Hg, the coupling and the minibatch noise are not known, "
        "and neither are (L0, L1) and the rules that rest on them; norms of gradients are estimates from slopes",
        "engine",
    )
    if any(b.group == "peft" for b in groups):
        yield Warning(
            "--engine forward cannot recommend the adapter's rate, a rule for gradient steps, and the reference run leaves the adapter "
            "where it is; --engine difference needs one backward pass at a time and can",
            "engine",
        )
