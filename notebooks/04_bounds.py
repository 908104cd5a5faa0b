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
# # 04. Do runs obey the bounds?
#
# One step first: the mean change of the loss that Identity Q (infinitesimal curvature) and the finite-scale curve predict, over the one
# that is measured. Then whole
# runs under every theorem whose hypotheses hold on them.

# %%
from pathlib import Path

from probes import convergence_figures, rundir
from probes.convergence import run
from probes.convergence_settings import Settings
from probes.records_convergence import Checked, Descent
from probes.tasks import load_task

ROOT = Path.cwd() if (Path.cwd() / "docs").is_dir() else Path.cwd().parent

# %%
settings = Settings(lr_base=1e-4, lr_peft=0.3, steps=10, runs=2, points=2, precision=0.05, most=100)
live = list(run(load_task(rows=4), settings))
convergence_figures.drawn(live)["descent"]


# %%
def answer(records) -> str:
    """Deviations of one step, then each bound with its slack or with the hypothesis that fails."""
    found = [r for r in records if isinstance(r, Descent)]
    near = max(abs(r.measured / r.quadratic - 1) for r in found if r.factor <= 0.1)
    far = max(abs(r.measured / r.fitted - 1) for r in found)
    lines = [
        f"one step, Identity Q, up to 0.1 of the rates: within {near:.1%}",
        f"one step, finite scale, up to the whole rates: within {far:.1%}",
    ]
    for r in records:
        if isinstance(r, Checked) and r.about == "bound":
            broken = [h.name for h in r.hypotheses if h.holds is False]
            state = (
                f"slack {r.slack:.3g}"
                if r.slack is not None and not broken
                else f"does not apply: {', '.join(broken) or r.note}"
            )
            lines.append(f"{r.name}: {state}")
    return "\n".join(lines)


print(answer(live))

# %% [markdown]
# ## The committed run on the embedded model

# %%
whole = rundir.load(ROOT / "docs" / "reports" / "convergence-embedded")
convergence_figures.drawn(whole)["bounds"]

# %%
print(answer(whole))
