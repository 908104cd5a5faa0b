"""Peak memory of one step by phase, in a process that does nothing else.

On the CPU memory is the resident set: its high-water mark is reset before each phase and read after it (Linux). The process asks the C
library for a mapping of its own for every tensor, so that a freed one leaves the resident set at once: what is measured is what the
method holds, and not what an allocator keeps for later. It first trains the embedded model on the same data for a step, so that code
pages, imports and the tokenised text are in the level that is taken off. On CUDA the device's own counters are read.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hybridtheory import memory
from hybridtheory.blocks import Block, partition
from hybridtheory.errors import UserError
from hybridtheory.estimators.catalogue import parse
from hybridtheory.optimizers import METHODS, ZeroOrder, build
from hybridtheory.training import closure_of
from probes import cost_formula
from probes.tasks import Task, load_task

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
# Learning rates that keep the arithmetic of a step and leave float32 weights where they are.
RATE = 1e-12
OPTIONS: dict[str, dict[str, Any]] = {"bilevel": {"penalty": 1.0, "inner_lr": RATE}}


@dataclass(frozen=True)
class Job:
    """One method on one adapter: ``loading`` goes to `load_task`, ``options`` to `hybridtheory.optimizers.build`."""

    loading: dict[str, Any]
    method: str
    law: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    micro_batch: int | None = None
    threads: int = 1


@dataclass(frozen=True)
class Measured:
    """Bytes above the level before the model was loaded; see `probes.records_cost.StepMemory`."""

    trained: int
    tokens: int
    weights: int
    inference: int
    kept: int
    phases: dict[str, int]
    formula: float | None
    largest: int


class Meter:
    """Most bytes held since `reset`, above the level at which it was made."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        gc.collect()
        self.level = memory.resident(device)

    def now(self) -> int:
        gc.collect()
        return memory.resident(self.device) - self.level

    def reset(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            CLEAR.write_text("5")

    def peak(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) - self.level
        line = next(s for s in STATUS.read_text().splitlines() if s.startswith("VmHWM"))
        return int(line.split()[1]) * 1024 - self.level


def available(device: str) -> str:
    """Why memory cannot be measured here; "" where it can."""
    if torch.device(device).type == "cuda":
        return ""
    if torch.device(device).type != "cpu":
        return f"memory is measured on cpu and cuda, not on {device}"
    try:
        CLEAR.write_text("5")
    except OSError as error:
        return f"the peak of the resident set cannot be reset here ({error.strerror}): {CLEAR}, which Linux has"
    return ""


def optimizer_of(task: Task, method: str, law: str | None, options: dict[str, Any]) -> ZeroOrder:
    """The method at rates that move nothing."""
    blocks = {b.group: b for b in groups(task)}
    chosen = parse(law) if law is not None else None
    own = OPTIONS.get(method, {})
    return build(
        method, task.model, blocks.get("base"), blocks.get("peft"), lr_base=RATE, lr_peft=RATE, law=chosen, **{**own, **options}
    )  # fmt: skip


def groups(task: Task) -> list[Block]:
    return partition(task.model, "group", task.is_peft, task.base, task.peft_info)


def closure(task: Task, micro_batch: int | None) -> Callable[..., Tensor]:
    """The task's rows as one minibatch."""
    return closure_of(task.model, task.objective, task.batches(micro_batch or len(task.rows)))


def measure(job: Job) -> Measured:
    """In this very process, which is then good for nothing else."""
    return_memory_at_once()
    torch.set_num_threads(job.threads)
    device = torch.device(job.loading.get("device", "cpu"))
    warm = {
        k: v
        for k, v in job.loading.items()
        if k in ("data", "labels", "template", "text_column", "label_column", "head", "device")
    }
    small = load_task(None, rows=2, max_length=16, **({**warm, "head": "auto"}))
    optimizer_of(small, "hybrid", None, {}).step(closure(small, None))
    del small
    meter = Meter(device)
    task = load_task(**job.loading)
    f = closure(task, job.micro_batch)
    weights = meter.now()
    inference = peak_of(meter, f)
    optimizer = optimizer_of(task, job.method, job.law, job.options)
    # The first step looks at the model, allocates the rule's state and draws subspaces; the others are what a run is made of.
    optimizer.step(f)
    kept = meter.now() - weights
    phases: dict[str, int] = {}

    def mark(phase: str) -> None:
        phases[phase] = max(phases.get(phase, 0), meter.peak())
        meter.reset()

    def watched(backward: bool = False) -> Tensor:
        # One fixed seed of all noise is kept by the optimizer around this call: it is the same closure to it.
        loss = f(backward)
        mark("activations" if backward else "perturbation")
        return loss

    for _ in range(2):
        meter.reset()
        optimizer.step(watched)
        mark("update")
    return _with_formula(job, task, optimizer, weights, inference, kept, phases)


def _with_formula(
    job: Job, task: Task, optimizer: ZeroOrder, weights: int, inference: int, kept: int, phases: dict[str, int]
) -> Measured:
    kind = METHODS[job.method].kind
    first = [p for g in optimizer.param_groups if g["kind"] == "fo" for p in g["params"]]
    perturbed = [g["block"] for g in optimizer.param_groups if g["kind"] == "zo"]
    batch = task.batches(job.micro_batch or len(task.rows))[0]
    found = cost_formula.layers(
        task.model, task.is_peft, first, lambda: task.objective.loss(task.objective.forward(task.model, batch), batch)
    )
    law = optimizer.param_groups[0].get("law") if kind != "fo" else None
    elements = cost_formula.memory(job.method, law, found, perturbed)
    width = next(task.model.parameters()).element_size()
    return Measured(
        trained=sum(p.numel() for g in optimizer.param_groups for p in g["params"]),
        tokens=sum(int(b["attention_mask"].sum()) for b in task.batches(len(task.rows))),
        weights=weights, inference=inference, kept=kept, phases=phases, formula=None if elements is None else elements * width,
        largest=max((t.numel() * t.element_size() for b in perturbed for t in b.tensors), default=0),
    )  # fmt: skip


@torch.no_grad()
def peak_of(meter: Meter, f: Callable[..., Tensor]) -> int:
    f()
    meter.reset()
    f()
    return meter.peak()


def return_memory_at_once() -> None:
    """A mapping of its own for every block above 64 KiB (glibc's M_MMAP_THRESHOLD, whose default grows while a program runs)."""
    try:
        ctypes.CDLL(None).mallopt(-3, 64 * 1024)
    except (OSError, AttributeError, TypeError):
        return  # another C library: its allocator decides


def apart(job: Job) -> Measured:
    """`measure` in a process of its own. UserError where that process does not survive it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["probes.cost_memory"])  # imports once, models never
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(measure, job).result()
        except BrokenProcessPool:
            raise UserError(
                f"the process that measured {job.method} was ended, most likely because memory ran out: "
                "give a smaller --micro-batch, fewer --rows or another --methods"
            ) from None
