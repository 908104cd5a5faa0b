"""Estimate: a number with its evidence; Finding: a number that was checked. No torch here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Estimate:
    """``resolved`` is False when the evidence does not carry the number; ``note`` then says how far short it is.

    stderr      standard error over the n independent vectors
    residual    of a Lanczos pair: *some* eigenvalue lies that near. It is no bound on the largest.
    upper       one-sided bound that holds with probability ``confidence`` over the random start. For a smallest eigenvalue it
                bounds from below (it is the outer bound of its end).
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


@dataclass(frozen=True)
class Finding:
    """One numeric check: ``value`` is a relative error, ``tolerance`` what it may be given the evidence's own error."""

    name: str
    value: float
    tolerance: float
    holds: bool
    note: str = ""
