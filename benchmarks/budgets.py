"""What the public tools are told beforehand: the least work with which their answers are right to 1 %.

A power iteration, a Lanczos run and ARPACK from one start vector all stay in the Krylov space of that vector. So one Lanczos run of ours
a block (full reorthogonalisation in float64), continued until its ends stand still, tells how many steps each of them will need: they are
replayed on the small tridiagonal matrix. What the tools then really do is measured, and the error that they end with is printed.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import torch
from problem import CACHE, LAYERS, Problem, Truth, hessian_product, sweep
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh
from torch import Tensor, nn

TOLERANCE = 0.01  # relative error of an eigenvalue
TRACE_ERROR = 0.1  # relative standard error of a trace
MOST_VECTORS = 128  # a trace near zero never has a relative error of 10 %: everybody stops here
SEED = 3
KRYLOV = 48  # products of the run that the budgets are read from
MOST_STEPS = 1000

Setting = tuple[int | None, float]  # ncv and tol of eigsh


@dataclass(frozen=True)
class Budget:
    """For one block at one point, from the start vector that every public tool gets (``start_vector``)."""

    power: int  # iterations for the eigenvalue of largest modulus
    shifted: int  # iterations on H minus that eigenvalue, for the other end
    lanczos: int  # steps for the modulus; of all blocks of the point, since a caller sets one number
    lanczos_both: int
    arpack: Setting  # the cheapest setting with which all blocks of the point are right
    arpack_both: Setting
    vectors: int  # Hutchinson's, for a standard error of 10 %


def start_vector(parameters: list[nn.Parameter]) -> Tensor:
    """(d,): what PyHessian draws after ``torch.manual_seed(SEED)``."""
    torch.manual_seed(SEED)
    return torch.cat([torch.randn(x.shape).reshape(-1) for x in parameters])


def budgets(p: Problem, point: int, truths: list[Truth]) -> list[Budget]:
    """One per layer block; computed once and kept."""
    kept = CACHE / f"budgets-{point}.pt"
    if not kept.exists():
        p.go(point)
        runs = [krylov(p, layer) for layer in range(LAYERS)]
        torch.save([vars(b) for b in read(runs, truths)], kept)
    return [Budget(**b) for b in torch.load(kept)]


def krylov(p: Problem, layer: int) -> np.ndarray:
    """(KRYLOV, KRYLOV) tridiagonal matrix of a Lanczos run from the common start."""
    parameters = p.layer(layer)
    product, start = hessian_product(p, parameters), start_vector(parameters).double()
    *_, (_, _, _, matrix) = sweep(product, start, KRYLOV)
    return matrix


def read(runs: list[np.ndarray], truths: list[Truth]) -> list[Budget]:
    steps = [lanczos_steps(run, t) for run, t in zip(runs, truths)]
    modulus = arpack_setting(runs, "LM", [[t.dominant] for t in truths])
    both = arpack_setting(runs, "BE", [[t.lam_min, t.lam_max] for t in truths])
    return [
        Budget(
            power=power_steps(run, t.dominant, 0.0),
            shifted=power_steps(run, t.other, t.dominant),
            lanczos=max(first for first, _ in steps),
            lanczos_both=max(last for _, last in steps),
            arpack=modulus,
            arpack_both=both,
            vectors=min(t.vectors(TRACE_ERROR), MOST_VECTORS),
        )
        for run, t in zip(runs, truths)
    ]


def right(value: float, exact: float) -> bool:
    return abs(value - exact) <= TOLERANCE * abs(exact)


def power_steps(run: np.ndarray, exact: float, shift: float) -> int:
    """Iterations on H − shift until the Rayleigh quotient is right and stays so for three steps."""
    theta, s = np.linalg.eigh(run)
    theta = theta - shift
    weights = s[0] ** 2
    good = 0
    for k in range(1, MOST_STEPS + 1):
        value = float(weights @ theta) / float(weights.sum()) + shift
        good = good + 1 if right(value, exact) else 0
        if good == 3:
            return k - 2
        weights = weights * (theta / np.abs(theta).max()) ** 2
    return MOST_STEPS


def lanczos_steps(run: np.ndarray, t: Truth) -> tuple[int, int]:
    """Steps until |λ|max is right, and until both ends are."""
    modulus = 0
    for k in range(1, len(run) + 1):
        theta = np.linalg.eigvalsh(run[:k, :k])
        if not modulus and right(float(np.abs(theta).max()), t.modulus):
            modulus = k
        if right(float(theta[0]), t.lam_min) and right(float(theta[-1]), t.lam_max):
            return modulus, k
    raise SystemExit(f"{len(run)} Lanczos steps do not reach 1 % of both ends: raise KRYLOV in budgets.py")


def arpack_setting(runs: list[np.ndarray], which: str, exact: list[list[float]]) -> Setting:
    """Of ncv 8 and SciPy's default, each at the loosest tolerance with which every block is right: the one with fewest products."""
    best: tuple[int, Setting] | None = None
    for ncv in (8, None):
        for tol in (0.1, 0.03, 0.01, 1e-3, 1e-4):
            results = [replayed(run, which, len(values), ncv, tol) for run, values in zip(runs, exact)]
            if all(
                len(found) == len(values) and all(right(a, b) for a, b in zip(sorted(found), sorted(values)))
                for (found, _), values in zip(results, exact)
            ):
                count = sum(n for _, n in results)
                if best is None or count < best[0]:
                    best = count, (ncv, tol)
                break
    if best is None:
        raise SystemExit(f"eigsh (which={which}) never came within 1 % of {exact}")
    return best[1]


def replayed(run: np.ndarray, which: str, k: int, ncv: int | None, tol: float) -> tuple[list[float], int]:
    """eigsh on the tridiagonal matrix from its first unit vector: (eigenvalues, products)."""
    count = 0

    def matvec(x: np.ndarray) -> np.ndarray:
        nonlocal count
        count += 1
        return run @ x.reshape(-1)

    operator = LinearOperator(run.shape, matvec=matvec, dtype=np.float64)
    return arpack(operator, which, k, ncv, tol, np.eye(len(run))[0]), count


def arpack(operator: LinearOperator, which: str, k: int, ncv: int | None, tol: float, start: np.ndarray) -> list[float]:
    try:
        found = eigsh(operator, k=k, which=which, ncv=ncv, tol=tol, v0=start, maxiter=60, return_eigenvectors=False)
    except ArpackNoConvergence as error:
        warnings.warn("eigsh stopped before it converged", stacklevel=2)
        found = error.eigenvalues
    return [float(x) for x in found]
