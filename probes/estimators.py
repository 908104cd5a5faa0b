"""probe-estimators: zeroth-order direction laws against the exact gradient, beside their closed formulas, and the error budget.

    task -> gradient, its noise and Hg, once -> for each group and each batch of directions: inner products (`probes.draws`)
         -> per law and block: moments, cosines, captured energy, bias -> error of finite mu from forward passes (`probes.budget`)

Sampling has two stages: a pilot says how many draws the asked precision needs and is then thrown away, so the rule that stops the
sampling has not seen the numbers that are reported. The weights are never changed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hybridtheory import streams
from hybridtheory.blocks import Block
from hybridtheory.errors import UserError
from hybridtheory.estimators import Key, Orthonormal, Sphere
from hybridtheory.vectors import Tensors, dot, norm
from probes import budget
from probes.closed_forms import Given as Facts
from probes.cost_estimate import Meter
from probes.draws import Reference, coordinate_spread
from probes.estimates import estimates, record
from probes.estimators_cost import HUTCHINSON, estimate
from probes.given import Given, evaluating, given
from probes.laws import DEFAULT_LAWS, Member, Source, refuse, sources
from probes.point import GradientPass
from probes.provenance import provenance
from probes.records import Allocation, Budget, End, Estimator, Record, Warning
from probes.report import Report
from probes.sampling import RELATIVE_VARIANCE, SMALL, draw, pilot
from probes.setup import Probe as Setup
from probes.setup import header
from probes.smoothness import Progress
from probes.subspaces import excess, spectrum
from probes.tasks import Task

# A pilot may not say less than what nearly normal slopes vary by (`sampling.RELATIVE_VARIANCE`), and one so small is believed only where it
# has enough estimates and says clearly more.
ENOUGH, CLEARLY = 16, 1.5
# A coordinate is looked up and not drawn: this many times more of them than of other directions are allowed.
COORDINATES = 3


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
        refuse(members, group)
    expected = estimate(probe, members)
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
    noises = {g.name: noise for g, noise in zip(probe.groups, taken.noise, strict=True)}
    finer = [b for b in probe.all_blocks if b.name not in noises]
    if finer:
        noises |= {
            b.name: e for b, e in zip(finer, GradientPass.take(probe.oracle, finer, probe.rows).noise, strict=True)
        }
    for group, gradient in zip(probe.groups, taken.gradients, strict=True):
        if not norm(gradient) > 0:
            yield Warning(
                f"the gradient of {group.name} is zero on these rows, so no estimator of it can be judged", group.name
            )
            continue
        yield from _group(probe, meter, group, gradient, members, done)
        by_name = dict(zip(group.names, gradient, strict=True))
        for block in (group, *(b for b in finer if b.group == group.group)):
            kept = [r for r in done if isinstance(r, Budget | Allocation) and r.block == block.name]
            own = [by_name[n] for n in block.names]
            if any(isinstance(r, Allocation) for r in kept):  # the last of a block's records
                yield from kept
            elif norm(own) > 0:  # the matrices of a fresh adapter whose partners are zero have none
                meter.phase(f"{block.name}: error budget")
                yield from budget.measure(probe, block, own, noises[block.name])
    yield meter.actual()
    yield End("finished")


def _group(
    probe: Setup[Settings], meter: Meter, group: Block, gradient: Tensors, members: Sequence[Member], done: Sequence[Record]
) -> Iterator[Record]:  # fmt: skip
    """All laws on one group and its finer blocks."""
    s = probe.settings
    finer = [b for b in probe.blocks if b.group == group.group and b.name != group.name]
    by_name = dict(zip(group.names, gradient, strict=True))
    blocks = [b for b in (group, *finer) if norm([by_name[n] for n in b.names]) > 0]
    have = {(r.law, r.block): r for r in done if isinstance(r, Estimator)}
    part = {n: b.name for b in finer or [group] for n in b.names}
    reference: Reference | None = None
    h: dict[str, Tensor] | None = None
    for source in sources(members, group):
        known = [have.get((m.label, b.name)) for m in source.members for b in blocks]
        if all(r is not None for r in known):
            yield from (r for r in known if r is not None)
            continue
        if reference is None:
            meter.phase(f"{group.name}: Hessian products")
            reference, h = _reference(probe, group, part, gradient, any(m.name == "hizoo" for m in members))
        meter.phase(f"{group.name}: {', '.join(m.label for m in source.members)}")
        yield from _source(s, source, group, blocks, reference, h)


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
    tried = draw(s.seed, source, laws, group, blocks, reference, 1, min(pilot(group.numel), s.max_draws))
    needed = 0.0
    if source.kind == "coordinate":  # heavy-tailed: what a pilot shows of its spread is nothing, and it is known
        needed = coordinate_spread(reference, group) / precision**2
    for m in source.members:
        found = estimates(m, laws[m.label], tried(m, group), group.numel)
        spread = RELATIVE_VARIANCE / m.q
        if len(found.norm_sq) >= ENOUGH:
            shown = float(np.var(found.norm_sq, ddof=1) / np.mean(found.norm_sq) ** 2)
            spread = shown if shown > CLEARLY * spread else spread
        needed = max(needed, spread / precision**2 * m.q)
    count = min(math.ceil(needed), s.max_draws * (COORDINATES if source.kind == "coordinate" else 1))
    collected = draw(s.seed, source, laws, group, blocks, reference, 2, count)
    for m in source.members:
        law = laws[m.label]
        bound = law.bind(group, [Key(s.seed)]) if not isinstance(law, Sphere | Orthonormal) else law
        own = {n: spectrum(bound, Key(s.seed), n, p, reference.g[n].view(p.shape)) for n, p in group.parameters.items()}
        for block in blocks:
            inner = reference.inner(block)
            facts = Facts(
                d=block.numel,
                gg=inner["gg"],
                sizes={n: p.numel() for n, p in block.parameters.items()},
                energies={n: dot([reference.g[n]], [reference.g[n]]) for n in block.names},
                excess={n: excess(bound, block, n) for n in block.names},
                spectra={n: own[n] for n in block.names},
            )
            measured = estimates(m, law, collected(m, block), block.numel)
            exact = coordinate_spread(reference, block) if source.kind == "coordinate" else None
            yield record(m, law, block, facts, inner, measured, precision, exact)


def probe_estimators(
    model: torch.nn.Module,
    batches: Sequence[Any],
    loss_fn: Callable[[torch.nn.Module, Any], Tensor] | None = None,
    laws: Sequence[str] = DEFAULT_LAWS,
    blocks: str = "group",
    seed: int = 0,
    progress: Progress | None = None,
    **settings: Any,
) -> Report:
    """Measure direction laws on any module and batches; the report holds every record, and its ``json()`` is report.json.

    loss_fn   ``loss_fn(model, batch)``: mean loss over the batch's rows. None: the batches carry labels (see `probes.given`).
    laws      as on the command line: "gaussian", "gaussian:q=4", "subzero:rank=8,refresh=1", ...
    settings  other fields of `Settings`: precision, max_draws, directions, mus, q, batch_size, micro_batch.
    The model is measured in evaluation mode; its weights, gradients, flags and modes are as found afterwards. Raises UserError.
    """
    wanted = Settings(laws=tuple(laws), blocks=blocks, seed=seed, **settings)
    with evaluating(model):
        return Report.of(run(given(model, batches, loss_fn), wanted, progress=progress, origin=provenance()))


__all__ = ["DEFAULT_LAWS", "Settings", "probe_estimators", "run"]
