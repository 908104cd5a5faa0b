"""Figures of probe-cost: peak memory as stacked bars with its phases beside, time of a step beside the formula."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from probes.figures_style import BLUE, GREEN, GREY, ORANGE, PINK
from probes.records import StepMemory, StepTime

if TYPE_CHECKING:
    from probes.report import Report

PHASES = {
    "perturbation": (BLUE, "perturbed forward passes"),
    "activations": (GREEN, "gradient"),
    "update": (PINK, "update"),
}


def memory(report: Report) -> Figure | None:
    """A bar a method: weights, what is kept, and the phase that sets the peak; points where the other phases end."""
    found = [m for m in report.all(StepMemory) if m.peak is not None and m.weights is not None]
    if not found:
        return None
    figure, ax = _rows(len(found))
    scale = 2**30 if max(m.peak or 0 for m in found) > 2**30 else 2**20
    for i, m in enumerate(found):
        weights, kept = (m.weights or 0) / scale, max(m.kept or 0, 0) / scale
        ax.barh(i, weights, color="0.8")
        ax.barh(i, kept, left=weights, color=ORANGE)
        phases = {p: getattr(m, p) / scale for p in PHASES if getattr(m, p) is not None}
        top = max(phases, key=lambda p: phases[p])
        ax.barh(i, max(phases[top] - weights - kept, 0.0), left=weights + kept, color=PHASES[top][0], alpha=0.75)
        for phase, value in phases.items():
            if phase != top:
                ax.plot(value, i, "o", ms=3.5, color=PHASES[phase][0], mec="white", mew=0.5)
        if m.formula is not None:
            ax.plot([m.formula / scale] * 2, [i - 0.42, i + 0.42], color="black", lw=1.4)
    _labels(ax, [f"{m.method} ({m.peft})" for m in found])
    ax.set_xlabel(f"{'GiB' if scale == 2**30 else 'MiB'} above the process before loading")
    handles: list[Artist] = [Patch(color="0.8", label="weights"), Patch(color=ORANGE, label="kept between steps")]
    handles += [Patch(color=c, alpha=0.75, label=name) for c, name in PHASES.values()]
    handles.append(Line2D([], [], ls="", marker="o", ms=3.5, color=GREY, label="peaks of the other phases"))
    handles.append(Line2D([], [], color="black", lw=1.4, label="formula"))
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
    return figure


def time(report: Report) -> Figure | None:
    """Steps in forward passes of the same batch, with quartiles; the formula with the backward pass as measured."""
    found = [t for t in report.all(StepTime) if t.ratio is not None and t.ratio_interval is not None]
    if not found:
        return None
    figure, ax = _rows(len(found))
    for i, t in enumerate(found):
        ratio, (low, high) = t.ratio or 0.0, t.ratio_interval or (0.0, 0.0)
        ax.barh(i, ratio, color=BLUE, alpha=0.6)
        ax.plot([low, high], [i, i], color=GREY, lw=1.2)
        if t.predicted is not None:
            ax.plot([t.predicted] * 2, [i - 0.42, i + 0.42], color="black", lw=1.4)
    _labels(ax, [f"{t.method} ({t.peft})" for t in found])
    ax.set_xlabel("time of a step, in forward passes of the same batch")
    handles = [Patch(color=BLUE, alpha=0.6, label="measured"), Line2D([], [], color=GREY, lw=1.2, label="quartiles")]
    figure.legend(
        handles=[*handles, Line2D([], [], color="black", lw=1.4, label="formula")], loc="outside lower center", ncols=3
    )
    return figure


def _rows(n: int) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(5.6, 1.3 + 0.24 * n))
    return figure, figure.subplots()


def _labels(ax: Axes, names: list[str]) -> None:
    ax.set_yticks(np.arange(len(names)), names)
    ax.tick_params(axis="y", length=0)
    ax.grid(visible=False, axis="y")
    ax.invert_yaxis()
    ax.set_xlim(left=0)


MAKERS = {"memory": memory, "time": time}
