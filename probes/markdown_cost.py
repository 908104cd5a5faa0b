"""Report of probe-cost -> report.md: what a hybrid step costs against its parts, then every method in memory and in time."""

from __future__ import annotations

from typing import TYPE_CHECKING

from probes.markdown import cost, interval, memory, number, repeat, table, warnings
from probes.records import StepMemory, StepTime

if TYPE_CHECKING:
    from probes.report import Report


def text(report: Report) -> str:
    """The whole file."""
    parts = [
        opening(report),
        warnings(report),
        memory_table(report),
        time_table(report),
        reading(report),
        cost(report),
        repeat(report),
    ]
    return "\n".join(line for part in parts for line in part).rstrip() + "\n"


def _find(report: Report, method: str, peft: str) -> tuple[StepMemory | None, StepTime | None]:
    """What was measured of a method; a base-only one stands under no adapter."""

    places = (peft, "none")
    m = next((r for r in report.all(StepMemory) if r.method == method and r.peft in places), None)
    return m, next((r for r in report.all(StepTime) if r.method == method and r.peft in places), None)


def answers(report: Report) -> list[str]:
    """What does hybrid cost against its parts? One sentence for each hybrid method and adapter."""
    records: list[StepTime | StepMemory] = [*report.all(StepTime), *report.all(StepMemory)]
    found = list(dict.fromkeys((r.method, r.peft) for r in records))
    out = []
    for method, peft in found:
        if not method.startswith("hybrid"):
            continue
        m, t = _find(report, method, peft)
        said = []
        beside = "peft-adamw" if method.startswith("hybrid-adamw") else "peft-sgd"
        if t is not None and t.parts is not None:
            said.append(
                f"{number(t.parts)} (quartiles of {t.rounds} rounds: {interval(t.parts_interval)}) times the time of its first-order twin "
                f"({beside}) and one forward pass"
            )
        twin, zeroth = _find(report, beside, peft)[0], _find(report, "mezo", peft)[0]
        if m is not None and m.peak is not None:
            if twin is not None and twin.peak:
                said.append(f"{number(m.peak / twin.peak)} times the peak memory of {beside}")
            if zeroth is not None and zeroth.peak:
                said.append(f"{number(m.peak / zeroth.peak)} times that of mezo")
        if said:
            out.append(f"With {peft}, a step of `{method}` takes {', '.join(said)}.")
    return out


def opening(report: Report) -> list[str]:
    head = report.header
    unfinished = "**This run did not finish: what follows is what was measured until it stopped.**"
    return [
        f"# Cost of a step on `{head.model.name}`", "",
        *([] if report.finished else [unfinished, ""]),
        f"{head.model.architecture} with {head.model.parameters:,} parameters ({head.model.dtype}); {head.data.rows} rows of "
        f"`{head.data.name}` as one minibatch; {head.threads} threads, {head.options.get('device', 'cpu')}.", "",
        "## What does hybrid cost against its parts?", "",
        *([f"- {a}" for a in answers(report)] or ["No hybrid method was measured beside its parts."]), "",
    ]  # fmt: skip


def mib(b: float | None) -> str:
    return "–" if b is None else memory(b)


def memory_table(report: Report) -> list[str]:
    found = report.all(StepMemory)
    if not found:
        return []
    rows = [
        [f"`{m.method}`", m.peft, mib(m.weights), mib(m.kept), mib(m.inference), mib(m.perturbation), mib(m.activations), mib(m.update),
         f"**{mib(m.peak)}**", mib(m.formula), _over(m.peak, m.formula), _over(m.peak, m.inference)]
        for m in found
    ]  # fmt: skip
    head = ["method", "adapter", "weights", "kept between steps", "a forward pass", "perturbed forward passes", "gradient", "update",
            "peak", "formula", "peak/formula", "peak/forward pass"]  # fmt: skip
    return [
        "## Memory", "",
        "Each row is a process of its own; bytes above that process before the model was loaded. Phases follow one another, so the peak "
        "is the largest and not the sum.", "",
        *table(head, rows),
        "![Peak memory by phase](figures/memory.png)", "",
    ]  # fmt: skip


def _over(a: float | None, b: float | None) -> str:
    return "–" if not a or not b else number(a / b)


def time_table(report: Report) -> list[str]:
    found = report.all(StepTime)
    if not found:
        return []
    rows = [
        [f"`{t.method}`", t.peft, _passes(t.forwards, t.backwards), _passes(*t.declared), _passes(*t.formula),
         "–" if t.seconds is None else f"{1e3 * t.seconds:.1f} ms", f"**{number(t.ratio)}** ({interval(t.ratio_interval)})",
         number(t.predicted), number(t.formula[0] + 2 * t.formula[1]), number(t.parts)]
        for t in found
    ]  # fmt: skip
    head = ["method", "adapter", "passes counted", "declared", "formula", "step", "in forward passes (quartiles)",
            "formula, backward as measured", "formula, backward = 2", "over its parts"]  # fmt: skip
    return [
        "## Time", "",
        f"Medians of {found[0].rounds} rounds; in each the step and a forward pass of the same batch run one after the other. F + B: "
        "forward and backward passes.", "",
        *table(head, rows),
        "![Time of a step beside the formula](figures/time.png)", "",
    ]  # fmt: skip


def _passes(forwards: float, backwards: float) -> str:
    return f"{forwards:g} F" + (f" + {backwards:g} B" if backwards else "")


def reading(report: Report) -> list[str]:
    return [
        "## How to read it", "",
        "- Formula of memory (`hybridtheory.theory.cost`): weights, plus Σ over modules of the larger of what is saved for the backward "
        "pass and of the gradient, plus the largest perturbed module, plus the rule's state. What is saved is counted on this model. It "
        "leaves out what a forward pass needs for itself and frees at once (the column “a forward pass”).",
        "- Formula of time: forward and backward passes alone. What a step takes beyond them is drawing directions, adding them and the "
        "update; what it takes less is a one-sided difference that finds its batch in the cache.",
        "- Base-only methods are measured once, without an adapter.", "",
    ]  # fmt: skip
