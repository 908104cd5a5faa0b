"""Four tools, one interface: |λ|max of one layer block, and the whole row (both ends, trace) of all layer blocks at the points of a run.

The public tools get what their authors offer and the best of it: only the block's parameters, their own graph reuse, their own solvers,
and settings that were looked up beforehand from the converged answers (``Budget``): the cheapest with which they are right. Our side
gets none of that: it has to decide by itself when to stop.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from problem import CACHE, LAYERS, Problem, Truth, hessian_product, sweep
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh
from torch import Tensor, nn

TOLERANCE = 0.01  # relative error of an eigenvalue
TRACE_ERROR = 0.1  # relative standard error of a trace
MOST_VECTORS = 128  # a trace near zero never has a relative error of 10 %: everybody stops here
SEED = 3


@dataclass(frozen=True)
class Budget:
    """The cheapest settings with which one public tool's answers for one block are right."""

    first: Any  # for |λ|max. PyHessian: iterations; hessian-eigenthings: Lanczos steps; curvlinops: (ncv, tol) of eigsh
    rest: Any = None  # for both ends, in the same units. PyHessian: iterations of the second, shifted run
    vectors: int = 0  # Hutchinson's, for a standard error of 10 %


@dataclass(frozen=True)
class Row:
    lam_max: float
    lam_min: float
    trace: float


# --- budgets ----------------------------------------------------------------------------------------------------------


def budget(tool: str, p: Problem, layer: int, t: Truth, row: bool) -> Budget:
    """Found with the reference's own products (the same numbers, cheaper), the tool's own start vector and its own rule.

    ``row``: for both ends and the trace; otherwise for |λ|max alone.
    """
    parameters = p.layer(layer)
    product = hessian_product(p, parameters)
    d = sum(x.numel() for x in parameters)
    other = t.lam_min if abs(t.lam_max) >= abs(t.lam_min) else t.lam_max
    dominant = t.lam_max + t.lam_min - other
    vectors = min(t.vectors(TRACE_ERROR), MOST_VECTORS)
    if tool == "PyHessian":
        first = power_steps(product, parameters, dominant, 0.0)
        return Budget(first, power_steps(product, parameters, other, dominant) if row else None, vectors)
    if tool == "curvlinops":
        if row:
            return Budget(None, arpack_settings(product, d, "BE", [t.lam_min, t.lam_max]), vectors)
        return Budget(arpack_settings(product, d, "LM", [dominant]))
    start = torch.randn(d, generator=torch.Generator().manual_seed(SEED))
    first, both = lanczos_steps(product, start, t)
    return Budget(first, both, vectors)


def budgets_of(tool: str, p: Problem, point: int, truths: list[Truth], row: bool) -> list[Budget]:
    """One per layer; computed once and kept."""
    kept = CACHE / f"budget-{tool}-{point}-{'row' if row else 'modulus'}.pt"
    if not kept.exists():
        p.go(point)
        torch.save([vars(budget(tool, p, i, t, row)) for i, t in enumerate(truths)], kept)
    return one_setting(tool, [Budget(**b) for b in torch.load(kept)])


def one_setting(tool: str, found: list[Budget]) -> list[Budget]:
    """A caller sets eigsh's tolerance or a number of Lanczos steps for the run, not for a block that is not yet known: the cheapest
    setting with which *every* block is right. PyHessian, whose own rule adapts to the block, keeps its number for each.
    """
    if tool == "PyHessian":
        return found

    def strictest(settings: list[Any]) -> Any:
        if any(s is None for s in settings):
            return None
        return max(settings) if tool == "hessian-eigenthings" else min(settings, key=lambda s: s[1])

    first, rest = strictest([b.first for b in found]), strictest([b.rest for b in found])
    return [Budget(first, rest, b.vectors) for b in found]


def right(value: float, exact: float) -> bool:
    return abs(value - exact) <= TOLERANCE * abs(exact)


def power_steps(product, parameters: list[nn.Parameter], exact: float, shift: float, most: int = 400) -> int:
    """PyHessian's iteration on H − shift from its start vector, until its Rayleigh quotient is right and stays so for three steps."""
    torch.manual_seed(SEED)
    v = torch.cat([torch.randn(x.shape).reshape(-1) for x in parameters])
    v /= v.norm()
    good = 0
    for k in range(1, most + 1):
        w = product(v) - shift * v
        good = good + 1 if right(float(v.double() @ w.double()) + shift, exact) else 0
        if good == 3:
            return k - 2
        v = w / w.norm()
    return most


def lanczos_steps(product, start: Tensor, t: Truth, most: int = 150) -> tuple[int, int]:
    modulus = 0
    for k, (low, high, _) in enumerate(sweep(product, start.double(), most), 1):
        if not modulus and right(max(abs(low), abs(high)), t.modulus):
            modulus = k
        if right(low, t.lam_min) and right(high, t.lam_max):
            return modulus, k
    return modulus or most, most


def arpack_settings(product, d: int, which: str, exact: list[float]) -> tuple[int | None, float]:
    """Best of ncv 8 and SciPy's default, at the loosest tolerance that is right; fewest products wins."""
    best: tuple[int, tuple[int | None, float]] | None = None
    for ncv in (8, None):
        for tol in (0.1, 0.01, 1e-3):
            count = 0

            def matvec(x: np.ndarray) -> np.ndarray:
                nonlocal count
                count += 1
                return product(torch.from_numpy(x.reshape(-1)).float()).numpy()

            operator = LinearOperator((d, d), matvec=matvec, dtype=np.float32)
            found = arpack(operator, which, len(exact), ncv, tol)
            if len(found) == len(exact) and all(right(a, b) for a, b in zip(sorted(found), sorted(exact))):
                if best is None or count < best[0]:
                    best = count, (ncv, tol)
                break
    if best is None:
        raise SystemExit(f"eigsh (which={which}) never came within 1 % of {exact}")
    return best[1]


def arpack(operator: LinearOperator, which: str, k: int, ncv: int | None, tol: float) -> list[float]:
    start = np.random.default_rng(SEED).standard_normal(operator.shape[0]).astype(np.float32)
    try:
        found = eigsh(operator, k=k, which=which, ncv=ncv, tol=tol, v0=start, maxiter=60, return_eigenvectors=False)
    except ArpackNoConvergence as error:
        found = error.eigenvalues
    return [float(x) for x in found]


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

    if batches == 1:
        return tool.hessian(p.net, criterion, data=(p.ids, p.targets), cuda=False)
    return tool.hessian(p.net, criterion, dataloader=p.batches(batches), cuda=False)


def pyhessian_modulus(p: Problem, layer: int, b: Budget, batches: int = 1) -> float:
    with only(p, layer):
        torch.manual_seed(SEED)
        return pyhessian(p, batches).eigenvalues(maxIter=b.first, tol=0.0)[0][0]


def pyhessian_row(p: Problem, layer: int, b: Budget, batches: int = 1) -> Row:
    with only(p, layer):
        torch.manual_seed(SEED)
        tool = pyhessian(p, batches)
        dominant = tool.eigenvalues(maxIter=b.first, tol=0.0)[0][0]
        trace = float(np.mean(tool.trace(maxIter=b.vectors, tol=0.0)))
        torch.manual_seed(SEED)
        shifted = pyhessian(p, batches, dominant, p.layer(layer))
        other = shifted.eigenvalues(maxIter=b.rest, tol=0.0)[0][0] + dominant
    return Row(max(dominant, other), min(dominant, other), trace)


def curvlinops(p: Problem, layer: int, batches: int = 1):
    from curvlinops import HessianLinearOperator

    return HessianLinearOperator(
        p.net, nn.CrossEntropyLoss(), p.layer(layer), p.batches(batches), check_deterministic=False
    )


def curvlinops_modulus(p: Problem, layer: int, b: Budget, batches: int = 1) -> float:
    operator = curvlinops(p, layer, batches).to_scipy(np.float32)
    return arpack(operator, "LM", 1, *b.first)[0]


def curvlinops_row(p: Problem, layer: int, b: Budget, batches: int = 1) -> Row:
    from curvlinops import hutchinson_trace

    operator = curvlinops(p, layer, batches)
    low, high = sorted(arpack(operator.to_scipy(np.float32), "BE", 2, *b.rest))
    torch.manual_seed(SEED)
    # All columns at once would be vectorised over tens of vectors: slower on a CPU, and gigabytes. Four at a time is its best.
    sizes = [4] * (b.vectors // 4) + ([b.vectors % 4] if b.vectors % 4 else [])
    total = sum(n * float(hutchinson_trace(operator, n)) for n in sizes)
    return Row(high, low, total / b.vectors)


def eigenthings(p: Problem, layer: int, batches: int = 1):
    from hessian_eigenthings import HessianOperator, supervised_loss

    wanted = {id(x) for x in p.layer(layer)}
    return HessianOperator(
        p.net,
        p.batches(batches),
        supervised_loss(nn.functional.cross_entropy),
        param_filter=lambda name, x: id(x) in wanted,
    )


def eigenthings_modulus(p: Problem, layer: int, b: Budget, batches: int = 1) -> float:
    from hessian_eigenthings import lanczos

    with only(p, layer):
        return float(lanczos(eigenthings(p, layer, batches), k=1, max_iter=max(2, b.first), seed=SEED).eigenvalues[0])


def eigenthings_row(p: Problem, layer: int, b: Budget, batches: int = 1) -> Row:
    from hessian_eigenthings import hutchinson, lanczos_tridiagonal

    with only(p, layer):
        operator = eigenthings(p, layer, batches)
        start = torch.randn(operator.size, generator=torch.Generator().manual_seed(SEED))
        run = lanczos_tridiagonal(operator, start, b.rest, reorthogonalize=True)
        t = torch.diag(run.alphas) + torch.diag(run.betas, 1) + torch.diag(run.betas, -1)
        values = torch.linalg.eigvalsh(t.double())
        trace = hutchinson(operator, num_samples=b.vectors, seed=SEED).estimate
    return Row(float(values[-1]), float(values[0]), trace)


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


def our_moduli(p: Problem, batches: int = 1) -> list[float]:
    """|λ|max of every layer block."""
    from hybridtheory.curvature import spectrum
    from hybridtheory.oracle import Oracle

    blocks = layer_blocks(p)
    with Oracle(p.net, NextByte(), p.batches(batches), blocks).products(*blocks) as hess:
        runs = [spectrum(hess, b, SEED, tol=TOLERANCE, ends=("modulus",)) for b in blocks]
    return [max(r.lam_max.value, r.lam_min.value, key=abs) for r in runs]


def our_rows(p: Problem, points: list[int], batches: int = 1) -> list[list[Row]]:
    """Rows of all layer blocks at points of a trajectory: each point starts from the end vectors of the one before."""
    from hybridtheory.curvature import spectrum, traces
    from hybridtheory.oracle import Oracle

    blocks = layer_blocks(p)
    oracle = Oracle(p.net, NextByte(), p.batches(batches), blocks)
    warm: dict[str, list[Tensor] | None] = {b.name: None for b in blocks}
    result = []
    for index, point in enumerate(points):
        p.go(point)
        rows = []
        with oracle.products(*blocks) as hess:
            found = traces(hess, blocks, SEED, tol=TRACE_ERROR, index=index)
            for b in blocks:
                run = spectrum(hess, b, SEED, index=index, warm=warm[b.name], tol=TOLERANCE)
                warm[b.name] = run.warm
                rows.append(Row(run.lam_max.value, run.lam_min.value, found[b.name].trace.value))
        result.append(rows)
    return result


MODULUS = {"PyHessian": pyhessian_modulus, "curvlinops": curvlinops_modulus, "hessian-eigenthings": eigenthings_modulus}
ROW = {"PyHessian": pyhessian_row, "curvlinops": curvlinops_row, "hessian-eigenthings": eigenthings_row}


def moduli(tool: str, p: Problem, budgets: list[Budget], batches: int = 1) -> list[float]:
    """|λ|max of every layer block."""
    if tool == "ours":
        return our_moduli(p, batches)
    return [MODULUS[tool](p, i, budgets[i], batches) for i in range(LAYERS)]
