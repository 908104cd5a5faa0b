"""Records of hybrid-sweep -> figures: loss against rate on every line, and the methods' curves at equal budget."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from probes.figures_style import BLUE, GREY, ORANGE, grid, log_axis, style, write
from probes.figures_style import RED as WALL
from probes.sweep_lines import State
from probes.sweep_scores import Score, unit
from probes.sweep_study import in_words

if TYPE_CHECKING:
    from probes.rundir import RunFolder
    from probes.sweep_compare import Table
    from probes.sweep_report import SweepReport

LABELS = {
    "base": "η base  (η PEFT = 0)", "peft": "η PEFT  (η base = 0)", "scale": "scale of both optima",
    "ratio": "ratio η PEFT / η base",
}  # fmt: skip
DASHES = ("-", "--", "-.", ":", (0, (3, 1, 1, 1, 1, 1)))


def drawn(report: SweepReport) -> dict[str, Figure]:
    """By file name without suffix: "rates-..." for every task, method and budget, "methods-..." where methods are compared."""
    found: dict[str, Figure] = {}
    lined = [s for s in report.states if s.line.grid is not None and s.whole]
    with style():
        for key in dict.fromkeys((s.line.task, s.line.method, s.line.horizon, s.line.amount) for s in lined):
            states = [s for s in lined if (s.line.task, s.line.method, s.line.horizon, s.line.amount) == key]
            found[name("rates", *key)] = rates(states, report.scores)
        for table in report.tables:
            found[name("methods", table.task, "", table.horizon, table.amount)] = methods(table)
    return found


def save(report: SweepReport, folder: RunFolder) -> None:
    """figures/NAME.png and .pdf."""
    write(drawn(report), folder)


def name(what: str, task: str, method: str, horizon: str, amount: float) -> str:
    parts = (what, task, method, f"{amount:g}-{horizon}")
    return "-".join(re.sub(r"[^A-Za-z0-9._]+", "-", p).strip("-.") for p in parts if p)


def rates(states: list[State], scores: list[Score]) -> Figure:
    """A panel a line: the loss after the run against the rate, the parabola with its optimum, predictions, and where runs diverge."""
    figure, axes = grid(len(states), width=3.2, height=2.7, columns=4)
    first = states[0].line
    rules = sorted({s.rule for s in scores})
    for ax, state in zip(axes, states, strict=True):
        _panel(ax, state, [s for s in scores if _about(s, state)], rules)
    axes[0].set_ylabel("loss after the run")
    found = [s.optimum for s in states if s.optimum is not None]
    explained: dict[Any, bool] = {
        Line2D([], [], ls="", marker="o", color=GREY, ms=2.5, alpha=0.6, label="one seed"): True,
        Line2D([], [], ls="", marker="o", color=BLUE, label="mean over seeds"): True,
        Line2D([], [], ls="", marker="^", color=WALL, mfc="white", label="some seed off the scale, or diverged"): True,
        Line2D([], [], color=BLUE, label="parabola"): any(x.fit is not None for x in found),
        Patch(color=BLUE, alpha=0.15, label="optimum, 95 %"): any(x.identified for x in found),
        Patch(color=WALL, alpha=0.12, label="runs begin to diverge in here"): any(s.boundary[1] for s in states),
        Line2D([], [], color=GREY, ls=":", label="loss before the run"): True,
    }
    handles = [handle for handle, drawn in explained.items() if drawn]
    handles += [
        Line2D([], [], color=ORANGE, ls=DASHES[rules.index(r) % len(DASHES)], label=f"predicted: {r}")
        for r in rules
        if r != "worst_case"
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(1 + len(states), 4))
    figure.suptitle(f"{first.task}, {first.method}, {first.until}", fontsize=9, x=0.01, ha="left")
    return figure


def _about(score: Score, state: State) -> bool:
    line = state.line
    same = (score.task, score.method, score.horizon, score.amount) == (
        line.task,
        line.method,
        line.horizon,
        line.amount,
    )
    return same and score.quantity == {"base": "eta_base", "peft": "eta_peft", "ratio": "ratio"}.get(line.axis, "")


def _panel(ax: Axes, state: State, scores: list[Score], rules: list[str]) -> None:
    k, start, best = unit(state), state.start, state.optimum
    x = np.array([p.place for p in state.whole]) * k
    y = state.finals
    mean = np.array([state.known[p.place].loss for p in state.whole])
    lowest = min(float(np.nanmin(np.where(np.isfinite(y), y, np.nan))), float(mean.min()))
    gain = max(start - lowest, 1e-3 * abs(start))
    top, bottom = start + 0.35 * gain, lowest - 0.12 * gain
    ax.axhline(start, color=GREY, ls=":", lw=0.8)
    inside = np.where(np.isfinite(y) & (y <= top), y, np.nan)
    for row in inside:
        ax.plot(x, row, ls="", marker="o", ms=2.5, color=GREY, alpha=0.6)
    off = ~(np.isfinite(y) & (y <= top)).all(axis=0)
    ax.plot(
        x[off], np.full(off.sum(), top - 0.03 * (top - bottom)), ls="", marker="^", color=WALL, mfc="white", zorder=4
    )
    ax.plot(x[~off], y.mean(axis=0)[~off], ls="", marker="o", color=BLUE, zorder=3)
    low, high = state.boundary
    left, right = x[0] / 1.6, x[-1] * 1.6
    shown = [s.predicted for s in scores if s.rule != "worst_case"]
    left, right = min([left, *(p / 1.3 for p in shown)]), max([right, *(p * 1.3 for p in shown)])
    if high is not None:
        ax.axvspan((low or left / k) * k, high * k, color=WALL, alpha=0.12, lw=0)
    if best is not None and best.fit is not None:
        z = np.linspace(math.log(best.used[0] / best.best), math.log(best.used[-1] / best.best), 80)
        a, b, c = best.fit
        ax.plot(best.best * np.exp(z) * k, a + b * z + c * z * z, color=BLUE, lw=1.1)
    if best is not None and best.interval is not None and best.identified:
        ax.axvspan(best.interval[0] * k, best.interval[1] * k, color=BLUE, alpha=0.15, lw=0)
        title = f"{best.rate * k:.3g}  ({best.interval[0] * k:.2g} to {best.interval[1] * k:.2g})"
    else:
        title = f"not identified, best run {state.best.place * k:.2g}" if state.best else ""
    for s in scores:
        if s.rule != "worst_case":
            ax.axvline(
                s.predicted, color=ORANGE, lw=1.4 if s.scored else 0.8, ls=DASHES[rules.index(s.rule) % len(DASHES)]
            )
    ax.set(xscale="log", xlim=(left, right), ylim=(bottom, top), xlabel=LABELS[state.line.axis], title=title)
    log_axis(ax.xaxis)


def methods(table: Table) -> Figure:
    """Minibatch loss against forward-equivalents, the mean over seeds with its spread; each method at its best rates."""
    figure, axes = grid(1, width=4.6, height=3.2)
    ax = axes[0]
    palette = sns.color_palette("colorblind", len(table.rows))
    for row, colour in zip(table.rows, palette, strict=True):
        curves = [c.curve for c in row.place.cells.values() if c.curve["loss"] and math.isfinite(c.final)]
        if not curves:
            continue
        n = min(len(c["loss"]) for c in curves)
        x = np.mean([c["equivalents"][:n] for c in curves], axis=0)
        y = np.array([c["loss"][:n] for c in curves])
        label = row.method if row.ranked else f"{row.method} (budget too small)"
        ax.plot(x, y.mean(axis=0), color=colour, ls="-" if row.ranked else ":", label=label)
        ax.fill_between(x, y.min(axis=0), y.max(axis=0), color=colour, alpha=0.12, lw=0)
    if table.target is not None:
        ax.axhline(table.target, color=GREY, ls=":", lw=0.8)
        ax.annotate(
            "target",
            (1.0, table.target),
            xycoords=("axes fraction", "data"),
            ha="right",
            va="bottom",
            fontsize=7,
            color=GREY,
        )
    ax.set(xlabel="forward-equivalents (forward 1, backward 2)", ylabel="minibatch loss (mean, range over seeds)")
    ax.set_title(f"{table.task}, {in_words(table.horizon, table.amount)}")
    ax.legend()
    return figure
