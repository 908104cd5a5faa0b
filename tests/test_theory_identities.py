"""Exact statements about one step, two-sided: what a bound could hide, these cannot."""

import itertools
import math

import numpy as np
import pytest

from hybridtheory.errors import UserError
from hybridtheory.theory import one_step as os_
from hybridtheory.theory import problems as pr
from hybridtheory.theory.simulate import simulate

D_X, D_Y = 5, 3
PROBLEM = pr.quadratic(D_X, D_Y, 5.0, 0.8, spectrum=np.linspace(0.2, 1, 8), seed=1)
W0 = PROBLEM.minimiser + np.random.default_rng(2).standard_normal(8)


def expected(law, q, mu, eta_x, eta_y):
    g, H = PROBLEM.gradient(W0), PROBLEM.hessian(W0)
    gx, gy, Hx = g[:D_X], g[D_X:], H[:D_X, :D_X]
    if law == "rademacher":
        signs = np.array(list(itertools.product((-1, 1), repeat=D_X)))
        cubed = (np.einsum("ki,ij,kj->k", signs, Hx, signs) ** 3).mean()
    else:
        powers = [np.trace(np.linalg.matrix_power(Hx, k)) for k in (1, 2, 3)]
        cubed = os_.cubed_form(law, D_X, *powers)
    return os_.identity_q(
        eta_x, eta_y, gx @ gx, gy @ gy, D_X, np.trace(Hx), gx @ Hx @ gx, gy @ H[D_X:, D_X:] @ gy, gx @ H[:D_X, D_X:] @ gy,
        law, q, np.diag(Hx) @ gx**2, mu, cubed,
    )  # fmt: skip


@pytest.mark.parametrize("q", [1, 4])
@pytest.mark.parametrize("difference", ["exact", "central", "forward"])
@pytest.mark.parametrize("law", ["gaussian", "sphere", "rademacher"])
def test_identity_q_two_sided_at_five_standard_errors(law, difference, q):
    mu = {"exact": 0.0, "central": 0.9, "forward": 0.4}[difference]
    eta_x, eta_y, S = 0.05, 0.8, 400_000 // q
    run = simulate(PROBLEM, W0, eta_x, eta_y, 1, S, 5, law, difference=difference, mu=mu, q=q, noise=False)
    change = run.f[1] - run.f[0]
    e = expected(law, q, mu if difference == "forward" else 0.0, eta_x, eta_y)
    error = change.std(ddof=1) / math.sqrt(S)
    assert abs(change.mean() - e.change) <= 5 * error
    # The test can see every term: each is larger than the interval (on these runs; coupling included).
    visible = [e.zo_descent, e.fo_descent, e.zo_curvature, e.fo_curvature, e.coupling]
    assert min(abs(v) for v in visible) / 2 > 5 * error
    if difference == "forward":
        assert e.forward / 2 > 5 * error


def test_cubed_form_against_quadrature():
    x, w = np.polynomial.hermite_e.hermegauss(5)
    H = np.array([[2.0, 0.7], [0.7, -1.0]])
    u = np.array(list(itertools.product(x, repeat=2)))
    weight = np.array([a * b for a, b in itertools.product(w / w.sum(), repeat=2)])
    form = np.einsum("ki,ij,kj->k", u, H, u)
    powers = [np.trace(np.linalg.matrix_power(H, k)) for k in (1, 2, 3)]
    assert os_.cubed_form("gaussian", 2, *powers) == pytest.approx(weight @ form**3, rel=1e-12)
    angle = np.arange(16) * 2 * np.pi / 16
    circle = math.sqrt(2) * np.stack([np.cos(angle), np.sin(angle)], 1)
    form = np.einsum("ki,ij,kj->k", circle, H, circle)
    assert os_.cubed_form("sphere", 2, *powers) == pytest.approx((form**3).mean(), rel=1e-12)
    with pytest.raises(UserError, match="gaussian and sphere"):
        os_.cubed_form("rademacher", 2, *powers)


@pytest.mark.parametrize("q", [1, 4])
def test_mean_divergence_threshold_from_both_sides(q):
    """E f grows in every step just above 2q/(L(d+q+1)) and shrinks just below; the factor itself is exact."""
    d, L, T, S = 60, 3.0, 6, 20_000
    threshold = os_.divergence_threshold(L, d, q)
    assert os_.isotropic_factor(threshold, L, d, q) == pytest.approx(1.0, rel=1e-12)
    p = pr.quadratic(d, 0, L)
    for share, grows in ((0.85, False), (1.15, True)):
        run = simulate(p, np.ones(d), share * threshold, 0.0, T, S, 3, q=q, noise=False)
        ratio = run.f[T] / run.f[0]
        error = ratio.std(ddof=1) / math.sqrt(S)
        assert abs(ratio.mean() - os_.isotropic_factor(share * threshold, L, d, q) ** T) <= 5 * error
        assert (ratio.mean() > 1 + 5 * error) if grows else (ratio.mean() < 1 - 5 * error)


def test_bad_input_is_refused():
    for bad in ({"eta_x": -1.0}, {"gx_sq": math.nan}, {"forward_mu": -0.1}, {"law": "cauchy"}, {"law": "rademacher"}):
        kw = {"eta_x": 0.1, "eta_y": 0.1, "gx_sq": 1.0, "gy_sq": 1.0, "d": 3, "trace_xx": 1.0, "xHx": 1.0} | bad
        with pytest.raises(UserError):
            os_.identity_q(**kw)
    with pytest.raises(UserError, match="L > 0"):
        os_.divergence_threshold(0.0, 3)
    with pytest.raises(UserError, match="eta"):
        os_.isotropic_factor(math.nan, 1.0, 3)
