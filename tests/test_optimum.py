"""The best rate of a sweep: exact where it can be, honest intervals, and the grid that leads there."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybridtheory import optimum as O
from hybridtheory.errors import UserError
from probes.sweep_grid import Grid, Score, canonical, edge, ends, wanted

RATES = [0.01 * 3.0**i for i in range(-2, 3)]
Z = np.log(np.array(RATES) / 0.01)


def parabola(rates, at: float, seeds: int = 3, curvature: float = 0.05, noise: float = 0.0, rng=None) -> np.ndarray:
    z = np.log(np.asarray(rates) / at)
    y = 1 + curvature * z**2 + 0.01 * np.arange(seeds)[:, None]
    return y if rng is None else y + noise * rng.standard_normal(y.shape)


def test_a_parabola_is_found_exactly_and_its_interval_is_the_allowance_for_shape():
    found = O.optimum(RATES, parabola(RATES, 0.013), start=2.0)
    assert found.identified and found.rate == pytest.approx(0.013, rel=1e-12)
    assert found.interval == pytest.approx((0.013 * math.exp(-O.SHAPE), 0.013 * math.exp(O.SHAPE)), rel=1e-9)
    assert found.best == 0.01 and len(found.used) == 3
    assert found.fit[2] == pytest.approx(0.05)


@pytest.mark.parametrize(
    ("losses", "note"),
    [
        (parabola(RATES, 1e-3), "lowest of the grid"),
        (parabola(RATES, 0.1), "highest of the grid"),
        (np.full((3, 5), 3.0), "no rate lowers the loss"),
        (np.full((3, 5), math.nan), "no rate lowers the loss"),
        (parabola(RATES, 0.01, seeds=1), "one seed has no interval"),
        (parabola(RATES, 0.01) + np.array([[0.03], [-0.03], [0.0]]) * Z, "wider than a factor 3"),
        (parabola(RATES, 0.01) + np.array([[0.1], [-0.1], [0.0]]) * Z**2, "do not agree"),
    ],
)  # fmt: skip
def test_what_is_not_identified_says_why(losses, note):
    found = O.optimum(RATES, losses, start=2.0)
    assert not found.identified and note in found.note


def test_a_run_that_diverges_counts_as_having_lost_four_times_what_the_best_rate_gains():
    y = O.clipped([[1.0, 1.5, math.inf], [1.2, 50.0, math.nan]], start=2.0)
    assert y == pytest.approx(np.array([[1.0, 1.5, 5.6], [1.2, 5.6, 5.6]]))


def test_the_price_of_a_lost_run_does_not_place_the_optimum(monkeypatch):
    """Between 0.01 and 0.03, where a run was lost, the parabola would be whatever `LOST` makes it."""
    rates = [0.01 / 3, 0.01, 0.03]
    losses = parabola(rates, 0.008, curvature=0.2)
    losses[1, 2] = math.inf
    found = O.optimum(rates, losses, start=2.0)
    assert not found.identified and found.rate == 0.01 and "at 0.03, beside the best rate, a run was lost" in found.note
    # Close to the best rate it does little: that is what a refined grid gives, and what its coverage was measured with.
    near = [0.01 / 1.5, 0.01, 0.015]
    fitted = []
    for price in (2.0, 8.0):
        monkeypatch.setattr(O, "LOST", price)
        fitted.append(O.optimum(near, np.where(np.isinf(losses), np.inf, parabola(near, 0.008)), start=2.0))
    assert all(f.rate < 0.01 for f in fitted) and fitted[0].rate == pytest.approx(fitted[1].rate, rel=0.15)


def test_losses_of_another_shape_are_refused():
    with pytest.raises(UserError, match=r"shape \(seeds, rates\)"):
        O.optimum(RATES, np.zeros((3, 4)), 1.0)
    with pytest.raises(UserError, match="increasing"):
        O.optimum(RATES[::-1], np.zeros((3, 5)), 1.0)


def test_the_test_of_the_slope_covers_at_its_level_whatever_seeds_share():
    """3 seeds with a slope and a curvature of their own, and noise that is the same at all rates of a seed: exact by construction."""
    rng, n, x = np.random.default_rng(0), 4000, np.log(3.0) * np.array([-1, 0, 1])
    hits = bounded = 0
    for _ in range(n):
        b, c = 0.02 * rng.standard_normal(3), 0.05 + 0.004 * rng.standard_normal(3)
        y = b[:, None] * x + c[:, None] * x**2 + rng.standard_normal((3, 1))
        fit = np.polynomial.polynomial.polyfit(x, y.T, 2)
        found = O._zero_slope(fit[1], fit[2], 0.95)
        bounded += found is not None
        hits += (
            found is None or found[0] <= 0 <= found[1]
        )  # an unbounded set holds 0 here, or its complement is far away
    error = math.sqrt(0.95 * 0.05 / n)
    assert bounded > 0.99 * n
    assert abs(hits / n - 0.95) < 5 * error


# ---- a sweep of noisy quadratics, from the first grid to the interval ------------------------------------------------

LAM = 1.0 / np.arange(1, 30)
START = 0.5 * LAM.sum()


def descent(log_rate: np.ndarray) -> np.ndarray:
    """E loss after 40 steps of a zeroth-order method on a quadratic of 29 eigenvalues with noisy gradients: flat, a basin, a wall."""
    eta = np.exp(log_rate)[..., None]
    shrink = (1 - eta * LAM) ** 2 + 0.02 * eta**2 * LAM * LAM.sum()
    with np.errstate(all="ignore"):
        done = shrink**40
        floor = 0.05 * eta**2 * np.where(np.abs(1 - shrink) < 1e-9, 40.0, (1 - done) / (1 - shrink))
        y = 0.5 * (LAM * (done + floor)).sum(-1)
    return np.where(y > 2 * START + 1, np.inf, y)


def swept(shift: float, noise: float, seeds: int, draw: int) -> O.Optimum:
    """One whole adaptive sweep; every seed's curve is shifted in log rate, raised, and noisy."""
    rng = np.random.default_rng([7, draw])
    grid, runs, known = Grid(0.1 * math.exp(rng.uniform(-1.1, 1.1))), {}, {}
    shifts, raised = shift * rng.standard_normal(seeds), 0.05 * rng.standard_normal(seeds)
    while asked := wanted(grid, known, START):
        for rate in asked:
            runs[rate] = descent(math.log(rate) + shifts) + raised + noise * rng.standard_normal(seeds)
        order = sorted(runs)
        losses = O.clipped(np.array([runs[r] for r in order]).T, START).mean(axis=0)
        known = {r: Score(float(y), bool(np.isinf(runs[r]).any())) for r, y in zip(order, losses)}
    return O.optimum(order, np.array([runs[r] for r in order]).T, START)


@pytest.mark.parametrize(("shift", "noise", "seeds"), [(0.05, 0.001, 3), (0.15, 0.03, 5), (0.3, 0.03, 5)])
def test_intervals_cover_the_minimum_of_an_asymmetric_curve(shift, noise, seeds):
    nodes, weights = np.polynomial.hermite_e.hermegauss(41)
    z = np.linspace(math.log(0.05), math.log(2), 4000)
    curves = np.array([descent(z + shift * x) for x in nodes])
    share = weights / weights.sum()
    lowest = (share @ np.minimum(np.nan_to_num(curves, posinf=1e9), START)).min()
    mean = share @ np.minimum(np.nan_to_num(curves, posinf=1e9), START + O.LOST * (START - lowest))
    truth, n = math.exp(z[mean.argmin()]), 120
    found = [o for o in (swept(shift, noise, seeds, i) for i in range(n)) if o.interval]
    covered = sum(o.interval[0] <= truth <= o.interval[1] for o in found)
    assert len(found) > 0.75 * n
    assert covered / len(found) > 0.95 - 2 * math.sqrt(0.95 * 0.05 / len(found))
    assert abs(np.median([math.log(o.rate / truth) for o in found])) < O.SHAPE


# ---- the grid --------------------------------------------------------------------------------------------------------


def filled(grid: Grid, loss, start: float = 1.0, known=None, extra=()) -> dict[float, Score]:
    """The grid run to its end on a known curve; a loss of infinity diverges."""
    known = dict(known or {})
    while asked := wanted(grid, known, start, extra):
        assert not set(asked) & set(known)
        rate = asked[0]
        known[rate] = Score(min(loss(rate), 2 * start), math.isinf(loss(rate)))
    return known


def bowl(at: float, wall: float = math.inf):
    return lambda rate: math.inf if rate > wall else 0.9 - 0.7 * math.exp(-0.05 * math.log(rate / at) ** 2)


def test_an_optimum_on_the_edge_extends_the_grid_until_it_is_inside_and_then_refines():
    known = filled(Grid(1.0, boundary=False), bowl(50.0))
    assert max(known) == 243.0 and edge(known, 1.0) == ""
    order = sorted(known)
    best = min(known, key=lambda r: known[r].loss)
    k = order.index(best)
    assert order[k + 1] / best < 1.53 and best / order[k - 1] < 1.53
    assert 50 / 1.5 < best < 50 * 1.5


def test_the_edge_is_flagged_when_the_extensions_are_used_up():
    grid = Grid(1.0, extensions=2, boundary=False)
    known = filled(grid, bowl(1e6))
    assert max(known) == grid.rate(4) and edge(known, 1.0) == "highest" and ends(grid, known) == (-2, 4)
    known = filled(grid, bowl(1e-6))
    assert min(known) < grid.rate(-3) * 1.01 and edge(known, 1.0) == "lowest"
    # Nothing gained: too large where something is lost, too small where nothing moves.
    lost, still = filled(grid, lambda r: math.inf), filled(grid, lambda r: 1.0)
    assert min(lost) == grid.rate(-4) and max(lost) == grid.rate(2) and edge(lost, 1.0) == "lowest"
    assert max(still) == grid.rate(4) and min(still) == grid.rate(-2) and edge(still, 1.0) == "highest"


def test_the_grid_goes_up_to_the_divergence_boundary():
    known = filled(Grid(1.0), bowl(1.0, wall=100.0))
    assert O.boundary(list(known), [known[r].diverged for r in known]) == (81.0, 243.0)
    assert O.boundary([1, 2, 3, 4], [False, True, False, True]) == (1, 2)
    assert O.boundary([2, 1], [False, False]) == (2, None)


@given(st.floats(1e-3, 1e3), st.floats(1.0, 1e4), st.integers(0, 30))
def test_a_grid_that_is_interrupted_asks_for_the_same_rates(at, above, cut):
    """Rates are asked for as a function of what is known, whenever it became known."""
    grid, loss = Grid(1.0), bowl(at, wall=at * above)
    whole = filled(grid, loss)
    part = dict(list(whole.items())[:cut])
    assert filled(grid, loss, known=part) == whole


def test_predicted_rates_are_run_and_grids_that_are_none_are_refused():
    assert 7.5 in filled(Grid(1.0), bowl(1.0), extra=(7.5,))
    assert canonical(1e-4 * 3**5) == 0.0243
    for wrong in (
        {"centre": 0.0},
        {"centre": 1.0, "points": 2},
        {"centre": 1.0, "refine": 4.0},
        {"centre": 1.0, "extensions": -1},
    ):
        with pytest.raises(UserError):
            Grid(**wrong)
