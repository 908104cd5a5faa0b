"""The training loop: exact epochs, resuming, stopping."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, nn

from hybridtheory.blocks import partition
from hybridtheory.errors import UserError
from hybridtheory.optimizers import MeZO, build
from hybridtheory.training import Outcome, closure_of, minibatches, permutation, train


class Regression:
    """Objective: ½ (prediction - target)², summed over rows."""

    def forward(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return model(batch["x"]).squeeze(-1)

    def loss(self, outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return 0.5 * (outputs - batch["y"]).square().sum()

    def weight(self, batch: dict[str, Tensor]) -> float:
        return float(len(batch["y"]))


@dataclass
class Log:
    epochs: list = field(default_factory=list)
    losses: list = field(default_factory=list)
    infos: list = field(default_factory=list)
    stop_at: int | None = None

    def epoch(self, epoch, order):
        self.epochs.append((epoch, order))

    def step(self, step, loss, info):
        self.losses.append(loss)
        self.infos.append(info)
        return self.stop_at is not None and step >= self.stop_at


def rows(n=10):
    x = torch.linspace(-1, 1, n * 3, dtype=torch.float64).view(n, 3)
    return [{"x": a, "y": a.sum()} for a in x]


def collate(chosen):
    return {k: torch.stack([r[k] for r in chosen]) for k in chosen[0]}


def setup(seed=0, **options):
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    for i, p in enumerate(net.parameters()):
        p.data = torch.linspace(-0.5, 0.6 + i, p.numel(), dtype=torch.float64).view(p.shape)
    base, peft = partition(net, peft=lambda n: n.startswith("2"))
    return net, build("hybrid", net, base, peft, lr_base=1e-2, lr_peft=5e-2, seed=seed, **options)


def go(optimizer, log, steps=12, **options):
    return train(optimizer, Regression(), rows(), collate, log, steps=steps, **{"batch": 4, "seed": 1, **options})


def test_every_epoch_is_a_logged_permutation_and_every_row_is_used_once():
    log, (_, optimizer) = Log(), setup()
    state = torch.get_rng_state()
    assert go(optimizer, log) == Outcome("finished", 12)
    assert torch.equal(state, torch.get_rng_state())
    assert [e for e, _ in log.epochs] == [0, 1, 2, 3]  # 10 rows in 4 + 4 + 2
    assert all(sorted(order) == list(range(10)) for _, order in log.epochs)
    assert len({tuple(order) for _, order in log.epochs}) == 4
    assert log.epochs[2][1] == permutation(10, 1, 2)
    taken = [rows for (_, rows, _), _ in zip(minibatches(10, 4, 1), range(3))]
    assert [len(t) for t in taken] == [4, 4, 2]
    assert [i for t in taken for i in t] == log.epochs[0][1]
    assert log.losses[-1] < log.losses[0]
    assert log.infos[-1]["forwards"] == optimizer.counts["forwards"]
    assert log.infos[-1]["lr"] == [1e-2, 5e-2]
    draws = [r for (_, r, _), _ in zip(minibatches(10, 4, 1, sampling="iid"), range(200))]
    assert all(order is None for (_, _, order), _ in zip(minibatches(10, 4, 1, sampling="iid"), range(3)))
    assert any(len(set(r)) < 4 for r in draws)


@pytest.mark.parametrize("sampling", ["reshuffle", "iid"])
def test_a_run_that_is_resumed_at_any_step_repeats_bit_for_bit(sampling):
    log, (net, optimizer) = Log(), setup()
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 / (1 + t))
    go(optimizer, log, sampling=sampling, scheduler=schedule)
    for split in (1, 5, 8):
        first, (one, half) = Log(), setup()
        scheduler = torch.optim.lr_scheduler.LambdaLR(half, lambda t: 1 / (1 + t))
        go(half, first, steps=split, sampling=sampling, scheduler=scheduler)
        saved = copy.deepcopy((one.state_dict(), half.state_dict(), scheduler.state_dict()))
        second, (two, rest) = Log(), setup(seed=5)
        two.load_state_dict(saved[0])
        after = torch.optim.lr_scheduler.LambdaLR(rest, lambda t: 1 / (1 + t))
        rest.load_state_dict(saved[1])
        after.load_state_dict(saved[2])
        assert go(rest, second, sampling=sampling, scheduler=after).step == 12
        assert first.losses + second.losses == log.losses
        assert all(torch.equal(a, b) for a, b in zip(two.parameters(), net.parameters()))


def test_microbatches_and_accumulation():
    losses = []
    for micro in (None, 1, 3):
        log, (_, optimizer) = Log(), setup()
        go(optimizer, log, micro=micro)
        losses.append(log.losses)
    assert losses[1] == pytest.approx(losses[0], rel=1e-9)
    assert losses[2] == pytest.approx(losses[0], rel=1e-9)
    log, (_, optimizer) = Log(), setup()
    assert go(optimizer, log, accumulate=3, steps=4).status == "finished"
    assert len(log.losses) == 4
    assert len(log.epochs) == 4
    assert len(optimizer.measured[0].keys) == 3


def test_closure_weighs_rows_not_microbatches():
    net, _ = setup()
    batch = collate(rows())
    whole = closure_of(net, Regression(), [batch])
    cut = closure_of(net, Regression(), [{k: v[:9] for k, v in batch.items()}, {k: v[9:] for k, v in batch.items()}])
    assert float(cut()) == pytest.approx(float(whole()), rel=1e-14)
    whole(backward=True)
    first = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    cut(backward=True)
    for a, p in zip(first, net.parameters()):
        torch.testing.assert_close(a, p.grad, rtol=1e-12, atol=1e-15)


def test_divergence_and_stops_have_names():
    log, (_, optimizer) = Log(), setup()
    for group in optimizer.param_groups:
        group["lr"] = 3.0
    outcome = go(optimizer, log, steps=500)
    assert outcome.status in ("diverged", "not finite")
    assert "lower" in outcome.reason
    log, (net, optimizer) = Log(), setup()
    good, data = [], rows()
    data[7]["y"] = torch.tensor(math.nan, dtype=torch.float64)

    class Watch(Log):
        def step(self, step, loss, info):
            good[:] = [p.detach().clone() for p in net.parameters()]
            return super().step(step, loss, info)

    outcome = train(optimizer, Regression(), data, collate, Watch(), steps=12, batch=2, seed=1)
    assert outcome.status == "not finite"
    assert outcome.step == optimizer.steps
    if good:
        assert all(torch.equal(a, p) for a, p in zip(good, net.parameters()))
    log, (_, optimizer) = Log(stop_at=3), setup()
    assert go(optimizer, log) == Outcome("stopped", 4, "the sink asked")


def test_steps_above_the_ceiling_are_counted_across_a_resume():
    always = {"ceiling": -1.0, "patience": 4, "steps": 12}
    (_, whole), (_, first), (_, rest) = setup(), setup(), setup()
    uninterrupted = go(whole, Log(), **always)
    assert uninterrupted.status == "diverged" and uninterrupted.step == 4
    assert go(first, Log(stop_at=1), **always).status == "stopped"
    rest.load_state_dict(first.state_dict())
    resumed = go(rest, Log(), **always)
    assert (resumed.status, resumed.step) == (uninterrupted.status, uninterrupted.step)


def test_bad_input():
    _, optimizer = setup()
    with pytest.raises(UserError, match="minibatch of 11 rows"):
        go(optimizer, Log(), batch=11)
    with pytest.raises(UserError, match="sampling must be"):
        go(optimizer, Log(), sampling="both")


def test_training_works_on_all_weights_by_zeroth_order_alone():
    net, _ = setup()
    log, optimizer = Log(), MeZO(partition(net)[0], net, lr=2e-2, q=4)
    go(optimizer, log, steps=60, batch=10)
    assert log.losses[-1] < 0.5 * log.losses[0]


def test_a_bilevel_method_gets_lower_minibatches_of_its_own_order_and_resumes():
    def bilevel(seed=0):
        net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
        for i, p in enumerate(net.parameters()):
            p.data = torch.linspace(-0.5, 0.6 + i, p.numel(), dtype=torch.float64).view(p.shape)
        base, peft = partition(net, peft=lambda n: n.startswith("2"))
        options = {"penalty": 2.0, "inner_lr": 1e-2, "inner_steps": 3}
        return net, build("bilevel", net, base, peft, lr_base=1e-3, lr_peft=1e-2, seed=seed, **options)

    lower = rows(7)
    log, (net, optimizer) = Log(), bilevel()
    assert go(optimizer, log, steps=30, lower_rows=lower).status == "finished"
    assert log.losses[-1] < log.losses[0]
    assert all(math.isfinite(i["penalty_gap"]) for i in log.infos)
    assert permutation(10, 1, 0) != permutation(10, 1, 0, " of the lower level")
    first, (one, half) = Log(), bilevel()
    go(half, first, steps=11, lower_rows=lower)
    saved = copy.deepcopy((one.state_dict(), half.state_dict()))
    second, (two, rest) = Log(), bilevel(seed=8)
    two.load_state_dict(saved[0])
    rest.load_state_dict(saved[1])
    go(rest, second, steps=30, lower_rows=lower)
    assert first.losses + second.losses == log.losses
    assert all(torch.equal(a, b) for a, b in zip(two.parameters(), net.parameters()))
