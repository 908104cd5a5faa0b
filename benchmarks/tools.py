"""Four tools, one interface: |λ|max of one layer block, and the whole row (both ends, trace) of one layer block.

The public tools get what their authors offer and the best of it: only the block's parameters, their own graph reuse, their own solvers,
and settings that were looked up beforehand from the converged answers (``budgets.py``): the cheapest with which they are right. Our side
gets none of that: it has to decide by itself when to stop.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from budgets import MOST_VECTORS, SEED, TOLERANCE, TRACE_ERROR, Budget, arpack, start_vector
from problem import LAYERS, Problem
from torch import Tensor, nn


@dataclass(frozen=True)
class Row:
    """Ends and trace of one block, with the CPU seconds of each; ``vectors`` of the ``needed`` were run.

    The public tools are told what suffices and claim nothing: ``sharp`` (the trace's own standard error is at most 10 %) and
    ``resolved`` are what a tool says of itself.
    """

    lam_max: float
    lam_min: float
    trace: float
    ends_seconds: float
    trace_seconds: float
    vectors: int
    needed: int
    sharp: bool = True
    resolved: bool = True

    @property
    def seconds(self) -> float:
        """With the trace charged for all the vectors it needs: they cost the same, one by one."""
        return self.ends_seconds + self.trace_seconds * self.needed / self.vectors


# --- the public tools -------------------------------------------------------------------------------------------------


@contextmanager
def only(p: Problem, layer: int) -> Iterator[None]:
    """Only the block requires gradients: how these tools are told what to differentiate, and what lets autograd skip the rest."""
    wanted = {id(x) for x in p.layer(layer)}
    for x in p.net.parameters():
        x.requires_grad_(id(x) in wanted)
    try:
        yield
    finally:
        for x in p.net.parameters():
            x.requires_grad_(True)
            x.grad = None


def pyhessian(p: Problem, batches: int = 1, shift: float = 0.0, parameters: list[nn.Parameter] | None = None):
    """A PyHessian object; H − shift I is had by adding −shift/2 |w|² to the loss."""
    import pyhessian as tool

    # It calls backward(create_graph=True); the cycle that torch warns of is broken by ``only``, which drops the gradients.
    warnings.filterwarnings("ignore", message="Using backward\\(\\) with create_graph=True")
    loss = nn.functional.cross_entropy

    def criterion(logits: Tensor, targets: Tensor) -> Tensor:
        value = loss(logits, targets)
        return value if not shift else value - shift / 2 * sum((x * x).sum() for x in parameters or [])

    torch.manual_seed(SEED)
    if batches == 1:
        return tool.hessian(p.net, criterion, data=(p.ids, p.targets), cuda=False)
    return tool.hessian(p.net, criterion, dataloader=p.batches(batches), cuda=False)


def pyhessian_modulus(p: Problem, layer: int, b: Budget, batches: int = 1) -> float:
    with only(p, layer):
        return pyhessian(p, batches).eigenvalues(maxIter=b.power, tol=0.0)[0][0]


def pyhessian_row(p: Problem, layer: int, b: Budget, vectors: int) -> Row:
    start = time.process_time()
    with only(p, layer):
        tool = pyhessian(p)
        dominant = tool.eigenvalues(maxIter=b.power, tol=0.0)[0][0]
        middle = time.process_time()
        # Its rule divides by the trace with its sign: where the trace is negative any tol >= 0 stops it after two vectors.
        trace = float(np.mean(tool.trace(maxIter=vectors, tol=-math.inf)))
        spent = time.process_time() - middle
        shifted = pyhessian(p, 1, dominant, p.layer(layer))
        other = shifted.eigenvalues(maxIter=b.shifted, tol=0.0)[0][0] + dominant
    ends = time.process_time() - start - spent
    return Row(max(dominant, other), min(dominant, other), trace, ends, spent, vectors, b.vectors)


def curvlinops(p: Problem, layer: int, batches: int = 1):
    from curvlinops import HessianLinearOperator

    return HessianLinearOperator(
        p.net, nn.CrossEntropyLoss(), p.layer(layer), p.batches(batches), check_deterministic=False
    )


def curvlinops_modulus(p: Problem, layer: int, b: Budget, batches: int = 1) -> float:
    operator = curvlinops(p, layer, batches).to_scipy(np.float32)
    return arpack(operator, "LM", 1, *b.arpack, start_vector(p.layer(layer)).numpy())[0]


def curvlinops_row(p: Problem, layer: int, b: Budget, vectors: int) -> Row:
    from curvlinops import hutchinson_trace

    begin = time.process_time()
    operator = curvlinops(p, layer)
    start = start_vector(p.layer(layer)).numpy()
    low, high = sorted(arpack(operator.to_scipy(np.float32), "BE", 2, *b.arpack_both, start))
    middle = time.process_time()
    torch.manual_seed(SEED)
    # All columns at once would be vectorised over tens of vectors: slower on a CPU, and gigabytes. Four at a time is its best.
    sizes = [4] * (vectors // 4) + ([vectors % 4] if vectors % 4 else [])
    total = sum(n * float(hutchinson_trace(operator, n)) for n in sizes)
    return Row(high, low, total / vectors, middle - begin, time.process_time() - middle, vectors, b.vectors)


def eigenthings(p: Problem, layer: int, batches: int = 1):
    from hessian_eigenthings import HessianOperator, supervised_loss

    wanted = {id(x) for x in p.layer(layer)}
    return HessianOperator(
        p.net,
        p.batches(batches),
        supervised_loss(nn.functional.cross_entropy),
        param_filter=lambda name, x: id(x) in wanted,
    )


def eigenthings_power(p: Problem, layer: int, b: Budget, batches: int = 1) -> float:
    from hessian_eigenthings.algorithms.power_iteration import power_iteration_one

    with only(p, layer):
        operator, start = eigenthings(p, layer, batches), start_vector(p.layer(layer))
        return float(power_iteration_one(operator, max_iter=b.power, tol=0.0, init=start)[0])


def eigenthings_ends(p: Problem, layer: int, steps: int, batches: int = 1) -> tuple[float, float]:
    from hessian_eigenthings.algorithms.lanczos import lanczos_tridiagonal

    operator, start = eigenthings(p, layer, batches), start_vector(p.layer(layer))
    run = lanczos_tridiagonal(operator, start, steps, reorthogonalize=True)
    t = torch.diag(run.alphas) + torch.diag(run.betas, 1) + torch.diag(run.betas, -1)
    values = torch.linalg.eigvalsh(t.double())
    return float(values[0]), float(values[-1])


def eigenthings_lanczos(p: Problem, layer: int, b: Budget, batches: int = 1) -> float:
    with only(p, layer):
        return max(eigenthings_ends(p, layer, b.lanczos, batches), key=abs)


def eigenthings_row(p: Problem, layer: int, b: Budget, vectors: int) -> Row:
    """Its Lanczos, the better of its two solvers, and its Hutchinson."""
    from hessian_eigenthings import hutchinson

    begin = time.process_time()
    with only(p, layer):
        low, high = eigenthings_ends(p, layer, b.lanczos_both)
        middle = time.process_time()
        trace = hutchinson(eigenthings(p, layer), num_samples=vectors, seed=SEED).estimate
    return Row(high, low, trace, middle - begin, time.process_time() - middle, vectors, b.vectors)


# --- ours -------------------------------------------------------------------------------------------------------------


class NextByte:
    """The objective: cross-entropy summed over the bytes, f is its mean."""

    def forward(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return model(batch[0])

    def loss(self, outputs: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(outputs, batch[1], reduction="sum")

    def weight(self, batch: tuple[Tensor, Tensor]) -> float:
        return batch[1].numel()


def layer_blocks(p: Problem) -> list:
    from hybridtheory.blocks import partition

    return [b for b in partition(p.net, r"transformer\.h\.(\d+)") if not b.name.endswith("rest")]


def our_moduli(p: Problem, batches: int = 1, seed: int = SEED) -> list[float]:
    """|λ|max of every layer block; the gradient, which leans towards the top eigenvectors, is half of every start."""
    from hybridtheory.curvature import spectrum
    from hybridtheory.oracle import Oracle

    blocks = layer_blocks(p)
    oracle = Oracle(p.net, NextByte(), p.batches(batches), blocks)
    gradient = oracle.gradient(*blocks)
    with oracle.products(*blocks) as hess:
        runs = [
            spectrum(hess, b, seed, warm=g, tol=TOLERANCE, ends=("modulus",), min_steps=4)
            for b, g in zip(blocks, gradient)
        ]
    return [max(r.lam_max.value, r.lam_min.value, key=abs) for r in runs]


def our_rows(p: Problem, warm: dict[str, list[Tensor]], index: int, most_vectors: int = MOST_VECTORS) -> list[Row]:
    """Rows of all layer blocks at the current point; ``warm`` carries end vectors from point to point."""
    from hybridtheory.curvature import spectrum, traces
    from hybridtheory.oracle import Oracle
    from hybridtheory.vectors import add_, norm, scale

    begin = time.process_time()
    blocks = layer_blocks(p)
    rows = []
    oracle = Oracle(p.net, NextByte(), p.batches(1), blocks)
    gradient = oracle.gradient(*blocks)
    with oracle.products(*blocks) as hess:
        for b, g in zip(blocks, gradient):
            leaning = add_(scale(g, 1 / norm(g)), warm[b.name]) if b.name in warm else g
            run = spectrum(hess, b, SEED, index=index, warm=leaning, tol=TOLERANCE, min_steps=4)
            warm[b.name] = run.warm
            middle = time.process_time()
            found = traces(hess, [b], SEED, tol=TRACE_ERROR, max_vectors=most_vectors, index=index, beside=run)
            end = time.process_time()
            trace = found[b.name].trace
            sharp = trace.stderr <= TRACE_ERROR * abs(trace.value)
            resolved = run.lam_max.resolved and run.lam_min.resolved and trace.resolved
            ends, own = middle - begin, end - middle
            rows.append(
                Row(run.lam_max.value, run.lam_min.value, trace.value, ends, own, trace.n, trace.n, sharp, resolved)
            )
            begin = end
    return rows


MODULUS = {
    "PyHessian": pyhessian_modulus,
    "curvlinops": curvlinops_modulus,
    "hessian-eigenthings, power": eigenthings_power,
    "hessian-eigenthings, Lanczos": eigenthings_lanczos,
}
ROW = {"PyHessian": pyhessian_row, "curvlinops": curvlinops_row, "hessian-eigenthings, Lanczos": eigenthings_row}


def moduli(tool: str, p: Problem, budgets: list[Budget], batches: int = 1) -> list[float]:
    """|λ|max of every layer block."""
    if tool == "ours":
        return our_moduli(p, batches)
    return [MODULUS[tool](p, i, budgets[i], batches) for i in range(LAYERS)]
