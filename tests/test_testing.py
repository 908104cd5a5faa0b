"""check_descent, check_bound and the mathematics behind them, on problems where every prediction is exact."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hybridtheory import descent
from hybridtheory.blocks import partition
from hybridtheory.errors import UserError
from hybridtheory.estimate import Estimate
from hybridtheory.oracle import Oracle
from hybridtheory.testing import check_bound, check_descent
from hybridtheory.theory import descent as theory
from hybridtheory.theory.checks import at_most
from hybridtheory.theory.descent import Mean, compare, fitted_changes, mean_change, miss, rate_exponent
from hybridtheory.theory.held import THEOREMS, Evidence, evidence, hold
from hybridtheory.theory.problems import quadratic
from hybridtheory.theory.simulate import simulate
from tests.toys import Quadratic, Whole, quadratic_oracle, spectrum_matrix

SPECTRUM = torch.cat([10.0 * 0.8 ** torch.arange(30), torch.full((10,), 0.01)])
SPLIT = 28
LOSS = lambda m, b: m() + 0.0 * b.sum()  # noqa: E731 - the rows only say how many there are
BATCHES = [torch.zeros(1, 1, dtype=torch.float64)]


def rates(H: Tensor) -> tuple[float, float, float]:
    """Best base rate by Identity Q, 1/λ_max of PEFT, and tr H_xx."""
    xx, g = H[:SPLIT, :SPLIT], (H @ torch.ones(40, dtype=torch.float64))[:SPLIT]
    trace = float(xx.diagonal().sum())
    return 1 / (trace + 2 * float(g @ xx @ g / (g @ g))), 1 / float(torch.linalg.eigvalsh(H[SPLIT:, SPLIT:])[-1]), trace


def model() -> Quadratic:
    return Quadratic(spectrum_matrix(SPECTRUM, 3), SPLIT)


# ---- one step --------------------------------------------------------------------------------------------------------


def test_quadratic_every_mean_change_is_identity_q() -> None:
    H = spectrum_matrix(SPECTRUM, 3)
    oracle, (x, y) = quadratic_oracle(H, SPLIT)
    eta_x, eta_y, trace = rates(H)
    local, changes = descent.one_step(oracle, x, y, eta_x, eta_y, trace=Estimate(trace, stderr=0.0), most=600)
    g = H @ torch.ones(40, dtype=torch.float64)
    gx, gy = g[:SPLIT], g[SPLIT:]
    assert local.xHx == pytest.approx(float(gx @ H[:SPLIT, :SPLIT] @ gx), rel=1e-12)
    assert local.xHy == pytest.approx(float(gx @ H[:SPLIT, SPLIT:] @ gy), rel=1e-12)
    assert local.slope_error < 1e-10 and abs(local.kink.value) < 1e-6 * trace
    assert [c.what for c in changes] == ["base"] * 4 + ["peft"] * 4 + ["both"] * 4
    for c in changes:
        sx, sy = (c.factor * e * (c.what in (w, "both")) for w, e in (("base", eta_x), ("peft", eta_y)))
        exact = -sx * gx @ gx - sy * gy @ gy + 0.5 * sx**2 * (2 * gx @ H[:SPLIT, :SPLIT] @ gx + trace * gx @ gx)
        exact += 0.5 * sy**2 * gy @ H[SPLIT:, SPLIT:] @ gy + sx * sy * gx @ H[:SPLIT, SPLIT:] @ gy
        assert c.quadratic.value == pytest.approx(float(exact), rel=1e-12)
        assert abs(c.measured.value - float(exact)) <= 5 * c.measured.stderr + 1e-10
        assert abs(c.fitted.value - float(exact)) <= 5 * c.fitted.stderr + 1e-10
        assert c.measured.stderr <= 0.03 * abs(float(exact))
        assert all(h.holds for h in c.hypotheses)
    # What moving both adds: within its own error, in which the base's has no part.
    by = {(c.what, c.factor): c for c in changes}
    for c in changes[8:]:
        extra, base, peft = c.coupling, by["base", c.factor].measured, by["peft", c.factor].measured
        exact = c.factor**2 * eta_x * eta_y * float(gx @ H[:SPLIT, SPLIT:] @ gy)
        assert abs(extra.value - exact) <= 5 * extra.stderr
        assert extra.value == pytest.approx(c.measured.value - base.value - peft.value, abs=1e-12)
        own = c.measured.stderr**2 - base.stderr**2 + peft.stderr**2
        assert extra.stderr == pytest.approx(math.sqrt(own), rel=1e-6)
    assert all(c.coupling is None for c in changes[:8])
    # At small steps the samples do not vary: a handful of directions is enough.
    assert changes[0].measured.n <= 20 and changes[0].measured.stderr < 0.005 * abs(changes[0].measured.value)


def test_size_biased_mean_is_the_plain_mean_with_less_noise() -> None:
    """E h over Gaussian u by both laws, h the exact change of a quadratic at its best step."""
    rng = np.random.default_rng(0)
    lam = 10 * 0.8 ** np.arange(30)
    g = lam * 1.0
    size, eta = np.linalg.norm(g), 1 / (lam.sum() + 2 * (g @ (lam * g)) / (g @ g))

    def change(u: np.ndarray) -> np.ndarray:
        c = u @ g
        return -eta * c**2 + 0.5 * eta**2 * c**2 * ((u**2) @ lam)

    exact = -0.5 * eta * size**2  # Identity Q at its optimum
    v = rng.standard_normal((4000, 30))
    plain = change(v)
    z = np.array([theory.biased_slope(rng.uniform(), rng.standard_normal(3)) for _ in range(4000)])
    biased = mean_change(change(v + (z - v @ g / size)[:, None] * g / size), z)
    assert abs(biased.value - exact) <= 5 * biased.stderr
    assert abs(plain.mean() - exact) <= 5 * plain.std() / math.sqrt(4000)
    assert np.mean(z**2) == pytest.approx(3.0, abs=5 * math.sqrt(6 / 4000)) and abs(z.mean()) < 5 * math.sqrt(3 / 4000)
    assert biased.stderr < 0.6 * plain.std() / math.sqrt(4000)


class Bent(nn.Module):
    """f = a x + b|x - k| summed: a kink at k, no curvature anywhere else; y is quadratic."""

    def __init__(self, kink: float) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.linspace(-0.2, 0.2, 60, dtype=torch.float64))
        self.y = nn.Parameter(torch.ones(4, dtype=torch.float64))
        self.kink = kink

    def forward(self) -> Tensor:
        return (self.x + self.kink * self.x.abs() + 0.5 * self.x**2).sum() + self.y.square().sum()


def test_a_miss_is_named_kinks() -> None:
    bent = Bent(0.5)
    blocks = partition(bent, peft=lambda n: n == "y")
    oracle = Oracle(bent, Whole(), [torch.zeros(1)], blocks)
    local, changes = descent.one_step(
        oracle, blocks[0], None, 5e-3, 0.0, (1.0,), mu=0.05, trace=Estimate(60.0, stderr=0.0), curved=64
    )
    assert local.kink.value > 5 * (local.kink.stderr or 0.0)
    failed = [h for h in changes[0].hypotheses if not h.holds]
    assert any("kinks" in h.name for h in failed)


class Quartic(nn.Module):
    """f = Σ x⁴ along few directions: curvature grows away from w, Identity Q is too optimistic."""

    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.full((20,), 0.3, dtype=torch.float64))

    def forward(self) -> Tensor:
        return (self.x**4 + 0.05 * self.x**2).sum()


def test_a_miss_is_named_third_order_and_the_fitted_curve_sees_it() -> None:
    check = check_descent(Quartic(), BATCHES, lr_base=0.06, loss_fn=LOSS, prediction="quadratic", directions=3000)
    assert check.holds is not True and any(not h.holds and "third order" in h.name for h in check.hypotheses), check
    fitted = check_descent(Quartic(), BATCHES, lr_base=0.06, loss_fn=LOSS, directions=3000, tolerance=0.3)
    assert abs(fitted.measured / fitted.predicted - 1) < abs(check.measured / check.predicted - 1)  # type: ignore[operator]


def test_parts_of_a_miss_add_up() -> None:
    tested, words = miss(Mean(-0.8, 0.01, 9), -1.0, kinks=0.05, coupling=0.12, tolerance=0.1)
    assert {h.name.split(" below")[0]: round(h.value, 6) for h in tested} == {
        "third order": 0.03,
        "kinks": 0.05,
        "coupling": 0.12,
    }
    assert [h.holds for h in tested] == [True, True, False] and words == "coupling (+12% of the prediction)"


def test_fitted_curve_is_exact_for_cubics_and_its_error_is_that_of_directions() -> None:
    s, at = np.array([0.25, 0.5, 0.9]), np.array([0.03, 1.0])
    rng = np.random.default_rng(1)
    a = 0.4 + 0.1 * rng.standard_normal(500)
    samples = -s + a[:, None] * s**2 + 0.07 * s**3
    found = fitted_changes(s, samples, -1.0, at)
    for m, target in zip(found, at, strict=True):
        assert m.value == pytest.approx(-target + a.mean() * target**2 + 0.07 * target**3, rel=1e-12)
        assert m.stderr == pytest.approx(a.std(ddof=1) / math.sqrt(500) * target**2, rel=1e-9)


def test_verdicts() -> None:
    sharp = Mean(-1.0, 0.01, 50)
    assert compare("c", sharp, Mean(-1.05, 0.0, 1), 0.1).holds is True
    assert compare("c", sharp, Mean(-1.3, 0.0, 1), 0.1).holds is False
    assert compare("c", Mean(-1.0, 0.2, 5), Mean(-1.05, 0.0, 1), 0.1).holds is None  # too few directions to tell
    assert compare("c", Mean(-1.0, 0.2, 5), Mean(-1.3, 0.0, 1), 0.1).holds is None
    assert compare("c", sharp, Mean(-1.3, 0.0, 1), 0.1, binding=False).holds is None
    assert (
        "third order" in compare("c", sharp, Mean(-1.3, 0.0, 1), 0.1, (at_most("x", 1, 2),), "third order (+2%)").note
    )


# ---- check_descent ---------------------------------------------------------------------------------------------------


def test_check_descent_holds_where_the_prediction_is_exact() -> None:
    eta_x, eta_y, _ = rates(spectrum_matrix(SPECTRUM, 3))
    net = model().train()
    before = [p.detach().clone() for p in net.parameters()]
    net.x.grad = torch.full_like(net.x, 7.0)
    is_peft = lambda n: n == "y"  # noqa: E731
    for prediction in ("fitted", "quadratic"):
        check = check_descent(
            net, BATCHES, 0.3 * eta_x, 0.3 * eta_y, loss_fn=LOSS, is_peft=is_peft, prediction=prediction
        )
        assert check.holds is True and check.hypotheses_hold, check
        assert check.measured / check.predicted == pytest.approx(
            1.0, abs=5 * check.stderr / abs(check.predicted) + 1e-9
        )  # type: ignore[operator]
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
    assert net.training and net.x.grad is not None and float(net.x.grad[0]) == 7.0
    # Frozen weights beside trainable ones are the base, as peft leaves them.
    net.x.requires_grad_(False)
    assert check_descent(net, BATCHES, None, eta_y, loss_fn=LOSS).claim.startswith("one step of peft")


def test_planted_wrong_prediction_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    eta_x, _, _ = rates(spectrum_matrix(SPECTRUM, 3))

    def check() -> Any:
        return check_descent(model(), BATCHES, 0.3 * eta_x, loss_fn=LOSS, prediction="quadratic").holds

    assert check() is True
    original = descent.identity_q
    for factor in (0.5, 2.0):
        monkeypatch.setattr(descent, "identity_q", lambda ex, ey, gx, *rest, f=factor: original(ex, ey, f * gx, *rest))
        assert check() is False


def test_check_descent_fails_for_a_step_that_diverges() -> None:
    _, eta_y, _ = rates(spectrum_matrix(SPECTRUM, 3))
    check = check_descent(model(), BATCHES, None, 4 * eta_y, loss_fn=LOSS, is_peft=lambda n: n == "y")
    assert check.holds is False and "raises the loss" in check.note and check.measured > 0


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({}, "lr_base, lr_peft or both"),
        ({"lr_base": -1.0}, "lr_base must be a positive"),
        ({"lr_base": float("nan")}, "lr_base must be a positive"),
        ({"lr_peft": 0.1}, "no peft weights"),
        ({"lr_base": 0.1, "prediction": "x"}, "prediction is"),
        ({"lr_base": 0.1, "mu": float("nan")}, "mu > 0"),
    ],
)
def test_check_descent_bad_input(arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        check_descent(Quartic(), BATCHES, loss_fn=LOSS, **arguments)
    with pytest.raises(UserError, match="no data"):
        check_descent(Quartic(), [], lr_base=0.1, loss_fn=LOSS)
    with pytest.raises(UserError, match="the loss is nan"):
        check_descent(Quartic(), BATCHES, lr_base=0.1, loss_fn=lambda m, b: m() * float("nan"))


# ---- bounds ----------------------------------------------------------------------------------------------------------


def simulated(law: str = "gaussian", share: float = 0.9, steps: int = 60, theorem: str = "A0") -> Evidence:
    """Runs of the hybrid method on a quadratic of known constants, at `share` of the theorem's largest rates."""
    problem = quadratic(L_x=4.0, L_y=1.0, d_x=6, d_y=4, n=1)
    d, Lx, Ly = problem.d_x, problem.L_x, problem.L_y
    w0 = np.random.default_rng(0).standard_normal(10)
    eta_x, eta_y = {
        "A0": (share / (Lx * (d + 2)), share / Ly), "A": (share / (4 * Lx * (d + 2)), share / Ly),
        "C'": (share / (2 * d * Lx), share / Ly), "D": (share / (16 * (d + 2) * Lx), share / (8 * Ly)),
    }[theorem]  # fmt: skip
    out = simulate(problem, w0, eta_x, eta_y, T=steps, seeds=40, law=law, seed=0)
    zero = np.zeros_like(out.gx_sq.T)
    return Evidence(
        eta_x, eta_y, d, A=Lx, B=Ly, C=0.0, L_x=Lx, L_y=Ly, trace_plus=d * Lx, cross_sq=0.0, law_x=(Lx, 0.0), law_y=(Ly, 0.0),
        Delta=float(out.f[0, 0] - problem.f_star), loss=out.f[:-1].T, gx_sq=out.gx_sq.T, gy_sq=out.gy_sq.T, sigma_x_sq=zero,
        sigma_y_sq=zero, slope_sq=out.slope_sq.T, law=law,
    )  # fmt: skip


@pytest.mark.parametrize("theorem", THEOREMS)
def test_bounds_hold_on_runs_of_known_constants(theorem: str) -> None:
    e = simulated("sphere" if theorem == "C'" else "gaussian", theorem=theorem)
    checks = hold(e, theorem)
    assert len(checks) == (4 if theorem == "C'" else 1)
    for check in checks:
        assert check.holds is True and check.hypotheses_hold and check.slack >= 1, check
    # A bound that lost a factor that covers its slack is violated: the check can fail.
    first = checks[0]
    assert (
        hold(replace(e, gx_sq=e.gx_sq * 2 * first.slack, gy_sq=e.gy_sq * 2 * first.slack), theorem)[-1].holds is False
        or theorem == "C'"
    )
    assert first.bound is not None and not first.measured > first.bound


def test_a_failing_hypothesis_decides_nothing_and_is_named_with_its_size() -> None:
    e = simulated()
    worst = hold(e, "A")[0]
    assert (
        worst.holds is None
        and worst.bound is None
        and "eta_x <= 1/(4 L_x (d+2))" in worst.note
        and "3.6 times off" in worst.note
    )
    sphere = hold(replace(e, law="sphere"), "A0")[0]
    assert sphere.holds is None and "gaussian directions" in sphere.note and sphere.bound is not None
    steep = np.zeros((40, 59))
    steep[7, 31] = 1.7
    found = hold(replace(e, secant=steep), "A0")[0]
    assert found.holds is None and "run 7, step 32" in found.note and "1.7 times off" in found.note
    assert "slopes are derivatives" in hold(replace(e, slope_error=0.2), "A0")[0].note
    assert "plain SGD" in hold(replace(e, sgd=False, method="zo-adam"), "A0")[0].note
    assert "L of single minibatches" in hold(replace(e, n=4, sampling="reshuffle"), "D")[0].note


def test_theorem_d_averages_over_the_starts_of_whole_epochs() -> None:
    """Steps inside an epoch and a last epoch that was cut short say nothing about D: neither the gradients nor the noise there count."""
    e = replace(simulated(theorem="D", steps=60), n=6, sampling="reshuffle", eta_x=1e-4, eta_y=1e-4)
    start = np.zeros(62, dtype=bool)
    start[:60:6] = True

    def spread(values: np.ndarray, other: float) -> np.ndarray:
        out = np.full((40, 62), other)
        out[:, start] = values[:, :60:6]
        return out

    more = replace(
        e, loss=spread(e.loss, 0.0), gx_sq=spread(e.gx_sq, 9.0), gy_sq=spread(e.gy_sq, 9.0), slope_sq=None,
        sigma_x_sq=spread(e.gx_sq, 7.0), sigma_y_sq=spread(e.gy_sq, 7.0),
    )  # fmt: skip
    noise = replace(e, sigma_x_sq=e.gx_sq, sigma_y_sq=e.gy_sq)
    (found,), (wanted,) = hold(more, "D"), hold(noise, "D")
    assert found.bound is not None and (found.measured, found.bound) == pytest.approx((wanted.measured, wanted.bound))
    assert found.bound > hold(e, "D")[0].bound  # type: ignore[operator]
    assert "whole epochs of 61 steps, the run has 60" in hold(replace(e, n=61), "D")[0].note


def test_coupling_is_split_where_the_rates_have_most_room() -> None:
    """diag(M_x, L_y I) >= H for the M_x behind the split, on a coupled quadratic."""
    from hybridtheory.theory.held import split

    H = spectrum_matrix(SPECTRUM, 5).numpy()
    xx, yy, xy = H[:SPLIT, :SPLIT], H[SPLIT:, SPLIT:], H[:SPLIT, SPLIT:]
    A, B, C = (float(np.linalg.norm(m, 2)) for m in (xx, yy, xy))
    e = replace(
        simulated(), A=A, B=B, C=C, trace_plus=float(np.trace(xx)), cross_sq=float((xy**2).sum()), eta_x=0.01, eta_y=0.1
    )
    L_x, L_y, trace = split(e)
    M = xx + xy @ np.linalg.inv(L_y * np.eye(12) - yy) @ xy.T
    D = np.block([[M, np.zeros_like(xy)], [np.zeros_like(xy.T), L_y * np.eye(12)]])
    assert np.linalg.eigvalsh(D - H)[0] >= -1e-10
    assert np.linalg.eigvalsh(M)[-1] <= L_x * (1 + 1e-12) and np.trace(M) <= trace * (1 + 1e-12)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"L_x": -1.0}, "L_x >= 0"),
        ({"A": math.nan}, "A >= 0 and finite"),
        ({"trace_plus": -3.0}, "trace_plus >= 0"),
        ({"eta_x": math.inf}, "eta_x >= 0"),
        ({"gx_sq": np.zeros((2, 3))}, "one shape"),
        ({"d": 0}, "whole number d"),
    ],
)
def test_a_record_that_cannot_be_one_is_refused(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        replace(simulated(), **changes)


def test_no_f_star_and_unknown_theorem() -> None:
    e = simulated()
    assert (
        "got nan" in hold(replace(e, Delta=math.nan), "A0")[0].note
        and hold(replace(e, Delta=math.nan), "A0")[0].holds is None
    )
    with pytest.raises(UserError, match="A0, A, C', D"):
        hold(e, "B")
    with pytest.raises(UserError, match="no run at"):
        check_bound("nowhere", "A0")
    with pytest.raises(UserError, match="no constants"):
        check_bound([], "A0")


def test_a_run_that_ended_early_violates_the_bound() -> None:
    e = simulated()
    row = {
        "loss": [1.0, 2.0],
        "final": math.inf,
        "grad_sq": {"base": [1.0, 9.0], "peft": [1.0, 9.0]},
        "noise": {"base": [0, 0], "peft": [0, 0]},
    }
    run: dict[str, Any] = {
        **row,
        "status": "not finite",
        "slope_sq": [1.0],
        "moved": {"base": [1.0], "peft": [1.0]},
        "turned": {"base": [1.0], "peft": [1.0]},
    }
    good = {
        **run,
        "status": "finished",
        "loss": [1.0] * 4,
        "grad_sq": {g: [1.0] * 4 for g in ("base", "peft")},
        "noise": {g: [0.0] * 4 for g in ("base", "peft")},
    }
    constants = {
        "eta": {"base": e.eta_x, "peft": e.eta_y}, "norms": {"base": e.A, "peft": e.B, "coupling": 0.0},
        "L": {"base": e.L_x, "peft": e.L_y},
        "trace_plus": e.trace_plus, "cross_sq": 0.0, "laws": {}, "d": {"base": e.d, "peft": 4}, "Delta": 1.0, "slope_error": 0.0,
        "mu": 0.0, "q": 1,
        "law": "gaussian", "n": 1, "sampling": "full", "method": "hybrid", "sgd": True,
    }  # fmt: skip
    assert hold(evidence(constants, [run, good]), "A0")[0].holds is False
    assert check_bound([{"kind": "constants", **constants}, {"kind": "trajectory", **run}], "A0").holds is False


# ---- the exponent ----------------------------------------------------------------------------------------------------


def test_rate_exponent_of_known_sequences() -> None:
    t = np.arange(1, 4001)
    rng = np.random.default_rng(2)
    for power, expected in ((0.5, -0.5), (0.3, -0.3)):
        found = rate_exponent(t**-power * np.exp(0.3 * rng.standard_normal((5, t.size))), start=200)
        assert found.value == pytest.approx(expected, abs=0.04) and found.interval is not None
        assert found.interval[0] < found.value < found.interval[1]
    finished = np.zeros((1, 100))
    finished[0, 0] = 1.0  # all of it in the first step: the average falls as 1/T, and no faster is possible
    assert rate_exponent(finished).value == pytest.approx(-1.0, abs=1e-12) and rate_exponent(finished).interval is None
    for bad in (np.ones((1, 4)), np.full((1, 20), np.nan), -np.ones((1, 20)), np.zeros((2, 20))):
        with pytest.raises(UserError):
            rate_exponent(bad)


def test_readme_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pytest file in the README, executed."""
    text = (Path(__file__).parent.parent / "README.md").read_text()
    block = next(b for b in text.split("```python\n")[1:] if "check_descent" in b).split("```")[0]
    assert len([line for line in block.splitlines() if line.strip()]) <= 12
    space: dict[str, Any] = {}
    exec(block, space)
    tests = [v for k, v in space.items() if k.startswith("test_")]
    assert len(tests) == 2

    # The fixtures that a maintainer has: a model with its batches, and the folder of a finished probe.
    class Tiny(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.linspace(0.5, 1.5, 30, dtype=torch.float64))
            self.lora_B = nn.Parameter(torch.ones(6, dtype=torch.float64))
            self.w.requires_grad_(False)

        def forward(self, x: Tensor) -> Any:
            loss = (
                (self.w.square().sum() + self.lora_B.square().sum() + self.w.sum() * self.lora_B.sum() / 90)
                * x.mean()
                / 2
            )
            return type("Output", (), {"loss": loss})()

    first, second = sorted(tests, key=lambda t: "batches" not in t.__code__.co_varnames)
    first(Tiny(), [{"x": torch.ones(3, 1, dtype=torch.float64)}])
    e = simulated()
    runs = [
        {
            "kind": "trajectory", "status": "finished", "loss": loss, "grad_sq": {"base": x, "peft": y}, "slope_sq": slope,
            "noise": {"base": [0.0] * 60, "peft": [0.0] * 60}, "moved": {"base": [1.0] * 59}, "turned": {"base": [1.0] * 59},
        }
        for loss, x, y, slope in zip(e.loss.tolist(), e.gx_sq.tolist(), e.gy_sq.tolist(), e.slope_sq.tolist(), strict=True)  # type: ignore[union-attr]
    ]  # fmt: skip
    constants = {
        "kind": "constants", "eta": {"base": e.eta_x, "peft": e.eta_y}, "norms": {"base": e.A, "peft": e.B},
        "L": {"base": e.L_x, "peft": e.L_y},
        "trace_plus": e.trace_plus, "cross_sq": 0.0, "laws": {}, "d": {"base": e.d}, "Delta": e.Delta, "slope_error": 0.0,
        "mu": 0.0, "q": 1,
        "law": "gaussian", "n": 1, "sampling": "full", "method": "hybrid", "sgd": True,
    }  # fmt: skip
    folder = tmp_path / "runs" / "mine"
    folder.mkdir(parents=True)
    (folder / "records.jsonl").write_text("".join(json.dumps(r) + "\n" for r in [constants, *runs]))
    monkeypatch.chdir(tmp_path)
    second()


def test_small_steps_in_float32_are_resolved_beyond_the_rounding_of_the_loss() -> None:
    """A loss of 1000 plus a quadratic: changes far below an ulp of the loss are still measured, with errors that say so."""

    class High(Quadratic):
        def forward(self) -> Tensor:
            return super().forward().float() + 1000.0

    H = spectrum_matrix(SPECTRUM, 3)
    net = High(H, SPLIT)
    blocks = partition(net, peft=lambda n: n == "y")
    eta_y = 1e-3 * rates(H)[1]
    _, changes = descent.one_step(
        Oracle(net, Whole(), [torch.zeros(1)], blocks), None, blocks[1], 0.0, eta_y, (0.01, 1.0)
    )
    for c in changes:
        assert abs(c.measured.value) < 6.2e-5 * 600 and c.measured.stderr < 0.03 * abs(c.measured.value)
        assert abs(c.measured.value - c.quadratic.value) <= 5 * c.measured.stderr + 1e-6 * abs(c.measured.value)
