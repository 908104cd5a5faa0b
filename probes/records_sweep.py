"""What hybrid-sweep writes down; see `probes.records` for the rules that all records follow."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from probes.records_parts import VOLATILE

Ends = Literal["steps", "budget", "tokens", "seconds"]


@dataclass(frozen=True)
class SweepTask:
    """A model with its adapter and rows as the cells of a sweep start from them. seed chose the rows and initialised the adapter.

    d: parameters by group; rows and tokens (weighted positions of the loss) of the training rows; peft: type, rank, alpha, scale, init.
    """

    name: str
    seed: int
    model: str
    model_sha256: str
    architecture: str
    dtype: str
    data: str
    data_sha256: str
    rows: int
    tokens: float
    loss: str
    peft: dict[str, Any]
    d: dict[str, int]
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Predictions:
    """Learning rates that were predicted before the sweep started: the file, its sha256, and the commit that brought it in.

    head: the commit that was checked out when the sweep started. entries: one for each task, horizon and rule.
    """

    path: str
    sha256: str
    commit: str
    entries: list[dict[str, Any]]
    head: str | None = field(default=None, metadata=VOLATILE)


@dataclass(frozen=True)
class Cell:
    """One training run of a sweep. id: a hash of everything that determines its numbers.

    line     task, method, axis and horizon name the one-dimensional sweep; place is its coordinate: the rate itself ("base", "peft"),
             the factor on both optima ("scale") or on their ratio ("ratio"), 1 where rates are given ("fixed", "predicted").
    around   what the place of a joint line ("scale", "ratio") is a factor on, as it was when the line began: rates (B, P) and the scale c.
             Optima change with the code that finds them; a line that was begun does not. None on other lines, and in older records.
    ran      the method that was run: where one rate is zero, the method's other half gives the same weights for less.
    horizon  all cells of a line end at ``amount`` of it: steps, budget (forward-equivalents), tokens, seconds.
    start, final  loss of fixed training rows before and after; final is not finite where the run diverged.
    curve    means over consecutive steps: step, loss, equivalents, tokens at the end of each.
    scores   evaluations during the run: step, loss and, where rows are labelled, accuracy; held_out: the last evaluation of rows
             that were not trained on.
    """

    id: str
    task: str
    method: str
    axis: Literal["base", "peft", "scale", "ratio", "fixed", "predicted"]
    horizon: Ends
    amount: float
    place: float
    ran: str
    lr_base: float | None
    lr_peft: float | None
    seed: int
    status: Literal["finished", "budget", "diverged", "not finite"]
    step: int
    forwards: int
    backwards: int
    equivalents: int
    tokens: int
    start: float
    final: float
    curve: dict[str, list[float]]
    scores: dict[str, list[float]]
    held_out: dict[str, Any] | None
    weights_sha256: str | None
    reason: str = ""
    predictions: str | None = None
    predictions_commit: str | None = None
    around: tuple[float, float, float] | None = None
    seconds: float = field(default=0.0, metadata=VOLATILE)
    clock: list[float] = field(default_factory=list, metadata=VOLATILE)
