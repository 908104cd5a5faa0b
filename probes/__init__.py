"""Probes measure what hybridtheory defines; each yields records and neither prints nor draws.

Names are imported on first use, so that `probes.records` can be read where torch is not installed.
"""

from importlib import import_module
from typing import Any

_HOME = {"probe_smoothness": "probes.smoothness", "probe_estimators": "probes.estimators"}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'probes' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
