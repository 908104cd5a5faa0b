"""Preflight: are the derivatives of this model *right*? Checked with numbers, in the order in which one failure explains the next.

1. two losses are bitwise equal (otherwise nothing after it means anything: dropout, routing noise, a random loss);
2. v'g against differences of the loss (catches `padding_idx` embeddings and custom backwards with a wrong first derivative);
3. u'Hv = v'Hu (a second-order backward that is not the derivative of the first is rarely symmetric);
4. v'Hv against differences of gradients over a ladder of steps.

A difference quotient has two errors: truncation, which falls with the step, and rounding, which grows. Where two successive rungs of the
ladder agree, their disagreement bounds the truncation of the finer one; rounding is the noise of the loss, measured at steps too small to
move it (Moré & Wild 2011), over the step. A ladder on which no two rungs agree is not a wrong derivative but a kinked function (ReLU): the
Hessian exists almost everywhere and misses the kinks; the verdict says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from hybridtheory import streams
from hybridtheory.blocks import Block, split
from hybridtheory.difference import Differences
from hybridtheory.estimate import Finding
from hybridtheory.oracle import Oracle
from hybridtheory.vectors import Tensors, dot, norm

STEPS = (3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 3e-5, 1e-5, 3e-6)  # times the block's root-mean-square weight

FIRST_ORDER = 2e-3  # relative: a padding_idx embedding is off by 6e-3 and more
SECOND_ORDER = 2e-2  # relative: the same embedding is off by 1e-1


@dataclass(frozen=True)
class Verdict:
    """ "ok", "kinked" (use curvature at a finite scale beside the infinitesimal one) or "refused"."""

    verdict: Literal["ok", "kinked", "refused"]
    findings: list[Finding]
    note: str = ""


def preflight(oracle: Oracle, seed: int = 0, second_order: bool = True) -> Verdict:
    """Run the checks on every group of the oracle's blocks (one direction a group and check).

    The loss is evaluated twice on all rows; derivatives are checked on the first micro-batch, since every row runs the same code.
    """
    first, second = oracle.value(), oracle.value()
    # Bitwise: nan is equal to itself here, and is reported as what it is.
    if not math.isfinite(first):
        finding = Finding("finite loss", first, math.inf, False, f"the loss is {first}")
        return Verdict(
            "refused", [finding], f"the loss at the starting point is {first}: check the data, the labels and the dtype"
        )
    same = first == second
    findings = [Finding("same loss twice", abs(first - second), 0.0, same, f"{first!r} and {second!r}")]
    if not same:
        why = f"two evaluations of the loss differ ({first!r}, {second!r}): put the model in eval mode and remove random augmentation"
        return Verdict("refused", findings, why)
    if oracle.engine == "forward":
        return Verdict("ok", findings, "values only: no derivative is taken, so none is checked")
    oracle = Oracle(
        oracle.model,
        oracle.objective,
        oracle.batches[:1],
        oracle.blocks,
        oracle.curvature,
        oracle.memory_limit,
        oracle.engine,
    )
    groups: dict[str, list[Block]] = {}
    for block in oracle.blocks:
        groups.setdefault(block.group, []).append(block)
    kinked = []
    for group, blocks in groups.items():
        v = _direction(blocks, seed, "v")
        noise = _noise(oracle, blocks, v)
        finding, size = _check_gradient(oracle, group, blocks, v, noise)
        findings.append(finding)
        if not finding.holds:
            why = f"the {group} weights' gradient is not the gradient of the loss ({finding.note}); look for a custom backward"
            return Verdict("refused", findings, why)
        if not second_order:
            continue
        with oracle.products(*blocks) as hess:
            if isinstance(hess, Differences):
                finding = _check_form(hess, group, blocks, v)
                findings.append(finding)
                if not finding.holds:
                    kinked.append(group)
                continue
            hv = hess(v)
            u = _direction(blocks, seed, "u")
            symmetry = _check_symmetry(group, u, v, hv, hess(u))
        findings.append(symmetry)
        if not symmetry.holds:
            why = f"second derivatives of the {group} weights are not symmetric ({symmetry.note}); a backward is not differentiable"
            return Verdict("refused", findings, why)
        if oracle.curvature != "hessian":
            continue
        product, settled = _check_product(oracle, group, blocks, v, hv, noise, size)
        findings.append(product)
        if not settled:
            kinked.append(group)
        elif not product.holds:
            why = f"Hessian products of the {group} weights are not the derivative of their gradient ({product.note})"
            return Verdict("refused", findings, why)
    if kinked:
        note = f"differences of gradients never settle on {' and '.join(kinked)}: the loss is kinked (ReLU) or beyond float precision"
        return Verdict(
            "kinked",
            findings,
            note + "; curvature almost everywhere and at the scale mu are different numbers, both are given",
        )
    return Verdict("ok", findings)


def _direction(blocks: Sequence[Block], seed: int, name: str) -> Tensors:
    """Gaussian, each tensor scaled by its root mean square (zeros, as in a fresh LoRA B, by the block's)."""
    result = []
    for b in blocks:
        overall = norm(b.tensors) / math.sqrt(b.numel) or 1.0
        for t, z in zip(b.tensors, streams.gaussian(b, seed, f"preflight {name}"), strict=True):
            own = norm([t]) / math.sqrt(t.numel())
            result.append(z * (own or overall))
    return result


def _size(a: Tensors, b: Tensors) -> float:
    """The size that a'b has when its terms do not conspire: per tensor |a||b|/sqrt(n), added in quadrature."""
    return math.sqrt(sum(dot([x], [x]) * dot([y], [y]) / x.numel() for x, y in zip(a, b, strict=True)))


def _noise(oracle: Oracle, blocks: list[Block], v: Tensors) -> float:
    """Relative standard deviation of one evaluation of the loss, from third differences along steps of 1e-8 root mean squares."""
    values = []
    for j in range(8):
        with oracle.moved(blocks, v, 1e-8 * j):
            values.append(oracle.value())
    third = [a - 3 * b + 3 * c - d for a, b, c, d in zip(values, values[1:], values[2:], values[3:], strict=False)]
    # Var of a third difference of independent noise is 20 times the noise's; one unit of float64 is always there.
    measured = math.sqrt(sum(t * t for t in third) / len(third) / 20)
    scale = max(abs(values[0]), 1e-30)
    precision = min(torch.finfo(t.dtype).eps for b in blocks for t in b.tensors)
    return max(measured / scale, precision)


def _check_gradient(oracle: Oracle, group: str, blocks: list[Block], v: Tensors, noise: float) -> tuple[Finding, float]:
    """The finding, and the size of v'g (the scale of the noise in it)."""
    gradient = [t for part in oracle.gradient(*blocks) for t in part]
    exact = dot(gradient, v)
    size = max(_size(gradient, v), abs(exact))
    if size == 0.0:
        return Finding(f"v'g, {group}", 0.0, FIRST_ORDER, True, "the gradient is zero"), 0.0
    loss = abs(oracle.value())

    def quotient(h: float) -> float:
        with oracle.moved(blocks, v, h):
            plus = oracle.value()
        with oracle.moved(blocks, v, -h):
            minus = oracle.value()
        return (plus - minus) / (2 * h)

    found = _ladder(quotient, size * FIRST_ORDER, lambda h: noise * loss / h)
    error, tolerance = abs(found.value - exact) / size, FIRST_ORDER + 3 * found.error / size
    note = f"v'g = {exact:.6g}, differences of the loss give {found}"
    return Finding(f"v'g, {group}", error, tolerance, error <= tolerance, note), size


def _check_symmetry(group: str, u: Tensors, v: Tensors, hv: Tensors, hu: Tensors) -> Finding:
    a, b = dot(u, hv), dot(v, hu)
    size = max(_size(u, hv), abs(a), abs(b))
    error = abs(a - b) / size if size else 0.0
    return Finding(f"u'Hv = v'Hu, {group}", error, 1e-3, error <= 1e-3, f"u'Hv = {a:.6g}, v'Hu = {b:.6g}")


def _check_form(hess: Differences, group: str, blocks: list[Block], v: Tensors) -> Finding:
    """Differences cannot be checked by differences: that they settle on a number is what there is to know."""
    found = hess.form(v, blocks)
    error = found.halfwidth / abs(found.value) if found.value else 0.0
    note = f"v'Hv = {found.value:.6g} +- {found.halfwidth:.1g} at steps of {found.share:.0e} of the weights and up"
    return Finding(f"v'Hv settles, {group}", error, SECOND_ORDER, error <= SECOND_ORDER, note)


def _check_product(
    oracle: Oracle, group: str, blocks: list[Block], v: Tensors, hv: Tensors, noise: float, first_order: float
) -> tuple[Finding, bool]:
    exact = dot(v, hv)
    size = max(_size(v, hv), abs(exact))
    if size == 0.0:
        return Finding(f"v'Hv, {group}", 0.0, SECOND_ORDER, True, "the product is zero"), True

    def slope() -> float:
        return sum(dot(g, x) for g, x in zip(oracle.gradient(*blocks), split(v, blocks), strict=True))

    def quotient(h: float) -> float:
        with oracle.moved(blocks, v, h):
            plus = slope()
        with oracle.moved(blocks, v, -h):
            minus = slope()
        return (plus - minus) / (2 * h)

    # A gradient is a longer computation than a loss: its relative noise is taken as four times the loss's.
    found = _ladder(quotient, size * SECOND_ORDER, lambda h: 4 * noise * first_order / h)
    error, tolerance = abs(found.value - exact) / size, SECOND_ORDER + 3 * found.error / size
    note = f"v'Hv = {exact:.6g}, differences of gradients give {found}"
    return Finding(f"v'Hv, {group}", error, tolerance, error <= tolerance, note), found.settled


@dataclass(frozen=True)
class _Quotient:
    """A difference quotient at the best step of the ladder, with its error from truncation and rounding."""

    value: float
    error: float
    step: float
    settled: bool

    def __str__(self) -> str:
        settled = "" if self.settled else " (not settled)"
        return f"{self.value:.6g} +- {self.error:.1g} at step {self.step:.0e}{settled}"


def _ladder(quotient: Callable[[float], float], wanted: float, noise: Callable[[float], float]) -> _Quotient:
    """Walk down the steps until two successive quotients agree to ``wanted`` and rounding is below it too."""
    best = _Quotient(math.nan, math.inf, STEPS[0], False)
    last = quotient(STEPS[0])
    for h in STEPS[1:]:
        now = quotient(h)
        error = abs(now - last) + noise(h)
        if error < best.error:
            best = _Quotient(now, error, h, error <= wanted)
        if best.settled or noise(h) > best.error:
            break  # rounding alone is now worse than the best rung: further ones cannot help
        last = now
    return best
