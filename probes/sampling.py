"""Directions of one source, batch by batch on as many cores as torch has threads: what a law's estimates on a block are made of.

A batch is a function of (seed, stage, where it starts), so that cores and a resume change nothing.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

import numpy as np
import torch

from hybridtheory.blocks import Block
from hybridtheory.errors import UserError
from hybridtheory.estimators import Gaussian, Key, Law
from hybridtheory.estimators.lowrank import LowRank
from probes import draws
from probes.draws import (
    Collected,
    Reference,
    coordinate_draws,
    factored,
    factored_batch,
    gaussian_batch,
    keys,
    law_batch,
)
from probes.laws import Member, Source
from probes.subspaces import keeps

# Up to this many weights in a block the second moment is sampled to 3 %, above to 15 %.
SMALL = 10_000_000
# Directions of a pilot (half of them above SMALL weights). Slopes are nearly normal, so |ghat|^2 varies by sqrt(2) of itself.
PILOT, RELATIVE_VARIANCE = 64, 2.0


def pilot(d: int) -> int:
    """Directions of a pilot on d weights."""
    return PILOT if d <= SMALL else PILOT // 2


T = TypeVar("T")
Drawn = Callable[[Member, Block], tuple[np.ndarray, np.ndarray]]  # dots and gram


def draw(
    seed: int, source: Source, laws: dict[str, Law], group: Block, blocks: Sequence[Block], reference: Reference, stage: int, count: int
) -> Drawn:  # fmt: skip
    """At least ``count`` directions; the result gives dots (batches, Q, COLUMNS) and gram (batches, Q, Q) of a member on a block."""
    if source.kind == "coordinate":
        tables = {
            b.name: coordinate_draws(reference, b, keys(laws[source.members[0].label], seed, stage, 0, count))
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
        bound = first.bind(group, [Key(seed)])
        known = factored(reference, bound, Key(seed))

    def one(start: int) -> dict[str, draws.Sums]:
        if source.kind == "gaussian":
            return gaussian_batch(reference, drawn, keys(Gaussian(), seed, stage, start, source.size))
        batch = keys(first, seed, stage, start, source.size)
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
    """one(start) in order. On a CPU batches run side by side, each on one core: a draw does not use more than one, and threads take
    turns at the interpreter between its many small operations. Processes are forked, so that nothing is loaded or sent twice."""
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1 or "fork" not in multiprocessing.get_all_start_methods():
        yield from map(one, starts)
        return
    global _work
    _work = one
    try:
        with ProcessPoolExecutor(threads, multiprocessing.get_context("fork"), _alone) as pool:
            yield from pool.map(_worked, starts)
    except BrokenProcessPool as error:
        raise UserError(
            "a process that drew directions died, most likely for want of memory: run with one thread (OMP_NUM_THREADS=1)"
        ) from error
    finally:
        _work = None


_work: Callable[[int], Any] | None = None  # what forked processes find here


def _alone() -> None:
    """One thread (the parent's do not survive a fork), and Ctrl-C left to the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)


def _worked(start: int) -> Any:
    assert _work is not None
    return _work(start)
