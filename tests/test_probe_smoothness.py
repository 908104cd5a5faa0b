"""The smoothness probe end to end on problems whose answers are known, through `probe_smoothness` and `run`."""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hybridtheory.errors import UserError
from probes import probe_smoothness
from probes.given import given
from probes.jsonl import encode, plain
from probes.point import Settings
from probes.point_scale import batch_variance, training_batch
from probes.records import Cost, End, Fit, Header, Point, Rates, Recommendation, Record, Secant, TrainStep
from probes.report import Report
from probes.smoothness import run
from tests.toys import Quadratic, is_lora, language_model, spectrum_matrix, tokens, with_lora

SMALL: dict[str, Any] = {"points": 2, "secants": 6, "run_steps": 8, "directions": 4, "max_vectors": 32}


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Dropout(0.3), nn.Linear(16, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def classification(rows: int = 24) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(rows, 6, generator=g)
    return x, x[:, :3].argmax(dim=1)


def as_quadratic(report_seed: int = 0) -> tuple[Report, Tensor]:
    H = spectrum_matrix(torch.cat([10.0 * 0.7 ** torch.arange(30), torch.full((10,), 0.01)]), 3)
    model = Quadratic(H, 24)
    loss = lambda m, b: m() + 0.0 * b.sum()  # noqa: E731 - the rows only say how many there are
    report = probe_smoothness(
        model, [torch.zeros(4, 1, dtype=torch.float64)] * 4, loss, seed=report_seed, points=2, secants=8, run_steps=12,
        directions=400, max_vectors=4000, trace_tol=0.01, end_tol=1e-3,
    )  # fmt: skip
    return report, H


def test_quadratic_every_quantity_to_its_stated_error() -> None:
    report, H = as_quadratic()
    exact = torch.linalg.eigvalsh(H)
    first = report.points[0]
    base = first.blocks["base"]
    w = torch.ones(40, dtype=torch.float64)
    g = H @ w
    assert first.loss == pytest.approx(float(0.5 * w @ H @ w), rel=1e-12)
    assert first.grad_norm == pytest.approx(float(g.norm()), rel=1e-12)
    assert base.gHg is not None and base.gHg.value == pytest.approx(float(g @ H @ g / (g @ g)), rel=1e-12)
    assert base.lam_max is not None and base.lam_max.value == pytest.approx(float(exact[-1]), rel=1e-3)
    assert base.lam_max.upper is not None and base.lam_max.upper >= float(exact[-1])
    assert base.trace is not None and base.trace.stderr is not None
    assert abs(base.trace.value - float(exact.sum())) <= 5 * base.trace.stderr + 1e-12
    assert base.trace_plus is not None and base.trace_plus.value == pytest.approx(float(exact.sum()), rel=0.05)
    # Gradients of a quadratic are linear: every secant along g has |H g|/|g|.
    for s in report.secants:
        if s.step == 0 and s.move == "gradient":
            assert s.L_block == pytest.approx(float((H @ g).norm() / g.norm()), rel=1e-6)
    # The finite-scale rule is Identity Q's optimum here: 1/(tr + 2 g'Hg/|g|^2).
    rule = first.finite_scale["base"]
    optimum = 1 / float(exact.sum() + 2 * (g @ H @ g) / (g @ g))
    assert rule.interval is not None
    assert rule.eta_star == pytest.approx(optimum, rel=0.15)
    phi = first.phi["base"]
    for delta, mean, stderr in zip(phi.delta, phi.mean, phi.stderr, strict=True):
        assert abs(2 * mean / delta**2 - float(exact.sum())) <= 5 * 2 * stderr / delta**2 + 1e-6 / delta**2 * 1e-6


def test_reference_run_descends_and_weights_come_back() -> None:
    model = Mlp()
    model.train()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    state = torch.random.get_rng_state()
    report = probe_smoothness(model, [classification()], micro_batch=6, **SMALL)
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert model.training and model.net[2].training
    assert torch.equal(state, torch.random.get_rng_state())
    losses = [r.loss for r in report.steps if r.accepted]
    assert losses == sorted(losses, reverse=True) and losses[-1] < report.points[0].loss
    assert report.recommendation is not None and report.recommendation.base is not None
    assert report.recommendation.base.value is not None and report.recommendation.peft is None
    assert report.json()["learning_rates"]["finite_scale"]["base"]


@cache
def lora_run(**more: Any) -> list[Record]:
    model = with_lora(language_model("gpt2", torch.float32))
    ids = tokens(rows=8)["x"]
    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}]
    return list(run(given(model, batches), Settings(micro_batch=2, **{**SMALL, **more})))


def test_lora_model_by_layers() -> None:
    records = lora_run(blocks="layer")
    report = Report.of(records)
    names = [b.name for b in report.blocks]
    assert names[:2] == ["base", "peft"] and {"base.layer.00", "peft.layer.01"} <= set(names)
    point = report.points[0]
    inner = [b for b in names if b.startswith("base.")]
    # Group traces are the sums of their blocks' (the same products); squared gradient norms add up too.
    total = sum(point.blocks[b].trace.value for b in inner)  # type: ignore[union-attr]
    assert point.blocks["base"].trace is not None
    assert point.blocks["base"].trace.value == pytest.approx(total, rel=1e-9)
    assert point.blocks["base"].grad_norm ** 2 == pytest.approx(
        sum(point.blocks[b].grad_norm ** 2 for b in inner), rel=1e-5
    )
    assert point.coupling is not None and point.coupling.value > 0
    assert {r.rule for r in records if isinstance(r, Rates)} == {
        "worst_case",
        "measured",
        "noise_limited",
        "finite_scale",
        "tail",
    }
    found = next(r for r in records if isinstance(r, Recommendation))
    assert found.base and found.peft and found.ratio and found.base.value and found.peft.value
    assert found.ratio.value == pytest.approx(found.peft.value / found.base.value)
    assert set(found.bound_by) == {"base", "peft", "ratio"}
    assert isinstance(records[-1], End)


def test_measured_rates_are_far_above_the_worst_case() -> None:
    rates = {(r.rule, r.where): r for r in lora_run() if isinstance(r, Rates)}
    worst, measured = rates["worst_case", "first"].base, rates["measured", "first"].base
    assert worst is not None and worst.value is not None
    if measured is not None and measured.value is not None:
        assert measured.value > worst.value


def test_runs_are_repeatable_and_resume_after_any_record() -> None:
    """Cut after the first point, midway and before the last point: what follows, with what was kept, is the uninterrupted run."""

    def stable(records: list[Record]) -> dict[str, list[Any]]:
        kinds: dict[str, list[Any]] = {}
        for r in records:
            if not isinstance(r, Cost):  # calls of the resumed part only; seconds and bytes differ anyway
                value = plain(r, skip_volatile=True)
                if value not in kinds.setdefault(type(r).__name__, []):
                    kinds[type(r).__name__].append(value)
        return kinds

    whole = lora_run()
    expected = stable(whole)
    assert stable(lora_run.__wrapped__()) == expected
    model = with_lora(language_model("gpt2", torch.float32))
    ids = tokens(rows=8)["x"]
    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}]
    measured = [i for i, r in enumerate(whole) if isinstance(r, (Point, Secant, TrainStep))]
    for cut in (measured[0], measured[7], measured[-2]):
        rest = list(run(given(model, batches), Settings(micro_batch=2, **SMALL), done=whole[: cut + 1]))
        assert not any(r in whole[: cut + 1] for r in rest if isinstance(r, (Point, Secant)))
        assert stable([*whole[: cut + 1], *rest]) == expected, cut


def test_dry_run_stops_after_the_estimate() -> None:
    model = Mlp().eval()
    records = list(run(given(model, [classification()]), Settings(**SMALL), dry=True))
    assert isinstance(records[0], Header) and isinstance(records[-1], Cost)
    assert not any(isinstance(r, (Point, Secant, Fit)) for r in records)
    estimated = records[-1]
    actual = next(
        r
        for r in run(given(model, [classification()]), Settings(**SMALL))
        if isinstance(r, Cost) and r.phase == "actual"
    )
    assert actual.products / 2 <= estimated.products <= actual.products * 2


def test_every_record_survives_the_file_format() -> None:
    from probes.jsonl import decode

    for r in lora_run():
        assert plain(decode(encode(r))) == plain(r)


def test_bad_input() -> None:
    model = Mlp()
    with pytest.raises(UserError, match="empty"):
        probe_smoothness(model, [])
    with pytest.raises(UserError, match="labels"):
        probe_smoothness(model, [classification()[0]])
    with pytest.raises(UserError, match="points must be at least 1"):
        probe_smoothness(model, [classification()], points=0)
    with pytest.raises(UserError, match="mu"):
        probe_smoothness(model, [classification()], mu=0.0)
    with pytest.raises(UserError, match="two evaluations of the loss differ"):
        probe_smoothness(model, [classification()], lambda m, b: m(b[0]).square().mean() * (1 + 1e-3 * torch.rand(())))
    with pytest.raises(UserError, match="nan"):
        probe_smoothness(model, [classification()], lambda m, b: m(b[0]).sum() * float("nan"))
    assert not is_lora("net.0.weight")


def test_training_batches_go_round_so_that_every_row_serves_alike() -> None:
    """The control variate's mean is that over batches: one fixed batch would put its own gradient in place of the mean."""
    oracle = SimpleNamespace(batches=[None] * 5, weights=[2.0] * 5, total_weight=10.0)
    batches = [training_batch(oracle, 4, 10, first=j) for j in range(5)]  # type: ignore[arg-type]
    assert [share for _, share in batches] == pytest.approx([0.4] * 5)
    assert sorted(i for picked, _ in batches for i in picked or []) == sorted([*range(5)] * 2)
    assert training_batch(oracle, 10, 10) == (None, 1.0)  # type: ignore[arg-type]


def test_the_control_variates_mean_where_micro_batches_are_unlike() -> None:
    """18 rows in 5, 5, 5 and 3: batches of 8 rows hold 8 to 10, and the mean of their squared gradients is told for each."""
    sizes = [5, 5, 5, 3]
    oracle = SimpleNamespace(batches=sizes, weights=sizes, total_weight=18)
    found = [training_batch(oracle, 8, 18, first=j) for j in range(4)]  # type: ignore[arg-type]
    assert sorted(round(18 * share) for _, share in found) == [8, 8, 10, 10]
    rng, missed = np.random.default_rng(0), []
    for _ in range(4000):  # rows with gradients of their own, the variance of one measured on them
        g = rng.standard_normal((18, 6))
        parts = np.split(g, np.cumsum(sizes)[:-1])
        squares = [
            np.square(np.concatenate([parts[i] for i in picked or []]).mean(axis=0)).sum() for picked, _ in found
        ]
        told = batch_variance(g.var(axis=0, ddof=1).sum(), 18, [share for _, share in found])
        missed.append(np.mean(squares) - np.square(g.mean(axis=0)).sum() - told)
    assert abs(np.mean(missed)) < 4 * np.std(missed) / np.sqrt(len(missed))
    assert np.std(missed) / np.sqrt(len(missed)) < 0.02 * told, (
        "the test would see what one batch's share is off by, a fifth"
    )
