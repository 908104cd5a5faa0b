"""How far `difference` and `forward` are from `exact`, on tiny models of every architecture, and how often their intervals cover it.

    python benchmarks/engines.py --rows ROWS.jsonl [--seeds 7] [--dtype float32] [ARCHITECTURE ...]
    python benchmarks/engines.py --rows ROWS.jsonl --report docs/reports/engines.md

A row is an architecture, a block and a seed (weights of their own). The exact number of a row is taken on the same vectors with the
same weights in float64 (float32 where the model does not run in float64): v'Hv at the same two Ritz vectors, the trace of the same
probe vectors.
"own" sets lambda_max beside the exact engine's own Lanczos run from the same start.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from tiny_models import CONFIGS, save

from hybridtheory import extrapolation, forward, lanczos, streams, traces
from hybridtheory.blocks import Block, partition
from hybridtheory.difference import Differences
from hybridtheory.oracle import Oracle
from hybridtheory.vectors import dot
from probes.tasks import load_task

TEXTS = ["the film was a warm story", "it was dull", "a terrible plot, and no good actor in the scene", "great"]
# ReLU: the Hessian almost everywhere and curvature at a scale are different numbers. Mixtral's routing jumps.
KINKED = ("opt", "t5", "mixtral")
STEPS, VECTORS = 10, 4


@dataclass(frozen=True)
class Row:
    architecture: str
    block: str
    seed: int
    dtype: str
    quantity: str
    exact: float
    found: float
    halfwidth: float
    own: float | None = None
    scale: float = 0.0  # the block's largest |lambda|: what a trace that cancels is small beside

    @property
    def error(self) -> float:
        return abs(self.found - self.exact) / max(abs(self.exact), 1e-300)

    @property
    def covered(self) -> bool:
        return abs(self.found - self.exact) <= self.halfwidth


def moved(model: torch.nn.Module, seed: int) -> None:
    """Weights of their own for every seed: a tenth of each tensor's spread is added."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            spread = float(p.float().std()) if p.numel() > 1 else 0.0
            p.add_((max(spread, 0.1) * 0.1 * torch.randn(p.shape, generator=draw)).to(p.dtype))


def tasks(name: str, folder: Path, dtype: str) -> tuple[Any, Any]:
    data = folder / "films.jsonl"
    data.write_text("\n".join(json.dumps({"text": t, "label": i % 2}) for i, t in enumerate(TEXTS)))
    save(name, folder / name)

    def load(kind: str) -> Any:
        return load_task(
            folder / name, data, peft="lora", rank=2, rows=3, labels=("terrible", "great"), template="{text} it was", dtype=kind
        )  # fmt: skip

    return load(dtype), load("float32" if name == "mixtral" else "float64")


def measure(name: str, seed: int, dtype: str, task: Any, wide: Any, only: str | None) -> list[Row]:
    moved(task.model, seed)
    with torch.no_grad():
        for p, q in zip(wide.model.parameters(), task.model.parameters(), strict=True):
            q_ = q.to(p.dtype)
            p.copy_(q_)
    blocks, widened = (partition(t.model, "group", t.is_peft, t.base, t.peft_info) for t in (task, wide))
    found = []
    for block, reference in zip(blocks, widened, strict=True):
        if only != "forward":
            found += differences(name, seed, dtype, task, wide, block, reference)
        if only != "difference":
            found.append(values(name, seed, dtype, task, wide, block, reference))
    return found


def oracle(of: Any, block: Block, engine: str) -> Oracle:
    return Oracle(of.model, of.objective, of.batches(3), [block], engine=engine)


def values(name: str, seed: int, dtype: str, task: Any, wide: Any, block: Block, reference: Block) -> Row:
    """The trace by values alone, beside z'Hz of the same vectors."""
    found, _ = forward.trace(oracle(task, block, "forward"), block, seed, VECTORS)
    kind, exact = reference.tensors[0].dtype, []
    with oracle(wide, reference, "exact").products(reference) as hess:
        for number in range(VECTORS):
            z = [t.to(kind) for t in streams.rademacher(block, seed, "trace", 0, number)]
            exact.append(dot(z, hess(z)))
    assert found.numerical is not None
    mean = float(np.mean(exact))
    return Row(name, block.name, seed, dtype, "trace, forward", mean, found.value, found.numerical)


def differences(name: str, seed: int, dtype: str, task: Any, wide: Any, block: Block, reference: Block) -> list[Row]:
    options: dict[str, Any] = {"max_steps": STEPS, "tol": 1e-3}
    with oracle(task, block, "difference").products(block) as hess:
        assert isinstance(hess, Differences)
        ends = extrapolation.spectrum(hess, block, seed, **options)
        trace = extrapolation.traces(hess, [block], seed, beside=ends, max_vectors=VECTORS, pilot=VECTORS)[block.name]
    own = None
    if dtype == "float32":
        with oracle(task, block, "exact").products(block) as hess:
            own = lanczos.spectrum(hess, block, seed, **options)
    kind = reference.tensors[0].dtype
    with oracle(wide, reference, "exact").products(reference) as hess:
        shapes = [t.shape for t in reference.tensors]
        assert ends.beside.basis is not None
        basis = [rows.to(kind) for rows in ends.beside.basis]
        vectors = [[rows[k].view(s) for rows, s in zip(basis, shapes, strict=True)] for k in (0, 1)]
        low, high = (dot(v, hess(v)) for v in vectors)
        beside = replace(ends.beside, basis=basis, alphas=np.array([low, high]), forms=None)
        same = traces.traces(hess, [reference], seed, beside=beside, max_vectors=VECTORS, pilot=VECTORS)[block.name]
    scale = max(abs(low), abs(high))
    run = ends.run

    def row(quantity: str, exact: float, found: Any, beside: float | None = None) -> Row:
        return Row(name, block.name, seed, dtype, quantity, exact, found.value, found.numerical, beside, scale)

    return [
        row("lambda_max", high, run.lam_max, own.lam_max.value if own else None),
        row("lambda_min", low, run.lam_min, own.lam_min.value if own else None),
        row("trace", same.trace.value, trace.trace),
    ]


def text(rows: list[Row]) -> str:
    """The report: coverage and errors by quantity, then the worst rows of each architecture."""
    scored = [r for r in rows if r.architecture not in KINKED]
    count = len({(r.architecture, r.block, r.seed, r.dtype) for r in scored})
    lines = [
        "# Engines beside each other", "",
        f"`difference` and `forward` against `exact` on {count} rows (architecture x block x seed) of tiny random models, LoRA, "
        f"{STEPS} Lanczos steps, {VECTORS} vectors a trace. Made by `benchmarks/engines.py`, which says what is compared.", "",
        "| dtype | quantity | rows | inside the 95 % interval | median relative error | 95th percentile | largest | above the target | "
        "largest, relative to the larger of itself and the largest eigenvalue |",
        "|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for dtype in sorted({r.dtype for r in scored}):
        target = 1e-3 if dtype == "float32" else 5e-2
        pooled = [r for r in scored if r.dtype == dtype and r.quantity != "trace, forward"]
        for quantity in ("lambda_max", "lambda_min", "trace", "trace, forward"):
            of = [r for r in scored if r.dtype == dtype and r.quantity == quantity]
            if not of:
                continue
            errors = np.array([r.error for r in of])
            beside = [abs(r.found - r.exact) / max(abs(r.exact), r.scale) for r in of if r.scale]
            lines.append(
                f"| {dtype} | {quantity} | {len(of)} | {np.mean([r.covered for r in of]):.1%} | {np.median(errors):.1e} | "
                f"{np.quantile(errors, 0.95):.1e} | {errors.max():.1e} | {(errors > target).sum()} | "
                + (f"{max(beside):.1e} |" if beside else "- |")
            )
        lines.append(
            f"| {dtype} | `difference`, all three | {len(pooled)} | {np.mean([r.covered for r in pooled]):.1%} | | | | | |"
        )
    own = [abs(r.found - r.own) / abs(r.own) for r in scored if r.own is not None]
    if own:
        lines += [
            "",
            f"Beside the exact engine's own Lanczos run from the same start: median {np.median(own):.1e}, largest {max(own):.1e}.",
        ]
    lines += ["", "## By architecture (largest relative error)", ""]
    names = ("lambda_max", "lambda_min", "trace", "trace, forward")
    lines += ["| architecture | block | rows | " + " | ".join(names) + " | inside |", "|---" * 8 + "|"]
    for name, block in sorted({(r.architecture, r.block) for r in rows if r.dtype == "float32"}):
        of = [r for r in rows if (r.architecture, r.block, r.dtype) == (name, block, "float32")]
        worst = [max((r.error for r in of if r.quantity == q), default=math.nan) for q in names]
        mark = " (kinked or jumping: not scored)" if name in KINKED else ""
        inside = "-" if mark else f"{sum(r.covered for r in of)} of {len(of)}"
        seeds = len({r.seed for r in of})
        lines.append(
            f"| {name}{mark} | {block} | {seeds} | " + " | ".join(f"{w:.1e}" for w in worst) + f" | {inside} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("architectures", nargs="*", default=list(CONFIGS))
    parser.add_argument("--seeds", type=int, default=7)
    parser.add_argument("--first", type=int, default=0, help="the first seed to measure")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--only", choices=("difference", "forward"), help="measure one engine")
    parser.add_argument("--rows", type=Path, required=True, help="append the rows to this JSON-lines file")
    parser.add_argument("--report", type=Path, help="measure nothing: write this report from the rows")
    given = parser.parse_args()
    if given.report:
        given.report.write_text(text([Row(**json.loads(line)) for line in given.rows.read_text().splitlines()]))
        return
    started = time.perf_counter()
    for name in given.architectures:
        with tempfile.TemporaryDirectory() as folder:
            task, wide = tasks(name, Path(folder), given.dtype)
            for seed in range(given.first):
                moved(task.model, seed)
            for seed in range(given.first, given.seeds):
                found = measure(name, seed, given.dtype, task, wide, given.only)
                with given.rows.open("a") as file:
                    file.writelines(json.dumps(asdict(row)) + "\n" for row in found)
        print(f"{name}: {time.perf_counter() - started:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
