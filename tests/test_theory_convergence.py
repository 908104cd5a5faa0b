"""The theorems against runs: bounds hold, pathwise claims on every run, slack pinned, rates and scalings as predicted."""

import math

import numpy as np
import pytest

from hybridtheory.errors import UserError
from hybridtheory.theory import convergence as cv
from hybridtheory.theory import problems as pr
from hybridtheory.theory import problems_regression as reg
from hybridtheory.theory import references as rf
from hybridtheory.theory import step_sizes as ss
from hybridtheory.theory.cases import CASES, run_case, table
from hybridtheory.theory.simulate import simulate

# bound/measured at fixed seeds. A change of more than 15 % either way means that a theorem, a rule or the method changed.
SLACK = {
    "A0, descent": 1.011,
    "A0, ZO noise": 1.067,
    "A0, FO noise": 1.007,
    "A, descent": 1.439,
    "A, ZO noise": 3.986,
    "A, FO noise": 1.812,
    "A, truncation": 218.7,
    "C' every run, descent": 7.162,
    "C' every run, truncation": 10.75,
    "C' expectation, descent": 14.84,
    "C' expectation, truncation": 24.11,
    "D, descent": 3.988,
    "D, ZO noise": 85.95,
    "D, FO noise": 11230.0,
    "SGD, descent": 1.017,
    "SGD, noise": 1.499,
    "reshuffling (MKR), descent": 16.85,
    "reshuffling (MKR), noise": 3169.0,
    "Li et al. 4.2": 404.9,
    "Li et al. 5.2": 1.923,
    "fixed subspace, descent": 3.751,
    "fixed subspace, truncation": 20.09,
}
# Terms that theory keeps below half of the bound: their largest share.
SMALL = {"C' every run, truncation": 1 / 3, "C' expectation, truncation": 5 / 13}


@pytest.mark.parametrize("name", CASES)
def test_bound_holds_its_slack_is_pinned_and_its_constant_dominates(name):
    o = run_case(name)
    assert o.measured <= o.bound.value * (1 + 4 * o.stderr / o.measured)
    assert o.slack == pytest.approx(SLACK[name], rel=0.15)
    share = o.bound.share(o.term)
    assert share == pytest.approx(SMALL[name], rel=1e-6) if name in SMALL else share > 0.9


def test_slack_table_lists_every_case():
    lines = table().splitlines()
    assert len(lines) == len(CASES) + 2
    assert all(any(line.startswith(f"| {name} |") for line in lines) for name in CASES)


@pytest.mark.parametrize(
    "make", [lambda: reg.logistic(), lambda: reg.softmax(), lambda: pr.pseudo_huber(6, 4, 2.0, 0.5, 10)]
)
@pytest.mark.parametrize("theorem", ["A0", "A", "D"])
def test_hybrid_bounds_on_real_shapes_over_24_seeds(make, theorem):
    """Both blocks move, with noise: bound <= measured would show at 4 standard errors."""
    p, S = make(), 24
    T = 150 if theorem != "D" else 40
    if theorem == "D":
        eta_x, eta_y = ss.reshuffling(p.L_x, p.n, p.d_x).value, ss.reshuffling(p.L_y, p.n).value
        run = simulate(p, np.zeros(p.d), eta_x, eta_y, T, S, sampling="reshuffle")
    else:
        share = 1.0 if theorem == "A0" else 0.25
        eta_x, eta_y = share * ss.worst_case(p.L_x, p.d_x).value, 0.5 / p.L_y
        mu = 1e-2 if theorem == "A" else 0.0
        kind = "forward" if theorem == "A" else "exact"
        run = simulate(p, np.zeros(p.d), eta_x, eta_y, T, S, sampling="iid", difference=kind, mu=mu)
    delta = float(p.value(np.zeros(p.d))) - p.f_star
    sigmas = (float(run.noise_x.mean()), float(run.noise_y.mean()))
    if theorem == "A0":
        bound = cv.theorem_a0(eta_x, eta_y, p.L_x, p.L_y, p.d_x, delta, T, *sigmas)
    elif theorem == "A":
        bound = cv.theorem_a(eta_x, eta_y, p.L_x, p.L_y, p.d_x, delta, T, *sigmas, mu, p.L_x)
    else:
        bound = cv.theorem_d(eta_x, eta_y, p.L_x, p.L_y, p.d_x, p.n, delta, T, *sigmas)
    measured, error = run.averaged(*bound.weights)
    assert measured <= bound.value + 4 * error
    assert measured > bound.value / 1000


@pytest.mark.parametrize("difference", ["forward", "central"])
@pytest.mark.parametrize("scales", [(1.5, 0.5), (0.4, 2.0), (1.0, 1.0)])
def test_theorem_c_on_every_run_and_at_every_step(scales, difference):
    T, S = 60, 128
    for problem in (pr.cosh(5, 3, *scales, 0.8, 1.2), pr.pseudo_huber(5, 3, *scales, n=5, spread=2.0)):
        w0 = problem.minimiser + 1.2 * np.random.default_rng(3).standard_normal(8)
        delta = float(problem.value(w0)) - problem.f_star
        G = cv.gradient_radius(lambda u, p=problem: max(p.l_x(u), p.l_y(u)), 2 * delta)
        L_x, L_y = problem.l_x(2 * G), problem.l_y(2 * G)
        mu, eta_x, eta_y = 2 * math.sqrt(delta / (T * L_x * 5)), 1 / (2 * 5 * L_x), 1 / L_y
        claim = cv.theorem_c(eta_x, eta_y, problem.l_x, problem.l_y, 5, delta, T, mu)
        assert (claim.gradient, claim.L_x, claim.L_y) == (G, L_x, L_y)
        run = simulate(problem, w0, eta_x, eta_y, T, S, law="sphere", difference=difference, mu=mu, noise=False)
        gap = run.f - problem.f_star
        assert gap.max() <= claim.loss_gap
        assert np.sqrt(run.gx_sq + run.gy_sq).max() <= claim.gradient
        assert np.all(run.gx_sq / L_x + run.gy_sq / L_y <= 2 * gap[:-1] * (1 + 1e-9))
        a, b = claim.sure.weights
        assert (a * run.slope_sq + b * run.gy_sq).mean(0).max() <= claim.sure.value
        measured, error = run.averaged(*claim.expected.weights)
        assert measured <= claim.expected.value + 4 * error
        assert claim.loss_gap == pytest.approx(1.5 * delta)


def fit(x, y):
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def test_reshuffling_helps_the_first_order_block_only():
    """Plateau of ‖g‖² against eta: exponent 2 with reshuffling and 1 without for FO; 1 both ways for ZO (Theorem D)."""
    b = np.zeros((4, 3))
    b[3] = (
        6,
        5,
        7,
    )  # one row is saturated and the others are not: curvature correlates with the noise, so a bias of order eta
    etas, S = 0.02 * np.array([1, 0.5, 0.25, 0.125]), 16
    found = {}
    for block in ("FO", "ZO"):
        d_x = 3 if block == "ZO" else 0
        p = pr.Separable(np.eye(3), b, pr.PSEUDO_HUBER, d_x, 3 - d_x, 1.0, 1.0, lambda u: 1.0, lambda u: 1.0)
        rates = np.repeat(etas, S)
        for sampling, T in (("reshuffle", 800), ("iid", 3200)):
            run = simulate(p, p.minimiser, rates, rates, T, len(rates), sampling=sampling, noise=False)
            squares = run.gx_sq if block == "ZO" else run.gy_sq
            plateau = squares[T // 2 :].mean(0).reshape(len(etas), S).mean(1)
            found[block, sampling] = fit(etas, plateau)
    assert found["FO", "reshuffle"] == pytest.approx(2, abs=0.15)
    assert found["FO", "iid"] == pytest.approx(1, abs=0.2)
    assert found["ZO", "reshuffle"] == pytest.approx(1, abs=0.2)
    assert found["ZO", "iid"] == pytest.approx(1, abs=0.2)


def test_rate_is_minus_one_without_noise_and_minus_one_half_with_it():
    spectrum, w0 = np.linspace(0.3, 1, 13), np.random.default_rng(0).standard_normal(13)
    p = pr.quadratic(10, 3, 4.0, 1.0, spectrum=spectrum)
    steps = np.array([100, 200, 400, 800])
    quiet = [simulate(p, w0, 1 / 48, 1.0, T, 16, noise=False).averaged(1, 1)[0] for T in steps]
    assert fit(steps, quiet) == pytest.approx(-1, abs=0.03)
    p = pr.quadratic(10, 3, 4.0, 1.0, n=16, spread=0.2, spectrum=spectrum)
    w0 = p.minimiser + 0.3 * w0
    delta = float(p.value(w0)) - p.f_star
    steps, noisy = np.array([200, 400, 800, 1600]), []
    for T in steps:
        eta_x = ss.noise_limited(delta, T, 4.0, p.noise_sup[0], 10).value
        eta_y = ss.noise_limited(delta, T, 1.0, p.noise_sup[1], None).value
        assert eta_x < 1 / 48  # noise-limited indeed
        noisy.append(simulate(p, w0, eta_x, eta_y, T, 24, sampling="iid", noise=False).averaged(1, 1)[0])
    assert fit(steps, noisy) == pytest.approx(-0.5, abs=0.06)


def test_steps_to_epsilon_grow_with_the_dimension_only_where_the_spectrum_is_flat():
    dims, steps = np.array([10, 20, 40, 80, 160]), []
    for d in dims:
        run = simulate(pr.quadratic(d), np.ones(d) / math.sqrt(d), 1 / (d + 2), 0.0, 6 * (d + 2), 32, noise=False)
        steps.append((run.f.mean(1) > 0.05 * run.f[0, 0]).sum())
    assert fit(dims + 2, steps) == pytest.approx(1, abs=0.06)
    # d = 400 throughout; the spectrum exp(-k/tau) has effective rank about tau + 1/2, and that sets the steps.
    ranks, steps = [], []
    for tau in (2, 4, 8, 16, 32):
        spectrum = np.exp(-np.arange(400) / tau)
        one = pr.Separable(
            np.diag(np.sqrt(spectrum)), np.zeros((1, 400)), pr.SQUARE, 400, 0, 1.0, 1.0, lambda u: 1.0, lambda u: 1.0
        )
        r = spectrum.sum()
        T = int(8 * (r + 2))
        run = simulate(one, np.eye(400)[0], ss.a0_optimum(1.0, r).value, 0.0, T, 24, noise=False)
        average = np.cumsum(run.gx_sq.mean(1)) / np.arange(1, T + 1)
        ranks.append(r + 2)
        steps.append((average > 0.25).sum())
    assert fit(ranks, steps) == pytest.approx(1, abs=0.08)


def test_tails_against_delta_over_512_seeds():
    """Markov's bound is never broken more often than delta, and by how much it is loose is pinned."""
    p = pr.quadratic(10, 3, 4.0, 1.0, n=16, spread=0.3, spectrum=np.linspace(0.3, 1, 13))
    w0 = p.minimiser + 0.3 * np.random.default_rng(0).standard_normal(13)
    run = simulate(p, w0, 1 / 48, 0.5, 40, 512, sampling="iid", noise=False)
    bound = cv.theorem_a0(1 / 48, 0.5, 4.0, 1.0, 10, float(p.value(w0)) - p.f_star, 40, *p.noise_sup)
    average = (bound.weights[0] * run.gx_sq + bound.weights[1] * run.gy_sq).mean(0)
    pinned = {0.5: 4.45, 0.2: 9.45, 0.1: 17.5, 0.05: 31.9, 0.02: 68.0}
    for delta, loose in pinned.items():
        sure = cv.with_probability(bound, delta)
        assert sure.value == pytest.approx(bound.value / delta)
        assert (average > sure.value).mean() <= delta
        assert sure.value / np.quantile(average, 1 - delta) == pytest.approx(loose, rel=0.15)
    # Li et al. 5.3 on the first-order block: the same two claims, with its own steps.
    p = pr.quadratic(0, 4, 1.0, 1.0, n=16, spread=0.3)
    w0 = p.minimiser + 0.2
    delta, sigma, eps, failure = float(p.value(w0)) - p.f_star, math.sqrt(p.noise_sup[1]), 3.0, 0.5
    T = math.ceil(rf.steps_li(eps, failure, p.l_y, delta, sigma))
    F = 8 * (delta + sigma) / failure
    G = math.sqrt(2 * F)
    claim = rf.li_sgd(p.l_y, min(0.5, 1 / (4 * G * math.sqrt(T))), delta, sigma, T, eps, failure)
    run = simulate(p, w0, 0.0, min(0.5, 1 / (4 * G * math.sqrt(T))), T, 256, sampling="iid", noise=False)
    assert claim.gradient == pytest.approx(G)
    broken = (run.gy_sq.mean(0) > claim.bound.value) | (np.sqrt(run.gy_sq).max(0) > claim.gradient)
    assert broken.mean() <= failure


# ---- formulas at chosen arguments, written out independently --------------------------------------------------------


def test_bounds_term_by_term():
    b = cv.theorem_a0(0.01, 0.3, 2.0, 3.0, 5.0, 7.0, 11, 13.0, 17.0, q=2)
    R = (5 + 2 + 1) / 2
    assert list(b.terms.values()) == pytest.approx([14 / 11, 1e-4 * 2 * R * 13, 0.09 * 3 * 17])
    assert b.weights == pytest.approx((0.01 * (2 - 0.02 * R), 0.3 * (2 - 0.9)))
    b = cv.theorem_a(0.01, 0.3, 2.0, 3.0, 5, 7.0, 11, 13.0, 17.0, 0.1, 19.0)
    assert list(b.terms.values()) == pytest.approx(
        [14 / 11, 4 * 1e-4 * 7 * 13, 3 * 0.09 * 17, 0.005 * 0.01 * 361 * 343]
    )
    assert b.weights == (0.01, 0.3)
    b = cv.theorem_d(1e-4, 1e-3, 2.0, 3.0, 5, 4, 7.0, 11, 13.0, 17.0)
    gamma = max(2e-4, 3e-3)
    assert list(b.terms.values()) == pytest.approx(
        [28 / 44, 12.8e-8 * 2 * 6 * 13, 6.4 * 4 * gamma * 1e-8 * 2 * 13, 6.4 * 4 * gamma * 1e-6 * 3 * 17]
    )
    assert b.value == pytest.approx(sum(b.terms.values()))
    assert b.to_dict()["value"] == b.value
    made = cv.theorem_c(1e-3, 1e-3, lambda u: 2.0 + u, lambda u: 1.0 + u, 4, 0.5, 10, 0.05)
    G = 2 + math.sqrt(4 + 4)  # F = 1, l = 2 + u
    assert made.gradient == pytest.approx(G)
    assert (made.L_x, made.L_y) == pytest.approx((2 + 2 * G, 1 + 2 * G))
    cut = 1e-3 * 0.0025 * made.L_x**2 * 16
    assert list(made.sure.terms.values()) == pytest.approx([0.05, cut / 4])
    assert list(made.expected.terms.values()) == pytest.approx([0.05, 5 * cut / 16])
    assert made.sure.weights == pytest.approx((1e-3 / 4, 1e-3 / 2))
    assert made.expected.weights == pytest.approx((1e-3 / 8, 1e-3 / 2))


def test_gradient_radius_solves_its_equation_and_needs_a_sub_quadratic_law():
    for p, q, F in ((1.0, 0.0, 3.0), (0.0, 2.0, 0.7), (3.0, 0.5, 1e-6), (1e-3, 40.0, 1e3)):
        expected = 2 * q * F + math.sqrt(4 * q**2 * F**2 + 2 * p * F)
        assert cv.gradient_radius(lambda u, p=p, q=q: p + q * u, F) == pytest.approx(expected, rel=1e-9)
    assert cv.gradient_radius(lambda u: 1.0, 0.0) == 0.0
    G = cv.gradient_radius(lambda u: 1 + u**1.5, 2.0)
    assert G**2 == pytest.approx(2 * (1 + (2 * G) ** 1.5) * 2.0, rel=1e-9)
    with pytest.raises(UserError, match="sub-quadratic"):
        cv.gradient_radius(lambda u: u**2, 1.0)
    # Sharp on f = (L/2) w²: ‖g‖² = 2 L (f - f*) exactly.
    assert cv.gradient_radius(lambda u: 5.0, 2.0) == pytest.approx(math.sqrt(2 * 5 * 2))


L_C = 2 + 2 * (2 + math.sqrt(8))  # theorem_c's L_x for l = 2 + u, Delta = 1/2
EDGES = {
    "A0 x": (lambda e: cv.theorem_a0(e, 0.1, 2.0, 3.0, 5, 1.0, 9, q=2), 2 / (2 * (5 + 3) / 2)),
    "A0 y": (lambda e: cv.theorem_a0(0.1, e, 2.0, 3.0, 5, 1.0, 9), 2 / 3),
    "A x": (lambda e: cv.theorem_a(e, 0.1, 2.0, 3.0, 5, 1.0, 9), 1 / (4 * 2 * 7)),
    "A y": (lambda e: cv.theorem_a(0.01, e, 2.0, 3.0, 5, 1.0, 9), 1 / 3),
    "D x": (lambda e: cv.theorem_d(e, 1e-3, 2.0, 3.0, 5, 4, 1.0, 9), 1 / (16 * 4 * 7 * 2)),
    "D y": (lambda e: cv.theorem_d(1e-4, e, 2.0, 3.0, 5, 4, 1.0, 9), 1 / (8 * 4 * 3)),
    "C x": (lambda e: cv.theorem_c(e, 1e-3, lambda u: 2 + u, lambda u: 1 + u, 4, 0.5, 10), 1 / (2 * 4 * L_C)),
    "C y": (lambda e: cv.theorem_c(1e-3, e, lambda u: 2 + u, lambda u: 1 + u, 4, 0.5, 10), 1 / (L_C - 1)),
    "C mu": (
        lambda e: cv.theorem_c(1e-3, 1e-3, lambda u: 2 + u, lambda u: 1 + u, 4, 0.5, 10, e),
        2 * math.sqrt(0.5 / (10 * L_C * 4)),
    ),
    "SGD": (lambda e: rf.sgd(e, 3.0, 1.0, 9), 1 / 3),
    "MKR": (lambda e: rf.random_reshuffling(e, 3.0, 5, 1.0, 9), 1 / 30),
    "Li 4.2": (lambda e: rf.li_convex(lambda u: 2 + u, 1.5, e, 1.0, 9), 1 / (2 * 5.0)),
    "Li 5.2": (lambda e: rf.li_nonconvex(lambda u: 2 + u, e, 1.0, 9), 1 / L_C),
}


@pytest.mark.parametrize("name", EDGES)
def test_step_ranges_end_where_the_theorem_says(name):
    call, limit = EDGES[name]
    call(limit)
    with pytest.raises(UserError, match=r"got .*limit"):
        call(1.001 * limit)


def test_reference_bounds_term_by_term():
    b = rf.sgd(0.1, 3.0, 5.0, 7, 11.0)
    assert b.weights == (0.0, 1.0)
    assert list(b.terms.values()) == pytest.approx([10 / 0.7, 3.3])
    b = rf.random_reshuffling(0.01, 3.0, 5, 7.0, 11, 13.0)
    assert b.weights == (0.0, 1.0)
    assert list(b.terms.values()) == pytest.approx([84 / 0.55, 2e-4 * 9 * 5 * 13])
    assert rf.li_convex(lambda u: 2.0, 1.0, 0.1, 3.0, 5).value == pytest.approx(3.0)
    g = rf.li_nonconvex(lambda u: 2 + u, 0.01, 1.0, 9)
    assert (g.gradient, g.L, g.bound.value) == pytest.approx((2 + math.sqrt(8), L_C, 2 / 0.09))
    eta, b = rf.fixed_subspace(6, 2.0, 3.0, 5, 0.1)
    assert eta == pytest.approx(1 / 80)
    assert list(b.terms.values()) == pytest.approx([4 * 10 * 2 * 3 / 5, 0.01 * 2 * (6 + 6)])


def test_li_sgd_checks_its_three_conditions():
    F, G = 8 * (0.5 + 0.5) / 0.5, math.sqrt(2 * 16 * 2)
    eps = 4.0
    # The two step limits and the length, each in the regime where it binds.
    T = 10_000
    edge = 1 / (4 * G * math.sqrt(T))
    made = rf.li_sgd(lambda u: 2.0, edge, 0.5, 0.5, T, eps, 0.5)
    assert (made.gradient, made.L, made.bound.value) == pytest.approx((G, 2.0, 16.0))
    with pytest.raises(UserError, match="4 G sqrt"):
        rf.li_sgd(lambda u: 2.0, 1.001 * edge, 0.5, 0.5, T, eps, 0.5)
    rf.li_sgd(lambda u: 400.0, 1 / 800, 0.5, 0.5, 2, 1e3, 0.5)  # here 1/(4 G sqrt(T)) = 1/640
    with pytest.raises(UserError, match="2 l"):
        rf.li_sgd(lambda u: 400.0, 1.001 / 800, 0.5, 0.5, 2, 1e3, 0.5)
    affine = rf.li_sgd(lambda u: 2 + u, 1e-6, 0.5, 0.5, 100, 1e3, 0.5)
    assert affine.gradient == pytest.approx(32 + math.sqrt(32**2 + 4 * 16), rel=1e-9)
    assert affine.L == pytest.approx(2 + 2 * affine.gradient, rel=1e-9)
    assert affine.bound.weights == (0, 1)
    assert rf.li_nonconvex(lambda u: 2.0, 0.01, 1.0, 9).bound.weights == (0, 1)
    T = math.ceil(max(2 * 2 * F / eps**2, 16 * F**2 * G**2 / eps**4))
    assert rf.steps_li(eps, 0.5, lambda u: 2.0, 0.5, 0.5) == pytest.approx(16 * F**2 * G**2 / eps**4)
    rf.li_sgd(lambda u: 2.0, 1 / (4 * G * math.sqrt(T)), 0.5, 0.5, T, eps, 0.5)
    with pytest.raises(UserError, match="T >= F"):
        rf.li_sgd(lambda u: 2.0, 1 / (4 * G * math.sqrt(0.9 * T)), 0.5, 0.5, int(0.9 * T), eps, 0.5)
    assert rf.steps_li(1e3, 0.5, lambda u: 2.0, 0.5, 0.5) == pytest.approx(2 * 2 * F / 1e6)


def test_mezo_gamma_is_exact_where_its_hypotheses_are_tight():
    """H = L I on an r-dimensional subspace and g inside it: E ĝ'Hĝ = γ L ‖g‖² for sphere directions, any n."""
    from hybridtheory.theory.moments import curvature_moment

    for d, r, n in ((12, 12, 1), (12, 3, 1), (12, 3, 4), (7, 1, 16)):
        exact = curvature_moment("sphere", d, 2.0, 5.0 * 2.0, 5.0 * r, q=n) / (5.0 * 2.0)
        assert rf.mezo_gamma(d, r, n) == pytest.approx(exact, rel=1e-12)
    b = rf.mezo_one_step(0.1, 5.0, 2.0, 3.0, 12, 3)
    assert list(b.terms.values()) == pytest.approx([-0.2, 0.005 * 5 * rf.mezo_gamma(12, 3) * 3])
    with pytest.raises(UserError, match="at most d"):
        rf.mezo_gamma(3, 4.0)
    with pytest.raises(UserError, match=r"E\|g_B\|"):
        rf.mezo_one_step(0.1, 5.0, 2.0, 1.0, 12, 3)


def test_sample_complexity_and_its_price_of_confidence():
    """steps_markov reaches eps by A0's own bound, exactly; its exponents in delta are 1 then 2, Li et al.'s 3 or 4."""
    for sx, sy, eps in ((0.0, 0.0, 0.1), (3.0, 0.5, 0.3), (0.0, 2.0, 0.2)):
        L_x, L_y, r, delta, failure = 2.0, 3.0, 5.0, 0.7, 0.1
        T = rf.steps_markov(eps, failure, L_x, L_y, r, delta, sx, sy)
        zo = L_x * (r + 2)
        noise = sx / zo + sy / L_y
        c = min(1.0, failure * eps**2 / (2 * noise * max(zo, L_y))) if noise else 1.0
        bound = cv.theorem_a0(c / zo, c / L_y, L_x, L_y, r, delta, math.ceil(T), sx, sy)
        # Least weight on ‖g‖² (2 - c >= 1 is what the closed form uses).
        reached = bound.value / (c / max(zo, L_y)) / failure
        assert reached <= eps**2 * (1 + 1e-9)
        assert reached >= eps**2 * (0.98 if noise else 0.49)
    # The two branches, on both sides of their meeting point, written out: Λ = 14, N = σ_x²/14 + 0.
    for share in (None, 0.8, 1.5):
        noise = 0.0 if share is None else 0.1 * 0.3**2 / (2 * 14 * share)
        T = rf.steps_markov(0.3, 0.1, 2.0, 3.0, 5.0, 0.7, 14 * noise, 0.0)
        assert T == pytest.approx(4 * 0.7 * 14 / (0.1 * 0.3**2 * min(1.0, share or 1.0)))
    G = 32 + math.sqrt(32**2 + 4 * 16)  # F = 16, l = 2 + u
    assert rf.steps_li(1e3, 0.5, lambda u: 2 + u, 0.5, 0.5) == pytest.approx(2 * (2 + 2 * G) * 16 / 1e6)
    assert rf.failure_exponent(lambda f: 1 / f, 0.4) == pytest.approx(1.0)
    with pytest.raises(UserError, match="failure probability"):
        rf.failure_exponent(lambda f: 1 / f, 0.6)
    few = {"eps": 0.1, "L_x": 2.0, "L_y": 3.0, "r": 5.0, "Delta": 0.7}
    quiet = rf.failure_exponent(
        lambda f: rf.steps_markov(delta_probability=f, sigma_x_sq=0.0, sigma_y_sq=0.0, **few), 0.01
    )
    noisy = rf.failure_exponent(
        lambda f: rf.steps_markov(delta_probability=f, sigma_x_sq=3.0, sigma_y_sq=1.0, **few), 0.01
    )
    flat = rf.failure_exponent(lambda f: rf.steps_li(0.1, f, lambda u: 2.0, 0.7, 1.0), 0.01)
    affine = rf.failure_exponent(lambda f: rf.steps_li(0.1, f, lambda u: 2.0 + u, 0.7, 1.0), 0.01)
    assert (quiet, noisy, flat) == pytest.approx((1, 2, 3), abs=0.01)
    assert affine == pytest.approx(4, abs=0.05)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: cv.theorem_a0(-0.1, 0.1, 1.0, 1.0, 3, 1.0, 5), "eta_x >= 0"),
        (lambda: cv.theorem_a0(0.0, 0.0, 1.0, 1.0, 3, 1.0, 5), "eta > 0"),
        (lambda: cv.theorem_a0(0.1, 0.1, 1.0, math.nan, 3, 1.0, 5), "L_y = nan"),
        (lambda: cv.theorem_a(0.01, 0.1, 1.0, 1.0, 3, math.nan, 5), "lower bound of f"),
        (lambda: cv.theorem_a(0.01, 0.1, 1.0, 1.0, 3, 1.0, 0), "T >= 1"),
        (lambda: cv.theorem_d(1e-4, 1e-3, 1.0, 1.0, 3, 0, 1.0, 5), "n >= 1"),
        (lambda: cv.theorem_d(1e-4, 1e-3, 1.0, 1.0, 3, 2, 1.0, 5, -1.0), "sigma_x_sq >= 0"),
        (lambda: cv.theorem_c(0.1, 0.1, lambda u: 1.0, lambda u: 1.0, 3, -1.0, 5), "Delta >= 0"),
        (lambda: cv.theorem_c(0.1, 0.1, lambda u: 1.0, lambda u: 1.0, 3, 0.0, 5), "Delta > 0"),
        (lambda: cv.with_probability(cv.theorem_a0(0.01, 0.1, 1.0, 1.0, 3, 1.0, 5), 0.0), "failure probability"),
        (lambda: cv.with_probability(cv.theorem_a0(0.01, 0.1, 1.0, 1.0, 3, 1.0, 5), 1.0), "failure probability"),
        (lambda: rf.steps_li(0.1, 1.5, lambda u: 1.0, 1.0, 1.0), "failure probability"),
        (lambda: rf.sgd(0.1, -1.0, 1.0, 5), "L > 0"),
        (lambda: rf.sgd(0.1, 1.0, math.nan, 5), "Delta = f"),
        (lambda: rf.fixed_subspace(0, 1.0, 1.0, 5), "k >= 1"),
    ],
)
def test_bad_input_is_refused_with_the_numbers(call, says):
    with pytest.raises(UserError, match=says):
        call()
