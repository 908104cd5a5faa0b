"""Figures of the papers, drawn from committed records only: no script here runs a model.

Each figure is one module with ``RECORDS`` (run folders under docs/reports), ``draw`` (their records to a matplotlib figure) and
``caption`` (their records to a sentence with its numbers). `python -m paper_figs` draws them all.
"""
