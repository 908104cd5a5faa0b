"""Figures of probe-convergence: measured over predicted descent, measured curves under their bounds, slack of every theorem."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from hybridtheory.theory.held import Evidence, hold
from probes import rundir
from probes.convergence_report import WORDS, all_of, seen
from probes.figures_style import BLUE, GREY, RED, colours, grid, log_axis, style, write
from probes.markdown import number
from probes.records import Record
from probes.records_convergence import Checked, Descent, Exponent

DIRECT = {
    "quadratic": ("o", "white", "Identity Q, infinitesimal"),
    "fitted": ("o", None, "finite scale, other directions"),
}


def drawn(records: Sequence[Record]) -> dict[str, Figure]:
    """All figures that the records have data for, by file name."""
    makers: dict[str, Callable[[Sequence[Record]], Figure | None]] = {
        "descent": descent,
        "bounds": bounds,
        "slack": slack,
    }
    with style():
        made = {name: make(records) for name, make in makers.items()}
    return {name: figure for name, figure in made.items() if figure is not None}


def save(records: Sequence[Record], folder: rundir.RunFolder) -> list[Path]:
    """figures/NAME.png and .pdf."""
    return write(drawn(records), folder)


def descent(records: Sequence[Record]) -> Figure | None:
    """Measured over predicted mean change of one step against the fraction of the rates; 1 is a prediction that came true."""
    found = all_of(records, Descent)
    kinds = [w for w in WORDS if any(d.what == w for d in found)]
    if not kinds:
        return None
    steps = sorted({d.step for d in found})
    palette = dict(zip(steps, colours(len(steps)), strict=True))
    figure, axes = grid(len(kinds), width=2.9, height=3.0, sharey=True)
    lowest, highest = 0.8, 1.2
    for ax, what in zip(axes, kinds):
        ax.axhspan(0.85, 1.15, color=BLUE, alpha=0.08, lw=0)
        ax.axhspan(0.9, 1.1, color=BLUE, alpha=0.10, lw=0)
        ax.axhline(1.0, color="black", lw=0.7)
        for k, step in enumerate(steps):
            for side, kind in ((-1, "quadratic"), (1, "fitted")):
                rows = [
                    (d, getattr(d, kind), getattr(d, f"{kind}_stderr"))
                    for d in found
                    if d.what == what and d.step == step
                ]
                rows = [(d, p, e) for d, p, e in rows if p != 0]
                # Beside each other, not on top: three points and two predictions share every fraction.
                x = [d.factor * math.exp(0.07 * side + 0.19 * (k - (len(steps) - 1) / 2)) for d, _, _ in rows]
                y = [d.measured / p for d, p, _ in rows]
                error = [2 * math.hypot(d.stderr, e) / abs(p) for d, p, e in rows]
                marker, fill, _ = DIRECT[kind]
                ax.errorbar(
                    x, y, yerr=error, fmt=marker, color=palette[step], mfc=fill or palette[step], ms=4, lw=0.9, zorder=3
                )
                lowest, highest = min([lowest, *y]), max([highest, *y])
        ax.set(xscale="log", title=WORDS[what], xlabel="fraction of the learning rates")
        ticks = sorted({d.factor for d in found})
        ax.set_xticks(ticks, [f"{t:g}" for t in ticks])
        ax.minorticks_off()
    axes[0].set_ylabel("measured / predicted\nmean change of the loss")
    axes[0].set_ylim(max(lowest - 0.08, -0.5), min(highest + 0.08, 2.5))
    handles: list[Any] = [
        Line2D([], [], ls="", marker=m, color="black", mfc=f or "black", label=label) for m, f, label in DIRECT.values()
    ]
    handles += [Line2D([], [], ls="", marker="s", color=palette[s], label=f"step {s}") for s in steps]
    handles += [Patch(color=BLUE, alpha=0.18, label="within 10 and 15 %")]
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
    return figure


def _until(e: Evidence, T: int) -> Evidence:
    """The first T steps."""
    cut = {name: getattr(e, name)[:, :T] for name in ("loss", "gx_sq", "gy_sq", "sigma_x_sq", "sigma_y_sq")}
    secant = None if e.secant is None else e.secant[:, : T - 1]
    return replace(e, **cut, slope_sq=None if e.slope_sq is None else e.slope_sq[:, :T], secant=secant)


def bounds(records: Sequence[Record]) -> Figure | None:
    """Running averages of the squared gradient, weighted as each theorem weighs them, under that theorem's bound for every T."""
    e = seen(records)
    if e is None or e.steps < 2:
        return None
    names = list(dict.fromkeys(c.name for c in all_of(records, Checked) if c.about == "bound" and c.bound is not None))
    figure, axes = grid(1 + len(names), width=3.2, height=2.8)
    _running(axes[0], e, records)
    at = sorted({int(t) for t in np.unique(np.round(np.geomspace(max(e.n, 1), e.steps, 16)))} - {0})
    for ax, name in zip(axes[1:], names):
        for i, claim in enumerate(c for c in hold(e, name) if "largest" not in c.claim):
            found = [(t, next((c for c in hold(_until(e, t), name) if c.claim == claim.claim), None)) for t in at]
            kept = [(t, c) for t, c in found if c is not None and c.bound is not None]
            colour = (BLUE, "black")[i % 2]
            label = "" if i == 0 else " (every run)" if "every run" in claim.claim else ""
            ax.plot(
                [t for t, _ in kept],
                [float(c.bound or 0.0) for _, c in kept],
                color=RED,
                ls=("-", "--")[i % 2],
                label=f"bound{label}",
            )
            ax.plot(
                [t for t, _ in kept],
                [c.measured for _, c in kept],
                color=colour,
                marker="o",
                ms=3,
                label=f"measured{label}",
            )
        ax.set(xscale="log", yscale="log", xlabel="steps T", title=f"Theorem {name}")
        broken = any(c.name == name and c.holds is None for c in all_of(records, Checked))
        if broken:
            ax.text(0.03, 0.03, "a hypothesis does not hold", transform=ax.transAxes, fontsize=7, color=GREY)
        log_axis(ax.xaxis)
        log_axis(ax.yaxis)
        ax.legend(loc="upper right")
    axes[0].set_ylabel("running average of " + r"$\|\nabla f\|^2$")
    if names:
        axes[1].set_ylabel("weighted running average")
    return figure


def _running(ax: Axes, e: Evidence, records: Sequence[Record]) -> None:
    steps = np.arange(1, e.steps + 1)
    average = np.cumsum(e.gx_sq + e.gy_sq, axis=1) / steps
    for row in average:
        ax.plot(steps, row, color=BLUE, lw=0.8, alpha=0.7)
    exponents = all_of(records, Exponent)
    if exponents:
        f = exponents[-1]
        span = np.array([f.start, e.steps])
        middle = float(np.exp(np.log(average[:, f.start - 1 :]).mean()))
        centre = math.exp(float(np.log(steps[f.start - 1 :]).mean()))
        ax.plot(
            span, middle * (span / centre) ** f.value, color="black", lw=1.2, ls="--", label=f"$T^{{{f.value:.2f}}}$"
        )
        ax.legend(loc="upper right")
    ax.set(xscale="log", yscale="log", xlabel="steps T", title=f"{len(average)} runs, both blocks")
    log_axis(ax.xaxis)
    log_axis(ax.yaxis)


def slack(records: Sequence[Record]) -> Figure | None:
    """bound/measured of every claim whose hypotheses hold; for the others by what factor their worst hypothesis fails."""
    found = [c for c in all_of(records, Checked) if c.about == "bound"]
    if not found:
        return None
    figure = Figure(figsize=(6.4, 0.9 + 0.42 * len(found)))
    ax = figure.subplots()
    longest = 1.0
    for y, c in enumerate(found):
        failed = [h for h in c.hypotheses if not h.holds and not math.isnan(h.factor)]
        if c.holds is not None and c.slack is not None:
            longest = max(longest, c.slack)
            ax.barh(y, c.slack, left=0, color=BLUE if c.holds else RED, height=0.6)
            ax.text(c.slack * 1.15, y, number(c.slack, 2), va="center", fontsize=7.5)
        elif failed:
            worst = max(failed, key=lambda h: h.factor)
            longest = max(longest, worst.factor)
            ax.barh(y, worst.factor, color="0.85", height=0.6, hatch="///", edgecolor="0.6", lw=0.5)
            ax.text(
                worst.factor * 1.15, y, f"{worst.name}: {number(worst.factor, 2)} times off", va="center", fontsize=7
            )
        else:
            ax.text(1.15, y, (c.note or "does not apply here")[:80], va="center", fontsize=7, color=GREY)
    ax.axvline(1.0, color="black", lw=0.8)
    ax.set(xscale="log", xlabel="bound / measured  (hatched: factor by which a hypothesis fails)")
    ax.set_yticks(range(len(found)), [c.claim.split(":")[0].removeprefix("Theorem ") + _which(c.claim) for c in found])
    ax.set_ylim(len(found) - 0.4, -0.6)
    widest = max(10.0, longest)
    # Room for the words beside the longest bar: two thirds of the axis are bars.
    ax.set_xlim(0.5, widest**1.6 * 10)
    log_axis(ax.xaxis)
    ax.grid(axis="y", visible=False)
    return figure


def _which(claim: str) -> str:
    return ", f - f*" if "largest f" in claim else ", |g|" if "largest |g|" in claim else ""
