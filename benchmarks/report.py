"""Lines of runs/bench/curvature.jsonl -> the tables of the curvature benchmark, and which targets they miss."""

from __future__ import annotations

from statistics import median
from typing import Any

TARGETS = {
    "modulus": {"PyHessian": 1.5, "curvlinops": 4.0, "hessian-eigenthings, power": 8.0},
    "row": {"PyHessian": 2.0, "curvlinops": 4.0, "hessian-eigenthings, Lanczos": 4.0},
    "batches": {"PyHessian": 3.0},
}
TITLES = {
    "modulus": "|λ|max of every layer to 1 %, one batch",
    "row": "The whole row of every layer: both ends to 1 %, trace to 10 %",
    "batches": "|λ|max of every layer to 1 %, the rows in four batches",
}
PRODUCT_TARGET = 2.0  # gradients, for one further product of the whole model
WANTED_ERROR = 0.01


def report(found: list[dict[str, Any]], truths: dict[str, Any]) -> tuple[str, list[str]]:
    missed: list[str] = []
    lines = ["# Curvature benchmark", "", *product(found, missed)]
    for section in TITLES:
        lines += table(section, [f for f in found if f["section"] == section], truths, missed)
    lines += memory([f for f in found if f["section"] == "memory"])
    lines += [f"- missed: {m}" for m in missed] or ["All targets met."]
    return "\n".join(lines), missed


def product(found: list[dict[str, Any]], missed: list[str]) -> list[str]:
    ratios = sorted(f["product"] / f["gradient"] for f in found if f["section"] == "product")
    if not ratios:
        return []
    if median(ratios) > PRODUCT_TARGET:
        missed.append(f"one further product costs {median(ratios):.2f} gradients, wanted {PRODUCT_TARGET}")
    return [
        f"One further product of the whole model: {median(ratios):.2f} gradients ({spread(ratios)} in {len(ratios)} repeats; "
        f"wanted at most {PRODUCT_TARGET}).",
        "",
    ]


def spread(values: list[float]) -> str:
    return f"{min(values):.2f} to {max(values):.2f}"


def table(section: str, found: list[dict[str, Any]], truths: dict[str, Any], missed: list[str]) -> list[str]:
    """One row a tool; ratios are taken within a unit (point, repeat): their median is judged, all points together stand beside it."""
    if not found:
        return []
    ours = {(f["point"], f["repeat"]): f["seconds"] for f in found if f["tool"] == "ours"}
    ratio = "ours is faster by (median) | point by point | all points together"
    head = f"| tool | units | CPU s a point | {ratio} | wanted | largest error of an eigenvalue |"
    extra = " of these for the ends | trace: rms error | trace vectors a point |" if section == "row" else ""
    lines = [f"## {TITLES[section]}", "", head + extra, "|---" * (8 + 3 * (section == "row")) + "|"]
    for tool in dict.fromkeys(["ours", *sorted({f["tool"] for f in found})]):
        own = [f for f in found if f["tool"] == tool]
        seconds = [f["seconds"] for f in own]
        both = [(f["seconds"], ours[f["point"], f["repeat"]]) for f in own if (f["point"], f["repeat"]) in ours]
        ratios = [theirs / mine for theirs, mine in both]
        together = sum(theirs for theirs, _ in both) / sum(mine for _, mine in both) if both else 0.0
        wanted = TARGETS[section].get(tool)
        worst = max(max(f["errors"]) for f in own)
        cells = [tool, str(len(own)), f"{median(seconds):.1f}"]
        alone = tool == "ours" or not ratios
        cells += [""] * 3 if alone else [f"{median(ratios):.2f}", spread(ratios), f"{together:.2f}"]
        cells += [f"{wanted:g}" if wanted else "", f"{worst:.1e}"]
        if section == "row":
            run, needed = (median(sum(f[key]) for f in own) for key in ("vectors", "needed"))
            count = f"{needed:.0f}" if run == needed else f"{needed:.0f} ({run:.0f} run)"
            cells += [f"{median(f['ends_seconds'] for f in own):.1f}", traces(own, truths), count]
        lines.append("| " + " | ".join(cells) + " |")
        if wanted and ratios and median(ratios) < wanted:
            missed.append(f"{TITLES[section]}: {median(ratios):.2f} against {tool}, wanted {wanted:g}")
        if tool == "ours" and worst > WANTED_ERROR:
            missed.append(f"{TITLES[section]}: our largest eigenvalue error is {worst:.2g}, wanted {WANTED_ERROR}")
    return [*lines, "", *(unresolved(found, truths) if section == "row" else [])]


def traces(own: list[dict[str, Any]], truths: dict[str, Any]) -> str:
    """Root mean square of relative errors over the blocks whose reference is known to 10 %."""
    errors = [
        value / t["trace"] - 1
        for f in own
        for value, t in zip(f["traces"], truths["points"][f["point"]])
        if t["trace_stderr"] <= 0.1 * abs(t["trace"])
    ]
    return f"{(sum(e * e for e in errors) / len(errors)) ** 0.5:.3f} ({len(errors)} blocks)" if errors else ""


def unresolved(found: list[dict[str, Any]], truths: dict[str, Any]) -> list[str]:
    """What ours itself says, and how good the reference is."""
    ours = [f for f in found if f["tool"] == "ours"]
    blocks = sum(len(f["sharp"]) for f in ours)
    known = [t for point in truths["points"].values() for t in point if t["trace_stderr"] <= 0.1 * abs(t["trace"])]
    noise = (sum((t["trace_stderr"] / t["trace"]) ** 2 for t in known) / max(len(known), 1)) ** 0.5
    total = sum(len(point) for point in truths["points"].values())
    return [
        f"Ours states a standard error of at most 10 % for {sum(sum(f['sharp']) for f in ours)} of {blocks} traces and resolves "
        f"{sum(sum(f['resolved']) for f in ours)} of {blocks} rows by its own rules. The reference's traces are known to 10 % for "
        f"{len(known)} of {total} blocks, those to {noise:.1%} (rms).",
        "",
    ]


def memory(found: list[dict[str, Any]]) -> list[str]:
    if not found:
        return []
    lines = ["## Peak memory (MiB), resident", "", "| tool | total | added to model and gradient |", "|---|---|---|"]
    return [*lines, *(f"| {f['tool']} | {f['total']:.0f} | {f['added']:.0f} |" for f in found), ""]
