"""Bilevel ZOFO (Shirkavand et al. 2025, arXiv 2502.03604), penalty form: zeroth-order on the base θ, first-order on two adapters p and s.

    min over θ, p of max over s of  Φ = F(θ, p; upper) + λ [F(θ, p; lower) - F(θ, s; lower)]

One step: K first-order steps on s (θ fixed) approach argmin_s F(θ, s; lower); then p moves along ∇_p[F(θ, p; upper) + λF(θ, p; lower)] and
θ along a zeroth-order gradient of the whole Φ. Φ bounds the bilevel objective only as far as s has reached its minimum: the penalty
gap F(θ, p) - F(θ, s) on the lower minibatch is reported every step. The slope carries λ times a difference of nearly equal losses, so its
rounding noise grows with λ. The released code keeps λ fixed and its upper step one-sided; so is the default here.

Several tasks (the paper's multitask form) share θ and have adapters of their own; a step sums the tasks' Φ, along one direction u.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hybridtheory.blocks import Block
from hybridtheory.errors import UserError
from hybridtheory.estimators.zo_gradient import ZOGradient
from hybridtheory.optimizers.base import Closure, ZeroOrder
from hybridtheory.optimizers.momentum import DenseRule
from hybridtheory.optimizers.rules import State, adam_

Values = dict[str, Tensor]


@dataclass(frozen=True)
class Minibatches:
    """What one task brings to a step: the upper minibatch, and lower ones for the inner steps (used in turn; the last
    one is the penalty's)."""

    upper: Closure
    lower: Sequence[Closure]
    task: int = 0


class BilevelZOFO(DenseRule):
    """groups: the base as "zo" (lr: θ's), the adapter as "fo" (lr: p's).

    penalty      λ > 0.
    inner_steps  K >= 1 steps on s, at ``inner_lr``.
    rule         "adam" (as released) or "sgd", for θ, p and s alike.
    """

    accumulates = False  # the inner steps move s between evaluations

    def __init__(
        self,
        groups: Block | Sequence[Block | Mapping[str, Any]],
        model: nn.Module,
        seed: int = 0,
        *,
        penalty: float,
        inner_lr: float,
        inner_steps: int = 10,
        rule: str = "adam",
        tasks: int = 1,
        **options: Any,
    ) -> None:
        super().__init__(groups, model, seed, **{"difference": "forward", **options})
        if not self._fo_groups or not self.units:
            raise UserError("bilevel ZOFO needs a base block (kind 'zo') and an adapter block (kind 'fo')")
        if not (penalty > 0 and inner_steps >= 1 and tasks >= 1) or rule not in ("adam", "sgd"):
            raise UserError(
                "bilevel ZOFO needs penalty > 0, inner_steps >= 1, tasks >= 1 and rule 'adam' or 'sgd', got "
                f"penalty = {penalty:g}, inner_steps = {inner_steps}, tasks = {tasks}, rule = {rule!r}"
            )
        self.penalty, self.inner_lr, self.inner_steps, self.rule, self.tasks = (
            penalty,
            inner_lr,
            inner_steps,
            rule,
            tasks,
        )
        self.adapter = {n: p for g in self._fo_groups for n, p in g["block"].parameters.items()}
        self._rates = [(g["block"].names, i) for i, g in enumerate(self.param_groups) if g["kind"] == "fo"]
        start = {n: p.detach().clone() for n, p in self.adapter.items()}
        self.named_state["s"] = [{n: v.clone() for n, v in start.items()} for _ in range(tasks)]
        # with one task p is the model's own adapter, otherwise the model holds the adapter of whichever task was shown last
        self.named_state["p"] = [{n: v.clone() for n, v in start.items()} for _ in range(tasks)] if tasks > 1 else None
        self.named_state["rules"] = [{} for _ in range(tasks)]
        self.run["gap"] = None

    def step(  # type: ignore[override]
        self, closure: Closure | Sequence[Minibatches] | None = None, lower: Sequence[Closure] | None = None
    ) -> Tensor:
        """closure is the upper minibatch and ``lower`` the lower ones (default: the same), or one `Minibatches` for
        each task of this step."""
        if callable(closure):
            closure = [Minibatches(closure, lower or [closure])]
        self._levels: Sequence[Minibatches] = closure or []
        return super().step(self._phi if closure else None)

    def show(self, task: int = 0) -> None:
        """Put a task's adapter p into the model."""
        if self.tasks > 1:
            for n, p in self.adapter.items():
                p.data.copy_(self.named_state["p"][task][n])

    def report(self) -> dict[str, Any]:
        """Also the penalty gap F(θ, p) - F(θ, s) on the lower minibatches, mean over tasks."""
        return {**super().report(), "penalty_gap": self.run["gap"]}

    def cost(self) -> dict[str, int]:
        inner = self.inner_steps + 2
        return {
            "forwards": self.tasks * (inner + 1 + 3 * ZeroOrder.cost(self)["forwards"]),
            "backwards": self.tasks * inner,
        }

    # ---- Φ and its gradients ----

    @contextmanager
    def _holding(self, values: Values | None) -> Iterator[None]:
        """The model with these adapter values; None leaves its own."""
        before = {n: p.data for n, p in self.adapter.items()}
        try:
            for n, p in self.adapter.items() if values is not None else ():
                p.data = values[n]  # type: ignore[index]
            yield
        finally:
            for n, p in self.adapter.items():
                p.data = before[n]

    def _p(self, task: int) -> Values | None:
        return self.named_state["p"][task] if self.tasks > 1 else None

    def _phi(self) -> Tensor:
        """Φ at the current θ, summed over the step's tasks; counted as the three forwards a task that it is."""
        total = None
        for level in self._levels:
            with self._holding(self._p(level.task)):
                value = level.upper() + self.penalty * level.lower[-1]()
            with self._holding(self.named_state["s"][level.task]):
                value = value - self.penalty * level.lower[-1]()
            total = value if total is None else total + value
        assert total is not None
        return total

    def _loss(self, closure: Closure) -> Tensor:
        self.run["forwards"] += 3 * len(self._levels) - 1 if closure == self._phi else 0
        return super()._loss(closure)

    def _gradient_of(self, closure: Closure) -> tuple[float, Values]:
        for p in self.adapter.values():
            p.grad = None
        loss = self._gradient(closure)
        gradient = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in self.adapter.items()}
        for p in self.adapter.values():
            p.grad = None
        return loss, gradient

    def _measure(self, closure: Closure) -> tuple[float, list[ZOGradient]]:
        self._moves: list[tuple[int, Values]] = []
        gap, first = 0.0, 0.0
        for level in self._levels:
            s, memory = self.named_state["s"][level.task], self.named_state["rules"][level.task]
            for k in range(self.inner_steps):
                with self._holding(s):
                    _, gradient = self._gradient_of(level.lower[k % len(level.lower)])
                for n, g in gradient.items():
                    self._rule(s[n], g, memory.setdefault(f"s {n}", {}), self.inner_lr)
            with self._holding(self._p(level.task)):
                upper, one = self._gradient_of(level.upper)
                low, two = self._gradient_of(level.lower[-1])
            self._moves.append((level.task, {n: one[n] + self.penalty * two[n] for n in one}))
            with self._holding(s):
                inner = float(super()._loss(level.lower[-1]))
            gap, first = gap + low - inner, first + upper
        self.run["gap"] = gap / len(self._levels)
        return first / len(self._levels), [self._evaluate(closure, unit) for unit in self.units]

    def _update(self, zos: list[ZOGradient]) -> None:
        super()._update(zos)
        rates = {n: self.param_groups[i]["lr"] for names, i in self._rates for n in names}
        for task, gradient in self._moves:
            values, memory = self._p(task), self.named_state["rules"][task]
            for n, g in gradient.items():
                target = self.adapter[n].data if values is None else values[n]
                self._rule(target, g, memory.setdefault(f"p {n}", {}), rates[n])

    def _rule(self, w: Tensor, g: Tensor, state: State, lr: float) -> None:
        if self.rule == "adam":
            adam_(w, g, state, lr)
        else:
            w.add_(g, alpha=-lr)

    def _descend(self, unit: Any, zo: ZOGradient, factor: float = 1.0) -> None:
        if self.rule == "sgd":
            super(DenseRule, self)._descend(unit, zo, factor)  # replayed: nothing dense
        else:
            super()._descend(unit, zo, factor)
