"""What the kinds of records share; see `probes.records` for the rules that all of them follow."""

from __future__ import annotations

Interval = tuple[float, float]
VOLATILE = {"volatile": True}  # metadata of a field that may differ between two runs of the same measurement
