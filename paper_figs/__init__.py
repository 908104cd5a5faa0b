"""Figures of the papers, drawn from committed records only: no script here runs a model."""
