"""The open questions, each with what decides it: `python -m paper_figs.questions` writes docs/questions.md from the committed records.

A question whose record is not there says "not measured yet" and names the command; nothing is answered that no record holds.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hybridtheory.errors import UserError
from paper_figs import answers_probes as probed
from paper_figs import answers_sweeps as swept
from paper_figs.records import COMMANDS, REPORTS, command
from probes import rundir

PAGE = Path("docs/questions.md")


@dataclass(frozen=True)
class Question:
    """answer: reads the records and says it; None: nothing here measures it, and ``missing`` says what would."""

    text: str
    records: tuple[str, ...] = ()
    answer: Callable[[Path], str] | None = None
    missing: str = ""


QUESTIONS = (
    Question("Is random shuffling needed?", ("variants-embedded",), swept.shuffling),
    Question("What does hybrid cost in memory and wall-clock?", ("cost-embedded",), probed.cost),
    Question("Joint or sequential updates?", ("variants-embedded",), swept.order),
    Question("Why can accuracy fall while the loss falls?", ("accuracy-embedded",), probed.accuracy),
    Question("Other zeroth-order methods as the base half?", ("variants-embedded",), swept.halves),
    Question("How does hybrid stand beside SGD and Adam?", ("methods-embedded",), swept.baselines),
    Question(
        "How do base and PEFT updates combine, and when does the coupling term help or hurt?",
        ("coupling-embedded",),
        probed.coupling,
    ),
    Question(
        "First-order baselines with gradient accumulation at equal memory?",
        missing="`probe-cost --micro-batch 1` of `sgd` and `adamw` beside `hybrid`, then a sweep of those that fit.",
    ),
    Question("Batch size?", ("estimators-smollm2", "estimators-embedded"), probed.batch_size),
    Question("Does lower variance speed convergence up?", ("queries-embedded",), swept.variance),
    Question("How much do seeds matter?", ("methods-embedded",), swept.seeds),
    Question("Do grid edges hide better rates?", ("methods-embedded",), swept.edges),
    Question(
        "Is a near-zero cosine a problem?", ("estimators-smollm2", "convergence-embedded"), probed.near_zero_cosine
    ),
    Question("Does reshaping change the theory?", ("estimators-embedded", "estimators-smollm2"), probed.reshaping),
    Question("Block-diagonal or full random projection?", ("projections-embedded",), probed.projections),
    Question(
        "QR of random matrices or weight-aligned subspaces?",
        ("estimators-embedded", "estimators-smollm2"),
        probed.aligned,
    ),
    Question("Does lazy refresh cost anything in training?", ("refresh-embedded",), swept.refresh),
    Question("What does a lazily refreshed subspace capture?", ("captured-embedded",), probed.lazy_capture),
    Question(
        "Relative or raw averages over tasks?",
        missing="a sweep of several methods on two tasks or more; `hybrid-sweep` then reports the share of the best decrease, never a "
        "raw loss.",
    ),
    Question("Zeroth-order LoRA against LoRA at equal compute?", ("methods-embedded",), swept.zo_lora),
    Question(
        "How does it grow with d_x and d_y?",
        ("estimators-embedded", "estimators-smollm2", "smoothness-smollm2-sst2"),
        probed.growth,
    ),
    Question(
        "The ratio across model sizes, 1 M to 135 M?", ("scale-2-embedded", "smoothness-smollm2-sst2"), probed.sizes
    ),
    Question(
        "Is the base less smooth than PEFT, or is that α/r and the initialisation?",
        ("scale-2-embedded", "scale-64-embedded", "smoothness-smollm2-sst2"),
        probed.scale,
    ),
)


def answered(question: Question, reports: Path = REPORTS) -> str:
    """The answer with its interval, or that it is not measured yet, with what would measure it."""
    if question.answer is None:
        return f"Not measured yet: {question.missing}"
    try:
        gone = [n for n in question.records if not rundir.whole(reports / n)]
        if gone:
            return f"Not measured yet: {', '.join(f'`{command(n)}`' for n in gone)}."
        return question.answer(reports)
    except UserError as error:
        return f"Cannot be decided from these records: {error}."


def page(reports: Path = REPORTS) -> str:
    """docs/questions.md."""
    out = [
        "# Questions and answers", "",
        "Written by `python -m paper_figs.questions` from the committed records and from nothing else; intervals are 95 % where a "
        "sentence does not say what else they are. A number is of the model that its record names: the embedded model has 1.6 M "
        "parameters, and what holds there need not hold elsewhere. `python studies/records.py NAME` makes a record again.", "",
    ]  # fmt: skip
    for i, question in enumerate(QUESTIONS, 1):
        out += [f"## {i}. {question.text}", "", answered(question, reports), ""]
        if question.records:
            out += [f"*Records:* {', '.join(f'`docs/reports/{n}`' for n in question.records)}", ""]
    used = dict.fromkeys(n for q in QUESTIONS for n in q.records)
    out += ["## The commands", "", "| record | command |", "|---|---|"]
    out += [f"| {n} | `{command(n)}` |" for n in COMMANDS if n in used]
    return "\n".join(out) + "\n"


def write(to: Path, text: Callable[[], str]) -> int:
    """Write a page of the docs; the exit code, with one sentence where that fails."""
    try:
        to.write_text(text(), encoding="utf-8")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(
            f"error: {to} cannot be written ({error.strerror or error}): run it in the repository's root",
            file=sys.stderr,
        )
        return 2
    print(to)
    return 0


def main() -> int:
    return write(PAGE, page)


if __name__ == "__main__":
    sys.exit(main())
