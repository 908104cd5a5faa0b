"""Estimate: a number with its evidence; Finding: a number that was checked. No torch here."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Estimate:
    """``resolved`` is False when the evidence does not carry the number; ``note`` then says how far short it is.

    stderr      standard error over the n independent vectors
    residual    of a Lanczos pair: *some* eigenvalue lies that near. It is no bound on the largest.
    upper       one-sided bound that holds with probability ``confidence`` over the random start. For a smallest eigenvalue it
                bounds from below (it is the outer bound of its end).
    lower       with it ``upper`` is the other end of an interval that holds the number with probability ``confidence``
    numerical   half-width of a 95 % interval around what exact products give for the same vectors; None: the products were exact
    n           vectors, or Lanczos steps
    """

    value: float
    stderr: float | None = None
    residual: float | None = None
    upper: float | None = None
    confidence: float | None = None
    n: int = 0
    resolved: bool = True
    note: str = ""
    lower: float | None = None
    numerical: float | None = None

    def times(self, factor: float) -> Estimate:
        """The same evidence in units larger by a known positive factor."""
        names = ("stderr", "residual", "upper", "lower", "numerical")
        scaled: dict[str, Any] = {n: None if getattr(self, n) is None else factor * getattr(self, n) for n in names}
        return replace(self, value=factor * self.value, **scaled)


@dataclass(frozen=True)
class Finding:
    """One numeric check: ``value`` is a relative error, ``tolerance`` what it may be given the evidence's own error."""

    name: str
    value: float
    tolerance: float
    holds: bool
    note: str = ""
