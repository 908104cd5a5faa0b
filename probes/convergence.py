"""probe-convergence: does a run of the hybrid method do what the theorems say?

    task -> rates (given, or recommended by probe-smoothness) -> runs at constant rates, everything measured at every step
         -> at points of the first run: constants, and what one step does on average beside two predictions
         -> Checks: one-step descent, every theorem's bound with its hypotheses, the exponent of the rate

`run` yields records in that order. The weights are as found when it ends.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from hybridtheory import streams
from hybridtheory.blocks import Block
from hybridtheory.descent import Local, StepChange, one_step
from hybridtheory.errors import UserError
from hybridtheory.estimators import Gaussian, Law, Rademacher, Sphere
from hybridtheory.optimizers.base import ZeroOrder
from hybridtheory.optimizers.catalogue import METHODS, build
from hybridtheory.smoothness import fit_envelope
from hybridtheory.theory import step_sizes
from hybridtheory.theory.checks import Check, check_bound
from hybridtheory.theory.descent import Mean, compare, rate_exponent
from hybridtheory.theory.held import THEOREMS, evidence, hold
from hybridtheory.vectors import Tensors, clone, dot
from probes import point as points
from probes import smoothness
from probes.cost_estimate import Meter, timed
from probes.given import Given
from probes.records import BlockPoint, Cost, End, Point, Recommendation, Record, Warning
from probes.records_convergence import Checked, Constants, Descent, Exponent, Trajectory
from probes.setup import Probe as Setup
from probes.setup import header
from probes.smoothness import Progress
from probes.tasks import Task
from probes.trajectory import Walker

LAWS: dict[str, Law] = {"gaussian": Gaussian(), "sphere": Sphere(), "rademacher": Rademacher()}
# Methods whose steps are those of the theorems: plain SGD, with a direction law of their own or none.
PLAIN = ("hybrid", "hybrid-two-sided", "mezo", "forward-gradient", "peft-sgd")
TOLERANCE = {"quadratic": 0.10, "fitted": 0.15}
# A batch of all rows has no minibatch noise: in the noise-limited rule it is a batch of very many.
NOISELESS = 10**9
QUADRATIC_UP_TO = 0.1  # of the rates: as far as infinitesimal curvature is held to its prediction


@dataclass(frozen=True)
class Settings:
    """What a convergence run is asked to do; the defaults suit the embedded model.

    method      a name of `hybridtheory.optimizers.catalogue`; law None keeps the method's own directions
    lr_base, lr_peft   rates; None: recommended by a short smoothness run first
    steps, runs    length and number of the runs (their seeds are seed, seed + 1, ...)
    batch_size  rows of a minibatch (a fixed partition of the rows); None: all rows in every step
    sampling    "reshuffle" or "iid", for minibatches
    points      points of the first run at which constants and one-step descent are measured, the first at its start
    factors     fractions of the rates at which one step is measured
    precision, most   relative standard error of a mean one-step change, and the most directions spent on it
    f_star      a lower bound of the loss; None: 0 where the loss is a cross-entropy
    probe_steps   steps of the smoothness run that recommends rates
    """

    method: str = "hybrid-two-sided"
    lr_base: float | None = None
    lr_peft: float | None = None
    steps: int = 24
    runs: int = 3
    points: int = 3
    batch_size: int | None = None
    sampling: str = "reshuffle"
    mu: float = 1e-3
    q: int = 1
    law: str | None = None
    factors: tuple[float, ...] = (0.03, 0.1, 0.3, 1.0)
    precision: float = 0.03
    most: int = 400
    f_star: float | None = None
    blocks: str = "group"
    seed: int = 0
    micro_batch: int | None = None
    curvature: str = "hessian"
    max_memory: int | None = None
    probe_steps: int = 12
    rates_from: str = ""

    def __post_init__(self) -> None:
        for name, least in (("steps", 2), ("runs", 1), ("points", 1), ("q", 1), ("most", 2), ("probe_steps", 1)):
            if getattr(self, name) < least:
                raise UserError(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(self, name)}")
        for name in ("lr_base", "lr_peft", "mu", "precision"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise UserError(f"--{name.replace('_', '-')} must be a positive number, got {value}")
        if self.f_star is not None and not math.isfinite(self.f_star):
            raise UserError(f"--f-star must be a finite number, a lower bound of the loss, got {self.f_star}")
        if not self.factors or not all(math.isfinite(s) and s > 0 for s in self.factors):
            raise UserError(f"the fractions of a step must be positive numbers, got {list(self.factors)}")
        if self.method not in METHODS:
            raise UserError(f"--method is one of {', '.join(METHODS)}, not {self.method!r}")
        if self.law is not None and self.law not in LAWS:
            raise UserError(f"--law is one of {', '.join(LAWS)}, not {self.law!r}")
        if self.sampling not in ("reshuffle", "iid"):
            raise UserError(f"--sampling is reshuffle or iid, not {self.sampling!r}")

    @property
    def whole(self) -> bool:
        """All rows in every step."""
        return self.batch_size is None


Probe = Setup[Settings]


def run(
    task: Task | Given,
    settings: Settings,
    progress: Progress | None = None,
    origin: dict[str, Any] | None = None,
    dry: bool = False,
) -> Iterator[Record]:
    """Measure, record by record; the last ones are the checks. ``dry``: stop after the cost estimate. Raises UserError."""
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
        eta, source, first = yield from _rates(probe, moves, meter)
        runs: list[Trajectory] = []
        measured: list[Point] = []
        local: list[Local] = []
        descents: list[Descent] = []
        coupled_sq: list[float] = []
        start = {b.name: clone(b.tensors) for b in probe.groups}
        for number in range(settings.runs):
            meter.phase(f"run {number + 1} of {settings.runs}")
            smoothness._put(probe.groups, start)
            walker = Walker(
                probe.oracle,
                probe.groups,
                _optimizer(probe, eta, number),
                number,
                settings.seed + number,
                _sampling(settings),
            )
            at = smoothness._spread(settings.points, settings.steps - 1) if number == 0 else []
            for step in walker.steps(settings.steps):
                if step in at:
                    index = at.index(step)
                    meter.phase(f"point {index + 1} of {settings.points}")
                    known = first if index == 0 else None
                    found, near, changes, cross = _point(probe, eta, moves, index, step, known)
                    measured.append(found)
                    coupled_sq.append(cross)
                    yield found
                    if near is not None:
                        local.append(near)
                    for change in changes:
                        descents.append(_descent(change, eta, index, step))
                        yield descents[-1]
                    meter.phase(f"run {number + 1} of {settings.runs}")
            runs.append(walker.record())
            yield runs[-1]
            if walker.status != "finished":
                yield Warning(f"run {number} ended early: {walker.note}", "run")
    constants = _constants(probe, eta, source, measured, coupled_sq, local, runs, f_star)
    yield constants
    yield from _checks(descents, constants, runs)
    yield meter.actual()
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


def _sampling(settings: Settings) -> str:
    return "full" if settings.whole else settings.sampling


def _f_star(task: Task | Given, settings: Settings) -> float:
    if settings.f_star is not None:
        return settings.f_star
    loss = str(task.info.get("loss", ""))
    if "cross-entropy" in loss:
        return 0.0
    raise UserError(
        f"the bounds need f*, a lower bound of the loss, and none is known for the loss {loss or 'given in Python'!r}: give --f-star (f_star=)"
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


def _rates(probe: Probe, moves: dict[str, str], meter: Meter) -> Iterator[Record]:  # type: ignore[misc]
    """(rates, where they come from, the first point where it was measured): given ones, and a short smoothness run for what is missing."""
    s = probe.settings
    given = {g: v for g, v in (("base", s.lr_base), ("peft", s.lr_peft)) if v is not None and g in moves}
    if len(given) == len(moves):
        yield from smoothness._preflight(probe, meter)  # type: ignore[arg-type]
        return given, s.rates_from or "given", None
    planned = s.batch_size or NOISELESS
    short = points.Settings(
        points=2, secants=1, run_steps=s.probe_steps, directions=12, batch_size=planned, steps=s.steps, mu=s.mu, q=s.q, seed=s.seed,
        micro_batch=s.micro_batch, curvature=s.curvature, max_vectors=16, max_steps=40, max_memory=s.max_memory,
    )  # fmt: skip
    first: Point | None = None
    found: Recommendation | None = None
    for record in smoothness.run(probe.task, short, progress=lambda what, _: meter.phase(f"rates: {what}")):
        if isinstance(record, smoothness.Preflight | Warning):
            yield record
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
    return eta, "recommended by probe-smoothness at two points", first


# ---- one point -------------------------------------------------------------------------------------------------------


def _point(
    probe: Probe, eta: dict[str, float], moves: dict[str, str], index: int, step: int, known: Point | None
) -> tuple[Point, Local | None, list[StepChange], float]:
    """Constants here, what one step does, and ‖H_xy‖_F²."""
    s = probe.settings
    # The curvature only: displacements and the finite-scale rule are measured better below.
    wanted = points.Settings(
        points=1, directions=4, batch_size=probe.rows, mu=s.mu, q=s.q, seed=s.seed, curvature=s.curvature, max_vectors=24, max_steps=40,
        max_memory=s.max_memory,
    )  # fmt: skip
    found = known or points.measure(probe.oracle, probe.groups, probe.groups, wanted, probe.rows, index, step).record
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
    m, q, f = change.measured, change.quadratic, change.fitted
    rates = {g: change.factor * v for g, v in eta.items() if change.what in (g, "both")}
    return Descent(
        index, step, change.what, change.factor, rates, m.value, m.stderr, m.n, q.value, q.stderr, f.value, f.stderr, change.hypotheses,
        change.broken,
    )  # type: ignore[arg-type]  # fmt: skip


# ---- constants and checks --------------------------------------------------------------------------------------------


def _ends(block: BlockPoint) -> float:
    """An upper bound on |H| of one block: both ends, with stated probability where Lanczos ran long enough."""
    found = [block.lam_max, block.lam_min]
    values = [
        abs(e.upper)
        if e is not None and e.upper is not None and math.isfinite(e.upper)
        else abs(e.value)
        if e is not None
        else 0.0
        for e in found
    ]
    return max(values)


def _coupling(p: Point) -> float:
    """An upper bound on ‖H_xy‖, with stated probability where Golub-Kahan ran long enough."""
    if p.coupling is None:
        return 0.0
    upper = p.coupling.upper
    return upper if upper is not None and math.isfinite(upper) else p.coupling.value


def _joint(norms: dict[str, float], names: Sequence[str]) -> dict[str, float]:
    if len(names) < 2:
        return {n: norms[n] for n in names}
    both = step_sizes.couple(norms["base"], norms["peft"], norms["coupling"])
    return {"base": both.L_x, "peft": both.L_y}


def _constants(
    probe: Probe, eta: dict[str, float], source: str, measured: Sequence[Point], cross: Sequence[float], local: Sequence[Local],
    runs: Sequence[Trajectory], f_star: float,
) -> Constants:  # fmt: skip
    s = probe.settings
    names = [g.name for g in probe.groups]
    own = [{n: _ends(p.blocks[n]) for n in names} | {"coupling": _coupling(p)} for p in measured]
    norms = {n: max(o[n] for o in own) for n in (*names, "coupling")}
    joint = [_joint(o, names) for o in own]
    L = _joint(norms, names)
    laws = {}
    for n in names:
        u, values = [p.grad_norm for p in measured], [j[n] for j in joint]
        fit = fit_envelope(u, values) if len(u) >= 3 else None
        laws[n] = (fit.L0, fit.L1) if fit is not None and fit.identified else (L[n], 0.0)
    plus = [p.blocks["base"].trace_plus or p.blocks["base"].trace for p in measured if "base" in names]
    # One point whose quadrature did not converge must not decide for all.
    plus = [e for e in plus if e is not None and e.resolved] or plus
    trace = max((max(e.value, 0.0) + 2 * (e.stderr or 0.0) for e in plus if e is not None), default=0.0)
    law = s.law or ("gaussian" if METHODS[s.method].law is None else s.method)
    fixed = [n for n in names if n not in eta]
    return Constants(
        eta={n: eta.get(n, 0.0) for n in names}, norms=norms, L=L, trace_plus=max(trace, norms.get("base", 0.0)), cross_sq=max(cross, default=0.0),
        laws=laws, d={g.name: g.numel for g in probe.groups},
        Delta=runs[0].loss[0] - f_star, f_star=f_star, slope_error=max((x.slope_error for x in local), default=0.0), mu=s.mu, q=s.q, law=law,
        n=1 if s.whole else len(probe.oracle.batches), sampling=_sampling(s), method=s.method, sgd=s.method in PLAIN, rates_from=source,
        note=f"the method does not move: {', '.join(fixed)}" if fixed else "",
    )  # fmt: skip


def _checks(descents: Sequence[Descent], constants: Constants, runs: Sequence[Trajectory]) -> Iterator[Record]:
    for d in descents:
        for kind, predicted in (
            ("quadratic", Mean(d.quadratic, d.quadratic_stderr, d.n)),
            ("fitted", Mean(d.fitted, d.fitted_stderr, d.n)),
        ):
            words = "Identity Q" if kind == "quadratic" else "the finite-scale curve of other directions"
            check = compare(
                f"one step of {d.what} at {d.factor:g} of the rates (step {d.step}): mean change of the loss as {words} says",
                Mean(d.measured, d.stderr, d.n), predicted, TOLERANCE[kind], d.hypotheses if kind == "quadratic" else (),
                d.broken if kind == "quadratic" else "", kind == "fitted" or d.factor <= QUADRATIC_UP_TO,
            )  # fmt: skip
            yield _checked("descent", kind, check, {"step": float(d.step), "factor": d.factor})
    whole = [r for r in runs if len(r.loss) >= 8 and r.status == "finished"]
    if whole:
        squares = [[sum(v) for v in zip(*r.grad_sq.values(), strict=True)] for r in whole]
        found = rate_exponent(squares)
        yield Exponent(found.value, found.interval, found.start, found.runs)
    for r in runs:
        check = check_bound(f"run {r.run} ends at or below the loss at which it starts", r.final - r.loss[0], 0.0)
        yield _checked("run", "descends", check, {"run": float(r.run)})
    seen = evidence(asdict(constants), [asdict(r) for r in runs])
    for theorem in THEOREMS:
        for check in hold(seen, theorem):
            yield _checked("bound", theorem, check, {})


def _checked(about: Any, name: str, c: Check, at: dict[str, float]) -> Checked:
    return Checked(
        about, name, c.claim, c.measured, c.relation, c.predicted, c.bound, c.stderr, c.holds, c.hypotheses, c.note, at
    )


# ---- cost ------------------------------------------------------------------------------------------------------------


def _estimate(probe: Probe, meter: Meter) -> Cost:
    """From one timed value and gradient; products cost about two gradients. Counts are those of the committed reports."""
    s, oracle = probe.settings, probe.oracle
    value, gradient = timed(oracle.value), timed(lambda: oracle.gradient(*probe.groups))
    probing = 0 if s.lr_base is not None and (s.lr_peft is not None or len(probe.groups) == 1) else 1
    gradients = s.runs * s.steps + s.points + probing * (s.probe_steps + 4)
    products = (s.points + probing) * 80
    values = s.runs * s.steps * 3 + s.points * 800 + probing * (300 + 3 * s.probe_steps)
    seconds = gradients * gradient + products * 1.2 * gradient + values * value
    spent = meter.actual()
    return Cost("estimated", gradients, products, values, seconds, spent.memory_bytes)
