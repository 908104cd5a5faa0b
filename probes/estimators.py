"""probe-estimators: zeroth-order direction laws against the exact gradient, beside their closed formulas, and the error budget.

    task -> gradient, its noise and Hg, once -> for each group and each batch of directions: inner products (`probes.draws`)
         -> per law and block: moments, cosines, captured energy, bias -> error of finite mu from forward passes (`probes.budget`)

Sampling has two stages: a pilot says how many draws the asked precision needs and is then thrown away, so the rule that stops the
sampling has not seen the numbers that are reported. The weights are never changed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from hybridtheory import streams
from hybridtheory.blocks import Block
from hybridtheory.errors import UserError
from hybridtheory.estimators import (
    Coordinate,
    Gaussian,
    Key,
    Law,
    MagnitudeMask,
    Orthonormal,
    Preconditioned,
    Sphere,
    parse,
)
from hybridtheory.estimators.lowrank import LowRank
from hybridtheory.vectors import Tensors, dot, norm
from probes import budget, closed_forms, draws
from probes.closed_forms import Given as Facts
from probes.closed_forms import Predicted, mode_of
from probes.cost_estimate import Meter, peak, timed
from probes.draws import (
    CAPTURED,
    COLUMNS,
    HG,
    TESTS,
    Collected,
    G,
    R,
    Reference,
    coordinate_draws,
    coordinate_spread,
    factored,
    factored_batch,
    gaussian_batch,
    keys,
    law_batch,
)  # fmt: skip
from probes.given import Given
from probes.point import GradientPass
from probes.records import Allocation, Budget, Compared, Cosines, Cost, End, Estimator, Record, Warning
from probes.setup import Probe as Setup
from probes.setup import header
from probes.smoothness import Progress
from probes.subspaces import excess, keeps, projects, spectrum
from probes.tasks import Task

DEFAULT_LAWS = (
    "gaussian", "gaussian:q=4", "gaussian:q=16", "sphere", "rademacher", "coordinate", "orthonormal:q=16", "subzero:rank=8",
    "subzero:rank=8,refresh=1", "lozo:rank=2", "magnitude-mask:keep=0.25", "random-mask:keep=0.25", "hizoo",
)  # fmt: skip
# Up to this many weights in a block the second moment is sampled to 3 %, above to 15 %.
SMALL = 10_000_000
# Directions of a pilot (half of them above SMALL weights). Slopes are nearly normal, so |ghat|^2 varies by sqrt(2) of itself: no pilot
# may say less, and a pilot so small is believed only where it has enough estimates and says clearly more.
PILOT, RELATIVE_VARIANCE, ENOUGH, CLEARLY = 64, 2.0, 16, 1.5
BINS = 40
# A coordinate is looked up and not drawn: this many times more of them than of other directions are allowed.
COORDINATES = 5
# Entries of one tensor's directions that a batch may hold beside each other (256 MiB of float32).
HELD = 1 << 26
HUTCHINSON = 2  # products behind HiZOO's preconditioner


@dataclass(frozen=True)
class Settings:
    """What an estimators run is asked to do.

    laws        NAME or NAME:option=number,...; q=4 averages four queries
    precision   relative standard error of the second moment at which sampling stops; None: 0.03 up to 10 million weights, else 0.15
    max_draws   cap on directions of one law and group
    directions  of the error budget, the same at every mu
    mus         steps of the sweep; None: half decades (whole ones above 10 million weights)
    q, batch_size   of the planned training: what "more rows, more queries or more steps" starts from
    """

    laws: tuple[str, ...] = DEFAULT_LAWS
    blocks: str = "group"
    seed: int = 0
    precision: float | None = None
    max_draws: int = 20_000
    directions: int | None = None
    mus: tuple[float, ...] | None = None
    q: int = 1
    batch_size: int = 16
    micro_batch: int | None = None
    curvature: str = "hessian"
    max_memory: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_draws", "q", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}")
        if self.precision is not None and not 1e-4 <= self.precision <= 1:
            raise UserError(f"--precision is a relative error between 0.0001 and 1, got {self.precision:g}")
        if self.directions is not None and self.directions < 2:
            raise UserError(f"--directions must be at least 2 for an error bar, got {self.directions}")
        for mu in self.mus or ():
            if not 0 < mu < math.inf:
                raise UserError(f"--mus are positive, finite sizes of the perturbation, got {mu:g}")
        if not self.laws:
            raise UserError(f"no direction law was asked for: name at least one of {', '.join(DEFAULT_LAWS)}")
        for text in self.laws:
            Member.of(text)

    def precision_for(self, d: int) -> float:
        return self.precision or (0.03 if d <= SMALL else 0.15)


@dataclass(frozen=True)
class Member:
    """One row of the table: a law and the number of queries that its estimate averages. Masks and HiZOO need the block: `on`."""

    label: str
    name: str
    q: int
    law: Law | None
    options: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, text: str) -> Member:
        name, _, rest = text.strip().partition(":")
        items = [i for i in rest.split(",") if i]
        given = [i for i in items if i.startswith("q=")]
        try:
            q = int(given[-1][2:]) if given else 1
        except ValueError:
            raise UserError(f"{given[-1]!r} in {text!r} is not q=NUMBER") from None
        if not 1 <= q <= 256:
            raise UserError(f"q in {text!r} must be from 1 to 256, the directions that are held at once, got {q}")
        others = ",".join(i for i in items if i not in given)
        if name == "hizoo" and not others:
            return cls(text.strip(), name, q, None)
        if name == "magnitude-mask":
            try:
                options = {k: float(v) for k, v in (i.split("=") for i in others.split(",") if i)}
            except ValueError:
                raise UserError(f"{text!r} is not magnitude-mask:keep=SHARE") from None
            if set(options) - {"keep"} or not 0 < options.get("keep", 0.25) <= 1:
                raise UserError(f"the magnitude mask takes keep, a share in (0, 1]: got {text!r}")
            return cls(text.strip(), name, q, None, options)
        return cls(text.strip(), name, q, parse(f"{name}:{others}"))

    def on(self, block: Block, h: dict[str, Tensor] | None) -> Law:
        """The law for a block; ``h`` is HiZOO's diagonal."""
        if self.name == "hizoo":
            assert h is not None
            return Preconditioned(h)
        if self.law is None:
            return MagnitudeMask.of(block, self.options.get("keep", 0.25))
        return self.law


@dataclass(frozen=True)
class Source:
    """Members that the same directions serve, ``size`` directions a batch. kind: "gaussian", "coordinate" or "law"."""

    kind: str
    members: tuple[Member, ...]
    size: int


def run(
    task: Task | Given,
    settings: Settings,
    done: Sequence[Record] = (),
    progress: Progress | None = None,
    origin: dict[str, Any] | None = None,
    dry: bool = False,
) -> Iterator[Record]:
    """Measure, record by record. ``done``: records of the run that is resumed. ``dry``: stop after the cost estimate."""
    probe: Setup[Settings] = Setup.of(task, settings)
    meter = Meter(probe.oracle, progress)
    yield header(probe, "estimators", origin or {})
    yield from (Warning(note, "task") for note in task.notes)
    members = [Member.of(text) for text in dict.fromkeys(settings.laws)]
    for group in probe.groups:
        _refuse(members, group)
    expected = _estimate(probe, members)
    yield expected
    if dry:
        return
    meter.expect(expected)
    meter.phase("gradient")
    taken = GradientPass.take(probe.oracle, probe.groups, probe.rows)
    if not math.isfinite(taken.loss):
        raise UserError(
            f"the loss is {taken.loss} at the weights as they are: nothing can be compared there; check data and dtype"
        )
    for group, gradient, noise in zip(probe.groups, taken.gradients, taken.noise, strict=True):
        if not norm(gradient) > 0:
            yield Warning(
                f"the gradient of {group.name} is zero on these rows, so no estimator of it can be judged", group.name
            )
            continue
        yield from _group(probe, meter, group, gradient, members, done)
        kept = [r for r in done if isinstance(r, Budget | Allocation) and r.block == group.name]
        if kept:
            yield from kept
        else:
            meter.phase(f"{group.name}: error budget")
            yield from budget.measure(probe, group, gradient, noise)
    yield meter.actual()
    yield End("finished")


def _group(
    probe: Setup[Settings], meter: Meter, group: Block, gradient: Tensors, members: Sequence[Member], done: Sequence[Record]
) -> Iterator[Record]:  # fmt: skip
    """All laws on one group and its finer blocks."""
    s = probe.settings
    finer = [b for b in probe.blocks if b.group == group.group and b.name != group.name]
    blocks = [group, *finer]
    have = {(r.law, r.block): r for r in done if isinstance(r, Estimator)}
    part = {n: b.name for b in finer or [group] for n in b.names}
    reference: Reference | None = None
    h: dict[str, Tensor] | None = None
    for source in _sources(members, group):
        known = [have.get((m.label, b.name)) for m in source.members for b in blocks]
        if all(r is not None for r in known):
            yield from (r for r in known if r is not None)
            continue
        if reference is None:
            meter.phase(f"{group.name}: Hessian products")
            reference, h = _reference(probe, group, part, gradient, any(m.name == "hizoo" for m in members))
        meter.phase(f"{group.name}: {', '.join(m.label for m in source.members)}")
        yield from _source(s, source, group, blocks, reference, h)


def _pilot(d: int) -> int:
    return PILOT if d <= SMALL else PILOT // 2


def _sources(members: Sequence[Member], group: Block) -> list[Source]:
    """Members that share a Gaussian direction first; coordinates are looked up; every other law draws its own."""
    shared: list[Member] = []
    single: list[Member] = []
    for m in members:
        plain = m.law is None or isinstance(m.law, Sphere | Orthonormal) or draws.shares(m.law)
        (shared if plain else single).append(m)
    size = math.lcm(*(m.q for m in shared)) if shared else 1
    found = [Source("gaussian", tuple(shared), size * max(1, 16 // size))] if shared else []
    for m in single:
        kind = "coordinate" if isinstance(m.law, Coordinate) and m.q == 1 else "law"
        room = min(max(HELD // max(p.numel() for p in group.tensors), 2), 8)
        found.append(Source(kind, (m,), 1 if kind == "coordinate" else m.q * max(room // m.q, 1 if m.q > 1 else 2)))
    return found


def _refuse(members: Sequence[Member], group: Block) -> None:
    """What a law cannot do on a group is said before anything is measured."""
    for m in members:
        if isinstance(m.law, Orthonormal) and m.q > group.numel:
            raise UserError(
                f"{m.q} orthonormal directions do not exist in the {group.numel} dimensions of {group.name!r}: lower q"
            )
        if m.law is not None and not isinstance(m.law, Sphere | Orthonormal):
            m.law.bind(group, [Key(0)])


def _reference(
    probe: Setup[Settings], group: Block, part: dict[str, str], gradient: Tensors, diagonal: bool
) -> tuple[Reference, dict[str, Tensor] | None]:  # fmt: skip
    """Hg, and HiZOO's h: |diag H| by Hutchinson, averaged half with its tensor's mean, 1/h of mean 1 over the group."""
    h: dict[str, Tensor] | None = None
    with probe.oracle.products(group) as hess:
        Hg = hess(gradient, group)
        if diagonal:
            total: Tensors | None = None
            for i in range(HUTCHINSON):
                z = streams.rademacher(group, probe.settings.seed, "diagonal", 0, i)
                part_of = [a * b for a, b in zip(z, hess(z, group), strict=True)]
                total = part_of if total is None else [a + b for a, b in zip(total, part_of, strict=True)]
            assert total is not None
            h = {}
            for name, x in zip(group.names, total, strict=True):
                x = (x / HUTCHINSON).abs()
                mean = float(x.double().mean())
                h[name] = (0.5 * x / mean + 0.5) * mean if mean > 0 else torch.full_like(x, 0.0)
            least = 1e-3 * max(float(v.double().mean()) for v in h.values()) or 1.0
            for v in h.values():
                v.clamp_(min=least)
            scale = sum(float((1 / v).double().sum()) for v in h.values()) / group.numel
            h = {n: v * scale for n, v in h.items()}
    return Reference.of(group, part, gradient, Hg, probe.settings.seed), h


def _source(
    s: Settings, source: Source, group: Block, blocks: Sequence[Block], reference: Reference, h: dict[str, Tensor] | None
) -> Iterator[Estimator]:  # fmt: skip
    """Pilot, then as many fresh directions as it calls for, then every member on every block."""
    laws = {m.label: m.on(group, h) for m in source.members}
    precision = s.precision_for(group.numel)
    pilot = _draw(s, source, laws, group, blocks, reference, 1, min(_pilot(group.numel), s.max_draws))
    needed = 0.0
    if source.kind == "coordinate":  # heavy-tailed: what a pilot shows of its spread is nothing, and it is known
        needed = coordinate_spread(reference, group) / precision**2
    for m in source.members:
        found = _estimates(m, laws[m.label], pilot(m, group), group.numel)
        spread = RELATIVE_VARIANCE / m.q
        if len(found.norm_sq) >= ENOUGH:
            shown = float(np.var(found.norm_sq, ddof=1) / np.mean(found.norm_sq) ** 2)
            spread = shown if shown > CLEARLY * spread else spread
        needed = max(needed, spread / precision**2 * m.q)
    count = min(math.ceil(needed), s.max_draws * (COORDINATES if source.kind == "coordinate" else 1))
    collected = _draw(s, source, laws, group, blocks, reference, 2, count)
    for m in source.members:
        law = laws[m.label]
        bound = law.bind(group, [Key(s.seed)]) if not isinstance(law, Sphere | Orthonormal) else law
        own = {n: spectrum(bound, Key(s.seed), n, p, reference.g[n].view(p.shape)) for n, p in group.parameters.items()}
        for block in blocks:
            inner = reference.inner(block)
            if not inner["gg"] > 0:
                continue
            facts = Facts(
                d=block.numel,
                gg=inner["gg"],
                sizes={n: p.numel() for n, p in block.parameters.items()},
                energies={n: dot([reference.g[n]], [reference.g[n]]) for n in block.names},
                excess={n: excess(bound, block, n) for n in block.names},
                spectra={n: own[n] for n in block.names},
            )
            estimates = _estimates(m, law, collected(m, block), block.numel)
            exact = coordinate_spread(reference, block) if source.kind == "coordinate" else None
            yield _record(m, law, block, facts, inner, estimates, precision, exact)


T = TypeVar("T")
Drawn = Callable[[Member, Block], tuple[np.ndarray, np.ndarray]]  # dots and gram


def _draw(
    s: Settings, source: Source, laws: dict[str, Law], group: Block, blocks: Sequence[Block], reference: Reference, stage: int, count: int
) -> Drawn:  # fmt: skip
    """At least ``count`` directions; the result gives dots (batches, Q, COLUMNS) and gram (batches, Q, Q) of a member on a block."""
    if source.kind == "coordinate":
        tables = {
            b.name: coordinate_draws(reference, b, keys(laws[source.members[0].label], s.seed, stage, 0, count))
            for b in blocks
        }
        return lambda member, block: tables[block.name]
    # Laws that are the Gaussian itself, its sphere or its orthonormal sets look at one and the same collection.
    drawn = (
        {label: law for label, law in laws.items() if draws.scaling(law) is not None}
        if source.kind == "gaussian"
        else dict(laws)
    )
    if source.kind == "gaussian" and len(drawn) < len(laws):
        drawn[""] = Gaussian()
    found = {label: Collected() for label in drawn}
    label, first = next(iter(laws.items()))
    bound, known = None, None
    if isinstance(first, LowRank) and keeps(first):
        bound = first.bind(group, [Key(s.seed)])
        known = factored(reference, bound, Key(s.seed))

    def one(start: int) -> dict[str, draws.Sums]:
        if source.kind == "gaussian":
            return gaussian_batch(reference, drawn, keys(Gaussian(), s.seed, stage, start, source.size))
        batch = keys(first, s.seed, stage, start, source.size)
        if known is not None:
            return {label: factored_batch(reference, bound, known, batch)}
        return {label: law_batch(reference, first, batch)}

    for sums in _each(one, range(0, count, source.size), reference.patterns.device):
        for name, of_name in sums.items():
            found[name].add(of_name)
    finest = list(dict.fromkeys(reference.part.values()))

    def of(member: Member, block: Block) -> tuple[np.ndarray, np.ndarray]:
        kept = found[member.label if member.label in found else ""]
        return kept.of(finest if block is group else [block.name])

    return of


def _each(one: Callable[[int], T], starts: Iterable[int], device: torch.device) -> Iterator[T]:
    """one(start) in order. On a CPU batches run side by side, one a thread: a single draw does not use more than one core."""
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1:
        yield from map(one, starts)
        return
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads) as pool:
            yield from pool.map(one, starts)
    finally:
        torch.set_num_threads(threads)


@dataclass(frozen=True)
class Estimates:
    """n independent estimates: ‖ĝ‖² (n,), ⟨ĝ, ·⟩ (n, COLUMNS), energy of the span of their queries (n,), and ⟨ĝᵢ, ĝⱼ⟩ of pairs of
    single-query estimates, one mean a batch."""

    norm_sq: np.ndarray
    dots: np.ndarray
    span: np.ndarray | None
    pairs: np.ndarray | None


def _estimates(member: Member, law: Law, sums: tuple[np.ndarray, np.ndarray], d: int) -> Estimates:
    dots, gram = sums
    q = member.q
    batches, size, _ = dots.shape
    pairs = None
    if isinstance(law, Sphere):
        factor = np.sqrt(d / np.diagonal(gram, axis1=1, axis2=2))
        dots = np.concatenate([dots[..., :CAPTURED] * factor[..., None], dots[..., CAPTURED:]], axis=2)
        gram = gram * factor[:, :, None] * factor[:, None, :]
    if size > 1 and not isinstance(law, Orthonormal):
        c = dots[..., G]
        products = c[:, :, None] * c[:, None, :] * gram
        pairs = (products.sum((1, 2)) - np.trace(products, axis1=1, axis2=2)) / (size * (size - 1))
    groups = size // q
    dots = dots.reshape(batches * groups, q, COLUMNS)
    own = np.stack([gram[:, i * q : (i + 1) * q, i * q : (i + 1) * q] for i in range(groups)], 1).reshape(-1, q, q)
    span = None
    if isinstance(law, Orthonormal):
        # Z = V R with Z'Z = R'R: the same set of orthonormal directions that the law itself mixes from its Gaussian draws.
        root = np.linalg.cholesky(own)
        mixed = math.sqrt(d) * np.linalg.solve(root, dots[..., :CAPTURED])
        dots = np.concatenate([mixed, dots[..., CAPTURED:]], axis=2)
        own = np.broadcast_to(d * np.eye(q), own.shape)
        span = (dots[..., G] ** 2).sum(1) / d
    c = dots[..., G]
    norm_sq = np.einsum("ni,nij,nj->n", c, own, c) / q**2
    combined = np.einsum("nq,nqk->nk", c, dots) / q
    combined[:, CAPTURED] = dots[..., CAPTURED].mean(1)
    return Estimates(norm_sq, combined, span, pairs)


def _record(
    m: Member, law: Law, block: Block, facts: Facts, inner: dict[str, float], e: Estimates, precision: float, spread: float | None = None
) -> Estimator:  # fmt: skip
    gg, d, n = facts.gg, facts.d, len(e.norm_sq)
    said = closed_forms.predict(law, mode_of(law), m.q, facts)
    along = e.dots[:, G] / gg
    second, notes = e.norm_sq / gg, []
    mean_sq, mean_sq_error = said.mean_sq, 0.0
    if e.pairs is not None and len(e.pairs) > 1:
        mean_sq, mean_sq_error = _mean(e.pairs / gg)
    elif mean_sq is not None:
        notes.append("the variance takes ‖E ĝ‖² from the closed form: no two independent directions are held at once")
    found: dict[str, Compared] = {}

    def put(name: str, values: np.ndarray) -> None:
        found[name] = _compared(values, said, name)

    put("second_moment", second)
    if spread is not None:
        # The sample's own spread misses the rare large entries that make it; the exact one is known.
        exact = math.sqrt(spread / n) * d
        found["second_moment"] = replace(found["second_moment"], stderr=exact)
        notes.append(
            f"heavy-tailed (‖ĝ‖² varies by {math.sqrt(max(spread, 0.0)):.3g} times its mean): errors are exact, not the sample's"
        )
    if mean_sq is not None:
        value, error = found["second_moment"].value, found["second_moment"].stderr or 0.0
        found["variance"] = Compared(value - mean_sq, math.hypot(error, mean_sq_error), *_said(said, "variance"))
    put("mse", second - 2 * along + 1)
    if spread is not None:
        found["mse"] = replace(found["mse"], stderr=exact)
    cosine = _cosine(e.dots[:, G], e.norm_sq, gg)
    put("cosine", cosine)
    put("cosine_sq", cosine**2)
    if spread is not None:  # cos² = gⱼ²/‖g‖² is ‖ĝ‖²/d of the same draw
        found["cosine_sq"] = replace(found["cosine_sq"], stderr=exact / d**2)
    cosines = [_histogram("gradient", cosine, said.beta, True)]
    whole = facts.spectrum
    if projects(law):
        if keeps(law) or isinstance(law, MagnitudeMask):
            captured = np.full(n, whole.captured if whole is not None else math.nan)
            found["captured"] = Compared(float(captured[0] / gg), 0.0, *_said(said, "captured"))
        else:
            captured = e.dots[:, CAPTURED]
            put("captured", captured / gg)
        inside = _cosine(e.dots[:, G], e.norm_sq, captured)
        put("cosine_projected", inside)
        put("cosine_sq_projected", inside**2)
        cosines.append(_histogram("projection", inside, said.beta_projected, said.exact))
    if e.span is not None:
        put("captured", e.span / gg)
    size = whole.dimension if projects(law) and whole is not None else float(m.q) if e.span is not None else None
    reached = (found["second_moment"].stderr or 0.0) <= 1.1 * precision * found["second_moment"].value
    return Estimator(
        law=m.label, block=block.name, group=block.group, d=d, q=m.q, n=n, grad_norm=math.sqrt(gg), quantities=found,
        bias=_bias(e, inner, d, said, mean_sq, mean_sq_error), floor=math.sqrt(max(float(np.mean(second)) - 1, 0.0) / n),
        precision=precision, reached=reached, subspace=size,
        kept=keeps(law) or isinstance(law, MagnitudeMask), cosines=cosines, note="; ".join(notes),
    )  # fmt: skip


def _bias(
    e: Estimates, inner: dict[str, float], d: int, said: Predicted, mean_sq: float | None, mean_sq_error: float
) -> dict[str, Compared]:  # fmt: skip
    """⟨E ĝ - g, v⟩/‖g‖ along unit vectors, and ‖E ĝ - g‖²/‖g‖² from independent pairs."""
    gg = inner["gg"]
    size = math.sqrt(gg)
    unbiased = said.values.get("along", (math.nan, ""))[0] == 0.0
    found = {"g": _compared(e.dots[:, G] / gg - 1, said, "along")}
    others = {
        "Hg": (HG, inner["HH"], inner["gH"]),
        **{f"r{j}": (R + j, float(d), inner[f"r{j}"]) for j in range(TESTS)},
    }
    for name, (column, square, exact) in others.items():
        if square > 0:
            value, error = _mean((e.dots[:, column] - exact) / (math.sqrt(square) * size))
            found[name] = Compared(value, error, 0.0 if unbiased else None, "unbiased" if unbiased else "")
    if mean_sq is not None and mean_sq_error > 0:
        along, error = _mean(e.dots[:, G] / gg)
        predicted = (
            said.mean_sq - 2 * (said.values["along"][0] + 1) + 1
            if said.mean_sq is not None and "along" in said.values
            else None
        )
        found["norm_sq"] = Compared(
            mean_sq - 2 * along + 1, math.hypot(mean_sq_error, 2 * error), predicted, "‖E ĝ − g‖²/‖g‖²"
        )
    return found


def _mean(values: np.ndarray) -> tuple[float, float]:
    return float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan


def _said(said: Predicted, name: str) -> tuple[float | None, str]:
    return said.values.get(name, (None, ""))


def _compared(values: np.ndarray, said: Predicted, name: str) -> Compared:
    return Compared(*_mean(values), *_said(said, name))


def _cosine(along: np.ndarray, norm_sq: np.ndarray, target_sq: float | np.ndarray) -> np.ndarray:
    """0 where the estimate is the zero vector (a coordinate in which g has no part)."""
    size = np.sqrt(norm_sq * target_sq)
    out: np.ndarray = np.divide(along, size, out=np.zeros_like(along), where=size > 0)
    return out


def _histogram(target: Any, cosine: np.ndarray, beta: tuple[float, float] | None, exact: bool) -> Cosines:
    top = float(cosine.max()) or 1.0
    counts, edges = np.histogram(cosine, bins=BINS, range=(min(float(cosine.min()), 0.999 * top), top))
    p = None
    if beta is not None and exact:
        p = float(stats.kstest(cosine**2, stats.beta(*beta).cdf).pvalue)
    alpha, second = beta or (None, None)
    return Cosines(target, edges.tolist(), counts.tolist(), alpha, second, exact, p)


def _estimate(probe: Setup[Settings], members: Sequence[Member]) -> Cost:
    """From one timed forward pass, one gradient, one product and one batch of Gaussian directions on a piece of the weights."""
    s, oracle = probe.settings, probe.oracle
    value, gradient = timed(oracle.value), timed(lambda: oracle.gradient(*probe.groups))
    sample = torch.zeros(1 << 18, dtype=probe.groups[0].tensors[0].dtype)
    z: list[Tensor] = []
    per_draw = timed(lambda: z.append(draws.normal_chunk(Key(s.seed), "cost", sample, 0))) / sample.numel()
    seconds, values, products = value + gradient, 0.0, 0.0
    size = sum(g.numel for g in probe.groups)
    for group in probe.groups:
        d = group.numel
        count = RELATIVE_VARIANCE / s.precision_for(d) ** 2 + _pilot(d)
        # Inner products of a direction cost about what drawing it does, for each law anew.
        seconds += sum(
            count * d * per_draw * (1 + len(x.members) * 0.7)
            for x in _sources(members, group)
            if x.kind != "coordinate"
        )
        sweep = budget.grid(s.mus, size), budget.directions(s.directions, size)
        group_values = 2 * len(sweep[0]) * sweep[1]
        values += group_values
        seconds += group_values * (value + d * per_draw / len(sweep[0]))
        products += 1 + HUTCHINSON * any(m.name == "hizoo" for m in members)
    seconds += products * 3 * gradient
    largest = max(sum(t.numel() * t.element_size() for t in g.tensors) for g in probe.groups)
    return Cost("estimated", 1, products, values, seconds, peak(oracle) + 5 * largest)


__all__ = ["COLUMNS", "DEFAULT_LAWS", "Member", "Settings", "replace", "run"]
