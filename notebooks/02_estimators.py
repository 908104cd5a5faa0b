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
# # 02. What does a subspace do to a zeroth-order estimate?
#
# SubZero's figure shows a larger cosine in a subspace. Larger than what? With the gradient's *projection* on the subspace it is larger;
# with the gradient itself it
# stays at 1/d, because what the subspace gains in cosine it loses in captured energy. Measured with the exact gradient as the reference.

# %%
from pathlib import Path

from probes import figures
from probes.estimators import Settings, run
from probes.markdown import number
from probes.records import Estimator
from probes.report import Report
from probes.tasks import load_task

ROOT = Path.cwd() if (Path.cwd() / "docs").is_dir() else Path.cwd().parent

# %%
laws = ("gaussian", "rademacher", "subzero:rank=4", "lozo:rank=2", "random-mask:keep=0.25")
live = Report.of(run(load_task(rows=8), Settings(laws=laws, precision=0.1, directions=4)))
figures.drawn(live)["subspace"]


# %%
def answer(report: Report) -> str:
    """d E cos^2 with the gradient (1 for one direction of a law that does not know it), and the squared cosine with its projection."""
    lines = []
    for e in report.all(Estimator):
        if e.block != "base" or e.group != "base" or e.q != 1:
            continue
        c = e.quantities["cosine_sq"]
        line = f"{e.law}: d E cos^2 = {number(c.value * e.d)} +- {number((c.stderr or 0) * e.d)}"
        projected = e.quantities.get("cosine_sq_projected")
        if projected is not None:
            line += (
                f"; with the projection {number(projected.value)}, {number(projected.value / c.value)} times as much"
            )
        lines.append(line)
    return "\n".join(lines)


print(answer(live))

# %% [markdown]
# ## SmolLM2-135M on SST-2

# %%
real = Report.load(ROOT / "docs" / "reports" / "estimators-smollm2")
figures.drawn(real)["subspace"]

# %%
print(answer(real))

# %% [markdown]
# The cosine's law is exact for spherical laws: a Beta law with nothing fitted.

# %%
figures.drawn(real)["cosines"]
