"""What a smoothness run will cost, from one timed call of each kind before it starts, and what it did cost."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

from hybridtheory import memory, streams
from hybridtheory.lanczos import BASIS_ELEMENTS
from hybridtheory.oracle import Oracle
from probes import memory_estimate
from probes.records import Cost

if TYPE_CHECKING:
    from probes.smoothness import Probe

# Products that iterations with a stopping rule took on the embedded model, roughly: vectors of a trace, Lanczos steps of a group and of a
# finer block, pairs of the coupling, steps of the margin. Only the estimate rests on them.
VECTORS, STEPS, INNER_STEPS, PAIRS, MARGIN = 24, 18, 12, 7, 12
VALUES_PER_DIRECTION, DELTAS = 10, 6
# A model too large to keep Lanczos's vectors: products and stand-ins (two values each) of its trace.
LARGE_VECTORS, STAND_INS = 10, 48


@dataclass
class Unit:
    """Seconds of one call over all rows."""

    value: float
    gradient: float
    graph: float
    product: dict[str, float]  # per group


@dataclass
class Meter:
    """Counts, clocks and tells the user how far the work is."""

    oracle: Oracle
    progress: Callable[[str, float], None] | None = None
    started: float = field(default_factory=time.perf_counter)
    expected: Cost | None = None
    unit: Unit | None = None

    def phase(self, name: str) -> None:
        if self.progress is None:
            return
        spent = time.perf_counter() - self.started
        self.progress(name, min(spent / self.expected.seconds, 0.99) if self.expected else 0.0)

    def expect(self, cost: Cost) -> None:
        self.expected = cost

    def actual(self) -> Cost:
        calls = self.oracle.calls
        return Cost(
            "actual",
            calls["gradient"],
            calls["product"],
            calls["value"],
            time.perf_counter() - self.started,
            peak(self.oracle),
        )


def peak(oracle: Oracle) -> int:
    """Most bytes held so far: by tensors on CUDA, by the whole process on the CPU."""
    if oracle.device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(oracle.device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def estimate(probe: Probe, meter: Meter) -> Cost:
    """Time one value, one gradient, one graph and one product a group, and multiply by what the settings ask for."""
    s, oracle, groups = probe.settings, probe.oracle, probe.groups
    inner = [b for b in probe.all_blocks if b not in groups]
    value = timed(oracle.value)
    if oracle.engine == "forward":
        return _values_only(probe, meter, value)
    gradient = timed(lambda: oracle.gradient(*groups))
    product = {}
    trial = memory_estimate.begun(oracle)
    with oracle.products(*groups) as hess:
        graph = 0.0
        for group in groups:
            v = streams.gaussian(group, s.seed, "cost")
            call = partial(hess, v, group)
            first = timed(call)  # the first of them builds the graph
            product[group.name] = timed(call)
            graph = max(graph, first - product[group.name])
        resident = memory.resident(oracle.device)
    trial = replace(trial, graphs=[b for _, b in sorted(hess.graph_bytes.items())], resident=resident)
    meter.unit = Unit(value, gradient, graph, product)
    vectors, steps = min(VECTORS, s.max_vectors), min(STEPS, s.max_steps)
    large = {g.group for g in groups if not inner and g.numel * min(s.max_steps, g.numel) > BASIS_ELEMENTS}
    per_group = {
        g.name: (LARGE_VECTORS if g.group in large else vectors) + steps + 1
        if g.group == "base"
        else max(s.max_vectors // 8, 8) + steps + 1
        for g in groups
    }
    inner_cost = sum((INNER_STEPS + 1) * product[g.name] * 0.5 for g in groups for b in inner if b.group == g.group)
    inner_count = (INNER_STEPS + 1) * len(inner)
    joint = (2 * PAIRS + MARGIN) if len(groups) == 2 else 0
    joint_seconds = (PAIRS + MARGIN) * sum(product.values()) if joint else 0.0
    few = max(s.directions // 3, 4)
    values = {
        "base": s.directions * VALUES_PER_DIRECTION
        + max(s.directions // 3, 2) * 2 * DELTAS
        + ("base" in large and oracle.engine == "exact") * 2 * (LARGE_VECTORS + STAND_INS),
        "peft": max(few // 3, 2) * 2 * DELTAS + 8,
    }
    point_values = sum(values[g.group] for g in groups)
    point_seconds = (
        gradient
        + graph
        + sum(per_group[g.name] * product[g.name] for g in groups)
        + inner_cost
        + joint_seconds
        + point_values * value
    )
    secant_gradients = 1 + len(probe.all_blocks)
    run_values = s.run_steps * 3
    gradients = s.points + s.secants * secant_gradients
    products = s.points * (sum(per_group.values()) + inner_count + joint)
    seconds = (
        time.perf_counter()
        - meter.started
        + s.points * point_seconds
        + s.secants * secant_gradients * gradient
        + run_values * value
        + s.run_steps * (gradient + value) / 2
    )
    held = expected_memory(oracle, memory_estimate.expected(oracle, groups, inner, s, trial))
    return Cost("estimated", gradients, products, s.points * point_values + run_values, seconds, held.bytes, held.terms)


def expected_memory(oracle: Oracle, found: memory_estimate.Peak) -> memory_estimate.Peak:
    """The estimate, or what was held already; freed blocks are handed back from now on where they would break the promise on it."""
    so_far = peak(oracle)
    if so_far >= found.bytes:
        found = memory_estimate.Peak(so_far, "loading, preflight and one call of each kind")
    oracle.watched = memory.watched(found.bytes)
    return found


def _values_only(probe: Probe, meter: Meter, value: float) -> Cost:
    """What ``--engine forward`` takes: slopes, two or three second differences a vector of the trace, and the finite-scale rule."""
    s = probe.settings
    blocks = len(probe.all_blocks)
    base = 2 * 4 * s.directions + 4 * max(s.max_vectors // 4, 8) + s.directions * VALUES_PER_DIRECTION + 40
    point = base * blocks + 2 * DELTAS * max(s.directions // 3, 2)
    values = s.points * point + 3 * s.run_steps
    seconds = time.perf_counter() - meter.started + values * value
    trial = memory_estimate.begun(probe.oracle)
    held = expected_memory(probe.oracle, memory_estimate.expected(probe.oracle, probe.groups, [], s, trial))
    return Cost("estimated", 0, 0, values, seconds, held.bytes, held.terms)
