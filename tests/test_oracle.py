"""Values, gradients and products against dense references; weighting, pruning, memory and side effects."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hybridtheory import memory
from hybridtheory.blocks import Block, partition
from hybridtheory.errors import UserError
from hybridtheory.oracle import MeanLoss, Oracle, Products, microbatches
from hybridtheory.vectors import dot
from tests.toys import Classify, NextToken, is_lora, language_model, language_oracle, tokens, with_lora

ROOT = Path(__file__).parent.parent


def dense(hess: Products, inp: list[Block], out: list[Block]) -> Tensor:
    """H[out, inp] column by column."""
    columns = []
    v = [torch.zeros_like(t) for b in inp for t in b.tensors]
    for t in v:
        for i in range(t.numel()):
            t.view(-1)[i] = 1.0
            columns.append(torch.cat([h.reshape(-1) for h in hess(v, inp, out)]))
            t.view(-1)[i] = 0.0
    return torch.stack(columns, dim=1)


@pytest.mark.parametrize(("kind", "tolerance"), [("gpt2", 1e-10), ("opt", 1e-10), ("bert", 1e-10), ("llama", 1e-6)])
def test_products_are_the_dense_hessian(kind: str, tolerance: float) -> None:
    """Against torch.autograd.functional.hessian in float64 (Llama's rotary embedding and norms compute in float32)."""
    model = language_model(kind)
    block = next(b for b in partition(model, "module") if b.name == "base.layer.00.norm")
    objective: Any = Classify() if kind == "bert" else NextToken()
    batch = tokens()
    oracle = Oracle(model, objective, microbatches(batch, 2), [block])
    sizes = [t.shape for t in block.tensors]

    def f(flat: Tensor) -> Tensor:
        parts = [p.view(s) for p, s in zip(flat.split([s.numel() for s in sizes]), sizes, strict=True)]
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            z = torch.func.functional_call(
                _Forward(model, objective), {f"model.{n}": p for n, p in zip(block.names, parts, strict=True)}, batch
            )
        return objective.loss(z, batch) / objective.weight(batch)

    here = torch.cat([t.detach().reshape(-1) for t in block.tensors])
    reference = torch.autograd.functional.hessian(f, here)
    with oracle.products() as hess:
        found = dense(hess, [block], [block])
    assert (found - reference).abs().max() <= tolerance * reference.abs().max()


class _Forward(nn.Module):
    def __init__(self, model: nn.Module, objective: Any) -> None:
        super().__init__()
        self.model, self.objective = model, objective

    def forward(self, batch: Any) -> Tensor:
        return self.objective.forward(self.model, batch)


@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
def test_micro_batches_change_nothing(curvature: str) -> None:
    """Rows of different lengths, cut 5, 4 + 1, 2 + 2 + 1: weighted by tokens, never averaged by batch."""
    numbers = []
    for rows in (5, 4, 2):
        oracle, blocks = language_oracle(rows=rows, ragged=True, curvature=curvature)
        v = [torch.sin(torch.arange(t.numel(), dtype=t.dtype)).view_as(t) for b in blocks for t in b.tensors]
        with oracle.products() as hess:
            hv = hess(v)
        gradient = [t for g in oracle.gradient() for t in g]
        numbers.append([oracle.value(), dot(gradient, v), dot(hv, v), dot(hv, hv)])
    for other in numbers[1:]:
        assert other == pytest.approx(numbers[0], rel=1e-12)


def test_pruned_products_are_parts_of_the_whole() -> None:
    oracle, (base, peft) = language_oracle()
    v = [torch.randn_like(t) for t in peft.tensors]
    padded = [torch.zeros_like(t) for t in base.tensors] + v
    with oracle.products() as hess:
        whole = hess(padded)
        own, cross = hess(v, peft), hess(v, peft, base)
    for a, b in zip([*cross, *own], whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_gauss_newton_of_a_linear_model_is_its_hessian_and_is_psd() -> None:
    model = nn.Linear(3, 4, dtype=torch.float64)
    x = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    class Logistic:
        def forward(self, m: nn.Module, batch: Any) -> Tensor:
            return m(batch)

        def loss(self, z: Tensor, batch: Any) -> Tensor:
            return nn.functional.cross_entropy(z, torch.arange(len(batch)) % 4, reduction="sum")

        def weight(self, batch: Any) -> float:
            return float(len(batch))

    blocks = partition(model)
    found = {}
    for curvature in ("hessian", "ggn"):
        with Oracle(model, Logistic(), [x[:4], x[4:]], blocks, curvature).products() as hess:
            found[curvature] = dense(hess, blocks, blocks)
    torch.testing.assert_close(found["ggn"], found["hessian"], rtol=0, atol=1e-15)
    assert torch.linalg.eigvalsh(found["ggn"]).min() > -1e-15


def test_graphs_are_rebuilt_when_memory_is_short_and_numbers_stay() -> None:
    kept, _ = language_oracle(rows=1)
    rebuilt, _ = language_oracle(rows=1, memory_limit=1)
    results = []
    for oracle in (kept, rebuilt):
        v = [torch.ones_like(t) for t in oracle.blocks[1].tensors]
        with oracle.products() as hess:
            results.append([hess(v, oracle.blocks[1]), hess(v, oracle.blocks[1])])
    assert kept.calls["graph"] == 5 and rebuilt.calls["graph"] == 10
    for a, b in zip(results[0][1], results[1][1], strict=True):
        assert torch.equal(a, b)


def test_as_many_graphs_are_kept_as_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Room for two of five: each later product rebuilds the other three."""
    oracle, _ = language_oracle(rows=1)
    room = iter([1 << 40, 1 << 40])
    monkeypatch.setattr(memory, "free", lambda *_: next(room, 0))
    v = [torch.ones_like(t) for t in oracle.blocks[1].tensors]
    with oracle.products() as hess:
        first = hess(v, oracle.blocks[1])
        again = hess(v, oracle.blocks[1])
    assert oracle.calls["graph"] == 5 + 3
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
def test_a_graph_that_is_not_kept_is_given_up_on_the_way_back(monkeypatch: pytest.MonkeyPatch, curvature: str) -> None:
    """Its last vector frees it piece by piece; vectors before the last one find it whole."""
    oracle, blocks = language_oracle(rows=1)
    oracle = Oracle(oracle.model, NextToken(), oracle.batches, blocks, curvature=curvature, memory_limit=1)
    made = []
    build = Products._product
    monkeypatch.setattr(Products, "_product", lambda self, i: made.append(build(self, i)) or made[-1])
    vectors = [[torch.randn_like(t) for t in blocks[1].tensors] for _ in range(2)]
    with oracle.products() as hess:
        together = hess.many(vectors, blocks[1])
        alone = [hess(v, blocks[1]) for v in vectors]
    assert len(made) == 3 * len(oracle.batches)
    for a, b in zip(together, alone, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    slots = [hess._slot[id(t)] for t in blocks[1].tensors]
    for product in made:
        with pytest.raises(RuntimeError, match="second time"):
            product(vectors[0], slots, blocks[1].tensors, False)


class _Short(NextToken):
    """Memory for ``rows`` rows at a time."""

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def forward(self, model: nn.Module, batch: Any) -> Tensor:
        if len(batch["x"]) > self.rows:
            raise torch.OutOfMemoryError("out of memory")
        return super().forward(model, batch)


def test_out_of_memory_halves_the_micro_batch_and_keeps_the_number() -> None:
    oracle, blocks = language_oracle(ragged=True)
    short = Oracle(oracle.model, _Short(2), oracle.batches, blocks)
    v = [torch.ones_like(t) for t in blocks[1].tensors]
    with oracle.products() as a, short.products() as b:
        torch.testing.assert_close(b(v, blocks[1]), a(v, blocks[1]), rtol=1e-12, atol=1e-15)
    assert len(short.batches) == 3 and short.calls["halved"] == 2  # 5 -> 3 + 2 -> 2 + 1 + 2
    assert short.value() == pytest.approx(oracle.value(), rel=1e-12)
    fresh = Oracle(oracle.model, _Short(2), oracle.batches, blocks)
    assert fresh.value() == pytest.approx(oracle.value(), rel=1e-12)
    with pytest.raises(UserError, match="single row"):
        Oracle(oracle.model, _Short(0), oracle.batches, blocks).gradient()


def test_moved_restores_bit_for_bit() -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        oracle, (base, _) = language_oracle(dtype=dtype)
        before = [t.detach().clone() for t in base.tensors]
        u = [torch.randn_like(t) for t in base.tensors]
        f = oracle.value()
        with oracle.moved(base, u, 0.1):
            assert oracle.value() != f
        assert all(torch.equal(a, b) for a, b in zip(before, base.tensors, strict=True))
        assert oracle.value() == f


def test_nothing_is_left_behind() -> None:
    """requires_grad flags, gradients and the global random state are as found."""
    model = with_lora(language_model())
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    state = torch.random.get_rng_state()
    oracle = Oracle(model, NextToken(), [tokens()], partition(model, "group", is_lora))
    oracle.gradient()
    with oracle.products() as hess:
        hess([torch.ones_like(t) for b in oracle.blocks for t in b.tensors])
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(state, torch.random.get_rng_state())


def test_calls_are_counted() -> None:
    oracle, (_, peft) = language_oracle(rows=2)
    oracle.value()
    oracle.gradient()
    with oracle.products() as hess:
        hess.many([[torch.ones_like(t) for t in peft.tensors]] * 3, peft)
    assert (oracle.calls["value"], oracle.calls["gradient"], oracle.calls["product"], oracle.calls["graph"]) == (
        1,
        1,
        3,
        3,
    )


def test_plain_mean_loss_is_weighted_by_rows() -> None:
    model = nn.Linear(2, 1, dtype=torch.float64)
    x = torch.arange(10, dtype=torch.float64).view(5, 2)
    loss = MeanLoss(lambda m, b: m(b).square().mean())
    whole = Oracle(model, loss, [x], partition(model)).value()
    assert Oracle(model, loss, microbatches(x, 4), partition(model)).value() == pytest.approx(whole, rel=1e-14)


def test_bad_input() -> None:
    model = nn.Linear(2, 1)
    loss = MeanLoss(lambda m, b: m(b).mean())
    with pytest.raises(UserError, match="empty"):
        Oracle(model, loss, [], partition(model))
    with pytest.raises(UserError, match="hessian"):
        Oracle(model, loss, [torch.ones(1, 2)], partition(model), curvature="fisher")
    with pytest.raises(UserError, match="masked"):
        Oracle(model, loss, [torch.ones(0, 2)], partition(model))


REALLY_SHORT = """
import resource, psutil, torch
from tests.toys import NextToken, is_lora, language_model, with_lora
from hybridtheory.blocks import partition
from hybridtheory.oracle import Oracle

torch.set_num_threads(1)
model = with_lora(language_model(width=32))
blocks = partition(model, "group", is_lora)
x = torch.randint(0, 11, (4000, 8), generator=torch.Generator().manual_seed(0))
v = [torch.ones_like(t) for t in blocks[0].tensors]
found = []
for limited in (False, True):
    oracle = Oracle(model, NextToken(), [{"x": x}], blocks)
    if limited:
        held = psutil.Process().memory_info().vms
        resource.setrlimit(resource.RLIMIT_AS, (held + (64 << 20), resource.RLIM_INFINITY))
    with oracle.products() as hess:
        found.append(hess(v, blocks[0]))
assert oracle.calls["halved"] >= 1, oracle.calls
for a, b in zip(*found):
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
print("halved", oracle.calls["halved"], [len(b["x"]) for b in oracle.batches])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="address space is limited by setrlimit")
def test_a_process_that_really_runs_out_of_memory_gets_the_same_product() -> None:
    done = subprocess.run([sys.executable, "-c", REALLY_SHORT], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith("halved")


def test_parts_of_the_loss_sum_to_it_and_count_as_one_evaluation() -> None:
    oracle, _ = language_oracle(rows=2)
    before = oracle.calls["value"]
    parts = oracle.parts()
    assert len(parts) == len(oracle.batches) > 1 and oracle.calls["value"] == before + 1
    assert sum(parts) == pytest.approx(oracle.value(), rel=1e-14)
    assert parts[-1] == pytest.approx(
        oracle.value([len(parts) - 1]) * oracle.weights[-1] / oracle.total_weight, rel=1e-14
    )


@pytest.mark.parametrize("words", ["DefaultCPUAllocator: can't allocate memory", "could not create a primitive"])
def test_running_out_of_memory_is_known_by_its_words(words: str) -> None:
    from hybridtheory import memory

    assert memory.exhausted(RuntimeError(words)) and not memory.exhausted(ValueError(words))
    assert memory.exhausted(MemoryError()) and not memory.exhausted(RuntimeError("shapes cannot be multiplied"))
