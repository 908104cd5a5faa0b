"""Report -> figures, as PNG and PDF: each shows numbers that report.md states, with their errors.

Every function takes a Report and returns a matplotlib Figure, or None where the run did not measure what it shows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from probes.figures_points import density, displacement, finite_scale, largest_blocks, spectrum
from probes.figures_style import BLUE, GREEN, GREY, ORANGE, PINK, RED, grid, half_widths, log_axis, short, style, write
from probes.markdown import number
from probes.records_smoothness import Rate

if TYPE_CHECKING:
    from probes.report import Report
    from probes.rundir import RunFolder

MOVES = {"gradient": ("o", BLUE), "trajectory": ("P", GREEN), "random": ("s", ORANGE), "joint": ("^", PINK)}
SPECTRUM = r"spectrum: $\max|\lambda|$ and its bound"
FIT_LABELS, UNIDENTIFIED = {"envelope": "upper envelope", "quantile": "quantile fit"}, "$L_1$ not identified"
FITS = {FIT_LABELS["envelope"]: ("black", "-"), FIT_LABELS["quantile"]: ("black", "--"), UNIDENTIFIED: (GREY, ":")}
RULES = {"worst_case": "worst case\n(dimension)", "measured": "measured\n(trace)", "noise_limited": "noise-limited"}
RULES |= {"finite_scale": "finite scale\n(forward passes)", "tail": "tail of a step"}
WHERE = (("white", "first point"), ("black", "whole run"))


def drawn(report: Report) -> dict[str, Figure]:
    """All figures that the run has data for, by file name without suffix."""
    makers: Mapping[str, Callable[[Report], Figure | None]] = {
        "learning_rates": learning_rates,
        "smoothness": smoothness,
        "spectrum": spectrum,
        "density": density,
        "displacement": displacement,
        "finite_scale": finite_scale,
    }
    if report.header.probe == "estimators":
        from probes import figures_estimators

        makers = figures_estimators.MAKERS
    if report.header.probe == "cost":
        from probes import figures_cost

        makers = figures_cost.MAKERS
    with style():
        made = {name: make(report) for name, make in makers.items()}
    return {name: figure for name, figure in made.items() if figure is not None}


def save(report: Report, folder: RunFolder) -> list[Path]:
    """figures/NAME.png and figures/NAME.pdf in the run folder."""
    return write(drawn(report), folder)


def smoothness(report: Report) -> Figure | None:
    """Local smoothness against the norm of the full gradient, with the fits, one panel per block."""
    names = [n for n in largest_blocks(report) if any(s.block == n for s in report.secants) or report.points]
    names += sorted({s.block for s in report.secants} - {b.name for b in report.blocks})  # "all": the run's own moves
    if not names:
        return None
    figure, axes = grid(len(names), height=2.7)
    sizes = {b.name: f"{short(b.name)}  (d = {b.d:,})" for b in report.blocks}
    for ax, name in zip(axes, names):
        values = secant_points(ax, report, name) + spectral_points(ax, report, name)
        ax.set(xscale="log", yscale="log", title=sizes.get(name, "all weights, along the run"))
        if values:
            fit_lines(ax, report, name, [u for u, _ in values])
            low, high = min(v for _, v in values), max(v for _, v in values)
            ax.set_ylim(low / 2.2, high * 2.2)
        log_axis(ax.xaxis)
        log_axis(ax.yaxis)
    for ax in axes[:: max(1, len(axes) // math.ceil(len(axes) / 3))]:
        ax.set_ylabel("local smoothness $L$")
    for ax in axes[-3:]:
        ax.set_xlabel(r"gradient norm $\Vert\nabla f\Vert$ (all weights)")
    seen = {label for ax in axes for label in ax.get_legend_handles_labels()[1]}
    handles = [
        *(
            Line2D([], [], ls="", marker=m, color=c, ms=4, alpha=0.7, label=f"secant, {w}")
            for w, (m, c) in MOVES.items()
        ),
        Line2D([], [], ls="", marker="D", mfc="none", color="black", ms=4.5, label=SPECTRUM),
        *(Line2D([], [], color=c, ls=ls, label=label) for label, (c, ls) in FITS.items()),
    ]
    handles = [handle for handle in handles if handle.get_label() in seen]
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
    return figure


def secant_points(ax: Axes, report: Report, name: str) -> list[tuple[float, float]]:
    values = []
    for move, (marker, colour) in MOVES.items():
        found = [s for s in report.secants if s.block == name and s.move == move]
        pairs = [(s.grad_norm, s.L_block if s.L_block is not None else s.L) for s in found]
        kept = [(u, L) for u, L in pairs if L is not None and u > 0 and L > 0 and math.isfinite(u * L)]
        if kept:
            ax.scatter(
                [u for u, _ in kept],
                [L for _, L in kept],
                marker=marker,
                s=15,
                color=colour,
                alpha=0.7,
                linewidths=0,
                zorder=2,
                label=f"secant, {move}",
            )
        values += kept
    return values


def spectral_points(ax: Axes, report: Report, name: str) -> list[tuple[float, float]]:
    values = []
    for p in report.points:
        block = p.blocks.get(name)
        ends = [
            e for e in ((block.lam_max, block.lam_min) if block else ()) if e is not None and math.isfinite(e.value)
        ]
        if not ends or p.grad_norm <= 0:
            continue
        L = max(abs(e.value) for e in ends)
        bound = max([abs(e.upper) for e in ends if e.upper is not None] + [L])
        if L > 0:
            ax.errorbar(
                p.grad_norm,
                L,
                yerr=[[0.0], [bound - L]],
                fmt="D",
                mfc="none",
                color="black",
                lw=0.9,
                zorder=3,
                label=SPECTRUM,
            )
            values += [(p.grad_norm, L), (p.grad_norm, bound)]
    return values


def fit_lines(ax: Axes, report: Report, name: str, norms: Sequence[float]) -> None:
    """Envelope and quantile fit in the full gradient's norm, over the norms that were seen and no further."""
    u = np.geomspace(min(norms), max(norms), 100)
    notes = []
    for f in report.fits:
        if f.block != name or f.argument != "full" or (f.data == "spectral" and f.method == "quantile"):
            continue
        if f.data == "spectral" and any(g.data == "secant" and g.block == name for g in report.fits):
            continue  # its points are drawn; its line, from a handful of points, stands in the table
        label = FIT_LABELS[f.method] if f.identified else UNIDENTIFIED
        colour, line = FITS[label]
        ax.plot(u, f.L0 + f.L1 * u, ls=line, color=colour, zorder=4, lw=1.1, label=label)
        if f.method == "envelope":
            told = f"$L_0$ = {number(f.L0)}, $L_1$ = {number(f.L1)}"
            notes.append(told if f.identified else f"$L_1$ not identified: norms span a factor {number(f.span, 2)}")
    if notes:
        box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1.5}
        ax.text(0.03, 0.97, notes[0], transform=ax.transAxes, va="top", fontsize=7.5, bbox=box, zorder=5)


def learning_rates(report: Report) -> Figure | None:
    """What each rule recommends, worst case beside measured, at the first point (hollow) and over the run (filled)."""
    rules = [r for r in RULES if report.rates(r) is not None]
    panels = [g for g in ("base", "peft", "ratio") if any(value_of(report.rate(r, g)) for r in rules)]
    if not panels:
        return None
    figure = Figure(figsize=(1.1 + 2.75 * len(panels), 0.9 + 0.5 * len(rules) + 0.5))
    axes = np.asarray(figure.subplots(1, len(panels), squeeze=False, sharey=True))[0]
    several = len(report.points) > 1
    titles = {
        "base": r"$\eta$ base (zeroth-order)",
        "peft": r"$\eta$ PEFT (first-order)",
        "ratio": r"ratio $\eta$ PEFT / $\eta$ base",
    }
    for ax, group in zip(axes, panels):
        for y, rule in enumerate(rules):
            colour = RED if rule == "worst_case" else BLUE
            both = (("first", -0.15, "white"), ("envelope", 0.15, colour))
            for where, offset, fill in both if several else (("envelope", 0.0, colour),):
                rates = report.rates(rule, where)
                rate = report.rate(rule, group, where)
                value = value_of(rate)
                if rate is None or not value or rates is None or rates.where != where:
                    continue
                bars = half_widths(value, rate.interval)
                ax.errorbar(value, y + offset, xerr=bars, fmt="o", color=colour, mfc=fill, ms=5, lw=1.1, zorder=3)
            if not value_of(report.rate(rule, group)):
                ax.text(
                    0.5,
                    y,
                    "no such rule",
                    transform=ax.get_yaxis_transform(),
                    ha="center",
                    va="center",
                    color=GREY,
                    fontsize=7,
                )
        best: Rate | None = getattr(report.recommendation, group, None)
        if best is not None and best.value is not None and value_of(best):
            ax.axvline(best.value, color=GREEN, lw=1.4, zorder=1)
            if best.interval is not None and all(map(math.isfinite, best.interval)):
                ax.axvspan(*best.interval, color=GREEN, alpha=0.12, lw=0, zorder=0)
        ax.set(xscale="log", title=titles[group])
        ax.margins(x=0.12)
        log_axis(ax.xaxis)
    axes[0].set_yticks(range(len(rules)), [RULES[r] for r in rules])
    axes[0].set_ylim(len(rules) - 0.5, -0.5)
    handles = [
        *(Line2D([], [], ls="", marker="o", mfc=m, color="black", label=t) for m, t in WHERE if several),
        Line2D([], [], color=RED, label="worst-case theory"),
        Line2D([], [], color=BLUE, label="measured theory"),
    ]
    handles += (
        [Line2D([], [], color=GREEN, lw=1.6, label="recommended, with interval")] if report.recommendation else []
    )
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    return figure


def value_of(rate: Rate | None) -> float | None:
    """A rate that can be drawn on a log axis."""
    return (
        rate.value
        if rate is not None and rate.value is not None and math.isfinite(rate.value) and rate.value > 0
        else None
    )
