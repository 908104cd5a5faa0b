"""probe-smoothness: (L0, L1), spectrum, coupling and learning rates of base and PEFT along a short reference run.

    task -> preflight -> full point 0 -> its rates -> reference run (hybrid steps, shrunk until it descends) with secants and
    further full points -> fits and rates over all of them

`run` yields records in that order. It is a pure function of the task, the settings and the starting weights: a resumed run
takes the same steps again (they are cheap) and skips what was measured. The weights are as found when it ends, however it ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from hybridtheory import shards
from hybridtheory.blocks import Block
from hybridtheory.errors import UserError
from hybridtheory.optimizers import Hybrid
from hybridtheory.preflight import preflight
from hybridtheory.vectors import Tensors, add_, clone, norm
from probes import forward_point, rates
from probes.cost_estimate import Meter, estimate
from probes.fits import fits
from probes.given import Given, evaluating, given
from probes.memory_choice import fitted
from probes.point import Settings, measure
from probes.provenance import provenance
from probes.records import (
    End,
    Point,
    Preflight,
    Record,
    Secant,
    TrainStep,
    Warning,
)
from probes.report import Report
from probes.setup import Probe as Setup
from probes.setup import header
from probes.tasks import Task

Probe = Setup[Settings]
Progress = Callable[[str, float], None]  # (what is being done, share of the estimated work that is behind us)


def run(
    task: Task | Given,
    settings: Settings,
    done: Sequence[Record] = (),
    progress: Progress | None = None,
    origin: dict[str, Any] | None = None,
    dry: bool = False,
    restore: bool = True,
) -> Iterator[Record]:
    """Measure, record by record. ``done``: records of the run that is resumed. ``dry``: stop after preflight and cost estimate.

    ``restore`` False leaves the weights where the reference run ends, and saves a copy of them, for a caller that loaded them itself.
    """
    probe, fewer = fitted(task, settings, done)
    meter = Meter(probe.oracle, progress)
    yield header(probe, "smoothness", origin or {})
    with _restored(probe.groups) if restore else nullcontext():
        yield from _warnings(task)
        if fewer:
            yield Warning(fewer, "memory")
        if probe.oracle.engine == "forward":
            yield from forward_point.unknown(probe.groups)
        yield from _preflight(probe, meter)
        expected = estimate(probe, meter)
        yield expected
        if dry:
            return
        meter.expect(expected)
        points = [r for r in done if isinstance(r, Point)]
        secants = [r for r in done if isinstance(r, Secant)]
        for record in _trajectory(probe, meter, done):
            if isinstance(record, Point):
                points.append(record)
            if isinstance(record, Secant):
                secants.append(record)
            yield record
    sizes = {b.group: b.numel for b in probe.groups}
    yield from fits(points, secants, settings.seed)
    yield from rates.rates(points, sizes, settings.q, settings.batch_size, settings.steps)
    yield rates.recommendation(points, sizes, settings.q, settings.batch_size, settings.steps, settings.mu)
    yield meter.actual()
    yield End("finished")


def _trajectory(probe: Probe, meter: Meter, done: Sequence[Record]) -> Iterator[Record]:
    """The reference run with its points and secants, in the order of the steps."""
    s = probe.settings
    have_points = {r.index: r for r in done if isinstance(r, Point)}
    have_secants: dict[tuple[int, str, str], Secant] = {
        (r.step, r.block, r.move): r for r in done if isinstance(r, Secant)
    }
    at_points = _spread(s.points, s.run_steps)
    forward = probe.oracle.engine == "forward"
    measure_point = forward_point.measure if forward else measure
    at_secants = set() if forward else set(_spread(s.secants, s.run_steps))
    walk: Walk | None = None
    last: tuple[int, Tensors, Tensors] | None = None  # step, weights and gradient at the last secant position
    for step in range(s.run_steps + 1):
        if step in at_points:
            index = at_points.index(step)
            last = None  # two copies of the weights: a large model needs the room for its graph
            if index in have_points:
                record = have_points[index]
            else:
                meter.phase(f"point {index + 1} of {s.points}")
                record = measure_point(probe.oracle, probe.groups, probe.blocks, s, probe.rows, index, step)
                yield record
            if walk is None:
                walk = Walk.start(probe, record)
        assert walk is not None  # step 0 is always a point
        if step in at_secants:
            meter.phase("secants")
            wanted = _moves(probe, last)
            known = [have_secants.get((step, b, m)) for b, m in wanted]
            if any(r is None for r in known):
                found, position = _secants(probe, step, last)
                yield from (r for r, old in zip(found, known, strict=True) if old is None)
            else:
                position = _position(probe)
            last = (step, *position)
        if step < s.run_steps:
            meter.phase("reference run")
            yield from (r for r in walk.step(step) if not _taken(r, done))


def _taken(record: TrainStep, done: Sequence[Record]) -> bool:
    return any(isinstance(r, TrainStep) and r.step == record.step and r.accepted == record.accepted for r in done)


def _spread(count: int, steps: int) -> list[int]:
    """``count`` steps from 0 to ``steps``, as evenly as whole numbers allow, without repetition."""
    if count == 1:
        return [0]
    return sorted({round(i * steps / (count - 1)) for i in range(count)})


class Walk:
    """The reference run: hybrid steps on all rows, from the rates that the first point recommends.

    A step after which the loss is higher is taken back and the rate that is to blame is halved; after some steps without that the
    rates grow again, up to where they started. So the run descends near the fastest rate that descends, and covers more
    gradient norms than the smallest rate it ever needed would.
    """

    HALVINGS = 30
    GROWTH, PATIENCE = 1.5, 4

    def __init__(self, probe: Probe, lr: dict[str, float]) -> None:
        self.probe = probe
        s = probe.settings
        # Values alone move the base; an adapter's rule is for gradients, and without them it stays where it is.
        values_only = probe.oracle.engine == "forward"
        self.groups = [b for b in probe.groups if b.group == "base" or not values_only]
        groups = [
            {"block": b, "lr": lr[b.name], "kind": "fo"}
            if b.group == "peft"
            else {"block": b, "lr": lr[b.name], "kind": "zo", "mu": s.mu, "q": s.q, "difference": "central"}
            for b in self.groups
        ]
        self.optimizer = Hybrid(groups, probe.task.model, seed=s.seed)
        self.loss = probe.oracle.value()
        self.largest = dict(lr)
        self.quiet = dict.fromkeys(lr, 0)  # steps since a group's rate was halved

    @classmethod
    def start(cls, probe: Probe, first: Point) -> Walk:
        """Rates recommended from the first point alone; where a rule gave none, one that moves the loss by a hundredth."""
        s = probe.settings
        found = rates.recommendation(
            [first], {b.group: b.numel for b in probe.groups}, s.q, s.batch_size, s.steps, s.mu
        )
        lr = {}
        for block in probe.groups:
            rate = found.base if block.group == "base" else found.peft
            size = first.blocks[block.name].grad_norm
            fallback = 0.01 * max(first.loss, 1e-3) / max(size**2, 1e-12)
            lr[block.name] = rate.value if rate is not None and rate.value is not None else fallback
        return cls(probe, lr)

    def step(self, number: int) -> Iterator[TrainStep]:
        """Take one step that does not raise the loss; each attempt is a record."""
        for _ in range(self.HALVINGS):
            before = {b.name: clone(b.tensors) for b in self.groups}
            eta = {g["block"].name: float(g["lr"]) for g in self.optimizer.param_groups}
            ranks = self.probe.oracle.ranks
            self.optimizer.step(
                ranks.closure(self._closure, self.probe.task.model) if ranks.size > 1 else self._closure
            )
            after = self.probe.oracle.value()
            # Equal to rounding is a standstill, not a rise.
            if after <= self.loss + 1e-6 * abs(self.loss):
                self.loss = after
                self._grow()
                yield TrainStep(number + 1, after, eta)
                return
            guilty = self._blame(before)
            _put(self.groups, before)
            for g in self.optimizer.param_groups:
                if g["block"].name in guilty:
                    g["lr"] /= 2
                    self.quiet[g["block"].name] = 0
            yield TrainStep(
                number + 1, after, eta, accepted=False, note=f"the loss rose; halved the rate of {' and '.join(guilty)}"
            )
        raise UserError(
            f"the reference run does not descend at step {number + 1}: {self.HALVINGS} halvings of the rates did not help; "
            f"the loss is too noisy or too kinked at this scale: try another --mu, more --rows, or --dtype float64"
        )

    def _grow(self) -> None:
        for g in self.optimizer.param_groups:
            name = g["block"].name
            self.quiet[name] += 1
            if self.quiet[name] % self.PATIENCE == 0:
                g["lr"] = min(g["lr"] * self.GROWTH, self.largest[name])

    def _blame(self, before: dict[str, Tensors]) -> list[str]:
        """The groups without whose move the loss would not have risen; all of them when none alone explains it."""
        if len(before) == 1:
            return list(before)
        found = []
        for block in self.groups:
            moved = clone(block.tensors)
            _put([block], before)
            if self.probe.oracle.value() <= self.loss:
                found.append(block.name)
            _put([block], {block.name: moved})
        return found or list(before)

    def _closure(self, backward: bool = False) -> Tensor:
        oracle = self.probe.oracle
        total = torch.zeros((), dtype=torch.float64)
        for batch in (b for i, b in enumerate(oracle.batches) if oracle.ranks.mine(i)):
            loss = oracle.loss(batch) / oracle.total_weight
            if backward:
                loss.backward()
            total += loss.detach().double().cpu()
        return total


def _moves(probe: Probe, last: object) -> list[tuple[str, str]]:
    return [*((b.name, "gradient") for b in probe.all_blocks), *([("all", "trajectory")] if last is not None else [])]


def _position(probe: Probe) -> tuple[Tensors, Tensors]:
    """Copies of the weights and of the gradient, all groups one after the other."""
    weights = [t for b in probe.groups for t in clone(b.tensors)]
    return weights, [t for g in probe.oracle.gradient(*probe.groups) for t in g]


def _secants(
    probe: Probe, step: int, last: tuple[int, Tensors, Tensors] | None
) -> tuple[list[Secant], tuple[Tensors, Tensors]]:
    """One secant a block along its own gradient, and the run's own move since the last position (no further gradient)."""
    oracle = probe.oracle
    weights, gradient = _position(probe)
    by_name = dict(zip([n for b in probe.groups for n in b.names], gradient, strict=True))
    full = norm(gradient)
    found = []
    for block in probe.all_blocks:
        own = [by_name[n] for n in block.names]
        size = norm(own)
        if size == 0.0:
            found.append(Secant(step, block.name, "gradient", full, 0.0, 0.0, None, None))
            continue
        radius = RADIUS * norm(block.tensors)
        with oracle.moved(block, own, -radius / size):
            (there,) = oracle.gradient(block)
        change = norm(add_(there, own, -1.0))
        found.append(Secant(step, block.name, "gradient", full, size, radius, None, change / radius))
    if last is not None:
        moved = norm(add_(clone(weights), last[1], -1.0))
        if moved > 0:
            change = norm(add_(clone(gradient), last[2], -1.0))
            found.append(Secant(step, "all", "trajectory", full, full, moved, change / moved, None))
        else:
            found.append(Secant(step, "all", "trajectory", full, full, 0.0, None, None))
    return found, (weights, gradient)


# Length of a gradient secant, relative to the norm of the block's weights: far above rounding (1e-7), far below where curvature changes.
RADIUS = 1e-3


def _preflight(probe: Probe, meter: Meter) -> Iterator[Record]:
    meter.phase("preflight")
    found = preflight(probe.oracle, probe.settings.seed)
    yield Preflight(found.verdict, found.findings, found.note)
    if found.verdict == "refused":
        raise UserError(found.note)
    if found.verdict == "kinked":
        yield Warning(found.note, "preflight")


def _warnings(task: Task | Given) -> Iterator[Warning]:
    yield from (Warning(note, "task") for note in task.notes)


def _put(blocks: Sequence[Block], values: dict[str, Tensors]) -> None:
    with torch.no_grad():
        for block in blocks:
            for t, v in zip(block.tensors, values[block.name], strict=True):
                t.copy_(v)


@contextmanager
def _restored(blocks: Sequence[Block]) -> Iterator[None]:
    """The blocks' weights, gradients and ``requires_grad`` flags are as found afterwards."""
    tensors = [t for b in blocks for t in b.tensors]
    kept = [(shards.kept(t), t.grad, t.requires_grad) for t in tensors]
    for t in tensors:
        t.grad = None
        if not shards.is_sharded(t):
            t.data = t.data.clone()
    try:
        yield
    finally:
        for t, (data, grad, flag) in zip(tensors, kept, strict=True):
            shards.put(t, data)
            t.grad = grad
            t.requires_grad_(flag)


def probe_smoothness(
    model: torch.nn.Module,
    batches: Sequence[Any],
    loss_fn: Callable[[torch.nn.Module, Any], Tensor] | None = None,
    blocks: str = "group",
    seed: int = 0,
    progress: Progress | None = None,
    **settings: Any,
) -> Report:
    """Measure any module on the given batches; the report holds every record, and its ``json()`` is report.json.

    loss_fn   ``loss_fn(model, batch)``: mean loss over the batch's rows. None: the batches carry labels (see `probes.given`).
    settings  fields of `probes.point.Settings`: points, secants, run_steps, directions, mu, micro_batch, curvature, ...
    The model is measured in evaluation mode; its weights, gradients, flags and modes are as found afterwards. Raises UserError.
    """
    wanted = Settings(blocks=blocks, seed=seed, **settings)
    with evaluating(model):
        return Report.of(run(given(model, batches, loss_fn), wanted, progress=progress, origin=provenance()))
