"""Closed-form moments against exact quadrature of each law, and against Monte Carlo at five standard errors."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats

from hybridtheory.errors import UserError
from hybridtheory.theory import moments as mo
from hybridtheory.theory import moments_error as me
from hybridtheory.theory import moments_subspace as sub

D = 3
G = np.array([1.0, -2.0, 0.5])
H = np.array([[2.0, 0.7, -0.3], [0.7, -1.0, 0.4], [-0.3, 0.4, 3.0]])


def nodes(law):
    """Points [k, 3] and weights [k] that integrate polynomials of degree 9 exactly under the law, in three dimensions."""
    if law == "gaussian":
        x, w = np.polynomial.hermite_e.hermegauss(6)
        w = w / w.sum()
        return np.array(list(itertools.product(x, repeat=D))), np.array(
            [math.prod(p) for p in itertools.product(w, repeat=D)]
        )
    if law == "rademacher":
        u = np.array(list(itertools.product((-1.0, 1.0), repeat=D)))
        return u, np.full(len(u), 1 / len(u))
    if law == "coordinate":
        return math.sqrt(D) * np.eye(D), np.full(D, 1 / D)
    z, w = np.polynomial.legendre.leggauss(6)
    angles = np.arange(12) * 2 * np.pi / 12
    u = [(math.sqrt(1 - a * a) * np.cos(t), math.sqrt(1 - a * a) * np.sin(t), a) for a in z for t in angles]
    return math.sqrt(D) * np.array(u), np.repeat(w / 2, 12) / 12


ONE_QUERY = ("gaussian", "sphere", "rademacher", "coordinate")


@pytest.mark.parametrize("law", ONE_QUERY)
def test_single_query_moments_are_exact(law):
    u, w = nodes(law)
    ghat = (u @ G)[:, None] * u
    np.testing.assert_allclose(w @ ghat, G, rtol=1e-12)
    second = w @ (ghat**2).sum(1)
    assert mo.second_moment(law, D) == pytest.approx(second / (G @ G), rel=1e-12)
    assert mo.variance(law, D) == pytest.approx(w @ ((ghat - G) ** 2).sum(1) / (G @ G), rel=1e-12)
    np.testing.assert_allclose(mo.coordinate_second_moment(law, G, G @ G, D), w @ ghat**2, rtol=1e-12)
    curved = mo.curvature_moment(law, D, G @ G, G @ H @ G, np.trace(H), np.diag(H) @ G**2)
    assert curved == pytest.approx(w @ np.einsum("ni,ij,nj->n", ghat, H, ghat), rel=1e-12)
    cos_sq = (ghat @ G) ** 2 / ((ghat**2).sum(1) * (G @ G))
    if law in ("rademacher", "coordinate"):  # polynomial quadrature does not apply to the others' ratio
        assert mo.cosine_squared(law, D) == pytest.approx(w @ cos_sq, rel=1e-12)


def draw(law, n, d, q, rng):
    """[n, q, d] directions."""
    if law == "rademacher":
        return rng.integers(0, 2, (n, q, d)) * 2.0 - 1
    if law == "coordinate":
        return math.sqrt(d) * np.eye(d)[rng.integers(0, d, (n, q))]
    u = rng.standard_normal((n, q, d))
    if law == "orthonormal":
        return np.linalg.qr(u.transpose(0, 2, 1))[0].transpose(0, 2, 1)
    return u * math.sqrt(d) / np.linalg.norm(u, axis=2, keepdims=True) if law == "sphere" else u


def close(sample, expected, errors=5.0, tight=None):
    """The sample mean within `errors` of its standard errors; `tight` demands that it could see that relative error."""
    error = sample.std(axis=0, ddof=1) / math.sqrt(sample.shape[0])
    assert np.all(np.abs(sample.mean(axis=0) - expected) <= errors * error + 1e-12), (
        sample.mean(axis=0),
        expected,
        error,
    )
    if tight is not None:
        assert np.all(errors * error <= tight * np.abs(expected))


@pytest.mark.parametrize("q", [1, 4, 16])
@pytest.mark.parametrize("law", mo.LAWS)
def test_monte_carlo_of_every_law(law, q):
    d = 20
    rng = np.random.default_rng([q, mo.LAWS.index(law)])
    g = np.sin(np.arange(d) + 1.0)  # no signed sum of these is 0
    A = rng.standard_normal((d, d))
    hess = (A + A.T) / 2 + np.eye(d) * 3
    g_sq = g @ g
    n = 120_000 // q if law != "orthonormal" else 40_000 // q
    u = draw(law, n, d, q, rng)
    ghat = np.einsum("nqd,nq->nd", u, u @ g) * (d / q if law == "orthonormal" else 1 / q)
    close(ghat, g)
    close((ghat**2).sum(1) / g_sq, mo.second_moment(law, d, q), tight=0.1)
    close(((ghat - g) ** 2).sum(1) / g_sq, mo.variance(law, d, q))
    close(ghat**2, mo.coordinate_second_moment(law, g, g_sq, d, q))
    curved = mo.curvature_moment(law, d, g_sq, g @ hess @ g, np.trace(hess), np.diag(hess) @ g**2, q)
    close(np.einsum("ni,ni->n", ghat @ hess, ghat), curved)
    cos = ghat @ g / (np.linalg.norm(ghat, axis=1) * math.sqrt(g_sq))
    assert cos.min() >= -1e-12
    expected = mo.cosine_squared(law, d, q)
    if expected is not None:
        close(cos**2, expected, tight=0.2)
    beta = mo.cosine_beta(law, d, q)
    assert (beta is None) == (law in ("rademacher", "coordinate") or (law == "sphere" and q > 1))
    if beta is not None:
        assert stats.kstest(cos[:20_000] ** 2, stats.beta(*beta).cdf).pvalue > 1e-3
        assert expected == pytest.approx(stats.beta(*beta).mean(), rel=1e-12)
        close(cos, mo.cosine(law, d, q), tight=0.1)
        exact = stats.beta(*beta).expect(math.sqrt)
        assert mo.cosine(law, d, q) == pytest.approx(exact, rel=1e-6)
    else:
        assert mo.cosine(law, d, q) is None


def test_the_cosine_at_llm_scale_and_the_full_basis():
    assert mo.cosine("gaussian", 1_300_000_000) == pytest.approx(math.sqrt(2 / (math.pi * 1.3e9)), rel=1e-4)
    assert mo.cosine("orthonormal", 5, 5) == mo.cosine_squared("orthonormal", 5, 5) == 1.0
    assert mo.second_moment("orthonormal", 5, 5) == pytest.approx(1.0)
    assert mo.second_moment("orthonormal", 1) == pytest.approx(1.0)
    assert mo.fourth("orthonormal", 9, 1) == mo.Fourth(*(pytest.approx(v) for v in (9 / 11, 18 / 11, 0.0)))
    assert mo.fourth("orthonormal", 2, 1) == mo.Fourth(*(pytest.approx(v) for v in (2 / 4, 4 / 4, 0.0)))
    assert mo.cosine_beta("gaussian", 2) == (0.5, 0.5)
    assert mo.cosine_beta("gaussian", 1) is None
    assert mo.cosine("gaussian", 1) == mo.cosine_squared("gaussian", 1) == 1.0


def test_sign_methods():
    rng = np.random.default_rng(0)
    u = rng.standard_normal((200_000, D))
    c = u @ G
    close(np.sign(c)[:, None] * u, mo.sign_slope_mean(G))
    close(np.sign(c[:, None] * u), mo.sign_mean(G))
    assert mo.sign_mean(G) @ G >= 2 / np.pi * np.linalg.norm(G)


# ---- structured directions ------------------------------------------------------------------------------------------


def orthonormal(rng, n, rows, columns):
    return np.linalg.qr(rng.standard_normal((n, rows, columns)))[0]


@pytest.mark.parametrize("q", [1, 4, 16])
def test_fixed_subspace_against_the_projected_gradient(q):
    """SubZero inside one window: (k+q+1)/q against PP'g, and the Beta law in k dimensions."""
    m, n, r = 6, 5, 2
    k = r * r
    rng = np.random.default_rng(q)
    U, V = orthonormal(rng, 1, m, r)[0], orthonormal(rng, 1, n, r)[0]
    grad = rng.standard_normal((m, n))
    projected = U.T @ grad @ V
    z = rng.standard_normal((60_000 // q, q, r, r))
    slope = np.einsum("sqab,ab->sq", z, projected)
    est = np.einsum("sq,sqab->sab", slope, z) / q  # in the subspace's coordinates; U and V are isometries
    close(est.reshape(len(est), -1), projected.ravel())
    energy = (projected**2).sum()
    close((est**2).sum((1, 2)) / energy, sub.subspace_second_moment(k, q), tight=0.1)
    cos_sq = np.einsum("sab,ab->s", est, projected) ** 2 / ((est**2).sum((1, 2)) * energy)
    alpha, beta = sub.subspace_cosine_beta(k, q)
    close(cos_sq, alpha / (alpha + beta))
    if q == 1:
        assert alpha / (alpha + beta) == 1 / k
    assert stats.kstest(cos_sq, stats.beta(alpha, beta).cdf).pvalue > 1e-3


@pytest.mark.parametrize("r", [1, 3])
def test_aligned_subzero_is_unbiased_and_no_better_than_mezo(r):
    rng = np.random.default_rng(r)
    shapes, ranks, dense, N = [(4, 3), (5, 3)], [r, min(r, 2)], 4, 150_000
    grads = [rng.standard_normal(s) for s in shapes]
    vector = rng.standard_normal(dense)
    ztilde = []
    for (m, n), k in zip(shapes, ranks):
        Z = rng.standard_normal((N, k, k))
        U, V = orthonormal(rng, N, m, k), orthonormal(rng, N, n, k)
        ztilde.append(math.sqrt(m * n) / k * U @ Z @ V.transpose(0, 2, 1))
    z = rng.standard_normal((N, dense))
    slope = sum(np.einsum("sab,ab->s", Z, g) for Z, g in zip(ztilde, grads)) + z @ vector
    flat = np.concatenate([*[Z.reshape(N, -1) for Z in ztilde], z], axis=1)
    true = np.concatenate([*[g.ravel() for g in grads], vector])
    close(slope[:, None] * flat, true)
    energies = [(g**2).sum() for g in grads]
    expected = sub.subzero_second_moment(shapes, ranks, energies, dense, vector @ vector)
    close(slope**2 * (flat**2).sum(1), expected, tight=0.06)
    assert expected >= mo.second_moment("gaussian", true.size) * (true @ true) * (1 - 1e-12)
    assert sub.subzero_second_moment([], [], [], 5, 3.0) == pytest.approx(mo.second_moment("gaussian", 5) * 3.0)
    assert sub.subzero_second_moment([(4, 3)], [2], [7.0]) == pytest.approx((12 + 2 * 12 / 4) * 7)
    # One matrix: 1/d against the true gradient at every rank, and r²/(mn) of the energy captured.
    single = ztilde[0].reshape(N, -1)
    cos_sq = (single @ grads[0].ravel()) ** 2 / ((single**2).sum(1) * energies[0])
    close(cos_sq, 1 / 12, tight=0.1)
    U, V = orthonormal(rng, N, 4, r), orthonormal(rng, N, 3, r)
    caught = ((U.transpose(0, 2, 1) @ grads[0] @ V) ** 2).sum((1, 2)) / energies[0]
    close(caught, sub.captured_energy(r * r, 12))


def test_low_rank_families_exactly_and_by_monte_carlo():
    # One by one matrices have moments of products of normals: E u⁴v⁴ = 9, E (τuv)⁴ = 27, and
    # E (Σ_s x_s)⁴ = r E x⁴ + 3r(r-1) (E x²)².
    assert sub.lozo_second_moment(1, 1, 1) == 9
    assert sub.tezo_second_moment(1, 1, 1) == 27
    assert sub.lozo_second_moment(1, 1, 4) == (9 * 4 + 3 * 4 * 3) / 16
    assert sub.tezo_second_moment(1, 1, 4) == (27 * 4 + 3 * 4 * 3) / 16
    rng = np.random.default_rng(0)
    m, n, N = 4, 3, 400_000
    grad = rng.standard_normal((m, n))
    energy = (grad**2).sum()
    for r in (1, 2):
        U, V = rng.standard_normal((N, m, r)), rng.standard_normal((N, n, r))
        lozo = U @ V.transpose(0, 2, 1)
        slope = np.einsum("sab,ab->s", lozo, grad)
        close((slope / r)[:, None, None] * lozo, grad)
        close((slope / r) ** 2 * (lozo**2).sum((1, 2)) / energy, sub.lozo_second_moment(m, n, r))
        cos_sq = slope**2 / ((lozo**2).sum((1, 2)) * energy)
        close(cos_sq, 1 / (m * n))
        tezo = (U * rng.standard_normal((N, 1, r))) @ V.transpose(0, 2, 1)
        slope = np.einsum("sab,ab->s", tezo, grad)
        close((slope / r)[:, None, None] * tezo, grad)
        close((slope / r) ** 2 * (tezo**2).sum((1, 2)) / energy, sub.tezo_second_moment(m, n, r))


@pytest.mark.parametrize("fixed", [False, True])
def test_srgf(fixed):
    d, k, N = 8, 3, 200_000
    rng = np.random.default_rng(int(fixed))
    g = np.linspace(-1, 2, d)
    P = orthonormal(rng, N, d, k) * math.sqrt(d / k) if fixed else rng.standard_normal((N, d, k)) / math.sqrt(k)
    u = np.einsum("sdk,sk->sd", P, rng.standard_normal((N, k)))
    c = u @ g
    close(c[:, None] * u, g)
    close(c**2 * (u**2).sum(1) / (g @ g), sub.srgf_second_moment(d, k, fixed), tight=0.06)


def test_masks_and_preconditioning():
    rng = np.random.default_rng(2)
    d, k, N = 10, 4, 200_000
    g = np.linspace(0.2, 2, d)
    mask = np.arange(d) >= d - k
    u = rng.standard_normal((N, d)) * mask
    c = u @ g
    energy = (g[mask] ** 2).sum() / (g @ g)
    close(c**2 * (u**2).sum(1) / (g[mask] ** 2).sum(), sub.subspace_second_moment(k))
    close(c**2 / ((u**2).sum(1) * (g @ g)), sub.masked_cosine_squared(k, energy), tight=0.1)
    assert sub.masked_cosine_squared(k, sub.captured_energy(k, d)) == pytest.approx(1 / d)
    sigma = np.linspace(0.5, 3, d)
    v = rng.standard_normal((N, d)) * np.sqrt(sigma)
    c = v @ g
    close(c[:, None] * v, sigma * g)
    close(c**2 * (v**2).sum(1), sub.preconditioned_second_moment(g, sigma), tight=0.06)
    assert sub.averaged(7.0, 2.0, 4) == pytest.approx((7 + 3 * 2) / 4)
    assert sub.averaged(mo.second_moment("gaussian", 9), 1.0, 5) == pytest.approx(mo.second_moment("gaussian", 9, 5))
    A = rng.standard_normal((d, d))
    hess, h = A @ A.T, np.linspace(1, 4, d)
    w = rng.standard_normal((N, d))
    moved = w / np.sqrt(h)
    change = 0.5 * np.einsum("si,si->s", moved @ hess, moved)  # |l₊ + l₋ - 2 l₀|/(2 mu²) of a quadratic
    close(change[:, None] * h * w**2, sub.hizoo_diagonal_mean(h, hess))


# ---- finite mu, minibatches, noise, rounding ------------------------------------------------------------------------


def cubic(x):
    """A cubic with coupled third derivatives; x [k, 3]."""
    a, b, c = x.T
    return (
        0.5 * np.einsum("ki,ij,kj->k", x, H, x)
        + x @ G
        + a**3
        + 0.5 * a * b**2
        - 2 * b * c**2
        + 0.3 * a * b * c
        + c**3 / 3
    )


THIRD = np.zeros((3, 3, 3))
for index, value in {(0, 0, 0): 6.0, (0, 1, 1): 1.0, (1, 2, 2): -4.0, (0, 1, 2): 0.3, (2, 2, 2): 2.0}.items():
    for order in itertools.permutations(index):
        THIRD[order] = value


@pytest.mark.parametrize("law", ONE_QUERY)
def test_finite_mu_bias_is_exact_on_a_cubic(law):
    u, w = nodes(law)
    mu = 0.3
    zero = np.zeros((1, 3))
    central = (cubic(mu * u) - cubic(-mu * u)) / (2 * mu)
    forward = (cubic(mu * u) - cubic(zero)) / mu
    expected = me.bias(law, mu, np.einsum("ijj->i", THIRD), np.einsum("iii->i", THIRD), D)
    np.testing.assert_allclose(w @ (central[:, None] * u) - G, expected, atol=1e-12)
    if law != "coordinate":  # its u is not symmetric: u'Hu u has a mean, so forward needs random signs there
        np.testing.assert_allclose(w @ (forward[:, None] * u) - G, expected, atol=1e-12)


@pytest.mark.parametrize("law", ONE_QUERY)
def test_forward_difference_extra_is_exact_on_a_quadratic(law):
    u, w = nodes(law)
    mu = 0.7
    u, w = np.concatenate([u, -u]), np.concatenate([w, w]) / 2
    slope = u @ G + mu / 2 * np.einsum("ki,ij,kj->k", u, H, u)
    extra = w @ (slope**2 * (u**2).sum(1)) - mo.second_moment(law, D) * (G @ G)
    kw = {"trace": np.trace(H), "frobenius_sq": (H**2).sum(), "diag_sq": (np.diag(H) ** 2).sum()}
    assert me.forward_extra(law, mu, D, **kw) == pytest.approx(extra, rel=1e-11)
    assert me.forward_extra(law, mu, D, **kw, q=4) == pytest.approx(extra / 4, rel=1e-11)


def test_worst_case_second_moments_hold_and_are_reached():
    """T2-like sharp case: f = (L/2)‖w‖² with forward differences at g = 0 attains (mu²L²/4) d(d+2)(d+4), half of the bound."""
    L, mu = 2.0, 0.5
    u, w = nodes("gaussian")
    at_zero = w @ ((mu / 2 * L * (u**2).sum(1)) ** 2 * (u**2).sum(1))
    bound = me.worst_case_second_moment(D, 0.0, mu, L)
    assert bound == pytest.approx(2 * at_zero, rel=1e-12)
    exact = w @ ((u @ G) ** 2 * (u**2).sum(1))
    assert me.worst_case_second_moment(D, G @ G, 0.0, L) == pytest.approx(2 * exact, rel=1e-12)
    assert me.nesterov_spokoiny_second_moment(D, G @ G, mu, L) > me.worst_case_second_moment(D, G @ G, mu, L)
    assert me.nesterov_spokoiny_second_moment(10, 3.0, 0.5, 2.0) == pytest.approx(2 * 14 * 3 + 0.125 * 4 * 16**3)


@pytest.mark.parametrize("q", [1, 4])
def test_minibatch_and_evaluation_noise(q):
    rng = np.random.default_rng(q)
    N, d, s, mu = 100_000, 5, 0.3, 0.2
    rows = rng.standard_normal((50, d)) + 1.0  # ‖g‖² and σ² are alike
    g = rows.mean(0)
    sigma_sq = ((rows - g) ** 2).sum(1).mean()
    batch = rows[rng.integers(0, 50, N)]
    u = rng.standard_normal((N, q, d))
    ghat = np.einsum("nq,nqd->nd", np.einsum("nqd,nd->nq", u, batch), u) / q
    close((ghat**2).sum(1), me.minibatch_second_moment("gaussian", d, g @ g, sigma_sq, q), tight=0.08)
    zero = rng.standard_normal((N, 1)) * s
    up, down = rng.standard_normal((2, N, q)) * s
    for difference, noise in (("central", (up - down) / (2 * mu)), ("forward", (up - zero) / mu)):
        pure = np.einsum("nq,nqd->nd", noise, u) / q
        close((pure**2).sum(1), me.evaluation_noise(d, s, mu, difference, q), tight=0.08)
    signal = 2 * mu * np.linalg.norm(g)
    assert me.slope_signal_to_noise(mu, np.linalg.norm(g), s) == pytest.approx(signal / (up - down).std(), rel=0.02)


def test_recommended_mu_minimises_the_error_it_names():
    grid = np.geomspace(1e-4, 10, 200_001)
    total = grid**4 / 4 * 3.0**2 + 50 * 0.01**2 / (2 * grid**2)
    assert me.best_mu_vector(50, 0.01, 3.0) == pytest.approx(grid[total.argmin()], rel=1e-3)
    e, M = 1e-4, 5.0
    for difference, error in (("central", M * grid**2 / 6 + e / grid), ("forward", M * grid / 2 + 2 * e / grid)):
        mu, least = me.best_mu_slope(e, M, difference)
        assert mu == pytest.approx(grid[error.argmin()], rel=1e-3)
        assert least == pytest.approx(error.min(), rel=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("kind", ["linear", "norm"])
def test_absorbed_fraction_against_real_rounding(dtype, kind):
    gen = torch.Generator().manual_seed(0)
    n = 200_000
    w = (
        torch.randn(n, generator=gen, dtype=torch.float64) * 0.02
        if kind == "linear"
        else 1 + 0.1 * torch.rand(n, generator=gen, dtype=torch.float64)
    )
    low = w.to(getattr(torch, dtype))
    mu = {"float32": 1e-9 if kind == "linear" else 1e-7, "bfloat16": 1e-3 if kind == "linear" else 4e-3}.get(
        dtype, 1e-3
    )
    u = torch.randn(n, generator=gen, dtype=torch.float64)
    lost = ((low.double() + mu * u).to(low.dtype) == low).double().numpy()
    expected = me.absorbed_fraction(low.double().numpy(), mu, dtype)
    # Exact powers of two have half the spacing below: a systematic error of up to 1 in 2^(p-1) weights, a quarter of them.
    allowed = 5 * lost.std() / math.sqrt(n) + 0.3 * 2.0 ** (1 - me.PRECISION[dtype])
    assert lost.mean() == pytest.approx(expected, abs=allowed)
    assert 1e-3 < expected < 0.99
    assert me.absorbed_fraction([0.0, 0.0], 1e-3, dtype) == 0.0


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: mo.second_moment("cauchy", 3), "no closed form"),
        (lambda: mo.second_moment("orthonormal", 3, 4), "q <= d"),
        (lambda: mo.second_moment("gaussian", 0), "d >= 1"),
        (lambda: mo.curvature_moment("rademacher", 3, 1.0, 1.0, 1.0), "diag_gHg"),
        (lambda: mo.curvature_moment("gaussian", 3, math.nan, 1.0, 1.0), "g_sq"),
        (lambda: mo.sign_mean([0.0, 0.0]), "positive norm"),
        (lambda: mo.sign_slope_mean([0.0, 0.0]), "positive norm"),
        (lambda: me.bias("rademacher", 0.1, [1.0], None, 3), "third_diag"),
        (lambda: me.bias("subzero", 0.1, [1.0], None, 3), "no closed form"),
        (lambda: me.forward_extra("coordinate", 0.1, 3, 1.0, 1.0), "diag_sq"),
        (lambda: me.forward_extra("subzero", 0.1, 3, 1.0, 1.0), "no closed form"),
        (lambda: me.evaluation_noise(3, 0.1, 0.0), "mu > 0"),
        (lambda: me.evaluation_noise(3, 0.1, 0.1, "backward"), "difference"),
        (lambda: me.best_mu_slope(0.1, 0.1, "backward"), "difference"),
        (lambda: me.absorbed_fraction([1.0], 1e-3, "int8"), "int8"),
        (lambda: me.absorbed_fraction([], 1e-3, "float16"), "at least one"),
        (lambda: sub.subzero_second_moment([(2, 3)], [3], [1.0]), "min\\(m, n\\)"),
        (lambda: sub.subzero_second_moment([(2, 3)], [1, 1], [1.0]), "one rank"),
        (lambda: sub.captured_energy(4, 3), "does not fit"),
        (lambda: sub.masked_cosine_squared(3, 1.5), "<= 1"),
        (lambda: sub.srgf_second_moment(3, 4, True), "k <= d"),
        (lambda: sub.preconditioned_second_moment([1.0, 2.0], [1.0]), "shaped like"),
        (lambda: sub.hizoo_diagonal_mean([0.0], [[1.0]]), "h > 0"),
    ],
)
def test_bad_input_is_refused(call, says):
    with pytest.raises(UserError, match=says):
        call()
