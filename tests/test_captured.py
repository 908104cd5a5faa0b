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


def test_the_subspace_of_a_step_is_the_one_that_the_step_moves_in(task, monkeypatch):
    """Subspaces kept for two steps, five steps: in the second step of a window, in the first of the next one, and so on."""
    seen: dict[tuple[int, str], tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}
    real = captured.captured_energy

    def look(law, key, name, like, g):
        u, v = law.subspace(key, name, *law.matrix(like), like)
        seen[key.step, name] = u.clone(), v.clone(), like.detach().clone()
        return real(law, key, name, like, g)

    monkeypatch.setattr(captured, "captured_energy", look)
    [found] = of(captured.run(task, captured.Settings(refreshes=(2,), steps=5, runs=1)))
    assert found.status == "finished"
    names = sorted({n for _, n in seen})
    assert len(seen) == 5 * len(names) and len(names) > 5

    def inside(move: torch.Tensor, u: torch.Tensor, v: torch.Tensor) -> float:
        """Share of a matrix's squared norm in the subspace of U and V."""
        return (float((u.T @ move @ v).norm()) / float(move.norm())) ** 2

    for name in names:
        for step in range(4):
            u, v, before = seen[step, name]
            move = seen[step + 1, name][2].double() - before.double()
            assert float(move.norm()) > 0
            assert inside(move, u.double(), v.double()) > 0.999, (name, step)
            # The subspace of the next window is another one, and holds no more of the move than a blind one.
            other = seen[4 if step >= 2 else 2, name]
            assert torch.equal(u, seen[step ^ 1, name][0]) and not torch.equal(u, other[0])
            if min(before.shape) > 40:
                assert inside(move, other[0].double(), other[1].double()) < 0.5, (name, step)


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
