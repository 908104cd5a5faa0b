"""What a person at the terminal sees of a training run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from probes import rundir
from probes.records import Evaluation, Outcome, Record, Step


@contextmanager
def bar(console: Console) -> Iterator[Callable[[str, float], None]]:
    """A function (what, share done) that moves a progress bar; a log file shows the evaluations and needs none."""
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(bar_width=24))
    live = console.is_terminal
    with Progress(
        *columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, transient=True, disable=not live
    ) as shown:
        task = shown.add_task("starting", total=1.0)
        yield lambda what, share: shown.update(task, description=what, completed=share)


def catalogue() -> Text:
    from hybridtheory.optimizers import METHODS

    words = {"zo": "zeroth-order", "fo": "first-order", "hybrid": "hybrid"}
    return Text("\n".join(f"{name:18} {words[m.kind]:13} {m.blocks}" for name, m in METHODS.items()))


def scores(found: Evaluation) -> str:
    """One evaluation as a line."""
    line = f"step {found.step}: {found.split} loss {found.loss:.4f}"
    if found.accuracy is not None and found.accuracy_interval is not None and found.floor is not None:
        low, high = found.accuracy_interval
        line += f", accuracy {found.accuracy:.3f} [{low:.3f}, {high:.3f}] (floor {found.floor:.3f}, {found.rows} rows)"
    if found.calibrated_accuracy is not None and found.calibrated_accuracy_interval is not None:
        low, high = found.calibrated_accuracy_interval
        line += f", {found.calibration}-calibrated {found.calibrated_accuracy:.3f} [{low:.3f}, {high:.3f}]"
    if found.auc is not None:
        line += f", AUC {found.auc:.3f}" + (
            f" [{found.auc_interval[0]:.3f}, {found.auc_interval[1]:.3f}]" if found.auc_interval else ""
        )
    return line + (f", F1 {found.f1:.3f}" if found.f1 is not None else "")


def summary(records: list[Record], folder: Path, scored: bool = False) -> Text:
    """What the run took and where things are; ``scored``: and its last evaluation."""
    outcome = next((r for r in reversed(records) if isinstance(r, Outcome)), None)
    steps = [r for r in records if isinstance(r, Step)]
    lines = [scores(r) for r in [r for r in records if isinstance(r, Evaluation) and scored][-1:]]
    if outcome is not None:
        lines.append(
            f"{outcome.status} after {outcome.step} steps: {outcome.forwards} forward and {outcome.backwards} backward passes = "
            f"{outcome.equivalents} forward-equivalents, {outcome.tokens} tokens"
        )
        if outcome.reason and outcome.status in ("finished", "budget"):
            lines.append(outcome.reason)
        if outcome.exports:
            lines.append(f"exported: {', '.join(str(folder / 'export' / e) for e in outcome.exports)}")
    if steps:
        lines.append(f"records: {folder / rundir.RECORDS}")
    return Text("\n".join(lines))
