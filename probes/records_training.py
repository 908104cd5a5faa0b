"""What hybrid-train writes down; see `probes.records` for the rules that all records follow."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from probes.records_parts import VOLATILE, Interval


@dataclass(frozen=True)
class Epoch:
    """A pass over the training rows starts, in this order of their indices; i.i.d. sampling has none."""

    epoch: int
    order: list[int]


@dataclass(frozen=True)
class Step:
    """Training step number `step` (from 1): the minibatch's loss where it started, and what was paid since the start of the run.

    slopes, with the seed in the header, are the zeroth-order gradient; tokens counts those of the minibatches, once each; extra holds
    what a method reports of itself (the penalty gap of the bilevel method).
    """

    step: int
    loss: float
    lr: dict[str, float]
    slopes: list[float]
    forwards: int
    backwards: int
    tokens: int
    extra: dict[str, float] = field(default_factory=dict)
    seconds: float = field(default=0.0, metadata=VOLATILE)


@dataclass(frozen=True)
class Evaluation:
    """Rows that were not trained on, scored after `step` steps; floor is the accuracy of the majority label.

    Intervals cover the choice of rows (95 %; Wilson for accuracy, bootstrap for the others). f1 is the macro F1. calibration "batch":
    calibrated_ numbers are after batch calibration (arXiv 2309.17249).
    """

    step: int
    split: str
    rows: int
    loss: float
    floor: float | None = None
    accuracy: float | None = None
    accuracy_interval: Interval | None = None
    auc: float | None = None
    auc_interval: Interval | None = None
    f1: float | None = None
    f1_interval: Interval | None = None
    calibration: str | None = None
    calibrated_accuracy: float | None = None
    calibrated_accuracy_interval: Interval | None = None
    calibrated_f1: float | None = None
    calibrated_f1_interval: Interval | None = None
    final: bool = False  # the one after training, which may say what the last one during it said
    seconds: float = field(default=0.0, metadata=VOLATILE)


@dataclass(frozen=True)
class Outcome:
    """How a training run ended. equivalents counts a forward pass as 1 and a backward pass as 2.

    weights_sha256 is of the trained blocks (of the last good checkpoint when the run diverged; None without one).
    """

    status: Literal["finished", "budget", "diverged", "not finite"]
    step: int
    forwards: int
    backwards: int
    equivalents: int
    tokens: int
    weights_sha256: str | None
    reason: str = ""
    exports: list[str] = field(default_factory=list)
    seconds: float = field(default=0.0, metadata=VOLATILE)
