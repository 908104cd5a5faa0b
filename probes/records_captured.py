"""What `probes.captured` writes down; see `probes.records` for the rules that all records follow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Captured:
    """One run of zeroth-order steps on the base in SubZero's subspaces, all rows in every step.

    At the start of every step: loss of all rows; captured = ‖P′g‖²/‖g‖² over the matrices that have a subspace. expected = k/d is
    what a subspace that knows nothing of the gradient captures in the mean. refresh: steps between two subspaces.
    """

    law: str
    refresh: int
    seed: int
    lr: float
    expected: float
    loss: list[float]
    captured: list[float]
    status: Literal["finished", "not finite"]
