"""What a probe writes down: one frozen dataclass per kind of line of a JSON-lines file.

A record is what was measured or derived, with its evidence; nothing is drawn or printed from anywhere else, so a
figure rebuilds on a laptop from a cluster's run. Reading is strict: a line with an unknown kind, an unknown or
missing field, or a value of the wrong type is refused with the file and the line, because a silently skipped field is
a wrong figure later.

JSON has no infinity and no nan; a measurement has (a diverged loss is `inf`). A float that is not finite is written
as one of the strings "nan", "inf", "-inf" and read back as that float. `None` means "was not measured" and nothing
else.

Fields whose metadata say volatile (time, host, argv, commit) may differ between two runs of the same measurement;
`jsonl.stable` leaves them out, so that two runs can be compared. docs/records.md documents every kind for readers in
other languages.
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field
from typing import Any, Literal

from hybridtheory.estimate import Estimate, Finding
from hybridtheory.theory.checks import Hypothesis
from probes.records_captured import Captured
from probes.records_convergence import Checked, Constants, Descent, Exponent, Nearby, Trajectory
from probes.records_cost import StepMemory, StepTime
from probes.records_sweep import Cell, Predictions, SweepTask

SCHEMA = 0
Interval = tuple[float, float]


def volatile(default: Any = MISSING) -> Any:
    """A field that may differ between two runs of the same measurement."""
    return field(default=default, metadata={"volatile": True})


# ---- parts of records ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelInfo:
    """name as the user gave it; sha256 of the weights; parameters counts tied weights once."""

    name: str
    sha256: str
    parameters: int
    architecture: str = ""
    dtype: str = ""
    info: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class DataInfo:
    """rows and tokens (weighted positions of the loss) that the measurement used; truncated counts rows cut at the
    context length.
    """

    name: str
    sha256: str
    rows: int = 0
    tokens: float = 0.0
    truncated: int = 0
    loss: str = ""
    info: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PeftInfo:
    """scale is alpha/r where the type has one: PEFT constants are not invariant to it, so it stands beside each of
    them.
    """

    type: str
    rank: int | None = None
    alpha: float | None = None
    scale: float | None = None
    init: str = ""
    info: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class BlockInfo:
    """d parameters that share one smoothness constant; group is "base" or "peft"."""

    name: str
    group: str
    d: int
    info: dict[str, Any] = field(default_factory=dict)


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
class Compared:
    """A measured mean with its standard error beside what a closed form says; predicted None: none is known.

    formula says which one, and what it assumes. Relative to the true gradient where the quantity has its units.
    """

    value: float
    stderr: float | None = None
    predicted: float | None = None
    formula: str = ""


@dataclass(frozen=True)
class Cosines:
    """Histogram of the cosine of an estimate and a target: "gradient", or "projection", the gradient inside the law's subspace.

    alpha, beta: of the Beta law of the squared cosine, exact or (exact False) of the dimension that the law's covariance
    amounts to; ks_p: p-value of a Kolmogorov-Smirnov test against an exact one.
    """

    target: Literal["gradient", "projection"]
    edges: list[float]
    counts: list[int]
    alpha: float | None = None
    beta: float | None = None
    exact: bool = True
    ks_p: float | None = None


@dataclass(frozen=True)
class PublishedMu:
    """A published default of mu: squared error that a finite mu adds there, over |g|^2, and whether it is in the flat range."""

    name: str
    mu: float
    added: float
    flat: bool


# ---- kinds of lines --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Header:
    """First line of every file: all that is needed to repeat the measurement."""

    probe: str
    seed: int
    model: ModelInfo
    data: DataInfo
    blocks: list[BlockInfo]
    peft: PeftInfo | None = None
    options: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    threads: int = 1
    processes: int = 1
    git: str | None = volatile(None)
    argv: list[str] = field(default_factory=list, metadata={"volatile": True})
    host: str = volatile("")
    started: str = volatile("")
    schema: int = SCHEMA


@dataclass(frozen=True)
class Preflight:
    """Whether second derivatives of this model can be trusted. "kinked": they exist almost everywhere and miss the
    kinks (ReLU).
    """

    verdict: Literal["ok", "kinked", "refused"]
    checks: list[Finding]
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
    seconds: float = volatile(0.0)


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


@dataclass(frozen=True)
class Estimator:
    """One law on one block against the exact gradient g as mu -> 0: n independent estimates of q queries each.

    quantities: second_moment, variance, mse (over |g|^2), cosine, cosine_sq and, for laws with a subspace, captured =
    |P'g|^2/|g|^2, cosine_projected, cosine_sq_projected. bias: <E ghat - g, v>/|g| along unit vectors v (g, Hg, r0 .. r7), and
    norm_sq = |E ghat - g|^2/|g|^2. floor: norm of the mean of n estimates' error, over |g|, were there no bias at all.
    reached: the second moment's relative standard error is at most precision. subspace: dimensions that u lives in.
    """

    law: str
    block: str
    group: str
    d: int
    q: int
    n: int
    grad_norm: float
    quantities: dict[str, Compared]
    bias: dict[str, Compared]
    floor: float
    precision: float
    reached: bool
    subspace: float | None = None
    kept: bool = False
    cosines: list[Cosines] = field(default_factory=list)
    note: str = ""


@dataclass(frozen=True)
class Budget:
    """Where the squared error of one Gaussian estimate (q = 1, central difference) comes from; everything over |g|^2.

    direction = d + 1 and minibatch = (d + 2) sigma^2/(rows |g|^2) do not depend on mu. On the same n directions at every mu:
    added = d E(slope - <g,u>)^2, weights = d E<g, realised u - u>^2 (rounding of the weights), absorbed = share of the weights
    that do not move. truncation and loss_rounding are the coefficients of the fit added - weights = truncation mu^4 +
    loss_rounding/mu^2; loss_noise is the standard deviation of one loss that the latter means.
    recommended: where their sum is least; flat: where it adds at most 5 % to direction + minibatch.
    """

    block: str
    group: str
    d: int
    dtype: str
    rows: int
    n: int
    grad_norm: float
    direction: float
    minibatch: float
    noise: Estimate | None
    mu: list[float]
    added: list[float]
    stderr: list[float]
    weights: list[float]
    absorbed: list[float]
    truncation: float | None
    loss_rounding: float | None
    loss_noise: float | None
    recommended: float | None
    flat: Interval | None
    published: list[PublishedMu]
    note: str = ""


@dataclass(frozen=True)
class Allocation:
    """What to do with twice the forward passes, from batches of `rows` rows and q queries: the squared error's factor under each.

    Two steps at the old rate average two estimates: exactly 1/2. critical_rows = sigma^2/|g|^2: rows beyond it bring nothing, since the
    minibatch's part of the error is then below the directions'. errors: the squared error over |g|^2 of (rows, queries).
    """

    block: str
    group: str
    rows: int
    q: int
    more_rows: float
    more_queries: float
    more_steps: float
    critical_rows: Estimate
    errors: list[tuple[int, int, float]]
    note: str = ""


@dataclass(frozen=True)
class Epoch:
    """A pass over the training rows starts, in this order of their indices; i.i.d. sampling has none."""

    epoch: int
    order: list[int]


@dataclass(frozen=True)
class Step:
    """Training step number `step` (from 1): the minibatch's loss where it started, and what was paid since the start of the run.

    slopes, with the seed in the header, are the zeroth-order gradient; tokens counts those of the minibatches, once each; extra holds
    what a method reports of itself (the penalty gap of the bilevel method).
    """

    step: int
    loss: float
    lr: dict[str, float]
    slopes: list[float]
    forwards: int
    backwards: int
    tokens: int
    extra: dict[str, float] = field(default_factory=dict)
    seconds: float = volatile(0.0)


@dataclass(frozen=True)
class Evaluation:
    """Rows that were not trained on, scored after `step` steps; floor is the accuracy of the majority label.

    Intervals cover the choice of rows (95 %; Wilson for accuracy, bootstrap for the others). f1 is the macro F1. calibration "batch":
    calibrated_ numbers are after batch calibration (arXiv 2309.17249).
    """

    step: int
    split: str
    rows: int
    loss: float
    floor: float | None = None
    accuracy: float | None = None
    accuracy_interval: Interval | None = None
    auc: float | None = None
    auc_interval: Interval | None = None
    f1: float | None = None
    f1_interval: Interval | None = None
    calibration: str | None = None
    calibrated_accuracy: float | None = None
    calibrated_accuracy_interval: Interval | None = None
    calibrated_f1: float | None = None
    calibrated_f1_interval: Interval | None = None
    final: bool = False  # the one after training, which may say what the last one during it said
    seconds: float = volatile(0.0)


@dataclass(frozen=True)
class Outcome:
    """How a training run ended. equivalents counts a forward pass as 1 and a backward pass as 2.

    weights_sha256 is of the trained blocks (of the last good checkpoint when the run diverged; None without one).
    """

    status: Literal["finished", "budget", "diverged", "not finite"]
    step: int
    forwards: int
    backwards: int
    equivalents: int
    tokens: int
    weights_sha256: str | None
    reason: str = ""
    exports: list[str] = field(default_factory=list)
    seconds: float = volatile(0.0)


@dataclass(frozen=True)
class Cost:
    """Calls of the oracle (each over all rows), seconds and peak bytes; estimated before the work and actual after
    it. All of it is volatile: a resumed run knows what its own part took.
    """

    phase: Literal["estimated", "actual"]
    gradients: float = volatile()
    products: float = volatile()
    values: float = volatile()
    seconds: float = volatile()
    memory_bytes: int = volatile()
    note: str = volatile("")


@dataclass(frozen=True)
class Warning:
    """Something that the reader must know before trusting a number; `about` names it."""

    text: str
    about: str = ""


@dataclass(frozen=True)
class End:
    """Last line of a run that ended by itself; a run without one, or with another reason than "finished", can be
    resumed.
    """

    reason: Literal["finished", "interrupted", "failed"]
    note: str = ""


Record = (
    Header
    | Preflight
    | Point
    | Secant
    | TrainStep
    | Fit
    | Rates
    | Recommendation
    | Estimator
    | Budget
    | Allocation
    | Epoch
    | Step
    | Evaluation
    | Outcome
    | Trajectory
    | Descent
    | Nearby
    | Constants
    | Exponent
    | Checked
    | Captured
    | StepMemory
    | StepTime
    | SweepTask
    | Predictions
    | Cell
    | Cost
    | Warning
    | End
)  # each is one kind of line

KINDS: dict[str, type[Any]] = {
    "header": Header,
    "preflight": Preflight,
    "point": Point,
    "secant": Secant,
    "train_step": TrainStep,
    "fit": Fit,
    "rates": Rates,
    "recommendation": Recommendation,
    "estimator": Estimator,
    "budget": Budget,
    "allocation": Allocation,
    "epoch": Epoch,
    "step": Step,
    "evaluation": Evaluation,
    "outcome": Outcome,
    "trajectory": Trajectory,
    "descent": Descent,
    "nearby": Nearby,
    "constants": Constants,
    "exponent": Exponent,
    "checked": Checked,
    "captured": Captured,
    "step_memory": StepMemory,
    "step_time": StepTime,
    "sweep_task": SweepTask,
    "predictions": Predictions,
    "cell": Cell,
    "cost": Cost,
    "warning": Warning,
    "end": End,
}
KIND_OF = {cls: kind for kind, cls in KINDS.items()}
