"""What all figures share: the project's look, panels, axes on a log scale, and how a figure is written.

No global state: figures are made without pyplot's current figure, and the style file applies inside `style` only.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

if TYPE_CHECKING:
    from probes.rundir import RunFolder

STYLE = Path(__file__).with_name("data") / "figures.mplstyle"
BLUE, ORANGE, GREEN, RED, PINK = sns.color_palette("colorblind", 5)
GREY = "0.45"


@contextmanager
def style() -> Iterator[None]:
    """The project's look, for the time of a `with`."""
    with matplotlib.rc_context(fname=str(STYLE)):
        yield


def write(figures: Mapping[str, Figure], folder: RunFolder) -> list[Path]:
    """figures/NAME.png and figures/NAME.pdf in the run folder."""
    paths = []
    for name, figure in figures.items():
        with style():
            figure.draw_without_rendering()
        figure.set_layout_engine("none")  # laid out once; each file would do it again, which is most of its time
        for suffix in ("png", "pdf"):
            # Without the date, the same records give the same bytes.
            metadata: dict[str, Any] = {"CreationDate": None} if suffix == "pdf" else {"Software": None}

            def save(path: Path, figure: Figure = figure, metadata: dict[str, Any] = metadata) -> None:
                with style():
                    figure.savefig(path, metadata=metadata)

            paths.append(folder.write(f"figures/{name}.{suffix}", save))
    return paths


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


def half_widths(value: float, ends: tuple[float, float] | None) -> list[list[float]] | None:
    """Error-bar lengths of an interval, finite and not negative."""
    if ends is None:
        return None
    low, high = (e if math.isfinite(e) else value for e in ends)
    return [[max(value - low, 0.0)], [max(high - value, 0.0)]]
