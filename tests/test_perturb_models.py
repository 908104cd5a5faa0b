"""Perturbation on real architectures with real adapters: the value is that of a model whose weights were all replaced, bit for bit.

Which weights a module reads from elsewhere (fused experts, ia3 vectors, prompts, shared layers) differs from one architecture to the
next; nothing here names any of them.
"""

from __future__ import annotations

import json

import pytest
import torch
from tiny_models import CONFIGS, save

from hybridtheory.blocks import partition
from hybridtheory.errors import UserError
from hybridtheory.estimators import LOZO, Gaussian, Key, Perturbation, evaluate, inner
from hybridtheory.optimizers import Hybrid
from hybridtheory.training import closure_of
from hybridtheory.vectors import dot
from probes.tasks import load_task

ADAPTERS = ("lora", "ia3", "prompt", "prefix")
# every architecture, the adapters in turn; albert and distilbert take no prefix
CASES = [(name, ADAPTERS[i % 4]) for i, name in enumerate(CONFIGS)]
CASES = [(n, "lora" if n in ("albert", "distilbert") else a) for n, a in CASES] + [("opt", a) for a in ADAPTERS]


@pytest.mark.parametrize(("name", "adapter"), sorted(set(CASES)))
def test_a_perturbed_value_is_that_of_replaced_weights(name, adapter, tmp_path):
    data = tmp_path / "films.jsonl"
    texts = ["the film was a warm story", "it was dull", "a terrible plot", "great"]
    data.write_text("\n".join(json.dumps({"text": t, "label": i % 2}) for i, t in enumerate(texts)))
    task = load_task(str(save(name, tmp_path / name)), str(data), peft=adapter)
    model, blocks = task.model, partition(task.model, peft=task.is_peft)
    closure = closure_of(model, task.objective, task.batches(2))
    plan, key = Perturbation(model, blocks), Key(3, 1)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with torch.no_grad():
        for law in (Gaussian(), LOZO(rank=1, reshape=False)):
            first = float(plan.value(closure, law, key, 1e-2))
            again = float(plan.value(closure, law, key, 1e-2))  # shared copies only from here on
            data_before = [p.data for p in plan.block.tensors]
            for n, p in plan.block.parameters.items():
                p.data = law.shift(key, n, p.data, 1e-2)
            whole = float(closure())
            for p, w in zip(plan.block.tensors, data_before):
                p.data = w
            # low-rank factors may be applied to a layer's input, which rounds differently
            assert [first, again] == (
                [whole] * 2 if isinstance(law, Gaussian) else pytest.approx([whole] * 2, rel=1e-5)
            )
            assert first != float(closure())
    groups = [{"block": b, "kind": "zo" if b.group == "base" else "fo", "lr": 0.0} for b in blocks]
    optimizer = Hybrid(groups, model)
    optimizer.step(closure)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert all(p is q for p, q in zip(model.parameters(), dict(model.named_parameters()).values()))
    if name == "bloom":  # its own autograd function for GELU has no forward derivative
        with pytest.raises(UserError, match="no forward derivative"):
            evaluate(closure, plan, Gaussian(), key, difference="exact")
        return
    for p in plan.block.tensors:
        p.requires_grad_(True)
    gradient = torch.autograd.grad(task_loss(task), plan.block.tensors, allow_unused=True)
    filled = [torch.zeros_like(p) if g is None else g for p, g in zip(plan.block.tensors, gradient)]
    slope = inner(Gaussian(), key, plan.block, filled)
    exact = evaluate(closure, plan, Gaussian(), key, difference="exact").slopes[0]
    assert exact == pytest.approx(slope, rel=1e-3, abs=1e-3 * dot(filled, filled) ** 0.5)


def task_loss(task):
    batch = task.batches(4)[0]
    return task.objective.loss(task.objective.forward(task.model, batch), batch) / task.objective.weight(batch)
