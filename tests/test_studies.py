"""Committed studies: their predictions stand in git before the records of the sweep that tests them, and come from probes alone; what the
study is made of, and the models that are trained for it.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import subprocess
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import torch

from probes import predictions, rundir, sweep_description

ROOT = Path(__file__).parent.parent
REPORTS = ROOT / "docs" / "reports"
STUDIES = sorted(p for p in REPORTS.glob("study-*") if p.is_dir())
SWEPT = [p for p in STUDIES if (p / rundir.RECORDS).exists()]


def in_git() -> bool:
    done = subprocess.run(["git", "ls-files", "--error-unmatch", "pyproject.toml"], cwd=ROOT, capture_output=True)
    return done.returncode == 0


@pytest.mark.skipif(not in_git(), reason="this is no clone: only git can say which came first")
@pytest.mark.parametrize("study", SWEPT, ids=lambda p: p.name)
def test_the_predictions_of_a_swept_study_were_committed_before_its_records(study: Path) -> None:
    """Every cell carries the hash and the commit; the commit is an ancestor of the sweep's commit and of its records'."""
    assert "an ancestor of all" in predictions.check(study)


@pytest.mark.parametrize("study", STUDIES, ids=lambda p: p.name)
def test_predictions_come_from_the_committed_probes(study: Path) -> None:
    """The probes' records are those that the predictions were written from, and they say the same today."""
    path = study / "predictions.json"
    if not path.exists():
        assert study not in SWEPT, f"{study.name} was swept without predictions"
        return
    table = json.loads(path.read_text(encoding="utf-8"))
    found = []
    for source in table["sources"]:
        folder = ROOT / source["records"]
        raw = (folder / rundir.RECORDS).read_bytes()
        assert hashlib.sha256(raw).hexdigest() == source["sha256"], f"{folder} is not what {path} was written from"
        assert not any(type(r).__name__ == "Cell" for r in rundir.load(folder)), f"{folder} holds runs of a sweep"
        found.append(source["task"])
    assert set(found) == {e["task"] for e in table["predictions"]}


@pytest.mark.parametrize("description", sorted(ROOT.glob("studies/**/*.toml")), ids=lambda p: p.stem)
def test_a_study_is_described_in_words_that_the_sweep_knows(description: Path) -> None:
    study = sweep_description.read(description)
    assert study.lines and all(line.seeds for line in study.lines)


def test_the_learning_rate_study_covers_models_adapters_and_horizons() -> None:
    """Over its parts; a combination is a task at one horizon."""
    parts = [sweep_description.read(p) for p in sorted((ROOT / "studies").glob("*.toml"))]
    lines = {}
    for part in parts:
        for source in part.sources:
            for line in (x for x in part.lines if x.task == source.name):
                assert line.method == "hybrid" and line.plain and line.horizon == "steps"
                lines.setdefault((source.name, line.amount), []).append((source, line))
    combinations = [(found[0][0], amount) for (_, amount), found in lines.items()]
    models = [source.model for source, _ in combinations]
    own = {m for m in models if m is not None and m.startswith("studies/models/")}
    assert len(combinations) >= 12 and models.count(None) <= 4 and "minilm" in models
    assert own == {f"studies/models/{name}" for name in ("opt-relu", "llama")}
    assert len([a for s, a in combinations if s.model == "smollm2" and a <= 50]) == models.count("smollm2") >= 3
    assert {s.loading.get("peft", "lora") for s, _ in combinations} >= {"lora", "ia3", "prefix"}
    assert len({s.loading["rank"] for s, _ in combinations if s.loading.get("peft") == "lora"}) >= 2
    amounts = {name: [a for s, a in combinations if s.name == name] for name in {s.name for s, _ in combinations}}
    assert any(max(a) >= 8 * min(a) for a in amounts.values())
    for found in lines.values():
        assert {line.axis for _, line in found} == {"base", "peft", "scale", "ratio"}
        for _, line in found:
            assert len(line.seeds) >= 3 and line.grid is not None
            assert (line.grid.factor, line.grid.refine) == (3, 1.5) and line.grid.boundary


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """scripts/train_study_models.py on a few snippets, in as many threads as before."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    script = import_module("train_study_models")
    film = script.film
    monkeypatch.setattr(script, "film", lambda split: film(split)[:60])
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    return script


@pytest.mark.parametrize("name", ["opt-relu", "llama"])
def test_a_model_of_the_study_is_trained_to_the_same_bytes_and_says_what_it_is(
    training: ModuleType, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # Alone, and after the other one.
    for out, names in (("alone", [name]), ("both", [])):
        arguments = [*names, "--steps", "12", "--rows", "2", "--out", str(tmp_path / out)]
        monkeypatch.setattr("sys.argv", ["train_study_models.py", *arguments])
        training.main()
    folder, other = tmp_path / "alone" / name, tmp_path / "both" / name
    files = {p.name for p in folder.iterdir()}
    assert (
        files
        == {p.name for p in other.iterdir()}
        >= {"model.safetensors", "config.json", "tokenizer.json", "README.md"}
    )
    assert all((folder / f).read_bytes() == (other / f).read_bytes() for f in files)
    assert not {f for f in files if f.endswith((".bin", ".pt"))}
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlicense: apache-2.0\n") and "MIT, copyright (c) 2014 cjhutto" in card
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert f"{sum(p.numel() for p in model.parameters()):,} parameters" in card
    assert name != "opt-relu" or model.config.activation_function == "relu"
    # The loss that the card states is that of the weights beside it, and below that of a model that knows nothing.
    dev = training.loss_of(model, tokenizer(training.film("dev"))["input_ids"], tokenizer.pad_token_id)
    assert re.search(rf"dev {dev:.3f}, test [0-9.]+; ", card) and dev < math.log(len(tokenizer))


def test_a_model_that_the_study_does_not_have_is_refused(
    training: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["train_study_models.py", "nonesuch"])
    with pytest.raises(SystemExit):
        training.main()
    assert "choose from opt-relu, llama" in capsys.readouterr().err
