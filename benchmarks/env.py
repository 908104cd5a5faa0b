"""The opponents' own environment: `.venv-bench` sees the packages of the environment that runs this file and adds the public tools.

They are installed without their dependencies, because resolving curvlinops pulls backpack, torchvision and a CUDA build of torch over the
CPU one. What they need beyond torch, numpy and scipy is listed here by hand. A tool that is missing or of another version ends the run: a
benchmark that quietly leaves an opponent out says nothing.

    python benchmarks/env.py            # prints the interpreter to run benchmarks with
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ENV = ROOT / ".venv-bench"
OPPONENTS = (  # distribution, version, the import that has to work
    ("curvlinops-for-pytorch", "3.0.1", "curvlinops"),
    ("PyHessian", "0.1", "pyhessian"),
    ("hessian-eigenthings", "1.0.0a5", "hessian_eigenthings"),
)
NEEDED = (
    "backpack-for-pytorch==1.7.1",
    "unfoldNd",
    "einconv",
    "einops",
    "linear_operator",
    "opt-einsum",
    "jaxtyping",
    "wadler-lindig",
)


def interpreter() -> Path:
    """Path of the environment's python; created and filled on the first call, checked on every call."""
    python = ENV / ("Scripts" if os.name == "nt" else "bin") / "python"
    if not python.exists():
        venv.create(ENV, with_pip=True)
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = subprocess.run([python, "-c", where], check=True, capture_output=True, text=True)
    # A .pth line comes after the environment's own folder on sys.path: its tools win over the parent's, torch comes from the parent.
    Path(site.stdout.strip(), "parent.pth").write_text(f"{sysconfig.get_path('purelib')}\n{ROOT}\n")
    missing = problems(python)
    if missing:
        wanted = [f"{name}=={version}" for name, version, _ in OPPONENTS]
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", *wanted, *NEEDED], check=True)
        missing = problems(python)
    if missing:
        raise SystemExit(
            "make bench compares against three public tools and cannot run without them:\n  " + "\n  ".join(missing)
        )
    return python


def problems(python: Path) -> list[str]:
    """One line for each opponent that does not import or has another version than the one named here."""
    found = []
    for name, version, module in OPPONENTS:
        code = f"import {module}; from importlib.metadata import version; print(version('{name}'))"
        run = subprocess.run([python, "-c", code], capture_output=True, text=True)
        if run.returncode:
            found.append(f"{name}=={version}: {run.stderr.strip().splitlines()[-1]}")
        elif run.stdout.strip() != version:
            found.append(f"{name}=={version}: version {run.stdout.strip()} is installed")
    return found


if __name__ == "__main__":
    print(interpreter())
    sys.exit(0)
