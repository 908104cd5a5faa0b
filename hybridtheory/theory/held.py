"""Theorems held to a measured run: the averaged squared gradient beside each bound, with every hypothesis tested on that run.

A bound that a run violates while its hypotheses hold refutes the theorem or its constants, and the check fails. Where a hypothesis does
not hold nothing is decided (`holds` None), and the note says which one, by how much, and where on the run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hybridtheory.errors import UserError
from hybridtheory.theory import convergence
from hybridtheory.theory.checks import (
    Check,
    Hypothesis,
    OutsideTheorem,
    at_least,
    at_most,
    check_bound,
    count,
    nonnegative,
)
from hybridtheory.theory.convergence import Bound, PathwiseBound

Array = NDArray[np.float64]
THEOREMS = ("A0", "A", "C'", "D")
# An exact derivative is assumed by A0 and D; differences are taken for it up to this root-mean-square error, relative to ‖g_x‖.
EXACT = 0.01


@dataclass(frozen=True)
class Evidence:
    """A measured run (or several, that differ in their seeds) and its constants.

    eta_x, eta_y   constant rates; 0 for a block that does not move      d   parameters of the base
    A, B, C        ‖H_xx‖, ‖H_yy‖, ‖H_xy‖ over the measured points      L_x, L_y   diag(L_x I, L_y I) >= ±H there, from A, B and C
    trace_plus     tr(H_xx,+)         cross_sq   ‖H_xy‖_F²
    law_x, law_y   (L0, L1) of l(u) = L0 + L1 u for both blocks (C')
    Delta          f(w_0) - f*        loss, gx_sq, gy_sq   [runs, steps] at the start of every step (full batch)
    slope_sq       [runs, steps] mean squared measured slope, where the method has one
    sigma_x_sq, sigma_y_sq   [runs, steps] (1/n) Σ_i ‖∇_k f_i - ∇_k f‖², 0 for full-batch runs
    n              minibatches an epoch (1: all rows in each step); sampling "full", "iid", "reshuffle"
    secant         [runs, steps - 1] ‖Δg‖_{D^-1}/‖Δw‖_D between neighbouring steps: at most 1 where -D <= H <= D
    slope_error    root mean square of (difference of size mu - derivative)/‖g_x‖
    method         what moved the weights; sgd: whether its steps are those of the theorems (plain SGD, q Gaussian or sphere directions)
    """

    eta_x: float
    eta_y: float
    d: int
    A: float
    B: float
    C: float
    L_x: float
    L_y: float
    trace_plus: float
    cross_sq: float
    law_x: tuple[float, float]
    law_y: tuple[float, float]
    Delta: float
    loss: Array
    gx_sq: Array
    gy_sq: Array
    sigma_x_sq: Array
    sigma_y_sq: Array
    slope_sq: Array | None = None
    n: int = 1
    sampling: str = "full"
    secant: Array | None = None
    slope_error: float = 0.0
    mu: float = 0.0
    q: int = 1
    law: str = "gaussian"
    method: str = "hybrid"
    sgd: bool = True

    def __post_init__(self) -> None:
        """Refuse a record that cannot be one: constants that are negative or not numbers, arrays of different shapes."""
        nonnegative(
            "a measured run",
            eta_x=self.eta_x,
            eta_y=self.eta_y,
            L_x=self.L_x,
            L_y=self.L_y,
            A=self.A,
            B=self.B,
            C=self.C,
            mu=self.mu,
        )
        nonnegative("a measured run", trace_plus=self.trace_plus, cross_sq=self.cross_sq, slope_error=self.slope_error)
        nonnegative("a measured run", L0_x=self.law_x[0], L1_x=self.law_x[1], L0_y=self.law_y[0], L1_y=self.law_y[1])
        count("a measured run", d=self.d, n=self.n, q=self.q)
        shapes = {a.shape for a in (self.gx_sq, self.gy_sq, self.loss, self.sigma_x_sq, self.sigma_y_sq)}
        if len(shapes) != 1 or self.gx_sq.ndim != 2 or self.gx_sq.size == 0:
            raise UserError(
                f"a measured run needs loss, gradients and noise [runs, steps] of one shape, got {sorted(shapes)}"
            )

    @property
    def steps(self) -> int:
        return int(self.gx_sq.shape[1])

    def at(self, theorem: str) -> slice:
        """The steps that its average is over: D's are the starts of whole epochs."""
        if theorem == "D" and self.sampling == "reshuffle":
            return slice(0, self.steps // self.n * self.n, self.n)
        return slice(None)

    def averaged(self, c_x: float, c_y: float, at: slice = slice(None), x: Array | None = None) -> tuple[float, float]:
        """Mean over runs of (1/T) Σ_t c_x‖g_x‖² + c_y‖g_y‖², and its standard error over runs (0 for a single one)."""
        with np.errstate(over="ignore"):  # of a run that diverged: infinity is its average
            per_run = (c_x * (self.gx_sq if x is None else x) + c_y * self.gy_sq)[:, at].mean(1)
        if per_run.size < 2 or not np.isfinite(per_run).all():
            return float(per_run.mean()), 0.0
        return float(per_run.mean()), float(per_run.std(ddof=1)) / math.sqrt(per_run.size)


def hold(e: Evidence, theorem: str) -> list[Check]:
    """The checks of one theorem (C' states several). UserError for a theorem that is not among `THEOREMS`."""
    if theorem not in THEOREMS:
        raise UserError(f"there is no theorem {theorem!r} to hold a run to: choose from {', '.join(THEOREMS)}")
    tested = _common(e, theorem)
    try:
        bounds = _bounds(e, theorem)
    except OutsideTheorem as error:
        return [_undecided(e, theorem, (*tested, *error.hypotheses))]
    except UserError as error:
        return [_undecided(e, theorem, tested, str(error))]
    tested = (*tested, *(bounds[0].hypotheses))
    broken = failing(tested)
    found = []
    for bound in bounds:
        x = e.slope_sq if "D_t" in bound.quantity else None
        measured, stderr = e.averaged(*bound.weights, e.at(theorem), x)
        check = check_bound(f"{bound.theorem}: {bound.quantity}", measured, bound.value, stderr, tested)
        if x is not None:  # it holds on every run, not on average
            worst = float((bound.weights[0] * x + bound.weights[1] * e.gy_sq).mean(1).max())
            check = check_bound(check.claim, worst, bound.value, 0.0, tested)
        note = "" if "every run" in bound.theorem or len(e.gx_sq) > 1 else "one run: the bound is on the mean over runs"
        if note and check.holds is False and math.isfinite(measured):
            check = replace(check, holds=None)  # a mean over one run decides nothing
        found.append(_noted(check, broken, note))
    if theorem == "C'":
        found += [_noted(c, broken, "") for c in _pathwise(e, tested)]
    return found


def failing(hypotheses: Sequence[Hypothesis]) -> str:
    """The hypotheses that fail, with their numbers and by what factor."""
    out = []
    for h in hypotheses:
        if not h.holds:
            times = f", {h.factor:.3g} times off" if math.isfinite(h.factor) else ""
            out.append(f"{h.name} ({h.value:.4g} against {h.limit:.4g}{times})")
    return "; ".join(out)


def _noted(check: Check, broken: str, more: str) -> Check:
    note = f"does not hold here: {broken}" if broken else more
    return replace(check, holds=None if broken else check.holds, note=note)


def _undecided(e: Evidence, theorem: str, tested: tuple[Hypothesis, ...], reason: str = "") -> Check:
    measured, error = e.averaged(e.eta_x, e.eta_y)
    broken = failing(tested)
    note = reason or f"does not hold here: {broken}"
    if reason and broken:
        note += f"; nor holds: {broken}"
    return Check(
        f"Theorem {theorem}: mean of eta_x |g_x|^2 + eta_y |g_y|^2",
        measured,
        "<=",
        None,
        None,
        tested,
        None,
        note,
        error,
    )


def _yes(name: str, value: bool) -> Hypothesis:
    return at_least(name, float(value), 1.0)


def _common(e: Evidence, theorem: str) -> tuple[Hypothesis, ...]:
    """What the theorem assumes of the method and of the function between the measured points."""
    tested = [_yes(f"steps of plain SGD on both blocks (method {e.method})", e.sgd)]
    if e.eta_x > 0:
        wanted = "sphere" if theorem == "C'" else "gaussian"
        tested.append(_yes(f"{wanted} directions (law {e.law})", e.law == wanted))
        if theorem in ("A0", "D"):
            tested.append(at_most("slopes are derivatives: rms error over |g_x|", e.slope_error, EXACT))
        if theorem != "A0":
            tested.append(_yes("one query a step", e.q == 1))
    if theorem == "C'":
        tested.append(_yes("all rows in every step", e.n == 1))
    elif theorem == "D":
        tested.append(_yes("minibatches without replacement", e.n == 1 or e.sampling == "reshuffle"))
    else:
        tested.append(_yes("minibatches drawn independently", e.n == 1 or e.sampling == "iid"))
    if e.n > 1 and theorem in ("A", "D"):
        tested.append(_yes("L of single minibatches was measured", False))
    if e.secant is not None and e.secant.size:
        run, step = np.unravel_index(int(np.argmax(np.where(np.isfinite(e.secant), e.secant, np.inf))), e.secant.shape)
        tested.append(
            at_most(f"-D <= H <= D between steps (run {run}, step {step + 1})", float(e.secant[run, step]), 1.0)
        )
    return tuple(tested)


def _bounds(e: Evidence, theorem: str) -> list[Bound]:
    if theorem == "D" and e.steps < e.n:
        raise UserError(f"Theorem D speaks of whole epochs of {e.n} steps, the run has {e.steps}: run more steps")
    # averages over the steps that the theorem speaks of suffice
    sx, sy = (float(s[:, e.at(theorem)].mean(1).max()) for s in (e.sigma_x_sq, e.sigma_y_sq))
    # A block that does not move puts no condition on its constant: any positive number does.
    L_x, L_y = (L if eta > 0 else 1.0 for L, eta in ((e.L_x, e.eta_x), (e.L_y, e.eta_y)))
    shared = (e.eta_x, e.eta_y, L_x, L_y)
    if theorem == "A0":
        L_x, L_y, trace = split(e)
        return [convergence.theorem_a0(e.eta_x, e.eta_y, L_x, L_y, trace / L_x, e.Delta, e.steps, sx, sy, e.q)]
    if theorem == "A":
        return [convergence.theorem_a(*shared, e.d, e.Delta, e.steps, sx, sy, e.mu, L_x)]
    if theorem == "D":
        return [convergence.theorem_d(*shared, e.d, e.n, e.Delta, e.steps // e.n, sx, sy)]
    bound = _theorem_c(e)
    return [b for b in (bound.sure, bound.expected) if b is bound.expected or e.slope_sq is not None]


def split(e: Evidence) -> tuple[float, float, float]:
    """(L_x, L_y, tr M_x) of Theorem A0: of all L_y > B, each with M_x = H_xx,+ + H_xy (L_y I - H_yy)^-1 H_yx, the one that leaves both
    rates the most room below the theorem's limits. Without coupling they are A, B and tr(H_xx,+). Ours (Schur complement)."""
    if e.eta_x == 0 or e.eta_y == 0 or e.C == 0:
        return (e.A if e.eta_x > 0 else 1.0), (e.B if e.eta_y > 0 else 1.0), e.trace_plus if e.eta_x > 0 else 1.0
    room = np.geomspace(1e-3, 1e4, 400) * max(e.B, e.C)  # L_y - B
    L_x, L_y, trace = e.A + e.C**2 / room, e.B + room, e.trace_plus + e.cross_sq / room
    used = np.maximum(e.eta_x * (trace + (e.q + 1) * L_x) / e.q, e.eta_y * L_y)
    best = int(np.argmin(used))
    return float(L_x[best]), float(L_y[best]), float(trace[best])


def _theorem_c(e: Evidence) -> PathwiseBound:
    def affine(law: tuple[float, float]) -> Callable[[float], float]:
        return lambda u: law[0] + law[1] * u

    return convergence.theorem_c(e.eta_x, e.eta_y, affine(e.law_x), affine(e.law_y), e.d, e.Delta, e.steps, e.mu)


def _pathwise(e: Evidence, tested: tuple[Hypothesis, ...]) -> list[Check]:
    """Theorem C' surely: how far the loss and the gradient get on any run."""
    bound = _theorem_c(e)
    top = float(np.sqrt(e.gx_sq + e.gy_sq).max())
    climbed = float((e.loss - e.loss[:, :1]).max()) + e.Delta
    return [
        check_bound("Theorem C' (every run): largest f - f*", climbed, bound.loss_gap, 0.0, tested),
        check_bound("Theorem C' (every run): largest |g|", top, bound.gradient, 0.0, tested),
    ]


def evidence(constants: Mapping[str, Any], runs: Sequence[Mapping[str, Any]]) -> Evidence:
    """The records "constants" and "trajectory" of a convergence probe (as mappings) -> Evidence.

    A run that ended early is filled up with infinite gradients: it went where no bound of an average can hold.
    """
    if not runs:
        raise UserError(
            "the records hold no run (no line of kind 'trajectory'): let probe-convergence finish its first run"
        )
    steps = max(len(r["loss"]) + (r["status"] != "finished") for r in runs)
    whole = all(r["status"] == "finished" for r in runs)

    def rows(values: Callable[[Mapping[str, Any]], Sequence[float] | None], fill: float = math.inf) -> Array:
        out = np.full((len(runs), steps), fill)
        for row, r in zip(out, runs, strict=True):
            found = values(r)
            row[: len(r["loss"])] = 0.0 if found is None else [float(v) for v in found]
        return out

    def number(name: str) -> float:
        return float(constants[name])

    L = {g: float(constants["L"].get(g, 0.0)) for g in ("base", "peft")}
    norms = {g: float(constants["norms"].get(g, 0.0)) for g in ("base", "peft", "coupling")}
    law = {g: tuple(float(v) for v in constants["laws"].get(g, (0.0, 0.0))) for g in ("base", "peft")}
    eta = {g: float(constants["eta"].get(g, 0.0)) for g in ("base", "peft")}
    secant = None
    if whole and all(L[g] > 0 for g in runs[0]["moved"]):
        squares = [
            [sum(np.asarray(r[name][g], float) * L[g] ** power for g in r["moved"]) for r in runs]
            for name, power in (("turned", -1), ("moved", 1))
        ]
        turned, moved = np.array(squares[0], float), np.array(squares[1], float)
        secant = np.sqrt(np.divide(turned, moved, out=np.zeros_like(turned), where=moved > 0))
    slopes = rows(lambda r: r["slope_sq"]) if all(r["slope_sq"] for r in runs) else None
    return Evidence(
        eta_x=eta["base"], eta_y=eta["peft"], d=int(constants["d"].get("base", 1)), A=norms["base"], B=norms["peft"],
        C=norms["coupling"], L_x=L["base"], L_y=L["peft"], trace_plus=number("trace_plus"), cross_sq=number("cross_sq"),
        law_x=(law["base"][0], law["base"][1]), law_y=(law["peft"][0], law["peft"][1]), Delta=number("Delta"),
        loss=rows(lambda r: r["loss"]), gx_sq=rows(lambda r: r["grad_sq"].get("base")), gy_sq=rows(lambda r: r["grad_sq"].get("peft")),
        sigma_x_sq=rows(lambda r: r["noise"].get("base"), 0.0), sigma_y_sq=rows(lambda r: r["noise"].get("peft"), 0.0), slope_sq=slopes,
        n=int(constants["n"]), sampling=str(constants["sampling"]), secant=secant, slope_error=number("slope_error"), mu=number("mu"),
        q=int(constants["q"]), law=str(constants["law"]), method=str(constants["method"]), sgd=bool(constants["sgd"]),
    )  # fmt: skip
