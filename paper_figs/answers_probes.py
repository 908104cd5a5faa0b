"""Questions that one measurement decides: estimators, smoothness, convergence, cost. Each function reads records and states its answer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hybridtheory.errors import UserError
from hybridtheory.estimate import Estimate
from hybridtheory.intervals import block_means
from hybridtheory.theory.descent import Mean, compare
from hybridtheory.theory.moments_subspace import srgf_second_moment
from paper_figs import captured
from paper_figs.records import first, load, there
from probes import markdown_cost
from probes.markdown import interval, number, percent, rate
from probes.records import Allocation, Descent, Estimator, Evaluation
from probes.records_estimators import Compared
from probes.report import Report

WHO = "docs/questions.md"
NEAR = 0.1  # Identity Q is right about a step where it is within this share of what was measured


def report(reports: Path, name: str) -> Report:
    return Report.of(load(name, reports, WHO))


def estimator(found: Report, law: str, group: str) -> Estimator:
    wanted = (e for e in found.all(Estimator) if e.law == law and e.block == e.group == group)
    return first(wanted, f"estimator {law} on the {group} weights of {found.header.model.name}")


def quantity(e: Estimator, name: str) -> Compared:
    return there(e.quantities.get(name), f"{name} of {e.law}")


def half(stderr: float | None) -> float:
    """Half of a 95 % interval."""
    return 1.96 * (stderr or 0.0)


def measured(e: Estimator, name: str, unit: float = 1.0) -> str:
    """Value with its 95 % interval."""
    c = quantity(e, name)
    return (
        f"{number(c.value * unit)} ({interval(((c.value - half(c.stderr)) * unit, (c.value + half(c.stderr)) * unit))})"
    )


def near_zero_cosine(reports: Path) -> str:
    e = estimator(report(reports, "estimators-smollm2"), "gaussian", "base")
    cosine = quantity(e, "cosine")
    theory = there(cosine.predicted, "predicted cosine")
    agrees = abs(cosine.value - theory) <= half(cosine.stderr)
    rows = load("convergence-embedded", reports, WHO)
    changes = [r for r in rows if isinstance(r, Descent) and r.what == "base" and r.factor == 1]
    first(changes, "step of the base at the whole rates")
    pairs = [(Mean(r.measured, r.stderr, r.n), Mean(r.quadratic, r.quadratic_stderr, r.n)) for r in changes]
    held = [compare("Identity Q", m, q, NEAR).holds for m, q in pairs]
    said = "No" if all(held) else "It may be" if False in held else "Not decided"
    told = []
    for r, (m, q) in zip(changes, pairs, strict=True):
        error = half(math.hypot(m.stderr, q.stderr)) / abs(q.value)
        told.append(f"{number(m.value / q.value)} ± {number(error, 2)} (step {r.step})")
    return (
        f"{said}. On SmolLM2-135M the mean cosine with the gradient is {measured(e, 'cosine')}; theory says {number(theory)} for d = "
        f"{e.d:,}, {'inside' if agrees else 'outside'} that interval. On the embedded model one step of the base at the recommended rate "
        f"changes the loss by {', '.join(told)} times what Identity Q predicts (95 %; {len(changes)} point{'s'[: len(changes) != 1]} of a "
        "run), and Identity Q has the trace in it and no cosine."
    )


def batch_size(reports: Path) -> str:
    told = []
    for name in ("estimators-smollm2", "estimators-embedded"):
        found = report(reports, name)
        for a in found.all(Allocation):
            if a.block == a.group:
                c = a.critical_rows
                low, high = max(c.value - half(c.stderr), 0.0), c.value + half(c.stderr)
                told.append(f"{found.header.model.name} {a.group} {number(c.value)} ({interval((low, high))})")
    first(told, "rows against queries")
    return (
        "Rows beyond a critical number σ²/‖∇f‖² hardly lower the error of a zeroth-order estimate, because the directions' part "
        f"does not depend on them; twice the queries or twice the steps halve it. Critical rows: {'; '.join(told)}."
    )


def growth(reports: Path) -> str:
    told = []
    for name in ("estimators-embedded", "estimators-smollm2"):
        found = report(reports, name)
        for group in ("peft", "base"):
            e = estimator(found, "gaussian", group)
            told.append(f"d = {e.d:,}: {measured(e, 'second_moment', 1 / (e.d + 2))}")
    smooth = report(reports, "smoothness-smollm2-sst2")
    worst, trace = (there(smooth.rate(rule, "base"), f"rate of the rule {rule}") for rule in ("worst_case", "measured"))
    unit = there(worst.value, "rate of the rule worst_case")
    times = number(there(trace.value, "rate of the rule measured") / unit)
    sure = "the records hold no interval of either"
    if trace.interval is not None:
        times += f" ({interval((trace.interval[0] / unit, trace.interval[1] / unit))})"
        sure = f"in brackets {trace.covers}; the worst case is 1 over an upper bound and has no interval"
    return (
        f"The second moment of one direction over its formula d + 2: {'; '.join(told)}. What the rate follows is another matter: on "
        f"SmolLM2-135M the measured trace allows {times} times the rate of the worst case, which goes as 1/d ({sure})."
    )


def reshaping(reports: Path) -> str:
    told, fine = [], True
    for name in ("estimators-embedded", "estimators-smollm2"):
        e = estimator(report(reports, name), "subzero:rank=8,refresh=1", "peft")
        moment = quantity(e, "second_moment")
        excess = there(moment.predicted, "predicted second moment") / e.d - 1
        error = half(moment.stderr) / e.d
        fine &= excess > error
        told.append(
            f"d = {e.d:,}: d and {number(100 * excess, 2)} % of it, measured {number(moment.value / e.d)} ± {number(error, 2)} times d"
        )
    said = (
        "The two are beside each other below"
        if fine
        else "Not decided by these records: what the formula adds to d is far less than they resolve"
    )
    return (
        f"{said}. Theory says no for the second moment of a subspace that is drawn anew, since its formula d + 2mn/r² (a matrix) holds m n "
        "and r only, and a reshaped matrix keeps m n; what reshaping changes there is which ranks fit. Adapters' factors reshaped to "
        f"nearly square, formula and measurement (95 %): {'; '.join(told)}."
    )


def projections(reports: Path) -> str:
    found = report(reports, "projections-embedded")
    full, blocks = (estimator(found, x, "base") for x in ("srgf:k=8", "subzero:rank=8,refresh=1"))
    return (
        "Drawn anew at every step, "
        f"E‖ĝ‖²/(d‖∇f‖²) is {measured(full, 'second_moment', 1 / full.d)} in a random subspace of the whole base (S-RGF, k = 8; "
        f"theory says {number(srgf_second_moment(full.d, 8) / full.d)}, since the direction's length varies with k numbers) and "
        f"{measured(blocks, 'second_moment', 1 / blocks.d)} with one subspace a matrix (SubZero, r = 8); d E cos² with the gradient is "
        f"{measured(full, 'cosine_sq', full.d)} and {measured(blocks, 'cosine_sq', blocks.d)}. Kept for long, the two are not compared "
        "at equal k."
    )


def aligned(reports: Path) -> str:
    told = []
    for name in ("estimators-embedded", "estimators-smollm2"):
        found = report(reports, name)
        e = estimator(found, "magnitude-mask:keep=0.25", "base")
        told.append(f"{found.header.model.name} {number(quantity(e, 'captured').value)}")
    return (
        "Not measured yet for subspaces. Nearest to it, coordinates chosen by the weights: of the gradient's energy a random quarter holds "
        f"0.25 in the mean, the quarter with the smallest magnitudes {', '.join(told)}."
    )


def joint(base: Descent, peft: Descent, both: Descent) -> tuple[float, float]:
    """What moving both adds to base alone and PEFT alone, and its standard error.

    It is measured on base's own directions (`hybridtheory.descent`): of the error of both, base's part is not in it. Records of before the
    error was kept hold it in the difference of the two squares.
    """
    if both.coupling is not None and both.coupling_stderr is not None:
        return both.coupling, both.coupling_stderr
    own = max(both.stderr**2 - base.stderr**2, 0.0)
    return both.measured - base.measured - peft.measured, math.sqrt(own + peft.stderr**2)


def coupling(reports: Path) -> str:
    rows = [r for r in load("coupling-embedded", reports, WHO) if isinstance(r, Descent) and r.factor == 1]
    told, most = [], 0.0
    steps: dict[str, list[str]] = {"helps": [], "hurts": [], "is not resolved": []}
    for step in dict.fromkeys(r.step for r in rows):
        here = {r.what: r for r in rows if r.step == step}
        if len(here) < 3:
            continue
        base, peft, both = here["base"], here["peft"], here["both"]
        extra, stderr = joint(base, peft, both)
        theory = both.quadratic - base.quadratic - peft.quadratic
        # In percent of what the two gain alone; a change below zero is a gain.
        unit = -100 / abs(base.measured + peft.measured)
        gain, error = extra * unit, abs(half(stderr) * unit)
        most = max(most, abs(gain) + error)
        steps["is not resolved" if abs(gain) <= error else "helps" if gain > 0 else "hurts"].append(str(step))
        told.append(f"step {step}: {signed(gain)} ± {number(error, 2)} % (Identity Q: {signed(theory * unit)} %)")
    first(told, "step of both halves at the whole rates")
    resolved = "; ".join(f"it {word} at step {' and '.join(at)}" for word, at in steps.items() if at)
    return (
        f"They add up to within {number(most, 2)} %. What the joint step gains beyond base alone and PEFT alone, as a share of the two (95 "
        f"%; above 0: coupling helps), is {', '.join(told)} at the recommended rates (embedded model): {resolved}. To second order the "
        "coupling term is η_x η_y g_x′H_xy g_y: it helps where that is negative and hurts where it is positive."
    )


def signed(x: float) -> str:
    return ("+" if x > 0 else "") + number(x)


@dataclass(frozen=True)
class Bounds:
    """A number and the ends between which it surely lies."""

    value: float
    low: float
    high: float

    def over(self, other: Bounds) -> Bounds:
        return Bounds(self.value / other.value, self.low / other.high, self.high / other.low)

    def __str__(self) -> str:
        return f"{number(self.value)} ({interval((self.low, self.high))})"


# The ends hold for one start of Lanczos with the confidence of their bounds; which rows are measured is not in them.
COVERS = (
    "from what Lanczos found, which errs low, to bounds that hold with {} % each; the choice of rows is not in them"
)


def largest(low: Estimate, high: Estimate) -> Bounds:
    """|λ| of a Hessian with these ends. A Ritz value lies inside the spectrum: what Lanczos found bounds |λ| from below."""
    value = max(-low.value, high.value)
    found = max(-low.value - (low.numerical or 0.0), high.value - (high.numerical or 0.0))
    outer = [e.upper if e.upper is not None else math.copysign(math.inf, sign) for e, sign in ((low, -1), (high, 1))]
    return Bounds(value, found, max(-outer[0], outer[1]))


def ends(found: Report) -> list[tuple[int, Bounds, Bounds]]:
    """(step, largest |λ| of the base's Hessian, of PEFT's) at every point that has both."""
    told = []
    for p in found.points:
        here = [p.blocks[g] for g in ("base", "peft") if g in p.blocks]
        tops = [largest(b.lam_min, b.lam_max) for b in here if b.lam_min is not None and b.lam_max is not None]
        if len(tops) == 2:
            told.append((p.step, tops[0], tops[1]))
    first(told, f"point with both Hessians of {found.header.model.name}")
    return told


def confidence(found: Sequence[Report]) -> str:
    """Of the bounds of the ends of spectra, in percent; the least of them."""
    blocks = [b for r in found for p in r.points for b in p.blocks.values()]
    told = [e.confidence for b in blocks for e in (b.lam_min, b.lam_max) if e is not None and e.confidence is not None]
    return f"{100 * min(told):.0f}" if told else "–"


def scale(reports: Path) -> str:
    told, scales, tops, passed = [], [], [], []
    small = [report(reports, name) for name in ("scale-2-embedded", "scale-64-embedded")]
    for found in small:
        _, base, peft = ends(found)[0]
        adapter = found.header.peft
        scales.append(there(adapter.scale if adapter is not None else None, "scale of an adapter"))
        tops.append(peft)
        passed.append(True if peft.low > base.high else False if peft.high < base.low else None)
        told.append(f"α/r = {number(scales[-1], 2)}: {base} and {peft}")
    if scales[0] == scales[1]:
        raise UserError("they hold one scale of the adapter and two are needed")
    growth, span = tops[1].over(tops[0]), math.log(scales[1] / scales[0])
    power = [math.log(x) / span if x > 0 else -math.inf for x in (growth.value, growth.low, growth.high)]
    large = report(reports, "smoothness-smollm2-sst2")
    along = [(step, base.over(peft)) for step, base, peft in ends(large)]
    said = (
        "At its usual scale yes"
        if all(ratio.low > 1 for _, ratio in along)
        else "Not always"
        if any(ratio.high < 1 for _, ratio in along)
        else "Not decided"
    )
    outcome = (
        "a large enough scale makes it the less smooth of the two"
        if True in passed
        else "which of the two is the less smooth is not resolved at every one of these scales"
        if None in passed
        else "none of these scales makes it the less smooth of the two"
    )
    return (
        f"{said}: on SmolLM2-135M the base's largest |λ| is {', '.join(f'{ratio} (step {step})' for step, ratio in along)} times LoRA's. "
        f"At the start of the embedded model base and LoRA have {'; '.join(told)}: LoRA's grows as (α/r)^p with p = {number(power[0])} "
        f"({number(min(power[1:]))} to {number(max(power[1:]))}), and theory says 2 while B = 0; {outcome}. In brackets: "
        f"{COVERS.format(confidence([*small, large]))}. Other initialisations are not measured yet."
    )


def sizes(reports: Path) -> str:
    told, covers = [], []
    for name in ("scale-2-embedded", "smoothness-smollm2-sst2"):
        found = report(reports, name)
        ratio = found.recommendation.ratio if found.recommendation else None
        told.append(f"{found.header.model.parameters:,} parameters: {rate(ratio)}")
        if ratio is not None and ratio.interval:
            covers.append(ratio.covers)
    ranges = f" Ranges are no 95 % intervals: {', '.join(dict.fromkeys(covers))}." if covers else ""
    return f"Cannot be decided with two models on two tasks. Recommended ratio PEFT/base: {'; '.join(told)}.{ranges}"


def lazy_capture(reports: Path) -> str:
    records = load("captured-embedded", reports, WHO)
    found = captured.by_refresh(records)
    some = first(found.values(), "finished run")
    told = []
    for refresh, runs in found.items():
        share = captured.over(runs)
        told.append(
            f"{captured.name(refresh, runs)} {captured.spread(share.mean(axis=1))}, over its own first step "
            f"{captured.spread(share.mean(axis=1) / share[:, 0])}"
        )
    return (
        f"Mean over a run of {len(some[0].captured)} steps, in units of what a subspace that does not know the gradient captures in the "
        f"mean (ranges are the least and the most of the seeds, no intervals): {'; '.join(told)}. The first subspaces of the seeds hold "
        f"{captured.spread(captured.over(some)[:, 0])}, a luck that is kept with the subspace. So few seeds do not say whether one that "
        f"is kept is used up."
        f"{captured.left_out(records)}"
    )


def accuracy(reports: Path) -> str:
    rows = [r for r in load("accuracy-embedded", reports, WHO) if isinstance(r, Evaluation) and not r.final]
    names = ("accuracy", "calibrated_accuracy", "auc")
    scores = np.array([[getattr(r, n) for n in names] for r in rows], float)  # nan where a row has none
    if len(rows) < 2 or not np.isfinite(scores).all():
        raise UserError(f"two evaluations with {', '.join(names)} are needed")
    changes = np.diff(scores, axis=0).T  # [3, pairs]
    falling = np.diff([r.loss for r in rows]) < 0
    if not falling.any():
        raise UserError("the loss fell between no two evaluations")
    worse = changes[0] < 0
    means, errors = block_means(np.array([*changes, changes[2] - changes[0], worse]), falling)
    told = [f"{n.replace('_', ' ')} {_points(m, e)}" for n, m, e in zip(names, means, errors)]
    ahead, error = means[3], errors[3]
    said = (
        "AUC gains more than accuracy"
        if ahead > error
        else "AUC gains less than accuracy"
        if -ahead > error
        else "Not decided"
    )
    share = f"{percent(means[4])} ± {percent(errors[4])}" if np.isfinite(errors[4]) else percent(means[4])
    return (
        f"{said} where the loss falls: between {falling.sum()} neighbouring pairs of evaluations with a falling loss the means changed by "
        f"{', '.join(told)}; AUC less accuracy {_points(ahead, error)} (95 %, blocks of the run resampled; one run, the same "
        f"{rows[0].rows} rows throughout). Accuracy fell in {(worse & falling).sum()} of these pairs ({share}). AUC is of the order of the "
        "rows alone and does not see where the threshold between the two label words lies; that a threshold moved is not shown by it."
    )


def _points(mean: float, error: float) -> str:
    """In points of a percent."""
    return f"{100 * mean:+.2f}" + (f" ± {100 * error:.2f}" if math.isfinite(error) else "") + " points"


def cost(reports: Path) -> str:
    found = report(reports, "cost-embedded")
    told = markdown_cost.answers(found)
    first(told, "hybrid method beside its parts")
    size = " ".join(f"{w.text[:1].upper()}{w.text[1:]}." for w in found.warnings if w.about == "size")
    return f"On {found.header.model.name}, {found.header.data.rows} rows: {' '.join(told)} {size}".strip()
