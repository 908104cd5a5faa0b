"""CUDA against the CPU on the embedded model: the same numbers where the arithmetic is the same, the same laws where the draws are not.

`make gpu-check` runs these, and the contract tables with every tensor on the device; without a GPU they are skipped.
"""

from __future__ import annotations

import copy
import math
from functools import cache

import pytest
import torch
from scipy import stats
from torch import Tensor

from hybridtheory.blocks import partition
from hybridtheory.estimators import LAWS, Gaussian, Kept, Key, Perturbation, Rademacher, evaluate, parse
from hybridtheory.estimators.streams import CHUNK, coins, normal, normal_chunk, signs
from hybridtheory.oracle import Oracle
from hybridtheory.training import closure_of
from hybridtheory.vectors import dot
from probes.point import Settings
from probes.records import Point
from probes.smoothness import run
from probes.tasks import Task, load_task
from probes.train import run as train
from probes.train_settings import TrainSettings

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda", 0)
FLOATS = ("float32", "bfloat16", "float16")
TRAINED = ("hybrid", "mezo", "subzero", "lozo", "bilevel", "peft-adamw", "zo-adam", "hizoo", "hybrid-subzero")
# Floating-point sums in another order: fp32 losses and gradients of this model, relative.
ROUNDING = 1e-5


@pytest.fixture(autouse=True)
def needs_cuda() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device on this machine")


def task(device: str, dtype: str = "float32", rows: int = 8) -> Task:
    return load_task(rows=rows, device=device, dtype=dtype)


@cache
def oracle(device: str, dtype: str) -> tuple[Oracle, list]:
    t = task(device, dtype)
    blocks = partition(t.model, peft=t.is_peft)
    return Oracle(t.model, t.objective, t.batches(4), blocks), blocks


def relative(a: list[Tensor], b: list[Tensor]) -> float:
    a, b = [t.double().cpu() for t in a], [t.double().cpu() for t in b]
    gap = [x - y for x, y in zip(a, b, strict=True)]
    return math.sqrt(dot(gap, gap) / dot(b, b))


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("float64", 1e-6)])
def test_values_gradients_and_products_are_the_cpus(dtype: str, tolerance: float) -> None:
    """Llama's norms and rotary embedding compute in float32 also in a float64 model: hence 1e-6."""
    (cpu, blocks), (gpu, others) = oracle("cpu", dtype), oracle("cuda", dtype)
    assert gpu.value() == pytest.approx(cpu.value(), rel=ROUNDING)
    for mine, theirs in zip(cpu.gradient(), gpu.gradient(), strict=True):
        assert relative(theirs, mine) < tolerance
    v = [signs(Key(1), n, p) for b in blocks for n, p in b.parameters.items()]
    with cpu.products() as here, gpu.products() as there:
        mine, theirs = here(v, blocks, blocks), there([t.to(CUDA) for t in v], others, others)
    assert relative(list(theirs), list(mine)) < 10 * tolerance


def test_streams_have_the_cpus_law_and_leave_the_devices_generator_alone() -> None:
    like = torch.empty(3 * CHUNK + 17, device=CUDA)
    before = torch.cuda.get_rng_state(CUDA)
    key = Key(5, 2, 1)
    z = normal(key, "w", like.shape, like)
    assert torch.equal(z, normal(key, "w", like.shape, like))
    parts = [normal_chunk(key, "w", like, i) for i in range(4)]
    assert torch.equal(torch.cat(parts), z)
    assert torch.equal(signs(key, "w", like).cpu(), signs(key, "w", like.cpu()))
    assert torch.equal(coins(key, "w", like, 0.25).cpu(), coins(key, "w", like.cpu(), 0.25))
    assert stats.kstest(z.cpu().numpy(), "norm").pvalue > 1e-4
    others = [normal(k, n, like.shape, like) for k, n in ((Key(5, 2, 2), "w"), (Key(6, 2, 1), "w"), (key, "v"))]
    n = like.numel()
    for other in others:
        assert abs(float(dot([z], [other]))) < 5 * math.sqrt(n)
    assert torch.equal(before, torch.cuda.get_rng_state(CUDA))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", [n for n in LAWS if n not in ("hizoo",)])
def test_weights_come_back_and_slopes_are_those_of_the_direction(name: str, dtype: str) -> None:
    t = task("cuda", dtype)
    blocks = partition(t.model, peft=t.is_peft)
    plan = Perturbation(t.model, [b for b in blocks if b.group == "base"])
    closure = closure_of(t.model, t.objective, t.batches(4))
    before = {n: p.detach().clone() for n, p in t.model.named_parameters()}
    law, mu = parse(name), 1e-3 if dtype == "float32" else 2e-2
    found = evaluate(closure, plan, law, [Key(3, 1, i) for i in range(2)], mu=mu)
    assert all(torch.equal(p, before[n]) for n, p in t.model.named_parameters())
    assert all(math.isfinite(s) for s in found.slopes)
    assert evaluate(closure, plan, law, [Key(3, 1, i) for i in range(2)], mu=mu).slopes == found.slopes
    if dtype == "float32":  # the slope is that of the direction that an update adds
        gradient = Oracle(t.model, t.objective, t.batches(4), [plan.block]).gradient()[0]
        one = evaluate(closure, plan, law, Key(3, 1), mu=mu)
        update = one.dense()
        scale = math.sqrt(dot(gradient, gradient) * dot(update, update))
        assert dot(gradient, update) == pytest.approx(one.slopes[0] ** 2, rel=0.05, abs=1e-4 * scale)


def records(device: str, method: str) -> list:
    t = load_task(rows=16, device=device)
    out: list = []
    more = {"law": "rademacher"} if method in ("hybrid", "mezo") else {}
    wanted = TrainSettings(method=method, lr_base=1e-5, lr_peft=1e-2 if "sgd" in method or method == "hybrid" else 1e-4, steps=12, batch=4,
                           eval_every=0, eval_rows=8, final_rows=8, **more)  # fmt: skip
    train(t, wanted, out.append)
    return [r for r in out if hasattr(r, "loss") and hasattr(r, "step")]


@pytest.mark.parametrize("method", TRAINED)
def test_training_repeats_bit_for_bit_and_follows_the_cpu(method: str) -> None:
    first, again = records("cuda", method), records("cuda", method)
    assert [r.loss for r in first] == [r.loss for r in again]
    here = records("cpu", method)
    assert first[0].loss == pytest.approx(here[0].loss, rel=ROUNDING)
    if method in ("hybrid", "mezo", "peft-adamw"):  # the same directions: signs are the same bits on every device
        assert [r.loss for r in first] == pytest.approx([r.loss for r in here], rel=1e-3)


def test_the_probe_measures_what_it_measures_on_the_cpu() -> None:
    settings = Settings(points=1, secants=4, run_steps=6, directions=4, max_vectors=16)
    points = {}
    for device in ("cpu", "cuda"):
        points[device] = next(r for r in run(task(device), copy.copy(settings)) if isinstance(r, Point))
    for name, mine in points["cpu"].blocks.items():
        theirs = points["cuda"].blocks[name]
        assert theirs.lambda_max.value == pytest.approx(mine.lambda_max.value, rel=1e-2)
        assert theirs.gradient_norm == pytest.approx(mine.gradient_norm, rel=1e-4)


def test_kept_directions_are_those_drawn_again() -> None:
    t = task("cuda")
    blocks = partition(t.model, peft=t.is_peft)
    closure = closure_of(t.model, t.objective, t.batches(4))
    plan, key = Perturbation(t.model, blocks), Key(3, 1)
    with torch.no_grad():
        for law in (Gaussian(), Rademacher()):
            assert float(plan.value(closure, law, key, 1e-3)) == float(plan.value(closure, Kept(law), key, 1e-3))
