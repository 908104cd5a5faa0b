"""Where a record comes from: versions, commit, host, time. All but the versions are volatile: they do not change the
measurement.
"""

from __future__ import annotations

import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

DISTRIBUTIONS = ("hybridtheory", "torch", "numpy", "scipy", "transformers", "peft", "datasets")


def versions() -> dict[str, str]:
    """Versions of Python and of what computes; "unknown" for a package that is used from its source folder alone."""
    found = {"python": platform.python_version()}
    for name in DISTRIBUTIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "unknown"
    return found


def commit() -> str | None:
    """The commit of this code, with "-dirty" where tracked files differ from it; None outside its own repository.

    The package may be installed inside somebody else's repository: the commit counts only where this very file is
    tracked.
    """
    here = Path(__file__)

    def git(*args: str) -> str:
        done = subprocess.run(["git", *args], cwd=here.parent, capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def provenance() -> dict[str, Any]:
    """Fields of a header that name code, machine and moment."""
    return {
        "versions": versions(),
        "git": commit(),
        "argv": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "host": platform.node(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }
