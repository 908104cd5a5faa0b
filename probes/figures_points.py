"""Figures of what was measured at the points of a run: spectrum ends and traces, densities, the loss at the scale of a step."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from hybridtheory.estimate import Estimate
from probes.figures_style import colours, grid, log_axis, short
from probes.records import Point
from probes.records_smoothness import BlockPoint

if TYPE_CHECKING:
    from probes.report import Report

MOST_PANELS = 12


def largest_blocks(report: Report, most: int = MOST_PANELS) -> list[str]:
    """Block names in the model's order, cut to those with the largest curvature where there are too many panels."""
    top = {b.name: 0.0 for b in report.blocks}
    for p in report.points:
        for name, b in p.blocks.items():
            ends = [abs(e.value) for e in (b.lam_max, b.lam_min) if e is not None]
            top[name] = max([top.get(name, 0.0), *ends])
    for s in report.secants:
        if s.block in top and s.L_block is not None and not report.points:
            top[s.block] = max(top[s.block], s.L_block)
    kept = sorted(top, key=lambda name: -top[name])[:most]
    return [name for name in top if name in kept]


def step_label(p: Point) -> str:
    return f"step {p.step}"


def spectrum(report: Report) -> Figure | None:
    """Both spectrum ends and the trace: of every block where there are many (per layer), else along the run."""
    groups = [g for g in ("base", "peft") if any(b.group == g for b in report.blocks)]
    if not report.points or not groups:
        return None
    per_layer = max(len(report.finest(g)) for g in groups) > 3
    figure = Figure(
        figsize=(4.6 * len(groups) if per_layer else max(3.4 * len(groups), 4.6), 6.6 if per_layer else 4.6)
    )
    axes = np.asarray(figure.subplots(2, len(groups), squeeze=False, sharex="col"))
    for column, group in enumerate(groups):
        names = [b.name for b in report.finest(group)]
        draw = per_block if per_layer else along_run
        draw(axes[0, column], axes[1, column], report, names)
        axes[0, column].set_title("base weights" if group == "base" else "PEFT weights")
        for ax in axes[:, column]:
            ax.set_yscale("log")
            log_axis(ax.yaxis)
    axes[0, 0].set_ylabel("ends of the spectrum")
    axes[1, 0].set_ylabel(r"$|\mathrm{tr}\,H|$ ± standard error")
    handles = [
        Line2D([], [], ls="", marker="^", color="black", label=r"$\lambda_{\max}$, bar: bound"),
        Line2D([], [], ls="", marker="v", mfc="white", color="black", label=r"$-\lambda_{\min}$"),
        Line2D([], [], ls="", marker="o", color="black", label=r"$\mathrm{tr}\,H$"),
        Line2D([], [], ls="", marker="o", mfc="white", color="black", label=r"$-\mathrm{tr}\,H$, where negative"),
        Line2D([], [], ls="", marker="x", color="black", label="not resolved"),
    ]
    if per_layer:
        handles += [
            Line2D([], [], color=c, label=step_label(p)) for c, p in zip(colours(len(report.points)), report.points)
        ]
    else:
        several = any(len(report.finest(g)) > 1 for g in groups)
        handles += [Line2D([], [], color=c, label=short(n)) for n, c in block_colours(report).items() if several]
    figure.legend(handles=handles, loc="outside lower center", ncols=4 if per_layer else 3)
    return figure


def block_colours(report: Report) -> dict[str, Any]:
    palette = sns.color_palette("colorblind", 10)
    names = [b.name for g in ("base", "peft") for b in report.finest(g)]
    return {name: palette[i % 10] for i, name in enumerate(names)}


def signed(ax: Axes, x: float, e: Estimate | None, colour: Any, markers: tuple[str, str]) -> None:
    """|value| on a log axis: filled where positive, hollow where negative, a cross where not resolved; the bar is the
    standard error or the bound.
    """
    if e is None or e.value == 0 or not math.isfinite(e.value):
        return
    size = abs(e.value)
    bound = max(abs(e.upper) - size, 0.0) if e.upper is not None else 0.0
    spread = e.stderr if e.stderr is not None and math.isfinite(e.stderr) else 0.0
    bar = [
        [min(spread, 0.8 * size)],
        [spread or bound],
    ]  # an error through 0 must not stretch the axis; its mark is the cross
    marker = "x" if not e.resolved else markers[0] if e.value > 0 else markers[1]
    ax.errorbar(x, size, yerr=bar, fmt=marker, color=colour, mfc=colour if e.value > 0 else "white", lw=0.9, zorder=3)


def along_run(top: Axes, bottom: Axes, report: Report, names: list[str]) -> None:
    palette = block_colours(report)
    reach = report.points[-1].step - report.points[0].step
    for name in names:
        found = [(p.step, p.blocks[name]) for p in report.points if name in p.blocks]
        for ax, keys in ((top, ("lam_max", "lam_min")), (bottom, ("trace",))):
            for key in keys:
                line = [(step, getattr(b, key)) for step, b in found]
                line = [(step, e) for step, e in line if e is not None and e.value != 0 and math.isfinite(e.value)]
                ax.plot([s for s, _ in line], [abs(e.value) for _, e in line], color=palette[name], lw=0.8, alpha=0.6)
                for step, e in line:  # the lower end a little to the right, so that bars do not hide each other
                    shift = 0.03 * (reach or 1) if key == "lam_min" else 0
                    signed(ax, step + shift, e, palette[name], ("^", "v") if key != "trace" else ("o", "o"))
    bottom.set_xlabel("step of the reference run")
    bottom.set_xticks([p.step for p in report.points])
    bottom.set_xlim(report.points[0].step - 0.15 * (reach or 3), report.points[-1].step + 0.15 * (reach or 3))


def per_block(top: Axes, bottom: Axes, report: Report, names: list[str]) -> None:
    shades = colours(len(report.points))
    width = 0.5 / max(len(report.points) - 1, 1)
    for i, p in enumerate(report.points):
        shift = (i - (len(report.points) - 1) / 2) * width
        for x, name in enumerate(names):
            block: BlockPoint | None = p.blocks.get(name)
            if block is None:
                continue
            signed(top, x + shift, block.lam_max, shades[i], ("^", "v"))
            signed(top, x + shift, block.lam_min, shades[i], ("^", "v"))
            signed(bottom, x + shift, block.trace, shades[i], ("o", "o"))
    every = math.ceil(len(names) / 40)
    bottom.set_xticks(range(0, len(names), every))
    bottom.set_xticklabels([short(n, 30) for n in names[::every]], rotation=90, fontsize=6.5)
    bottom.set_xlim(-0.7, len(names) - 0.3)


def density(report: Report) -> Figure | None:
    """Spectral density of each block, broadened by 1 % of the spectrum's width, on a log axis: outliers are single
    eigenvalues.
    """
    found = {n for p in report.points for n, b in p.blocks.items() if b.density is not None and len(b.density.nodes)}
    names = [n for n in largest_blocks(report) if n in found]
    if not names:
        return None
    figure, axes = grid(len(names))
    sizes = {b.name: b.d for b in report.blocks}
    for ax, name in zip(axes, names):
        floor = top = 0.0
        for colour, p in zip(colours(len(report.points)), report.points):
            spectral = p.blocks[name].density if name in p.blocks else None
            if spectral is None or not len(spectral.nodes):
                continue
            nodes, weights = np.asarray(spectral.nodes), np.asarray(spectral.weights)
            width = 0.01 * max(np.ptp(nodes), 1e-12 * max(np.abs(nodes).max(), 1e-30))
            x = np.linspace(nodes.min() - 4 * width, nodes.max() + 4 * width, 800)
            bumps = np.exp(-0.5 * ((x[:, None] - nodes) / width) ** 2) / (width * math.sqrt(2 * math.pi))
            ax.plot(x, bumps @ weights, color=colour, label=step_label(p), lw=1.0)
            top = max(top, float((bumps @ weights).max()))
            # One eigenvalue of d is a bump of this height; a tenth of it is as far down as the estimate means anything.
            one = 1 / (sizes[name] * width * math.sqrt(2 * math.pi))
            floor = min(floor or math.inf, 0.1 * one)
        ax.set(yscale="log", title=short(name), xlabel=r"eigenvalue $\lambda$")
        # Autoscaling would reach as far up as the empty gaps of the density reach down.
        ax.set_ylim(bottom=floor, top=10 * top if top > floor else None)
        log_axis(ax.yaxis)
    axes[0].set_ylabel("density (integral 1)")
    axes[0].legend(loc="upper right")
    return figure


def displacement(report: Report) -> Figure | None:
    """phi(delta) with its quadratic fit (top), and the trace that each delta implies (bottom): flat where the
    quadratic model holds.
    """
    names = list(dict.fromkeys(n for p in report.points for n in p.phi))[:4]
    if not names:
        return None
    figure = Figure(figsize=(max(3.5 * len(names), 4.6), 4.8))
    axes = np.asarray(figure.subplots(2, len(names), squeeze=False, sharex="col"))
    for column, name in enumerate(names):
        top, bottom = axes[:, column]
        sizes: list[float] = []  # |phi|, drawn hollow where phi is negative
        for colour, p in zip(colours(len(report.points)), report.points):
            if name not in p.phi:
                continue
            phi = p.phi[name]
            delta, mean, error = (np.asarray(v, dtype=float) for v in (phi.delta, phi.mean, phi.stderr))
            for sign, fill, label in ((1, colour, step_label(p)), (-1, "white", None)):
                some = np.isfinite(mean) & (sign * mean > 0)
                size, spread = np.abs(mean[some]), error[some]
                bars = [np.minimum(spread, 0.999 * size), spread]
                top.errorbar(delta[some], size, yerr=bars, fmt="o", color=colour, mfc=fill, ms=3.5, label=label)
                sizes += list(size)
            fine = np.isfinite(mean)
            implied, spread = 2 * mean[fine] / delta[fine] ** 2, 2 * error[fine] / delta[fine] ** 2
            bottom.errorbar(delta[fine], implied, yerr=spread, fmt="o-", color=colour, ms=3.5, lw=0.8)
            if phi.trace is not None and phi.trace.value > 0:
                used = delta[delta <= phi.fit_up_to] if phi.fit_up_to else delta
                top.plot(delta, 0.5 * phi.trace.value * delta**2, color=colour, lw=0.8, ls="--")
                bottom.hlines(phi.trace.value, used[0], used[-1], color=colour, ls="--", lw=1.2)
        top.set(xscale="log", yscale="log", title=short(name))
        bottom.set(xlabel=r"displacement $\delta$ (times a standard normal $u$)")
        bottom.margins(y=0.1)
        if sizes:  # an error bar through 0 must not stretch the axis
            top.set_ylim(bottom=min(sizes) / 5)
        if all(bar[0].get_ydata().min(initial=math.inf) > 0 for bar in bottom.containers):
            bottom.set_yscale("log")
        for axis in (top.xaxis, top.yaxis, *([bottom.yaxis] if bottom.get_yscale() == "log" else [])):
            log_axis(axis)
    axes[0, 0].set_ylabel(r"$\varphi(\delta)=\mathrm{E}\,f(w+\delta u)-f(w)$")
    axes[1, 0].set_ylabel(r"implied trace $2\varphi/\delta^2$")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    if any(m < 0 for p in report.points for phi in p.phi.values() for m in phi.mean):
        handles.append(Line2D([], [], ls="", marker="o", mfc="white", color="black", ms=3.5))
        labels.append(r"$-\varphi$, where negative")
    handles.append(Line2D([], [], color="black", ls="--", lw=0.9))
    axes[0, 0].legend(handles, [*labels, r"fit $\frac{1}{2}T\delta^2$"], loc="upper left")
    return figure


def finite_scale(report: Report) -> Figure | None:
    """Mean change of the loss in one zeroth-order step against its learning rate; the minimum is the finite-scale
    rule.
    """
    names = list(dict.fromkeys(n for p in report.points for n in p.finite_scale))[:4]
    if not names:
        return None
    figure, axes = grid(len(names), width=3.8, height=2.8)
    for ax, name in zip(axes, names):
        depth, shown = 0.0, []
        for colour, p in zip(colours(len(report.points)), report.points):
            if name not in p.finite_scale:
                continue
            found = p.finite_scale[name]
            eta, change, error = (np.asarray(v, dtype=float) for v in (found.eta, found.change, found.stderr))
            fine = np.isfinite(change) & np.isfinite(error)
            ax.errorbar(
                eta[fine], change[fine], yerr=error[fine], fmt="o-", ms=3.5, lw=1.0, color=colour, label=step_label(p)
            )
            depth = min(depth, change[fine].min(initial=0.0))
            shown += list(zip(eta[fine], change[fine]))
            ax.axvline(found.eta_star, color=colour, lw=0.8, ls=":")
            if found.interval is not None:  # an open end is cut at the grid's
                ax.axvspan(
                    max(found.interval[0], eta.min()), min(found.interval[1], eta.max()), color=colour, alpha=0.08, lw=0
                )
        ax.axhline(0, color="black", lw=0.7)
        ax.set(xscale="log", title=short(name), xlabel=r"learning rate $\eta$")
        # Diverged steps rise without limit; what matters is the well and where the curve leaves it.
        if depth < 0:
            ax.set_ylim(1.35 * depth, -1.1 * depth)
            inside = [x for x, y in shown if y < -1.1 * depth]
            ax.set_xlim(0.7 * min(inside), 2.5 * max(inside))
        log_axis(ax.xaxis)
        ax.legend(loc="upper left")
    axes[0].set_ylabel("mean change of the loss\nin one step")
    return figure
