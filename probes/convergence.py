"""probe-convergence: does a run of the hybrid method do what the theorems say?

    task -> rates (given, or recommended by probe-smoothness) -> runs at constant rates, everything measured at every step
         -> at points of the first run: constants, and what one step does on average beside two predictions
         -> Checks: one-step descent, every theorem's bound with its hypotheses, the exponent of the rate

`run` yields records in that order. The weights are as found when it ends.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from typing import Any

from hybridtheory import streams
from hybridtheory.blocks import Block
from hybridtheory.descent import Local, StepChange, one_step
from hybridtheory.errors import UserError
from hybridtheory.optimizers.base import ZeroOrder
from hybridtheory.optimizers.catalogue import METHODS, build
from hybridtheory.vectors import Tensors, clone, dot
from probes import point as points
from probes import smoothness
from probes.convergence_checks import checks, constants
from probes.convergence_settings import LAWS, Settings
from probes.cost_estimate import Meter, timed
from probes.given import Given
from probes.records import Cost, End, Point, Recommendation, Record, Warning
from probes.records_convergence import Descent, Nearby, Trajectory
from probes.records_smoothness import BlockPoint
from probes.setup import Probe as Setup
from probes.setup import header
from probes.smoothness import Progress
from probes.tasks import Task
from probes.trajectory import Walker

# A batch of all rows has no minibatch noise: in the noise-limited rule it is a batch of very many.
NOISELESS = 10**9

Probe = Setup[Settings]


def run(
    task: Task | Given,
    settings: Settings,
    progress: Progress | None = None,
    origin: dict[str, Any] | None = None,
    dry: bool = False,
    done: Sequence[Record] = (),
) -> Iterator[Record]:
    """Measure, record by record; the last ones are the checks. ``dry``: stop after the cost estimate. ``done``: records of the run that
    is resumed; points and whole runs among them are not measured again. Raises UserError.
    """
    settings = _batched(settings, len(task.rows))
    probe = Probe.of(task, settings)
    f_star = _f_star(task, settings)
    moves = _moving(probe)
    meter = Meter(probe.oracle, progress)
    yield header(probe, "convergence", origin or {})
    yield from (Warning(note, "task") for note in task.notes)
    expected = _estimate(probe, meter)
    yield expected
    if dry:
        return
    meter.expect(expected)
    with smoothness._restored(probe.groups):
        known = {r.index: r for r in done if isinstance(r, Nearby)}
        recommended = next((r for r in done if isinstance(r, Recommendation)), None) if known else None
        eta, source, first, probing = yield from _rates(probe, moves, meter, recommended)
        runs: list[Trajectory] = []
        measured: list[Point] = []
        nearby: list[Nearby] = []
        descents: list[Descent] = []
        start = {b.name: clone(b.tensors) for b in probe.groups}
        for number in range(settings.runs):
            meter.phase(f"run {number + 1} of {settings.runs}")
            whole = next((r for r in done if isinstance(r, Trajectory) and r.run == number), None)
            if whole is not None:
                if number == 0:
                    measured += [r for r in done if isinstance(r, Point)]
                    descents += [r for r in done if isinstance(r, Descent)]
                    nearby += known.values()
                runs.append(whole)
                continue
            smoothness._put(probe.groups, start)
            walker = Walker(
                probe.oracle,
                probe.groups,
                _optimizer(probe, eta, number),
                number,
                settings.seed + number,
                settings.order,
            )
            at = smoothness._spread(settings.points, settings.steps - 1) if number == 0 else []
            for step in walker.steps(settings.steps):
                if step in at:
                    index = at.index(step)
                    if index in known:
                        measured += [r for r in done if isinstance(r, Point) and r.index == index]
                        descents += [r for r in done if isinstance(r, Descent) and r.index == index]
                        nearby.append(known[index])
                        continue
                    meter.phase(f"point {index + 1} of {settings.points}")
                    here, near, changes, cross = _point(probe, eta, moves, index, step, first if index == 0 else None)
                    measured.append(here)
                    yield here
                    for change in changes:
                        descents.append(_descent(change, eta, index, step))
                        yield descents[-1]
                    nearby.append(Nearby(index, step, cross, near.slope_error if near is not None else 0.0))
                    yield nearby[-1]
                    meter.phase(f"run {number + 1} of {settings.runs}")
            runs.append(walker.record())
            yield runs[-1]
            if walker.status != "finished":
                yield Warning(f"run {number} ended early: {walker.note}", "run")
    found = constants(probe, eta, source, measured, nearby, runs, f_star)
    yield found
    yield from checks(descents, found, runs)
    spent = meter.actual()
    for name in ("gradients", "products", "values"):
        spent = replace(spent, **{name: getattr(spent, name) + getattr(probing, name)})
    yield spent
    yield End("finished")


# ---- what is run -----------------------------------------------------------------------------------------------------


def _batched(settings: Settings, rows: int) -> Settings:
    """Minibatches are the oracle's micro-batches: their size is the batch size."""
    size = settings.batch_size
    if size is None:
        return settings
    if not 1 <= size < rows:
        raise UserError(
            f"--batch-size must be from 1 to {rows - 1} for {rows} rows, got {size}: leave it out for all rows in every step"
        )
    return Settings(**{**settings.__dict__, "micro_batch": size})


def _f_star(task: Task | Given, settings: Settings) -> float:
    if settings.f_star is not None:
        return settings.f_star
    loss = str(task.info.get("loss", ""))
    if "cross-entropy" in loss:
        return 0.0
    raise UserError(
        f"the bounds need f*, a lower bound of the loss, and none is known for the loss {loss or 'given in Python'!r}: "
        f"give --f-star (f_star=)"
    )


def _moving(probe: Probe) -> dict[str, str]:
    """Group -> "zo" or "fo", for the groups that the method moves."""
    method = METHODS[probe.settings.method]
    kinds = {"base": "fo" if method.kind == "fo" else "zo", "peft": "zo" if method.kind == "zo" else "fo"}
    wanted = ("base", "peft") if method.blocks == "both" else (method.blocks,)
    have = {b.group for b in probe.groups}
    missing = [g for g in wanted if g not in have]
    if missing:
        raise UserError(
            f"the method {probe.settings.method} moves {' and '.join(wanted)} weights and this model has no {missing[0]} weights"
        )
    return {g: kinds[g] for g in wanted}


def _optimizer(probe: Probe, eta: dict[str, float], number: int) -> ZeroOrder:
    s = probe.settings
    blocks: dict[str, Block] = {b.group: b for b in probe.groups}
    law = None if s.law is None else LAWS[s.law]
    return build(
        s.method, probe.task.model, blocks.get("base"), blocks.get("peft"), lr_base=eta.get("base"), lr_peft=eta.get("peft"),
        seed=s.seed + number, law=law, mu=s.mu, q=s.q,
    )  # fmt: skip


def _difference(method: str) -> str:
    return str(
        dict(METHODS[method].options).get("difference", "forward" if METHODS[method].kind == "hybrid" else "central")
    )


def _rates(
    probe: Probe, moves: dict[str, str], meter: Meter, recommended: Recommendation | None = None
) -> Generator[Record, None, tuple[dict[str, float], str, Point | None, Cost]]:
    """(rates, their source, the first point where it was measured, what that cost): a short smoothness run for what was not given.

    ``recommended``: what that run recommended before an interruption, when its first point is no longer needed.
    """
    s = probe.settings
    spent = Cost("actual", 0, 0, 0, 0.0, 0)
    given = {g: v for g, v in (("base", s.lr_base), ("peft", s.lr_peft)) if v is not None and g in moves}
    if len(given) == len(moves):
        yield from smoothness._preflight(probe, meter)  # type: ignore[arg-type]
        return given, s.rates_from or "given", None, spent
    planned = s.batch_size or NOISELESS
    short = points.Settings(
        points=2, secants=1, run_steps=s.probe_steps, directions=8, batch_size=planned, steps=s.steps, mu=s.mu, q=s.q, seed=s.seed,
        micro_batch=s.micro_batch, curvature=s.curvature, max_vectors=16, max_steps=40, max_memory=s.max_memory, margin=False,
    )  # fmt: skip
    first: Point | None = None
    found = recommended
    probing = smoothness.run(probe.task, short, progress=lambda what, _: meter.phase(f"rates: {what}"))
    for record in () if recommended is not None else probing:
        if isinstance(record, smoothness.Preflight | Warning):
            yield record
        elif isinstance(record, Cost) and record.phase == "actual":
            spent = record
        elif isinstance(record, Point) and first is None:
            first = record
        elif isinstance(record, Recommendation):
            found = replace(record, settings={**record.settings, "batch_size": s.batch_size or probe.rows})
            yield found
    assert found is not None
    eta = {}
    for group in moves:
        rate = found.base if group == "base" else found.peft
        if group not in given and (rate is None or rate.value is None):
            raise UserError(
                f"no rate could be recommended for the {group} weights ({rate.note if rate else ''}): give --lr-{group}"
            )
        eta[group] = given[group] if group in given else float(rate.value)  # type: ignore[union-attr, arg-type]
    return eta, "recommended by probe-smoothness at two points", first, spent


# ---- one point -------------------------------------------------------------------------------------------------------


def _point(
    probe: Probe, eta: dict[str, float], moves: dict[str, str], index: int, step: int, known: Point | None
) -> tuple[Point, Local | None, list[StepChange], float]:
    """Constants here, what one step does, and ‖H_xy‖_F²."""
    s = probe.settings
    # No bound asks for the margin, and what steps do at their own scale is measured better below.
    wanted = points.Settings(
        points=1, directions=4, batch_size=probe.rows, mu=s.mu, q=s.q, seed=s.seed, curvature=s.curvature, max_vectors=16, max_steps=40,
        max_memory=s.max_memory, scales=False, margin=False,
    )  # fmt: skip
    found = known or points.measure(probe.oracle, probe.groups, probe.groups, wanted, probe.rows, index, step)
    cross = _cross_sq(probe, index)
    blocks: dict[str, Block] = {b.group: b for b in probe.groups}
    base = blocks.get("base") if moves.get("base") == "zo" else None
    peft = blocks.get("peft") if moves.get("peft") == "fo" else None
    if base is None and peft is None:
        return found, None, [], cross
    x: BlockPoint | None = found.blocks.get("base")
    near, changes = one_step(
        probe.oracle, base, peft, eta.get("base", 0.0), eta.get("peft", 0.0), s.factors, x.trace if x is not None else None, s.seed, index,
        s.mu, _difference(s.method), s.precision, s.most,
    )  # fmt: skip
    return found, near, changes, cross


def _cross_sq(probe: Probe, index: int, vectors: int = 4) -> float:
    """‖H_xy‖_F² by Hutchinson, plus two standard errors; 0 with one group."""
    if len(probe.groups) < 2:
        return 0.0
    base, peft = probe.groups
    squares = []
    with probe.oracle.products(base, peft) as hess:
        for j in range(vectors):
            z: Tensors = streams.rademacher(peft, probe.settings.seed, "cross block", index, j)
            there = hess(z, peft, base)
            squares.append(dot(there, there))
    mean = sum(squares) / vectors
    return mean + 2 * math.sqrt(sum((v - mean) ** 2 for v in squares) / (vectors - 1) / vectors)


def _descent(change: StepChange, eta: dict[str, float], index: int, step: int) -> Descent:
    m, q, f, c = change.measured, change.quadratic, change.fitted, change.coupling
    rates = {g: change.factor * v for g, v in eta.items() if change.what in (g, "both")}
    return Descent(
        index, step, change.what, change.factor, rates, m.value, m.stderr, m.n, q.value, q.stderr, f.value, f.stderr, change.hypotheses,
        change.broken, c.value if c is not None else None, c.stderr if c is not None else None,
    )  # type: ignore[arg-type]  # fmt: skip


# ---- cost ------------------------------------------------------------------------------------------------------------


def _estimate(probe: Probe, meter: Meter) -> Cost:
    """From one timed value and gradient; products cost about two gradients. Counts are those of the committed reports."""
    s, oracle = probe.settings, probe.oracle
    value, gradient = timed(oracle.value), timed(lambda: oracle.gradient(*probe.groups))
    probing = 0 if s.lr_base is not None and (s.lr_peft is not None or len(probe.groups) == 1) else 1
    gradients = s.runs * s.steps + s.points + probing * (s.probe_steps + 4)
    products = (s.points + probing) * 70
    values = s.runs * s.steps * 3 + s.points * 500 + probing * (300 + 3 * s.probe_steps)
    seconds = gradients * gradient + products * 1.2 * gradient + values * value
    spent = meter.actual()
    return Cost("estimated", gradients, products, values, seconds, spent.memory_bytes)
