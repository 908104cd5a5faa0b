"""(L0, L1) fits: exact programs, known constants, intervals whose coverage is measured."""

import importlib.util
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import optimize, stats

from hybridtheory.errors import UserError
from hybridtheory.intervals import bounded_interval, lag_correlation, line_intervals
from hybridtheory.smoothness import fit_envelope, fit_quantile

BENCHMARK = Path(__file__).resolve().parent.parent / "benchmarks" / "coverage.py"


@pytest.fixture(scope="module")
def coverage():
    spec = importlib.util.spec_from_file_location("coverage", BENCHMARK)
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules["coverage"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["coverage"]


def noisy_line(n=40, seed=0, L0=1.0, L1=2.0, span=6.0):
    rng = np.random.default_rng(seed)
    u = np.exp(np.linspace(np.log(span), 0, n) + 0.1 * rng.standard_normal(n))
    return u, (L0 + L1 * u) * np.exp(0.2 * rng.standard_normal(n))


# --- the programs -----------------------------------------------------------------------------------------------------


def test_exact_line_is_recovered_by_both_fits():
    u = np.linspace(0.5, 4, 30)
    for fit in (fit_envelope(u, 3 + 0.7 * u), fit_quantile(u, 3 + 0.7 * u)):
        assert fit.L0 == pytest.approx(3, rel=1e-7)
        assert fit.L1 == pytest.approx(0.7, rel=1e-7)
        assert fit.identified
        assert fit.violation_rate == 0
    assert fit.L1_interval == pytest.approx((0.7, 0.7), rel=1e-5)


def test_envelope_is_above_every_point_and_least_among_all_lines_through_two_points():
    u, L = noisy_line()
    fit = fit_envelope(u, L)
    assert np.all(L <= fit.L0 + fit.L1 * u)
    heights = []  # every vertex of the program: two points, or one point and a sign constraint
    for i in range(len(u)):
        lines = [((L[j] - L[i]) / (u[j] - u[i]), i) for j in range(i)] + [(0.0, i), (L[i] / u[i], i)]
        for slope, k in lines:
            intercept = L[k] - slope * u[k]
            if slope >= 0 and intercept >= -1e-12 and np.all(L <= intercept + slope * u + 1e-12):
                heights.append(intercept + slope * u.mean())
    assert fit.L_mean == pytest.approx(min(heights), rel=1e-6)


@pytest.mark.parametrize("tau", [0.5, 0.9])
def test_quantile_fit_minimises_the_check_loss(tau):
    u, L = noisy_line()

    def loss(line):
        r = L - line[0] - line[1] * u
        return np.sum(np.maximum(tau * r, (tau - 1) * r)) + 1e6 * min(line[0], line[1], 0) ** 2

    fit = fit_quantile(u, L, tau=tau)
    best = optimize.minimize(
        loss, [1.2, 1.8], method="Nelder-Mead", options={"xatol": 1e-10, "fatol": 1e-12, "maxiter": 4000}
    )
    assert loss((fit.L0, fit.L1)) <= best.fun * (1 + 1e-6)
    assert abs(np.sum(fit.L0 + fit.L1 * u < L - 1e-9) - (1 - tau) * len(u)) <= 2


def test_the_intervals_candidate_search_and_the_linear_program_agree():
    u, L = noisy_line()
    fit = fit_quantile(u, L)
    centre, half, _ = line_intervals(u, L, 0.9)
    assert centre == pytest.approx([fit.L0, fit.L1, fit.L_mean], rel=1e-5)
    assert np.all(half > 0)


def test_units_do_not_matter_and_seeds_repeat():
    u, L = noisy_line()
    fit, scaled = fit_quantile(u, L), fit_quantile(1e-4 * u, 1e6 * L)
    assert scaled.L1 == pytest.approx(1e10 * fit.L1, rel=1e-5)
    assert scaled.L0_interval == pytest.approx(tuple(1e6 * x for x in fit.L0_interval), rel=1e-3)
    assert fit_quantile(u, L) == fit
    assert fit_quantile(u, L, seed=1).L0_interval != fit.L0_interval


# --- problems with known constants ------------------------------------------------------------------------------------


def secants(gradient, points, radius=1e-4, seed=0):
    """Pairs (‖∇f‖, local Lipschitz constant) from two gradients at each point."""
    rng = np.random.default_rng(seed)
    pairs = []
    for w in points:
        h = rng.standard_normal(w.shape)
        h *= radius / np.linalg.norm(h)
        g = gradient(w)
        pairs.append((np.linalg.norm(g), np.linalg.norm(gradient(w + h) - g) / radius))
    return np.array(pairs).T


def test_cosh_constants():
    """f = a (cosh(b w) − 1) has f'' = sqrt((a b²)² + (b f')²): convex in |f'|, so the least line above samples is the chord of its ends."""
    a, b = 0.5, 2.0
    points = np.linspace(0.001, 3, 60)[::-1, None]
    u, L = secants(lambda w: a * b * np.sinh(b * w), points)
    fit = fit_envelope(u, L)
    curve = np.sqrt((a * b * b) ** 2 + (b * u) ** 2)
    L1 = (curve[0] - curve[-1]) / (u[0] - u[-1])
    assert fit.L1 == pytest.approx(L1, rel=1e-3)  # secants of radius 1e-4
    assert fit.L0 == pytest.approx(curve[-1] - L1 * u[-1], rel=1e-3)
    # and the chord is the theorem's (L0, L1) = (a b², b) up to what the sampled region can tell
    assert fit.L0 == pytest.approx(a * b * b, rel=1e-2)
    assert 0 <= b - fit.L1 <= 1.01 * a * b * b / u.max()


def test_pseudo_huber_has_no_slope():
    """f = Σ sqrt(1 + w²): the curvature only falls as the gradient grows, so L1 = 0 and L0 is the largest value seen."""
    points = np.linspace(3, 0.05, 40)[:, None]
    u, L = secants(lambda w: w / np.sqrt(1 + w * w), points)
    fit = fit_envelope(u, L)
    assert fit.L1 == pytest.approx(0, abs=1e-9)
    assert fit.L0 == pytest.approx((1 + 0.05**2) ** -1.5, rel=1e-3)
    assert fit_quantile(u, L).L1 == pytest.approx(0, abs=1e-9)


def test_quadratic_secants_stay_below_the_spectral_norm():
    rng = np.random.default_rng(0)
    spectrum = np.linspace(0.1, 7, 8)
    points = [3.0 * 0.8**k * rng.standard_normal(8) for k in range(30)]
    u, L = secants(lambda w: spectrum * w, points)
    fit = fit_envelope(u, L)
    assert fit.L0 + fit.L1 * u.mean() <= 7.0 * (1 + 1e-6)
    assert fit.L0 + fit.L1 * u.max() >= L.max() * (1 - 1e-9)


# --- evidence ---------------------------------------------------------------------------------------------------------


def test_short_span_is_not_identified_and_says_so():
    rng = np.random.default_rng(0)
    u = np.linspace(1, 2.5, 40)
    fit = fit_quantile(u, (1 + u) * np.exp(0.1 * rng.standard_normal(40)))
    assert not fit.identified
    assert "2.5" in fit.note
    assert fit.L_mean_interval[0] < 3 < fit.L_mean_interval[1]


def test_too_few_points_above_the_line_give_no_interval():
    u, L = noisy_line(n=12)
    fit = fit_quantile(u, L)
    assert fit.L0_interval is None
    assert "1.2 points" in fit.note
    assert fit_quantile(u, L, tau=0.5).L0_interval is not None


def test_envelope_has_no_interval_and_its_held_out_rate_agrees_with_theory():
    """Exchangeable points: P(new point above the envelope of n) ≤ 2/(n+1), with equality when both support points are points."""
    rates, n = [], 40
    for seed in range(80):
        rng = np.random.default_rng(seed)
        u = rng.uniform(1, 6, n)
        fit = fit_envelope(u, (1 + 2 * u) * np.exp(0.2 * rng.standard_normal(n)))
        assert fit.L0_interval is None
        rates.append(fit.violation_rate)
    mean, error = np.mean(rates), np.std(rates) / np.sqrt(len(rates))
    assert mean <= 2 / (0.8 * n + 1) + 5 * error
    assert mean >= 1 / (n + 1) - 5 * error  # at least one support point each


def test_violation_interval_is_clopper_pearson():
    u, L = noisy_line(n=50)
    fit = fit_quantile(u, L, tau=0.8)
    k = round(fit.violation_rate * 50)
    assert 0 < k < 50
    assert fit.violation_interval == pytest.approx(
        (stats.beta.ppf(0.025, k, 51 - k), stats.beta.ppf(0.975, k + 1, 50 - k)), rel=1e-6
    )


@pytest.mark.parametrize(
    ("u", "L", "words"),
    [
        ([1, 2], [1, 2], "at least 3 points"),
        ([1, 2, 3], [1, 2], "pairs"),
        ([0, 1, 2], [1, 1, 1], "positive"),
        ([1, 2, 3], [1, np.nan, 1], "finite"),
    ],
)
def test_bad_input_is_refused(u, L, words):
    with pytest.raises(UserError, match=words):
        fit_envelope(u, L)


# --- intervals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("truth", [0.0, 0.3, 1.0, 2.0, 4.0, 12.0])
def test_bounded_interval_covers_exactly_for_a_normal_estimate(truth):
    x = np.linspace(truth - 6, truth + 6, 4001)
    z = stats.norm.ppf(0.975)
    ends = np.array([bounded_interval(v, z) for v in x])
    inside = (ends[:, 0] <= truth) & (truth <= ends[:, 1])
    assert np.trapezoid(inside * stats.norm.pdf(x - truth), x) == pytest.approx(0.95, abs=2e-3)
    assert np.all(ends[:, 1] > 0)
    low, high = bounded_interval(-1e5, z)  # far on the wrong side: short, at zero, never empty
    assert low == 0
    assert 0 < high < 0.01


def test_lag_correlation_is_close_to_unbiased():
    rng = np.random.default_rng(0)
    z = rng.standard_normal((400, 40))
    for k in range(1, 40):
        z[:, k] = 0.4 * z[:, k - 1] + np.sqrt(1 - 0.16) * z[:, k]
    u = np.linspace(0, 1, 40)
    residuals = [row - np.polyval(np.polyfit(u, row, 1), u) for row in z]
    found = np.array([lag_correlation(np.exp(r)) for r in residuals])
    assert found.mean() == pytest.approx(
        0.4, abs=5 * found.std() / 20 + 0.02
    )  # 0.02: values are cut at 0, ranks blur a little


def check_coverage(coverage, case, simulations):
    """Each coverage within 0.93 to 0.97, give or take four binomial standard errors (twelve checks, none by luck)."""
    measured = coverage.study(case, simulations, seed=5)
    slack = 4 * np.sqrt(0.95 * 0.05 / simulations)
    for name in ("L0", "L1", "mean"):
        assert 0.93 - slack <= measured[name] <= min(0.97 + slack, 1), (case.name, name, measured)
    return measured


def test_coverage_in_short(coverage):
    case = next(c for c in coverage.CASES if c.name == "correlation 0.3")
    measured = check_coverage(coverage, case, 150)
    assert measured["pm"] < measured["mean"]  # the plain percentile interval is the one that does not cover


@pytest.mark.slow
@pytest.mark.parametrize("name", ["independent noise", "correlation 0.5", "boundary L0 = 0", "boundary L1 = 0"])
@pytest.mark.parametrize("n", [30, 60])
def test_coverage(coverage, name, n):
    case = next(c for c in coverage.CASES if c.name == name)
    check_coverage(coverage, replace(case, n=n), 1000)
