"""``--max-memory``: the largest micro-batch, and with ``--engine auto`` the first engine, whose estimated peak lies within it.

One row alone says what the others will take: its graph and its activations are measured, and those of a micro-batch are as many times
larger as it has more numbers. Graphs that do not fit are not kept, which `Products` decides as it builds them: here none is counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from hybridtheory import streams
from hybridtheory.engines import NO_ROOM, Engine
from hybridtheory.errors import UserError
from hybridtheory.oracle import ENGINES, Oracle
from hybridtheory.ranks import joined
from probes.given import Given
from probes.memory_estimate import Peak, Trial, begun, elements, expected, size
from probes.records import Header, Record
from probes.setup import Probe
from probes.tasks import Task

if TYPE_CHECKING:
    from probes.point import Settings


def fitted(task: Task | Given, settings: Settings, done: Sequence[Record] = ()) -> tuple[Probe[Settings], str]:
    """The probe within ``settings.max_memory``, and what was changed for it. A resumed run does as its header says. Raises UserError."""
    asked = settings.micro_batch or -(-len(task.rows) // 4)
    limit = settings.max_memory
    if limit is None:
        return Probe.of(task, settings), ""
    sizes = list(halvings(asked))
    resumed = next((r.options for r in done if isinstance(r, Header)), None)
    if resumed is not None:
        sizes = [s for s in sizes if s == (resumed.get("micro_batch") or asked)] or sizes
    single = Probe.of(task, replace(settings, micro_batch=1))
    engines = [single.engine]
    if settings.engine == "auto" and settings.curvature == "hessian":
        engines += [
            Engine(name, f"{single.engine.name}: {NO_ROOM} under --max-memory, by its estimate")
            for name in ENGINES[ENGINES.index(single.engine.name) + 1 :]
        ]
    if resumed is not None:
        engines = [e for e in engines if e.name == resumed.get("engine")] or engines
    least: tuple[Peak, str] | None = None
    for engine in engines:
        trial, batch = one_row(single, engine.name)
        for rows in sizes:
            peak = predicted(single, engine.name, rows, trial, batch)
            if all_fit(single.oracle, peak.bytes <= limit) or resumed is not None:
                return chosen(task, settings, engine, rows, asked)
            if least is None or peak.bytes < least[0].bytes:
                least = peak, engine.name
    assert least is not None
    peak, name = least
    other = "" if settings.engine in ("auto", "forward") else ", or try --engine auto"
    raise UserError(
        f"--max-memory of {limit / 2**20:.0f} MiB is too little: one row at a time with --engine {name} takes about "
        f"{peak.bytes / 2**20:.0f} MiB ({peak.terms}): give at least that much{other}"
    )


def chosen(
    task: Task | Given, settings: Settings, engine: Engine, rows: int, asked: int
) -> tuple[Probe[Settings], str]:
    # Settings that suffice stay as they are: nothing that was run without a limit changes its header with a generous one.
    own = settings if rows == asked else replace(settings, micro_batch=rows)
    probe = replace(Probe.of(task, replace(own, engine=engine.name)), settings=own, engine=engine)
    if rows == asked:
        return probe, ""
    return probe, f"{rows} rows at a time in place of {asked}, so that --max-memory suffices: the numbers stay the same"


def halvings(rows: int) -> Iterator[int]:
    yield rows
    while rows > 1:
        rows = (rows + 1) // 2
        yield rows


def one_row(single: Probe[Settings], engine: str) -> tuple[Trial, int]:
    """What the largest row takes, and the numbers in it."""
    batch = max(single.oracle.batches, key=elements)
    oracle = again(single, engine, [batch])
    trial = begun(oracle)
    if engine == "exact":
        group = min(single.groups, key=size)
        with oracle.products(*single.groups) as hess:
            hess(streams.gaussian(group, single.settings.seed, "cost"), group)
        trial = replace(trial, graphs=list(hess.graph_bytes.values()))
    return trial, elements(batch)


def again(single: Probe[Settings], engine: str, batches: Sequence[object]) -> Oracle:
    s = single.settings
    return Oracle(single.task.model, single.task.objective, batches, single.groups, s.curvature, s.max_memory, engine)


def predicted(single: Probe[Settings], engine: str, rows: int, trial: Trial, batch: int) -> Peak:
    """Peak memory with micro-batches of that many rows, of which no graph is kept."""
    batches = single.task.batches(rows)
    shares = [elements(b) / batch for b in batches]
    there = replace(
        trial,
        activations=round(max(shares) * trial.activations),
        graphs=[round(share * graph) for graph in trial.graphs for share in shares],
    )
    finer = [b for b in single.all_blocks if b not in single.groups]
    return expected(again(single, engine, batches), single.groups, finer, single.settings, there, keep=False)


def all_fit(oracle: Oracle, fits: bool) -> bool:
    """Of several processes every one decides alike, also where they share a sharded model."""
    (misses,) = joined(oracle.device).sum(float(not fits))
    return misses == 0
