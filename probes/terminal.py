"""What a person at the terminal sees: progress with the time left, the estimate before the work, the summary after it.

Names of models, blocks and files are shown as text: rich's markup is off, so a name with [brackets] prints as it is.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from hybridtheory.estimate import Estimate
from probes.markdown import count, estimate, interval, memory, number, seconds
from probes.markdown_rates import RULE_NAMES
from probes.records import Cost, Header, Preflight, Warning
from probes.records_smoothness import Rate
from probes.report import Report


def plain(text: str) -> str:
    """Markdown's emphasis is for report.md."""
    return text.replace("**", "")


class TimeLeft(ProgressColumn):
    """Seconds of the estimate that are left; says so when the estimate is used up."""

    def render(self, task: Task) -> Text:
        if task.total is None:
            return Text("")
        left = task.total - (task.elapsed or 0.0)
        return Text(f"about {seconds(left)} left" if left > 0 else "longer than estimated", style="cyan")


class Bar:
    """A progress bar over the estimated time; where output is not a terminal (a log file) one line for each phase instead."""

    def __init__(self, console: Console) -> None:
        columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(bar_width=24))
        self._console = console
        self._started = time.perf_counter()
        self._said: set[str] = set()
        live = console.is_terminal
        self._progress = Progress(
            *columns, TimeElapsedColumn(), TimeLeft(), console=console, transient=True, disable=not live
        )
        self._task = self._progress.add_task("starting", total=None)

    def phase(self, what: str, share: float) -> None:
        total = self._progress.tasks[0].total
        self._progress.update(self._task, description=what, completed=share * (total or 0.0))
        if what not in self._said and not self._console.is_terminal:  # once each: the run alternates between some
            elapsed = time.perf_counter() - self._started
            self._console.print(
                Text(
                    f"[{seconds(elapsed)}] {what}"
                    + (f" (about {seconds(total - elapsed)} left)" if total and total > elapsed else "")
                )
            )
            self._said.add(what)

    def expect(self, cost: Cost) -> None:
        self._progress.update(self._task, total=time.perf_counter() - self._started + cost.seconds)

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()


@contextmanager
def waiting(console: Console, what: str) -> Iterator[None]:
    """A spinner while something loads."""
    started = time.perf_counter()
    with console.status(Text(what)):
        yield
    console.print(Text(f"{what}: {seconds(time.perf_counter() - started)}", style="dim"))


def grid(head: Sequence[str], rows: Sequence[Sequence[str]], title: str = "", left: int = 1) -> Table:
    """A plain table; the first `left` columns are text, the others numbers."""
    table = Table(
        title=Text(title, style="bold") if title else None,
        title_justify="left",
        box=None,
        pad_edge=False,
        padding=(0, 2, 0, 0),
    )
    for i, name in enumerate(head):
        table.add_column(
            Text(name, style="dim"), justify="left" if i < left else "right", no_wrap=i < left, overflow="fold"
        )
    for row in rows:
        table.add_row(*(Text(plain(c)) for c in row))
    return table


def opening(header: Header) -> RenderableType:
    """What is about to be measured."""
    model, data, peft = header.model, header.data, header.peft
    lines = [
        ("model", f"{model.name} ({model.architecture}, {model.parameters:,} parameters, {model.dtype})"),
        ("data", f"{data.name}: {data.rows} rows, {data.tokens:,.0f} scored positions; loss: {data.loss}"),
    ]
    if peft is not None:
        settings = {"rank": peft.rank, "alpha": peft.alpha, "scale": peft.scale}
        lines.append(("PEFT", ", ".join([peft.type, *(f"{k} {v:g}" for k, v in settings.items() if v is not None)])))
    groups = [b for b in header.blocks if b.name == b.group]
    finer = len(header.blocks) - len(groups)
    counted = ", ".join(f"{b.name} ({b.d:,})" for b in groups)
    lines.append(("blocks", counted + (f", cut into {finer} finer ones" if finer else "")))
    if "engine" in header.options:
        lines.append(("engine", f"{header.options['engine']}: {header.options.get('engine_reason') or 'asked for'}"))
    table = Table.grid(padding=(0, 2))
    for name, text in lines:
        table.add_row(Text(name, style="dim"), Text(text))
    return table


def cost(estimated: Cost, actual: Cost | None = None) -> RenderableType:
    """The estimate, with what it really took beside it."""
    rows = []
    for c in (estimated, actual):
        if c is not None:
            calls = [count(c.gradients), count(c.products), count(c.values)]
            rows.append([c.phase, *calls, seconds(c.seconds), memory(c.memory_bytes)])
    table = grid(["cost", "gradients", "products", "forwards", "time", "peak memory"], rows)
    if actual is not None or not estimated.note:
        return table
    return Group(table, Text(f"peak memory, {estimated.note}", style="dim"))


def preflight(found: Preflight) -> RenderableType:
    rows = [[c.name, "yes" if c.holds else "NO", number(c.value), number(c.tolerance)] for c in found.checks]
    return grid(["check", "holds", "error", "tolerance"], rows, f"preflight: {found.verdict}", left=2)


def versions(header: Header) -> RenderableType:
    return Text(", ".join(f"{k} {v}" for k, v in header.versions.items()) + f"; {header.threads} threads", style="dim")


def warning(found: Warning) -> Text:
    return Text(f"! {found.text}", style="yellow")


def place(report: Path) -> Text:
    return Text.assemble(("report  ", "dim"), (str(report), "bold"))


def summary(report: Report, folder: Path) -> RenderableType:
    """The numbers a user came for, in one screen."""
    parts: list[RenderableType] = [Text("")]
    parts += smoothness(report)
    parts += rules(report)
    parts += recommended(report)
    estimated, actual = report.cost("estimated"), report.cost("actual")
    if estimated is not None:
        parts += [Text(""), cost(estimated, actual)]
    parts += [Text(""), *map(warning, report.warnings)] if report.warnings else []
    name = "report.md" if report.finished else "records.jsonl"
    return Group(*parts, Text(""), place(folder / name))


def smoothness(report: Report, most: int = 12) -> list[RenderableType]:
    """Last point's spectrum and the headline fit of the blocks (groups first, then the finer ones)."""
    if not report.points:
        return []
    last = report.points[-1]
    rows = []
    for block in report.blocks[:most]:
        b, fit = last.blocks.get(block.name), report.chosen_fit(block.name)
        ends = [brief(e) for e in (b.lam_max, b.lam_min, b.trace, b.effective_rank)] if b else ["-"] * 4
        law = ["-", "-"] if fit is None else [number(fit.L0), number(fit.L1) + ("" if fit.identified else " ?")]
        rows.append([block.name, *ends, *law])
    more = len(report.blocks) - len(rows)
    title = f"curvature at step {last.step}, smoothness L0 + L1·‖∇f‖ over the run" + (
        f" ({more} more blocks in the report)" if more else ""
    )
    return [grid(["block", "λ max", "λ min", "tr H", "eff. rank", "L0", "L1"], rows, title), *legend(rows), Text("")]


def brief(e: Estimate | None) -> str:
    """An estimate in a narrow column: a question mark where it is not resolved."""
    return "-" if e is None else estimate(replace(e, resolved=True)) + ("" if e.resolved else " ?")


def legend(rows: list[list[str]]) -> list[RenderableType]:
    marked = any(cell.endswith("?") for row in rows for cell in row)
    return [Text("? not resolved (spectrum) or not identified (L1) by this run", style="dim")] if marked else []


def rules(report: Report) -> list[RenderableType]:
    rows = []
    for rule, name in RULE_NAMES.items():
        cells = [report.rate(rule, group) for group in ("base", "peft", "ratio")]
        if any(cells):
            rows.append([name, *(value(c) for c in cells)])
    return [grid(["learning rates over the run", "η base", "η PEFT", "ratio"], rows), Text("")] if rows else []


def value(rate: Rate | None) -> str:
    return "-" if rate is None or rate.value is None else number(rate.value)


def recommended(report: Report) -> list[RenderableType]:
    found = report.recommendation
    if found is None:
        return []
    table = Table.grid(padding=(0, 2))
    for name, group in (("η base", "base"), ("η PEFT", "peft"), ("ratio", "ratio")):
        rate: Rate | None = getattr(found, group)
        if rate is None:
            continue
        if rate.value is None:
            table.add_row(Text(name), Text("none", style="yellow"), Text(rate.note))
            continue
        by = found.bound_by.get(group, "")
        by = RULE_NAMES.get(by, by)
        ends = f"{interval(rate.interval)}" if rate.interval else ""
        table.add_row(
            Text(name),
            Text(number(rate.value), style="bold green"),
            Text(ends),
            Text(f"bound by {by}" if by else "", style="dim"),
        )
    return [Text("recommended (trainer.toml)", style="bold"), table]
