"""Records of probe-convergence -> report.md, checks.json, figures and what the terminal shows. No model here."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

from rich.console import Group, RenderableType
from rich.text import Text

from hybridtheory.theory.checks import Hypothesis
from hybridtheory.theory.held import Evidence, evidence
from probes import jsonl, rundir
from probes.markdown import interval, number, seconds, table
from probes.records import Cost, Header, Point, Record, Warning
from probes.records_convergence import Checked, Constants, Descent, Exponent, Trajectory

T = TypeVar("T")
WORDS = {"base": "base alone", "peft": "PEFT alone", "both": "both"}


def all_of(records: Sequence[Record], kind: type[T]) -> list[T]:
    return [r for r in records if isinstance(r, kind)]


def failed(records: Sequence[Record]) -> list[Checked]:
    """Checks that do not hold; an undecided one has not failed."""
    return [c for c in all_of(records, Checked) if c.holds is False]


def seen(records: Sequence[Record]) -> Evidence | None:
    """The measured runs with their constants, as the theorems take them."""
    constants, runs = all_of(records, Constants), all_of(records, Trajectory)
    return evidence(asdict(constants[-1]), [asdict(r) for r in runs]) if constants and runs else None


def verdict(holds: bool | None) -> str:
    return {True: "holds", False: "**fails**", None: "undecided"}[holds]


def ratio(d: Descent, predicted: float, error: float) -> str:
    """measured/predicted ± its standard error."""
    if predicted == 0:
        return "–"
    spread = (d.stderr**2 + error**2) ** 0.5 / abs(predicted)
    return f"{d.measured / predicted:.3f} ± {spread:.3f}"


def share(d: Descent) -> str:
    """Standard error over the mean."""
    return f"{100 * d.stderr / abs(d.measured):.1f} %" if d.measured else "–"


def text(records: Sequence[Record]) -> str:
    """report.md."""
    parts = [
        opening(records),
        answer(records),
        warnings(records),
        descent(records),
        bounds(records),
        constants(records),
        repeat(records),
    ]
    return "\n".join(line for part in parts for line in part).rstrip() + "\n"


def opening(records: Sequence[Record]) -> list[str]:
    head, runs, found = all_of(records, Header)[0], all_of(records, Trajectory), all_of(records, Constants)
    out = [f"# Convergence of `{head.model.name}` on `{head.data.name}`", ""]
    if not rundir.finished(records):
        out += ["**This run did not finish: what follows is what was measured until it stopped.**", ""]
    out.append(
        f"{head.model.architecture} with {head.model.parameters:,} parameters; {head.data.rows} rows, {head.data.tokens:,.0f} "
        f"scored positions; loss: {head.data.loss}."
    )
    if runs and found:
        c = found[-1]
        batch = "all rows in every step" if c.n == 1 else f"{c.n} minibatches an epoch ({c.sampling})"
        rates = ", ".join(f"η {g} = {number(v)}" for g, v in c.eta.items())
        out.append(
            f"{len(runs)} runs of `{c.method}` of {len(runs[0].loss)} steps, {batch}, {rates} ({c.rates_from}), μ = {c.mu:g}, q = {c.q}. "
            f"The loss went from {number(runs[0].loss[0], 4)} to {', '.join(number(r.final, 4) for r in runs)}."
        )
    return [*out, ""]


def answer(records: Sequence[Record]) -> list[str]:
    checks = all_of(records, Checked)
    if not checks:
        return []
    counts = {v: sum(c.holds is v for c in checks) for v in (True, False, None)}
    out = ["## Does theory describe this run?", ""]
    out.append(
        f"{counts[True]} checks hold, {counts[False]} fail, {counts[None]} are undecided "
        f"(a hypothesis does not hold, or the claim is shown without being held to)."
    )
    out.append("")
    out += [
        f"- **fails**: {c.claim}: measured {number(c.measured)}, {words(c)}. {c.note}"
        for c in checks
        if c.holds is False
    ]
    out += [
        "",
        "![Measured descent over predicted descent](figures/descent.png)",
        "",
        "![Slack of every theorem](figures/slack.png)",
        "",
    ]
    return out


def words(c: Checked) -> str:
    return f"bound {number(c.bound)}" if c.bound is not None else f"predicted {number(c.predicted)}"


def warnings(records: Sequence[Record]) -> list[str]:
    found = list({w.text: w for w in all_of(records, Warning)}.values())
    return ["## Read this before using the numbers", "", *(f"- {w.text}" for w in found), ""] if found else []


def descent(records: Sequence[Record]) -> list[str]:
    found = all_of(records, Descent)
    if not found:
        return []
    held = {(c.claim.split(":")[0], c.name): c.holds for c in all_of(records, Checked) if c.about == "descent"}
    rows = []
    for d in found:
        claim = f"one step of {d.what} at {d.factor:g} of the rates (step {d.step})"
        q, f = (held.get((claim, kind)) for kind in ("quadratic", "fitted"))
        broken = [h for h in d.hypotheses if not h.holds]
        rows.append([
            str(d.step), WORDS[d.what], f"{d.factor:g}", number(d.measured), share(d), str(d.n),
            f"{ratio(d, d.quadratic, d.quadratic_stderr)} {verdict(q) if q is not None else ''}",
            f"{ratio(d, d.fitted, d.fitted_stderr)} {verdict(f)}", d.broken if broken else "–",
        ])  # fmt: skip
    points = all_of(records, Point)
    return [
        "## One step: predicted and measured",
        "",
        "Mean change of the loss over Gaussian directions with exact slopes, at fractions of the rates. Identity Q with infinitesimal "
        "curvature is held to 10 % up to 0.1 of the rates; the finite-scale curve, fitted on other directions, to 15 % everywhere.",
        "",
        *table(
            [
                "step",
                "moves",
                "of the rates",
                "measured",
                "standard error",
                "directions",
                "measured/Identity Q",
                "measured/finite-scale",
                "broken hypothesis of Identity Q",
            ],
            rows,
        ),
        *([f"Points at steps {', '.join(str(p.step) for p in points)} of the first run.", ""] if points else []),
    ]


def bounds(records: Sequence[Record]) -> list[str]:
    found = [c for c in all_of(records, Checked) if c.about == "bound"]
    if not found:
        return []
    rows = [[c.claim, number(c.measured), number(c.bound), number(c.slack, 2), verdict(c.holds)] for c in found]
    out = ["## Averaged squared gradient beside every bound", ""]
    out += table(["claim", "measured", "bound", "bound/measured", ""], rows)
    out += ["![Measured curves under their bounds](figures/bounds.png)", ""]
    exponents = all_of(records, Exponent)
    if exponents:
        e = exponents[-1]
        out += [
            f"Exponent of the rate: the running average of ‖∇f‖² falls as T^{e.value:.2f}"
            + (
                f" (95 % interval over {e.runs} runs: {interval(e.interval)})"
                if e.interval
                else " (one run: no interval)"
            )
            + f", fitted from T = {e.start}; bounds fall as T^-1 without noise and as T^-1/2 at noise-limited rates.",
            "",
        ]
    out += ["Hypotheses, each tested on this run:", ""]
    lines: dict[str, list[str]] = {}
    for c in found:
        for h in c.hypotheses:
            lines.setdefault(
                f"{c.name}|{h.name}",
                [c.name, h.name, number(h.value), number(h.limit), "yes" if h.holds else f"**no**{off(h)}"],
            )
    out += table(["theorem", "hypothesis", "value", "limit", "holds"], list(lines.values()))
    return out + [f"- {c.name}: {c.note}" for c in found if c.note and not c.hypotheses] + [""]


def off(h: Hypothesis) -> str:
    """By what factor a hypothesis fails."""
    return "" if math.isnan(h.factor) else f", {number(h.factor, 2)} times off"


def constants(records: Sequence[Record]) -> list[str]:
    found = all_of(records, Constants)
    if not found:
        return []
    c = found[-1]
    rows = [[f"‖H‖ {g}" if g != "coupling" else "‖H_xy‖", number(v)] for g, v in c.norms.items()]
    rows += [[f"L {g} (joint)", number(v)] for g, v in c.L.items()] + [
        [f"L0, L1 {g}", f"{number(a)}, {number(b)}"] for g, (a, b) in c.laws.items()
    ]
    rows += [
        ["tr(H_xx,+), the largest it can be (95 %)", number(c.trace_plus)],
        ["‖H_xy‖_F²", number(c.cross_sq)],
        ["Δ = f(w₀) - f*", number(c.Delta)],
    ]
    rows += [["f*", number(c.f_star)], ["slope error (rms over ‖g_x‖)", number(c.slope_error)]]
    return [
        "## Constants",
        "",
        "The largest over the measured points; between them the steps' own secants are held to them.",
        "",
        *table(["constant", "value"], rows),
    ]


def repeat(records: Sequence[Record]) -> list[str]:
    head = all_of(records, Header)[0]
    costs = [c for c in all_of(records, Cost) if c.phase == "actual"]
    out = ["## To repeat it", ""]
    out += ["```", shlex.join(head.argv), "```", ""] if head.argv else []
    listed = ", ".join(f"{k} {v}" for k, v in head.versions.items())
    out.append(
        f"Seed {head.seed}, {head.threads} threads{f', {listed}' if listed else ''}{f', commit {head.git[:12]}' if head.git else ''}."
    )
    out += [
        f"It took {seconds(c.seconds)}: {number(c.gradients)} gradients, {number(c.products)} products, {number(c.values)} forward passes."
        for c in costs
    ]
    return [*out, "Every measurement stands in `records.jsonl`, every check in `checks.json`.", ""]


def short(claim: str) -> str:
    """The theorem, and which of its claims where it makes several."""
    name, _, rest = claim.partition(": ")
    return f"{name}: {rest}" if "largest" in rest else name


def summary(records: Sequence[Record]) -> RenderableType:
    """One screen: descent, bounds, and what fails."""
    from probes.terminal import grid

    rows = []
    for d in all_of(records, Descent):
        rows.append(
            [
                str(d.step),
                WORDS[d.what],
                f"{d.factor:g}",
                number(d.measured),
                ratio(d, d.quadratic, d.quadratic_stderr),
                ratio(d, d.fitted, d.fitted_stderr),
            ]
        )
    parts: list[RenderableType] = []
    if rows:
        parts += [
            grid(
                ["step", "moves", "of the rates", "mean change", "/ Identity Q", "/ finite scale"],
                rows,
                "one step: measured over predicted",
                left=2,
            ),
            Text(""),
        ]
    found = [c for c in all_of(records, Checked) if c.about == "bound"]
    rows = [[short(c.claim), number(c.measured), number(c.bound), number(c.slack, 2), verdict(c.holds)] for c in found]
    parts += [grid(["averaged squared gradient", "measured", "bound", "slack", ""], rows), Text("")] if rows else []
    parts += [Text(f"! {c.name}: {c.note}", style="yellow") for c in found if c.holds is None and c.note]
    parts += [Text(f"exponent of the rate {e.value:.2f} ({interval(e.interval)})") for e in all_of(records, Exponent)]
    bad = failed(records)
    parts += [Text(f"FAILS {c.claim}: {c.note or words(c)}", style="red") for c in bad]
    checks = all_of(records, Checked)
    parts.append(
        Text(
            f"{sum(c.holds is True for c in checks)} checks hold, {len(bad)} fail, {sum(c.holds is None for c in checks)} are undecided",
            style="bold",
        )
    )
    return Group(*parts)


def save(records: Sequence[Record], folder: rundir.RunFolder) -> list[Path]:
    """report.md, checks.json and the figures, each whole or not at all."""
    from probes import convergence_figures

    checks = json.dumps(
        [{**jsonl.plain(c), "slack": jsonl.plain(c.slack)} for c in all_of(records, Checked)],
        indent=1,
        ensure_ascii=False,
    )
    paths = convergence_figures.save(records, folder)

    def write(content: str) -> object:
        return lambda path: path.write_text(content, encoding="utf-8")

    paths.append(folder.write("checks.json", write(checks + "\n")))  # type: ignore[arg-type]
    paths.append(folder.write("report.md", write(text(records))))  # type: ignore[arg-type]
    return paths
