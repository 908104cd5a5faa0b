"""What a training run is asked to do."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hybridtheory.errors import UserError
from hybridtheory.estimators.catalogue import parse
from hybridtheory.optimizers import METHODS
from probes.evaluation import OBJECTIVES


@dataclass(frozen=True)
class TrainSettings:
    """Everything that changes a number of the run; the header keeps it, and a resumed run must have the same.

    method        a name of `hybridtheory.optimizers.METHODS`; ``options`` go to its optimizer.
    steps, budget the run ends at whichever comes first; budget in forward-equivalents (forward 1, backward 2).
    tokens, seconds  ends too: of the minibatches, once each; of the steps, evaluations not counted.
    accumulate    minibatches averaged in one step; micro_batch: rows of one forward pass, which changes memory alone.
    objective     "loss", or "accuracy" or "f1" of the minibatch for zeroth-order methods.
    master        a float32 copy of bf16 and fp16 weights takes the updates.
    eval_every    steps between evaluations on ``eval_rows`` fixed rows (0: only before and after); ``eval_data``: another task's, or
                  "train" for the rows that are trained on.
    final_rows    rows of the last evaluation, None for all.
    checkpoint_every  steps between checkpoints.
    keep          "last", or "best": the weights that score best on the dev split, step 0 and the last step included (by the objective).
    lower_share   of a bilevel method: share of the training rows that the lower level has for itself; 0: both levels use all rows.
    """

    method: str
    lr_base: float | None = None
    lr_peft: float | None = None
    steps: int | None = 1000
    budget: int | None = None
    batch: int = 16
    seed: int = 0
    mu: float = 1e-3
    q: int = 1
    law: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    weight_decay: float = 0.0
    schedule: str = "constant"
    sampling: str = "reshuffle"
    accumulate: int = 1
    micro_batch: int | None = None
    objective: str = "loss"
    dropout: float = 0.0
    master: bool = False
    eval_every: int = 100
    eval_rows: int = 200
    eval_data: str | None = None
    final_rows: int | None = None
    checkpoint_every: int = 100
    tokens: int | None = None
    seconds: float | None = None
    keep: str = "last"
    lower_share: float = 0.5

    # what `probes.setup` asks of every probe
    @property
    def blocks(self) -> str:
        return "group"

    @property
    def curvature(self) -> str:
        return "hessian"

    @property
    def max_memory(self) -> int | None:
        return None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UserError(f"there is no method {self.method!r}: choose from {', '.join(METHODS)}")
        method = METHODS[self.method]
        for name, least in (
            ("steps", 1), ("budget", 1), ("tokens", 1), ("batch", 1), ("q", 1), ("accumulate", 1), ("micro_batch", 1), ("eval_every", 0),
            ("eval_rows", 1), ("final_rows", 1), ("checkpoint_every", 1),
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"--{name.replace('_', '-')} is a whole number of at least {least}, not {value}")
        if all(end is None for end in (self.steps, self.budget, self.tokens, self.seconds)):
            raise UserError("a run needs an end: give --steps or --budget")
        if self.seconds is not None and not 0 < self.seconds < math.inf:
            raise UserError(f"the seconds of a run are a positive number, not {self.seconds}")
        if self.schedule == "linear" and self.steps is None and self.budget is None:
            raise UserError("a linear schedule needs to know the last step: give --steps or --budget")
        if not 0 <= self.dropout < 1:
            raise UserError(f"--dropout is a probability below 1, not {self.dropout}")
        if not 0 <= self.lower_share < 1:
            raise UserError(f"--lower-share is a share of the rows, at least 0 and below 1, not {self.lower_share}")
        if not (0 < self.mu < math.inf and 0 <= self.weight_decay < math.inf):
            raise UserError(
                f"--mu is a positive number and --weight-decay at least 0, not {self.mu} and {self.weight_decay}"
            )
        for name, known in (
            ("schedule", ("constant", "linear")),
            ("objective", OBJECTIVES),
            ("sampling", ("reshuffle", "iid")),
            ("keep", ("last", "best")),
        ):
            if getattr(self, name) not in known:
                raise UserError(f"--{name} is {' or '.join(known)}, not {getattr(self, name)!r}")
        if self.law is not None:
            parse(self.law)
            if method.kind == "fo" or self.method in ("hizoo", "zo-adamu"):
                raise UserError(f"{self.method} has no choice of directions: leave --law out")
        if self.objective != "loss":
            if method.kind != "zo" or dict(method.options).get("difference") == "exact":
                raise UserError(
                    f"{self.method} needs a derivative and {self.objective} has none: choose a zeroth-order method such as mezo"
                )
            if self.objective == "f1" and self.micro_batch is not None:
                raise UserError("F1 is of a whole minibatch and not a sum over rows: leave --micro-batch out")

    def optimizer_options(self) -> dict[str, Any]:
        """What `hybridtheory.optimizers.build` is given besides the blocks and their rates."""
        found: dict[str, Any] = {"weight_decay": self.weight_decay, "master": self.master, **self.options}
        if METHODS[self.method].kind != "fo":
            found = {"mu": self.mu, "q": self.q, **found}
        return found


def options(items: Mapping[str, str] | list[str]) -> dict[str, Any]:
    """ "name=value" pairs, numbers where they read as such."""
    found: dict[str, Any] = {}
    for item in items:
        name, sign, text = item.partition("=")
        if not (name and sign and text):
            raise UserError(f"--option is name=value, not {item!r}")
        found[name.replace("-", "_")] = _value(text)
    return found


def _value(text: str) -> int | float | bool | str:
    for read in (int, float):
        try:
            return read(text)
        except ValueError:
            continue
    return {"true": True, "false": False}.get(text.lower(), text)
