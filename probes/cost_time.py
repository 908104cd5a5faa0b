"""Time of one step, interleaved with what it is compared with: each round runs a forward pass, for a hybrid method its first-order twin,
and the step, one after another, and a ratio is taken within the round. A machine that slows down slows all of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor

from hybridtheory.optimizers import METHODS, ZeroOrder
from hybridtheory.theory.cost import Passes
from probes import cost_formula
from probes.cost_memory import closure, optimizer_of
from probes.records_cost import Interval, StepTime
from probes.tasks import Task

Work = Callable[[], object]


@dataclass
class Counted:
    """A closure that counts its calls as the optimizer should."""

    f: Callable[..., Tensor]
    forwards: int = 0
    backwards: int = 0

    def __call__(self, backward: bool = False) -> Tensor:
        self.forwards += 1
        self.backwards += backward
        return self.f(backward)


def twin(method: str) -> str | None:
    """The first-order method that a hybrid one shares its PEFT update with."""
    if METHODS[method].kind != "hybrid" or method == "bilevel":
        return None
    return "peft-adamw" if dict(METHODS[method].options).get("rule") == "adamw" else "peft-sgd"


def step_time(
    task: Task, method: str, law: str | None, options: dict[str, Any], rounds: int, micro: int | None, name: str
) -> StepTime:
    """One method on the task's own rows; at rates that move nothing, so every round does the same work."""
    f = Counted(closure(task, micro))
    optimizer = optimizer_of(task, method, law, options)
    optimizer.step(f)  # looks at the model: more calls than a step
    before = (f.forwards, f.backwards)
    optimizer.step(f)
    forwards, backwards = f.forwards - before[0], f.backwards - before[1]
    declared = optimizer.cost()
    works: dict[str, Work] = {"forward": lambda: _forward(f), "step": lambda: optimizer.step(f)}
    other = twin(method)
    if other is not None:
        beside = optimizer_of(task, other, None, {})
        works["twin"] = lambda: beside.step(f)
    gradient = None if forwards and not backwards else _trained(optimizer)
    if gradient is not None:
        works["gradient"] = lambda: _gradient(task, f, gradient)
    found = interleaved(works, rounds, next(task.model.parameters()).device)
    ratio = [s / w for s, w in zip(found["step"], found["forward"], strict=True)]
    backward = (
        median(g / w for g, w in zip(found["gradient"], found["forward"], strict=True)) - 1
        if gradient is not None
        else None
    )
    formula = cost_formula.passes(method, inner_steps=getattr(optimizer, "inner_steps", 0) or 1)
    parts = (
        [s / (t + w) for s, t, w in zip(found["step"], found["twin"], found["forward"], strict=True)] if other else None
    )
    return StepTime(
        method=name, peft=str(task.peft_info.get("type", "none")), forwards=forwards, backwards=backwards,
        declared=(declared["forwards"], declared["backwards"]), formula=(formula.forward, formula.backward), rounds=rounds,
        seconds=median(found["step"]), ratio=median(ratio), ratio_interval=quartiles(ratio), backward=backward,
        predicted=priced(formula, backward), parts=median(parts) if parts else None, parts_interval=quartiles(parts) if parts else None,
    )  # fmt: skip


def priced(formula: Passes, backward: float | None) -> float:
    """The formula in forward passes, a backward pass at its measured price."""
    return formula.forward + formula.backward * (backward or 0.0)


def quartiles(values: list[float]) -> Interval:
    low, _, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else (values[0],) * 3
    return low, high


def interleaved(
    works: dict[str, Work], rounds: int, device: torch.device, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of each work in each round; who goes first changes from round to round."""
    names = list(works)
    found: dict[str, list[float]] = {name: [] for name in works}
    for name in names:
        works[name]()  # warm
    for r in range(rounds):
        turn = r % len(names)
        for name in names[turn:] + names[:turn]:
            _settled(device)
            start = clock()
            works[name]()
            _settled(device)
            found[name].append(clock() - start)
    return found


def _settled(device: torch.device) -> None:
    """CUDA runs behind: wait for it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.no_grad()
def _forward(f: Counted) -> None:
    f()


def _trained(optimizer: ZeroOrder) -> list[Tensor]:
    return [p for g in optimizer.param_groups if g["kind"] == "fo" for p in g["params"]]


def _gradient(task: Task, f: Counted, parameters: list[Tensor]) -> None:
    with cost_formula.only(task.model, parameters), torch.enable_grad():
        f(backward=True)
    for p in parameters:
        p.grad = None
