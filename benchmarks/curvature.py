"""Curvature of a small GPT-2, side by side with three public tools: time, error and peak memory, all from one run.

    python benchmarks/curvature.py            # make bench; installs the opponents into .venv-bench first
    python benchmarks/curvature.py --points 1 --repeats 1      # a shorter look

One thread. Times are CPU seconds of the process (on a shared machine the wall clock measures the neighbours). The tools take turns
within every repeat, and a ratio is the median over repeats of ratios within one repeat. "Error" is against the converged reference of
problem.py; the reference's traces carry a standard error of their own, which is printed. Writes runs/bench/curvature.md and ends with
an error if a target is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).resolve().parent
OPPONENTS = ("PyHessian", "curvlinops", "hessian-eigenthings")
TARGETS = {
    "|λ|max": {"PyHessian": 1.5, "curvlinops": 4.0, "hessian-eigenthings": 8.0},
    "row": {"PyHessian": 2.0, "curvlinops": 4.0, "hessian-eigenthings": 4.0},
    "batches": {"PyHessian": 3.0},
}
PRODUCT_TARGET = 2.0  # gradients, for one further product of the whole model


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.process_time()
    result = work()
    return time.process_time() - start, result


def product_cost(p: Any, repeats: int) -> list[float]:
    """Each repeat: one further whole-model product in units of a gradient."""
    from hybridtheory import streams
    from hybridtheory.blocks import partition
    from hybridtheory.oracle import Oracle
    from tools import SEED, NextByte

    blocks = partition(p.net, "group")
    oracle = Oracle(p.net, NextByte(), p.batches(1), blocks)
    vector = [t for b in blocks for t in streams.rademacher(b, SEED, "bench")]
    ratios = []
    with oracle.products(*blocks) as hess:
        hess(vector)  # the graph is built here
        for _ in range(repeats):
            gradient, _ = timed(lambda: oracle.gradient(*blocks))
            product, _ = timed(lambda: hess(vector))
            ratios.append(product / gradient)
    return ratios


def moduli_section(
    p: Any, truths: Any, repeats: int, batches: int, tools: tuple[str, ...]
) -> dict[str, dict[str, Any]]:
    from tools import budgets_of, moduli

    budgets = {t: budgets_of(t, p, 0, truths[0], row=False) for t in tools}
    p.go(0)
    result: dict[str, dict[str, Any]] = {t: {"seconds": []} for t in ("ours", *tools)}
    for _ in range(repeats):
        for tool in result:
            seconds, found = timed(lambda tool=tool: moduli(tool, p, budgets.get(tool, []), batches))
            result[tool]["seconds"].append(seconds)
            result[tool]["errors"] = [abs(abs(x) / t.modulus - 1) for x, t in zip(found, truths[0])]
            say(f"  {tool}: {seconds:.1f} s, largest error {max(result[tool]['errors']):.1e}")
    return result


def rows_section(
    p: Any, truths: Any, points: list[int], repeats: int, tools: tuple[str, ...]
) -> dict[str, dict[str, Any]]:
    from problem import LAYERS

    from tools import ROW, budgets_of, our_rows

    budgets = {t: [budgets_of(t, p, point, truths[point], row=True) for point in points] for t in tools}
    result: dict[str, dict[str, Any]] = {t: {"seconds": []} for t in ("ours", *tools)}

    def theirs(tool: str) -> list[Any]:
        rows = []
        for point in points:
            p.go(point)
            rows.append([ROW[tool](p, i, budgets[tool][point][i]) for i in range(LAYERS)])
        return rows

    for _ in range(repeats):
        for tool in result:
            seconds, rows = timed(lambda tool=tool: our_rows(p, points) if tool == "ours" else theirs(tool))
            pairs = [(r, t) for at, point in zip(rows, points) for r, t in zip(at, truths[point])]
            result[tool]["seconds"].append(seconds)
            result[tool]["errors"] = [
                max(abs(r.lam_max / t.lam_max - 1), abs(r.lam_min / t.lam_min - 1)) for r, t in pairs
            ]
            result[tool]["trace"] = (sum((r.trace / t.trace - 1) ** 2 for r, t in pairs) / len(pairs)) ** 0.5
            say(
                f"  {tool}: {seconds:.1f} s, ends {max(result[tool]['errors']):.1e}, trace rms {result[tool]['trace']:.2f}"
            )
    return result


def peak(tool: str) -> dict[str, float]:
    """MiB: what one row of one layer block (ours: of all six, it shares the graph) adds to the loaded model and a gradient."""
    command = [sys.executable, str(HERE / "curvature.py"), "--memory-of", tool]
    run = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(run.stdout.splitlines()[-1])
    return found


def memory_of(tool: str) -> None:
    import torch

    from tools import ROW, budgets_of, our_rows

    p, truths = prepared([0])
    torch.nn.functional.cross_entropy(p.net(p.ids), p.targets).backward()
    p.net.zero_grad()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if tool == "ours":
        our_rows(p, [0])
    elif tool != "gradient":
        ROW[tool](p, 0, budgets_of(tool, p, 0, truths[0], row=True)[0])
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"total": after / 1024, "added": (after - before) / 1024}))


def prepared(points: list[int]) -> tuple[Any, dict[int, Any]]:
    import torch
    from problem import problem, truth

    torch.set_num_threads(1)
    p = problem()
    truths = {point: truth(p, point) for point in points}
    p.go(points[0])
    return p, truths


def table(title: str, section: dict[str, dict[str, Any]], targets: dict[str, float], missed: list[str]) -> list[str]:
    lines = [
        f"## {title}",
        "",
        "| tool | CPU s | ours is faster by | wanted | largest error of an eigenvalue | trace, rms error |",
    ]
    lines.append("|---|---|---|---|---|---|")
    ours = section["ours"]["seconds"]
    for tool, found in section.items():
        ratio = median(theirs / mine for theirs, mine in zip(found["seconds"], ours))
        wanted = targets.get(tool)
        if wanted and ratio < wanted:
            missed.append(f"{title}: {ratio:.2f} against {tool}, wanted {wanted}")
        lines.append(
            f"| {tool} | {median(found['seconds']):.1f} | {'' if tool == 'ours' else f'{ratio:.2f}'} | {wanted or ''} "
            f"| {max(found['errors']):.1e} | {format(found['trace'], '.3f') if 'trace' in found else ''} |"
        )
    if max(section["ours"]["errors"]) > 0.01:
        missed.append(f"{title}: our largest eigenvalue error is {max(section['ours']['errors']):.2g}, wanted 0.01")
    return [*lines, ""]


def say(line: str) -> None:
    print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", choices=["product", "modulus", "row", "batches", "memory"], nargs="*")
    parser.add_argument(
        "--tools", choices=OPPONENTS, nargs="*", default=list(OPPONENTS), help="fewer opponents: a shorter look"
    )
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    enter_environment()
    if args.memory_of:
        memory_of(args.memory_of)
        return
    wanted = set(args.only or ["product", "modulus", "row", "batches", "memory"])
    points = list(range(args.points))
    say("reference answers")
    p, truths = prepared(points)
    missed: list[str] = []
    lines = ["# Curvature benchmark", "", f"Blocks: the {len(truths[0])} layers; loss at the points: {p.losses}.", ""]
    if "product" in wanted:
        ratios = product_cost(p, max(5, args.repeats))
        lines += [
            f"One further product of the whole model: {median(ratios):.2f} gradients (wanted <= {PRODUCT_TARGET}).",
            "",
        ]
        if median(ratios) > PRODUCT_TARGET:
            missed.append(f"one further product costs {median(ratios):.2f} gradients")
    if "modulus" in wanted:
        say("|λ|max of every layer")
        section = moduli_section(p, truths, args.repeats, 1, tuple(args.tools))
        lines += table("|λ|max to 1 % of every layer, one batch", section, TARGETS["|λ|max"], missed)
    if "batches" in wanted:
        say("|λ|max of every layer, four batches")
        section = moduli_section(p, truths, args.repeats, 4, ("PyHessian",))
        lines += table("|λ|max to 1 % of every layer, four batches", section, TARGETS["batches"], missed)
    if "row" in wanted:
        say(f"whole rows at {args.points} points")
        section = rows_section(p, truths, points, args.repeats, tuple(args.tools))
        noise = [(t.trace_stderr / t.trace) ** 2 for point in points for t in truths[point]]
        lines += [
            f"The reference's own traces: relative standard error {(sum(noise) / len(noise)) ** 0.5:.3f} (rms).",
            "",
        ]
        lines += table(f"whole rows at {args.points} points of a run", section, TARGETS["row"], missed)
    if "memory" in wanted:
        lines += [
            "## Peak memory (MiB), resident",
            "",
            "| tool | total | added to model and gradient |",
            "|---|---|---|",
        ]
        for tool in ("gradient", "ours", *args.tools):
            found = peak(tool)
            lines.append(f"| {tool} | {found['total']:.0f} | {found['added']:.0f} |")
        lines.append("")
    lines += [f"- missed: {m}" for m in missed] or ["All targets met."]
    report = "\n".join(lines)
    from problem import CACHE

    (CACHE / "curvature.md").write_text(report + "\n")
    say(report)
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
