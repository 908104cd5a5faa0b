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
# # 01. Is the base less smooth than the adapter?
#
# The theory of hybrid fine-tuning gives each block its own generalized-smoothness constants, |H| <= L0 + L1 |grad|, and says that the
# base's are the
# larger ones. Here they are, measured: first live on the embedded model (1.6 M parameters), then from the committed run on SmolLM2-135M.

# %%
from pathlib import Path

from probes import figures
from probes.markdown import estimate, number
from probes.point import Settings
from probes.report import Report
from probes.smoothness import run
from probes.tasks import load_task

ROOT = Path.cwd() if (Path.cwd() / "docs").is_dir() else Path.cwd().parent

# %%
settings = Settings(points=2, secants=12, run_steps=12, directions=4, max_vectors=24)
live = Report.of(run(load_task(rows=8), settings))
figures.drawn(live)["smoothness"]


# %% [markdown]
# Each block's largest curvature with its one-sided 95 % bound, and the envelope of the secants where the gradient norm spanned a factor 3.


# %%
def answer(report: Report) -> str:
    """The largest |eigenvalue| of each group at the first point, their ratio, and the envelope's constants."""
    first = report.points[0].blocks
    lines = []
    for name in ("base", "peft"):
        block = first[name]
        low, high = abs(block.lam_min.value), block.lam_max.value
        lines.append(f"{name}: largest |eigenvalue| {number(max(low, high))}, upper end {estimate(block.lam_max)}")
    base, peft = (max(abs(first[n].lam_min.value), first[n].lam_max.value) for n in ("base", "peft"))
    lines.append(f"base / PEFT: {number(base / peft)}")
    for f in report.fits:
        if (f.data, f.method, f.argument) == ("secant", "envelope", "full") and f.block in first:
            lines.append(
                f"{f.block}: L0 = {number(f.L0)}, L1 = {number(f.L1)}"
                if f.identified
                else f"{f.block}: L1 is not identified (the norms span a factor {number(f.span)})"
            )
    return "\n".join(lines)


print(answer(live))

# %% [markdown]
# ## SmolLM2-135M on SST-2
#
# From `docs/reports/smoothness-smollm2-sst2`, whose report holds the command.

# %%
real = Report.load(ROOT / "docs" / "reports" / "smoothness-smollm2-sst2")
figures.drawn(real)["smoothness"]

# %%
print(answer(real))

# %% [markdown]
# Whether that is the adapter or only its scale: L of LoRA grows with (alpha/r)^2 and with the norm of its initialisation, and both stand
# in the header.

# %%
print(real.header.peft)
