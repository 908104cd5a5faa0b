"""What probe-smoothness writes down; see `probes.records` for the rules that all records follow."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from hybridtheory.estimate import Estimate
from hybridtheory.theory.checks import Hypothesis
from probes.records_parts import VOLATILE, Interval


@dataclass(frozen=True)
class Density:
    """Spectral density by stochastic Lanczos quadrature: eigenvalue nodes, weights that sum to 1."""

    nodes: list[float]
    weights: list[float]
    n: int = 0


@dataclass(frozen=True)
class AtScale:
    """Curvature that a zeroth-order step of size mu sees, beside the infinitesimal one: same names as in BlockPoint."""

    mu: float
    estimates: dict[str, Estimate]


@dataclass(frozen=True)
class BlockPoint:
    """One block at one point. gHg is g'Hg/|g|^2; noise is the per-row gradient variance (1/n) sum |g_i - g|^2 of the
    block; rows_stderr is the error of the trace from the choice of rows, by a jackknife over micro-batches.
    """

    grad_norm: float
    lam_max: Estimate | None = None
    lam_min: Estimate | None = None
    trace: Estimate | None = None
    trace_plus: Estimate | None = None
    trace_sq: Estimate | None = None
    effective_rank: Estimate | None = None
    density: Density | None = None
    gHg: Estimate | None = None
    at_scale: AtScale | None = None
    noise: Estimate | None = None
    rows_stderr: float | None = None


@dataclass(frozen=True)
class Phi:
    """phi(delta) = E_u f(w + delta u) - f(w) over the same n antithetic directions at every delta.

    trace is the T of the fit phi = T delta^2/2, made on delta <= fit_up_to.
    """

    delta: list[float]
    mean: list[float]
    stderr: list[float]
    n: int
    trace: Estimate | None = None
    fit_up_to: float | None = None


@dataclass(frozen=True)
class FiniteScale:
    """Mean one-step loss change E_u[f(w - eta c u) - f(w)] with c = D_u f, on a grid of eta with paired c and u.

    slopes_rms is sqrt(mean c^2) over the n directions; at_edge says that eta_star is an end of the grid, so the
    minimum may lie beyond.
    """

    eta: list[float]
    change: list[float]
    stderr: list[float]
    eta_star: float
    interval: Interval | None
    slopes_rms: float
    n: int
    at_edge: bool = False
    note: str = ""


@dataclass(frozen=True)
class Point:
    """A full measurement at one point of the reference run. grad_norm is that of the full gradient.

    coupling is |H_xy|_2 between base and PEFT; margin is lambda_max(D^-1/2 H D^-1/2), at most 1 where the joint
    condition holds.
    """

    index: int
    step: int
    loss: float
    grad_norm: float
    blocks: dict[str, BlockPoint]
    coupling: Estimate | None = None
    margin: Estimate | None = None
    phi: dict[str, Phi] = field(default_factory=dict)
    finite_scale: dict[str, FiniteScale] = field(default_factory=dict)
    seconds: float = field(default=0.0, metadata=VOLATILE)


@dataclass(frozen=True)
class Secant:
    """|g(w+h) - g(w)|/|h| on the same rows at both ends. L: of the full gradient; L_block: of this block's gradient
    when h moves this block.

    move says what h was: the run's own move since the last secant (block "all"), a step along the block's gradient, a
    random direction in the block, or both groups at once. Norms are those at the base end w.
    """

    step: int
    block: str
    move: Literal["trajectory", "gradient", "random", "joint"]
    grad_norm: float
    block_grad_norm: float
    radius: float
    L: float | None
    L_block: float | None
    point: int | None = None


@dataclass(frozen=True)
class TrainStep:
    """One step of the reference run, counted from 1: loss after it and rate per group; a rejected step was taken back
    and a rate halved.
    """

    step: int
    loss: float
    eta: dict[str, float]
    grad_norm: dict[str, float] = field(default_factory=dict)
    accepted: bool = True
    note: str = ""


@dataclass(frozen=True)
class Fit:
    """L(u) <= L0 + L1 u over u = the gradient norm; argument "block" is the stronger hypothesis with the block's own
    norm.

    span is max u / min u of the n points; below a factor 3 L1 is not identified.
    """

    block: str
    data: Literal["spectral", "secant"]
    method: Literal["envelope", "quantile"]
    argument: Literal["full", "block"]
    L0: float
    L1: float
    n: int
    span: float
    identified: bool
    L0_interval: Interval | None = None
    L1_interval: Interval | None = None
    violation_rate: float | None = None
    violation_interval: Interval | None = None
    confidence: float = 0.95
    note: str = ""


@dataclass(frozen=True)
class Rate:
    """A learning rate (or a ratio of two) as a rule gives it; value None means that the rule cannot give one, and
    note says why.

    covers names what the interval covers (probe vectors, points, rows); uses names the end and the trace of the
    spectrum that went in.
    """

    value: float | None
    interval: Interval | None = None
    covers: str = ""
    formula: str = ""
    theorem: str = ""
    uses: str = ""
    hypotheses: tuple[Hypothesis, ...] = ()
    note: str = ""


@dataclass(frozen=True)
class Rates:
    """What one rule recommends, at the first point or as the envelope over the run (curvature grows along it)."""

    rule: Literal["worst_case", "measured", "noise_limited", "finite_scale", "tail"]
    where: Literal["first", "envelope"]
    base: Rate | None
    peft: Rate | None
    ratio: Rate | None
    note: str = ""


@dataclass(frozen=True)
class Recommendation:
    """What trainer.toml carries; bound_by names the rule that bound each of base, peft, ratio; settings are what the
    rates assume.
    """

    base: Rate | None
    peft: Rate | None
    ratio: Rate | None
    bound_by: dict[str, str]
    settings: dict[str, Any]
