"""The test problems' own constants, checked against differences and against eigenvalues: the ground must be firm first."""

import math

import numpy as np
import pytest

from hybridtheory.errors import UserError
from hybridtheory.theory import problems as pr
from hybridtheory.theory import problems_regression as reg
from hybridtheory.theory.simulate import simulate

PROBLEMS = {
    "quadratic": lambda: pr.quadratic(4, 3, 5.0, 0.5, n=6, spread=1.0, spectrum=np.linspace(0.1, 1, 7)),
    "uncoupled": lambda: pr.quadratic(4, 3, 5.0, 0.5, n=6, spread=1.0, spectrum=np.linspace(1, 0.1, 7), coupled=False),
    "pseudo_huber": lambda: pr.pseudo_huber(4, 3, 2.0, 0.5, n=6, spread=2.0),
    "cosh": lambda: pr.cosh(4, 3, 2.0, 0.5, a=0.7, b=1.3),
    "softmax": lambda: reg.softmax(n=20, p=4),
    "logistic": lambda: reg.logistic(n=20),
    "bilinear": lambda: reg.bilinear(n=12),
}


@pytest.fixture(params=PROBLEMS, name="problem")
def _problem(request):
    return PROBLEMS[request.param]()


def test_gradients_and_hessian_agree_with_differences(problem):
    rng = np.random.default_rng(0)
    w = 0.5 * rng.standard_normal(problem.d)
    E, h = np.eye(problem.d), 1e-5
    difference = (problem.values(w + h * E) - problem.values(w - h * E)) / (2 * h)  # [d, n]
    np.testing.assert_allclose(problem.gradients(w), difference.T, atol=2e-8)
    np.testing.assert_allclose(problem.gradient(w), problem.gradients(w).mean(0), atol=1e-12)
    assert problem.value(w) == pytest.approx(problem.values(w).mean(), rel=1e-12)
    difference = (problem.gradient(w + h * E) - problem.gradient(w - h * E)) / (2 * h)
    np.testing.assert_allclose(problem.hessian(w), difference, atol=2e-7)


def test_batches_are_loops(problem):
    rng = np.random.default_rng(1)
    w = 0.5 * rng.standard_normal((5, problem.d))
    index = rng.integers(0, problem.n, 5)
    for k in range(5):
        assert problem.value(w)[k] == pytest.approx(problem.value(w[k]), rel=1e-12)
        np.testing.assert_allclose(problem.gradient(w)[k], problem.gradient(w[k]), atol=1e-12)
        assert problem.value_at(w, index)[k] == pytest.approx(problem.values(w[k])[index[k]], rel=1e-12)
        np.testing.assert_allclose(problem.gradient_at(w, index)[k], problem.gradients(w[k])[index[k]], atol=1e-12)
        g = problem.gradients(w[k])
        spread = ((g - g.mean(0)) ** 2).mean(0)
        assert problem.noise(w)[0][k] == pytest.approx(spread[: problem.d_x].sum())
        assert problem.noise(w)[1][k] == pytest.approx(spread[problem.d_x :].sum())


def test_constants_hold_for_every_row_and_f_star_is_the_minimum(problem):
    rng = np.random.default_rng(2)
    E, h = np.eye(problem.d), 1e-5
    for size in (0.1, 1.0, 3.0):
        w = size * rng.standard_normal(problem.d) / math.sqrt(problem.d)
        assert problem.value(w) >= problem.f_star - 1e-12
        noise = [float(v) for v in problem.noise(w)]
        assert noise[0] <= problem.noise_sup[0] * (1 + 1e-9)
        assert noise[1] <= problem.noise_sup[1] * (1 + 1e-9)
        if isinstance(problem, reg.Bilinear):
            continue
        u = float(np.linalg.norm(problem.gradient(w)))
        D = np.r_[np.full(problem.d_x, problem.l_x(u)), np.full(problem.d_y, problem.l_y(u))]
        rows = (problem.gradients(w + h * E) - problem.gradients(w - h * E)) / (2 * h)  # [d, n, d]
        for i in range(problem.n):
            scaled = rows[:, i] / np.sqrt(D)[:, None] / np.sqrt(D)
            values = np.linalg.eigvalsh((scaled + scaled.T) / 2)
            assert values[-1] <= 1 + 1e-5
            assert values[0] >= -1 - 1e-5
    if hasattr(problem, "minimiser"):
        assert np.linalg.norm(problem.gradient(problem.minimiser)) < 1e-10
        assert problem.value(problem.minimiser) == pytest.approx(problem.f_star, abs=1e-14)


def test_constants_are_attained():
    q = PROBLEMS["quadratic"]()
    D = np.sqrt(np.r_[np.full(4, 5.0), np.full(3, 0.5)])
    spectrum = np.linalg.eigvalsh(q.hessian(np.zeros(7)) / np.outer(D, D))
    np.testing.assert_allclose(spectrum, np.linspace(0.1, 1, 7), atol=1e-12)
    assert np.abs(q.hessian(np.zeros(7))[:4, 4:]).max() > 0.05
    assert np.abs(PROBLEMS["uncoupled"]().hessian(np.zeros(7))[:4, 4:]).max() == 0
    huber = pr.pseudo_huber(3, 0, 2.0, spread=0.0)
    np.testing.assert_allclose(huber.hessian(np.zeros(3)), 4 * np.eye(3), atol=1e-12)
    assert huber.f_star == pytest.approx(3.0)
    # One coordinate, far out: cosh's curvature approaches L0 + L1 |g| from below.
    c = pr.cosh(1, 0, 2.0, a=0.7, b=1.3)
    for at, share in ((0.0, 1.0), (4.0, 0.999)):
        w = np.array([at])
        assert c.hessian(w)[0, 0] >= share * c.l_x(abs(float(c.gradient(w)[0])))
    assert c.f_star == 0.0


def test_minimum_of_a_sum_against_a_long_descent():
    for name in ("pseudo_huber", "logistic", "softmax"):
        p = PROBLEMS[name]()
        run = simulate(p, np.zeros(p.d), 0.0, 0.0, 1)
        w = np.zeros((1, p.d))
        step = 1 / max(p.L_x, p.L_y)
        for _ in range(20_000):
            w = w - step * p.gradient(w)
        assert p.value(w)[0] == pytest.approx(p.f_star, abs=1e-7)
        assert run.f[0, 0] > p.f_star


def test_lora_law_bounds_the_adapters_curvature_and_the_start_is_degenerate():
    p = reg.bilinear()
    rng = np.random.default_rng(0)
    for k in range(20):
        w = p.start(k) if k == 0 else rng.standard_normal(p.d)
        H = p.hessian(w)[p.d_x :, p.d_x :]
        W, A, B = p.split(w)
        G = np.linalg.norm(p.gradient(w)[: p.d_x].reshape(W.shape), 2)
        assert np.abs(np.linalg.eigvalsh(H)).max() <= p.l_y_at(A, B)(G) * (1 + 1e-9)
        if k == 0:
            a = A.size
            assert np.abs(H[:a, :a]).max() == 0
            assert np.abs(p.gradient(w)[p.d_x : p.d_x + a]).max() == 0
            assert np.linalg.norm(H[:a, a:], 2) == pytest.approx(p.s * G, rel=1e-9)
    assert np.linalg.eigvalsh(p.hessian(w)[: p.d_x, : p.d_x])[-1] == pytest.approx(p.L_W)


def test_the_simulator_is_the_method():
    p = PROBLEMS["quadratic"]()
    rng = np.random.default_rng(5)
    w0 = rng.standard_normal(p.d)
    run = simulate(p, w0, 0.0, 0.1, 3, seeds=2)
    w = w0.copy()
    for t in range(3):
        assert run.f[t, 0] == pytest.approx(p.value(w))
        w[p.d_x :] -= 0.1 * p.gradient(w)[p.d_x :]
    np.testing.assert_allclose(run.w[0], w, atol=1e-12)
    # An epoch of a first-order block visits every row once, so a linear gradient gives the epoch's mean step to first order.
    tiny = simulate(p, w0, 0.0, 1e-6, 1, seeds=3, sampling="reshuffle")
    moved = (w0 - tiny.w[0])[p.d_x :] / (1e-6 * p.n)
    np.testing.assert_allclose(moved, p.gradient(w0)[p.d_x :], rtol=1e-3)
    one = [
        simulate(p, w0, 0.01, 0.1, 4, seeds=3, seed=7, difference=k, mu=1e-6) for k in ("exact", "central", "forward")
    ]
    np.testing.assert_allclose(one[0].w, one[1].w, atol=1e-8)
    np.testing.assert_allclose(one[0].w, one[2].w, atol=1e-4)
    assert np.abs(one[0].w - one[2].w).max() > 1e-9
    assert one[0].slope_sq.shape == one[0].gx_sq.shape == (4, 3)
    many = simulate(p, w0, np.array([0.0, 0.01]), 0.0, 1, seeds=2)
    np.testing.assert_allclose(many.w[0], w0)
    assert np.abs(many.w[1] - w0).max() > 0


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: pr.quadratic(2, 0, -1.0), "L_x > 0"),
        (lambda: pr.quadratic(2, 0, spectrum=[0.5, 2.0]), r"\[0, 1\]"),
        (lambda: pr.quadratic(0, 0), "at least one parameter"),
        (lambda: pr.cosh(2, 0, a=math.nan), "a = nan"),
        (lambda: reg.softmax(ridge=0.0), "ridge > 0"),
        (lambda: reg.softmax(d_x=1000), "d_x = 1000"),
        (lambda: reg.Logistic(np.ones((3, 2)), np.ones(3), 5, 0.1), "d_x = 5"),
        (lambda: simulate(pr.quadratic(2), np.zeros(2), 0.1, 0.1, 0), "T >= 1"),
        (lambda: simulate(pr.quadratic(2), np.zeros(2), 0.1, 0.1, 1, sampling="random"), "sampling"),
        (lambda: simulate(pr.quadratic(2), np.zeros(2), 0.1, 0.1, 1, law="cauchy"), "cauchy"),
        (lambda: simulate(pr.quadratic(2), np.zeros(2), 0.1, 0.1, 1, difference="backward"), "backward"),
    ],
)
def test_bad_input_is_refused(call, says):
    with pytest.raises(UserError, match=says):
        call()
