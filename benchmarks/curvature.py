"""Curvature of a small GPT-2, side by side with three public tools: time, error and peak memory, all from one run.

    python benchmarks/curvature.py            # make bench; installs the opponents into .venv-bench first
    python benchmarks/curvature.py --resume   # go on where a run was stopped
    python benchmarks/curvature.py --points 1 --repeats 1 --trace-share 0.1      # a shorter look

One thread. Times are CPU seconds of the process (on a shared machine the wall clock measures the neighbours). The tools take turns:
a unit of work (one point, one repeat) is done by every tool in the same process, in an order that rotates, and a ratio compares times of
one unit only. Each measurement is a line of runs/bench/curvature.jsonl as soon as it exists; the table (runs/bench/curvature.md) is made
from that file. Ends with an error if an opponent is missing or a target is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
CACHE = HERE.parent / "runs" / "bench"
SECTIONS = ("product", "modulus", "row", "batches", "memory")


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.process_time()
    result = work()
    return time.process_time() - start, result


class Results:
    """Measurements by key, written as they come."""

    def __init__(self, path: Path, resume: bool) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text().splitlines() if resume and path.exists() else []
        path.write_text("".join(line + "\n" for line in lines))
        self.found: list[dict[str, Any]] = [json.loads(line) for line in lines]

    def has(self, **key: Any) -> bool:
        return any(all(f.get(k) == v for k, v in key.items()) for f in self.found)

    def add(self, **values: Any) -> None:
        self.found.append(values)
        with self.path.open("a") as file:
            file.write(json.dumps(values) + "\n")
        print(" ".join(f"{k}={v:.3g}" if isinstance(v, float) else f"{k}={v}" for k, v in values.items()), flush=True)


def product_cost(p: Any, results: Results, repeats: int) -> None:
    """Each repeat: one further whole-model product in units of a gradient, interleaved."""
    from hybridtheory import streams
    from hybridtheory.blocks import partition
    from hybridtheory.oracle import Oracle
    from tools import SEED, NextByte

    blocks = partition(p.net, "group")
    oracle = Oracle(p.net, NextByte(), p.batches(1), blocks)
    vector = [t for b in blocks for t in streams.rademacher(b, SEED, "bench")]
    with oracle.products(*blocks) as hess:
        hess(vector)  # the graph is built here
        for repeat in range(repeats):
            gradient, _ = timed(lambda: oracle.gradient(*blocks))
            product, _ = timed(lambda: hess(vector))
            results.add(section="product", repeat=repeat, gradient=gradient, product=product)


def unit(
    results: Results, section: str, point: int, repeat: int, work: dict[str, Callable[[], dict[str, Any]]]
) -> None:
    """Every tool once, in an order that rotates with the repeat; a unit that is complete already is left alone."""
    key = {"section": section, "point": point, "repeat": repeat}
    if all(results.has(tool=tool, **key) for tool in work):
        return
    names = list(work)
    shift = (point + repeat) % len(names)
    for tool in names[shift:] + names[:shift]:
        seconds, found = timed(work[tool])
        results.add(**key, tool=tool, **{"seconds": seconds, **found})


def moduli_unit(
    p: Any, prepared: Any, results: Results, section: str, point: int, repeat: int, tools: list[str]
) -> None:
    from tools import moduli

    truths, budgets = prepared[point]
    batches = 4 if section == "batches" else 1
    p.go(point)

    def work(tool: str) -> dict[str, Any]:
        found = moduli(tool, p, budgets, batches)
        return {"errors": [abs(abs(x) / t.modulus - 1) for x, t in zip(found, truths)]}

    unit(results, section, point, repeat, {t: lambda t=t: work(t) for t in ("ours", *tools)})


def rows_unit(p: Any, prepared: Any, results: Results, point: int, repeat: int, share: float, state: Any) -> None:
    from problem import LAYERS

    from tools import ROW, our_rows

    truths, budgets = prepared[point]
    p.go(point)

    def work(tool: str) -> dict[str, Any]:
        if tool == "ours":
            rows = our_rows(p, state.setdefault(repeat, {}), point)
        else:
            rows = [ROW[tool](p, i, b, max(2, round(b.vectors * share))) for i, b in zip(range(LAYERS), budgets)]
        return {
            "seconds": sum(r.seconds for r in rows),
            "ends_seconds": sum(r.ends_seconds for r in rows),
            "errors": [
                max(abs(r.lam_max / t.lam_max - 1), abs(r.lam_min / t.lam_min - 1)) for r, t in zip(rows, truths)
            ],
            "traces": [r.trace for r in rows],
            "vectors": [r.vectors for r in rows],
            "needed": [r.needed for r in rows],
            "sharp": [r.sharp for r in rows],
            "resolved": [r.resolved for r in rows],
        }

    unit(results, "row", point, repeat, {t: lambda t=t: work(t) for t in ("ours", *ROW)})


def peak(tool: str) -> dict[str, float]:
    """MiB: what one row of one layer block (ours: of all six, it shares the graph) adds to the loaded model and a gradient."""
    command = [sys.executable, str(HERE / "curvature.py"), "--memory-of", tool]
    run = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(run.stdout.splitlines()[-1])
    return found


def memory_of(tool: str) -> None:
    """A short row (no peak grows with the number of power iterations or of trace vectors beyond a few)."""
    from dataclasses import replace

    import torch
    from budgets import budgets
    from problem import problem, truth

    from probes.cost_memory import Meter
    from tools import ROW, our_rows

    p = problem()
    told = budgets(p, 0, truth(p, 0))[0]
    torch.nn.functional.cross_entropy(p.net(p.ids), p.targets).backward()
    p.net.zero_grad(set_to_none=False)  # the gradient stays
    meter = Meter(torch.device("cpu"))
    meter.reset()  # what made the problem may have taken more than what follows
    if tool == "ours":
        our_rows(p, {}, 0, most_vectors=8)
    elif tool != "gradient":
        ROW[tool](p, 0, replace(told, power=3, shifted=3), 8)
    added = meter.peak()
    print(json.dumps({"total": (meter.level + added) / 2**20, "added": added / 2**20}))


def measure(args: argparse.Namespace, results: Results) -> dict[str, Any]:
    from budgets import budgets
    from problem import problem, truth

    from tools import MODULUS, ROW

    wanted = set(args.only or SECTIONS)
    p = problem()
    prepared = {}
    for point in range(args.points):
        truths = truth(p, point)
        prepared[point] = truths, budgets(p, point, truths)
    p.go(0)
    if "product" in wanted and not results.has(section="product"):
        product_cost(p, results, max(7, args.repeats))
    if "memory" in wanted:
        for tool in ("gradient", "ours", *ROW):
            if not results.has(section="memory", tool=tool):
                results.add(section="memory", tool=tool, **peak(tool))
    state: dict[int, Any] = {}
    # Every point once before anything is repeated: a run that is stopped early has all points and fewer repeats.
    for repeat in range(args.repeats):
        for point in range(args.points):
            if "modulus" in wanted:
                moduli_unit(p, prepared, results, "modulus", point, repeat, list(MODULUS))
            if "row" in wanted and repeat < args.row_repeats:
                rows_unit(p, prepared, results, point, repeat, args.trace_share, state)
            if "batches" in wanted:
                moduli_unit(p, prepared, results, "batches", point, repeat, ["PyHessian"])
    return {"points": {k: [vars(t) for t in truths] for k, (truths, _) in prepared.items()}, "losses": p.losses}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=2, help="of every point's |λ|max")
    parser.add_argument(
        "--row-repeats", type=int, default=1, help="of every point's rows, whose ratios spread over the points"
    )
    parser.add_argument(
        "--trace-share",
        type=float,
        default=1.0,
        help="run this share of the public tools' trace vectors and charge for all of them: they cost the same, one by one",
    )
    parser.add_argument("--only", choices=SECTIONS, nargs="*")
    parser.add_argument("--resume", action="store_true", help="keep what --results holds and go on")
    parser.add_argument("--results", type=Path, default=CACHE / "curvature.jsonl", help="where measurements are kept")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    enter_environment()
    import torch
    from report import report

    torch.set_num_threads(1)
    if args.memory_of:
        memory_of(args.memory_of)
        return
    results = Results(args.results, args.resume)
    truths = measure(args, results)
    text, missed = report(results.found, truths)
    args.results.with_suffix(".md").write_text(text + "\n")
    print(text)
    sys.exit(1 if missed else 0)


def enter_environment() -> None:
    """Continue under the interpreter that sees the opponents, with one thread."""
    sys.path.insert(0, str(HERE))
    if os.environ.get("HYBRIDTHEORY_BENCH"):
        return
    from env import interpreter

    one = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    environment = {**os.environ, **one, "HYBRIDTHEORY_BENCH": "1", "HF_HUB_OFFLINE": "1"}
    python = str(interpreter())
    os.execve(python, [python, str(HERE / "curvature.py"), *sys.argv[1:]], environment)


if __name__ == "__main__":
    main()
