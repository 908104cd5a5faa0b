"""Any transformers model: tiny random models of every promised architecture x every adapter, through `load_task` alone.

Default attention, dropout in the configuration, labelled data with rows of different length (so padding is there). Finite is the
least: the adapter's gradient must not be zero, two losses must agree bit for bit, and v'g must be the loss's derivative.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from tiny_models import CONFIGS, save

from hybridtheory.blocks import partition
from hybridtheory.errors import UserError
from hybridtheory.oracle import Oracle
from hybridtheory.vectors import dot
from probes.tasks import Task, load_task

ADAPTERS = ("lora", "ia3", "prompt", "prefix")

# Pairs that cannot be measured, with the upstream cause and what the error must say. Four at most.
REFUSED = {
    # transformers' DistilBertModel and AlbertModel take no past_key_values, which is how peft hands a prefix over.
    ("distilbert", "prefix"): "no past_key_values in its forward",
    ("albert", "prefix"): "no past_key_values in its forward",
}

SENTENCES = ["the film was a warm story", "it was dull", "a terrible plot, and no good actor in the scene", "great"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "films.jsonl"
    path.write_text("\n".join(json.dumps({"text": t, "label": i % 2}) for i, t in enumerate(SENTENCES * 2)))
    return path


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: save(name, root / name) for name in CONFIGS}


def test_refusals_are_few_and_promised_architectures_are_all_here() -> None:
    promised = {
        "gpt2", "gpt_neox", "opt", "bloom", "llama", "mistral", "qwen2", "qwen3", "gemma", "phi", "falcon", "llama_tied",
        "mixtral", "bert", "roberta", "distilbert", "albert", "t5", "bart",
    }  # fmt: skip
    assert promised == set(CONFIGS)
    assert len(REFUSED) <= 4


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("name", CONFIGS)
def test_architecture(name: str, adapter: str, folders: dict[str, Path], data: Path) -> None:
    def load() -> Task:
        return load_task(
            folders[name], data, peft=adapter, rank=2, virtual_tokens=3, rows=3, labels=("terrible", "great"), template="{text} it was"
        )  # fmt: skip

    if (name, adapter) in REFUSED:
        with pytest.raises(UserError, match=REFUSED[name, adapter]) as refusal:
            load()
        assert "choose --peft" in str(refusal.value)
        return
    task = load()
    blocks = partition(task.model, "group", peft=task.is_peft, info=task.peft_info)
    assert [b.group for b in blocks] == ["base", "peft"]
    assert task.objective.select, "the needed positions' logits differ from the full ones"
    assert task.padding_exact
    oracle = Oracle(task.model, task.objective, task.batches(2), blocks)
    value = oracle.value()
    assert math.isfinite(value)
    assert value > 0
    assert oracle.value() == value
    draw = torch.Generator().manual_seed(0)
    for block, gradient in zip(blocks, oracle.gradient(), strict=True):
        norm = math.sqrt(dot(gradient, gradient))
        assert math.isfinite(norm)
        assert norm > 0
        v = [torch.randn(t.shape, generator=draw) for t in block.tensors]
        with oracle.products(block) as product:
            hv = product(v)
        assert all(bool(torch.isfinite(t).all()) for t in hv)
        assert math.sqrt(dot(hv, hv)) > 0


@pytest.mark.parametrize("name", ["gpt2", "llama_tied", "roberta", "t5"])
def test_gradient_is_the_derivative_of_the_loss(name: str, folders: dict[str, Path], data: Path) -> None:
    """In float64, along v = g/|g| + a random unit vector: (f(w + h v) - f(w - h v)) / 2h against v'g."""
    task = load_task(folders[name], data, rank=2, rows=3, dtype="float64", labels=("terrible", "great"))
    blocks = partition(task.model, "group", peft=task.is_peft)
    oracle = Oracle(task.model, task.objective, task.batches(3), blocks)
    # Llama and T5 normalise in float32 whatever the model's type: the loss carries about 1e-6 of noise, so h is larger.
    h, tolerance = (1e-5, 1e-6) if name in ("gpt2", "roberta") else (1e-3, 5e-3)
    draw = torch.Generator().manual_seed(1)
    for block, gradient in zip(blocks, oracle.gradient(), strict=True):
        u = [torch.randn(t.shape, generator=draw, dtype=torch.float64) for t in block.tensors]
        to_unit = [1 / math.sqrt(dot(x, x)) for x in (gradient, u)]
        v = [to_unit[0] * a + to_unit[1] * b for a, b in zip(gradient, u, strict=True)]
        values = []
        for step in (h, -2 * h, h):  # there, across, and back
            with torch.no_grad():
                for t, d in zip(block.tensors, v, strict=True):
                    t.add_(d, alpha=step)
            values.append(oracle.value())
        assert (values[0] - values[1]) / (2 * h) == pytest.approx(dot(v, gradient), rel=tolerance)


@pytest.mark.parametrize("name", ["gpt2", "opt", "bert", "t5", "falcon"])
def test_ragged_batches_give_the_number_of_one_batch(name: str, folders: dict[str, Path], data: Path) -> None:
    """5 rows at once, 4 + 1 rows, single rows: the same loss up to rounding (float32, 1e-5 of a loss near 25)."""
    task = load_task(folders[name], data, rank=2, rows=5, labels=("terrible", "great"))
    blocks = partition(task.model, "group", peft=task.is_peft)
    values = [Oracle(task.model, task.objective, task.batches(size), blocks).value() for size in (5, 4, 1)]
    assert values[1] == pytest.approx(values[0], rel=1e-5)
    assert values[2] == pytest.approx(values[0], rel=1e-5)
