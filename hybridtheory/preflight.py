"""Preflight: are the derivatives of this model *right*? Checked with numbers, in the order in which one failure explains the next.

1. two losses are bitwise equal (otherwise nothing after it means anything: dropout, routing noise, a random loss);
2. v'g against differences of the loss (catches `padding_idx` embeddings and custom backwards with a wrong first derivative);
3. u'Hv = v'Hu (a second-order backward that is not the derivative of the first is rarely symmetric);
4. v'Hv against differences of gradients over a ladder of steps.

A difference quotient has two errors: truncation, which falls with the step, and rounding, which grows. Both are read off the ladder itself:
where two successive rungs agree, their disagreement bounds the error of the finer one. A ladder on which no two rungs agree is not a wrong
derivative but a kinked function (ReLU): the Hessian exists almost everywhere and misses the kinks; the verdict says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from hybridtheory import streams
from hybridtheory.blocks import Block, split
from hybridtheory.oracle import Oracle
from hybridtheory.vectors import Tensors, dot, norm

STEPS = (3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 3e-5, 1e-5, 3e-6)  # times the block's root-mean-square weight

FIRST_ORDER = 2e-3  # relative: a padding_idx embedding is off by 6e-3 and more
SECOND_ORDER = 2e-2  # relative: the same embedding is off by 1e-1


@dataclass(frozen=True)
class Finding:
    """One numeric check: ``value`` is a relative error, ``tolerance`` what it may be given the evidence's own error."""

    name: str
    value: float
    tolerance: float
    holds: bool
    note: str = ""


@dataclass(frozen=True)
class Verdict:
    """ "ok", "kinked" (use curvature at a finite scale beside the infinitesimal one) or "refused"."""

    verdict: Literal["ok", "kinked", "refused"]
    findings: list[Finding]
    note: str = ""


def preflight(oracle: Oracle, seed: int = 0, second_order: bool = True) -> Verdict:
    """Run the checks on every group of the oracle's blocks (one direction a group and check)."""
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
    groups: dict[str, list[Block]] = {}
    for block in oracle.blocks:
        groups.setdefault(block.group, []).append(block)
    kinked = []
    for group, blocks in groups.items():
        v = _direction(blocks, seed, "v")
        first_order = _check_gradient(oracle, group, blocks, v)
        findings.append(first_order)
        if not first_order.holds:
            why = f"the gradient of the {group} weights is not the gradient of the loss ({first_order.note}); look for a custom backward"
            return Verdict("refused", findings, why)
        if not second_order:
            continue
        with oracle.products(*blocks) as hess:
            hv = hess(v)
            u = _direction(blocks, seed, "u")
            symmetry = _check_symmetry(group, u, v, hv, hess(u))
        findings.append(symmetry)
        if not symmetry.holds:
            why = f"second derivatives of the {group} weights are not symmetric ({symmetry.note}); a backward is not differentiable"
            return Verdict("refused", findings, why)
        if oracle.curvature != "hessian":
            continue
        product, settled = _check_product(oracle, group, blocks, v, hv)
        findings.append(product)
        if not settled:
            kinked.append(group)
        elif not product.holds:
            why = f"Hessian products of the {group} weights are not the derivative of their gradient ({product.note})"
            return Verdict("refused", findings, why)
    if kinked:
        note = f"differences of gradients never settle on {' and '.join(kinked)}: the loss is kinked (ReLU), or steep beyond float precision"
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


def _check_gradient(oracle: Oracle, group: str, blocks: list[Block], v: Tensors) -> Finding:
    gradient = [t for part in oracle.gradient(*blocks) for t in part]
    exact = dot(gradient, v)
    # |g_i v_i| summed in quadrature: the size v'g has when its terms do not conspire.
    size = math.sqrt(sum(dot([g], [g]) * dot([x], [x]) / x.numel() for g, x in zip(gradient, v, strict=True)))
    if size == 0.0:
        return Finding(f"v'g, {group}", 0.0, FIRST_ORDER, True, "the gradient is zero")

    def quotient(h: float) -> float:
        with oracle.moved(blocks, v, h):
            plus = oracle.value()
        with oracle.moved(blocks, v, -h):
            minus = oracle.value()
        return (plus - minus) / (2 * h)

    value, spread, h, settled = _ladder(quotient, max(size, abs(exact)) * FIRST_ORDER)
    scale = max(size, abs(exact))
    error, tolerance = abs(value - exact) / scale, FIRST_ORDER + 3 * spread / scale
    note = f"v'g = {exact:.6g}, differences of the loss give {value:.6g} +- {spread:.1g} at step {h:.0e}"
    # Without two rungs that agree there is no evidence against the gradient; a kinked loss still settles at first order.
    return Finding(f"v'g, {group}", error, tolerance, error <= tolerance, note + ("" if settled else " (not settled)"))


def _check_symmetry(group: str, u: Tensors, v: Tensors, hv: Tensors, hu: Tensors) -> Finding:
    a, b = dot(u, hv), dot(v, hu)
    size = max(
        math.sqrt(sum(dot([x], [x]) * dot([y], [y]) / x.numel() for x, y in zip(u, hv, strict=True))), abs(a), abs(b)
    )
    error = abs(a - b) / size if size else 0.0
    return Finding(f"u'Hv = v'Hu, {group}", error, 1e-3, error <= 1e-3, f"u'Hv = {a:.6g}, v'Hu = {b:.6g}")


def _check_product(oracle: Oracle, group: str, blocks: list[Block], v: Tensors, hv: Tensors) -> tuple[Finding, bool]:
    exact = dot(v, hv)
    size = max(
        math.sqrt(sum(dot([x], [x]) * dot([y], [y]) / x.numel() for x, y in zip(v, hv, strict=True))), abs(exact)
    )
    if size == 0.0:
        return Finding(f"v'Hv, {group}", 0.0, SECOND_ORDER, True, "the product is zero"), True

    def quotient(h: float) -> float:
        with oracle.moved(blocks, v, h):
            plus = sum(dot(g, x) for g, x in zip(oracle.gradient(*blocks), split(v, blocks), strict=True))
        with oracle.moved(blocks, v, -h):
            minus = sum(dot(g, x) for g, x in zip(oracle.gradient(*blocks), split(v, blocks), strict=True))
        return (plus - minus) / (2 * h)

    value, spread, h, settled = _ladder(quotient, size * SECOND_ORDER)
    error, tolerance = abs(value - exact) / size, SECOND_ORDER + 3 * spread / size
    note = f"v'Hv = {exact:.6g}, differences of gradients give {value:.6g} +- {spread:.1g} at step {h:.0e}"
    return Finding(
        f"v'Hv, {group}", error, tolerance, error <= tolerance, note + ("" if settled else " (not settled)")
    ), settled


def _ladder(quotient: Callable[[float], float], wanted: float) -> tuple[float, float, float, bool]:
    """Walk down the steps until two successive quotients agree to ``wanted``: (value, disagreement, step, agreed)."""
    best = (math.nan, math.inf, STEPS[0])
    last = quotient(STEPS[0])
    for h in STEPS[1:]:
        now = quotient(h)
        if abs(now - last) < best[1]:
            best = (now, abs(now - last), h)
        if best[1] <= wanted:
            return *best, True
        last = now
    return *best, False
