"""Report -> figures, as PNG and PDF: each shows numbers that report.md states, with their errors.

Every function takes a Report and returns a matplotlib Figure, or None where the run did not measure what it shows. No
global state: figures are made without pyplot's current figure, and the style file applies inside `drawn` only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from probes.markdown import number
from probes.records import BlockPoint, Estimate, Point, Rate

if TYPE_CHECKING:
    from probes.report import Report
    from probes.rundir import RunFolder

STYLE = Path(__file__).with_name("data") / "figures.mplstyle"
BLUE, ORANGE, GREEN, RED, PINK = sns.color_palette("colorblind", 5)
GREY = "0.45"
MOVES = {"gradient": ("o", BLUE), "trajectory": ("P", GREEN), "random": ("s", ORANGE), "joint": ("^", PINK)}
RULES = {"worst_case": "worst case\n(dimension)", "measured": "measured\n(trace)", "noise_limited": "noise-limited"}
RULES |= {"finite_scale": "finite scale\n(forward passes)", "tail": "tail of a step"}
WHERE = (("white", "first point"), ("black", "whole run"))
MOST_PANELS = 12


@contextmanager
def style() -> Iterator[None]:
    """The project's look, for the time of a `with`."""
    with matplotlib.rc_context(fname=str(STYLE)):
        yield


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
    paths = []
    for name, figure in drawn(report).items():
        with style():
            figure.draw_without_rendering()
        figure.set_layout_engine("none")  # laid out once; each file would do it again, which is most of its time
        for suffix in ("png", "pdf"):
            # Without the date, the same records give the same bytes.
            metadata: dict[str, Any] = {"CreationDate": None} if suffix == "pdf" else {"Software": None}

            def write(path: Path, figure: Figure = figure, metadata: dict[str, Any] = metadata) -> None:
                with style():
                    figure.savefig(path, metadata=metadata)

            paths.append(folder.write(f"figures/{name}.{suffix}", write))
    return paths


# ---- helpers ---------------------------------------------------------------------------------------------------------


def grid(n: int, width: float = 3.3, height: float = 2.5, columns: int = 3, **kwargs: Any) -> tuple[Figure, list[Axes]]:
    """A figure of n panels, at most `columns` a row; the axes that are left over are switched off."""
    columns = min(n, columns if n != 4 else 2)
    rows = math.ceil(n / columns)
    figure = Figure(figsize=(max(width * columns, 4.2), height * rows))
    axes = list(np.atleast_1d(figure.subplots(rows, columns, **kwargs)).flat)
    for spare in axes[n:]:
        spare.set_axis_off()
    return figure, axes[:n]


def log_axis(axis: Any) -> None:
    """Decades where there are several; 1, 2, 5 where there is about one; and never a label like 2 x 10^2."""
    if not math.isfinite(axis.get_minpos()):  # nothing positive was drawn: a log axis would raise
        getattr(axis.axes, f"set_{axis.axis_name}scale")("linear")
        axis.axes.text(0.5, 0.5, "no value above 0", transform=axis.axes.transAxes, ha="center", color=GREY)
        return
    low, high = axis.get_view_interval()
    wide = low <= 0 or high / low > 3e3
    few = not wide and high / low < 40
    if not wide and high / low < 4:
        axis.set_major_locator(MaxNLocator(4))
        axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axis.set_minor_locator(NullLocator())
        return
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if few else (1.0,), numticks=7))
    axis.set_major_formatter(FuncFormatter(lambda x, _: tick(x, plain=not wide)))
    axis.set_minor_formatter(NullFormatter())


def tick(x: float, plain: bool) -> str:
    """0.05 and 20 (plain, where they are short), else 5·10^-5."""
    if x <= 0 or not math.isfinite(x):
        return ""
    exponent = math.floor(math.log10(x) + 1e-9)
    if plain and -3 <= exponent < 4:
        return f"{x:g}"
    mantissa = round(x / 10.0**exponent)
    return f"$10^{{{exponent}}}$" if mantissa == 1 else f"${mantissa}\\cdot 10^{{{exponent}}}$"


def colours(n: int) -> list[Any]:
    """n colours from early (light) to late (dark), for points along the run."""
    return list(sns.color_palette("crest", max(n, 2)))[:n] if n > 1 else [BLUE]


def short(name: str, length: int = 34) -> str:
    """A block's name that fits over a panel: the tail tells blocks apart. A dollar sign would start mathematics."""
    name = name if len(name) <= length else "…" + name[-(length - 1) :]
    return name.replace("$", r"\$")


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


def half_widths(value: float, ends: tuple[float, float] | None) -> list[list[float]] | None:
    """Error-bar lengths of an interval, finite and not negative."""
    if ends is None:
        return None
    low, high = (e if math.isfinite(e) else value for e in ends)
    return [[max(value - low, 0.0)], [max(high - value, 0.0)]]


def step_label(p: Point) -> str:
    return f"step {p.step}"


# ---- the figures -----------------------------------------------------------------------------------------------------


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
    moves = [m for m in MOVES if any(s.move == m for s in report.secants)]
    handles = [
        Line2D([], [], ls="", marker=MOVES[m][0], color=MOVES[m][1], ms=4, alpha=0.7, label=f"secant, {m}")
        for m in moves
    ]
    handles += [
        Line2D(
            [],
            [],
            ls="",
            marker="D",
            mfc="none",
            color="black",
            ms=4.5,
            label=r"spectrum: $\max|\lambda|$ and its bound",
        )
    ]
    handles += [
        Line2D([], [], color="black", label="upper envelope"),
        Line2D([], [], color="black", ls="--", label="quantile fit"),
    ]
    if any(not f.identified for f in report.fits):
        handles += [Line2D([], [], color=GREY, ls=":", label="$L_1$ not identified")]
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
            ax.errorbar(p.grad_norm, L, yerr=[[0.0], [bound - L]], fmt="D", mfc="none", color="black", lw=0.9, zorder=3)
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
        line = "-" if f.method == "envelope" else "--"
        ax.plot(
            u,
            f.L0 + f.L1 * u,
            ls=line if f.identified else ":",
            color="black" if f.identified else GREY,
            zorder=4,
            lw=1.1,
        )
        if f.method == "envelope":
            told = f"$L_0$ = {number(f.L0)}, $L_1$ = {number(f.L1)}"
            notes.append(told if f.identified else f"$L_1$ not identified: norms span a factor {number(f.span, 2)}")
    if notes:
        box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1.5}
        ax.text(0.03, 0.97, notes[0], transform=ax.transAxes, va="top", fontsize=7.5, bbox=box, zorder=5)


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
