"""Partitions are disjoint and covering; tied weights count once; names say what a block is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoTokenizer, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration

from hybridtheory.blocks import partition, split
from hybridtheory.errors import UserError
from probes.tasks import load_task
from tests.toys import is_lora, language_model, with_lora

RULES = ["group", "layer", "module", r"\.\d+"]


@pytest.mark.parametrize("by", RULES)
@pytest.mark.parametrize("kind", ["gpt2", "llama", "opt", "bert"])
def test_disjoint_and_covering(kind: str, by: str) -> None:
    model = language_model(kind)
    blocks = partition(model, by)
    names = [n for b in blocks for n in b.names]
    assert sorted(names) == sorted(n for n, _ in model.named_parameters())  # named_parameters counts tied weights once
    assert len({id(t) for b in blocks for t in b.tensors}) == len(names)
    assert sum(b.numel for b in blocks) == sum(p.numel() for p in model.parameters())


def test_a_device_map_that_keeps_the_weights_in_one_place_is_served_and_offloading_is_refused(
    gpt2: Path, films: Path, tmp_path: Path
) -> None:
    plain = GPT2LMHeadModel.from_pretrained(gpt2)
    auto = GPT2LMHeadModel.from_pretrained(gpt2, device_map="auto" if not torch.cuda.is_available() else "cpu")
    options = {"tokenizer": AutoTokenizer.from_pretrained(gpt2), "rows": 4}
    infos = [load_task(m, films, **options).info["model_sha256"] for m in (plain, auto)]
    assert infos[0] == infos[1]

    places = {
        "transformer.wte": "cpu",
        "transformer.wpe": "cpu",
        "transformer.h": "disk",
        "transformer.ln_f": "cpu",
        "lm_head": "cpu",
    }
    disk = GPT2LMHeadModel.from_pretrained(gpt2, device_map=places, offload_folder=str(tmp_path / "offloaded"))
    for away in (disk, cpu_offload(GPT2LMHeadModel.from_pretrained(gpt2), torch.device("cpu"))):
        with torch.no_grad():
            assert away(torch.tensor([[1, 2, 3]])).logits.isfinite().all()  # it does run
        with pytest.raises(UserError, match=r"of the model's \d+ tensors are not in memory .* load it whole"):
            partition(away)
        with pytest.raises(UserError, match="device_map has offloaded them"):
            load_task(away, films, **options)


def test_peft_is_told_from_base() -> None:
    model = with_lora(language_model())
    base, peft = partition(model, "group", is_lora, info={"rank": 2})
    assert (base.group, peft.group) == ("base", "peft")
    assert all(is_lora(n) for n in peft.names) and not any(is_lora(n) for n in base.names)
    assert peft.info == {"rank": 2} and base.info == {}


def test_tied_weight_is_one_parameter() -> None:
    (base,) = partition(language_model("gpt2"), "group")
    assert base.tied == {"transformer.wte.weight": ["lm_head.weight"]}
    assert "lm_head.weight" not in base.names


def test_module_names() -> None:
    names = [b.name for b in partition(language_model("gpt2"), "module")]
    expected = [f"base.layer.{i:02d}.{k}" for i in (0, 1) for k in ("norm", "attention", "mlp")]
    assert names == ["base.embedding", *expected, "base.norm"]
    llama = [b.name for b in partition(language_model("llama"), "module")]
    assert llama[0] == "base.embedding" and llama[-1] == "base.head"
    assert "base.layer.01.attention" in llama and "base.layer.01.mlp" in llama
    bert = {b.name for b in partition(language_model("bert"), "module")}
    assert {"base.embedding", "base.layer.00.attention", "base.layer.00.mlp", "base.layer.00.norm", "base.head"} <= bert


def test_encoder_and_decoder_layers_are_kept_apart() -> None:
    config = T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=2, num_heads=2)
    names = [b.name for b in partition(T5ForConditionalGeneration(config), "layer")]
    assert {"base.encoder.layer.01", "base.decoder.layer.01"} <= set(names)


def test_modules_to_save_belong_to_peft_and_their_originals_to_nobody() -> None:
    config = LoraConfig(r=2, target_modules=["query"], modules_to_save=["classifier"])
    model = get_peft_model(language_model("bert"), config)  # type: ignore[arg-type]
    blocks = partition(model, "group", lambda n: is_lora(n) or "modules_to_save" in n)
    names = [n for b in blocks for n in b.names]
    assert not any("original_module" in n for n in names)
    peft = next(b for b in blocks if b.group == "peft")
    assert any("modules_to_save" in n for n in peft.names)


def test_regular_expression_names_blocks_by_what_it_captures() -> None:
    blocks = partition(language_model("gpt2"), r"\.(attn|mlp)\.")
    assert [b.name for b in blocks] == ["base.rest", "base.attn", "base.mlp"]


def test_bad_expression_and_empty_model() -> None:
    with pytest.raises(UserError, match="regular expression"):
        partition(language_model(), "(")
    with pytest.raises(UserError, match="matches no parameter"):
        partition(language_model(), "no such name")
    with pytest.raises(UserError, match="no block"):
        partition(nn.Sequential(nn.ReLU()))
    with pytest.raises(UserError, match="no block"):
        partition(language_model(), base=False)


def test_split_cuts_by_block() -> None:
    blocks = partition(language_model(), "layer")
    flat = [torch.full_like(t, i) for i, b in enumerate(blocks) for t in b.tensors]
    assert all((t == i).all() for i, part in enumerate(split(flat, blocks)) for t in part)
