"""How much of the gradient a lazily refreshed subspace still captures, step by step: SubZero's steps on the base of one task.

    task -> header -> for each refresh interval and seed: a run with the exact gradient at the start of every step -> its Captured record

A subspace that is drawn without knowing the gradient captures r²/(mn) of a matrix's energy in the mean. Steps are taken inside it alone:
whether they use up there what they descend is what the later steps of a kept subspace show. The weights are as found at the end.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from hybridtheory.blocks import Block
from hybridtheory.errors import UserError
from hybridtheory.estimators import Key, SubZero
from hybridtheory.optimizers import build
from hybridtheory.vectors import clone
from probes.given import Given
from probes.records import Captured, End, Record
from probes.setup import Probe, header
from probes.smoothness import _put, _restored
from probes.subspaces import captured_energy, square
from probes.tasks import Task
from probes.trajectory import Walker


@dataclass(frozen=True)
class Settings:
    """refreshes: steps between two subspaces; runs: seeds seed, seed + 1, ... of each."""

    refreshes: tuple[int, ...] = (1, 10, 1000)
    rank: int = 8
    steps: int = 40
    runs: int = 2
    lr_base: float = 3e-4
    mu: float = 1e-3
    seed: int = 0
    blocks: str = "group"
    micro_batch: int | None = None
    curvature: str = "hessian"
    max_memory: int | None = None

    def __post_init__(self) -> None:
        if not self.refreshes or min(*self.refreshes, self.steps, self.runs, self.rank) < 1:
            raise UserError("refreshes, steps, runs and rank are whole numbers of at least 1")


def run(
    task: Task | Given, settings: Settings, done: Sequence[Record] = (), origin: dict[str, Any] | None = None
) -> Iterator[Record]:
    """Measure, a record a run. ``done``: records of the measurement that is resumed. UserError for a model without base weights."""
    probe: Probe[Settings] = Probe.of(task, settings)
    base = next((b for b in probe.groups if b.group == "base"), None)
    if base is None:
        raise UserError("captured energy is measured on the base weights, and this model has none: load it unquantised")
    yield header(probe, "captured", origin or {})
    kept = {(r.refresh, r.seed): r for r in done if isinstance(r, Captured)}
    with _restored(probe.groups):
        start = {b.name: clone(b.tensors) for b in probe.groups}
        for refresh in settings.refreshes:
            for seed in range(settings.seed, settings.seed + settings.runs):
                if (refresh, seed) in kept:
                    yield kept[refresh, seed]
                    continue
                _put(probe.groups, start)
                yield _run(probe, base, refresh, seed)
    yield End("finished")


def _run(probe: Probe[Settings], base: Block, refresh: int, seed: int) -> Captured:
    s = probe.settings
    law = SubZero(rank=s.rank, refresh=refresh)
    optimizer = build("subzero", probe.task.model, base, None, lr_base=s.lr_base, seed=seed, law=law, mu=s.mu)
    walker = Walker(probe.oracle, probe.groups, optimizer, 0, seed)
    bound = law.bind(base, [])
    assert isinstance(bound, SubZero)
    shapes = {n: m for n, p in base.parameters.items() if (m := bound.matrix(p)) is not None}
    part = {n: min(s.rank, *shape) ** 2 / math.prod(shape) for n, shape in shapes.items()}
    d = {n: math.prod(shape) for n, shape in shapes.items()}
    shares: list[float] = []
    expected: list[float] = []
    for step in walker.steps(s.steps):
        [gradient] = probe.oracle.gradient(base)
        g = dict(zip(base.names, gradient, strict=True))
        energy = {n: square(g[n]) for n in shapes}
        whole = sum(energy.values())
        inside = (captured_energy(bound, Key(seed, step), n, base.parameters[n], g[n]) for n in shapes)
        shares.append(sum(inside) / whole)
        expected.append(sum(part[n] * energy[n] for n in shapes) / whole)
    share = sum(part[n] * d[n] for n in shapes) / sum(d.values())
    seen = list(walker.loss[: len(shares)])
    return Captured(f"subzero:rank={s.rank}", refresh, seed, s.lr_base, share, seen, shares, expected, walker.status)
