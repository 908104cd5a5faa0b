"""The engine ``difference``: Hessian products from central differences of gradients, each number with the error that this makes.

    D(h) v = (g(w + h v) - g(w - h v)) / 2h = H v + h² c + O(h⁴) + rounding / h

Nothing is differentiated twice, so it serves what the exact engine cannot: fused attention, reentrant checkpointing, sharded weights,
models whose graph of the gradient does not fit. The step is a share of the weights, tensor by tensor, along the direction. Lanczos runs
on plain quotients: the error of a Ritz vector enters its Rayleigh quotient v'Hv squared. What is reported is then v'Hv at the final
vector from six steps, a fit of a + b h² (Richardson's extrapolation by least squares) whose residuals give the rounding, and with it a
t-interval; the steps are moved until the h⁴ that the fit leaves out is small beside the rounding. Traces extrapolate every vector
from two steps; a fit each on the first vectors says what that leaves out in the mean, and the rounding.

A loss computed in 16 bits is a staircase, and no step serves both its treads and its curvature (docs/log.md): 16-bit models are
evaluated in float32 at their own weights while the differences are taken.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy.stats import t as student
from torch import Tensor, nn

from hybridtheory.blocks import Block
from hybridtheory.errors import UserError
from hybridtheory.oracle import Product, Products
from hybridtheory.oracle import _requires_grad as requires_grad
from hybridtheory.shards import is_sharded
from hybridtheory.vectors import Tensors, add_, clone, dot, norm, scale_

if TYPE_CHECKING:
    from hybridtheory.oracle import Oracle

MULTIPLES = np.linspace(1.0, 3.0, 7)  # steps of a fit, in units of the first
# Steps (in the same units) and weights that serve where a fit costs too much: they take h² out of differences of gradients, and
# h² and f(w) out of second differences.
CHEAP = {1: ((1.0, 2.0), (4 / 3, -1 / 3)), 2: ((1.0, 2.0, 3.0), (-13 / 24, 8 / 3, -9 / 8))}
PILOT = 8  # vectors of a trace that get a fit each
LADDER = tuple(0.1 * 4.0**-k for k in range(9))  # shares of the weights at which a step is looked for
WANTED = 1.0  # the fit's h⁴ at its steps, in units of its rounding: h⁶ is then well below
FITS = 3  # with smaller and smaller steps, at most
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Form:
    """v'Hv from several steps. ``stderr`` is rounding's, with ``dof`` degrees of freedom; ``radius``: the share of the weights at
    which h² c would be as large as v'Hv; ``bias``: what the h⁴ left out may amount to."""

    value: float
    stderr: float
    dof: int
    share: float
    radius: float
    bias: float
    parts: np.ndarray  # (micro-batches,), their sum is the value

    @property
    def halfwidth(self) -> float:
        """Of the 95 % interval."""
        return float(student.ppf(0.5 + CONFIDENCE / 2, self.dof)) * self.stderr + self.bias

    @property
    def settled(self) -> bool:
        """Good to a millionth, whichever error is larger."""
        return self.halfwidth <= 1e-6 * abs(self.value)


class Differences(Products):
    """The same map as `Products`, from differences of gradients."""

    def __init__(self, oracle: Oracle, blocks: Sequence[Block]) -> None:
        super().__init__(oracle, blocks)
        self._sizes = sizes(blocks)
        self.precision = max(torch.finfo(t.dtype).eps for t in self._tensors)
        # Rounding falls with 1/h and what a fit leaves out grows with h⁴, hence the fifth root; curvature changes over some
        # thousandths of the weights along the sharpest directions of small models. Only a start: `form` moves it.
        self.share = 3e-3 * self.precision**0.2

    def _product(self, i: int) -> Product:
        def product(v: Tensors, rows: list[int], wanted: list[Tensor], again: bool) -> Tensors:
            return self._difference(i, v, rows, wanted)

        return product

    def _difference(self, i: int, v: Tensors, rows: list[int], wanted: list[Tensor]) -> Tensors:
        return self._quotient(i, v, rows, wanted, self.share / self.relative(v, rows))

    def relative(self, v: Tensors, rows: Sequence[int]) -> float:
        """‖v‖ in units of the weights, tensor by tensor: h times it is the share of them that a step of h moves."""
        return math.sqrt(sum(dot([x], [x]) / self._sizes[r] ** 2 for r, x in zip(rows, v, strict=True))) or 1.0

    def _quotient(self, i: int, v: Tensors, rows: Sequence[int], wanted: list[Tensor], h: float) -> Tensors:
        tensors = [self._tensors[r] for r in rows]
        kept = clone(tensors)
        try:
            _put(tensors, kept, v, h)
            plus = self._gradient(i, wanted)
            _put(tensors, kept, v, -h)
            minus = self._gradient(i, wanted)
        finally:
            _put(tensors, kept, v, 0.0)
        return scale_(add_(plus, minus, -1.0), 0.5 / h)

    def _gradient(self, i: int, wanted: list[Tensor]) -> Tensors:
        if i == self.oracle.ranks.rank:  # the first that is computed here
            self.oracle.calls["gradient"] += 1
        self.oracle.give_back()
        with requires_grad(self.oracle.model, wanted):
            loss = self.oracle.loss(self.oracle.batches[i]) / self.oracle.total_weight
            return self.oracle.differentiate(loss, wanted)

    def form(self, v: Tensors, blocks: Block | Sequence[Block], share: float | None = None) -> Form:
        """v'Hv, v living on ``blocks``, with its error; ``share``: of the weights, the first of the steps, where it is known."""
        blocks = [blocks] if isinstance(blocks, Block) else list(blocks)
        rows = [self._slot[id(t)] for b in blocks for t in b.tensors]
        relative = self.relative(v, rows)
        if share is None:
            share = self._search(v, blocks, relative)
        for _ in range(FITS):
            steps = share / relative * MULTIPLES
            found = fit(share, np.array([self._parts(v, rows, h) for h in steps]))
            if found.bias <= found.stderr or found.settled:
                break
            share *= max((0.1 * found.stderr / found.bias) ** (1 / 7), 0.1)
        # The last fit, not the one with the least error: the luckiest residuals would be chosen, and cover too little.
        return found

    def radius(self, v: Tensors, blocks: Block | Sequence[Block]) -> tuple[float, float]:
        """The share of the weights at which h² c would be as large as v'Hv, from the first two rungs that nearly agree; and v'Hv there."""
        blocks = [blocks] if isinstance(blocks, Block) else list(blocks)
        rows = [self._slot[id(t)] for b in blocks for t in b.tensors]
        relative = self.relative(v, rows)
        return radius(lambda share: sum(self._parts(v, rows, share / relative)), LADDER)

    def _search(self, v: Tensors, blocks: Sequence[Block], relative: float) -> float:
        """The share at which what a fit leaves out is `WANTED` of the rounding."""
        reach, value = self.radius(v, blocks)
        # Rounding of v'g: what a sum of |g|'s terms leaves, six times over (measured on small models).
        gradient = self.gradient(*blocks)
        size = math.sqrt(sum((norm([x]) * norm([g])) ** 2 / x.numel() for x, g in zip(v, gradient, strict=True)))
        rounding = 3 * self.precision * size * relative / max(abs(value), 1e-300)  # relative to v'Hv, at a share of 1
        return float(min((WANTED * rounding * reach**4) ** 0.2, reach / 10, LADDER[0]))

    def gradient(self, *blocks: Block) -> Tensors:
        """Of the whole loss on the blocks' tensors."""
        total: Tensors = []
        for i in self._own():
            part = self._gradient(i, [t for b in blocks for t in b.tensors])
            total = add_(total, part) if total else part
        return self.oracle.ranks.add_(total)

    def _own(self) -> list[int]:
        return [i for i in range(len(self.oracle.batches)) if self.oracle.ranks.mine(i)]

    def _parts(self, v: Tensors, rows: list[int], h: float) -> list[float]:
        wanted = [self._tensors[r] for r in rows]
        own = [[dot(v, self._quotient(i, v, rows, wanted, h))] for i in self._own()]
        return [part for (part,) in self.oracle.ranks.join(own, len(self.oracle.batches))]


def radius(
    quotient: Callable[[float], float],
    ladder: Sequence[float],
    confirmed: bool = False,
    noise: Callable[[float], float] = lambda share: 0.0,
) -> tuple[float, float]:
    """The share of the weights at which h² c is as large as v'Hv, and v'Hv at the lower of the two rungs that tell: the first that
    nearly agree (``confirmed``: and whose next does too), or else those that agree best. ``noise``: what rounding leaves in a
    quotient; rungs below which it is a tenth of it tell nothing.
    """
    found: list[tuple[float, float, float]] = []
    above = quotient(ladder[0])
    for share, lower in pairwise(ladder):
        below = quotient(lower)
        if found and noise(lower) > 0.1 * max(abs(above), abs(below)):
            break
        found.append((abs(above - below) / max(abs(below), 1e-300), share, below))
        above = below
        if all(change <= 0.1 for change, _, _ in found[-1 - confirmed :]) and len(found) > confirmed:
            return _reach(found[-1 - confirmed])
    return _reach(min(found))


def _reach(rung: tuple[float, float, float]) -> tuple[float, float]:
    change, share, value = rung
    return share / math.sqrt(min(max(change, 1e-4), 1.0)), value


def _design(order: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Terms 1, h², h⁴ at the `MULTIPLES`, weights of the rows (rounding goes as h^-order), and the solution's operator.

    Second differences (order 2) share f(w), whose rounding is the same in all of them over h²: a term of its own.
    """
    powers = (0, 2, 4) if order == 1 else (0, 2, 4, -2)
    design = np.stack([MULTIPLES**k for k in powers], axis=1)
    weight = MULTIPLES**order
    return design, weight, np.linalg.pinv(design * weight[:, None])


def coefficients(order: int = 1) -> np.ndarray:
    """(steps,) c with c'y = a: what a fit makes of the quotients, be they numbers or vectors."""
    _, weight, inverse = _design(order)
    found: np.ndarray = inverse[0] * weight
    return found


def fit(share: float, parts: np.ndarray, order: int = 1) -> Form:
    """Least squares of a + b h² + c h⁴ over the `MULTIPLES` of a step. ``parts``: (steps, micro-batches); their rounding goes as h^-order.

    Two terms would do in the mean; where v'Hv is a sum that nearly cancels, h⁴ is not what b leads to expect.
    """
    design, weight, inverse = _design(order)
    y = parts.sum(axis=1)
    terms = inverse @ (y * weight)
    a, b, c = (float(x) for x in terms[:3])
    left = (y - design @ terms) * weight
    dof = len(MULTIPLES) - design.shape[1]
    stderr = math.sqrt(float(left @ left) / dof * float(inverse[0] @ inverse[0]))
    size = max(abs(a), abs(float(y[0])), 1e-300)
    # The terms go down as a geometric series would: h⁶ is to h⁴ as h² to 1.
    bias = abs(c * b / size * float(inverse[0] @ (MULTIPLES**6 * weight)))
    reach = share * math.sqrt(size / abs(b)) if b else math.inf
    # The micro-batches keep the shares of the first step, and sum to the value.
    return Form(a, stderr, dof, share, reach, bias, parts[0] + (a - y[0]) / parts.shape[1])


def level(pilots: np.ndarray, n: int, order: int = 1) -> tuple[float, float]:
    """What to add to a mean of n forms of which the first p are fits and the rest a `CHEAP` sum of steps, and the half-width of the sum.

    ``pilots``: (p, steps), the quotients behind the fits. On the pilots both numbers are known; what the cheap one is off there in the
    mean is taken off the rest. Two levels of one estimate, as in multilevel Monte Carlo (Giles 2008).
    """
    p = len(pilots)
    fits = [fit(1.0, y[:, None], order) for y in pilots]
    steps, weights = CHEAP[order]
    cheap = pilots[:, np.searchsorted(MULTIPLES, np.array(steps) - 1e-9)] @ np.array(weights)
    off = np.array([f.value for f in fits]) - cheap
    rounding = float(np.mean([f.stderr**2 for f in fits])) / p
    bias = float(np.mean([f.bias for f in fits]))
    if n <= p:
        return 0.0, float(student.ppf(0.5 + CONFIDENCE / 2, p * fits[0].dof)) * math.sqrt(rounding) + bias
    rest = 1 - p / n
    spread = float(off.var(ddof=1)) * rest**2 * (1 / (n - p) + 1 / p)
    width = float(student.ppf(0.5 + CONFIDENCE / 2, p - 1)) * math.sqrt(rounding + spread) + bias
    return rest * float(off.mean()), width


def sizes(blocks: Sequence[Block]) -> list[float]:
    """Norm of every tensor; one that is zero (a fresh adapter, a bias) counts as its block's weights in the mean."""
    found = []
    for b in blocks:
        overall = norm(b.tensors) / math.sqrt(b.numel) or 1.0
        found += [norm([t]) or overall * math.sqrt(t.numel()) for t in b.tensors]
    return found


@torch.no_grad()
def _put(tensors: Sequence[Tensor], kept: Sequence[Tensor], v: Sequence[Tensor], h: float) -> None:
    """Weights = kept + h v in place, since a sharded module does not see its tensors replaced; bit for bit kept at h = 0."""
    for t, w, x in zip(tensors, kept, v, strict=True):
        t.copy_(w)
        if h:
            t.add_(x, alpha=h)


@contextmanager
def widened(model: nn.Module) -> Iterator[None]:
    """16-bit parameters and buffers are float32 inside (exactly the same numbers) and the tensors that they were after."""
    if any(is_sharded(p) and p.dtype in (torch.bfloat16, torch.float16) for p in model.parameters()):
        raise UserError(
            "sharded 16-bit weights cannot be evaluated in float32: call fully_shard on a float32 model (--dtype float32)"
        )
    narrow = [t for t in (*model.parameters(), *model.buffers()) if t.dtype in (torch.bfloat16, torch.float16)]
    kept = [t.data for t in narrow]
    try:
        for t in narrow:
            t.data = t.data.float()
        yield
    finally:
        for t, data in zip(narrow, kept, strict=True):
            t.data = data
