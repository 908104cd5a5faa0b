"""What probe-convergence writes down; see `probes.records` for the rules that all records follow."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from hybridtheory.theory.checks import Hypothesis
from probes.records_parts import Interval


@dataclass(frozen=True)
class Trajectory:
    """One run of the method at constant rates: at the start of every step the loss, ‖g‖² and σ² of each group over all rows.

    seed is that of its random numbers; slope_sq: mean squared measured slope of each step (empty for first-order methods). Between
    neighbouring steps: moved = ‖Δw‖² and turned = ‖Δg‖² of each group. final: loss after the last step.
    """

    run: int
    seed: int
    status: Literal["finished", "not finite"]
    loss: list[float]
    final: float
    grad_sq: dict[str, list[float]]
    noise: dict[str, list[float]]
    slope_sq: list[float]
    moved: dict[str, list[float]]
    turned: dict[str, list[float]]
    note: str = ""


@dataclass(frozen=True)
class Descent:
    """Mean change of the loss in one step of `what` at `factor` of the rates, at a point of the first run, over n directions.

    quadratic: Identity Q with infinitesimal curvature; fitted: finite-scale curve through other directions. broken: the largest part
    of measured - quadratic. coupling: of "both", what moving both adds to base alone and PEFT alone, with its own error (None in records
    of before it was kept, and of one block alone).
    """

    index: int
    step: int
    what: Literal["base", "peft", "both"]
    factor: float
    eta: dict[str, float]
    measured: float
    stderr: float
    n: int
    quadratic: float
    quadratic_stderr: float
    fitted: float
    fitted_stderr: float
    hypotheses: tuple[Hypothesis, ...] = ()
    broken: str = ""
    coupling: float | None = None
    coupling_stderr: float | None = None


@dataclass(frozen=True)
class Nearby:
    """The rest of what theorems are given from a point of the first run, written after its descents: cross_sq = ‖H_xy‖_F² plus two
    standard errors, slope_error as in Constants.
    """

    index: int
    step: int
    cross_sq: float
    slope_error: float


@dataclass(frozen=True)
class Constants:
    """What the theorems are given: the largest of every constant over the measured points, and the settings of the run.

    norms: ‖H_xx‖ ("base"), ‖H_yy‖ ("peft"), ‖H_xy‖ ("coupling"), as bounds; L: joint constants from them (diag(L) >= ±H at the points);
    trace_plus = tr(H_xx,+), its upper end, and cross_sq = ‖H_xy‖_F², two standard errors added; laws: (L0, L1) of each group;
    d: parameters; Delta = f(w_0) - f_star; slope_error: root mean square error of
    the method's slopes over ‖g_x‖; n: minibatches an epoch; sgd: whether the method's steps are those of the theorems. rates_from
    says where the learning rates came from.
    """

    eta: dict[str, float]
    norms: dict[str, float]
    L: dict[str, float]
    trace_plus: float
    cross_sq: float
    laws: dict[str, Interval]
    d: dict[str, int]
    Delta: float
    f_star: float
    slope_error: float
    mu: float
    q: int
    law: str
    n: int
    sampling: str
    method: str
    sgd: bool
    rates_from: str = ""
    note: str = ""


@dataclass(frozen=True)
class Exponent:
    """Slope of log((1/T) Σ ‖g‖²) against log T from T = start, 95 % interval over runs (None for a single one)."""

    value: float
    interval: Interval | None
    start: int
    runs: int


@dataclass(frozen=True)
class Checked:
    """A `hybridtheory.theory.checks.Check`; about is "descent", "bound" or "run", name says which of them."""

    about: Literal["descent", "bound", "run"]
    name: str
    claim: str
    measured: float
    relation: str
    predicted: float | None
    bound: float | None
    stderr: float
    holds: bool | None
    hypotheses: tuple[Hypothesis, ...] = ()
    note: str = ""
    at: dict[str, float] = field(default_factory=dict)

    @property
    def slack(self) -> float | None:
        """bound/measured: 1 is tight, below 1 violated."""
        return None if self.bound is None or self.measured == 0 else self.bound / self.measured
