"""The contract of every direction law, one table; the perturbation under it; the streams under that."""

from __future__ import annotations

import copy
import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hybridtheory.blocks import Block, partition
from hybridtheory.errors import UserError
from hybridtheory.estimators import (
    LAWS,
    LOZO,
    SRGF,
    BlockCyclic,
    Coordinate,
    Gaussian,
    Kept,
    Key,
    MagnitudeMask,
    NonFiniteLoss,
    Orthonormal,
    Perturbation,
    Preconditioned,
    Rademacher,
    RandomMask,
    Sphere,
    SubZero,
    TeZO,
    UncoveredRead,
    ZOGradient,
    evaluate,
    generator,
    inner,
    parse,
    perturbed,
)
from hybridtheory.estimators.streams import CHUNK, coins, coins_chunk, normal, normal_chunk, signs, words

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def preconditioned(block: Block) -> Preconditioned:
    return Preconditioned(
        {n: torch.linspace(0.5, 2, p.numel(), dtype=p.dtype).view(p.shape) for n, p in block.parameters.items()}
    )


# name -> (law for a block, is it unbiased for the whole gradient?)
TABLE = {
    "gaussian": (lambda b: Gaussian(), True),
    "sphere": (lambda b: Sphere(), True),
    "rademacher": (lambda b: Rademacher(), True),
    "coordinate": (lambda b: Coordinate(), True),
    "orthonormal": (lambda b: Orthonormal(), True),
    "subzero": (lambda b: SubZero(rank=2, refresh=1), True),
    "subzero reshaped": (lambda b: SubZero(rank=2, refresh=1, reshape=True), True),
    "lozo": (lambda b: LOZO(rank=2, refresh=1), True),
    "tezo": (lambda b: TeZO(rank=3), False),  # given its fixed vectors, which a run never redraws
    "srgf": (lambda b: SRGF(k=3, refresh=1), True),
    "random mask": (lambda b: RandomMask(0.5), False),
    "magnitude mask": (lambda b: MagnitudeMask.of(b, 0.5), False),
    "hizoo": (preconditioned, False),
    "cyclic": (lambda b: BlockCyclic(parts=3), False),
    "kept gaussian": (lambda b: Kept(Gaussian()), True),
}
laws = pytest.mark.parametrize("make", [m for m, _ in TABLE.values()], ids=list(TABLE))


class Scale(nn.Module):
    """Its weight is read by its parent, as in fused attention or ia3."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(1 + 0.1 * torch.randn(n))


class Net(nn.Module):
    """A tied embedding, a layer used twice (as in ALBERT), a norm, and a weight read from outside its module."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(11, 6), nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight
        self.twice, self.norm, self.out, self.scale = nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 4), Scale(6)
        self.back = nn.Linear(4, 6)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for _ in range(2):
            x = x + torch.tanh(self.twice(self.norm(x)))
        return self.head(self.back(torch.tanh(self.out(x * self.scale.weight))))


def problem(dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Block, object]:
    state = torch.get_rng_state()
    torch.manual_seed(0)
    net, ids = Net().to(dtype), torch.randint(0, 11, (5, 7))
    torch.set_rng_state(state)

    def f() -> Tensor:
        z = net(ids)
        return nn.functional.cross_entropy(
            z[:, :-1].reshape(-1, 11).to(torch.promote_types(dtype, torch.float32)), ids[:, 1:].reshape(-1)
        )

    return net, partition(net)[0], f


def copies(block: Block) -> list[Tensor]:
    return [p.detach().clone() for p in block.tensors]


def same_bits(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(
        torch.equal(x.view(torch.uint8) if x.dim() else x, y.view(torch.uint8) if y.dim() else y) for x, y in zip(a, b)
    )


@laws
def test_the_direction_applied_is_the_direction_evaluated(make):
    net, block, f = problem()
    plan, keys, mu = Perturbation(net, block), [Key(3, 1, k) for k in range(3)], 1e-3
    law = make(block)
    zo = evaluate(f, plan, law, keys, mu)
    u = [[zo.law.fill(k, n, p.detach()) for n, p in block.parameters.items()] for k in keys]
    before = copies(block)
    with torch.no_grad():
        for k, direction in enumerate(u):
            sides = []
            for sign in (1, -1):
                for p, w, v in zip(block.tensors, before, direction):
                    p.copy_(w + sign * mu * v)
                sides.append(float(f()))
            assert sides == pytest.approx(zo.losses[k], rel=1e-13)
        for p, w in zip(block.tensors, before):
            p.copy_(w)
    expected = [sum(s / 3 * d[i] for s, d in zip(zo.slopes, u)) for i in range(len(before))]
    for a, b in zip(zo.dense(), expected):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)
    zo.add_to_(-0.1)
    for p, w, e in zip(block.tensors, before, expected):
        torch.testing.assert_close(p.detach(), w - 0.1 * e, rtol=1e-12, atol=1e-13)


@laws
@pytest.mark.parametrize("difference", ["central", "forward"])
def test_one_query_is_applied_as_evaluated_too(make, difference):  # the path without an accumulator
    net, block, f = problem()
    zo = evaluate(f, Perturbation(net, block), make(block), Key(8, 5), 1e-3, difference)
    before, dense = copies(block), zo.dense()
    zo.add_to_(-0.1)
    for p, w, g in zip(block.tensors, before, dense):
        torch.testing.assert_close(p.detach(), w - 0.1 * g, rtol=1e-12, atol=1e-13)


@laws
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_parameters_come_back_bit_for_bit_and_global_randomness_is_untouched(make, dtype):
    net, block, f = problem(dtype)
    plan, before = Perturbation(net, block), copies(block)
    flags, hooks = (
        [p.requires_grad for p in block.tensors],
        [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in net.modules()],
    )
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    law = make(block)
    for difference in ("central", "forward"):
        evaluate(f, plan, law, [Key(1, 2, 0), Key(1, 2, 1)], 0.01, difference)
    assert torch.equal(states[0], torch.get_rng_state())
    assert np.array_equal(states[1], np.random.get_state()[1])  # noqa: NPY002
    assert states[2] == random.getstate()
    assert same_bits(copies(block), before)
    assert flags == [p.requires_grad for p in block.tensors]
    assert hooks == [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in net.modules()]
    assert net.head.weight is net.embed.weight is net._modules["head"]._parameters["weight"]


@laws
def test_a_direction_is_a_function_of_seed_step_query_and_name(make):
    _, block, _ = problem()
    key, items = Key(7, 3, 1), list(block.parameters.items())

    def draw(law, order, key=key):
        bound = law.bind(block, [Key(key.seed, key.step, k) for k in range(3)])
        return {n: bound.fill(key, n, p.detach()) for n, p in order}

    first = draw(make(block), items)
    again = draw(make(block), items[::-1])  # a new law, as after a resume; another order of use
    assert all(torch.equal(first[n], again[n]) for n in first)
    other_dtype = {n: p.detach().float() for n, p in items}
    bound = make(block).bind(block, [Key(7, 3, k) for k in range(3)])
    for n in first:
        torch.testing.assert_close(bound.fill(key, n, other_dtype[n]).double(), first[n], rtol=1e-4, atol=1e-4)
    for changed in (Key(8, 3, 1), Key(7, 4, 1), Key(7, 3, 2)):
        second = draw(make(block), items, changed)
        assert any(not torch.equal(first[n], second[n]) for n in first)


UNBIASED = [(m, n) for n, (m, ok) in TABLE.items() if ok]


@pytest.mark.parametrize("make", [m for m, _ in UNBIASED], ids=[n for _, n in UNBIASED])
def test_unbiased_laws_have_identity_covariance(make):
    """Mean of <u, a> u over draws against a, entry by entry, at five standard errors; |u|^2 against d."""
    torch.manual_seed(1)
    block = Block(
        "b",
        "base",
        {"w": nn.Parameter(torch.randn(6, 4)), "v": nn.Parameter(torch.randn(3, 5)), "c": nn.Parameter(torch.randn(4))},
    )
    a, n = torch.randn(block.numel), 2000
    law, draws = make(block), []
    for step in range(n):
        bound = law.bind(block, [Key(5, step, 0)])
        u = torch.cat(
            [bound.fill(Key(5, step, 0), name, p.detach()).reshape(-1) for name, p in block.parameters.items()]
        )
        draws.append(torch.cat([u * (u @ a), (u @ u)[None]]))
    x = torch.stack(draws).double()
    error = x.std(0) / math.sqrt(n) + 1e-9 * a.norm()
    z = (x.mean(0) - torch.cat([a, torch.tensor([float(block.numel)])]).double()) / error.clamp_min(1e-5)
    assert z.abs().max() < 5, z


def test_a_million_keys_have_a_million_streams():
    seen = set()
    for seed in (0, 5, 5 + 2**32, 2**63):
        for step in range(250_000 // 25):
            for query in range(25):
                seen.add(words(Key(seed, step, query), "layer.weight", 4).tobytes())
    assert len(seen) == 1_000_000


def test_streams_are_what_their_documentation_says():
    key = Key(11, 2, 3)
    # the Mersenne state is the Philox words: numpy's own Mersenne Twister continues it alike
    twister = np.random.MT19937()
    state = np.ascontiguousarray(words(key, "w", 312).view(np.uint32)[::-1])
    twister.state = {"bit_generator": "MT19937", "state": {"key": state, "pos": 624}}
    mine = torch.empty(8, dtype=torch.int32).random_(generator=generator(key, "w"))
    assert np.array_equal(twister.random_raw(8) & 0x7FFFFFFF, mine.numpy())
    philox = np.random.Philox(key=np.array([0x9E3779B97F4A7C15, 0xF39CC0605CEDC834], dtype=np.uint64), counter=0)
    assert not np.array_equal(philox.random_raw(4), words(key, "w", 4))
    whole = torch.empty(CHUNK * 2 + 77)
    u = normal(key, "w", whole.shape, whole)
    parts = [normal_chunk(key, "w", whole, c) for c in (2, 0, 1)]  # shards, in any order
    assert torch.equal(u, torch.cat([parts[1], parts[2], parts[0]]))
    assert not torch.equal(u[:100], u[CHUNK : CHUNK + 100])
    s = signs(key, "w", whole)
    assert set(s.unique().tolist()) == {-1.0, 1.0}
    assert abs(float(s.mean())) < 5 / math.sqrt(s.numel())
    assert abs(float(s[:-32] @ s[32:])) < 5 * math.sqrt(
        s.numel()
    )  # neighbouring bits of a word lie 2^18/32 apart; any lag will do
    for bad in (-1, 2**64):
        with pytest.raises(ValueError, match="seed"):
            Key(bad)


@pytest.mark.parametrize("p", [0.25, 0.3, 1 / 3, 2**-20, 1.0])
def test_coins_are_true_with_their_probability_and_independent(p):
    """p that 8, 16 and 32 bits carry; a chunk is that part of the whole; neighbours do not know of each other."""
    like = torch.empty(CHUNK + 1000, 3)
    found, n = coins(Key(3), "m", like, p), like.numel()
    assert found.shape == like.shape and found.dtype == torch.bool
    flat = found.reshape(-1)
    assert abs(int(flat.sum()) - n * p) <= 5 * math.sqrt(n * p * (1 - p))
    both = (flat[1:] & flat[:-1]).sum()
    assert abs(int(both) - n * p * p) <= 5 * math.sqrt(n * p * p * (1 + 2 * p))
    for chunk in (0, 2):
        assert torch.equal(coins_chunk(Key(3), "m", like, chunk, p), flat[chunk * CHUNK : (chunk + 1) * CHUNK])
    assert torch.equal(found, coins(Key(3), "m", like.double(), p))
    assert p == 1.0 or not torch.equal(found, coins(Key(3), "n", like, p))
    law, like = RandomMask(keep=p), torch.nn.Parameter(like[:, 0])
    mask = law.mask(Key(3), "w", like)
    assert torch.equal(law.mask_chunk(Key(3), "w", like, 1), mask[CHUNK:])
    u = law.fill(Key(3), "w", like)
    assert torch.equal(u, torch.where(mask, normal(Key(3), "w", like.shape, like), 0.0))


def test_hooks_find_the_weights_they_do_not_reach():
    net, block, f = problem()
    plan, law, key = Perturbation(net, block), Gaussian(), Key(1)
    with torch.no_grad():
        with pytest.raises(UncoveredRead, match=r"scale\.weight"), plan.at(law, key, 0.1):
            f()
        assert plan._whole == {"scale.weight"}
        first = float(plan.value(f, law, key, 0.1))
        with perturbed_copy(net, block, law, key, 0.1):
            assert float(f()) == first
        redrawn = Perturbation(net, block, share=False)
        assert float(redrawn.value(f, law, key, 0.1)) == first
        with pytest.raises(RuntimeError, match="already in effect"), plan.at(law, key, 0.1), plan.at(law, key, 0.1):
            pass
    with torch.no_grad(), pytest.raises(UncoveredRead), perturbed(net, block, law, key, 0.1):
        f()


def perturbed_copy(net, block, law, key, scale):
    from contextlib import contextmanager

    @contextmanager
    def inside():
        before = [p.data for p in block.tensors]
        for n, p in block.parameters.items():
            p.data = p.data + scale * law.fill(key, n, p)
        yield
        for p, w in zip(block.tensors, before):
            p.data = w

    return inside()


def test_a_list_of_weights_held_elsewhere_is_found():
    """Replacing the attribute of such a module would silently change nothing."""

    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.linspace(-1, 1, 12, dtype=torch.float64).view(4, 3))
            self.list = [self.weight]

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(x @ self.list[0].T)

    flat, x = Flat(), torch.linspace(0, 1, 15, dtype=torch.float64).view(5, 3)
    block = partition(flat)[0]

    def f():
        return flat(x).square().sum()

    zo = evaluate(f, Perturbation(flat, block), Gaussian(), Key(0), 1e-5)
    gradient = torch.autograd.grad(f(), block.tensors)
    assert zo.slopes[0] == pytest.approx(inner(Gaussian(), Key(0), block, gradient), rel=1e-6)
    with pytest.raises(UserError, match="cannot reach"):
        evaluate(f, Perturbation(flat, block), Gaussian(), Key(0), difference="exact")


def test_gradients_inside_a_perturbation_are_gradients_at_the_perturbed_point():
    net, block, f = problem()
    plan, law, key = Perturbation(net, block), Gaussian(), Key(2)

    def gradients():
        return torch.autograd.grad(f(), block.tensors)

    inside = plan.value(gradients, law, key, 0.05)
    with perturbed_copy(net, block, law, key, 0.05):
        for a, b in zip(gradients(), inside):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_slopes_converge_to_the_exact_derivative():
    """Forward error is O(mu), central O(mu^2); the exact one is <g, u> to rounding."""
    net, block, f = problem()
    plan, key = Perturbation(net, block), Key(4)
    slope = inner(Gaussian(), key, block, torch.autograd.grad(f(), block.tensors))
    assert evaluate(f, plan, Gaussian(), key, difference="exact").slopes[0] == pytest.approx(slope, rel=1e-12)
    for difference, order in (("forward", 1), ("central", 2)):
        errors = [abs(evaluate(f, plan, Gaussian(), key, mu, difference).slopes[0] - slope) for mu in (1e-2, 1e-3)]
        assert 10**order * 0.8 < errors[0] / errors[1] < 10**order * 1.25, (difference, errors)


def test_a_known_value_saves_an_evaluation_and_changes_nothing():
    net, block, f = problem()
    plan, calls = Perturbation(net, block), []

    def counted():
        calls.append(1)
        return f()

    plan.value(f, Gaussian(), Key(0), 1e-3)
    whole = evaluate(counted, plan, Gaussian(), Key(0), 1e-3, "forward")
    assert len(calls) == whole.evaluations == 2
    known = evaluate(counted, plan, Gaussian(), Key(0), 1e-3, "forward", at_w=whole.base)
    assert (len(calls), known.evaluations, known.slopes) == (3, 1, whole.slopes)


@pytest.mark.parametrize("q", [1, 4, 16])
def test_orthonormal_directions_are_orthonormal(q):
    _, block, _ = problem()
    keys = [Key(0, 0, k) for k in range(q)]
    bound = Orthonormal().bind(block, keys)
    u = torch.stack(
        [torch.cat([bound.fill(k, n, p.detach()).reshape(-1) for n, p in block.parameters.items()]) for k in keys]
    )
    torch.testing.assert_close(
        u @ u.T, block.numel * torch.eye(q, dtype=torch.float64), rtol=0, atol=1e-9 * block.numel
    )


def test_subspaces_last_for_the_refresh_interval():
    like = torch.zeros(12, 9, dtype=torch.float64)
    law = SubZero(rank=3, refresh=10)
    (u0, v0), (u9, v9), (u10, _) = (law.subspace(Key(0, s), "w", 12, 9, like) for s in (0, 9, 10))
    assert torch.equal(u0, u9)
    assert torch.equal(v0, v9)
    assert not torch.equal(u0, u10)
    eye = torch.eye(3, dtype=torch.float64)
    torch.testing.assert_close(u0.T @ u0, eye, rtol=0, atol=1e-12)
    step = law.fill(Key(0, 4), "w", like)
    torch.testing.assert_close(u0 @ u0.T @ step @ v0 @ v0.T, step, rtol=1e-10, atol=1e-10)
    lozo = LOZO(rank=2, refresh=10)
    a, b = lozo.fill(Key(0, 3), "w", like), lozo.fill(Key(0, 8), "w", like)
    assert torch.linalg.matrix_rank(torch.cat([a, b])) == 2  # one V for both
    assert SubZero().bind(Block("p", "peft", {"w": nn.Parameter(torch.zeros(8, 64))}), []).reshape is True


def test_the_magnitude_mask_follows_the_weights_and_survives_its_own_update():
    net, block, f = problem()
    law = MagnitudeMask.of(block, 0.25)
    zo = evaluate(f, Perturbation(net, block), law, Key(0), 1e-3)
    before = copies(block)
    zo.add_to_(
        -100.0
    )  # far enough to move entries across the thresholds: the mask of the update must be that of the evaluation
    for (name, p), w in zip(block.parameters.items(), before):
        moved = p.detach() != w
        assert torch.equal(moved, w.abs() <= law.thresholds[name])
    assert 0.2 < sum(float((p.detach() != w).sum()) for p, w in zip(block.tensors, before)) / block.numel < 0.35


def test_block_cyclic_parts_cover_the_block_in_turn():
    _, block, _ = problem()
    law = BlockCyclic(parts=4, stay=2).bind(block, [])
    active = [{n for n in block.names if law.touches(Key(0, s), n)} for s in range(8)]
    assert active[0] == active[1]
    assert set().union(*active) == set(block.names)
    assert all(active[::2])
    assert sum(len(a) for a in active[::2]) == len(block.names)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_realised_direction_is_what_low_precision_let_through(dtype):
    net, block, f = problem(dtype)
    plan, mu = Perturbation(net, block), 1e-2
    master = {n: p.detach().float().clone() for n, p in block.parameters.items()}
    # a slope of language-model size: 1e-6 times a slope of 0.1 is below float32's own resolution beside weights of 1
    zo = evaluate(lambda: 100 * f(), plan, Gaussian(), Key(0), mu, realised=True)
    zo.add_to_(-1e-6, into=master)
    update = torch.cat([(master[n] - p.detach().float()).reshape(-1) for n, p in block.parameters.items()]).double()
    evaluated = []
    for n, p in block.parameters.items():
        u = Gaussian().fill(Key(0), n, p)
        evaluated.append(((p.float() + mu * u).to(dtype).float() - (p.float() - mu * u).to(dtype).float()).reshape(-1))
    cosine = torch.nn.functional.cosine_similarity(
        update, -torch.cat(evaluated).detach().double() * math.copysign(1, zo.slopes[0]), dim=0
    )
    assert cosine > 0.999


def test_low_rank_directions_are_applied_to_few_inputs_and_to_many_weights_alike():
    """Two rows go through the layers, so A Bᵀ is applied to them, not added to 24 x 32 weights: the same value and gradients."""

    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.one, self.two = nn.Embedding(40, 24), nn.Linear(24, 32), nn.Linear(32, 24, bias=False)

        def forward(self, ids: Tensor) -> Tensor:
            return torch.tanh(self.two(torch.tanh(self.one(self.embed(ids)))))

    torch.manual_seed(0)
    net, ids = Layers().double(), torch.tensor([[3, 7]])
    block = partition(net)[0]
    plan, key = Perturbation(net, block), Key(5)
    grads = lambda: torch.autograd.grad(net(ids).square().sum(), block.tensors)  # noqa: E731
    for law in (SubZero(rank=3), LOZO(rank=2), TeZO(rank=4)):
        plan.value(grads, law, key, 0.1)  # from here on nothing needs to be observed
        used: list[str] = []
        watched = replace(law)
        object.__setattr__(
            watched, "factored", lambda k, n, w, law=law, used=used: used.append(n) or law.factored(k, n, w)
        )
        inside = plan.value(grads, watched, key, 0.1)
        assert used == ["embed.weight", "one.weight", "two.weight"]
        with torch.no_grad():
            values = [float(plan.value(lambda: net(ids).sum(), law, key, 0.1)) for _ in range(2)]
        with perturbed_copy(net, block, law, key, 0.1):
            for a, b in zip(grads(), inside):
                torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)
            assert values == pytest.approx([float(net(ids).sum().detach())] * 2, rel=1e-12)


@pytest.mark.parametrize("grad", [False, True])
def test_the_observed_evaluation_takes_the_path_of_the_later_ones(grad):
    """The same bits from the first evaluation on: a resumed run, whose first one comes later, repeats. Reads elsewhere still show."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.one = nn.Embedding(40, 24), nn.Linear(24, 24)

        def forward(self, ids: Tensor) -> Tensor:
            return torch.tanh(self.one(self.embed(ids))) @ self.embed.weight.T  # read here where no module owns it

    torch.manual_seed(0)
    net, ids = Tied(), torch.tensor([[3, 7]])
    block, key, used = partition(net)[0], Key(5), []

    class Watched(SubZero):
        def factored(self, key, name, w):
            used.append(name)
            return super().factored(key, name, w)

    law = Watched(rank=3)
    plan = Perturbation(net, block)

    def f():
        if grad:
            return torch.stack([g.sum() for g in torch.autograd.grad(net(ids).square().sum(), block.tensors)])
        return net(ids).square().sum()

    with torch.set_grad_enabled(grad):
        first, second = plan.value(f, law, key, 0.1), plan.value(f, law, key, 0.1)
        assert torch.equal(first, second)
        assert plan._whole == {"embed.weight"}
        # the embedding's own lookup before its other read is found, then the linear layer alone
        assert used == ["embed.weight", "one.weight", "one.weight", "one.weight"]
        with perturbed_copy(net, block, law, key, 0.1):
            torch.testing.assert_close(f(), first, rtol=1e-4, atol=1e-4)


def test_memory_stays_within_the_largest_tensor():
    """The profiler's record of every allocation: a perturbed forward needs at most the largest tensor beyond a plain one."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 512), nn.Linear(512, 512), nn.Linear(512, 512), nn.Linear(512, 8))
    x, block = torch.randn(2, 64), partition(net)[0]
    plan = Perturbation(net, block)

    def f() -> Tensor:
        return net(x).square().sum()

    def peak(run) -> int:
        run()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as trace:
            run()
        events = [e for e in trace.profiler.kineto_results.events() if e.name() == "[memory]"]
        level = highest = 0
        for event in sorted(events, key=lambda e: e.start_ns()):
            level += event.nbytes()
            highest = max(highest, level)
        return highest

    largest = max(p.numel() for p in block.tensors) * 4
    with torch.no_grad():
        plain = peak(f)
        for law in (Gaussian(), Rademacher(), SubZero(rank=4), LOZO()):
            extra = peak(lambda law=law: evaluate(f, plan, law, Key(0), 1e-3).add_to_(-1e-9)) - plain
            assert extra <= largest * 1.05 + 64 * 1024, (law, extra / largest)
        assert (
            peak(lambda: evaluate(f, plan, Gaussian(), Key(0), 1e-3, keep=True)) > 4 * block.numel
        )  # and that is what was asked for


def test_bad_input_is_answered_and_leaves_the_parameters_alone():
    net, block, f = problem()
    plan, before = Perturbation(net, block), copies(block)
    for mu in (0.0, -1e-3, math.nan):
        with pytest.raises(UserError, match="mu must be positive"):
            evaluate(f, plan, Gaussian(), Key(0), mu)
    with pytest.raises(UserError, match="absorbed"):
        evaluate(f, plan, Gaussian(), Key(0), 1e-30)
    with pytest.raises(UserError, match="rank 50 does not fit"):
        evaluate(f, plan, SubZero(rank=50), Key(0))
    small = nn.Linear(1, 2, bias=False)
    with pytest.raises(UserError, match="orthonormal directions do not exist"):
        Orthonormal().bind(partition(small)[0], [Key(0, 0, k) for k in range(3)])
    with pytest.raises(UserError, match="holds no parameter"):
        Perturbation(net, Block("empty", "base", {}))
    with pytest.raises(UserError, match="another model"):
        Perturbation(nn.Linear(2, 2), block)
    with pytest.raises(UserError, match="difference must be"):
        evaluate(f, plan, Gaussian(), Key(0), difference="two")
    calls = []

    def broken() -> Tensor:
        calls.append(1)
        return f() if len(calls) < 2 else f() * math.inf

    plan.value(f, Gaussian(), Key(6, 1), 1e-3)
    with pytest.raises(NonFiniteLoss, match=r"inf at w - mu u \(mu = 0.001, seed 6, step 1, query 0\)"):
        evaluate(broken, plan, Gaussian(), Key(6, 1), 1e-3)
    assert same_bits(copies(block), before)
    with pytest.raises(UserError, match="no direction law 'gauss'"):
        parse("gauss")
    for text in ("cyclic:stay=0", "random-mask:refresh=0", "lozo:rank=1.5", "srgf:k=2.5", "subzero:rank=-1"):
        with pytest.raises(UserError, match="is a whole number of at least 1"):
            parse(text)
    with pytest.raises(UserError, match="does not take"):
        parse("gaussian:rank=2")
    assert parse("subzero:rank=4,refresh=20") == SubZero(rank=4, refresh=20)
    assert all(parse(name) is not None for name in LAWS)


def test_an_error_in_the_model_leaves_no_trace():
    net, block, f = problem()
    plan, before = Perturbation(net, block), copies(block)
    plan.value(f, Gaussian(), Key(0), 1e-3)
    handle = net.back.register_forward_hook(lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        evaluate(f, plan, Gaussian(), Key(0))
    handle.remove()
    assert same_bits(copies(block), before)
    assert all(isinstance(p, nn.Parameter) for m in net.modules() for p in m._parameters.values() if p is not None)
    assert copy.deepcopy(net) is not None


def test_a_zo_gradient_is_replayed_from_its_numbers():
    net, block, f = problem()
    zo = evaluate(f, Perturbation(net, block), Sphere(), [Key(0, 0, 0), Key(0, 0, 1)], 1e-3)
    rebuilt = ZOGradient(Sphere().bind(block, zo.keys), zo.keys, zo.slopes, block)
    assert all(torch.equal(a, b) for a, b in zip(zo.dense(), rebuilt.dense()))
