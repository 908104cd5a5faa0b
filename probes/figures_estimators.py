"""Figures of probe-estimators: the cosine's law over its histogram, full against subspace, and the error budget over mu."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from scipy import stats

from probes.figures_style import BLUE, GREEN, GREY, ORANGE, PINK, RED, log_axis, tick
from probes.markdown import number
from probes.records import Budget, Estimator
from probes.records_estimators import Compared, Cosines

if TYPE_CHECKING:
    from probes.report import Report

GROUPS = {"base": "base weights", "peft": "PEFT weights"}
MOST = 5


def groups(report: Report) -> list[tuple[str, list[Estimator]]]:
    """(group, its estimators on the whole group)."""
    found = [e for e in report.all(Estimator) if e.block == e.group]
    return [(g, [e for e in found if e.group == g]) for g in dict.fromkeys(e.group for e in found)]


def cosines(report: Report) -> Figure | None:
    """Histogram of the cosine, in units of 1/√d, with its Beta law; a column per law of the cosine that is known exactly.

    Estimators whose cosine has one law (a Gaussian's and its sphere's) share the first one's panel.
    """
    known = []
    for g, found in groups(report):
        first: dict[tuple[object, ...], tuple[Estimator, Cosines]] = {}
        for e in found:
            for c in e.cosines:
                if c.alpha is not None and c.exact:
                    first.setdefault((c.target, c.alpha, c.beta), (e, c))
        if first:
            known.append((g, list(first.values())[:MOST]))
    if not known:
        return None
    columns = max(len(pairs) for _, pairs in known)
    figure = Figure(figsize=(max(2.15 * columns, 4.2), 2.3 * len(known) + 0.35))
    axes = np.asarray(figure.subplots(len(known), columns, squeeze=False))
    for (group, pairs), row in zip(known, axes):
        for ax in row[len(pairs) :]:
            ax.set_axis_off()
        for (e, c), ax in zip(pairs, row):
            cosine_panel(ax, e, c)
        row[0].set_ylabel(f"{GROUPS.get(group, group)}\ndensity")
    handles = [Patch(color=BLUE, alpha=0.35, label="measured"), Line2D([], [], color="black", label="Beta law")]
    figure.legend(handles=handles, loc="outside lower center", ncols=2)
    return figure


def cosine_panel(ax: Axes, e: Estimator, c: Cosines) -> None:
    assert c.alpha is not None and c.beta is not None
    size = e.d if c.target == "gradient" else (e.subspace or e.d)
    edges, counts = rebinned(c)
    unit = np.sqrt(size)
    ax.stairs(counts / counts.sum() / np.diff(edges) / unit, edges * unit, fill=True, color=BLUE, alpha=0.35)
    end = max(edges[-1], np.sqrt(stats.beta(c.alpha, c.beta).ppf(0.9995)))
    x = np.linspace(end * 1e-3, end, 400)
    # cos² ~ Beta, so cos has the density 2x b(x²)
    ax.plot(x * unit, 2 * x * stats.beta(c.alpha, c.beta).pdf(x**2) / unit, color="black", lw=1.2)
    ax.set_title(textwrap.fill(label(e), 16))  # a panel is narrow
    target, symbol = ("P'\\nabla f", "k") if c.target == "projection" else ("\\nabla f", "d")
    ax.set_xlabel(rf"$\sqrt{{{symbol}}}\,\cos(\hat g,\, {target})$")
    note = f"n = {e.n:,}" + (f"\nKS p = {c.ks_p:.2f}" if c.ks_p is not None else "")
    ax.text(0.97, 0.95, note, transform=ax.transAxes, ha="right", va="top", fontsize=7)
    ax.set_ylim(0, 1.25 * ax.get_ylim()[1])


def label(e: Estimator) -> str:
    """The law's name as people write it."""
    return e.law.replace(":", " ").replace("-", " ").replace(",", ", ")


def rebinned(c: Cosines) -> tuple[np.ndarray, np.ndarray]:
    """As many bins as the sample carries: about twice the cube root of its size."""
    counts, edges = np.array(c.counts), np.array(c.edges)
    wanted = max(5, int(2 * counts.sum() ** (1 / 3)))
    for factor in (1, 2, 4, 5, 8):
        if len(counts) % factor == 0 and len(counts) // factor <= wanted:
            break
    return edges[::factor], counts.reshape(-1, factor).sum(1)


def subspace(report: Report) -> Figure | None:
    """Squared cosine with the gradient and with its projection, and total variance: laws with a subspace among those without."""
    found = groups(report)
    if not found:
        return None
    most = max(len(es) for _, es in found)
    figure = Figure(figsize=(9.2, len(found) * (0.22 * most + 0.75) + 0.45))
    figure.set_layout_engine("constrained", w_pad=0.12)  # long names of laws are cut off without
    axes = np.asarray(figure.subplots(len(found), 2, squeeze=False, sharey="row"))
    for (group, estimators), (left, right) in zip(found, axes):
        d = estimators[0].d
        for y, e in enumerate(estimators):
            dot(left, e.quantities["cosine_sq"], y, BLUE, "o")
            dot(left, e.quantities.get("cosine_sq_projected"), y, ORANGE, "D")
            dot(right, e.quantities.get("variance"), y, BLUE, "o")
        left.axvline(1 / d, color=GREY, lw=0.8, ls=":", zorder=1)
        right.axvline(d, color=GREY, lw=0.8, ls=":", zorder=1)
        for ax, where, mark in ((left, 1 / d, " 1/d"), (right, d, " d")):
            ax.set_xscale("log")
            low, high = ax.get_xlim()
            ax.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high / low < 300 else (1.0,), numticks=9))
            ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: tick(x, plain=True)))
            ax.xaxis.set_minor_formatter(NullFormatter())
            ax.text(where, -0.42, mark, color=GREY, fontsize=7, va="center")
        left.set_yticks(range(len(estimators)), [label(e) for e in estimators], fontsize=7)
        left.set_ylim(len(estimators) - 0.5, -0.7)
        left.set_title(f"{GROUPS.get(group, group)}  (d = {d:,})")
    axes[-1, 0].set_xlabel(r"$\mathbb{E}\,\cos^2$")
    axes[-1, 1].set_xlabel(r"total variance $\,/\,\Vert\nabla f\Vert^2$")
    handles = [
        Line2D([], [], ls="", marker="o", color=BLUE, label=r"with the true gradient $\nabla f$"),
        Line2D([], [], ls="", marker="D", color=ORANGE, label=r"with the projected gradient $P'\nabla f$"),
        Line2D([], [], ls="", marker="|", ms=9, color="black", label="closed formula"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
    return figure


def dot(ax: Axes, c: Compared | None, y: float, colour: object, marker: str) -> None:
    if c is None or not c.value > 0:
        return
    error = min(c.stderr or 0.0, 0.95 * c.value)
    ax.errorbar(c.value, y, xerr=error, fmt=marker, color=colour, ms=4, lw=1, zorder=3)
    if c.predicted is not None and c.predicted > 0:
        ax.plot(c.predicted, y, marker="|", ms=9, mew=1.1, color="black", zorder=4)


def budget(report: Report) -> Figure | None:
    """Every part of the squared error over mu, their sum, and what was measured from forward passes; a panel a group."""
    found = [b for b in report.all(Budget) if b.block == b.group]
    if not found:
        return None
    figure = Figure(figsize=(4.5 * len(found), 3.9))
    for b, ax in zip(found, np.atleast_1d(figure.subplots(1, len(found)))):
        budget_panel(ax, b)
    figure.axes[0].set_ylabel(r"squared error of one estimate $\,/\,\Vert\nabla f\Vert^2$")
    handles = [
        Line2D([], [], color=BLUE, label="directions"),
        Line2D([], [], color=GREEN, label="minibatch"),
        Line2D([], [], color=RED, ls="--", label=r"truncation, $\propto\mu^4$"),
        Line2D([], [], color=ORANGE, ls="--", label=r"rounding of the loss, $\propto\mu^{-2}$"),
        Line2D([], [], color=PINK, ls="-.", label="rounding of the weights"),
        Line2D([], [], color="black", lw=1.8, label="sum"),
        Line2D([], [], ls="", marker="o", mfc="white", color="black", label="added by μ, measured"),
        Patch(color="0.93", label="flat range"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=4)
    return figure


def budget_panel(ax: Axes, b: Budget) -> None:
    mu = np.geomspace(min(b.mu), max(b.mu), 300)
    base = b.direction + b.minibatch
    floor = min(0.3 * min(x for x in b.added if x > 0), 1e-4 * base) if any(x > 0 for x in b.added) else 1e-7 * base
    ax.axhline(b.direction, color=BLUE)
    if b.minibatch > 0:
        ax.axhline(b.minibatch, color=GREEN)
    for coefficient, power, colour in ((b.truncation, 4, RED), (b.loss_rounding, -2, ORANGE)):
        if coefficient:
            part = coefficient * mu**power
            ax.plot(mu[part < b.direction], part[part < b.direction], color=colour, ls="--")
    weights = np.array(b.weights)
    if (weights > 0).sum() > 1:
        ax.plot(np.array(b.mu)[weights > 0], weights[weights > 0], color=PINK, ls="-.")
    total = base + np.exp(np.interp(np.log(mu), np.log(b.mu), np.log(np.maximum(b.added, 1e-300))))
    ax.plot(mu, total, color="black", lw=1.8, zorder=2.5)
    added = np.array(b.added)
    error = np.minimum(np.array(b.stderr), 0.9 * added)
    ax.errorbar(b.mu, added, yerr=error, fmt="o", mfc="white", color="black", ms=4, lw=0.9, zorder=3)
    if b.flat is not None:
        ax.axvspan(*b.flat, color="0.93", zorder=0)
    ax.set(xscale="log", yscale="log", xlabel="μ", ylim=(floor, min(max(30 * base, 3 * max(b.added)), 1e5 * base)))
    top = ax.get_ylim()[1]
    for p in b.published:
        if min(b.mu) <= p.mu <= max(b.mu):
            ax.plot(p.mu, top, marker="v", color=GREY, ms=6, clip_on=False, zorder=5)
            ax.annotate(
                p.name, (p.mu, top), xytext=(0, 5), textcoords="offset points", ha="center", fontsize=7, color=GREY
            )
    log_axis(ax.xaxis)
    log_axis(ax.yaxis)
    best = "" if b.recommended is None else f", best μ = {number(b.recommended, 2)}"
    ax.set_title(f"{GROUPS.get(b.group, b.block)}, {b.dtype}{best}", pad=18)


MAKERS = {"cosines": cosines, "subspace": subspace, "budget": budget}
