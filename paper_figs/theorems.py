"""The last column of docs/theorems.md, "holds on real models?", from the committed records: `python -m paper_figs.theorems`."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from hybridtheory.errors import UserError
from hybridtheory.theory.checks import Hypothesis
from paper_figs.questions import write
from paper_figs.records import REPORTS, load
from probes import rundir
from probes.markdown import number
from probes.markdown_estimators import far_off, tested
from probes.records import Point
from probes.records_convergence import Checked
from probes.records_estimators import Estimator
from probes.report import Report

PAGE = Path("docs/theorems.md")
CONVERGENCE = ("convergence-embedded", "bounds-embedded", "convergence-smollm2")
SMOOTHNESS = ("smoothness-smollm2-sst2", "smoothness-smollm2-boolq")
ESTIMATORS = ("estimators-embedded", "estimators-smollm2")


def column(reports: Path = REPORTS) -> dict[str, str]:
    """First words of a row -> what the records say; rows that no model was held to are not among them."""
    return {
        "Identity Q": _descent(reports, "quadratic"),
        "A0": _bound(reports, "A0"),
        "A": _bound(reports, "A"),
        "C'": _bound(reports, "C'"),
        "D": _bound(reports, "D"),
        "Finite-scale rule": _descent(reports, "fitted"),
        "Coupling": _margins(reports),
        "Moments of directions": _moments(reports),
    }


def _each(reports: Path, names: Sequence[str], say: Callable[[Report], str]) -> str:
    """What each record that is there says, behind its name."""
    said = [
        f"{name.partition('-')[2] if name.startswith(('convergence', 'estimators')) else name}: {text}"
        for name in names
        if rundir.whole(reports / name) and (text := say(Report.of(load(name, reports, PAGE.as_posix()))))
    ]
    return "; ".join(said) or "not measured yet"


def _descent(reports: Path, kind: str) -> str:
    def say(found: Report) -> str:
        checks = [c for c in found.all(Checked) if c.about == "descent" and c.name == kind]
        held = [c for c in checks if c.holds is not None]
        if not checks:
            return ""
        text = f"{sum(c.holds is True for c in held)} of {len(held)} one-step changes hold"
        far = max(checks, key=lambda c: abs(c.measured / c.predicted - 1) if c.predicted else 0.0)
        if far.predicted:
            text += (
                f", farthest {far.measured / far.predicted:.3f} of the prediction at {far.at['factor']:g} of the rates"
            )
        return text

    return _each(reports, CONVERGENCE, say)


def _bound(reports: Path, theorem: str) -> str:
    def say(found: Report) -> str:
        checks = [c for c in found.all(Checked) if c.about == "bound" and c.name == theorem]
        if not checks:
            return ""
        decided = [c for c in checks if c.holds is not None]
        if decided:
            broken = [c for c in decided if not c.holds]
            slack = [c.bound / c.measured for c in decided if c.bound is not None and c.measured > 0]
            word = "**fails**" if broken else "holds"
            return f"{word}, bound/measured {number(min(slack))}" if slack else word
        return f"not decided: {_farthest(checks[0].hypotheses)}"

    return _each(reports, CONVERGENCE, say)


def _farthest(hypotheses: Sequence[Hypothesis]) -> str:
    """The hypothesis that is farthest from holding, and by what factor."""
    broken = [h for h in hypotheses if not h.holds]
    if not broken:
        return "its reason stands in the report"
    worst = max(broken, key=lambda h: h.factor if h.factor == h.factor else 0.0)
    return f"`{worst.name}` is {number(worst.factor, 2)} times off" if worst.factor == worst.factor else worst.name


def _margins(reports: Path) -> str:
    def say(found: Report) -> str:
        margins = [p.margin.value for p in found.all(Point) if p.margin is not None]
        return f"λmax(D^-½ H D^-½) = {', '.join(number(m) for m in margins)} (at most 1)" if margins else ""

    return _each(reports, SMOOTHNESS, say)


def _moments(reports: Path) -> str:
    def say(found: Report) -> str:
        estimators = found.all(Estimator)
        return f"{tested(estimators) - len(far_off(estimators))} of {tested(estimators)} measured moments agree"

    return _each(reports, ESTIMATORS, say)


def filled(page: str, said: dict[str, str]) -> str:
    """The page with its last column written anew. UserError names a row that the page does not have."""
    left, out = dict(said), []
    for line in page.splitlines():
        if line.startswith("| ") and not line.startswith("| theorem"):
            cells = re.split(r"(?<!\\)\|", line.strip().strip("|"))
            name = re.split(r"[,(]", cells[0])[0].strip()
            cells[-1] = f" {left.pop(name, 'on problems only')} ".replace("|", r"\|")
            line = f"|{'|'.join(cells)}|"
        out.append(line)
    if left:
        raise UserError(f"{PAGE} has no row called {', '.join(left)}: add it or take it out of paper_figs/theorems.py")
    return "\n".join(out) + "\n"


def main() -> int:
    return write(PAGE, lambda: filled(PAGE.read_text(encoding="utf-8"), column()))


if __name__ == "__main__":
    sys.exit(main())
