"""trainer.toml: what a training run needs from a probe, readable by people and by `tomllib`.

[rates]        eta_base, eta_peft, ratio; a rate that no rule could give is left out, and a comment says why
[bound_by]     the rule that bound each
[intervals]    lower and upper end of each, with what it covers as a comment
[limits]       the rate above which a quadratic of this curvature is unstable, least over the points
[settings]     what the rates assume: mu, q, direction law, batch size, steps
[source]       model, data, PEFT and seed of the measurement
"""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

from probes import rates

if TYPE_CHECKING:
    from probes.report import Report

NAMES = {"base": "eta_base", "peft": "eta_peft", "ratio": "ratio"}


def value(v: Any) -> str:
    """A TOML value. JSON's strings are TOML's basic strings, but for the escapes of surrogates and the character DEL."""
    if isinstance(v, bool):
        return "true" if v else "false"
    if isinstance(v, float):
        return repr(v) if math.isfinite(v) else {math.inf: "inf", -math.inf: "-inf"}.get(v, "nan")
    if isinstance(v, int):
        return str(v)
    if isinstance(v, list | tuple):
        return "[" + ", ".join(value(x) for x in v) + "]"
    return json.dumps(str(v), ensure_ascii=False).replace("\x7f", "\\u007f")


def comment(text: str) -> str:
    """One line of comment, whatever the text holds."""
    return "# " + " ".join("".join(c if c.isprintable() else " " for c in text).split())


def limits(report: Report, q: int) -> dict[str, float]:
    """Stability limits by group, the least over the measured points; a group without its curvature is left out."""
    found: dict[str, list[float]] = {}
    for point in report.points:
        if "base" in point.blocks and not isinstance(low := rates.bracket_lower(point, q), str):
            found.setdefault("base", []).append(low.value)
        if "peft" in point.blocks and rates.upper_end(point.blocks["peft"]) > 0:
            found.setdefault("peft", []).append(2 / rates.upper_end(point.blocks["peft"]))
    return {group: float(min(values)) for group, values in found.items()}


def text(report: Report) -> str:
    """The file. Without a recommendation it says so and carries no rates, rather than a guess."""
    head, found = report.header, report.recommendation
    lines = [
        comment(
            f"Learning rates for hybrid training (zeroth-order on the base, first-order on PEFT) of {head.model.name}"
        ),
        comment(f"on {head.data.name}, measured by probe-{head.probe}. report.md beside this file has the evidence."),
    ]
    if found is None:
        return "\n".join([*lines, comment("The run ended before rates could be recommended."), ""])
    given = {NAMES[g]: (g, getattr(found, g)) for g in NAMES}
    lines += ["", "[rates]"]
    for name, (group, rate) in given.items():
        if rate is None or rate.value is None:
            missing = "pair of rates" if group == "ratio" else f"{group} weights"
            why = rate.note if rate is not None and rate.note else f"this run has no {missing}"
            lines.append(comment(f"{name}: none ({why})"))
            continue
        bound = found.bound_by.get(group, "")
        lines += [comment(f"{rate.formula}{f' ({rate.theorem})' if rate.theorem else ''}")] if rate.formula else []
        lines += [comment(rate.note)] if rate.note else []
        lines.append(f"{name} = {value(rate.value)}" + (f"  {comment('bound by ' + bound)}" if bound else ""))
    lines += ["", "[bound_by]", *(f"{NAMES.get(g, g)} = {value(rule)}" for g, rule in found.bound_by.items())]
    lines += ["", "[intervals]"]
    for name, (_, rate) in given.items():
        if rate is not None and rate.interval is not None:
            covers = f"  {comment('covers ' + rate.covers)}" if rate.covers else ""
            lines.append(f"{name} = {value(list(rate.interval))}{covers}")
    if found_limits := limits(report, int(found.settings.get("q", 1))):
        lines += [
            "",
            "[limits]",
            comment("stability: zeroth-order steps on the base (lower end of the bracket), 2/L on PEFT"),
        ]
        lines += [f"{NAMES[g]} = {value(limit)}" for g, limit in found_limits.items()]
    lines += [
        "",
        "[settings]",
        comment("the rates hold for these; a direction law, mu or batch size of its own needs its own rates"),
    ]
    lines += [f"{key} = {value(v)}" for key, v in found.settings.items() if v is not None]
    lines += ["", "[source]", f"model = {value(head.model.name)}", f"model_sha256 = {value(head.model.sha256)}"]
    lines += [f"data = {value(head.data.name)}", f"data_sha256 = {value(head.data.sha256)}", f"seed = {head.seed}"]
    if head.peft is not None:
        peft = {
            "type": head.peft.type,
            "rank": head.peft.rank,
            "alpha": head.peft.alpha,
            "init": head.peft.init or None,
        }
        lines.append("peft = { " + ", ".join(f"{k} = {value(v)}" for k, v in peft.items() if v is not None) + " }")
    return "\n".join(lines) + "\n"
