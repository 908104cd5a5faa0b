"""What probe-estimators writes down; see `probes.records` for the rules that all records follow."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from hybridtheory.estimate import Estimate
from probes.records_parts import Interval


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
