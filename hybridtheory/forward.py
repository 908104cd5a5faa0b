"""The engine ``forward``: curvature from values of the loss alone, for models whose backward does not fit.

    (f(w + h v) - 2 f(w) + f(w - h v)) / h² = v'Hv + h² c + O(h⁴) + rounding / h²

Directional curvature comes from a fit over several steps as in `difference`; a trace from Rademacher vectors, fits on the first of them
and three steps on the rest, corrected by what these leave out on the first. What values cannot tell is not made up: ends of the
spectrum, coupling, and every rule that needs a gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from hybridtheory import streams
from hybridtheory.blocks import Block
from hybridtheory.difference import CHEAP, MULTIPLES, PILOT, Form, coefficients, fit, level, radius, sizes, widened
from hybridtheory.estimate import Estimate
from hybridtheory.oracle import Oracle
from hybridtheory.traces import mean_estimate
from hybridtheory.vectors import Tensors, dot, norm

# Shares of the weights at which a step is looked for: rounding rises as 1/h², so the largest that serve are wanted.
LADDER = tuple(0.8 * 2.0**-k for k in range(10))
HALVINGS = 5


@dataclass(frozen=True)
class Slopes:
    """‖g‖² of a block from slopes along random directions, E (g'u)² = ‖g‖²: with its standard error."""

    g_sq: float
    stderr: float
    n: int


class Values:
    """Second differences of f along vectors on one block; f(w) is evaluated once."""

    def __init__(self, oracle: Oracle, block: Block) -> None:
        self.oracle, self.block = oracle, block
        self._sizes = sizes([block])
        self.here = self.values()

    def values(self) -> np.ndarray:
        """(micro-batches,): their parts of f."""
        return np.array(self.oracle.parts())

    def relative(self, v: Tensors) -> float:
        return math.sqrt(sum(dot([x], [x]) / s**2 for x, s in zip(v, self._sizes, strict=True))) or 1.0

    def quotient(self, v: Tensors, h: float) -> np.ndarray:
        """(micro-batches,)"""
        ends = []
        for sign in (1, -1):
            with self.oracle.moved(self.block, v, sign * h):
                ends.append(self.values())
        found: np.ndarray = (ends[0] - 2 * self.here + ends[1]) / h**2
        return found

    def form(self, v: Tensors) -> Form:
        """v'Hv from seven steps, with its error."""
        relative = self.relative(v)
        share = self._search(v, relative)

        def at(share: float) -> Form:
            return fit(share, np.array([self.quotient(v, share / relative * m) for m in MULTIPLES]), order=2)

        # Far out the loss saturates, and two rungs of a ladder may agree by chance: a fit counts once one at half its steps confirms it.
        found = at(share)
        for _ in range(HALVINGS):
            lower = at(found.share / 2)
            if abs(lower.value - found.value) <= math.hypot(lower.halfwidth, found.halfwidth):
                break
            found = lower
        return found

    def _search(self, v: Tensors, relative: float) -> float:
        """The share of the weights at which h⁴ is about the rounding; see `Differences.radius`."""
        # The loss is reduced in float32 at least, over activations of the weights' precision.
        precision = max(max(torch.finfo(t.dtype).eps for t in self.block.tensors), 1e-9)
        rounding = precision * float(np.abs(self.here).sum()) * relative**2  # of a quotient, at a share of 1
        reach, value = radius(
            lambda share: float(self.quotient(v, share / relative).sum()),
            LADDER,
            confirmed=True,
            noise=lambda share: 2 * rounding / share**2,
        )
        rounding /= max(abs(value), 1e-300)
        return float(min((rounding * reach**4) ** (1 / 6), reach / 10, LADDER[0] / 4))


def along(oracle: Oracle, block: Block, v: Tensors) -> Estimate:
    """v'Hv/‖v‖²: curvature along one direction."""
    with widened(oracle.model):
        found = Values(oracle, block).form(v)
    size = norm(v) ** 2
    certain = found.halfwidth <= abs(found.value) / 3
    note = "" if certain else f"second differences leave {found.halfwidth / size:.2g} open"
    return Estimate(found.value / size, n=1, numerical=found.halfwidth / size, resolved=certain, note=note)


def trace(oracle: Oracle, block: Block, seed: int, vectors: int, index: int = 0) -> tuple[Estimate, np.ndarray]:
    """tr H with standard error and ``numerical``, and the forms (vectors, micro-batches) that it is the mean of.

    The vectors are those of `traces.traces` as long as that takes no pairs.
    """
    with widened(oracle.model):
        values = Values(oracle, block)
        forms, pilots, share = [], [], 0.0
        for number in range(vectors):
            z = streams.rademacher(block, seed, "trace", index, number)
            share = share or values.form(z).share
            h = share / values.relative(z)
            if number < PILOT:
                quotients = np.array([values.quotient(z, m * h) for m in MULTIPLES])
                pilots.append(quotients.sum(axis=1))
                forms.append(coefficients(order=2) @ quotients)
            else:
                forms.append(sum(w * values.quotient(z, k * h) for k, w in zip(*CHEAP[2], strict=True)))
    array = np.array(forms)
    correction, width = level(np.array(pilots), vectors, order=2)
    found = mean_estimate(array.sum(axis=1))
    return replace(found, value=found.value + correction, numerical=width), array


def slopes(
    oracle: Oracle,
    block: Block,
    seed: int,
    mu: float,
    directions: int,
    index: int = 0,
    rows: Callable[[int], Sequence[int] | None] = lambda number: None,
) -> Slopes:
    """‖g‖² from central differences of the loss along Gaussian directions, two values each.

    ``rows``: the micro-batches (None: all) whose loss the direction of a number is taken of.
    """
    squares = []
    for number in range(directions):
        u = streams.gaussian(block, seed, "slopes", index, number)
        with oracle.moved(block, u, mu):
            up = oracle.value(rows(number))
        with oracle.moved(block, u, -mu):
            down = oracle.value(rows(number))
        squares.append(((up - down) / (2 * mu)) ** 2)
    array = np.array(squares)
    return Slopes(float(array.mean()), float(array.std(ddof=1)) / math.sqrt(directions), directions)
