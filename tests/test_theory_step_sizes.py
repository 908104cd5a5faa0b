"""Step rules against the quantity they claim to optimise or to bound, computed independently of the rule."""

import itertools
import math

import numpy as np
import pytest

from hybridtheory.errors import UserError
from hybridtheory.theory import step_sizes as ss
from hybridtheory.theory.checks import OutsideTheorem, at_most, check_bound, check_prediction, inside
from hybridtheory.theory.finite_scale import finite_scale, flat_scale, least, phi_trace, tail_limited
from hybridtheory.theory.generalized import gorbunov_step, vankov_decrease, vankov_step, zhang_step
from hybridtheory.theory.recommend import Curvature, block_rules, capped, envelope, recommend_base, recommend_peft
from hybridtheory.theory.stability import stability_bracket, stability_root

LAM = np.array([5.0, 3.0, 3.0, 1.0, 0.2, 0.2, 0.2])
G = np.array([1.0, -0.5, 0.3, 2.0, 1.0, 0.1, -0.7])


def argmin(f, low, high):
    """Golden-section minimiser: independent of any closed form."""
    ratio = (math.sqrt(5) - 1) / 2
    for _ in range(200):
        a, b = high - ratio * (high - low), low + ratio * (high - low)
        low, high = (low, b) if f(a) < f(b) else (a, high)
    return (low + high) / 2


def gaussian_fourth_moment(A, B):
    """E[(u'Au)(u'Bu)] for u ~ N(0, I), by summing E[u_i u_j u_k u_l] over all index tuples: no Isserlis shortcut."""
    d = len(A)
    total = 0.0
    for i, j, k, l in itertools.product(range(d), repeat=4):
        counts = np.bincount([i, j, k, l], minlength=d)
        total += A[i, j] * B[k, l] * math.prod({0: 1, 1: 0, 2: 1, 3: 0, 4: 3}[c] for c in counts)
    return total


@pytest.mark.parametrize("q", [1, 4, 16])
def test_identity_q_optimum_minimises_the_expected_change(q):
    H, gg = np.diag(LAM), np.outer(G, G)
    single = gaussian_fourth_moment(gg, H)  # E[(g'u)² u'Hu]
    bend = (single + (q - 1) * G @ H @ G) / q

    def change(eta):
        return -eta * G @ G + 0.5 * eta**2 * bend

    step = ss.identity_q_optimum(LAM.sum(), G @ H @ G, G @ G, q)
    assert step.value == pytest.approx(argmin(change, 0, 2), rel=1e-6)


def test_identity_q_optimum_of_other_laws():
    signs = np.array(list(itertools.product((-1.0, 1.0), repeat=7)))
    A = np.random.default_rng(0).standard_normal((7, 7))
    H = A @ A.T
    for law, weights in (("rademacher", np.diag(H) @ G**2), ("sphere", None)):
        step = ss.identity_q_optimum(np.trace(H), G @ H @ G, G @ G, 1, 0.3, law, 7, weights)
        if law == "rademacher":
            bend = ((signs @ G) ** 2 * np.einsum("ki,ij,kj->k", signs, H, signs)).mean()
            room = 0.6
        else:
            bend = gaussian_fourth_moment(np.outer(G, G), H) * 7 / 9
            room = 0.6 * 7 / 9
        assert step.value == pytest.approx(G @ G / bend, rel=1e-10)
        assert step.interval == pytest.approx((1 / (1 / step.value + room), 1 / (1 / step.value - room)))


def test_coupled_trace_is_that_of_a_matrix_with_a0s_property():
    rng = np.random.default_rng(0)
    for d_x, d_y in ((5, 3), (2, 6)):
        M = rng.standard_normal((d_x + d_y, d_x + d_y))
        H = (M + M.T) / 2
        xx, xy, yy = H[:d_x, :d_x], H[:d_x, d_x:], H[d_x:, d_x:]
        values, vectors = np.linalg.eigh(xx)
        plus = (vectors * np.maximum(values, 0)) @ vectors.T
        A, B, C = values[-1], np.linalg.eigvalsh(yy)[-1], np.linalg.norm(xy, 2)
        c = ss.couple(A, B, C)
        M_x = plus + xy @ np.linalg.inv(c.L_y * np.eye(d_y) - yy) @ xy.T
        joint = np.block([[M_x, np.zeros((d_x, d_y))], [np.zeros((d_y, d_x)), c.L_y * np.eye(d_y)]])
        assert np.linalg.eigvalsh(joint - H)[0] >= -1e-10
        assert np.linalg.eigvalsh(M_x)[-1] <= c.L_x * (1 + 1e-12)
        bound = ss.coupled_trace(np.trace(plus), B, C, c.L_y, d_x, d_y)
        assert np.trace(M_x) <= bound
        frobenius = ss.coupled_trace(np.trace(plus), B, C, c.L_y, d_x, (xy**2).sum() / C**2)
        assert np.trace(M_x) <= frobenius <= bound
    # Reached: an isotropic coupling C P with P a partial isometry and H_yy = B I.
    c = ss.couple(4.0, 1.0, 1.5)
    H_xy = 1.5 * np.eye(5, 3)
    exact = 20.0 + np.trace(H_xy @ H_xy.T) / (c.L_y - 1.0)
    assert ss.coupled_trace(20.0, 1.0, 1.5, c.L_y, 5, 3) == pytest.approx(exact)
    assert ss.coupled_trace(20.0, 1.0, 0.0, 1.0, 5, 3) == 20.0


def test_the_finite_scale_interval_holds_its_own_estimate():
    rng = np.random.default_rng(0)
    etas = 1e-3 * 2.0 ** np.arange(6)
    for seed in range(40):
        slopes = rng.normal(0, 3, 6)
        changes = -etas * slopes[:, None] ** 2 + etas**2 * slopes[:, None] ** 2 * rng.lognormal(4, 1, (6, 1))
        step = finite_scale(etas, changes, slopes, 9.0, 0.0, seed=seed).step
        assert step.interval[0] <= step.value <= step.interval[1]


@pytest.mark.parametrize("q", [1, 4])
def test_tail_limited_step_leaves_the_region_as_often_as_it_says(q):
    rng = np.random.default_rng(q)
    T, failure, g_sq, variance, scale, runs = 30, 0.2, 4.0, 1.0, 0.3, 20_000
    eta = tail_limited(scale, g_sq, T, failure, variance, q).value
    slopes = math.sqrt(g_sq + variance) * rng.standard_normal((runs, T, q))
    left = (eta * np.sqrt((slopes**2).sum(2)) / q > scale).any(1)
    assert abs(left.mean() - failure) <= 5 * math.sqrt(failure * (1 - failure) / runs)
    assert tail_limited(scale, g_sq, T, 0.9, variance, q).value > eta
    if q == 1:
        rough = scale / math.sqrt(5.0 * 2 * math.log(2 * T / failure))
        assert rough < eta < 1.3 * rough


def test_flat_scale_finds_where_the_quadratic_model_ends():
    """f = s²/2 + s⁴/4 along every direction: 2 phi/delta² = 1 + delta²/2, so the share 0.5 is passed at delta = 1."""
    deltas = np.geomspace(1e-3, 10, 400)
    phi = np.tile(deltas**2 / 2 + deltas**4 / 4, (3, 1))
    found, reached = flat_scale(deltas, phi, phi, 0.5)
    assert reached
    assert found == pytest.approx(1.0, rel=1e-3)
    # On a coarse grid the crossing is interpolated between its neighbours.
    deltas = np.array([0.1, 0.5, 2.0])
    phi = np.tile(deltas**2 / 2 + deltas**4 / 4, (3, 1))
    base = 1 + 0.1**2 / 2
    left = [(1 + d**2 / 2) / base - 1 for d in (0.5, 2.0)]
    expected = 0.5 * 4 ** ((0.5 - left[0]) / (left[1] - left[0]))
    assert flat_scale(deltas, phi, phi, 0.5) == (pytest.approx(expected), True)
    flat = np.tile(deltas**2, (3, 1))
    assert flat_scale(deltas, flat, flat) == (2.0, False)
    drop = np.tile(deltas**2 / 2 * (1 - 0.2 * deltas), (3, 1))  # leaves downwards too
    assert flat_scale(deltas, drop, drop, 0.3)[1]


@pytest.mark.parametrize("q", [1, 4, 16])
def test_worst_case_and_a0_are_optima_of_their_bounds(q):
    d, L = 7, 5.0
    second = (gaussian_fourth_moment(np.eye(d), np.outer(G, G)) + (q - 1) * G @ G) / q / (G @ G)
    assert ss.curvature_per_gradient(d, q) == pytest.approx(second, rel=1e-12)
    worst = ss.worst_case(L, d, q)
    assert worst.value == pytest.approx(argmin(lambda e: -e + e**2 * L / 2 * second, 0, 1), rel=1e-6)
    # A0 is sharp where g is the top eigenvector: there the bound is the exact expected change.
    top = np.eye(d)[0]
    bend = (gaussian_fourth_moment(np.outer(top, top), np.diag(LAM)) + (q - 1) * LAM[0]) / q
    a0 = ss.a0_optimum(LAM[0], LAM.sum(), q)
    assert a0.value == pytest.approx(argmin(lambda e: -e + e**2 / 2 * bend, 0, 1), rel=1e-6)
    assert a0.value > worst.value


def test_intervals_come_from_two_standard_errors_of_the_trace():
    step = ss.identity_q_optimum(10.0, 3.0, 1.5, 4, trace_se=0.5)
    assert step.interval == pytest.approx((4 / (11 + 5 * 2), 4 / (9 + 5 * 2)))
    wide = ss.identity_q_optimum(10.0, -3.0, 1.5, 1, trace_se=4.0)
    assert wide.interval[1] == math.inf
    a0 = ss.a0_optimum(2.0, 10.0, 1, trace_plus_se=0.5)
    assert a0.interval == pytest.approx((1 / (11 + 4), 1 / (9 + 4)))
    assert a0.covers
    assert ss.a0_optimum(2.0, 10.0).interval is None


def second_moment_radius(lam, eta, q, beta):
    """Spectral radius of the exact recursion of (E w², E wm, E m²) for heavy-ball ZO-SGD on a diagonal quadratic."""
    d = len(lam)
    M = np.zeros((3 * d, 3 * d))
    for i, l in enumerate(lam):
        a, b, c = 3 * i, 3 * i + 1, 3 * i + 2
        mm = np.zeros(3 * d)  # E m+²
        mm[[a, b, c]] = (q + 1) / q * l**2, 2 * beta * l, beta**2
        mm[::3] += lam**2 / q
        wm = np.zeros(3 * d)  # E w m+
        wm[[a, b]] = l, beta
        M[a] = -2 * eta * wm + eta**2 * mm
        M[a, a] += 1
        M[b], M[c] = wm - eta * mm, mm
    return np.abs(np.linalg.eigvals(M)).max()


@pytest.mark.parametrize("q", [1, 4, 16])
@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9])
def test_stability_root_is_where_the_second_moment_stops_contracting(q, beta):
    values, counts = np.unique(LAM, return_counts=True)
    b = stability_root(values, counts, q, beta)
    assert second_moment_radius(LAM, b.critical.value, q, beta) == pytest.approx(1, abs=1e-9)
    assert (
        second_moment_radius(LAM, 0.99 * b.critical.value, q, beta)
        < 1
        < second_moment_radius(LAM, 1.01 * b.critical.value, q, beta)
    )
    published = stability_bracket(LAM.sum(), LAM[0], 0.0, q, beta)
    assert b.lower.value == pytest.approx(published.lower.value)
    assert b.lower.value < b.critical.value < b.upper.value < published.upper.value


def test_stability_bracket_is_tight_at_its_extremes():
    """An isotropic H makes both ends of the tightened bracket exact; q = 1 and beta = 0 read 2/(L(d+2))."""
    for q, beta in itertools.product((1, 4), (0.0, 0.9)):
        b = stability_root([3.0], [20], q, beta)
        assert b.critical.value == pytest.approx(b.lower.value, rel=1e-9)
        assert b.critical.value == pytest.approx(b.upper.value, rel=1e-9)
    assert stability_root([3.0], [20]).critical.value == pytest.approx(2 / (3 * 22), rel=1e-9)
    # A long flat tail: 2q(1-beta)/tr H, the published upper end, is reached.
    tail = stability_root([1.0], [1e7], 4, 0.9)
    assert tail.critical.value == pytest.approx(stability_bracket(1e7, 1.0, 0.0, 4, 0.9).upper.value, rel=1e-5)


def test_first_order_steps_and_momentum():
    best, limit = ss.first_order(4.0)
    assert best.value == pytest.approx(argmin(lambda e: -e + e**2 * 4 / 2, 0, 1), rel=1e-6)
    assert limit.value == pytest.approx(2 * best.value)
    for beta in (0.0, 0.5, 0.9):

        def radius(eta, beta=beta):
            return np.abs(np.linalg.eigvals(np.array([[1 - 4 * eta, -eta * beta], [4.0, beta]]))).max()

        limit = ss.first_order(4.0, beta)[1].value
        assert radius(0.999 * limit) < 1 < radius(1.001 * limit)
    # A constant gradient: the drift per step of heavy ball is eta g/(1-beta), equal to plain descent's at the raw step.
    step = ss.a0_optimum(2.0, 10.0, 1, 0.5)
    slowed = ss.with_momentum(step, 0.9)
    m = 0.0
    for _ in range(500):
        m = 0.9 * m + 1.0
    assert slowed.value * m == pytest.approx(step.value)
    assert slowed.interval == pytest.approx(tuple(0.1 * v for v in step.interval))
    assert ss.first_order(4.0, 0.9)[0].value * m == pytest.approx(best.value)


@pytest.mark.parametrize("q", [1, 4])
def test_noise_limited_step_minimises_a0s_bound(q):
    delta, T, L, var, r = 3.0, 1e5, 2.0, 0.7, 11.0
    for rank in (r, None):
        gamma = 1.0 if rank is None else (rank + q + 1) / q
        step = ss.noise_limited(delta, T, L, var, rank, q).value
        assert step == pytest.approx(
            argmin(lambda e, k=gamma: 2 * delta / (e * T) + e * L * k * var, 1e-6, 1), rel=1e-5
        )
    zo, fo = ss.noise_limited(delta, T, L, var, r, q).value, ss.noise_limited(delta, T, 5.0, 0.2, None).value
    assert ss.noise_limited_ratio(L, 5.0, r, var, 0.2, q) == pytest.approx(fo / zo)
    stable = ss.first_order(5.0)[0].value / ss.a0_optimum(L, r * L, q).value
    assert ss.ratio(L, 5.0, r, q) == pytest.approx(stable)


def test_reshuffling_steps_are_the_edge_of_theorem_d():
    from hybridtheory.theory import convergence

    zo, fo = ss.reshuffling(3.0, 10, 50).value, ss.reshuffling(2.0, 10).value
    base = {"L_x": 3.0, "L_y": 2.0, "d": 50, "n": 10, "Delta": 1.0, "T": 100, "sigma_x_sq": 1.0, "sigma_y_sq": 1.0}
    convergence.theorem_d(eta_x=zo, eta_y=fo, **base)
    for eta_x, eta_y in ((1.001 * zo, fo), (zo, 1.001 * fo)):
        with pytest.raises(UserError, match="Theorem D"):
            convergence.theorem_d(eta_x=eta_x, eta_y=eta_y, **base)
    assert zo == pytest.approx(1 / (16 * 10 * 52 * 3.0))
    assert fo == pytest.approx(1 / (8 * 10 * 2.0))


def test_coupling_is_the_least_joint_bound_that_keeps_the_ratio():
    rng = np.random.default_rng(0)
    for _ in range(20):
        A, B, C = rng.uniform(0.1, 5, 3)
        worst = np.array([[A, C], [C, B]])  # the 2 x 2 Hessian that meets all three constants
        c = ss.couple(A, B, C)
        D = np.diag([c.L_x, c.L_y])
        assert np.linalg.eigvalsh(D - worst)[0] == pytest.approx(0, abs=1e-12)
        assert c.L_x / c.L_y == pytest.approx(A / B)
        assert c.keeps_ratio
    psd = ss.couple(4.0, 1.0, 2.0)  # C = sqrt(AB), the most a PSD Hessian allows
    assert (psd.L_x, psd.L_y) == pytest.approx((8.0, 2.0))
    flat = ss.couple(-1.0, 2.0, 0.5)
    assert (flat.L_x, flat.L_y) == pytest.approx((0.5, 2.5))
    assert not flat.keeps_ratio
    swapped = ss.couple(2.0, -1.0, 0.5)
    assert (swapped.L_x, swapped.L_y) == pytest.approx((2.5, 0.5))
    assert "-1" in flat.note
    assert np.linalg.eigvalsh(np.diag([flat.L_x, flat.L_y]) - np.array([[-1.0, 0.5], [0.5, 2.0]]))[0] >= -1e-12
    # Not positive and sharp: A = 0 = B leaves exactly the norm of the coupling.
    assert ss.couple(0.0, 0.0, 3.0).L_x == 3.0


@pytest.mark.parametrize("u", [0.0, 1e-9, 0.3, 5.0, 1e3])
def test_vankov_steps_against_the_bound_they_minimise(u):
    L0, L1, g = 2.0, 0.5, u / 0.5

    def upper(eta):  # decrease guaranteed by the exponential form along -g, per definition
        t = eta * L1 * g
        phi = math.expm1(t) - t if t > 1e-5 else t**2 / 2
        return -eta * g**2 + (L0 + L1 * g) * phi / L1**2

    best = vankov_step(L0, L1, g).value
    if u > 0.1:
        assert best == pytest.approx(argmin(upper, 0, 3 / (L0 + L1 * g)), rel=1e-5)
        assert -upper(best) >= vankov_decrease(L0, L1, g) * (1 - 1e-9)
        # The factors 2 and 3: sharp for small and large L1|g|.
    else:
        assert best == pytest.approx(1 / L0, rel=1e-6)
    for step in (
        vankov_step(L0, L1, g, "simple"),
        vankov_step(L0, L1, g, "clip"),
        gorbunov_step(L0, L1, g),
        zhang_step(L0, L1, g),
    ):
        assert step.value <= best
        assert upper(step.value) <= 0


def test_generalized_steps_reach_their_published_limits():
    assert vankov_decrease(2.0, 0.0, 3.0) == pytest.approx(9 / 4)
    assert vankov_decrease(0.0, 2.0, 3.0) == pytest.approx(9 / 18)
    assert vankov_step(2.0, 0.5, 4.0, "simple").value == pytest.approx(1 / (2 + 3.0))
    assert vankov_step(2.0, 0.5, 1.0, "clip").value == pytest.approx(1 / 4)
    assert vankov_step(2.0, 0.5, 40.0, "clip").value == pytest.approx(1 / 60)
    assert zhang_step(2.0, 0.5, 1.0).value == pytest.approx(1 / 20)
    assert zhang_step(2.0, 0.5, 40.0).value == pytest.approx(1 / 200)
    nu = 2 * (2.0 + 0.5 * 4.0) * gorbunov_step(2.0, 0.5, 4.0).value
    assert nu == pytest.approx(math.exp(-nu), rel=1e-12)
    with pytest.raises(UserError, match="kinds"):
        vankov_step(1.0, 1.0, 1.0, "best")


def quadratic_samples(n, seed=0, d=100):
    rng = np.random.default_rng(seed)
    lam = np.r_[10.0, 5.0, np.linspace(0.1, 2, d - 2)]
    g = lam * rng.normal(size=d)
    exact = ss.identity_q_optimum(lam.sum(), g @ (lam * g), g @ g).value
    etas = exact * np.geomspace(0.03, 10, 14)
    u = rng.normal(size=(n, d))
    c = u @ g
    changes = -etas * c[:, None] ** 2 + 0.5 * etas**2 * (c**2 * (u**2 @ lam))[:, None]
    mean = -etas * (g @ g) + 0.5 * etas**2 * (2 * g @ (lam * g) + lam.sum() * (g @ g))
    return etas, changes, c, float(g @ g), exact, mean


@pytest.mark.parametrize("control", ["unit", "fitted"])
def test_finite_scale_is_identity_q_on_a_quadratic(control):
    etas, changes, c, g_sq, exact, mean = quadratic_samples(2000)
    fs = finite_scale(etas, changes, c, g_sq, control=control)
    assert np.all(np.abs(np.array(fs.change) - mean) <= 5 * np.array(fs.stderr))
    assert fs.step.value == pytest.approx(exact, rel=0.1)
    assert fs.step.interval[0] <= exact <= fs.step.interval[1]
    assert fs.significant
    assert not fs.edge
    assert fs.least == pytest.approx(-exact * g_sq / 2, rel=0.1)
    # Near 0 both controls remove a sample's whole first-order part; the fitted one is half as large at the optimum.
    assert fs.coefficient[0] == pytest.approx(1.0, abs=0.05)
    if control == "fitted":
        assert fs.coefficient[7] == pytest.approx(1 - etas[7] / exact / 2, abs=0.15)


def test_finite_scale_interpolation_is_exact_without_noise():
    etas = np.geomspace(0.01, 1, 9)
    curve = -etas + 0.5 * etas**2 * 7.3
    c = np.array([1.0, -1.0, 1.0, -1.0, 1.0])
    fs = finite_scale(etas, np.tile(curve, (5, 1)), c, 1.0)
    assert fs.step.value == pytest.approx(1 / 7.3, rel=1e-9)
    assert fs.least == pytest.approx(-0.5 / 7.3, rel=1e-9)
    cubic = -etas + 2 * etas**3
    fs = finite_scale(etas, np.tile(cubic, (5, 1)), c, 1.0)
    assert fs.step.value == pytest.approx(1 / math.sqrt(6), rel=1e-9)
    assert fs.least == pytest.approx(-2 / 3 / math.sqrt(6), rel=1e-9)
    # The second and the last but one point of the grid are inside too, and three points are enough.
    for grid in (etas[4:], etas[:7], np.array([0.1, 0.3, 0.6])):
        value, edge = least(grid, -grid + 0.5 * grid**2 / 0.2)
        assert value == pytest.approx(0.2, rel=1e-9)
        assert not edge
    assert least([1.0, 2.0, 4.0], [-1.0, 0.0, 1.0]) == (1.0, True)
    assert least([1.0, 2.0, 4.0], [1.0, 0.0, -1.0]) == (4.0, True)


def test_control_variate_pays_and_pairs_are_needed():
    etas, changes, c, g_sq, _, _ = quadratic_samples(400, seed=3)
    raw = changes.std(axis=0, ddof=1) / 20
    unit, fitted = (np.array(finite_scale(etas, changes, c, g_sq, control=k).stderr) for k in ("unit", "fitted"))
    assert raw[0] / unit[0] > 20
    near = 7  # about the optimum
    assert unit[near] / fitted[near] > 2
    assert raw[near] / fitted[near] > 2
    # A training batch's variance adds to E c² and a wrong ‖g‖² moves the mean by exactly the coefficient.
    shifted = finite_scale(etas, changes, c, g_sq - 3.0, variance=3.0)
    assert shifted.change == pytest.approx(finite_scale(etas, changes, c, g_sq).change)
    noisy = finite_scale(etas, changes, c, g_sq, g_norm_sq_se=0.1 * g_sq, control="unit")
    assert noisy.stderr[0] == pytest.approx(math.hypot(unit[0], etas[0] * 0.1 * g_sq), rel=1e-6)
    width = [
        s.step.interval[1] - s.step.interval[0] for s in (noisy, finite_scale(etas, changes, c, g_sq, control="unit"))
    ]
    assert width[0] > width[1]


def test_errors_and_interval_are_those_of_the_stated_estimator():
    """The standard error is the corrected sample's; the interval is a bootstrap of the regression, redone row by row here."""
    etas, changes, c, g_sq, _, _ = quadratic_samples(40, seed=5)
    unit = finite_scale(etas, changes, c, g_sq, control="unit")
    corrected = changes + etas * (c**2 - g_sq)[:, None]
    assert unit.stderr == pytest.approx(corrected.std(axis=0, ddof=1) / math.sqrt(40))
    assert unit.change == pytest.approx(corrected.mean(axis=0))
    fs = finite_scale(etas, changes, c, g_sq, 0.05 * g_sq, n_boot=25, confidence=0.8, seed=9)
    rng = np.random.default_rng(9)
    drawn = rng.multinomial(40, np.full(40, 1 / 40), size=25)
    shift = rng.normal(0, 0.05 * g_sq, size=25)
    best = []
    for b in range(25):
        rows = np.repeat(np.arange(40), drawn[b])
        x = c[rows] ** 2 - g_sq
        slope = np.polyfit(x, changes[rows], 1)[0]
        curve = changes[rows].mean(0) - slope * (x.mean() - shift[b])
        best.append(finite_scale(etas, np.tile(curve, (5, 1)), np.ones(5), 1.0, control="unit", n_boot=1).step.value)
    assert fs.step.interval == pytest.approx(np.percentile(best, [10, 90]), rel=1e-6)
    # Leave one out: sample 0's coefficient comes from the others.
    others = np.polyfit(c[1:] ** 2, changes[1:], 1)[0]
    means = [np.polyfit(np.delete(c, i) ** 2, np.delete(changes, i, 0), 1)[0] for i in range(40)]
    assert np.allclose(means[0], others)
    assert fs.coefficient == pytest.approx(-np.mean(means, axis=0) / etas)
    fixed = changes - np.array(means) * (c**2 - g_sq)[:, None]
    assert fs.change == pytest.approx(fixed.mean(0))
    spread = fixed.var(axis=0, ddof=1) / 40 + (np.mean(means, axis=0) * 0.05 * g_sq) ** 2
    assert fs.stderr == pytest.approx(np.sqrt(spread))


def test_finite_scale_flags_the_grids_edges():
    etas = np.array([1e-3, 2e-3, 4e-3])
    c = np.ones(6)
    falling = np.tile(-etas, (6, 1))
    assert finite_scale(etas, falling, c, 1.0).edge == "high"
    rising = finite_scale(etas, np.tile(etas, (6, 1)), c, 1.0)
    assert rising.edge == "low"
    assert not rising.significant
    assert "widen" in rising.step.note


def test_a_descent_counts_from_two_standard_errors():
    for error, significant in ((0.45, True), (0.55, False)):
        spread = error * 2 / math.sqrt(4 / 3)  # four samples at -1 +- spread have this standard error
        changes = np.zeros((4, 3))
        changes[:, 1] = -1 + spread * np.array([1, -1, 1, -1])
        fs = finite_scale([1.0, 2.0, 4.0], changes, np.ones(4), 1.0, control="unit", n_boot=10)
        assert fs.stderr[1] == pytest.approx(error)
        assert fs.significant is significant


def test_phi_trace_is_the_trace_of_a_quadratic():
    rng = np.random.default_rng(0)
    u = rng.normal(size=(4000, 7))
    deltas = np.array([1e-2, 1.0])
    quad = 0.5 * (u**2 @ LAM)[:, None] * deltas**2
    line = (u @ G)[:, None] * deltas
    value, error = phi_trace(deltas, quad + line, quad - line)
    assert np.all(np.abs(value - LAM.sum()) < 5 * error)
    assert value[0] == pytest.approx(value[1], rel=1e-10)
    assert error[0] == pytest.approx(math.sqrt(2 * (LAM**2).sum() / 4000), rel=0.1)


def test_envelope_and_caps_name_the_rule_that_bound():
    steps = [ss.Step(v, "finite-scale rule", "f", "u") for v in (3.0, 1.0, 2.0)]
    assert envelope(steps).value == 1.0
    assert "point 1 of 3" in envelope(steps).note
    lower = [ss.Step(v, "edge", "f", "u") for v in (5.0, 0.5)]
    noise = ss.Step(0.7, "noise", "f", "u")
    free = recommend_base(steps)
    assert (free.step.value, free.bound_by) == (1.0, "finite-scale rule")
    bound = recommend_base(steps, lower, noise)
    assert (bound.step.value, bound.bound_by) == (0.5, "edge")
    assert set(bound.candidates) == {"rule", "stability", "noise"}
    assert "finite-scale rule alone gives 1" in bound.step.note
    assert recommend_base(steps, (), noise).bound_by == "noise"
    assert recommend_base(steps, lower, noise, tail_limited(1e-3, 1.0, 10)).bound_by == "tail of a step"
    peft = recommend_peft([0.0, 2.0, 4.0])
    assert peft.step.value == 0.25
    assert capped(steps[0], other=None).step.value == 3.0
    for bad in ([], [0.0, 0.0], [-1.0, 1.0]):
        with pytest.raises(UserError, match="recommend_peft"):
            recommend_peft(bad)
    with pytest.raises(UserError, match="at least one point"):
        envelope([])


def test_block_rules_use_the_positive_part_or_say_why_not():
    kw = {"d": 1000, "L": 11.0, "lambda_max": 10.0, "lambda_min": -4.0, "trace": 50.0, "gHg": 3.0, "g_sq": 2.0, "q": 2}
    steps, refused = block_rules(Curvature(**kw, trace_plus=80.0))
    assert not refused
    assert steps["stability_lower"].value == pytest.approx(stability_bracket(80.0, 10.0, 0.0, 2).lower.value)
    assert steps["a0"].value == pytest.approx(ss.a0_optimum(11.0, 80.0, 2).value)
    assert steps["identity_q"].value == pytest.approx(ss.identity_q_optimum(50.0, 3.0, 2.0, 2).value)
    assert steps["worst_case"].value == pytest.approx(ss.worst_case(11.0, 1000, 2).value)
    steps, refused = block_rules(Curvature(**kw))
    assert set(refused) == {"a0", "stability"}
    assert "indefinite" in refused["a0"]
    steps, refused = block_rules(Curvature(**{**kw, "trace": -50.0}, trace_plus=80.0))
    assert set(refused) == {"identity_q"}
    slow, _ = block_rules(Curvature(**{**kw, "lambda_min": 0.0}), momentum=0.9)
    assert slow["a0"].value == pytest.approx(0.1 * ss.a0_optimum(11.0, 50.0, 2).value)
    assert slow["stability_upper"].value == pytest.approx(stability_bracket(50.0, 10.0, 0.0, 2, 0.9).upper.value)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: ss.worst_case(-1.0, 10), "L > 0"),
        (lambda: ss.worst_case(math.nan, 10), "L = nan"),
        (lambda: ss.worst_case(1.0, 0), "d >= 1"),
        (lambda: ss.a0_optimum(1.0, -2.0), "trace_plus"),
        (lambda: ss.identity_q_optimum(-10.0, 1.0, 1.0), "no finite best step"),
        (lambda: ss.identity_q_optimum(10.0, 1.0, 0.0), "g_sq > 0"),
        (lambda: ss.first_order(1.0, 1.0), "momentum in"),
        (lambda: ss.noise_limited(-1.0, 10, 1.0, 1.0, None), "Delta > 0"),
        (lambda: ss.noise_limited(1.0, 10, 1.0, 0.0, None), "sigma_sq > 0"),
        (lambda: ss.reshuffling(1.0, 0), "n >= 1"),
        (lambda: ss.couple(1.0, 1.0, -1.0), "C >= 0"),
        (lambda: stability_bracket(10.0, 3.0, -1.0), "lambda_min >= 0"),
        (lambda: stability_bracket(1.0, 1.1), "lambda_max <= tr H"),
        (lambda: stability_bracket(10.0, 3.0, trace_sq=31.0), "tr"),
        (lambda: stability_root([1.0, 2.0], [1.0]), "one length"),
        (lambda: stability_root([1.0], [-1.0]), "weights"),
        (lambda: zhang_step(0.0, 1.0, 0.0), "L0 \\+ L1"),
        (lambda: least([1.0, 2.0], [1.0, 2.0]), "3 or more"),
        (lambda: least([1.0, 2.0, 3.0], [1.0, math.nan, 2.0]), "finite change"),
        (lambda: least(np.ones((3, 3)), np.ones((3, 3))), "3 or more"),
        (lambda: ss.coupled_trace(1.0, 2.0, 1.0, 2.0, 3, 3), "L_y > B"),
        (lambda: tail_limited(0.1, 1.0, 10, 1.0), "failure probability"),
        (lambda: tail_limited(0.0, 1.0, 10), "scale > 0"),
        (lambda: flat_scale([2.0, 1.0], np.ones((3, 2)), np.ones((3, 2))), "increasing"),
        (lambda: flat_scale([1.0, 2.0], np.zeros((3, 2)), np.zeros((3, 2))), "implied trace of 0"),
        (lambda: phi_trace([1.0, 2.0], np.ones((3, 2)), np.ones((3, 3))), "n_dirs >= 2"),
        (lambda: phi_trace([1.0, 2.0], np.ones((1, 2)), np.ones((1, 2))), "n_dirs >= 2"),
        (lambda: finite_scale([1, 2], np.zeros((5, 2)), np.ones(5), 1.0), "at least 3"),
        (lambda: finite_scale([1, 2, 3], np.zeros((3, 3)), np.ones(3), 1.0), "n_dirs"),
        (lambda: finite_scale([1, 2, 3], np.full((5, 3), np.nan), np.ones(5), 1.0), "not finite"),
        (lambda: finite_scale([1, 2, 3], np.zeros((5, 3)), np.ones(5), 1.0, control="both"), "controls"),
    ],
)
def test_bad_input_is_refused_with_the_numbers(call, says):
    with pytest.raises(UserError, match=says):
        call()


def test_checks_grant_standard_errors_and_carry_hypotheses():
    assert check_bound("c", 1.0, 0.9, stderr=0.05).holds
    assert not check_bound("c", 1.0, 0.79, stderr=0.05).holds
    assert check_bound("c", math.inf, 1.0).holds is False
    assert check_bound("c", math.nan, 1.0).holds is None
    assert check_bound("c", 2.0, 6.0).slack == 3.0
    assert check_prediction("c", 1.0, 1.24, stderr=0.05).holds
    assert not check_prediction("c", 1.0, 1.26, stderr=0.05).holds
    assert check_prediction("c", 1.0, 1.1, relative=0.1).holds
    failed = at_most("eta <= 1/L", 2.0, 1.0)
    c = check_bound("c", 1.0, 2.0, hypotheses=[failed])
    assert c.holds
    assert not c.hypotheses_hold
    assert c.to_dict()["hypotheses"][0] == {"name": "eta <= 1/L", "value": 2.0, "limit": 1.0, "holds": False}
    with pytest.raises(OutsideTheorem, match="got 2, limit 1") as refused:
        inside("Theorem", [at_most("fine", 0.0, 1.0), failed], "lower eta")
    assert [h.holds for h in refused.value.hypotheses] == [True, False]
