"""Models and adapters: found, told apart by name, reported, loaded back as they were."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from tiny_models import f, save

from hybridtheory.blocks import partition
from hybridtheory.errors import UserError
from probes.adapters import is_peft
from probes.tasks import load_task


# peft 0.21 reads an attribute that transformers 5.23 deprecates, and warns of RMSNorm as an unknown norm.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("make", "extra"),
    [
        (lambda: peft.LoraConfig(target_modules=["q_proj"], use_dora=True), 0),
        (lambda: peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]), 1),
        (lambda: peft.LoraConfig(target_modules=["q_proj"], trainable_token_indices=[7]), 0),
        (lambda: peft.LoHaConfig(target_modules=["q_proj"]), 0),
        (lambda: peft.LoKrConfig(target_modules=["q_proj"]), 0),
        (lambda: peft.AdaLoraConfig(target_modules=["q_proj"], total_step=10), 0),
        (lambda: peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]), 0),
        (lambda: peft.OFTConfig(target_modules=["q_proj"], oft_block_size=4), 0),
        (lambda: peft.BOFTConfig(target_modules=["q_proj"], boft_block_size=4), 0),
        (lambda: peft.VeraConfig(target_modules=["o_proj"]), 0),
        (lambda: peft.VBLoRAConfig(target_modules=["o_proj"], vector_length=4, num_vectors=8), 0),
        (lambda: peft.LNTuningConfig(target_modules=["norm"]), 0),
        (lambda: peft.FourierFTConfig(target_modules=["q_proj"], n_frequency=4), 0),
        (lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), 0),
        (lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), 0),
        (lambda: peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=8), 0),
    ],
    ids=lambda v: type(v()).__name__ if callable(v) else str(v),
)  # fmt: skip
def test_adapter_parameters_are_told_by_name(make: Callable[[], Any], extra: int) -> None:
    """For every peft type: the parameters that peft itself makes trainable, and no others."""
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = peft.get_peft_model(transformers.LlamaForCausalLM(config), make())
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trainable
    assert {n for n, _ in model.named_parameters() if is_peft(n)} == trainable
    blocks = partition(model, "group", peft=is_peft)
    assert [b.group for b in blocks] == ["base", "peft"]
    originals = [n for n, _ in model.named_parameters() if "original_module" in n]
    assert len(originals) == extra
    assert not set(originals) & {n for b in blocks for n in b.names}


def test_a_hub_name_is_found_in_the_hubs_cache(
    gpt2: Path, films: Path, tmp_path: Path, offline: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an earlier connection left in the cache serves a machine without network."""
    import huggingface_hub

    cached = tmp_path / "models--someone--tiny"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0" * 40)
    (cached / "snapshots").mkdir()
    (cached / "snapshots" / ("0" * 40)).symlink_to(gpt2, target_is_directory=True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(transformers.utils.hub.constants, "HF_HUB_CACHE", str(tmp_path))
    task = load_task("someone/tiny", films, rank=2, rows=2)
    assert task.info["model"] == "someone/tiny"
    assert task.info["model_sha256"] == load_task(gpt2, films, rank=2, rows=2).info["model_sha256"]


def test_default_targets_are_found_where_peft_knows_none(root: Path, films: Path) -> None:
    """ALBERT is not in peft's tables: its attention is found, and the head's layer of the same name is left alone."""
    task = load_task(save("albert", root / "albert"), films, rank=2, rows=2)
    assert task.peft_info["targets"] == ["attention.dense", "attention.key", "attention.query", "attention.value"]
    assert not any("predictions" in n for n, _ in task.model.named_parameters() if is_peft(n))
    everything = load_task(root / "albert", films, rank=2, rows=2, targets="all-linear")
    assert "ffn_output" in everything.peft_info["targets"]
    config = transformers.MambaConfig(vocab_size=304, hidden_size=8, num_hidden_layers=2, state_size=2)
    tokenizer = transformers.AutoTokenizer.from_pretrained(root / "albert")
    mamba = load_task(transformers.MambaForCausalLM(config), films, tokenizer=tokenizer, rank=2, rows=2)
    assert "mixer.in_proj" in mamba.peft_info["targets"]
    assert f(mamba) > 0


def test_an_adapter_folder_comes_back_as_it_was(gpt2: Path, films: Path, root: Path) -> None:
    task = load_task(gpt2, films, rank=3, alpha=5.0, rows=4, labels=("dull", "warm"))
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in task.model.named_parameters():
            if is_peft(name):
                p.copy_(0.3 * torch.randn(p.shape, generator=draw))
    task.model.save_pretrained(root / "adapter")
    again = load_task(gpt2, films, peft=str(root / "adapter"), rows=4, labels=("dull", "warm"))
    assert f(again) == pytest.approx(f(task), rel=1e-6)
    assert f(again) != pytest.approx(f(load_task(gpt2, films, rank=3, rows=4, labels=("dull", "warm"))), rel=1e-3)
    assert (again.peft_info["rank"], again.peft_info["scale"]) == (3, 5.0 / 3)
    alone = load_task(root / "adapter", films, rows=4, labels=("dull", "warm"))  # it names its base itself
    assert f(alone) == pytest.approx(f(task), rel=1e-6)
    given = load_task(task.model, films, tokenizer=task.tokenizer, rows=4, labels=("dull", "warm"))
    assert given.peft_info["type"] == "lora"
    assert f(given) == pytest.approx(f(task), rel=1e-6)
    (root / "adapter" / "adapter_model.safetensors").rename(root / "adapter" / "adapter_model.bin")
    with pytest.raises(UserError, match="safetensors"):
        load_task(gpt2, films, peft=str(root / "adapter"), rows=4)


def test_loading_repeats_and_leaves_the_global_generator_alone(gpt2: Path, films: Path) -> None:
    before = torch.get_rng_state()
    first, second, other = (load_task(gpt2, films, rank=2, rows=2, seed=s) for s in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    pairs = zip(*(t.model.named_parameters() for t in (first, second, other)), strict=True)
    same = [(n, torch.equal(a, b), torch.equal(a, c)) for (n, a), (_, b), (_, c) in pairs if "lora_A" in n]
    assert same
    assert all(equal and not differs for _, equal, differs in same)
    assert first.info["model_sha256"] == second.info["model_sha256"]


def test_dropout_is_off_and_padding_indices_are_cleared(root: Path, films: Path) -> None:
    task = load_task(save("opt", root / "opt"), films, rank=2, rows=3)
    value = f(task)
    task.model.train()
    assert f(task) == value
    assert task.info["padding_idx_cleared"] == ["model.decoder.embed_tokens"]
    assert all(
        getattr(m, "padding_idx", None) is None for m in task.model.modules() if isinstance(m, torch.nn.Embedding)
    )


def test_where_padding_changes_the_loss_batches_are_single_rows(root: Path, films: Path) -> None:
    """peft hands a decoder's classifier embeddings without token ids, so it reads the last position, padding or not."""
    task = load_task(save("gpt2", root / "gpt2-cls", head="classification"), films, peft="prompt", rows=4)
    assert not task.padding_exact
    assert any("every batch holds one row" in n for n in task.notes)
    assert [len(b["label"]) for b in task.batches(4)] == [1, 1, 1, 1]
    assert f(task, 4) == f(task, 1)
    assert load_task(root / "gpt2-cls", films, peft="lora", rows=4).padding_exact


def test_a_quantised_base_leaves_the_adapter_alone_to_measure(gpt2: Path, films: Path) -> None:
    def model() -> Any:
        made = transformers.AutoModelForCausalLM.from_pretrained(gpt2)
        made.config.quantization_config = {"quant_method": "bitsandbytes"}
        return made

    tokenizer = transformers.AutoTokenizer.from_pretrained(gpt2)
    task = load_task(model(), films, tokenizer=tokenizer, rank=2, rows=2)
    assert task.base is False
    assert task.info["quantised"] == "bitsandbytes"
    assert [b.group for b in partition(task.model, peft=task.is_peft, base=task.base)] == ["peft"]
    with pytest.raises(UserError, match=r"quantised \(bitsandbytes\).*--peft lora"):
        load_task(model(), films, tokenizer=tokenizer, peft="none", rows=2)
