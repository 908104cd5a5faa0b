"""Peak memory of short runs of probe-smoothness, estimated and measured, each in a process of its own.

    python peaks.py < rows.jsonl     # a line of `Row`'s fields each; prints one of `Found`'s (of `Loaded`'s without settings) for each

The processes are forked from one that has imported everything, which saves the imports; memory that they still share counts in the
resident set of each, so it is in both numbers. Measured is the largest resident set until the measuring ends, the report left out.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from dataclasses import asdict, dataclass, field
from typing import Any

# Every phase of a run but the finite scale (two vectors and values of the loss), with few products: what a phase holds does not depend on
# how often it is repeated.
SHORT: dict[str, Any] = {
    "points": 1, "secants": 2, "run_steps": 1, "directions": 4, "trace_tol": 1.0, "end_tol": 1.0, "max_vectors": 4, "max_steps": 6,
    "scales": False,
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """What goes to `load_task` and to `Settings`; without settings the model is loaded and nothing is measured of it."""

    loading: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] | None = None


@dataclass(frozen=True)
class Found:
    """Bytes; ``terms``: what the estimate says holds them."""

    estimated: int
    measured: int
    terms: str
    micro_batch: int | None
    engine: str
    warnings: list[str]
    seconds: float


@dataclass(frozen=True)
class Loaded:
    """Bytes of the resident set above the level before the model was loaded: at the most, and after it."""

    peak: int
    held: int


def load(row: Row) -> Loaded:
    """In this very process."""
    import torch

    from probes.cost_memory import Meter
    from probes.models import load_model

    dtype = getattr(torch, row.loading.get("dtype", "float32"))
    load_model(None, labelled=False, num_labels=None)  # what loading brings in once is part of the level
    meter = Meter(torch.device("cpu"))
    meter.reset()
    held = load_model(row.loading["model"], labelled=False, num_labels=None, dtype=dtype)
    assert held.model is not None
    return Loaded(meter.peak(), meter.now())


def run(row: Row) -> Found:
    """In this very process."""
    from probes import smoothness
    from probes.point import Settings
    from probes.records import Cost, Header, Warning
    from probes.tasks import load_task

    records = list(
        smoothness.run(load_task(**row.loading), Settings(**{**SHORT, **(row.settings or {})}), restore=False)
    )
    estimated, actual = (
        next(r for r in records if isinstance(r, Cost) and r.phase == p) for p in ("estimated", "actual")
    )
    options = next(r for r in records if isinstance(r, Header)).options
    warnings = [r.text for r in records if isinstance(r, Warning) and r.about == "memory"]
    return Found(
        estimated.memory_bytes, actual.memory_bytes, estimated.note, options["micro_batch"], options["engine"], warnings, actual.seconds
    )  # fmt: skip


def forked(row: Row) -> str:
    """The line of one row, from a child that ends with it."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.close(reading)
            with os.fdopen(writing, "w") as pipe:
                pipe.write(json.dumps(asdict(load(row) if row.settings is None else run(row))))
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        line = pipe.read()
    _, status = os.waitpid(child, 0)
    if status:
        raise SystemExit(f"{row} failed with status {status}")
    return line


def main() -> None:
    import torch

    from probes import smoothness, tasks
    from probes.command import prepare

    prepare()
    torch.set_num_threads(1)  # threads do not survive a fork
    assert smoothness and tasks  # imported before the fork
    for line in sys.stdin:
        print(forked(Row(**json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
