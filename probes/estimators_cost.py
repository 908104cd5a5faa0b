"""What a run of probe-estimators will cost, from one timed call of each kind before it starts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from hybridtheory.blocks import Block
from hybridtheory.errors import UserError
from probes import budget
from probes.cost_estimate import peak, timed
from probes.draws import Reference
from probes.laws import Member, Source, sources
from probes.records import Cost
from probes.sampling import RELATIVE_VARIANCE, draw, pilot
from probes.setup import Probe as Setup

SAMPLE = 1 << 18  # weights that a law's draw is timed on
HUTCHINSON = 2  # products behind HiZOO's preconditioner


def estimate(probe: Setup[Any], members: Sequence[Member]) -> Cost:
    """From a timed forward pass and gradient, and one batch of directions of each source on a piece of the weights."""
    s, oracle = probe.settings, probe.oracle
    losses = budget.losses_of(probe)
    oracle.value()  # the first pass of a process also loads and plans
    value, gradient = timed(losses.value), timed(lambda: oracle.gradient(*probe.groups))
    seconds, values, products = value + gradient, 0.0, 0.0
    size = sum(g.numel for g in probe.groups)
    for group in probe.groups:
        count = RELATIVE_VARIANCE / s.precision_for(group.numel) ** 2 + pilot(group.numel)
        seconds += sum(count * _per_draw(x, group, s.seed) for x in sources(members, group) if x.kind != "coordinate")
        parts = len({b.name for b in probe.all_blocks if b.group == group.group})  # each is perturbed alone
        values += parts * 2 * len(budget.grid(s.mus, size)) * budget.directions(s.directions, size)
        products += 1 + HUTCHINSON * any(m.name == "hizoo" for m in members)
    seconds += 1.3 * values * value + products * 3 * gradient  # a perturbed pass also makes its weights
    largest = max(sum(t.numel() * t.element_size() for t in g.tensors) for g in probe.groups)
    return Cost("estimated", 1, products, values, seconds, peak(oracle) + 5 * largest)


def _per_draw(source: Source, group: Block, seed: int) -> float:
    """Seconds a direction, by one batch on tensors of about SAMPLE weights; threads share batches."""
    part: dict[str, torch.nn.Parameter] = {}
    for name, p in sorted(
        group.parameters.items(), key=lambda item: item[1].numel() > SAMPLE
    ):  # in order, larger ones last
        if sum(x.numel() for x in part.values()) >= SAMPLE // 2:
            break
        part[name] = p
    block = Block(group.name, group.group, part)
    values = [p.detach().to(torch.promote_types(p.dtype, torch.float32)) for p in block.tensors]
    reference = Reference.of(block, dict.fromkeys(part, group.name), values, values, seed)
    h = {n: torch.ones_like(v) for n, v in zip(part, values, strict=True)}
    try:
        laws = {m.label: m.on(block, h) for m in source.members}
        return _alone(lambda: draw(seed, source, laws, block, [block], reference, 0, source.size)) * (
            group.numel / block.numel / source.size
        )
    except UserError:  # a rank that only a larger tensor allows
        return 0.0


def _alone(call: Callable[[], object]) -> float:
    """Seconds of a call on one thread, divided by how many run side by side; of the second, since the first one also plans."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        call()
        return timed(call) / threads
    finally:
        torch.set_num_threads(threads)
