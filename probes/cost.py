"""probe-cost: what a step of every method costs on every adapter, in memory by phase and in time, beside the formulas.

    task -> header -> memory of each method and adapter, a process each -> time of each, interleaved with forward passes

Learning rates are so small that the weights do not move: the arithmetic is that of training, and every step the same.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hybridtheory.errors import UserError
from hybridtheory.estimators.catalogue import parse
from hybridtheory.optimizers import METHODS
from probes import cost_formula, cost_memory, cost_time
from probes.adapters import TYPES
from probes.cost_estimate import peak, timed
from probes.records import Cost, End, Record, StepMemory, StepTime, Warning
from probes.setup import Probe, header
from probes.smoothness import Progress
from probes.tasks import Task, load_task

DEFAULT_METHODS = (
    "sgd", "adamw", "peft-sgd", "peft-adamw", "mezo", "subzero", "zo-adam", "hybrid", "hybrid+rademacher", "hybrid-subzero", "bilevel",
)  # fmt: skip
# Below both, a process's own noise (a few MiB) and per-call overheads are a good part of the figures.
ENOUGH_PARAMETERS, ENOUGH_TOKENS = 50_000_000, 512
STEPS_OF_MEMORY = 4  # that a memory process makes, about, in forward-equivalents of the method's own step


@dataclass(frozen=True)
class Chosen:
    """A method of `METHODS`, with directions of its own or those after a "+"."""

    name: str
    method: str
    law: str | None

    @classmethod
    def of(cls, text: str) -> Chosen:
        method, plus, law = text.partition("+")
        if method not in METHODS:
            raise UserError(f"there is no method {method!r}: choose from {', '.join(METHODS)}, or all")
        if plus:
            parse(law)
            if METHODS[method].kind == "fo" or method in ("hizoo", "zo-adamu"):
                raise UserError(f"{method} has no choice of directions: write {method} alone")
        return cls(text, method, law if plus else None)

    def adapters(self, pefts: Sequence[str]) -> list[str]:
        """On which of these it is measured: base-only methods once, without an adapter."""
        if METHODS[self.method].blocks == "base":
            return ["none"]
        found = [p for p in pefts if p != "none"]
        return [p for p in found if p == "lora"] if self.method == "lora-plus" else found


@dataclass(frozen=True)
class Settings:
    """What a cost run is asked to do.

    methods  names of `METHODS`, each with "+LAW" where other directions than its own are wanted
    pefts    adapters: lora, ia3, prefix, prompt
    rounds   interleaved rounds of the timing; 0: none.  memory: measure it
    device   where the model is
    """

    methods: tuple[str, ...] = DEFAULT_METHODS
    pefts: tuple[str, ...] = ("lora",)
    rounds: int = 10
    memory: bool = True
    device: str = "cpu"
    seed: int = 0
    micro_batch: int | None = None
    blocks: str = "group"
    curvature: str = "hessian"
    max_memory: int | None = None

    def __post_init__(self) -> None:
        if self.rounds < 0:
            raise UserError(f"--rounds is a whole number of at least 0, not {self.rounds}")
        if not self.rounds and not self.memory:
            raise UserError("with --rounds 0 and --no-memory nothing is left to measure")
        for peft in self.pefts:
            if peft not in TYPES:
                raise UserError(f"--peft is a list of {', '.join(TYPES)}, or all; {peft!r} is none of them")
        if not self.jobs():
            raise UserError(
                f"none of these methods can be measured on {' or '.join(self.pefts)}: name other --methods or --peft"
            )

    def jobs(self) -> list[tuple[Chosen, str]]:
        """(method, adapter), adapter by adapter so that a model is loaded once for the timing."""
        chosen = [Chosen.of(m) for m in dict.fromkeys(self.methods)]
        pairs = [(c, p) for c in chosen for p in c.adapters(self.pefts)]
        order = list(dict.fromkeys(p for _, p in pairs))
        return sorted(pairs, key=lambda pair: order.index(pair[1]))


def run(
    loading: dict[str, Any],
    settings: Settings,
    done: Sequence[Record] = (),
    progress: Progress | None = None,
    origin: dict[str, Any] | None = None,
    dry: bool = False,
) -> Iterator[Record]:
    """Measure, record by record. ``done``: records of the run that is resumed.

    loading  arguments of `load_task` but ``peft``; the device is that of the settings. It is loaded anew in every process.
    """
    started, jobs = time.perf_counter(), settings.jobs()
    loading = {**loading, "device": settings.device}
    tell = progress or (lambda what, share: None)
    # An adapter's blocks say more in the header than the bare model's.
    first = next((p for _, p in jobs if p != "none"), "none")
    task = load_task(**loading, peft=first)
    loaded = time.perf_counter() - started
    setup: Probe[Settings] = Probe.of(task, settings)
    yield header(setup, "cost", origin or {})
    yield from (Warning(note, "task") for note in task.notes)
    tokens = sum(int(b["attention_mask"].sum()) for b in task.batches(len(task.rows)))
    yield from _warnings(setup, tokens)
    reason = cost_memory.available(settings.device) if settings.memory else "not asked for"
    if settings.memory and reason:
        yield Warning(f"memory is not measured: {reason}", "memory")
    expected = _estimate(setup, jobs, loaded, not reason)
    yield expected
    if dry:
        return
    kept = {(type(r), r.method, r.peft) for r in done if isinstance(r, StepMemory | StepTime)}
    calls = {"forwards": 0, "backwards": 0}

    def share() -> float:
        return min((time.perf_counter() - started) / max(expected.seconds, 1e-9), 0.99)

    for chosen, peft in jobs if not reason else []:
        if (StepMemory, chosen.name, peft) not in kept:
            tell(f"memory of {chosen.name} ({peft})", share())
            yield _memory(chosen, peft, loading, settings, task)
    held = first
    for chosen, peft in jobs if settings.rounds else []:
        if (StepTime, chosen.name, peft) in kept:
            continue
        tell(f"time of {chosen.name} ({peft})", share())
        if peft != held:
            del task, setup  # one model at a time
            task, held = load_task(**loading, peft=peft), peft
            setup = Probe.of(task, settings)
        found = cost_time.step_time(
            task, chosen.method, chosen.law, {}, settings.rounds, settings.micro_batch, chosen.name
        )
        calls["forwards"] += found.forwards * settings.rounds
        calls["backwards"] += found.backwards * settings.rounds
        if (found.forwards, found.backwards) != found.declared:
            yield Warning(
                f"{chosen.name} declares {found.declared[0]} forward and {found.declared[1]} backward passes a step and made "
                f"{found.forwards} and {found.backwards}",
                chosen.name,
            )
        yield found
    yield Cost("actual", calls["backwards"], 0, calls["forwards"], time.perf_counter() - started, peak(setup.oracle))
    yield End("finished")


def _warnings(setup: Probe[Settings], tokens: int) -> Iterator[Warning]:
    parameters = sum(g.numel for g in setup.groups)
    if parameters < ENOUGH_PARAMETERS and tokens < ENOUGH_TOKENS:
        yield Warning(
            f"{parameters:,} parameters and {tokens} tokens are too few for figures that count: measure a model of at least "
            f"{ENOUGH_PARAMETERS // 10**6} M parameters, or rows of at least {ENOUGH_TOKENS} tokens together",
            "size",
        )


def _memory(chosen: Chosen, peft: str, loading: dict[str, Any], settings: Settings, task: Task) -> StepMemory:
    job = cost_memory.Job(
        {**loading, "peft": peft}, chosen.method, chosen.law, {}, settings.micro_batch, torch.get_num_threads()
    )
    m = cost_memory.apart(job)
    phase = m.phases.get
    return StepMemory(
        method=chosen.name, peft=peft, trained=m.trained, rows=len(task.rows), tokens=m.tokens, weights=m.weights, inference=m.inference,
        kept=m.kept, perturbation=phase("perturbation"), activations=phase("activations"), update=phase("update"),
        peak=max(m.phases.values()), formula=m.formula, largest=m.largest,
    )  # fmt: skip


def _estimate(setup: Probe[Settings], jobs: Sequence[tuple[Chosen, str]], loaded: float, memory: bool) -> Cost:
    """From the time that loading took and that of one forward pass."""
    s, forward = setup.settings, timed(setup.oracle.value)
    forwards = backwards = 0.0
    seconds = loaded
    for chosen, _ in jobs:
        passes = cost_formula.passes(chosen.method)
        a_step = passes.time()
        steps = s.rounds + 2 if s.rounds else 0
        around = 2.0 + 3.0 * (passes.backward > 0)  # the forward pass beside a step, and a gradient
        forwards, backwards = forwards + steps * passes.forward, backwards + steps * passes.backward
        seconds += forward * steps * (a_step + around)
        seconds += (2 * loaded + forward * (STEPS_OF_MEMORY * a_step + 4)) if memory else 0.0
    # a step's peak: weights, gradients and moments of Adam on all of them
    size = sum(t.numel() * t.element_size() for g in setup.groups for t in g.tensors)
    return Cost("estimated", backwards, 0, forwards, seconds, 2 * peak(setup.oracle) + 4 * size)


__all__ = ["DEFAULT_METHODS", "Chosen", "Settings", "run"]
