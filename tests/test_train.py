"""hybrid-train: exact resume, whole checkpoints, honest scores, exports that are the model that was trained."""

from __future__ import annotations

import errno
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import FILMS, write

from hybridtheory.errors import UserError
from hybridtheory.optimizers import METHODS
from probes import checkpoints, chosen_rates, metrics, rundir
from probes import records as R
from probes.evaluation import Undifferentiable, batch_of, evaluate, scorer
from probes.export import export
from probes.jsonl import stable
from probes.tasks import Task, load_task
from probes.train import run
from probes.train_settings import TrainSettings, options

RATES = {"lr_base": 1e-4, "lr_peft": 1e-2}


@pytest.fixture(scope="module")
def data(root: Path) -> Path:
    return write(root / "train.jsonl", [{"text": f"{t} {i}", "label": i % 2} for i, t in enumerate(FILMS * 4)])


@pytest.fixture
def load(gpt2, data):
    return lambda **o: load_task(gpt2, data, rows=None, **o)


def settings(method: str = "hybrid", **more) -> TrainSettings:
    return TrainSettings(**{"method": method, **RATES, "steps": 7, "batch": 5, "eval_every": 3, "checkpoint_every": 2, **more})


def go(task: Task, wanted: TrainSettings, folder: Path | None = None, resume: bool = False, **more):
    """(records of the run folder, its outcome)."""
    if folder is None:
        found: list[R.Record] = []
        return found, run(task, wanted, found.append, **more)
    with rundir.RunFolder(folder, resume) as records:
        outcome = run(task, wanted, records.append, folder, **more)
    return rundir.load(folder), outcome


def weights(task: Task) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in task.model.named_parameters()}


def said(records: list[R.Record]) -> list[str]:
    return [json.dumps([type(r).__name__, stable(r)]) for r in records]


# Stateful in every way there is: a scheduler, dense moments, several copies of the adapter, a law with thresholds, dropout, i.i.d. rows.
RESUMED = {
    "hybrid": {"dropout": 0.2, "schedule": "linear", "weight_decay": 0.1},
    "hybrid-adamw": {"accumulate": 2},
    "zo-adam": {"sampling": "iid", "lr_base": 1e-3},
    "bilevel": {"options": {"penalty": 1.0, "inner_lr": 1e-3, "inner_steps": 2}},
    "s-mezo": {"q": 2, "micro_batch": 2},
    "mezo": {"objective": "accuracy", "mu": 0.1},
}


@pytest.mark.parametrize("method", list(RESUMED))
def test_interrupted_and_resumed_is_uninterrupted_bit_for_bit(method, load, tmp_path):
    wanted, generator = settings(method, **RESUMED[method]), torch.get_rng_state()
    whole, first = go(load(), wanted, tmp_path / "whole")
    assert torch.equal(generator, torch.get_rng_state())
    task = load()

    class Killed(Exception):
        pass

    def kill(what: str, share: float) -> None:
        if what.startswith("step 5"):
            raise Killed  # nothing is saved on the way out: what a kill -9 leaves

    with pytest.raises(Killed):
        go(task, wanted, tmp_path / "cut", progress=kill)
    assert checkpoints.step_of(checkpoints.latest(tmp_path / "cut" / "checkpoints")) == 4
    with pytest.raises(KeyboardInterrupt):  # and then Ctrl-C, which saves where it stands
        go(load(), wanted, tmp_path / "cut", resume=True, stop=lambda: True)
    assert checkpoints.step_of(checkpoints.latest(tmp_path / "cut" / "checkpoints")) == 5
    task = load()
    parts, second = go(task, wanted, tmp_path / "cut", resume=True)
    assert second.weights_sha256 == first.weights_sha256 is not None
    assert said(parts) == said(whole)
    assert [r.step for r in parts if isinstance(r, R.Step)] == list(range(1, 8))
    assert [r.step for r in parts if isinstance(r, R.Evaluation)] == [0, 3, 6, 7]
    again, third = go(load(), replace(wanted, seed=1))
    assert third.weights_sha256 != first.weights_sha256
