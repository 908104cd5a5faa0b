"""What `probes.captured` writes down; see `probes.records` for the rules that all records follow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Captured:
    """One run of zeroth-order steps on the base in SubZero's subspaces, all rows in every step.

    At the start of every step: loss of all rows; captured = ‖P′g‖²/‖g‖² over the matrices that have a subspace; expected: what subspaces
    that know nothing of the gradient capture in the mean, Σ (r²/mn)‖G‖²/‖g‖² over the matrices, which is k/d where all are of one size
    or have their share of the energy. refresh: steps between two subspaces. share: k/d.
    """

    law: str
    refresh: int
    seed: int
    lr: float
    share: float
    loss: list[float]
    captured: list[float]
    expected: list[float]
    status: Literal["finished", "not finite"]
