"""What a convergence run is asked to do, checked before anything is loaded."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hybridtheory.errors import UserError
from hybridtheory.estimators import Gaussian, Law, Rademacher, Sphere
from hybridtheory.optimizers.catalogue import METHODS

LAWS: dict[str, Law] = {"gaussian": Gaussian(), "sphere": Sphere(), "rademacher": Rademacher()}
# Methods whose steps are those of the theorems: plain SGD, with a direction law of their own or none.
PLAIN = ("hybrid", "hybrid-two-sided", "mezo", "forward-gradient", "peft-sgd")


@dataclass(frozen=True)
class Settings:
    """What a convergence run is asked to do; the defaults suit the embedded model.

    method      a name of `hybridtheory.optimizers.catalogue`; law None keeps the method's own directions
    lr_base, lr_peft   rates; None: recommended by a short smoothness run first
    steps, runs    length and number of the runs (their seeds are seed, seed + 1, ...)
    batch_size  rows of a minibatch (a fixed partition of the rows); None: all rows in every step
    sampling    "reshuffle" or "iid", for minibatches
    points      points of the first run at which constants and one-step descent are measured, the first at its start
    factors     fractions of the rates at which one step is measured
    precision, most   relative standard error of a mean one-step change, and the most directions spent on it
    f_star      a lower bound of the loss; None: 0 where the loss is a cross-entropy
    probe_steps   steps of the smoothness run that recommends rates
    """

    method: str = "hybrid-two-sided"
    lr_base: float | None = None
    lr_peft: float | None = None
    steps: int = 24
    runs: int = 3
    points: int = 3
    batch_size: int | None = None
    sampling: str = "reshuffle"
    mu: float = 1e-3
    q: int = 1
    law: str | None = None
    factors: tuple[float, ...] = (0.03, 0.1, 0.3, 1.0)
    precision: float = 0.03
    most: int = 400
    f_star: float | None = None
    blocks: str = "group"
    seed: int = 0
    micro_batch: int | None = None
    curvature: str = "hessian"
    max_memory: int | None = None
    probe_steps: int = 12
    rates_from: str = ""

    def __post_init__(self) -> None:
        for name, least in (("steps", 2), ("runs", 1), ("points", 1), ("q", 1), ("most", 2), ("probe_steps", 1)):
            if getattr(self, name) < least:
                raise UserError(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(self, name)}")
        for name in ("lr_base", "lr_peft", "mu", "precision"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise UserError(f"--{name.replace('_', '-')} must be a positive number, got {value}")
        if self.f_star is not None and not math.isfinite(self.f_star):
            raise UserError(f"--f-star must be a finite number, a lower bound of the loss, got {self.f_star}")
        if not self.factors or not all(math.isfinite(s) and s > 0 for s in self.factors):
            raise UserError(f"the fractions of a step must be positive numbers, got {list(self.factors)}")
        if self.method not in METHODS:
            raise UserError(f"--method is one of {', '.join(METHODS)}, not {self.method!r}")
        if self.law is not None and self.law not in LAWS:
            raise UserError(f"--law is one of {', '.join(LAWS)}, not {self.law!r}")
        if self.sampling not in ("reshuffle", "iid"):
            raise UserError(f"--sampling is reshuffle or iid, not {self.sampling!r}")

    @property
    def whole(self) -> bool:
        """All rows in every step."""
        return self.batch_size is None

    @property
    def order(self) -> str:
        """How minibatches follow each other; "full" where there is one."""
        return "full" if self.whole else self.sampling
