"""Questions that one measurement decides: estimators, smoothness, convergence, cost. Each function reads records and states its answer."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import numpy as np
from scipy import stats

from hybridtheory.theory.moments_subspace import srgf_second_moment
from paper_figs import captured
from paper_figs.records import load
from probes import markdown_cost
from probes.markdown import interval, number, percent
from probes.records import Allocation, Descent, Estimator, Evaluation
from probes.report import Report
from probes.sweep_compare import mean_interval

WHO = "docs/questions.md"


def report(reports: Path, name: str) -> Report:
    return Report.of(load(name, reports, WHO))


def estimator(found: Report, law: str, group: str) -> Estimator:
    return next(e for e in found.all(Estimator) if e.law == law and e.block == e.group == group)


def measured(e: Estimator, quantity: str, unit: float = 1.0) -> str:
    """Value with its 95 % interval."""
    c = e.quantities[quantity]
    half = 1.96 * (c.stderr or 0.0)
    return f"{number(c.value * unit)} ({interval(((c.value - half) * unit, (c.value + half) * unit))})"


def near_zero_cosine(reports: Path) -> str:
    e = estimator(report(reports, "estimators-smollm2"), "gaussian", "base")
    rows = load("convergence-embedded", reports, WHO)
    changes = [r for r in rows if isinstance(r, Descent) and r.what == "base" and r.factor == 1]
    ratios = [r.measured / r.quadratic for r in changes]
    error = max(r.stderr / abs(r.measured) for r in changes)
    said = "No" if all(abs(x - 1) < 0.1 + 2 * error for x in ratios) else "It may be"
    return (
        f"{said}. On SmolLM2-135M the mean cosine with the gradient is {measured(e, 'cosine')}, as d = {e.d:,} says. One step at the "
        f"recommended rate changes the loss by {number(min(ratios))} to {number(max(ratios))} times what Identity Q predicts (embedded "
        f"model, three points of a run, standard errors up to {percent(error)}), and Identity Q has the trace in it and no cosine."
    )


def batch_size(reports: Path) -> str:
    told = []
    for name in ("estimators-smollm2", "estimators-embedded"):
        found = report(reports, name)
        for a in found.all(Allocation):
            if a.block == a.group:
                c = a.critical_rows
                half = 1.96 * (c.stderr or 0.0)
                told.append(
                    f"{found.header.model.name} {a.group} {number(c.value)} ({interval((max(c.value - half, 0.0), c.value + half))})"
                )
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
    worst, trace = smooth.rate("worst_case", "base"), smooth.rate("measured", "base")
    assert worst is not None and trace is not None and worst.value and trace.value
    return (
        f"The second moment of one direction over its formula d + 2: {'; '.join(told)}. What the rate follows is another matter: on "
        f"SmolLM2-135M the measured trace allows {number(trace.value / worst.value)} times the rate of the worst case, which goes as 1/d."
    )


def reshaping(reports: Path) -> str:
    told = []
    for name in ("estimators-embedded", "estimators-smollm2"):
        e = estimator(report(reports, name), "subzero:rank=8,refresh=1", "peft")
        predicted = e.quantities["second_moment"].predicted
        assert predicted is not None
        told.append(f"d = {e.d:,}: {measured(e, 'second_moment', 1 / predicted)}")
    return (
        "Not the second moment of a subspace that is drawn anew: its formula holds m n and r only, and a reshaped matrix keeps m n. "
        f"Adapters' factors reshaped to nearly square, measured over formula: {'; '.join(told)}. What reshaping changes is which ranks fit."
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
        told.append(f"{found.header.model.name} {number(e.quantities['captured'].value)}")
    return (
        "Not measured yet for subspaces. Nearest to it, coordinates chosen by the weights: of the gradient's energy a random quarter holds "
        f"0.25 in the mean, the quarter with the smallest magnitudes {', '.join(told)}."
    )


def coupling(reports: Path) -> str:
    rows = [r for r in load("convergence-embedded", reports, WHO) if isinstance(r, Descent) and r.factor == 1]
    told, resolved = [], False
    for step in dict.fromkeys(r.step for r in rows):
        here = {r.what: r for r in rows if r.step == step}
        alone = here["base"].measured + here["peft"].measured
        extra = here["both"].measured - alone
        error = 1.96 * math.hypot(*(r.stderr for r in here.values()))
        resolved |= abs(extra) > error
        told.append(f"step {step}: {100 * extra / alone:+.1f} ± {100 * error / abs(alone):.1f} %")
    said = "Not by adding up alone" if resolved else "They add up within the error"
    return (
        f"{said}: what the joint step gains beyond base alone and PEFT alone, as a share of the two (95 %; positive: coupling helps), is "
        f"{', '.join(told)} at the recommended rates (embedded model). To second order the coupling term is η_x η_y g_x′H_xy g_y: it "
        "helps where that is negative and hurts where it is positive."
    )


def scale(reports: Path) -> str:
    told, scales, tops, passed = [], [], [], False
    for name in ("scale-2-embedded", "scale-64-embedded"):
        found = report(reports, name)
        first = found.points[0].blocks
        base, peft = (max(abs(first[g].lam_min.value), first[g].lam_max.value) for g in ("base", "peft"))  # type: ignore[union-attr]
        assert found.header.peft is not None and found.header.peft.scale is not None
        scales.append(found.header.peft.scale)
        tops.append(peft)
        passed |= peft > base
        told.append(f"α/r = {number(scales[-1], 2)}: {number(base)} and {number(peft)}")
    power = np.polyfit(np.log(scales), np.log(tops), 1)[0]
    smooth = report(reports, "smoothness-smollm2-sst2")
    ratios = [
        max(abs(p.blocks["base"].lam_min.value), p.blocks["base"].lam_max.value)  # type: ignore[union-attr]
        / max(abs(p.blocks["peft"].lam_min.value), p.blocks["peft"].lam_max.value)  # type: ignore[union-attr]
        for p in smooth.points
    ]
    said = "At its usual scale yes" if min(ratios) > 1 else "Not always"
    return (
        f"{said}: on SmolLM2-135M the base's largest |λ| is {number(min(ratios))} to {number(max(ratios))} times LoRA's along "
        f"the run. At the start of the embedded model base and LoRA have {'; '.join(told)}: LoRA's grows as (α/r)^{power:.2f}, and theory "
        f"says 2 while B = 0, so {'a large enough scale makes it' if passed else 'none of these scales makes it'} the "
        "less smooth of the two. "
        "Other initialisations are not measured yet."
    )


def sizes(reports: Path) -> str:
    small, large = report(reports, "scale-2-embedded"), report(reports, "smoothness-smollm2-sst2")
    told = []
    for found in (small, large):
        last = found.recommendation
        ratio = last.ratio if last else None
        value = (
            "none"
            if ratio is None or ratio.value is None
            else number(ratio.value) + (f" ({interval(ratio.interval)})" if ratio.interval else "")
        )
        told.append(f"{found.header.model.parameters:,} parameters: {value}")
    return f"Cannot be decided with two models on two tasks. Recommended ratio PEFT/base: {'; '.join(told)}."


def lazy_capture(reports: Path) -> str:
    found = captured.by_refresh(load("captured-embedded", reports, WHO))
    told = []
    for refresh, runs in found.items():
        means = captured.over(runs).mean(axis=1)
        told.append(
            f"{captured.name(refresh, runs)} {number(means.mean())} ({interval((means.min(), means.max()))} over {len(runs)} seeds)"
        )
    steps = len(next(iter(found.values()))[0].captured)
    return (
        f"Mean over a run of {steps} steps, in units of what a subspace that does not know the gradient captures in the mean: "
        f"{'; '.join(told)}."
    )


def accuracy(reports: Path) -> str:
    rows = [
        r
        for r in load("accuracy-embedded", reports, WHO)
        if isinstance(r, Evaluation) and not r.final and r.accuracy is not None
    ]
    pairs = [(a, b) for a, b in pairwise(rows) if b.loss < a.loss]
    fell = [(a, b) for a, b in pairs if (b.accuracy or 0) < (a.accuracy or 0)]
    ends = stats.binomtest(len(fell), len(pairs)).proportion_ci(0.95, method="wilson")
    if not fell:
        return f"It did not happen: in none of {len(pairs)} intervals with a falling loss did accuracy fall (up to {percent(ends.high)})."
    drops = {n: [getattr(b, n) - getattr(a, n) for a, b in fell] for n in ("accuracy", "calibrated_accuracy", "auc")}
    told = []
    for name, values in drops.items():
        around = mean_interval(values)
        told.append(
            f"{name.replace('_', ' ')} {100 * float(np.mean(values)):+.1f} points"
            + (f" ({100 * around[0]:+.1f} to {100 * around[1]:+.1f})" if around else "")
        )
    kept = float(np.mean(drops["auc"])) > float(np.mean(drops["accuracy"])) / 2
    why = (
        "the order of the rows is kept better than the threshold between the two label words, which the loss does not see"
        if kept
        else "the order of the rows suffers as well, so it is not the threshold between the two label words alone"
    )
    return (
        f"Between {len(pairs)} pairs of evaluations with a falling loss, accuracy fell in {len(fell)} ({percent(len(fell) / len(pairs))}, "
        f"95 %: {percent(ends.low)} to {percent(ends.high)}). There the means changed by {', '.join(told)}: {why}."
    )


def cost(reports: Path) -> str:
    found = report(reports, "cost-embedded")
    size = " ".join(f"{w.text[:1].upper()}{w.text[1:]}." for w in found.warnings if w.about == "size")
    return f"On {found.header.model.name}, {found.header.data.rows} rows: {' '.join(markdown_cost.answers(found))} {size}".strip()
