"""Which engine serves a model, and why: ``exact`` wherever two derivatives can be had, ``difference`` where one can, ``forward`` else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from hybridtheory import memory
from hybridtheory.errors import UserError
from hybridtheory.oracle import ENGINES, Oracle
from hybridtheory.vectors import Tensors

CHOICES = ("auto", *ENGINES)
NO_ROOM = "out of memory"


@dataclass(frozen=True)
class Engine:
    """One of `ENGINES`, and a sentence that says why it was taken; the same on every run of the same measurement."""

    name: str
    reason: str


def choose(oracle: Oracle) -> Engine:
    """Try what each engine needs on the first micro-batch: a product, then a gradient. Parameters and batches stay as they are."""
    if oracle.sharded:
        return Engine(
            "difference", "the weights are sharded, and the gradient of a sharded model cannot be differentiated"
        )
    failed = _trial(oracle, "exact")
    if not failed:
        return Engine("exact", "a Hessian product by double backward works and fits")
    without = _trial(oracle, "difference")
    if not without:
        return Engine("difference", f"double backward: {failed}; a gradient works and fits")
    if NO_ROOM in without:
        return Engine("forward", f"a gradient: {without}; forward passes are what is left")
    raise UserError(f"no engine serves this model: double backward: {failed}; a gradient: {without}")


def _trial(oracle: Oracle, engine: str) -> str:
    """Why one micro-batch cannot be served; empty where it can."""
    trial = Oracle(
        oracle.model, oracle.objective, oracle.batches[:1], oracle.blocks, "hessian", oracle.memory_limit, engine
    )
    device = trial.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    try:
        gradient: list[Tensors] = trial.gradient(*trial.blocks)
        if engine == "exact":
            v = [t for part in gradient for t in part]
            with trial.products() as hess:
                hess(v)
                held = memory.used(device)
        else:
            held = memory.used(device)
    except (RuntimeError, MemoryError, UserError) as error:
        return _why(error)
    if trial.calls["halved"]:
        return f"{NO_ROOM} with the micro-batches that were asked for"
    limit = oracle.memory_limit
    return "" if limit is None or held <= limit else f"{NO_ROOM} under --max-memory"


def _why(error: BaseException) -> str:
    text: Any = str(error).strip().splitlines()
    if memory.exhausted(error) or NO_ROOM in str(error):
        return NO_ROOM
    return f"fails ({text[0][:160] if text else type(error).__name__})"
