"""probe-estimators through its public path: every law against its closed form, sharing of draws, budget, records, report, bad input."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import FILMS, save, write
from torch import Tensor
from typer.testing import CliRunner

from hybridtheory.blocks import Block, partition
from hybridtheory.errors import UserError
from hybridtheory.estimators import (
    LOZO,
    Gaussian,
    Key,
    Law,
    MagnitudeMask,
    Orthonormal,
    Preconditioned,
    RandomMask,
    SubZero,
    TeZO,
    ZOGradient,
    inner,
)
from hybridtheory.theory.moments import second_moment
from hybridtheory.theory.moments_covariance import (
    Spectrum,
    composed_second_moment,
    covariance_cosine_squared,
    covariance_mean,
    covariance_second_moment,
    random_mask_second_moment,
)
from hybridtheory.theory.moments_subspace import subzero_second_moment
from probes import budget, draws, probe_estimators, rundir
from probes.closed_forms import Given as Facts
from probes.closed_forms import predict
from probes.estimates import estimates
from probes.estimators import Settings, run
from probes.jsonl import decode, encode
from probes.laws import Member
from probes.records import Allocation, Budget, Cost, End, Estimator, Header, Record, Warning
from probes.records_estimators import Compared
from probes.report import Report
from probes.subspaces import spectrum
from probes.tasks import Task, load_task

LAWS = (
    "gaussian", "gaussian:q=4", "gaussian:q=16", "sphere", "sphere:q=4", "rademacher", "coordinate", "orthonormal:q=4", "orthonormal:q=16",
    "subzero:rank=2", "subzero:rank=2,q=4", "subzero:rank=2,refresh=1", "lozo:rank=2", "lozo:rank=2,refresh=1", "tezo:rank=3",
    "magnitude-mask:keep=0.25", "random-mask:keep=0.25", "random-mask:keep=0.5,refresh=100", "hizoo", "srgf:k=3",
)  # fmt: skip


@pytest.fixture(scope="module")
def task(root: Path) -> Task:
    data = write(root / "films.jsonl", [{"text": t, "label": i % 2} for i, t in enumerate(FILMS * 3)])
    model = save("gpt2", root / "gpt2-estimators", n_embd=8, n_layer=1, n_head=1, vocab_size=304)
    return load_task(str(model), str(data), labels=["terrible", "great"], rows=8, rank=2)


@pytest.fixture(scope="module")
def records(task: Task) -> list[Record]:
    settings = Settings(laws=LAWS, precision=0.12, directions=6, mus=(1e-5, 1e-4, 1e-3, 1e-2, 1e-1))
    return list(run(task, settings))


def compared(records: list[Record]) -> dict[tuple[str, str, str], Compared]:
    return {
        (e.block, e.law, name): c
        for e in records if isinstance(e, Estimator)
        for name, c in {**e.quantities, **{f"bias {k}": v for k, v in e.bias.items()}}.items()
    }  # fmt: skip


def test_every_law_on_both_groups_agrees_with_every_closed_form_at_five_standard_errors(records: list[Record]) -> None:
    found = compared(records)
    assert {(b, law) for b, law, _ in found} == {(b, law) for b in ("base", "peft") for law in LAWS}
    tested = {k: (c.value - c.predicted) / c.stderr for k, c in found.items() if c.predicted is not None and c.stderr}
    assert len(tested) > 350
    assert {k: z for k, z in tested.items() if abs(z) > 5} == {}
    # Not by error bars that are too wide: most deviations of normal estimates lie within two of them, and some beyond one.
    assert 0.85 < np.mean(np.abs(list(tested.values())) < 2) < 1
    assert np.mean(np.abs(list(tested.values())) > 1) > 0.1
    for law in LAWS:
        assert found["base", law, "second_moment"].predicted is not None, law


def test_the_cosine_follows_its_beta_law(records: list[Record]) -> None:
    p = [c.ks_p for e in records if isinstance(e, Estimator) for c in e.cosines if c.ks_p is not None]
    assert len(p) >= 10
    assert min(p) > 1e-4


def test_subzero_has_one_over_k_against_the_projection_and_one_over_d_against_the_gradient(
    records: list[Record],
) -> None:
    for e in (e for e in records if isinstance(e, Estimator) and e.law == "subzero:rank=2,refresh=1"):
        to_g, to_projection, captured = (e.quantities[n] for n in ("cosine_sq", "cosine_sq_projected", "captured"))
        assert to_g.value == pytest.approx(1 / e.d, abs=5 * (to_g.stderr or 0))
        assert e.subspace is not None
        assert to_projection.value > 1.5 * to_g.value
        assert captured.value == pytest.approx(captured.predicted, abs=5 * (captured.stderr or 0))


def test_precision_is_reached_or_said_to_be_missed(records: list[Record]) -> None:
    for e in (e for e in records if isinstance(e, Estimator)):
        second = e.quantities["second_moment"]
        assert e.reached == ((second.stderr or 0) <= 1.1 * e.precision * second.value)
    assert all(e.reached for e in records if isinstance(e, Estimator) and e.law.startswith("gaussian"))


# ---- inner products are those of the laws' own directions ------------------------------------------------------------


def toy() -> tuple[Block, draws.Reference, dict[str, Tensor]]:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            generator = torch.Generator().manual_seed(0)
            # Larger than a piece and than a row of the fixed vectors, and no multiple of either.
            self.a = torch.nn.Parameter(torch.randn(130, 131, generator=generator, dtype=torch.float64))
            self.b = torch.nn.Parameter(torch.randn(7, generator=generator, dtype=torch.float64))

    block = partition(Net())[0]
    generator = torch.Generator().manual_seed(1)
    g, h = ([torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in block.tensors] for _ in range(2))
    diagonal = {
        n: torch.rand(p.shape, generator=generator, dtype=torch.float64) + 0.5 for n, p in block.parameters.items()
    }
    return block, draws.Reference.of(block, {"a": "first", "b": "second"}, g, h, 3), diagonal


def toy_laws(block: Block, h: dict[str, Tensor]) -> dict[str, Law]:
    return {
        "gaussian": Gaussian(), "mask": MagnitudeMask.of(block), "random": RandomMask(), "hizoo": Preconditioned(h), "subzero": SubZero(4),
        "lozo": LOZO(3), "tezo": TeZO(3), "fresh": SubZero(4, refresh=1),
    }  # fmt: skip


@pytest.mark.parametrize("name", ["gaussian", "mask", "random", "hizoo", "subzero", "lozo", "tezo", "fresh"])
def test_streamed_sums_are_those_of_the_laws_directions(name: str) -> None:
    block, reference, h = toy()
    law = toy_laws(block, h)[name]
    batch = draws.keys(law, 5, 2, 0, 4)
    if draws.shares(law):
        sums = draws.gaussian_batch(reference, {name: law}, batch)[name]
    elif draws.keeps(law):
        bound = law.bind(block, batch)
        sums = draws.factored_batch(reference, bound, draws.factored(reference, bound, Key(5)), batch)
    else:
        sums = draws.law_batch(reference, law, batch)
    bound = law.bind(block, batch)
    for part, tensor in (("first", "a"), ("second", "b")):
        u = torch.stack([bound.fill(k, tensor, block.parameters[tensor]).reshape(-1) for k in batch]).detach()
        columns = torch.stack([reference.column(tensor, i) for i in range(2 + draws.TESTS)])
        dots, gram = sums[part]
        np.testing.assert_allclose(gram, (u @ u.T).numpy(), atol=1e-9)
        np.testing.assert_allclose(dots[:, : draws.CAPTURED], (u @ columns.T).numpy(), atol=1e-9)


def test_fixed_vectors_have_entries_of_one_and_differ() -> None:
    _, reference, _ = toy()
    columns = torch.stack([reference.column("a", draws.R + i) for i in range(draws.TESTS)])
    assert torch.equal(columns.abs(), torch.ones_like(columns))
    overlap = columns @ columns.T / columns.shape[1] - torch.eye(draws.TESTS)
    assert overlap.abs().max() < 6 / math.sqrt(columns.shape[1])
    assert torch.equal(columns[:, : draws._PATTERN], reference.columns("a", 0, draws._PATTERN)[draws.R :])


@pytest.mark.parametrize("text", ["gaussian:q=4", "orthonormal:q=4", "sphere:q=2"])
def test_estimates_are_those_of_the_optimizers_gradient(text: str) -> None:
    """‖ĝ‖² and ⟨ĝ, ·⟩ of a set of queries from inner products, against the same ĝ made dense by ZOGradient."""
    block, reference, _ = toy()
    m = Member.of(text)
    assert m.law is not None
    batch = draws.keys(Gaussian(), 1, 2, 0, m.q)
    sums = draws.gaussian_batch(reference, {"": Gaussian()}, batch)[""]
    dots, gram = (sum(sums[p][i] for p in sums)[None] for i in range(2))
    got = estimates(m, m.law, (dots, gram), block.numel)
    bound = m.law.bind(block, batch)
    g = [reference.g[n].view(p.shape) for n, p in block.parameters.items()]
    slopes = tuple(inner(bound, k, block, g) for k in batch)
    dense = ZOGradient(bound, tuple(batch), slopes, block).dense()
    assert got.norm_sq[0] == pytest.approx(sum(float((x**2).sum()) for x in dense), rel=1e-9)
    assert got.dots[0, draws.G] == pytest.approx(sum(float((x * y).sum()) for x, y in zip(dense, g)), rel=1e-9)
    assert isinstance(m.law, Orthonormal) == (got.span is not None)


@pytest.mark.parametrize("name", ["mask", "hizoo", "subzero", "lozo", "tezo"])
def test_spectrum_of_a_kept_law_is_that_of_its_dense_covariance(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    net = torch.nn.Linear(6, 8, bias=False, dtype=torch.float64)
    block = partition(net)[0]
    h = {"weight": torch.rand(8, 6, generator=generator, dtype=torch.float64) + 0.5}
    laws: dict[str, Law] = {
        "mask": MagnitudeMask.of(block),
        "hizoo": Preconditioned(h),
        "subzero": SubZero(2),
        "lozo": LOZO(2),
        "tezo": TeZO(3),
    }
    law = laws[name].bind(block, [Key(0)])
    g = torch.randn(8, 6, generator=generator, dtype=torch.float64)
    u = torch.stack([law.fill(Key(0, 0, i), "weight", net.weight).reshape(-1) for i in range(12_000)]).detach()
    sigma = (u.T @ u / len(u)).numpy()
    found = spectrum(law, Key(0), "weight", net.weight, g)
    assert found is not None
    flat = g.reshape(-1).numpy()
    along, square = covariance_mean(found)
    assert np.trace(sigma) == pytest.approx(found.value @ found.count, rel=0.05)
    assert flat @ sigma @ flat == pytest.approx(along, rel=5 * math.sqrt(2 / len(u)))
    assert flat @ sigma @ sigma @ flat == pytest.approx(square, rel=10 * math.sqrt(2 / len(u)))
    assert np.linalg.matrix_rank(sigma, tol=1e-9 * sigma.max()) == round(found.dimension)


# ---- closed forms ----------------------------------------------------------------------------------------------------


def test_covariance_forms_reduce_to_known_ones_and_agree_with_sampling() -> None:
    one = Spectrum.of(1.0, 50, 3.0)
    assert covariance_second_moment(one, q=4) == pytest.approx(3 * second_moment("gaussian", 50, 4), rel=1e-12)
    assert covariance_cosine_squared(Spectrum.of(7.0, 50, 3.0), 4.0) == pytest.approx(3 / 4 / 50, rel=1e-8)
    assert covariance_cosine_squared(Spectrum.of(2.0, 1e8, 5.0), 5.0) == pytest.approx(1e-8, rel=1e-6)
    rng = np.random.default_rng(0)
    lam, times = np.array([3.0, 1.0, 0.2]), np.array([4, 7, 2])
    g = rng.normal(size=13)
    u = rng.normal(size=(200_000, 13)) * np.sqrt(np.repeat(lam, times))
    s = Spectrum.of(lam, times, [float((x**2).sum()) for x in np.split(g, np.cumsum(times)[:-1])])
    slope, size = u @ g, (u**2).sum(1)
    for sample, exact in (
        (slope**2 * size, covariance_second_moment(s)),
        (slope**2 / size / (g @ g), covariance_cosine_squared(s, g @ g)),
    ):
        assert abs(sample.mean() - exact) < 5 * sample.std() / math.sqrt(len(sample))
    with pytest.raises(UserError, match="positive eigenvalues"):
        Spectrum.of(0.0, 3, 1.0)


def test_composed_moments() -> None:
    shapes, ranks, energies = [(6, 4), (8, 3)], [2, 1], [1.5, 0.4]
    excess = [2 * m * n / r**2 for (m, n), r in zip(shapes, ranks)]
    assert composed_second_moment(48, 1.9, excess, energies) == pytest.approx(
        subzero_second_moment(shapes, ranks, energies), rel=1e-12
    )
    assert random_mask_second_moment(40, 1.0) == pytest.approx(second_moment("gaussian", 40))
    rng = np.random.default_rng(0)
    z = rng.normal(size=(200_000, 10)) * (rng.random((200_000, 10)) < 0.3)
    g = rng.normal(size=10)
    sample = (z @ g) ** 2 * (z**2).sum(1) / (g @ g)
    assert abs(sample.mean() - random_mask_second_moment(10, 0.3)) < 5 * sample.std() / math.sqrt(len(sample))
    # the few masks that keep nothing have cosine 0
    facts = Facts(10, float(g @ g), {"w": 10}, {"w": float(g @ g)}, {"w": None}, {"w": None})
    said = predict(RandomMask(0.3), "", 1, facts).values["cosine_sq"][0]
    size = (z**2).sum(1)
    sample = np.divide((z @ g) ** 2, size * (g @ g), out=np.zeros(len(z)), where=size > 0)
    assert said < 0.98 / 10 and abs(sample.mean() - said) < 5 * sample.std() / math.sqrt(len(sample))


# ---- error budget ----------------------------------------------------------------------------------------------------


def test_budget_finds_truncation_rounding_and_a_flat_range(records: list[Record]) -> None:
    found = [b for b in records if isinstance(b, Budget)]
    assert [b.block for b in found] == ["base", "peft"]
    for b in found:
        assert b.direction == pytest.approx(b.d + 1)
        assert (
            b.truncation is not None
            and b.loss_rounding is not None
            and b.recommended is not None
            and b.flat is not None
        )
        assert b.flat[0] <= b.recommended <= b.flat[1]
        # A float32 loss near 1 to 10 is rounded by a few units of 1e-7: measured from loss differences alone.
        assert 1e-9 < (b.loss_noise or 0) < 1e-5
        assert b.added[0] > 10 * min(b.added) and b.added[-1] > 10 * min(b.added)
        assert {p.name for p in b.published} == {"full", "LoRA", "prefix"}


def test_fit_of_truncation_and_rounding_recovers_known_coefficients() -> None:
    mu = np.geomspace(1e-5, 1, 11)
    a, b = 3e6, 2e-13
    found = budget._fit(mu, a * mu**4 + b / mu**2, np.ones(11, bool))
    assert found is not None
    np.testing.assert_allclose(found, (a, b), rtol=1e-5)
    best = budget._recommend(found, mu, a * mu**4 + b / mu**2, base=1e3)
    assert best.mu == pytest.approx((b / (2 * a)) ** (1 / 6), rel=1e-5)
    assert best.flat is not None
    assert best.flat[0] == pytest.approx(1e-5)
    assert best.flat[1] == pytest.approx((50 / a) ** 0.25, rel=0.05)  # 5 % of 1e3


def test_bfloat16_weights_add_their_rounding(root: Path, task: Task) -> None:
    data = str(root / "films.jsonl")
    coarse = load_task(
        str(root / "gpt2-estimators"), data, labels=["terrible", "great"], rows=8, rank=2, dtype="bfloat16"
    )
    got = run(coarse, Settings(laws=("gaussian",), precision=1.0, directions=2, mus=(1e-3, 1e-2, 1e-1)))
    b = next(r for r in got if isinstance(r, Budget))
    assert b.dtype == "bfloat16"
    assert b.weights[0] > 1e3 * b.weights[-1] > 0
    assert b.absorbed[0] > b.absorbed[-1]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sums_over_16_bit_weights_are_taken_in_float32(root: Path, task: Task, dtype: str) -> None:
    data = str(root / "films.jsonl")
    coarse = load_task(str(root / "gpt2-estimators"), data, labels=["terrible", "great"], rows=8, rank=2, dtype=dtype)
    got = compared(list(run(coarse, Settings(laws=LAWS, precision=0.12, directions=2, mus=(1e-2, 1e-1)))))
    assert {law for _, law, _ in got} == set(LAWS)
    for key, c in got.items():
        if c.predicted is not None and c.stderr is not None:
            assert abs(c.value - c.predicted) <= 5 * c.stderr + 1e-2 * abs(c.predicted), key


def test_more_rows_queries_or_steps(records: list[Record]) -> None:
    for a in (a for a in records if isinstance(a, Allocation)):
        assert a.more_steps == 0.5
        assert 0.5 < a.more_queries <= 0.55
        assert 0.5 < a.more_rows <= 1
        ratio, d = a.critical_rows.value, next(b.d for b in records if isinstance(b, Budget) and b.block == a.block)
        errors = {(b, q): e for b, q, e in a.errors}
        assert errors[4, 1] == pytest.approx(d + 1 + (d + 2) * ratio / 4)


# ---- records, report, resume -----------------------------------------------------------------------------------------


def test_records_round_trip_and_make_a_report(records: list[Record]) -> None:
    assert all(decode(encode(r)) == r for r in records if isinstance(r, Estimator | Budget | Allocation))
    assert isinstance(records[0], Header) and records[0].probe == "estimators"
    assert isinstance(records[-1], End)
    report = Report.of(records)
    text = report.markdown()
    assert "none known" in text and "noise floor" in text and "subzero:rank=2" in text
    written = report.json()
    assert (
        written["probe"] == "estimators"
        and len(written["estimators"]) == 2 * len(LAWS)
        and "learning_rates" not in written
    )


def test_a_resumed_run_measures_only_what_is_missing_and_says_the_same(task: Task) -> None:
    settings = Settings(laws=("gaussian", "rademacher"), precision=0.3, directions=2, mus=(1e-3, 1e-2))
    whole = list(run(task, settings))
    kept = [r for r in whole if isinstance(r, Header) or (isinstance(r, Estimator) and r.law == "gaussian")]
    again = list(run(task, settings, done=kept))
    assert [r for r in again if not isinstance(r, Cost)] == [r for r in whole if not isinstance(r, Cost)]


def test_any_module_with_a_loss_from_python() -> None:
    """`probe_estimators` on a linear regression: the closed forms, the tables, and a model that is as it was."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Dropout(0.5), torch.nn.Linear(4, 1))
    batches = [(torch.randn(6, 5), torch.randn(6, 1)) for _ in range(2)]
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    report = probe_estimators(
        net, batches, lambda model, batch: (model(batch[0]) - batch[1]).square().mean(), laws=["gaussian", "sphere:q=2"], precision=0.1,
        directions=3, mus=(1e-4, 1e-2, 1.0), micro_batch=3,
    )  # fmt: skip
    assert net.training and all(torch.equal(p, before[n]) and p.grad is None for n, p in net.named_parameters())
    written = report.json()
    assert written["probe"] == "estimators" and [e["law"] for e in written["estimators"]] == ["gaussian", "sphere:q=2"]
    tables = report.frames()
    assert set(tables) == {"estimators", "cosines", "budgets", "published", "allocations"}
    second = tables["estimators"].query("quantity == 'second_moment'").set_index("law")
    assert second.loc["gaussian", "predicted"] == 29 + 2
    assert ((second["value"] - second["predicted"]).abs() < 5 * second["stderr"]).all()
    assert set(tables["estimators"]["quantity"]) >= {
        "variance",
        "mse",
        "cosine_sq",
        "bias g",
        "bias r7",
        "bias norm_sq",
    }
    gaussian = report.all(Estimator)[0]
    assert tables["cosines"].query("law == 'gaussian'")["count"].sum() == gaussian.n
    assert list(tables["budgets"]["mu"]) == [1e-4, 1e-2, 1.0] and len(tables["published"]) == 3
    assert "Error budget" in report.markdown()
    with pytest.raises(UserError, match="the batches carry no labels"):
        probe_estimators(net, [torch.randn(3, 5)])
    with pytest.raises(UserError, match="no direction law 'gauss'"):
        probe_estimators(net, batches, laws=["gauss"])


def test_threads_change_nothing(task: Task) -> None:
    settings = Settings(laws=("gaussian:q=4", "rademacher"), max_draws=48, directions=2, mus=(1e-3,))
    threads = torch.get_num_threads()
    found = []
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            found.append([r for r in run(task, settings) if isinstance(r, Estimator)])
            assert torch.get_num_threads() == n
    finally:
        torch.set_num_threads(threads)
    for one, two in zip(*found):
        assert one.quantities["second_moment"].value == pytest.approx(two.quantities["second_moment"].value, rel=1e-4)


def test_finer_blocks_have_their_own_laws(task: Task) -> None:
    before = {n: p.detach().clone() for n, p in task.model.named_parameters()}
    settings = Settings(laws=("sphere", "coordinate"), blocks="layer", precision=0.3, directions=2, mus=(1e-3, 1e-2))
    made = list(run(task, settings))
    found = [r for r in made if isinstance(r, Estimator)]
    finer = [e for e in found if e.block != e.group]
    assert len({e.block for e in finer}) >= 2
    for e in finer:
        second = e.quantities["second_moment"]
        assert second.predicted == pytest.approx(e.d, rel=1e-12)
        assert abs(second.value - e.d) < 5 * (second.stderr or 0)
    assert all(torch.equal(p, before[n]) for n, p in task.model.named_parameters())
    budgets = {b.block: b for b in made if isinstance(b, Budget)}
    assert set(budgets) == {e.block for e in found}
    groups = {"base", "peft"}
    # squared slopes and noises of disjoint blocks add up to their group's
    for g in groups:
        parts = [b for name, b in budgets.items() if b.group == g and name not in groups]
        assert sum(b.grad_norm**2 for b in parts) == pytest.approx(budgets[g].grad_norm ** 2, rel=1e-5)
        assert sum(b.noise.value for b in parts if b.noise) == pytest.approx(budgets[g].noise.value, rel=1e-4)  # type: ignore[union-attr]
    cost = next(r for r in made if isinstance(r, Cost))
    assert cost.values == len(budgets) * 2 * 2 * 2
    assert all(f"`{name}`" in Report.of(made).markdown() for name in budgets)


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"laws": ("nonsense",)}, "no direction law 'nonsense'"),
        ({"laws": ()}, "no direction law was asked for"),
        ({"laws": ("gaussian:q=x",)}, "q=NUMBER"),
        ({"laws": ("gaussian:q=0",)}, "from 1 to 256"),
        ({"laws": ("magnitude-mask:keep=2",)}, "share in"),
        ({"mus": (0.0,)}, "positive, finite"),
        ({"mus": (math.nan,)}, "positive, finite"),
        ({"precision": 0.0}, "between 0.0001 and 1"),
        ({"directions": 1}, "at least 2"),
        ({"max_draws": 0}, "at least 1"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        Settings(**settings)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"laws": ("subzero:rank=5000",)}, "rank 5000 does not fit"),
        ({"laws": ("gaussian",), "mus": (1e-30,)}, "absorbed"),
        ({"laws": ("gaussian",), "mus": (1e38,)}, "not finite"),
    ],
)
def test_bad_input_is_refused_with_the_weights_intact(task: Task, settings: dict[str, Any], says: str) -> None:
    before = {n: p.detach().clone() for n, p in task.model.named_parameters()}
    with pytest.raises(UserError, match=says):
        list(run(task, Settings(precision=1.0, directions=2, **settings)))
    assert all(torch.equal(p, before[n]) for n, p in task.model.named_parameters())


def test_too_many_orthonormal_directions_and_a_gradient_of_zero(task: Task, root: Path) -> None:
    prompt = load_task(
        str(root / "gpt2-estimators"), str(root / "films.jsonl"), labels=["terrible", "great"], rows=4, peft="prompt", virtual_tokens=1
    )  # fmt: skip
    with pytest.raises(UserError, match="orthonormal directions do not exist in the 8 dimensions"):
        list(run(prompt, Settings(laws=("orthonormal:q=16",))))
    saved = {n: p.detach().clone() for n, p in task.model.named_parameters()}
    try:
        with torch.no_grad():
            for n, p in task.model.named_parameters():
                if "lora" in n:
                    p.zero_()
        found = list(run(task, Settings(laws=("gaussian",), precision=1.0, directions=2, mus=(1e-3,))))
    finally:
        with torch.no_grad():
            for n, p in task.model.named_parameters():
                p.copy_(saved[n])
    assert any(isinstance(r, Warning) and "gradient of peft is zero" in r.text for r in found)
    assert {r.block for r in found if isinstance(r, Estimator)} == {"base"}


def command(root: Path, out: Path, *more: str) -> list[str]:
    return [
        str(root / "gpt2-estimators"), "--data", str(root / "films.jsonl"), "--labels", "terrible,great", "--rows", "4", "--rank", "2",
        "--precision", "0.5", "--directions", "2", "--mus", "1e-3,1e-2", "--out", str(out), *more,
    ]  # fmt: skip


LAWS_GIVEN = ("--laws", "gaussian subzero:rank=2")


def test_command_line(root: Path, task: Task, tmp_path: Path) -> None:
    from probes.cli_estimators import app

    out = tmp_path / "run"
    result = CliRunner().invoke(app, command(root, out, *LAWS_GIVEN))
    assert result.exit_code == 0, result.output
    assert "subzero:rank=2" in result.output and "best mu" in result.output
    assert {p.name for p in out.iterdir()} == {"report.md", "report.json", "records.jsonl", "figures"}
    assert {p.name for p in (out / "figures").iterdir()} >= {"cosines.png", "subspace.png", "budget.png"}
    assert Report.load(out).markdown() == (out / "report.md").read_text()
    assert set(Report.load(out).frames()) >= {"estimators", "budgets"}


def test_what_control_c_keeps_is_said_and_resumed(
    root: Path, task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from probes import estimators
    from probes.cli_estimators import app

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert CliRunner().invoke(app, command(root, whole, *LAWS_GIVEN)).exit_code == 0

    def stop(*args: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    measured: list[str] = []
    source = estimators._source
    monkeypatch.setattr(budget, "measure", stop)
    stopped = CliRunner().invoke(app, command(root, cut, *LAWS_GIVEN))
    assert stopped.exit_code == 130
    said = " ".join(stopped.output.split())
    assert f"2 estimators and 0 error budgets are kept in {cut}; to go on:" in said and "--resume" in said
    monkeypatch.undo()
    monkeypatch.setattr(
        estimators, "_source", lambda s, x, group, *rest: measured.append(group.name) or source(s, x, group, *rest)
    )
    resumed = CliRunner().invoke(app, command(root, cut, *LAWS_GIVEN, "--resume"))
    assert resumed.exit_code == 0, resumed.output
    assert set(measured) == {"peft"}  # the base's rows were there

    def results(folder: Path) -> list[Record]:
        return [r for r in rundir.load(folder) if not isinstance(r, Header | Cost)]

    assert results(cut) == results(whole)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--laws", "nonsense"], "no direction law 'nonsense'"),
        (["--laws", "subzero:rank=5000"], "rank 5000 does not fit"),
        (["--laws", "orthonormal:q=257"], "from 1 to 256"),
        (["--mus", "0"], "positive, finite"),
        (["--mus", "x"], "not a number"),
        (["--laws", "gaussian", "--mus", "1e-30"], "is absorbed by the weights of base"),
        (["--laws", "gaussian", "--mus", "1e38"], r"for any mu .* is \w+ at w \+ mu u \(mu = 1e\+38, seed 0, step \d+\)"),
        (["--laws", "gaussian", "--blocks", "nothing-like-this"], "nothing-like-this"),
    ],
)  # fmt: skip
def test_bad_input_on_the_command_line_is_one_sentence(
    root: Path, task: Task, tmp_path: Path, more: list[str], says: str
) -> None:
    from probes.cli_estimators import app

    result = CliRunner().invoke(app, command(root, tmp_path / "bad", *more))
    assert result.exit_code == 2
    assert re.search(says, " ".join(result.output.split()))
    assert "Traceback" not in result.output
