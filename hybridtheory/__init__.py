"""Theory of hybrid zeroth-order and first-order fine-tuning, as definitions and mathematics.

Nothing is imported here on purpose: `hybridtheory.theory` and `probes.records` work where torch is not installed.
"""
