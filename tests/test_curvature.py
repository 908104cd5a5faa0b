"""Eigenvalues, traces, density, coupling and margin on matrices whose spectrum is known."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from torch import Tensor

from hybridtheory import streams
from hybridtheory.blocks import Block, partition
from hybridtheory.curvature import coupling, end_excess, lanczos, margin, mean_estimate, spectrum, traces
from hybridtheory.errors import UserError
from hybridtheory.forward import Values
from hybridtheory.quadrature import negative_part
from hybridtheory.traces import flipped
from hybridtheory.vectors import dot
from tests.test_oracle import dense
from tests.toys import Quadratic, language_oracle, quadratic_oracle, spectrum_matrix

DECAY = torch.cat([100.0 * 0.8 ** torch.arange(60), -20.0 * 0.7 ** torch.arange(40)])


def block_of(n: int) -> Block:
    """A block of two tensors with n numbers in all, to draw start vectors for."""
    model = Quadratic(torch.eye(n, dtype=torch.float64), n // 2)
    return partition(model)[0]


def matvec(H: Tensor):
    half = H.shape[0] // 2

    def product(v: list[Tensor]) -> list[Tensor]:
        w = H @ torch.cat(v)
        return [w[:half], w[half:]]

    return product


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("basis", [True, False])
def test_both_ends_to_their_stated_error(seed: int, basis: bool) -> None:
    H = spectrum_matrix(DECAY, seed)
    block = block_of(100)
    run = lanczos(matvec(H), streams.gaussian(block, seed, "start"), tol=0.01, basis=basis, failure=0.005)
    assert run.lam_max.resolved and run.lam_min.resolved
    assert run.lam_max.value == pytest.approx(100, rel=0.01)
    assert run.lam_min.value == pytest.approx(-20, rel=0.01)
    # Ritz values come from inside, the bounds lie outside, and some eigenvalue lies within the residual.
    assert run.lam_max.value <= 100 + 1e-9 <= run.lam_max.upper + 2e-9
    assert run.lam_min.value >= -20 - 1e-9 >= run.lam_min.upper - 2e-9
    assert (DECAY.double() - run.lam_max.value).abs().min() <= run.lam_max.residual + 1e-9


def test_unresolved_says_so() -> None:
    H = spectrum_matrix(torch.linspace(-1, 1, 100))
    run = lanczos(matvec(H), streams.gaussian(block_of(100), 0, "start"), max_steps=5, tol=1e-4)
    assert not run.lam_max.resolved and "after 5 products" in run.lam_max.note


def test_bound_holds_with_its_probability_over_starts() -> None:
    """A spectrum with its top eigenvalue alone (the hard case): the bound may fail in a share `failure` of the starts."""
    d, steps, failure, starts = 100, 5, 0.2, 300
    values = torch.cat([torch.ones(1), torch.zeros(d - 1) + 0.6 * torch.linspace(0, 1, d - 1)]).double()
    H = torch.diag(values)
    block = block_of(d)
    fails = 0
    for seed in range(starts):
        run = lanczos(matvec(H), streams.gaussian(block, seed, "s"), max_steps=steps, min_steps=steps, tol=1e-9)
        fails += 1.0 - run.lam_max.value > end_excess(d, steps, failure)
    limit = failure + 5 * math.sqrt(failure * (1 - failure) / starts)
    assert fails / starts <= limit
    # It is not vacuous: a tenth of the excess fails often.
    assert end_excess(d, steps, failure) < 1


def test_end_excess_falls_with_steps_and_rises_with_dimension() -> None:
    assert end_excess(10**8, 40, 0.05) < end_excess(10**8, 20, 0.05) < end_excess(10**9, 20, 0.05) <= 1
    assert end_excess(10**6, 20, 0.05, mixed=True) > end_excess(10**6, 20, 0.05)
    assert end_excess(5, 5, 0.05) == 0.0
    # sinh((2k-1) artanh sqrt(eps)) = sqrt(2d/pi)/failure, the equation it solves
    eps = end_excess(1000, 10, 0.1)
    assert math.sinh(19 * math.atanh(math.sqrt(eps))) == pytest.approx(math.sqrt(2000 / math.pi) / 0.1, rel=1e-9)
    with pytest.raises(UserError, match="probability"):
        end_excess(10, 3, 0.0)


def test_exhausted_krylov_space_is_exact() -> None:
    run = lanczos(matvec(spectrum_matrix(torch.tensor([3.0, 3.0, -1.0, -1.0]))), streams.gaussian(block_of(4), 0, "s"))
    assert run.steps == 2 and run.lam_max.value == pytest.approx(3) and run.lam_min.value == pytest.approx(-1)
    flat = lanczos(lambda v: [torch.zeros_like(t) for t in v], streams.gaussian(block_of(4), 0, "s"))
    assert flat.lam_max.value == flat.lam_min.value == 0.0 and flat.lam_max.resolved


def test_quadrature_gives_traces_of_functions() -> None:
    H = spectrum_matrix(DECAY)
    runs = [
        lanczos(matvec(H), streams.gaussian(block_of(100), 0, "slq", i), max_steps=40, min_steps=40) for i in range(60)
    ]
    values = DECAY.double().numpy()
    for f, exact in (
        (lambda x: x, values.sum()),
        (lambda x: np.maximum(x, 0), values[values > 0].sum()),
        (lambda x: x**2, (values**2).sum()),
    ):
        found = mean_estimate([100 * float(r.weights @ f(r.nodes)) for r in runs])
        assert found.stderr is not None and abs(found.value - exact) <= 5 * found.stderr


def test_start_from_the_last_point_saves_products() -> None:
    H, there = spectrum_matrix(DECAY), spectrum_matrix(DECAY * 1.05)
    oracle, (block,) = _single(H)
    with oracle.products() as hess:
        first = spectrum(hess, block, 0, tol=0.01)
    oracle, (block,) = _single(there)
    with oracle.products() as hess:
        cold = spectrum(hess, block, 1, tol=0.01, min_steps=3)
        warm = spectrum(hess, block, 1, warm=first.warm, tol=0.01, min_steps=3)
    assert warm.lam_max.value == pytest.approx(105, rel=0.01) and warm.lam_min.value == pytest.approx(-21, rel=0.01)
    assert warm.steps < cold.steps


def _single(H: Tensor):
    oracle, _ = quadratic_oracle(H, H.shape[0] // 2)
    blocks = partition(oracle.model)
    oracle.blocks = blocks
    return oracle, blocks


def test_traces_of_all_blocks_out_of_shared_products() -> None:
    H = spectrum_matrix(DECAY)
    oracle, blocks = quadratic_oracle(H, 30)
    with oracle.products() as hess:
        found = traces(hess, blocks, seed=0, tol=0.02, max_vectors=2000, chunk=50)
    parts = {"base": H[:30, :30], "peft": H[30:, 30:]}
    rows = {"base": H[:30], "peft": H[30:]}
    for name, part in parts.items():
        trace, square = found[name].trace, found[name].trace_sq
        assert trace.stderr is not None and abs(trace.value - float(part.trace())) <= 5 * trace.stderr
        assert square.stderr is not None
        assert abs(square.value - float((rows[name] ** 2).sum())) <= 5 * square.stderr
        assert trace.resolved


def test_trace_beside_a_lanczos_run_is_unbiased_and_far_less_noisy() -> None:
    H = spectrum_matrix(DECAY)
    oracle, blocks = _single(H)
    with oracle.products() as hess:
        run = spectrum(hess, blocks[0], seed=0)
        plain = traces(hess, blocks, seed=0, pilot=64, max_vectors=64)["base"]
        beside = traces(hess, blocks, seed=0, pilot=64, max_vectors=64, beside=run)["base"]
    for found, exact in ((beside.trace, float(DECAY.sum())), (beside.trace_sq, float((DECAY.double() ** 2).sum()))):
        assert found.stderr is not None
        assert abs(found.value - exact) <= 5 * found.stderr
    assert plain.trace.stderr is not None and beside.trace.stderr is not None
    assert beside.trace.stderr < plain.trace.stderr / 2
    assert beside.forms.sum(axis=1).mean() == pytest.approx(beside.trace.value, rel=1e-12)


def test_trace_forms_split_by_micro_batch() -> None:
    oracle, blocks = language_oracle(rows=2, ragged=True)
    with oracle.products() as hess:
        found = traces(hess, blocks[1:], seed=0, max_vectors=8)["peft"]
    assert found.forms.shape == (4, 3)  # eight vectors are four pairs
    assert found.forms.sum(axis=1).mean() == pytest.approx(found.trace.value, rel=1e-12)


def test_a_pair_cancels_what_couples_alternate_matrices() -> None:
    """Var z'Hz of a pair is 2 Σ H_ij² over the pairs i ≠ j that share a sign: exactly nothing where only coupling is left."""
    within = torch.cat([torch.full((8,), 3.0), torch.full((8,), -1.0)]).double()
    mixed = torch.randn(8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    H = torch.diag(within)
    H[:8, 8:], H[8:, :8] = mixed, mixed.T
    oracle, blocks = _single(H)  # two tensors of eight numbers
    with oracle.products() as hess:
        found = traces(hess, blocks, seed=0, pilot=8, max_vectors=8)["base"]
    assert found.trace.value == pytest.approx(16.0, rel=1e-12) and found.trace.stderr == pytest.approx(0, abs=1e-12)
    assert found.trace.n == 8 and found.forms.shape == (4, 1)
    assert found.trace_sq.value == pytest.approx(float((H**2).sum()), abs=5 * (found.trace_sq.stderr or 0.0))


def test_vectors_go_on_in_pairs_only_where_that_pays() -> None:
    """Where nothing couples the two halves a pair is one sample for the price of two: the rest is drawn independently."""
    H = spectrum_matrix(DECAY)
    H[:50, 50:] = 0.0
    H[50:, :50] = 0.0
    oracle, blocks = _single(H)
    with oracle.products() as hess:
        apart = traces(hess, blocks, seed=0, tol=1e-3, max_vectors=2048, chunk=64)["base"]
    pair_variance = 2 * float((H**2).sum() - (H.diagonal() ** 2).sum())
    assert apart.trace.n == 2048 and apart.trace.stderr is not None
    # 1,024 samples of two independent vectors each; pairs would have twice this variance.
    assert apart.trace.stderr**2 * 2048 == pytest.approx(pair_variance, rel=0.25)
    assert abs(apart.trace.value - float(H.trace())) <= 5 * apart.trace.stderr


def test_lanczos_ends_where_the_bound_answers_the_question() -> None:
    H = spectrum_matrix(torch.cat([torch.linspace(-0.3, 0.25, 397), torch.tensor([0.26, 0.27, 0.28])]))
    start = lambda seed: streams.gaussian(block_of(400), seed, "lanczos")  # noqa: E731
    whole = lanczos(matvec(H), start(0), ends=("max",), tol=1e-3)
    early = lanczos(matvec(H), start(0), ends=("max",), tol=1e-3, below=1.0)
    assert early.steps < whole.steps and early.lam_max.resolved and "below 1" in early.lam_max.note
    assert early.lam_max.upper is not None and early.lam_max.value <= 0.28 <= early.lam_max.upper < 1.0
    never = lanczos(matvec(H), start(0), ends=("max",), tol=1e-3, below=0.28)
    assert never.steps == whole.steps and never.lam_max == whole.lam_max


def test_a_rough_stand_in_saves_products_and_biases_nothing() -> None:
    H = spectrum_matrix(DECAY)
    oracle, blocks = _single(H)
    exact = float(H.trace())

    def stand_in(z: list[Tensor]) -> np.ndarray:
        flat = torch.cat([t.flatten() for t in z])
        return np.array([0.9 * float(flat @ H @ flat) + 0.02 * exact * math.sin(17.0 * float(flat[:7].sum())) + 5.0])

    scores, products = [], []
    with oracle.products() as hess:
        for seed in range(120):
            before = oracle.calls["product"]
            found = traces(hess, blocks, seed, tol=0.05, stand_ins=[stand_in])["base"]
            products.append(oracle.calls["product"] - before)
            assert found.trace.stderr is not None and found.trace.stderr < 0.11 * exact
            scores.append((found.trace.value - exact) / found.trace.stderr)
            assert found.forms.sum(axis=1).mean() == pytest.approx(found.trace.value, rel=1e-9)
        alone = traces(hess, blocks, 0, tol=0.05, max_vectors=4096)["base"].trace
    assert abs(np.mean(scores)) < 5 / math.sqrt(len(scores)) and np.mean(np.abs(scores) > 3) < 0.05
    assert float(np.median(products)) < alone.n / 4


def test_a_useless_stand_in_is_left_alone() -> None:
    H = spectrum_matrix(DECAY)
    oracle, blocks = _single(H)
    draws = np.random.default_rng(0)
    with oracle.products() as hess:
        plain = traces(hess, blocks, 0, tol=0.1)["base"]
        noisy = traces(hess, blocks, 0, tol=0.1, stand_ins=[lambda z: draws.normal(0, 1e4, 1)])["base"]
        broken = traces(hess, blocks, 0, tol=0.1, stand_ins=[lambda z: np.array([math.nan])])["base"]
    assert plain.trace == noisy.trace == broken.trace


def test_values_between_products_leave_them_as_they_were() -> None:
    """The stand-in moves the weights and puts them back while graphs are held."""
    oracle, blocks = language_oracle(rows=2)
    base = blocks[0]
    values = Values(oracle, base)
    with oracle.products() as hess:
        v = [torch.ones_like(t) for t in base.tensors]
        first = hess(v, base)
        found = traces(hess, [base], 0, tol=0.02, stand_ins=[partial(values.quotient, h=h) for h in (3e-2, 1e-4)])[
            base.name
        ].trace
        again = hess(v, base)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert found.stderr is not None


def test_every_other_matrix_is_flipped() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.LayerNorm(3), torch.nn.Linear(3, 2))
    (block,) = partition(model)
    signs = dict(zip(block.parameters, flipped(block), strict=True))
    assert [name for name, flip in signs.items() if flip] == ["2.weight"]
    (vectors,) = partition(Quadratic(torch.eye(4, dtype=torch.float64), 2))
    assert flipped(vectors) == [False, True]


def test_a_trace_that_is_zero_is_not_resolved() -> None:
    H = spectrum_matrix(torch.cat([torch.ones(20), -torch.ones(20)]))
    oracle, blocks = _single(H)
    with oracle.products() as hess:
        found = traces(hess, blocks, seed=0, max_vectors=32)["base"].trace
    assert not found.resolved and "32 vectors" in found.note


def test_coupling_and_margin_against_the_dense_hessian() -> None:
    oracle, (base, peft) = language_oracle(layers=1, width=8)
    with oracle.products() as hess:
        cross = dense(hess, [peft], [base])
        whole = torch.cat([dense(hess, [base], [base, peft]), dense(hess, [peft], [base, peft])], dim=1)
        found = coupling(hess, [base], [peft], seed=0, tol=0.01)
        limits = {"base": 5.0, "peft": 0.5}
        joint = margin(hess, limits, seed=0, tol=0.01)
    exact = float(torch.linalg.svdvals(cross)[0])
    assert found.resolved and found.value == pytest.approx(exact, rel=0.01) and found.value <= exact * (1 + 1e-9)
    assert found.upper is not None and found.upper >= exact
    assert (whole - whole.T).abs().max() <= 1e-12 * whole.abs().max()
    D = torch.cat([torch.full((b.numel,), limits[b.name] ** -0.5, dtype=torch.float64) for b in (base, peft)])
    ends = torch.linalg.eigvalsh(D[:, None] * whole * D)
    assert joint.lam_max.value == pytest.approx(float(ends[-1]), rel=0.01)
    assert joint.lam_min.value == pytest.approx(float(ends[0]), rel=0.01)
    with oracle.products() as hess, pytest.raises(UserError, match="positive L"):
        margin(hess, {"base": 1.0, "peft": 0.0}, seed=0)


def test_coupling_with_one_weight_is_known_after_one_pair_of_products() -> None:
    h = torch.arange(1.0, 6.0, dtype=torch.float64)
    base, one = (
        Block(name, name, {name: torch.nn.Parameter(torch.zeros(n, dtype=torch.float64))})
        for name, n in (("base", 5), ("peft", 1))
    )

    def product(v: list[torch.Tensor], inp: list[Block], out: list[Block]) -> list[torch.Tensor]:
        return [h * v[0]] if out[0] is base else [(h @ v[0]).reshape(1)]

    found = coupling(product, [base], [one], seed=0)  # type: ignore[arg-type]
    assert found.resolved and not found.note and found.n == 1
    assert found.value == pytest.approx(float(h.norm()))


def test_mean_estimate() -> None:
    found = mean_estimate([1.0, 2.0, 3.0])
    assert found.value == 2.0 and found.stderr == pytest.approx(1 / math.sqrt(3)) and found.resolved
    assert not mean_estimate([1.0]).resolved
    assert not mean_estimate([1.0, -1.0, 0.5]).resolved


def test_inner_products_are_taken_in_float64() -> None:
    """The terms cancel to 1 out of 2e8: a float32 sum loses it."""
    a = [torch.tensor([1e8, 1.0, -1e8], dtype=torch.float32)]
    assert dot(a, [torch.ones(3)]) == 1.0


@pytest.mark.parametrize("seed", range(6))
def test_negative_part_lies_between_its_bounds(seed: int) -> None:
    """Bulk near zero, both signs, a power law: z'H₋z is inside at every length of the run, and the bounds close in."""
    n = 400
    tail = 1.0 / torch.arange(1, n // 2 + 1)
    values = torch.cat([100 * tail, -40 * tail]).double()
    z = torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    exact = float(z**2 @ (-values).clamp(min=0) / (z @ z))
    gaps = []
    for k in (1, 2, 5, 12, 25):
        run = lanczos(lambda v: [values * v[0]], [z.clone()], max_steps=k, min_steps=k, tol=0.0, basis=True)
        found = negative_part(run)
        assert found.lower - 1e-9 <= exact <= found.upper + 1e-9 and found.lower <= found.value <= found.upper
        gaps.append(found.upper - found.lower)
    assert gaps[-1] < 0.5 * gaps[1]


def test_bounds_of_the_negative_part_are_the_extremes_of_a_linear_program() -> None:
    """Over all measures on a fine grid with the same moments 0 to 2k, by SciPy's LP: nothing beats the two bounds."""
    values = torch.tensor([5.0, 3.0, 1.0, 0.5, -0.2, -0.6, -1.0, -2.0], dtype=torch.float64)
    start = [torch.ones(8, dtype=torch.float64)]
    run = lanczos(lambda v: [values * v[0]], start, max_steps=3, min_steps=3, tol=0.0, basis=True)
    found = negative_part(run)
    x = np.linspace(-8, 8, 6401)
    chebyshev = np.polynomial.chebyshev.chebvander(x / 8, 6).T
    moments = np.polynomial.chebyshev.chebvander(values.numpy() / 8, 6).T @ np.full(8, 1 / 8)
    cost = np.maximum(-x, 0)
    low = linprog(cost, A_eq=chebyshev, b_eq=moments).fun
    high = -linprog(-cost, A_eq=chebyshev, b_eq=moments).fun
    assert found.lower == pytest.approx(low, abs=2e-3) and found.upper == pytest.approx(high, abs=2e-3)
    assert found.upper - found.lower > 0.02
