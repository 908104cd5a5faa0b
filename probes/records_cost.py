"""What probe-cost writes down; see `probes.records` for the rules that all records follow."""

from __future__ import annotations

from dataclasses import dataclass, field

from probes.records_parts import VOLATILE, Interval


@dataclass(frozen=True)
class StepMemory:
    """Bytes of one step of a method, in a process of its own, above that process before the model was loaded.

    trained: parameters that the method moves. weights: after loading. inference: peak of one forward pass. kept: what stays between
    steps beyond the weights (optimizer state, factors of directions). perturbation, activations, update: peaks of the evaluations
    without gradient, of those with one, and of what follows the last evaluation; None where the method has none. peak: the largest.
    formula: what `hybridtheory.theory.cost` predicts (None: it has no formula for the method), largest: the biggest perturbed
    tensor.
    """

    method: str
    peft: str
    trained: int
    rows: int
    tokens: int
    weights: int | None = field(default=None, metadata=VOLATILE)
    inference: int | None = field(default=None, metadata=VOLATILE)
    kept: int | None = field(default=None, metadata=VOLATILE)
    perturbation: int | None = field(default=None, metadata=VOLATILE)
    activations: int | None = field(default=None, metadata=VOLATILE)
    update: int | None = field(default=None, metadata=VOLATILE)
    peak: int | None = field(default=None, metadata=VOLATILE)
    formula: float | None = None
    largest: int = 0
    note: str = ""


@dataclass(frozen=True)
class StepTime:
    """Time of one step of a method, interleaved with forward passes of the same batch.

    forwards, backwards: passes that were counted in a step; declared: what the optimizer says of itself; formula: theory's.
    seconds: median of a step. ratio: median over `rounds` of step/forward within one round, ratio_interval its quartiles.
    backward: a gradient of the same weights costs 1 + backward forward passes. predicted: the formula at that price.
    parts: of a hybrid method, median of step/(first-order PEFT step + one forward) within one round.
    """

    method: str
    peft: str
    forwards: int
    backwards: int
    declared: tuple[int, int]
    formula: tuple[float, float]
    rounds: int
    seconds: float | None = field(default=None, metadata=VOLATILE)
    ratio: float | None = field(default=None, metadata=VOLATILE)
    ratio_interval: Interval | None = field(default=None, metadata=VOLATILE)
    backward: float | None = field(default=None, metadata=VOLATILE)
    predicted: float | None = field(default=None, metadata=VOLATILE)
    parts: float | None = field(default=None, metadata=VOLATILE)
    parts_interval: Interval | None = field(default=None, metadata=VOLATILE)
    note: str = ""
