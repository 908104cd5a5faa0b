"""All engines on all architectures: what both can compute agrees within the error that is stated; what one cannot do, it refuses."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from nets import Tied
from tiny_models import CONFIGS, save
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from typer.testing import CliRunner

from hybridtheory import difference, extrapolation, forward, lanczos, streams
from hybridtheory.blocks import Block, partition
from hybridtheory.difference import Differences, widened
from hybridtheory.engines import choose
from hybridtheory.errors import UserError
from hybridtheory.oracle import MeanLoss, Oracle
from hybridtheory.preflight import preflight
from hybridtheory.vectors import clone, dot, norm, scale_
from probes import cli, probe_smoothness
from probes.records import Warning
from probes.tasks import Task, load_task

# ReLU: the Hessian almost everywhere and curvature at a scale are two numbers; Mixtral's routing jumps.
KINKED = ("opt", "t5", "mixtral")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "films.jsonl"
    texts = ["the film was a warm story", "it was dull", "great"]
    path.write_text("\n".join(json.dumps({"text": t, "label": i % 2}) for i, t in enumerate(texts)))
    return path


def load(name: str, folder: Path, data: Path, dtype: str = "float32", **changes: Any) -> Task:
    save(name, folder / name, **changes)
    return load_task(folder / name, data, rank=2, rows=2, labels=("terrible", "great"), dtype=dtype)


def engines(task: Task) -> tuple[list[Block], Callable[[str], Oracle]]:
    blocks = partition(task.model, "group", task.is_peft, task.base, task.peft_info)
    return blocks, lambda engine: Oracle(task.model, task.objective, task.batches(2), blocks, engine=engine)


def tied(dtype: torch.dtype = torch.float64) -> tuple[Tied, list[Block], Callable[[str], Oracle]]:
    torch.manual_seed(0)
    net, ids = Tied().to(dtype), torch.randint(0, 11, (6, 8))

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return nn.functional.cross_entropy(model(batch)[:, :-1].reshape(-1, 11).float(), batch[:, 1:].reshape(-1))

    def exact(model: nn.Module, batch: Tensor) -> Tensor:
        return nn.functional.cross_entropy(model(batch)[:, :-1].reshape(-1, 11), batch[:, 1:].reshape(-1))

    blocks = partition(net, peft=lambda name: "lora" in name)
    objective = MeanLoss(exact if dtype == torch.float64 else loss)
    return net, blocks, lambda engine: Oracle(net, objective, [ids[:4], ids[4:]], blocks, engine=engine)


@pytest.mark.parametrize("name", CONFIGS)
def test_engines_agree(name: str, tmp_path: Path, data: Path) -> None:
    """v'Hv along the gradient of the base by all three engines, in float32: 1e-3 of what both ends of v leave, within the interval."""
    task = load(name, tmp_path, data)
    (base, _), oracle = engines(task)
    (v,) = oracle("exact").gradient(base)
    scale_(v, 1 / norm(v))
    with oracle("exact").products(base) as hess:
        exact = dot(v, hess(v))
    before = clone(base.tensors)
    with oracle("difference").products(base) as hess:
        assert isinstance(hess, Differences)
        form = hess.form(v, base)
    values = forward.along(oracle("forward"), base, v)
    assert all(torch.equal(a, b) for a, b in zip(before, base.tensors, strict=True))
    assert math.isfinite(form.value)
    assert math.isfinite(values.value)
    if name in KINKED:
        return
    # Two half-widths: 1 in 20 intervals is allowed to miss; with four degrees of freedom 1 in 200 misses by twice its width.
    assert abs(form.value - exact) <= max(2 * form.halfwidth, 1e-5 * abs(exact))
    assert form.value == pytest.approx(exact, rel=1e-3)
    assert values.numerical is not None
    assert abs(values.value - exact) <= max(2 * values.numerical, 1e-3 * abs(exact))


def test_ends_and_trace_are_the_exact_ones() -> None:
    """float64: the same Ritz values and the same trace as double backward, to 1e-7, inside stated half-widths below that."""
    _, (base, _), oracle = tied()
    with oracle("exact").products(base) as hess:
        wanted = lanczos.spectrum(hess, base, 0, max_steps=60, tol=1e-9)
        from hybridtheory.traces import traces

        trace = traces(hess, [base], 0, max_vectors=12)[base.name].trace
    with oracle("difference").products(base) as hess:
        assert isinstance(hess, Differences)
        found = extrapolation.spectrum(hess, base, 0, max_steps=60, tol=1e-9)
        plain = extrapolation.traces(hess, [base], 0, max_vectors=12)[base.name].trace
    for mine, exact in ((found.run.lam_max, wanted.lam_max), (found.run.lam_min, wanted.lam_min), (plain, trace)):
        assert mine.numerical is not None
        assert mine.value == pytest.approx(exact.value, rel=1e-7)
        assert mine.numerical <= 1e-6 * abs(exact.value)


def test_ritz_vectors_without_a_kept_basis() -> None:
    _, (base, _), oracle = tied()
    with oracle("difference").products(base) as hess:
        assert isinstance(hess, Differences)
        kept = extrapolation.spectrum(hess, base, 0, max_steps=12, basis=True)
        again = extrapolation.spectrum(hess, base, 0, max_steps=12, basis=False)
    assert again.run.basis is None
    assert again.run.lam_max.value == pytest.approx(kept.run.lam_max.value, rel=1e-4)
    assert again.run.lam_min.value == pytest.approx(kept.run.lam_min.value, rel=1e-4)


def test_level_corrects_what_the_cheap_form_leaves_out() -> None:
    """Quotients a + b h² + c h⁴ without rounding: fits give a, the cheap form a - 4c; the rest of the mean is moved by that."""
    h = difference.MULTIPLES
    pilots = 2.0 + 1e-3 * h**2 + 1e-4 * h**4 + np_zeros(8)[:, None]
    correction, width = difference.level(pilots, 8)
    assert correction == 0.0
    assert width < 1e-5
    correction, width = difference.level(pilots, 32)
    assert correction == pytest.approx(0.75 * 4 * 1e-4)
    assert width < 1e-5


def np_zeros(n: int) -> Any:
    import numpy as np

    return np.zeros(n)


def test_a_fit_covers_rounding() -> None:
    """The 95 % interval of a fit on quotients with normal rounding: between 92 and 98 % over 2,000 draws."""
    import numpy as np

    draw = np.random.default_rng(0)
    h = difference.MULTIPLES
    covered = 0
    for _ in range(2000):
        noise = draw.normal(size=len(h)) * 1e-3 / h
        covered += abs(difference.fit(1e-3, (1 + 1e-4 * h**2 + noise)[:, None]).value - 1) <= (
            difference.fit(1e-3, (1 + 1e-4 * h**2 + noise)[:, None]).halfwidth
        )
    assert 0.92 <= covered / 2000 <= 0.98


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_sixteen_bits(name: str, tmp_path: Path, data: Path) -> None:
    """bfloat16 weights: lambda_max within 5e-2 of double backward at the same weights in float32; the weights are as found, bit for bit."""
    task = load(name, tmp_path, data, "bfloat16")
    (base, _), oracle = engines(task)
    before = clone(base.tensors)
    with oracle("difference").products(base) as hess:
        assert isinstance(hess, Differences)
        assert base.tensors[0].dtype == torch.float32
        found = extrapolation.spectrum(hess, base, 0, max_steps=8).run.lam_max
    assert all(a.dtype == torch.bfloat16 and torch.equal(a, b) for a, b in zip(before, base.tensors, strict=True))
    with widened(task.model), oracle("exact").products(base) as hess:
        exact = lanczos.spectrum(hess, base, 0, max_steps=8).lam_max
    assert found.value == pytest.approx(exact.value, rel=5e-2)


def test_kinks_are_named(tmp_path: Path, data: Path) -> None:
    task = load("opt", tmp_path, data)
    _, oracle = engines(task)
    assert preflight(oracle("difference")).verdict == "kinked"
    smooth = load("gpt2", tmp_path, data)
    _, oracle = engines(smooth)
    assert preflight(oracle("difference")).verdict == "ok"


def test_exact_works_with_activation_checkpointing(tmp_path: Path, data: Path) -> None:
    """Products of a checkpointed Llama (use_reentrant=False) are those of the plain one."""
    task = load("llama", tmp_path, data, attention_dropout=0.0)
    task.model.train()  # transformers checkpoints in training mode only
    for m in task.model.modules():
        if isinstance(m, nn.Dropout):
            m.p = 0.0
    (base, _), oracle = engines(task)
    z = streams.rademacher(base, 0, "test")
    with oracle("exact").products(base) as hess:
        plain = hess(z)
    task.model.get_base_model().activation_checkpointing_enable({"use_reentrant": False})
    calls = []
    layer = next(m for m in task.model.modules() if type(m).__name__ == "LlamaDecoderLayer")
    layer.mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    with oracle("exact").products(base) as hess:
        checkpointed, again = hess(z), hess(z)
    assert len(calls) > 1, "the layer was not computed again: nothing was checkpointed"
    for found in (checkpointed, again):
        assert dot(found, plain) == pytest.approx(dot(plain, plain), rel=1e-5)


class Fused(nn.Module):
    """Attention by the fused kernel and nothing else: it has a first derivative and no second."""

    def __init__(self, reentrant: bool = False) -> None:
        super().__init__()
        self.embed, self.mix, self.head = nn.Embedding(7, 8), nn.Linear(8, 24), nn.Linear(8, 7)
        self.reentrant = reentrant

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = (t.unsqueeze(1) for t in self.mix(x).chunk(3, -1))
        if self.reentrant:
            return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).squeeze(1)
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).squeeze(1)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        return self.head(checkpoint(self.attend, x, use_reentrant=True) if self.reentrant else self.attend(x))


@pytest.mark.parametrize("reentrant", [False, True])
def test_auto_takes_differences_where_there_is_no_second_derivative(reentrant: bool) -> None:
    torch.manual_seed(0)
    net, ids = Fused(reentrant), torch.randint(0, 7, (4, 6))
    loss = MeanLoss(lambda m, x: nn.functional.cross_entropy(m(x)[:, :-1].reshape(-1, 7), x[:, 1:].reshape(-1)))
    (block,) = partition(net)

    def oracle(engine: str) -> Oracle:
        return Oracle(net, loss, [ids], [block], engine=engine)

    engine = choose(oracle("exact"))
    assert engine.name == "difference"
    assert engine.reason.startswith("double backward: fails (")
    (g,) = oracle("difference").gradient(block)
    with oracle("difference").products(block) as hess:
        assert isinstance(hess, Differences)
        found = hess.form(g, block)
    plain = Fused()
    plain.load_state_dict(net.state_dict())
    plain.attend = lambda x: nn.functional.scaled_dot_product_attention(  # type: ignore[method-assign]
        *(t.unsqueeze(1) for t in plain.mix(x).chunk(3, -1)), is_causal=True
    ).squeeze(1)
    (same,) = partition(plain)
    with Oracle(plain, loss, [ids], [same]).products(same) as hess:
        exact = dot(g, hess(g))
    assert found.value == pytest.approx(exact, rel=1e-3)


def test_auto_takes_exact_where_it_can_and_less_where_memory_ends() -> None:
    net, blocks, oracle = tied()
    assert choose(oracle("exact")).name == "exact"
    small = Oracle(net, oracle("exact").objective, oracle("exact").batches, blocks, memory_limit=1)
    engine = choose(small)
    assert engine.name == "forward"
    assert "out of memory under --max-memory" in engine.reason


def test_engines_refuse_what_they_cannot() -> None:
    net, blocks, oracle = tied()
    with pytest.raises(UserError, match="an oracle's engine is one of exact, difference, forward"):
        oracle("fast")
    with pytest.raises(UserError, match="--engine forward takes none"):
        oracle("forward").gradient()
    with pytest.raises(UserError, match="--engine forward takes none"), oracle("forward").products():
        pass
    with pytest.raises(UserError, match="--curvature ggn needs second derivatives"):
        Oracle(net, oracle("exact").objective, oracle("exact").batches, blocks, "ggn", engine="difference")


def test_forward_trace_on_the_same_vectors() -> None:
    """float64: the mean of z'Hz over the vectors of Hutchinson's trace, by values, to a hundredth and within its interval."""
    _, (base, _), oracle = tied()
    found, forms = forward.trace(oracle("forward"), base, 0, 12)
    with oracle("exact").products(base) as hess:
        exact = [dot(z, hess(z)) for z in (streams.rademacher(base, 0, "trace", 0, k) for k in range(12))]
    assert forms.shape == (12, 2)
    assert found.numerical is not None
    assert found.numerical <= 1e-2 * abs(found.value)
    assert abs(found.value - sum(exact) / 12) <= 2 * found.numerical


def test_slopes_give_the_gradient_norm() -> None:
    """E (g'u)² = ‖g‖² for Gaussian u: within five standard errors of 400 directions."""
    _, (base, _), oracle = tied()
    (g,) = oracle("exact").gradient(base)
    found = forward.slopes(oracle("forward"), base, 0, 1e-5, 400)
    assert abs(found.g_sq - dot(g, g)) <= 5 * found.stderr


@pytest.mark.parametrize("engine", ["difference", "forward"])
def test_probe_runs_end_to_end(engine: str) -> None:
    torch.manual_seed(0)
    net, ids = Tied(), torch.randint(0, 11, (8, 8))
    before = clone(list(net.parameters()))

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return nn.functional.cross_entropy(model(batch)[:, :-1].reshape(-1, 11), batch[:, 1:].reshape(-1))

    report = probe_smoothness(
        net, [ids], loss, engine=engine, points=2, secants=3, run_steps=3, directions=4, max_vectors=16
    )
    assert report.finished
    assert report.header.options["engine"] == engine
    assert report.header.options["engine_reason"] == "asked for"
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
    base = report.points[0].blocks["base"]
    assert base.trace is not None
    assert base.trace.numerical is not None
    rate = report.rate("finite_scale", "base")
    assert rate is not None
    assert rate.value is not None
    if engine == "forward":
        assert base.lam_max is None
        assert not report.secants
        assert any("takes no gradient" in w.text for w in report.all(Warning))
        assert report.recommendation is not None
        assert report.recommendation.peft is None or report.recommendation.peft.value is None
    else:
        assert base.lam_max is not None
        assert base.lam_max.numerical is not None
        assert base.lam_max.numerical <= 1e-3 * base.lam_max.value
    assert report.markdown()


def test_command_line_names_the_engines() -> None:
    result = CliRunner().invoke(cli.app, ["--engine", "fast", "--dry-run"])
    assert result.exit_code == 2
    assert "--engine is one of auto, exact, difference, forward" in " ".join(result.output.split())
