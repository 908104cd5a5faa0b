"""Input that nobody meant: any bytes as records, configs and arguments, any shapes, partitions and ragged batches."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import nn
from typer.testing import CliRunner

from hybridtheory.blocks import partition
from hybridtheory.errors import UserError
from hybridtheory.estimators import LAWS, Key, Perturbation, evaluate
from hybridtheory.oracle import Oracle, microbatches
from probes import chosen_rates, cli, jsonl, rundir, sweep_description
from tests.toys import NextToken, is_lora, language_model, tokens, with_lora

few = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
some = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")

LINES = (
    (Path(__file__).parent.parent / "docs" / "reports" / "convergence-embedded" / rundir.RECORDS)
    .read_text()
    .splitlines()[:3]
)


def refused(call, said=""):
    """What the call returns, or None where it refuses in a sentence that says ``said``; any other exception is a defect."""
    try:
        return call()
    except UserError as refusal:
        sentence = str(refusal)
    assert said in sentence
    return None


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)


@few
@given(st.data())
def test_a_damaged_record_file_is_read_or_refused_in_one_sentence(data):
    text = "\n".join(LINES) + "\n"
    kind = data.draw(st.sampled_from(["flip", "cut", "insert", "value", "swap"]))
    at = data.draw(st.integers(0, len(text) - 1))
    if kind == "flip":
        text = text[:at] + chr(data.draw(st.integers(0, 0x2FF))) + text[at + 1 :]
    elif kind == "cut":
        text = text[:at] + text[data.draw(st.integers(at, len(text))) :]
    elif kind == "insert":
        text = text[:at] + data.draw(st.text(max_size=5)) + text[at:]
    elif kind == "swap":
        text = "\n".join(reversed(LINES)) + "\n"
    else:
        record = json.loads(LINES[0])
        record[data.draw(st.sampled_from(sorted(record)))] = data.draw(json_values)
        text = json.dumps(record) + "\n"
    found = refused(lambda: jsonl.read_lines(text, "records.jsonl"), "records.jsonl, line")
    if found is not None:
        assert found[1] <= len(text) and all(type(r) in jsonl.KIND_OF for r in found[0])


@few
@given(
    st.dictionaries(st.sampled_from(["rates", "limits", "settings", "source", "task", "x"]), json_values, max_size=3)
    | st.text()
)
def test_any_toml_is_a_trainer_toml_or_one_sentence(tmp_path, content):
    file = tmp_path / "trainer.toml"
    if isinstance(content, str):
        assume(content.encode("utf-8", "ignore").decode() == content)
        file.write_text(content, encoding="utf-8")
    else:
        from probes.trainer_toml import value

        def toml(v):
            if isinstance(v, dict):
                return "{" + ", ".join(f"{json.dumps(k)} = {toml(x)}" for k, x in v.items()) + "}"
            return "[" + ", ".join(map(toml, v)) + "]" if isinstance(v, list) else '"none"' if v is None else value(v)

        try:
            file.write_text("\n".join(f"{k} = {toml(v)}" for k, v in content.items()), encoding="utf-8")
        except UnicodeEncodeError:
            assume(False)
    table = refused(lambda: chosen_rates.read(file), "--lr")
    if table is None:
        return
    now = {"model_sha256": "0", "data": "d", "mu": 1e-3, "q": 1, "law": "gaussian", "batch_size": 4}
    rates = refused(lambda: chosen_rates.choose("hybrid", {"base": None, "peft": None}, table, now))
    assert rates is None or (rates.base > 0 and rates.peft > 0)


@few
@given(
    st.dictionaries(
        st.sampled_from(["steps", "seeds", "methods", "axes", "grid", "train", "task", "method", "x"]),
        json_values,
        max_size=3,
    )
)
def test_any_description_of_a_sweep_is_a_study_or_one_sentence(table):
    study = refused(lambda: sweep_description.study(table))
    assert study is None or study.lines


@some
@given(st.integers(1, 6), st.integers(2, 9), st.integers(1, 6), st.data())
def test_cutting_ragged_rows_anywhere_changes_nothing(rows, length, size, data):
    model = with_lora(language_model("gpt2", layers=1))
    batch = tokens(rows, length)
    for row in batch["x"]:
        row[data.draw(st.integers(2, length)) :] = -1
    blocks = partition(model, peft=is_lora)
    whole = Oracle(model, NextToken(), [batch], blocks)
    parts = Oracle(model, NextToken(), microbatches(batch, size), blocks)
    assert parts.value() == pytest.approx(whole.value(), rel=1e-12)
    for a, b in zip(whole.gradient(), parts.gradient(), strict=True):
        for s, t in zip(a, b, strict=True):
            assert torch.allclose(s, t, rtol=1e-9, atol=1e-12)


class Shapes(nn.Module):
    """Parameters of any shapes, and a loss that reads all of them."""

    def __init__(self, shapes, dtype):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.weights = nn.ParameterList([nn.Parameter(torch.randn(s, generator=g).to(dtype)) for s in shapes])

    def forward(self):
        return sum((w.double() ** 2).sum() for w in self.weights)


shapes = st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple), min_size=1, max_size=4)


@few
@given(
    shapes,
    st.sampled_from(sorted(LAWS)),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    st.integers(0, 2**63),
)
def test_weights_of_any_shape_come_back_bit_for_bit(wanted, name, dtype, seed):
    model = Shapes(wanted, dtype)
    block = partition(model)[0]
    law = LAWS[name](rank=1) if name in ("subzero", "lozo") else LAWS[name]()
    before = [p.detach().clone() for p in model.parameters()]
    plan = Perturbation(model, [block])
    try:
        found = evaluate(model, plan, law, Key(seed), mu=0.1)
    except UserError:  # a law that this block is too small for, or a step that the dtype absorbs
        found = None
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), before, strict=True))
    if found is not None:
        again = evaluate(model, plan, law, Key(seed), mu=0.1)
        assert again.slopes == found.slopes


@few
@given(st.from_regex(r"[a-z0-9_.|()\[\]*+?\\]{0,12}", fullmatch=True))
def test_any_regex_cuts_into_disjoint_covering_blocks_or_is_refused(pattern):
    model = with_lora(language_model("gpt2", layers=1))
    try:
        blocks = partition(model, pattern, is_lora)
    except UserError:
        return
    names = [n for b in blocks for n in b.parameters]
    assert len(names) == len(set(names))
    wanted = {id(p) for p in model.parameters()}
    assert {id(p) for b in blocks for p in b.parameters.values()} == wanted


options = st.sampled_from(
    ["--rows", "--rank", "--points", "--seed", "--alpha", "--mu", "--blocks", "--device", "--dtype", "--peft", "--data"]
)


@some
@given(
    st.lists(
        st.tuples(options, st.text(st.characters(codec="utf-8"), max_size=8) | st.integers().map(str)),
        min_size=1,
        max_size=3,
    )
)
def test_any_arguments_end_in_a_run_or_one_sentence(tmp_path, monkeypatch, offline, gpt2, films, pairs):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "prepare", lambda: None)
    arguments = [str(gpt2), "--data", str(films), "--dry-run", *(x for pair in pairs for x in pair)]
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code in (0, 2), result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    assert "Traceback" not in result.output and not list(tmp_path.glob("runs"))


@pytest.mark.parametrize("name", ["../out.txt", "{elsewhere}/out.txt", "figures/../../out.txt"])
def test_nothing_is_written_outside_the_run_folder(tmp_path, name):
    folder, name = rundir.RunFolder(tmp_path / "run"), name.format(elsewhere=tmp_path)
    with pytest.raises(UserError, match="outside the run folder"):
        folder.write(name, lambda path: path.write_text("x"))
    assert not list(tmp_path.rglob("*out.txt"))


def test_pickled_weights_are_refused_unless_asked_for(tmp_path, gpt2, films):
    import shutil

    from safetensors.torch import load_file

    from probes.tasks import load_task

    folder = tmp_path / "pickled"
    shutil.copytree(gpt2, folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"pickled ones can run code.*--allow-pickle"):
        load_task(folder, films, rows=4)
    assert (
        load_task(folder, films, rows=4, allow_pickle=True).info["model_sha256"]
        == load_task(gpt2, films, rows=4).info["model_sha256"]
    )
