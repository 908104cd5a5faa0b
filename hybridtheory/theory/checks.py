"""A claim held to account: what was measured, what was predicted or bounded, and which hypotheses were true.

A `Check` that holds while a hypothesis fails is luck, and one that fails while a hypothesis fails refutes nothing: so
the hypotheses travel with the verdict, each with its measured value and its limit.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from hybridtheory.errors import UserError


@dataclass(frozen=True)
class Hypothesis:
    """One hypothesis of a theorem, tested: `value` against `limit` (units of the quantity named)."""

    name: str
    value: float
    limit: float
    holds: bool

    @property
    def factor(self) -> float:
        """By what factor value and limit differ, at least 1; NaN unless both are positive."""
        return max(self.value / self.limit, self.limit / self.value) if self.value > 0 and self.limit > 0 else math.nan


@dataclass(frozen=True)
class Check:
    """A claim, its measured value, its bound or prediction, the hypotheses tested, and whether it holds.

    `relation` is "<=" or ">=" for a bound and "~" for a prediction. `stderr` is the standard error of `measured`
    (of measured minus predicted where both are random), 0 when it is exact. `holds` is None when nothing could be
    decided.
    """

    claim: str
    measured: float
    relation: str
    predicted: float | None = None
    bound: float | None = None
    hypotheses: tuple[Hypothesis, ...] = ()
    holds: bool | None = None
    note: str = ""
    stderr: float = 0.0

    @property
    def slack(self) -> float:
        """bound/measured (or predicted/measured): 1 is tight, below 1 a violated upper bound; NaN when measured is
        0.
        """
        target = self.bound if self.bound is not None else self.predicted
        return math.nan if target is None or self.measured == 0 else target / self.measured

    @property
    def hypotheses_hold(self) -> bool:
        return all(h.holds for h in self.hypotheses)

    def to_dict(self) -> dict[str, Any]:
        """Plain types only, as it is written to records; `slack` is included."""
        return {**asdict(self), "slack": self.slack}


def at_most(name: str, value: float, limit: float) -> Hypothesis:
    """The hypothesis value <= limit; a NaN on either side does not hold."""
    return Hypothesis(name, float(value), float(limit), bool(value <= limit))


def at_least(name: str, value: float, limit: float) -> Hypothesis:
    """The hypothesis value >= limit; a NaN on either side does not hold."""
    return Hypothesis(name, float(value), float(limit), bool(value >= limit))


def check_bound(
    claim: str,
    measured: float,
    bound: float,
    stderr: float = 0.0,
    hypotheses: Iterable[Hypothesis] = (),
    errors: float = 4.0,
    note: str = "",
) -> Check:
    """measured <= bound, granting `errors` standard errors to a measured mean."""
    # A run that overflowed to infinity violates a finite bound; only a NaN leaves the question open.
    holds = None if math.isnan(measured) or math.isnan(bound) else bool(measured - errors * stderr <= bound)
    return Check(claim, float(measured), "<=", None, float(bound), tuple(hypotheses), holds, note, float(stderr))


def check_prediction(
    claim: str,
    measured: float,
    predicted: float,
    stderr: float = 0.0,
    hypotheses: Iterable[Hypothesis] = (),
    errors: float = 5.0,
    relative: float = 0.0,
    note: str = "",
) -> Check:
    """|measured - predicted| <= errors * stderr + relative * |predicted|: two-sided, so slack cannot hide in it."""
    allowed = errors * stderr + relative * abs(predicted)
    holds = bool(abs(measured - predicted) <= allowed) if math.isfinite(measured) and math.isfinite(predicted) else None
    return Check(claim, float(measured), "~", float(predicted), None, tuple(hypotheses), holds, note, float(stderr))


def positive(where: str, **values: float) -> None:
    """Refuse, naming it, any value that is not a positive finite number."""
    for name, value in values.items():
        if not (math.isfinite(value) and value > 0):
            raise UserError(f"{where} needs {name} > 0 and finite, got {name} = {value:.6g}")


def nonnegative(where: str, **values: float) -> None:
    """Refuse, naming it, any value that is negative, infinite or NaN."""
    for name, value in values.items():
        if not (math.isfinite(value) and value >= 0):
            raise UserError(f"{where} needs {name} >= 0 and finite, got {name} = {value:.6g}")


def finite(where: str, **values: float) -> None:
    """Refuse, naming it, any value that is infinite or NaN."""
    for name, value in values.items():
        if not math.isfinite(value):
            raise UserError(f"{where} needs a finite {name}, got {name} = {value:.6g}")


def gap(where: str, Delta: float) -> None:
    """Refuse a Δ = f(w_0) - f* that is missing (NaN), negative or infinite."""
    if math.isnan(Delta):
        raise UserError(
            f"{where} needs Delta = f(w_0) - f*, got nan: pass f(w_0) less a lower bound of f (0 for cross-entropy)"
        )
    nonnegative(where, Delta=Delta)


def count(where: str, **values: int) -> None:
    """Refuse, naming it, anything that is not a whole number >= 1."""
    for name, value in values.items():
        if not (math.isfinite(value) and value >= 1 and value == int(value)):
            raise UserError(f"{where} needs a whole number {name} >= 1, got {name} = {value}")


class OutsideTheorem(UserError):
    """A theorem's hypotheses fail; `hypotheses` holds all that were tested, so that a report can say which and by how much."""

    def __init__(self, message: str, hypotheses: tuple[Hypothesis, ...]) -> None:
        super().__init__(message)
        self.hypotheses = hypotheses


def inside(where: str, hypotheses: Iterable[Hypothesis], remedy: str) -> tuple[Hypothesis, ...]:
    """The hypotheses, or a refusal that lists those which fail with what was needed and what came."""
    tested = tuple(hypotheses)
    failed = [f"{h.name} (got {h.value:.6g}, limit {h.limit:.6g})" for h in tested if not h.holds]
    if failed:
        raise OutsideTheorem(f"{where} does not apply: {'; '.join(failed)}: {remedy}", tested)
    return tested
