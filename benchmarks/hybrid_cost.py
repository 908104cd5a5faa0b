"""What a hybrid step costs against its parts, and what it and MeZO hold in memory; ends with an error if a target is missed.

    python benchmarks/hybrid_cost.py                               # make bench; the second model needs `make real-data`
    python benchmarks/hybrid_cost.py --models opt --pairs 10       # a shorter look
    python benchmarks/hybrid_cost.py --clock cpu --threads 1       # CPU seconds, for a machine that others use too

Batch 8 x 64 tokens of the language reference that every CPython ships, float32, two threads, LoRA r = 8. Time: hybrid step (one-sided, the
first-order forward reused)/(LoRA-SGD step + one forward), all of them one after another in every round, median of the ratios within
rounds. Memory: peaks above the process before the model was loaded, each method in a process of its own (`probes.cost_memory`).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from step_speed import model as opt_like
from transformers import AutoTokenizer

from probes.cost_memory import Job, Measured, apart, available, closure, optimizer_of
from probes.cost_time import interleaved, quartiles
from probes.tasks import load_task

ROOT = Path(__file__).resolve().parent.parent
CACHE, EMBEDDED = ROOT / "runs" / "bench", ROOT / "probes" / "data" / "embedded"
ROWS, LENGTH = 8, 64
LAWS = {"Gaussian": None, "Rademacher": "rademacher", "SubZero r=8": "subzero:rank=8", "LOZO r=2": "lozo:rank=2"}
TIME = {"Gaussian": 1.30, "Rademacher": 1.12, "SubZero r=8": 1.12}  # most allowed
HYBRID_MEMORY, MEZO_MEMORY = 1.1, 1.05


def text() -> Path:
    from pydoc_data import topics

    CACHE.mkdir(parents=True, exist_ok=True)
    path = CACHE / "topics.txt"
    path.write_text("\n".join(topics.topics.values()))
    return path


def folder() -> Path:
    """The model of step_speed.py (3.7 M parameters) as a folder, with the embedded model's tokenizer, whose vocabulary has its size."""
    path = CACHE / "opt-like"
    if not (path / "tokenizer_config.json").exists():
        opt_like().save_pretrained(path)
        AutoTokenizer.from_pretrained(EMBEDDED).save_pretrained(path)
    return path


def times(
    loading: dict[str, Any], laws: dict[str, str | None], pairs: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Ratios of each law, by round."""
    task = load_task(**loading, peft="lora")
    f = closure(task, None)
    steps = {name: optimizer_of(task, "hybrid", law, {}) for name, law in laws.items()}
    twin = optimizer_of(task, "peft-sgd", None, {})
    works: dict[str, Callable[[], object]] = {"forward": torch.no_grad()(f), "twin": lambda: twin.step(f)}
    for name, optimizer in steps.items():
        works[name] = lambda optimizer=optimizer: optimizer.step(f)
        works[name]()  # the first step looks at the model
    found = interleaved(works, pairs, torch.device("cpu"), clock)
    floor = [a + b for a, b in zip(found["forward"], found["twin"], strict=True)]
    print(f"  LoRA-SGD step + one forward: {1e3 * median(floor):.1f} ms; medians of {pairs} rounds, quartiles")
    return {name: [s / b for s, b in zip(found[name], floor, strict=True)] for name in laws}


def memories(loading: dict[str, Any], laws: dict[str, str | None]) -> tuple[Measured, Measured, dict[str, Measured]]:
    """MeZO, LoRA-SGD, and hybrid with each law."""

    def take(method: str, peft: str, law: str | None = None) -> Measured:
        return apart(Job({**loading, "peft": peft}, method, law, threads=torch.get_num_threads()))

    return take("mezo", "none"), take("peft-sgd", "lora"), {n: take("hybrid", "lora", law) for n, law in laws.items()}


def row(name: str, value: float, target: float | None, more: str = "") -> str:
    """One line; ends with MISSED where the target is."""
    late = "   MISSED" if target is not None and value > target else ""
    return f"  {name:34}{value:8.3f}{'' if target is None else f'{target:.2f}':>9}  {more}{late}"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["opt", "smollm2"], help="opt, smollm2, or a folder")
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--laws", nargs="+", choices=list(LAWS), default=list(LAWS))
    parser.add_argument("--no-memory", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clock = time.perf_counter if options.clock == "wall" else time.process_time
    laws = {name: LAWS[name] for name in options.laws}
    lines: list[str] = []

    def say(line: str) -> None:
        print(line, flush=True)
        lines.append(line)

    for name in options.models:
        loading = {
            "model": str(folder()) if name == "opt" else name,
            "data": str(text()),
            "rows": ROWS,
            "max_length": LENGTH,
        }
        say(
            f"\n{name}, batch {ROWS} x {LENGTH}, {options.threads} threads, {options.clock} clock\n  {'':34}{'ratio':>8}{'target':>9}"
        )
        for law, ratios in times(loading, laws, options.pairs, clock).items():
            low, high = quartiles(ratios)
            say(row(f"time, {law}", median(ratios), TIME.get(law), f"{low:.3f} to {high:.3f}"))
        if options.no_memory:
            continue
        if reason := available("cpu"):
            print(f"  memory is not measured: {reason}")
            continue
        mezo, lora, hybrids = memories(loading, laws)
        base = max(lora.phases.values())
        for law, m in hybrids.items():
            say(
                row(
                    f"peak memory, {law}, over LoRA's",
                    max(m.phases.values()) / base,
                    HYBRID_MEMORY,
                    mib(max(m.phases.values())),
                )
            )
        allowed = mezo.inference + mezo.largest
        say(
            row(
                "MeZO's over inference + largest",
                max(mezo.phases.values()) / allowed,
                MEZO_MEMORY,
                mib(max(mezo.phases.values())),
            )
        )
    missed = [line for line in lines if line.endswith("MISSED")]
    if missed:
        print("\nmissed:\n" + "\n".join(missed), file=sys.stderr)
    return 1 if missed else 0


def mib(b: float) -> str:
    return f"{b / 2**20:.0f} MiB"


if __name__ == "__main__":
    sys.exit(main())
