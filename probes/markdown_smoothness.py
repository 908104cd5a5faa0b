"""report.md of probe-smoothness: what was measured, on what, how sure it is, and which learning rates follow.

Written for a researcher who did not run the command. The answer comes first, then what limits it (warnings), then the
evidence. A number that is not resolved or not identified says so in words at the number.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hybridtheory.estimate import Estimate
from probes.markdown import cost, estimate, interval, number, percent, repeat, table, warnings
from probes.markdown_rates import learning_rates
from probes.records import Fit
from probes.records_smoothness import BlockPoint

if TYPE_CHECKING:
    from probes.report import Report


def text(report: Report) -> str:
    """The whole file."""
    parts = [
        opening(report),
        warnings(report),
        learning_rates(report),
        smoothness(report),
        curvature(report),
        scale(report),
        run(report),
        preflight(report),
        cost(report),
        repeat(report),
    ]
    return "\n".join(line for part in parts for line in part).rstrip() + "\n"


def opening(report: Report) -> list[str]:
    head = report.header
    model, data = head.model, head.data
    blocks = {g: report.finest(g) for g in ("base", "peft")}
    counts = " and ".join(
        f"{sum(b.d for b in found):,} {'base' if g == 'base' else 'PEFT'} weights in {len(found)} block{'s'[: len(found) > 1]}"
        for g, found in blocks.items()
        if found
    )
    peft = ""
    if head.peft is not None:
        settings = {
            "rank": head.peft.rank,
            "alpha": head.peft.alpha,
            "scale": head.peft.scale,
            "initialised with": head.peft.init or None,
        }
        listed = ", ".join(f"{k} {v}" for k, v in settings.items() if v is not None)
        peft = f" PEFT: {head.peft.type}" + (f" ({listed})" if listed else "") + "."
    losses = [p.loss for p in report.points]
    went = (
        f" The loss went from {number(losses[0], 4)} to {number(losses[-1], 4)} between the first point and the last."
        if len(losses) > 1
        else ""
    )
    cut = f", {data.truncated} of them cut at the context length" if data.truncated else ""
    steps = sum(s.accepted for s in report.steps)
    unfinished = "**This run did not finish: what follows is what was measured until it stopped.**"
    return [
        f"# Smoothness of `{model.name}` on `{data.name}`",
        "",
        *([] if report.finished else [unfinished, ""]),
        f"{model.architecture or 'A model'} with {model.parameters:,} parameters{f' in {model.dtype}' if model.dtype else ''}; "
        f"measured: {counts}.{peft}",
        f"Data: {data.rows} rows{cut}, {data.tokens:,.0f} scored positions. Loss: {data.loss or 'given by the caller'}.",
        f"{len(report.points)} full point{'s'[: len(report.points) != 1]} along a reference run of {steps} steps and "
        f"{len(report.secants)} secants, all on the same rows.{went}",
        "",
    ]


def shown(report: Report, most: int = 24) -> set[str]:
    """Names of the blocks that the tables show: all, or those with the largest curvature where the tables would not
    be read.
    """

    def size(name: str) -> float:
        ends = [
            e.value
            for p in report.points
            if name in p.blocks
            for e in (p.blocks[name].lam_max, p.blocks[name].lam_min)
            if e
        ]
        return max((abs(v) for v in ends), default=0.0)

    names = [b.name for b in report.blocks]
    return set(names if len(names) <= most else sorted(names, key=size, reverse=True)[:most])


def fit_words(fit: Fit) -> str:
    where = "gradient norm" if fit.argument == "full" else "the block's own gradient norm (stronger hypothesis)"
    return (
        f"{fit.data}s, {fit.method}, {where}"
        if fit.data == "secant"
        else f"spectrum at the points, {fit.method}, {where}"
    )


def smoothness(report: Report) -> list[str]:
    if not report.fits:
        return []
    rows = []
    names = shown(report)
    for block in (b for b in report.blocks if b.name in names):
        fit = report.chosen_fit(block.name)
        if fit is None:
            continue
        verdict = "yes" if fit.identified else "**not identified**"
        why = (
            fit.note.removeprefix("L1 not identified").lstrip(": ") or f"the norms span a factor {number(fit.span, 2)}"
        )
        verdict += "" if fit.identified else f": {why}"
        missed = percent(fit.violation_rate)
        if fit.violation_interval is not None:
            missed += f" ({percent(fit.violation_interval[0])} to {percent(fit.violation_interval[1])})"
        rows.append(
            [
                f"`{block.name}`",
                f"{block.d:,}",
                number(fit.L0),
                number(fit.L1),
                verdict,
                number(fit.span, 2),
                str(fit.n),
                missed,
            ]
        )
    out = ["## Generalised smoothness: L(u) ≤ L0 + L1·u", ""]
    out += ["Headline fit per block (upper envelope over the norm u of the full gradient):", ""]
    out += table(["block", "d", "L0", "L1", "L1 identified", "span of u", "points", "held out above the line"], rows)
    out += ["![Local smoothness against gradient norm](figures/smoothness.png)", ""]
    rows = [
        [
            *(
                f"`{f.block}`",
                fit_words(f),
                number(f.L0),
                interval(f.L0_interval),
                number(f.L1),
                interval(f.L1_interval),
            ),
            *("yes" if f.identified else "no", str(f.n)),
        ]
        for f in (report.fits if len(report.blocks) <= 4 else [])
    ]
    if rows:
        out += ["All fits (spectral and secant data are never mixed):", ""]
        out += table(["block", "fit", "L0", "interval", "L1", "interval", "identified", "n"], rows)
    elif report.fits:
        out += ["All fits of all blocks stand in `report.json`.", ""]
    return out


def end(e: Estimate | None) -> str:
    """An end of the spectrum with the bound that theorems use."""
    if e is None:
        return "–"
    bound = (
        f" (bound {number(e.upper)} at {e.confidence:.0%})" if e.upper is not None and e.confidence is not None else ""
    )
    return estimate(e) + bound


def curvature(report: Report) -> list[str]:
    if not report.points:
        return []
    out = ["## Curvature along the run", ""]
    names = shown(report)
    if len(names) < len(report.blocks):
        out += [f"The {len(names)} blocks of largest curvature; all {len(report.blocks)} stand in `report.json`.", ""]
    for p in report.points:
        out += [f"Point {p.index} (step {p.step}): loss {number(p.loss, 4)}, gradient norm {number(p.grad_norm)}.", ""]
        rows = [[f"`{name}`", number(b.grad_norm), *spectrum(b)] for name, b in p.blocks.items() if name in names]
        out += table(["block", "‖g‖", "λ max", "λ min", "tr H", "tr H₊", "effective rank", "g′Hg/‖g‖²"], rows)
        joint = []
        if p.coupling is not None:
            joint.append(f"Coupling of base and PEFT ‖H_xy‖ = {estimate(p.coupling)}.")
        if p.margin is not None:
            verdict = "holds" if p.margin.value <= 1 else "does **not** hold"
            joint.append(
                f"Joint condition: λmax(D^-½ H D^-½) = {estimate(p.margin)}, at most 1 is needed, so it {verdict}."
            )
        out += [" ".join(joint), ""] if joint else []
    notes = unresolved(report)
    out += ["Not resolved:", "", *notes, ""] if notes else []
    out += ["![Spectrum ends and trace of every block](figures/spectrum.png)", ""]
    if any(b.density is not None for p in report.points for b in p.blocks.values()):
        out += ["![Spectral density](figures/density.png)", ""]
    return out


def spectrum(b: BlockPoint) -> list[str]:
    return [end(b.lam_max), end(b.lam_min), *(estimate(e) for e in (b.trace, b.trace_plus, b.effective_rank, b.gHg))]


def unresolved(report: Report) -> list[str]:
    names = {"lam_max": "λ max", "lam_min": "λ min", "trace": "tr H", "trace_plus": "tr H₊", "trace_sq": "tr H²"}
    out = []
    for p in report.points:
        for name, block in p.blocks.items():
            for key, words in names.items():
                e = getattr(block, key)
                if e is not None and not e.resolved:
                    out.append(f"- point {p.index}, `{name}`, {words}: {e.note or 'the error is too large'}")
    return out


def scale(report: Report) -> list[str]:
    rows = []
    for p in report.points:
        for name, b in p.blocks.items():
            if b.at_scale is None or name not in shown(report):
                continue
            mu = b.at_scale.mu
            for key, e in b.at_scale.estimates.items():
                beside = getattr(b, key, None)
                rows.append(
                    [str(p.index), f"`{name}`", key.replace("_", " "), f"{mu:g}", estimate(e), estimate(beside)]
                )
    out = []
    if rows:
        out += table(["point", "block", "", "μ", "as a step of size μ sees it", "infinitesimal"], rows)
    fits = [(p.index, n, f) for p in report.points for n, f in p.phi.items()]
    if fits:
        rows = [[str(i), f"`{n}`", estimate(f.trace), number(f.fit_up_to), str(f.n)] for i, n, f in fits]
        out += ["Mean loss change under random displacements, φ(δ) ≈ T·δ²/2:", ""]
        out += table(["point", "block", "T (an estimate of tr H)", "fitted up to δ", "directions"], rows)
        out += ["![Mean loss change under random displacements](figures/displacement.png)", ""]
    best = [(p.index, n, f) for p in report.points for n, f in p.finite_scale.items()]
    if best:
        rows = []
        for i, n, f in best:
            edge = "an end of the grid: the minimum may lie beyond" if f.at_edge else (f.note or "–")
            rows.append([str(i), f"`{n}`", number(f.eta_star), interval(f.interval), str(f.n), edge])
        out += ["Best single zeroth-order step by forward passes alone:", ""]
        out += table(["point", "block", "η*", "interval", "directions", "note"], rows)
        out += ["![Mean change of the loss in one step](figures/finite_scale.png)", ""]
    return ["## At the scale of a zeroth-order step", "", *out] if out else []


def run(report: Report) -> list[str]:
    if not report.steps:
        return []
    rejected = [s for s in report.steps if not s.accepted]
    losses = [s.loss for s in report.steps if s.accepted]
    out = ["## Reference run", ""]
    if losses:
        out.append(
            f"{len(losses)} steps, loss {number(losses[0], 4)} after the first and {number(losses[-1], 4)} after the last."
        )
    if rejected:
        many = "step was" if len(rejected) == 1 else "steps were"
        out.append(f"{len(rejected)} {many} taken back and a rate halved, because the loss rose.")
    last = ", ".join(f"{name} {number(eta)}" for name, eta in report.steps[-1].eta.items())
    return [*out, f"Rates at its end: {last}.", ""]


def preflight(report: Report) -> list[str]:
    found = report.preflight
    if found is None:
        return []
    words = {
        "ok": "Derivatives of this model can be trusted.",
        "kinked": "This model is kinked (ReLU): its Hessian exists almost everywhere and does not see the kinks, "
        "so curvature at the scale of a zeroth-order step stands beside the infinitesimal one and is the one to trust for such steps.",
        "refused": "Second derivatives of this model cannot be trusted.",
    }
    rows = [
        [c.name, number(c.value), number(c.tolerance), "yes" if c.holds else "**no**", c.note or "–"]
        for c in found.checks
    ]
    out = ["## Preflight", "", words[found.verdict] + (f" {found.note}" if found.note else ""), ""]
    return out + table(["check", "error", "tolerance", "holds", "note"], rows)
