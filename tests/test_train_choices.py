"""hybrid-train: the best weights on the dev split, and separate rows for the two levels of a bilevel method."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_models import FILMS, write

from hybridtheory.errors import UserError
from probes import records as R
from probes import rundir, train
from probes.jsonl import stable
from probes.tasks import Task, load_task
from probes.train import run
from probes.train_settings import TrainSettings
from probes.train_setup import levels

BILEVEL = {"penalty": 1.0, "inner_lr": 1e-2, "inner_steps": 2}


@pytest.fixture(scope="module")
def data(root: Path) -> Path:
    return write(root / "choices.jsonl", [{"text": f"{t} {i}", "label": i % 2} for i, t in enumerate(FILMS * 4)])


@pytest.fixture
def load(gpt2, data):
    def make(dev: bool = True) -> Task:
        task = load_task(gpt2, data, rows=None)
        rows = task.rows
        task.splits = {"train": rows} | ({"dev": rows[:6]} if dev else {}) | {"test": rows[6:]}
        return task

    return make


def settings(method: str = "peft-sgd", **more) -> TrainSettings:
    return TrainSettings(
        **{"method": method, "lr_base": 1e-4, "lr_peft": 3.0, "steps": 7, "batch": 5, "eval_every": 2, **more}
    )


def go(task: Task, wanted: TrainSettings, folder: Path, resume: bool = False, **more):
    with rundir.RunFolder(folder, resume) as records:
        outcome = run(task, wanted, records.append, folder, **more)
    return rundir.load(folder), outcome


def said(records: list[R.Record]) -> list[str]:
    return [json.dumps([type(r).__name__, stable(r)]) for r in records]


def test_the_best_weights_on_the_dev_rows_are_kept_scored_and_exported(load, tmp_path):
    exported: dict[str, torch.Tensor] = {}

    def keep_what_is_exported(task: Task, moved: bool) -> list[str]:
        exported.update({n: p.detach().clone() for n, p in task.model.named_parameters()})
        return []

    wanted = settings(keep="best")
    records, outcome = go(load(), wanted, tmp_path / "best", finish=keep_what_is_exported)
    dev = {r.step: r.loss for r in records if isinstance(r, R.Evaluation) and r.split == "dev"}
    assert list(dev) == [0, 2, 4, 6, 7]
    best = min(dev, key=lambda s: dev[s])
    assert best not in (0, 7)  # at this rate the loss falls and rises again
    assert outcome.reason == f"the weights of step {best}, the best on 6 dev rows, are kept"
    final = [r for r in records if isinstance(r, R.Evaluation)][-1]
    assert (final.split, final.step) == ("test", best)
    # the same run, ended at that step
    task = load()
    _, other = go(task, settings(steps=best), tmp_path / "last")
    assert other.weights_sha256 == outcome.weights_sha256
    assert all(torch.equal(exported[n], p) for n, p in task.model.named_parameters())
    assert [p.name for p in (tmp_path / "best" / "best").iterdir()] == [f"step-{best:09d}"]

    class Killed(Exception):
        pass

    def kill(what: str, share: float) -> None:
        if what.startswith("step 6"):
            raise Killed

    with pytest.raises(Killed):
        go(load(), settings(keep="best", checkpoint_every=3), tmp_path / "cut", progress=kill)
    parts, second = go(load(), settings(keep="best", checkpoint_every=3), tmp_path / "cut", resume=True)
    assert second.weights_sha256 == outcome.weights_sha256
    assert said(parts)[1:] == said(records)[1:]  # the header has another checkpoint_every


def test_the_best_is_never_chosen_on_test_rows(load, tmp_path):
    with pytest.raises(
        UserError, match=r"--keep best chooses by the dev split, and .* has none \(its splits: train, test\)"
    ):
        go(load(dev=False), settings(keep="best"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    # rows that are shown during the run are not those that choose
    records, _ = go(load(), settings(keep="best", eval_data="train", eval_rows=3), tmp_path / "shown")
    assert [(r.step, r.split) for r in records if isinstance(r, R.Evaluation)][:4] == [
        (0, "train"),
        (0, "dev"),
        (2, "train"),
        (2, "dev"),
    ]


def test_the_two_levels_of_a_bilevel_method_have_rows_of_their_own(load, tmp_path, monkeypatch):
    used: list[set[str]] = []
    batch_of = train.batch_of

    def watched(task, rows, options):
        used.append({str(r["options"]) for r in rows})
        return batch_of(task, rows, options)

    monkeypatch.setattr(train, "batch_of", watched)
    task = load()
    wanted = settings("bilevel", options=BILEVEL, lower_share=0.25, steps=6, eval_every=0, lr_peft=1e-2)
    records, _ = go(task, wanted, tmp_path / "run")
    lower_rows, upper_rows = ({str(r["options"]) for r in rows} for rows in (task.rows[:4], task.rows[4:]))
    upper, lower = (
        set().union(*used[::3]),
        set().union(*used[1::3], *used[2::3]),
    )  # one upper minibatch, two inner steps
    assert upper == upper_rows and lower == lower_rows
    assert next(r for r in records if isinstance(r, R.Epoch)).order.__len__() == 12
    assert any(
        "4 training rows are the lower level's and 12 the upper level's" in r.text
        for r in records
        if isinstance(r, R.Warning)
    )
    used.clear()
    go(
        load(),
        settings("bilevel", options=BILEVEL, lower_share=0.0, steps=8, eval_every=0, lr_peft=1e-2),
        tmp_path / "same",
    )
    assert set().union(*used[::3]) == upper_rows | lower_rows


def test_shares_that_leave_a_level_empty_are_refused(load):
    rows = load().rows
    assert levels(rows, settings(), 0) == (rows, None)
    with pytest.raises(UserError, match=r"--lower-share 0\.01 of 16 training rows leaves one level without a row"):
        levels(rows, settings(lower_share=0.01), 3)
    with pytest.raises(UserError, match="--lower-share is a share"):
        settings(lower_share=1.0)
    with pytest.raises(UserError, match="--keep is last or best"):
        settings(keep="first")
