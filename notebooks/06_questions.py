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
# # 06. What do the records say about the open questions?
#
# Every question with the answer that committed records give, and its interval; one that nothing here has measured says so. First two
# measurements live on the embedded model: what a subspace captures while it is kept, and the cosine of an estimate with the gradient.

# %%
from pathlib import Path

from paper_figs import captured as drawing
from paper_figs.questions import QUESTIONS, answered
from probes import captured
from probes.estimators import Settings, run
from probes.markdown import number
from probes.records import Estimator
from probes.report import Report
from probes.tasks import load_task

ROOT = Path.cwd() if (Path.cwd() / "docs").is_dir() else Path.cwd().parent
REPORTS = ROOT / "docs" / "reports"

# %%
live = list(captured.run(load_task(rows=4), captured.Settings(refreshes=(1, 1000), steps=8, runs=1)))
drawing.draw(live)

# %%
for refresh, runs in drawing.by_refresh(live).items():
    print(
        f"{drawing.name(refresh, runs)}: {number(drawing.over(runs).mean())} of what a blind subspace captures in the mean"
    )

# %%
small = Report.of(run(load_task(rows=4), Settings(laws=("gaussian",), precision=0.1, directions=4)))
for e in small.all(Estimator):
    if e.block == e.group:
        c = e.quantities["cosine_sq"]
        print(f"{e.group}: d E cos^2 = {number(c.value * e.d)} +- {number((c.stderr or 0) * e.d)}, d = {e.d:,}")

# %% [markdown]
# ## Every question, from the committed records

# %%
for i, question in enumerate(QUESTIONS, 1):
    print(f"{i}. {question.text}\n   {answered(question, REPORTS)}\n")
