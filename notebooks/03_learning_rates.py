# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 03. Which learning rates?
#
# A probe predicts a rate for the base, one for PEFT and their ratio; a sweep finds the best ones by running them. On the embedded
# model with two seeds and a short horizon: the prediction first, from a committed probe, then the sweep, live. Then the committed sweeps
# with their intervals.

# %%
from pathlib import Path

from hybridtheory.errors import UserError
from paper_figs.records import load
from probes import rundir, sweep_figures
from probes.markdown import interval, number, rate
from probes.rates import recommendation
from probes.records_sweep import SweepTask
from probes.report import Report
from probes.sweep import Sweep
from probes.sweep_description import study
from probes.sweep_report import AXES, SweepReport
from probes.sweep_scores import unit

ROOT = Path.cwd() if (Path.cwd() / "docs").is_dir() else Path.cwd().parent
REPORTS = ROOT / "docs" / "reports"

# %% [markdown]
# The prediction, from a probe alone: what was measured at two points of a short run, and the rates that it implies for the eight steps of
# eight rows that are swept below. Notebook 01 makes such a probe live.

# %%
probe = Report.of(load("scale-2-embedded", REPORTS, "notebook 03"))
sizes = {b.name: b.d for b in probe.header.blocks if b.name == b.group}
predicted = recommendation(probe.points, sizes, q=1, batch_size=8, steps=8, mu=1e-3)
for name in ("base", "peft", "ratio"):
    print(f"predicted {name}: {rate(getattr(predicted, name))}")

# %% [markdown]
# The sweep: a grid of factor 3 on each rate alone, on the rows and with the adapter of the probe.

# %%
task = {"name": "lora", "rank": probe.header.peft.rank, "rows": probe.header.data.rows}
description = {
    "steps": 8, "seeds": 2, "axes": ["base", "peft"], "task": [task], "train": {"batch": 8, "eval_rows": probe.header.data.rows},
    "grid": {"base": predicted.base.value, "peft": predicted.peft.value, "points": 3, "extensions": 0, "refine": 3, "boundary": False},
}  # fmt: skip
found = []
Sweep(study(description), found.append, lambda *said: None).run([], {})
live = SweepReport(found)
assert {t.data_sha256 for t in live.all(SweepTask)} == {probe.header.data.sha256}  # the same rows
sweep_figures.drawn(live)["rates-lora-hybrid-8-steps"]


# %%
def answer(report: SweepReport) -> str:
    """The optimum of every line with its interval over seeds, or that there is none."""
    told = []
    for s in report.states:
        best, k = s.optimum, unit(s)
        if best is None:
            continue
        sure = best.identified and best.interval
        value = (
            f"{number(best.rate * k)} ({interval((best.interval[0] * k, best.interval[1] * k))})"
            if sure
            else f"not identified, best run {number(best.best * k)}"
        )
        told.append(f"{s.line.task}, {s.line.method}, {s.line.until}, {AXES[s.line.axis]}: {value}")
    for score in report.scores:
        if score.scored and score.ratio is not None:
            told.append(f"{score.task}, {score.quantity}: predicted/swept {number(score.ratio)}")
    return "\n".join(told)


print(answer(live))

# %% [markdown]
# ## Committed sweeps
#
# The methods at equal budget, and every study whose predictions were committed before its runs. A study that is not there yet is named.

# %%
try:
    methods = SweepReport(load("methods-embedded", REPORTS, "notebook 03"))
    print(answer(methods))
except UserError as error:
    methods = None
    print(f"MISSING: {error}")

# %%
sweep_figures.drawn(methods)["rates-lora-hybrid-80-budget"] if methods else None

# %%
descriptions = sorted(p.stem for p in (ROOT / "studies").glob("*.toml"))
for name in descriptions:
    folder = REPORTS / f"study-{name}"
    if (folder / rundir.RECORDS).exists():
        swept = SweepReport(rundir.load(folder))
        print(f"{folder.name}{'' if swept.finished else ' (NOT FINISHED)'}\n{answer(swept)}")
    else:
        print(f"MISSING: {folder.name} is not swept yet: python studies/run.py {name}")
