"""Share of the gradient that SubZero's subspace captures along a run, by how often it is drawn anew.

python -m paper_figs captured
"""

from __future__ import annotations

import numpy as np
import seaborn as sns
from matplotlib.figure import Figure
from numpy.typing import NDArray

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


def caption(records: list[Record]) -> str:
    head = next(r for r in records if isinstance(r, Header))
    told = []
    for refresh, runs in by_refresh(records).items():
        share = over(runs)
        half = share.shape[1] // 2
        told.append(
            f"{name(refresh, runs)}: {number(share[:, :half].mean())} in the first half of the run, "
            f"{number(share[:, half:].mean())} in the second"
        )
    first = next(iter(by_refresh(records).values()))[0]
    return (
        f"Energy of the exact gradient inside the subspaces of {first.law} on {head.model.name}, over the mean for subspaces that do not "
        f"know the gradient; mean and range over {len(by_refresh(records)[first.refresh])} seeds. {'; '.join(told)}. That mean is "
        f"Σ (r²/mn)‖G‖²/‖g‖² and goes from {number(first.expected[0] / first.share)} to {number(first.expected[-1] / first.share)} times "
        f"k/d along the run, as the energy moves between matrices of unlike size."
    )
