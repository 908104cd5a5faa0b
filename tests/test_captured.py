"""Captured energy along a run: against a dense projection, and the same after a resume."""

from __future__ import annotations

import pytest
import torch

from hybridtheory.errors import UserError
from hybridtheory.estimators import Key, SubZero
from probes import captured
from probes.records import Captured
from probes.setup import Probe
from probes.tasks import load_task

SETTINGS = captured.Settings(refreshes=(1, 1000), steps=3, runs=1)


@pytest.fixture(scope="module")
def task():
    return load_task(rows=4)


def of(records) -> list[Captured]:
    return [r for r in records if isinstance(r, Captured)]


def test_the_share_is_that_of_a_dense_projection(task):
    every, kept = of(captured.run(task, SETTINGS))
    probe = Probe.of(task, SETTINGS)
    base = probe.groups[0]
    [gradient] = probe.oracle.gradient(base)
    law = SubZero(rank=8).bind(base, [])
    inside = whole = mean = 0.0
    for (name, like), g in zip(base.parameters.items(), gradient, strict=True):
        if like.dim() != 2:
            continue
        u, v = law.subspace(Key(0, 0), name, *like.shape, like)
        inside += float((u @ (u.T @ g @ v) @ v.T).double().norm()) ** 2
        whole += float(g.double().norm()) ** 2
        mean += 64 / like.numel() * float(g.double().norm()) ** 2
    # The first step's weights and the first window's subspace are those of both runs.
    assert every.captured[0] == pytest.approx(inside / whole, rel=1e-4)
    assert kept.captured[0] == every.captured[0] and kept.loss[0] == every.loss[0]
    assert every.expected[0] == pytest.approx(mean / whole, rel=1e-5)
    matrices = [p for p in base.tensors if p.dim() == 2]
    assert every.share == pytest.approx(64 * len(matrices) / sum(p.numel() for p in matrices))
    assert len(every.captured) == 3 and every.captured[1] != every.captured[0]
    assert all(0 < x < 1 for x in every.captured + kept.captured)


def test_a_resumed_measurement_says_the_same_and_leaves_the_weights(task):
    before = [p.detach().clone() for p in task.model.parameters()]
    whole = of(captured.run(task, SETTINGS))
    assert all(torch.equal(p, q) for p, q in zip(task.model.parameters(), before, strict=True))
    again = of(captured.run(task, SETTINGS, done=whole[:1]))
    assert again == whole


def test_settings_that_cannot_be_run_are_refused():
    for wrong in ({"refreshes": ()}, {"refreshes": (0,)}, {"steps": 0}):
        with pytest.raises(UserError, match="at least 1"):
            captured.Settings(**wrong)


def test_fresh_subspaces_capture_what_is_expected_of_them(task):
    """The mean over subspaces at one point, within five standard errors of the sample."""
    probe = Probe.of(task, SETTINGS)
    base = probe.groups[0]
    name = next(n for n, p in base.parameters.items() if p.dim() == 2 and min(p.shape) > 8)
    [gradient] = probe.oracle.gradient(base)
    like, g = base.parameters[name], dict(zip(base.names, gradient, strict=True))[name]
    law = SubZero(rank=8, refresh=1).bind(base, [])
    found = torch.tensor(
        [captured.captured_energy(law, Key(1, step), name, like, g) for step in range(200)]
    ) / captured.square(g)
    assert abs(float(found.mean()) - 64 / like.numel()) < 5 * float(found.std()) / 200**0.5
