"""Models that fully_shard cuts over two processes: the same directions, the same numbers up to rounding, parameters back bit for bit."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from hybridtheory import shards, streams
from hybridtheory.blocks import Block, partition
from hybridtheory.curvature import coupling
from hybridtheory.difference import Differences
from hybridtheory.errors import UserError
from hybridtheory.estimators.catalogue import parse
from hybridtheory.estimators.streams import Key
from hybridtheory.estimators.zo_gradient import evaluate, inner
from hybridtheory.extrapolation import spectrum, traces
from hybridtheory.optimizers import build
from hybridtheory.oracle import Oracle, microbatches
from hybridtheory.ranks import ALONE, Ranks, checksum
from hybridtheory.training import closure_of
from hybridtheory.vectors import dot, norm
from probes import probe_smoothness
from tests.processes import together
from tests.toys import NextToken, is_lora, language_model, tokens, with_lora

pytestmark = pytest.mark.slow


def model_of(ranks: Ranks, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A GPT-2 with LoRA of rank 1, whole or sharded: of its A the second process has no row at all."""
    model = with_lora(language_model("gpt2", dtype, 2, 6), 1).to(dtype)
    if ranks.size > 1:
        mesh = init_device_mesh("cpu", (ranks.size,))
        for layer in model.get_base_model().transformer.h:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model


def oracle_of(ranks: Ranks, engine: str = "difference") -> tuple[Oracle, list[Block]]:
    model = model_of(ranks)
    blocks = partition(model, peft=is_lora)
    batches = microbatches(tokens(6, 8, ragged=True), 2)
    return Oracle(model, NextToken(), batches, blocks, engine=engine), blocks


def arrays(tensors: Any) -> list[np.ndarray]:
    return [shards.whole(t.detach()).numpy().copy() for t in tensors]


def measured(ranks: Ranks) -> dict[str, Any]:
    oracle, (base, peft) = oracle_of(ranks)
    start = checksum([shards.local(p) for p in oracle.model.parameters()])
    found: dict[str, Any] = {"value": oracle.value(), "sizes": (base.numel, peft.numel)}
    gradient = oracle.gradient()
    found["gradient"] = [a for part in gradient for a in arrays(part)]
    found["norms"] = [norm(g) for g in gradient]
    u = streams.gaussian(base, 3, "u")
    found["direction"], found["dot"] = arrays(u), dot(u, gradient[0])
    with oracle.moved(base, u, 1e-2):
        found["moved"] = oracle.value()
    with oracle.products() as hess:
        assert isinstance(hess, Differences)
        ends = spectrum(hess, base, 0, tol=1e-6)
        found["ends"] = (ends.run.lam_max.value, ends.run.lam_min.value)
        found["trace"] = traces(hess, [base], 0, max_vectors=8, beside=ends)["base"].trace.value
        found["coupling"] = coupling(hess, [base], [peft], 0).value
        found["share"] = hess.form(u, base).value
    found["back"] = checksum([shards.local(p) for p in oracle.model.parameters()]) == start
    return found


def test_numbers_are_those_of_the_whole_model(tmp_path: Path) -> None:
    alone = measured(ALONE)
    for found in together(2, tmp_path / "run", measured):
        assert found["back"], "parameters are bit for bit what they were"
        assert found["sizes"] == alone["sizes"]
        for mine, theirs in zip(alone["direction"], found["direction"], strict=True):
            np.testing.assert_array_equal(theirs, mine)
        for mine, theirs in zip(alone["gradient"], found["gradient"], strict=True):
            np.testing.assert_allclose(theirs, mine, atol=1e-12)
        for name in ("value", "norms", "dot", "moved"):
            assert found[name] == pytest.approx(alone[name], rel=1e-10), name
        for name in ("ends", "trace", "coupling", "share"):
            assert found[name] == pytest.approx(alone[name], rel=1e-5), name


def trained(ranks: Ranks, method: str, law: str | None) -> dict[str, Any]:
    model = model_of(ranks)
    base, peft = partition(model, peft=is_lora)
    optimizer = build(method, model, base, peft, lr_base=1e-3, lr_peft=1e-2, seed=1, law=law and parse(law))
    closure = closure_of(model, NextToken(), microbatches(tokens(6, 8, ragged=True), 3))
    losses = [float(optimizer.step(closure)) for _ in range(4)]
    zo = evaluate(closure, optimizer.units[0].plan, optimizer.param_groups[0]["law"], Key(5))
    gradient = Oracle(model, NextToken(), [tokens()], [base], engine="difference").gradient(base)[0]
    return {
        "losses": losses,
        "slopes": [s for z in optimizer.measured for s in z.slopes],
        "weights": [shards.whole(p.detach()).numpy().copy() for p in optimizer.units[0].plan.block.tensors],
        "dense": norm(zo.dense()) if method == "mezo" else 0.0,
        "inner": inner(zo.law, Key(5), base, gradient),
    }


@pytest.mark.parametrize(
    ("method", "law"),
    [
        ("mezo", "gaussian"),
        ("hybrid", "rademacher"),
        ("mezo", "subzero:rank=2"),
        ("hybrid-adamw", "random-mask"),
        ("s-mezo", None),
    ],
)
def test_training_is_that_of_the_whole_model(method: str, law: str | None, tmp_path: Path) -> None:
    alone = trained(ALONE, method, law)
    one, two = together(2, tmp_path / "run", trained, method, law)
    assert one["losses"] == two["losses"] and one["slopes"] == two["slopes"]  # every process holds the same
    assert one["losses"] == pytest.approx(alone["losses"], rel=1e-12)
    for name in ("slopes", "dense", "inner"):
        assert one[name] == pytest.approx(alone[name], rel=1e-8), name
    for mine, theirs in zip(alone["weights"], one["weights"], strict=True):
        np.testing.assert_allclose(theirs, mine, atol=1e-11)


def refused(ranks: Ranks) -> list[str]:
    told = []
    oracle, _ = oracle_of(ranks, "exact")
    model = model_of(ranks)
    base, peft = partition(model, peft=is_lora)
    exact = build("mezo", model, base, peft, lr_base=1e-3, difference="exact")
    part = with_lora(language_model("gpt2", torch.float64, 2, 6))
    narrow = model_of(ranks, torch.bfloat16)
    rounded = Oracle(narrow, NextToken(), oracle.batches, partition(narrow, peft=is_lora), engine="difference")
    fully_shard(part.get_base_model().transformer.h[0], mesh=init_device_mesh("cpu", (ranks.size,)))
    for attempt in (
        lambda: oracle.gradient(),
        lambda: oracle.products().__enter__(),
        lambda: Oracle(oracle.model, NextToken(), oracle.batches, oracle.blocks, ranks=ranks),
        lambda: exact.step(closure_of(model, NextToken(), oracle.batches)),
        lambda: build("zo-adam", model, base, peft, lr_base=1e-3),
        lambda: partition(part),
        lambda: rounded.products().__enter__(),
    ):
        with pytest.raises(UserError) as error:
            attempt()
        told.append(str(error.value))
    return told


def test_what_a_sharded_model_cannot_have_is_refused(tmp_path: Path) -> None:
    wanted = [
        "choose --engine difference",
        "choose --engine difference",
        "leave ranks out",
        'use difference="central"',
        "Adam does not serve sharded models",
        "the others are not: call fully_shard on the whole model",
        "call fully_shard on a float32 model",
    ]
    for told in together(2, tmp_path / "run", refused):
        assert [w in t for w, t in zip(wanted, told, strict=True)] == [True] * len(wanted), told


def probed(ranks: Ranks, engine: str = "auto") -> dict[str, Any]:
    model = model_of(ranks)
    ids = tokens(6, 8)["x"]
    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}]
    before = checksum([shards.local(p) for p in model.parameters()])
    few = {"points": 2, "secants": 2, "run_steps": 2, "directions": 4, "max_steps": 12, "max_vectors": 8}
    report = probe_smoothness(model, batches, micro_batch=2, engine=engine, **few)
    assert checksum([shards.local(p) for p in model.parameters()]) == before
    points = [[p.loss, p.grad_norm, p.blocks["base"].lam_max.value] for p in report.points]
    traces = [[p.blocks["base"].trace.value, p.blocks["base"].trace.stderr] for p in report.points]
    how = {"engine": report.header.options["engine"], "sha256": report.header.model.sha256}
    return {"points": points, "traces": traces, **how}


def test_the_probe_measures_a_sharded_model(tmp_path: Path) -> None:
    exact, alone = probed(ALONE), probed(ALONE, "difference")
    one, two = together(2, tmp_path / "run", probed)
    assert one == two and (one["engine"], exact["engine"]) == ("difference", "exact")
    assert one["sha256"] == alone["sha256"]
    np.testing.assert_allclose(one["points"], alone["points"], rtol=1e-6)
    np.testing.assert_allclose(one["traces"], alone["traces"], rtol=1e-5)
    # At the second point the engines' runs are apart: the rates follow from traces that they sample with other vectors.
    np.testing.assert_allclose(one["points"][0], exact["points"][0], rtol=1e-3)
    (value, stderr), (other, its) = one["traces"][0], exact["traces"][0]
    assert abs(value - other) <= 3 * math.hypot(stderr, its)
