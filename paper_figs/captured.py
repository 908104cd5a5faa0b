"""Share of the gradient that SubZero's subspace captures along a run, by how often it is drawn anew.

python -m paper_figs captured
"""

from __future__ import annotations

import numpy as np
import seaborn as sns
from matplotlib.figure import Figure
from numpy.typing import NDArray

from paper_figs.records import first
from probes.figures import GREY
from probes.markdown import number
from probes.records import Captured, Header, Record

RECORDS = ("captured-embedded",)


def by_refresh(records: list[Record]) -> dict[int, list[Captured]]:
    found: dict[int, list[Captured]] = {}
    for r in records:
        if isinstance(r, Captured) and r.status == "finished":
            found.setdefault(r.refresh, []).append(r)
    return found


def name(refresh: int, runs: list[Captured]) -> str:
    if refresh >= len(runs[0].captured):
        return "never drawn anew"
    return "drawn anew every step" if refresh == 1 else f"every {refresh} steps"


def over(runs: list[Captured]) -> NDArray[np.float64]:
    """(runs, steps): what is captured over what a subspace that does not know the gradient captures in the mean."""
    return np.array([r.captured for r in runs]) / np.array([r.expected for r in runs])


def draw(records: list[Record]) -> Figure | None:
    found = by_refresh(records)
    if not found:
        return None
    figure = Figure(figsize=(5.6, 3.2))
    ax = figure.subplots()
    for (refresh, runs), colour in zip(found.items(), sns.color_palette("colorblind", len(found)), strict=True):
        share = over(runs)
        steps = np.arange(share.shape[1])
        ax.plot(steps, share.mean(0), color=colour, label=name(refresh, runs))
        if len(runs) > 1:
            ax.fill_between(steps, share.min(0), share.max(0), color=colour, alpha=0.15, lw=0)
    ax.axhline(1, color=GREY, ls=":", lw=0.9)
    ax.set(xlabel="step", ylabel="captured energy over its mean", ylim=(0, None))
    ax.legend()
    return figure


def spread(values: NDArray[np.float64]) -> str:
    """The mean over runs, and the least and the most of them in words that are no interval's."""
    if len(values) == 1:
        return f"{number(values[0])} (one seed)"
    return f"{number(values.mean())} (from {number(values.min())} to {number(values.max())} over {len(values)} seeds)"


def left_out(records: list[Record]) -> str:
    """A sentence about the runs that were not finite; nothing where there is none."""
    lost = [r for r in records if isinstance(r, Captured) and r.status != "finished"]
    told = ", ".join(
        f"seed {r.seed} with a subspace kept for {r.refresh} steps (at step {len(r.captured)})" for r in lost
    )
    return f" Left out, since the loss was not finite: {told}." if lost else ""


def caption(records: list[Record]) -> str:
    head = first((r for r in records if isinstance(r, Header)), "header")
    found = by_refresh(records)
    told = []
    for refresh, runs in found.items():
        share = over(runs)
        half = share.shape[1] // 2
        told.append(
            f"{name(refresh, runs)}: {number(share[:, :half].mean())} in the first half of the run, "
            f"{number(share[:, half:].mean())} in the second"
        )
    every = [r for runs in found.values() for r in runs]
    means = np.array([np.array(r.expected) / r.share for r in every])
    seeds = sorted({len(runs) for runs in found.values()})
    return (
        f"Energy of the exact gradient inside the subspaces of {every[0].law} on {head.model.name}, over the mean for subspaces that do "
        f"not know the gradient; mean and range over {' or '.join(map(str, seeds))} seeds. Means of all seeds: {'; '.join(told)}. That "
        f"mean is Σ (r²/mn)‖G‖²/‖g‖², {number(means.min())} to {number(means.max())} times k/d over all steps of all {len(every)} runs "
        f"({_ends(means[:, 0])} at the first step, {_ends(means[:, -1])} at the last), as the energy moves between matrices of unlike size."
        f"{left_out(records)}"
    )


def _ends(values: NDArray[np.float64]) -> str:
    low, high = number(values.min()), number(values.max())
    return low if low == high else f"{low} to {high}"
