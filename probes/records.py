"""What a probe writes down: one frozen dataclass per kind of line of a JSON-lines file.

A record is what was measured or derived, with its evidence; nothing is drawn or printed from anywhere else, so a
figure rebuilds on a laptop from a cluster's run. Reading is strict: a line with an unknown kind, an unknown or
missing field, or a value of the wrong type is refused with the file and the line, because a silently skipped field is
a wrong figure later.

JSON has no infinity and no nan; a measurement has (a diverged loss is `inf`). A float that is not finite is written
as one of the strings "nan", "inf", "-inf" and read back as that float. `None` means "was not measured" and nothing
else.

Fields whose metadata say volatile (time, host, argv, commit) may differ between two runs of the same measurement;
`jsonl.stable` leaves them out, so that two runs can be compared. docs/records.md documents every kind for readers in
other languages.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from hybridtheory.estimate import Finding
from probes.records_captured import Captured
from probes.records_convergence import Checked, Constants, Descent, Exponent, Nearby, Trajectory
from probes.records_cost import StepMemory, StepTime
from probes.records_estimators import Allocation, Budget, Estimator
from probes.records_parts import VOLATILE
from probes.records_smoothness import Fit, Point, Rates, Recommendation, Secant, TrainStep
from probes.records_sweep import Cell, Predictions, SweepTask
from probes.records_training import Epoch, Evaluation, Outcome, Step

SCHEMA = 0


# ---- parts of records ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelInfo:
    """name as the user gave it; sha256 of the weights; parameters counts tied weights once."""

    name: str
    sha256: str
    parameters: int
    architecture: str = ""
    dtype: str = ""
    info: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class DataInfo:
    """rows and tokens (weighted positions of the loss) that the measurement used; truncated counts rows cut at the
    context length.
    """

    name: str
    sha256: str
    rows: int = 0
    tokens: float = 0.0
    truncated: int = 0
    loss: str = ""
    info: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PeftInfo:
    """scale is alpha/r where the type has one: PEFT constants are not invariant to it, so it stands beside each of
    them.
    """

    type: str
    rank: int | None = None
    alpha: float | None = None
    scale: float | None = None
    init: str = ""
    info: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class BlockInfo:
    """d parameters that share one smoothness constant; group is "base" or "peft"."""

    name: str
    group: str
    d: int
    info: dict[str, Any] = field(default_factory=dict)


# ---- kinds of lines --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Header:
    """First line of every file: all that is needed to repeat the measurement."""

    probe: str
    seed: int
    model: ModelInfo
    data: DataInfo
    blocks: list[BlockInfo]
    peft: PeftInfo | None = None
    options: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    threads: int = 1
    processes: int = 1
    git: str | None = field(default=None, metadata=VOLATILE)
    argv: list[str] = field(default_factory=list, metadata=VOLATILE)
    host: str = field(default="", metadata=VOLATILE)
    started: str = field(default="", metadata=VOLATILE)
    schema: int = SCHEMA


@dataclass(frozen=True)
class Preflight:
    """Whether second derivatives of this model can be trusted. "kinked": they exist almost everywhere and miss the
    kinks (ReLU).
    """

    verdict: Literal["ok", "kinked", "refused"]
    checks: list[Finding]
    note: str = ""


@dataclass(frozen=True)
class Cost:
    """Calls of the oracle (each over all rows), seconds and peak bytes; estimated before the work and actual after
    it. All of it is volatile: a resumed run knows what its own part took.
    """

    phase: Literal["estimated", "actual"]
    gradients: float = field(metadata=VOLATILE)
    products: float = field(metadata=VOLATILE)
    values: float = field(metadata=VOLATILE)
    seconds: float = field(metadata=VOLATILE)
    memory_bytes: int = field(metadata=VOLATILE)
    note: str = field(default="", metadata=VOLATILE)


@dataclass(frozen=True)
class Warning:
    """Something that the reader must know before trusting a number; `about` names it."""

    text: str
    about: str = ""


@dataclass(frozen=True)
class End:
    """Last line of a run that ended by itself; a run without one, or with another reason than "finished", can be
    resumed.
    """

    reason: Literal["finished", "interrupted", "failed"]
    note: str = ""


Record = (
    Header
    | Preflight
    | Point
    | Secant
    | TrainStep
    | Fit
    | Rates
    | Recommendation
    | Estimator
    | Budget
    | Allocation
    | Epoch
    | Step
    | Evaluation
    | Outcome
    | Trajectory
    | Descent
    | Nearby
    | Constants
    | Exponent
    | Checked
    | Captured
    | StepMemory
    | StepTime
    | SweepTask
    | Predictions
    | Cell
    | Cost
    | Warning
    | End
)  # each is one kind of line

KINDS: dict[str, type[Any]] = {
    "header": Header,
    "preflight": Preflight,
    "point": Point,
    "secant": Secant,
    "train_step": TrainStep,
    "fit": Fit,
    "rates": Rates,
    "recommendation": Recommendation,
    "estimator": Estimator,
    "budget": Budget,
    "allocation": Allocation,
    "epoch": Epoch,
    "step": Step,
    "evaluation": Evaluation,
    "outcome": Outcome,
    "trajectory": Trajectory,
    "descent": Descent,
    "nearby": Nearby,
    "constants": Constants,
    "exponent": Exponent,
    "checked": Checked,
    "captured": Captured,
    "step_memory": StepMemory,
    "step_time": StepTime,
    "sweep_task": SweepTask,
    "predictions": Predictions,
    "cell": Cell,
    "cost": Cost,
    "warning": Warning,
    "end": End,
}
KIND_OF = {cls: kind for kind, cls in KINDS.items()}
