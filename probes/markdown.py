"""Numbers, tables and sections that every report shares, as Markdown. A number that is not resolved says so in words at the number."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from hybridtheory.estimate import Estimate
from probes.records import Cost
from probes.records_parts import Interval
from probes.records_smoothness import Rate

if TYPE_CHECKING:
    from probes.report import Report


def number(x: float | None, digits: int = 3) -> str:
    """A float for people: three digits, plain between 0.001 and 100000, powers of ten outside."""
    if x is None:
        return "–"
    if not math.isfinite(x):
        return {math.inf: "∞", -math.inf: "-∞"}.get(x, "nan")
    if x == 0:
        return "0"
    if 1e-3 <= abs(x) < 1e5:
        decimals = max(0, digits - 1 - math.floor(math.log10(abs(x))))
        return f"{x:,.{decimals}f}"
    mantissa, exponent = f"{x:.{digits - 1}e}".split("e")
    return f"{mantissa}e{int(exponent)}"  # an ASCII minus: such numbers get copied into configurations


def count(x: float) -> str:
    return f"{x:,.0f}"


def interval(ends: Interval | None) -> str:
    return "–" if ends is None else f"{number(ends[0])} to {number(ends[1])}"


def estimate(e: Estimate | None) -> str:
    """Value with its standard error; what is not resolved says so."""
    if e is None:
        return "–"
    text = number(e.value) + (f" ± {number(e.stderr, 2)}" if e.stderr is not None else "")
    if e.lower is not None and e.upper is not None:
        text = f"{number(e.value)} ({number(e.lower, 2)} to {number(e.upper, 2)})"
    return text if e.resolved else f"{text} (**not resolved**)"


def rate(r: Rate | None) -> str:
    """Value and interval of a rate; a rule that cannot give one shows a dash."""
    if r is None or r.value is None:
        return "–"
    return number(r.value) + (f" ({interval(r.interval)})" if r.interval else "")


def percent(x: float | None) -> str:
    return "–" if x is None else f"{100 * x:.0f} %"


def seconds(s: float) -> str:
    if s < 100:
        return f"{s:.0f} s" if s >= 10 else f"{s:.1f} s"
    minutes = s / 60
    return f"{minutes:.0f} min" if minutes < 100 else f"{minutes / 60:.1f} h"


def memory(b: float) -> str:
    return f"{b / 2**30:.1f} GiB" if b >= 2**30 else f"{b / 2**20:.0f} MiB"


def cell(text: str) -> str:
    """Text that cannot break out of a table: a block's name may be a regex with | in it."""
    return " ".join(str(text).split()).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    body = ["| " + " | ".join(cell(c) for c in row) + " |" for row in rows]
    if not body:
        return []
    return ["| " + " | ".join(head) + " |", "|" + "---|" * len(head), *body, ""]


def warnings(report: Report) -> list[str]:
    if not report.warnings:
        return []
    return [
        "## Read this before using the numbers",
        "",
        *(f"- {'' if w.text.startswith(w.about) else f'{w.about}: '}{w.text}" for w in report.warnings),
        "",
    ]


def cost(report: Report) -> list[str]:
    costs: dict[str, Cost | None] = {phase: report.cost(phase) for phase in ("estimated", "actual")}
    rows = [
        [phase, count(c.gradients), count(c.products), count(c.values), seconds(c.seconds), memory(c.memory_bytes)]
        for phase, c in costs.items()
        if c is not None
    ]
    return (
        ["## Cost", "", *table(["", "gradients", "products", "forward passes", "time", "peak memory"], rows)]
        if rows
        else []
    )


def repeat(report: Report) -> list[str]:
    head = report.header
    versions = ", ".join(f"{k} {v}" for k, v in head.versions.items())
    return [
        "## To repeat it",
        "",
        *(["```", shlex.join(head.argv), "```", ""] if head.argv else []),
        f"Seed {head.seed}, {head.threads} threads{f', {versions}' if versions else ''}{f', commit {head.git[:12]}' if head.git else ''}.",
        f"Weights sha256 `{head.model.sha256[:16]}…`, data sha256 `{head.data.sha256[:16]}…`.",
        "Every number above is in `report.json`, every measurement in `records.jsonl`; "
        "`probes.report.Report.load(FOLDER).frames()` gives them as pandas tables.",
        "",
    ]
