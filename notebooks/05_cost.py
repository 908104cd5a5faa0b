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
# # 05. What does a hybrid step cost against its parts?
#
# Time of a step in forward passes of the same batch, interleaved with them, beside the formula: live on the embedded model, whose memory is
# too small to count. Then memory by phase and time on a real model, from the committed run.

# %%
from pathlib import Path

from hybridtheory.errors import UserError
from paper_figs.records import load
from probes import figures
from probes.cost import Settings, run
from probes.markdown import interval, number
from probes.markdown_cost import answers, mib
from probes.records import StepMemory, StepTime
from probes.report import Report

ROOT = Path.cwd() if (Path.cwd() / "docs").is_dir() else Path.cwd().parent
REPORTS = ROOT / "docs" / "reports"

# %%
methods = ("peft-sgd", "mezo", "hybrid", "hybrid+rademacher")
live = Report.of(run({"rows": 8}, Settings(methods=methods, rounds=5, memory=False)))
figures.drawn(live)["time"]


# %%
def answer(report: Report) -> str:
    """Hybrid against its parts, then every method: medians with quartiles, and peaks."""
    told = list(answers(report))
    for t in report.all(StepTime):
        told.append(
            f"{t.method} ({t.peft}): {number(t.ratio)} forward passes ({interval(t.ratio_interval)}), formula {number(t.predicted)}"
        )
    for m in report.all(StepMemory):
        told.append(f"{m.method} ({m.peft}): peak {mib(m.peak)}, formula {mib(m.formula)}")
    return "\n".join(told)


print(answer(live))


# %%
def committed(name: str) -> Report | None:
    """A committed run with its answer and warnings; one that is not there says which command makes it."""
    try:
        found = Report.of(load(name, REPORTS, "notebook 05"))
    except UserError as error:
        print(f"MISSING: {error}")
        return None
    print(answer(found), *(f"WARNING: {w.text}" for w in found.warnings), sep="\n")
    return found


# %% [markdown]
# ## The committed run on the embedded model, with memory

# %%
whole = committed("cost-embedded")

# %%
figures.drawn(whole)["memory"] if whole else None

# %% [markdown]
# ## SmolLM2-135M

# %%
real = committed("cost-smollm2")

# %%
figures.drawn(real)["memory"] if real else None

# %%
figures.drawn(real)["time"] if real else None
