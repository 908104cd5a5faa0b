"""One run of a method at constant rates with everything measured that convergence theorems speak of, at the start of every step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from hybridtheory.blocks import Block
from hybridtheory.estimators.zo_gradient import NonFiniteLoss
from hybridtheory.optimizers.base import ZeroOrder
from hybridtheory.oracle import Oracle
from hybridtheory.training import minibatches
from hybridtheory.vectors import Tensors, add_, clone, dot
from probes.records_convergence import Trajectory


@dataclass
class Here:
    """A full pass over the rows at the current weights: f, and per group ‖g‖², g and σ² = (1/n) Σ ‖∇f_i - ∇f‖² over micro-batches,
    where f = (1/n) Σ f_i: a micro-batch that holds more of the weight has the larger f_i.
    """

    loss: float
    squares: dict[str, float]
    gradients: dict[str, Tensors]
    noise: dict[str, float]

    @staticmethod
    def of(oracle: Oracle, groups: list[Block]) -> Here:
        loss, total = 0.0, [[] for _ in groups]  # type: float, list[Tensors]
        spread = [0.0] * len(groups)
        own: list[list[float]] = []
        for share, value, parts in oracle.gradients(*groups):
            own.append([share * value, *(dot(p, p) * len(oracle.batches) for p in parts)])
            total = [add_(t, p) if t else p for t, p in zip(total, parts, strict=True)]
        total = [oracle.ranks.add_(t) for t in total]
        for part, *squared in oracle.ranks.join(own, len(oracle.batches)):
            loss += part
            spread = [s + x for s, x in zip(spread, squared, strict=True)]
        names = [b.group for b in groups]
        squares = {n: dot(g, g) for n, g in zip(names, total, strict=True)}
        noise = {n: max(s - squares[n], 0.0) for n, s in zip(names, spread, strict=True)}
        return Here(loss, squares, dict(zip(names, total, strict=True)), noise)


@dataclass
class Walker:
    """Steps `optimizer` over the oracle's micro-batches: all of them in each step ("full"), or one, in the order of `sampling`."""

    oracle: Oracle
    groups: list[Block]
    optimizer: ZeroOrder
    run: int
    seed: int
    sampling: str = "full"
    status: Literal["finished", "not finite"] = "finished"
    note: str = ""
    loss: list[float] = field(default_factory=list)
    squares: dict[str, list[float]] = field(default_factory=dict)
    noise: dict[str, list[float]] = field(default_factory=dict)
    slopes: list[float] = field(default_factory=list)
    moved: dict[str, list[float]] = field(default_factory=dict)
    turned: dict[str, list[float]] = field(default_factory=dict)

    def steps(self, count: int) -> Iterator[int]:
        """Yield the number of each step before it is taken, at the weights that it starts from; stops at a loss that is not finite."""
        for table in (self.squares, self.noise, self.moved, self.turned):
            table.update({b.group: [] for b in self.groups})
        order = minibatches(
            len(self.oracle.batches), 1, self.seed, 0, "reshuffle" if self.sampling == "full" else self.sampling
        )
        last: tuple[Here, dict[str, Tensors]] | None = None
        for step in range(count):
            here = Here.of(self.oracle, self.groups)
            if not math.isfinite(here.loss + sum(here.squares.values())):
                self.status, self.note = "not finite", f"the loss is {here.loss} at step {step}"
                return
            self.loss.append(here.loss)
            for group, value in here.squares.items():
                self.squares[group].append(value)
                self.noise[group].append(0.0 if self.sampling == "full" else here.noise[group])
            if last is not None:
                self._between(here, last)
            last = (here, {b.group: clone(b.tensors) for b in self.groups})
            yield step
            rows = None if self.sampling == "full" else next(order)[1]
            try:
                self.optimizer.step(self._closure(rows))
            except NonFiniteLoss as error:
                self.status, self.note = "not finite", str(error)
                return
            found = [s for zo in self.optimizer.measured for s in zo.slopes]
            if found:
                self.slopes.append(sum(s * s for s in found) / len(found))

    def record(self) -> Trajectory:
        final = self.oracle.value() if self.status == "finished" else math.inf
        return Trajectory(
            self.run,
            self.seed,
            self.status,
            self.loss,
            final,
            self.squares,
            self.noise,
            self.slopes,
            self.moved,
            self.turned,
            self.note,
        )

    def _between(self, here: Here, last: tuple[Here, dict[str, Tensors]]) -> None:
        for block in self.groups:
            move = add_(last[1].pop(block.group), block.tensors, -1.0)
            turn = add_(last[0].gradients.pop(block.group), here.gradients[block.group], -1.0)
            self.moved[block.group].append(dot(move, move))
            self.turned[block.group].append(dot(turn, turn))

    def _closure(self, rows: list[int] | None) -> Callable[..., Tensor]:
        """f (`rows` None), or the sum of f_i over micro-batches `rows`, where f = (1/n) Σ f_i: drawn alike, they are unbiased for f."""
        oracle = self.oracle
        n = len(oracle.batches)
        weight = oracle.total_weight if rows is None else oracle.total_weight / n
        picked = [oracle.batches[i] for i in (range(n) if rows is None else rows) if oracle.ranks.mine(i)]

        def closure(backward: bool = False) -> Tensor | None:
            total = None
            for batch in picked:
                loss = oracle.loss(batch) / weight
                if backward:
                    loss.backward()
                # float64 sums; a forward derivative must stay on the loss, so it is not detached outside a backward pass
                part = loss.detach().double() if backward else loss.double()
                total = part if total is None else total + part
            return total

        return oracle.ranks.closure(closure, oracle.model) if oracle.ranks.size > 1 else closure  # type: ignore[return-value]
