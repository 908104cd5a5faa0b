"""probe-cost: declared passes are counted ones for every method and adapter, memory phases say what a method holds, formulas by hand."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from nets import tied
from torch import nn
from typer.testing import CliRunner

from hybridtheory.blocks import partition
from hybridtheory.errors import UserError
from hybridtheory.estimators import SubZero
from hybridtheory.optimizers import METHODS
from hybridtheory.theory.cost import Layers, Passes
from probes import cli_cost, cost, cost_formula, cost_memory, cost_time, rundir
from probes.jsonl import stable
from probes.markdown_cost import answers
from probes.records import Cost, End, Header, StepMemory, StepTime, Warning
from probes.report import Report
from probes.tasks import Task, load_task

# The tiny model's smallest matrix has 16 rows.
LAWS = {
    "subzero": "subzero:rank=2",
    "subzero-peft": "subzero:rank=2",
    "hybrid-subzero": "subzero:rank=2",
    "tezo": "tezo:rank=2",
}
EVERY = [m for m in METHODS if m != "galore"]


@pytest.fixture(scope="module")
def tasks(gpt2, films) -> dict[str, Task]:
    return {
        p: load_task(str(gpt2), str(films), peft=p, rows=4, rank=2, virtual_tokens=3)
        for p in ("none", "lora", "ia3", "prefix", "prompt")
    }


# ---- passes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", EVERY)
def test_declared_passes_are_counted_ones_and_those_of_the_formula(method, tasks):
    for peft in cost.Chosen(method, method, None).adapters(["lora", "ia3", "prefix", "prompt"]):
        found = cost_time.step_time(tasks[peft], method, LAWS.get(method), {}, 2, None, method)
        assert (found.forwards, found.backwards) == found.declared == found.formula, (method, peft)
        assert found.ratio is not None and found.ratio > 0
        assert (found.parts is not None) == (METHODS[method].kind == "hybrid" and method != "bilevel")


def test_steps_of_the_measurement_move_no_weight(tasks):
    task = tasks["lora"]
    before = [p.detach().clone() for p in task.model.parameters()]
    cost_time.step_time(task, "hybrid", None, {}, 3, None, "hybrid")
    for p, w in zip(task.model.parameters(), before, strict=True):
        torch.testing.assert_close(p.detach(), w, rtol=1e-7, atol=1e-9)


def test_rounds_are_interleaved_and_every_work_leads_in_turn():
    log: list[str] = []
    works = {n: (lambda n=n: log.append(n)) for n in "abc"}
    found = cost_time.interleaved(works, 3, torch.device("cpu"))
    assert "".join(log) == "abc" + "abc" + "bca" + "cab"
    assert {len(v) for v in found.values()} == {3}
    assert cost_time.quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == (2.0, 4.0)
    assert cost_time.quartiles([2.0]) == (2.0, 2.0)


# ---- formulas --------------------------------------------------------------------------------------------------------


def test_layers_count_what_autograd_saves():
    """Linear, ReLU, Linear on a (3, 4) input: for the first weight x, the ReLU's output and the second weight's place are saved."""
    net = nn.Sequential(nn.Linear(4, 8, bias=False), nn.ReLU(), nn.Linear(8, 2, bias=False))
    x = torch.ones(3, 4)
    weights = list(net.parameters())
    found = cost_formula.layers(net, lambda n: n.startswith("2."), weights, lambda: net(x).sum())
    # modules: the sequence, linear, relu, linear
    assert found.base == [0, 32, 0, 0]
    assert found.peft == [0, 0, 0, 16]
    # x (3 × 4) for the first gradient; the ReLU's output (3 × 8), which the last layer reads too, once
    assert found.activations == [0, 12, 24, 0]
    last = cost_formula.layers(net, lambda n: False, weights[1:], lambda: net(x).sum())
    assert sum(last.activations) == 24  # the first layer's input is not needed
    assert sum(cost_formula.layers(net, lambda n: False, [], lambda: net(x).sum()).activations) == 0


def test_tied_weights_are_counted_once():
    net, base, peft, _ = tied()
    found = cost_formula.layers(net, lambda n: n in peft.names, [], lambda: torch.zeros(()))
    assert sum(found.base) == base.numel
    assert sum(found.peft) == peft.numel


def test_memory_of_every_kind_of_method_by_hand():
    layers = Layers(base=[10.0, 40.0, 20.0], peft=[1.0, 2.0, 9.0], activations=[30.0, 5.0, 7.0])
    back_x, back_y = 30 + 40 + 20, 30 + 5 + 9
    by_hand = {
        "sgd": 70 + back_x + 12, "adamw": 70 + back_x + 12 + 140, "peft-sgd": 82 + back_y, "peft-adamw": 82 + back_y + 24,
        "lora-plus": 82 + back_y + 24, "mezo": 82 + 40, "zo-momentum": 82 + 40 + 70, "zo-adam": 82 + 40 + 140, "hizoo": 82 + 40 + 70,
        "zo-adamu": 82 + 40 + 70, "mezo-peft": 82 + 9, "hybrid": 82 + 44, "hybrid-adamw": 82 + 44 + 24,
        "bilevel": 82 + 44 + 2 * (70 + 24) + 12,
    }  # fmt: skip
    for method, elements in by_hand.items():
        assert cost_formula.memory(method, None, layers, []) == elements, method
    block = partition(nn.Sequential(nn.Linear(6, 4), nn.Linear(5, 3)))[0]  # biases have no factors
    state = 2 * ((4 + 6) + (3 + 5))
    assert cost_formula.memory("subzero", SubZero(rank=2), layers, [block]) == 82 + 40 + state
    assert cost_formula.memory("galore", None, layers, []) is None


def test_passes_of_methods():
    assert cost_formula.passes("hybrid") == Passes(2, 1)
    assert cost_formula.passes("hybrid-two-sided") == cost_formula.passes("hybrid-sequential") == Passes(3, 1)
    assert cost_formula.passes("mezo", q=3) == Passes(6, 0)
    assert cost_time.priced(Passes(2, 1), 1.5) == 3.5


# ---- memory ----------------------------------------------------------------------------------------------------------

measurable = pytest.mark.skipif(
    bool(cost_memory.available("cpu")), reason="the resident set's peak cannot be reset here"
)


@measurable
def test_the_meter_sees_a_tensor_come_and_go():
    cost_memory.return_memory_at_once()
    meter = cost_memory.Meter(torch.device("cpu"))
    meter.reset()
    held = torch.ones(2**24)  # 64 MiB
    assert abs(meter.peak() / 2**20 - 64) < 4
    del held
    assert meter.now() < 4 * 2**20
    meter.reset()
    assert meter.peak() < 4 * 2**20


@measurable
@pytest.mark.slow
def test_phases_of_a_model_that_is_larger_than_noise(root, films):
    """13 M parameters: a perturbed forward pass adds one tensor, a gradient what is saved, Adam two copies; phases follow one another."""
    from tiny_models import save

    model = save("gpt2", root / "wide", n_embd=512, n_head=8, n_layer=4, n_positions=256, vocab_size=304)
    loading = {"model": str(model), "data": str(films), "rows": 8, "max_length": 64}

    def take(method: str, peft: str) -> cost_memory.Measured:
        return cost_memory.apart(cost_memory.Job({**loading, "peft": peft}, method))

    noise = 6 * 2**20
    mezo, lora, hybrid, adam = (
        take(*x) for x in (("mezo", "none"), ("peft-sgd", "lora"), ("hybrid", "lora"), ("zo-adam", "none"))
    )
    size = 4 * mezo.trained
    assert abs(mezo.weights - size) < noise
    assert set(mezo.phases) == {"perturbation", "update"} and set(lora.phases) == {"activations", "update"}
    assert mezo.phases["perturbation"] < mezo.inference + mezo.largest + noise
    assert max(mezo.phases.values()) <= 1.05 * (mezo.inference + mezo.largest)
    assert max(hybrid.phases.values()) <= 1.1 * max(lora.phases.values())
    assert lora.phases["activations"] > lora.inference + noise
    assert abs(adam.kept - 2 * size) < noise
    for m in (mezo, lora, hybrid, adam):
        assert m.formula is not None
        assert 0.75 < max(m.phases.values()) / m.formula < 1.3


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def command(gpt2, films, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(cli_cost, "quiet", lambda: None)

    def call(*arguments: str):
        full = [str(gpt2), "--data", str(films), "--rows", "4", "--rank", "2", "--virtual-tokens", "3", *arguments]
        monkeypatch.setattr(sys, "argv", ["/usr/bin/probe-cost", *full])
        return CliRunner().invoke(cli_cost.app, full)

    return call


def measured(method: str = "mezo") -> cost_memory.Measured:
    mib = 2**20
    peak = {"mezo": 120, "peft-sgd": 200, "hybrid": 205}[method] * mib
    phases = {"perturbation": peak, "update": 101 * mib} | ({} if method == "mezo" else {"activations": peak})
    return cost_memory.Measured(1000, 40, 100 * mib, 110 * mib, mib, phases, 130.0 * mib, mib)


def test_a_run_its_report_and_its_resumption(command, monkeypatch):
    monkeypatch.setattr(cost_memory, "available", lambda device: "")
    asked: list[str] = []
    monkeypatch.setattr(cost_memory, "apart", lambda job: asked.append(job.method) or measured(job.method))
    wanted = ("--methods", "mezo peft-sgd hybrid", "--rounds", "2", "--out", "run")
    whole = command(*wanted)
    assert whole.exit_code == 0, whole.output
    assert "times the time of its first-order twin (peft-sgd) and one forward pass" in whole.output
    assert "1.02 times the peak memory of peft-sgd, 1.71 times that of mezo" in whole.output
    assert "too few for figures that count" in whole.output
    records = rundir.load(Path("run"))
    assert [type(r) for r in records if not isinstance(r, Warning)] == [
        Header,
        Cost,
        *[StepMemory] * 3,
        *[StepTime] * 3,
        Cost,
        End,
    ]
    report = Report.load("run")
    text = report.markdown()
    assert "## Memory" in text and "## Time" in text and text == Path("run/report.md").read_text()
    assert {p.name for p in Path("run/figures").iterdir()} == {"memory.png", "memory.pdf", "time.png", "time.pdf"}
    assert [m["method"] for m in report.json()["memory"]] == ["mezo", "peft-sgd", "hybrid"]
    assert answers(report)[0].startswith("With lora, a step of `hybrid` takes ")
    # cut after the second record of the timing: what was measured is not measured again
    lines = Path("run/records.jsonl").read_text().splitlines(keepends=True)
    keep = next(i for i, r in enumerate(records) if isinstance(r, StepTime)) + 2
    Path("run/records.jsonl").write_text("".join(lines[:keep]))
    asked.clear()
    again = command(*wanted, "--resume")
    assert again.exit_code == 0, again.output
    assert asked == []
    times = [r for r in rundir.load(Path("run")) if isinstance(r, StepTime)]
    assert [stable(t) for t in times] == [stable(r) for r in records if isinstance(r, StepTime)]
    assert times[0] == next(r for r in records if isinstance(r, StepTime))
    assert "finished already" in command(*wanted, "--resume").output


def test_adapters_of_methods_and_all(command):
    pairs = [
        (c.name, p) for c, p in cost.Settings(methods=("hybrid", "mezo", "lora-plus"), pefts=("prompt", "lora")).jobs()
    ]
    assert pairs == [("hybrid", "prompt"), ("hybrid", "lora"), ("lora-plus", "lora"), ("mezo", "none")]
    assert set(cli_cost.chosen("all", ())) >= set(EVERY)
    done = command("--dry-run", "--methods", "all", "--peft", "all")
    assert done.exit_code == 0, done.output
    assert "estimated" in done.output
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--methods", "nonesuch"], "there is no method 'nonesuch'"),
        (["--methods", "peft-sgd+rademacher"], "peft-sgd has no choice of directions"),
        (["--methods", "mezo+nonesuch"], "there is no direction law 'nonesuch'"),
        (["--methods", " "], "a list of names separated by spaces"),
        (["--peft", "lora,ia3"], "'lora,ia3' is none of them"),
        (["--peft", "none", "--methods", "hybrid"], "none of these methods can be measured on none"),
        (["--rounds", "-1"], "--rounds is a whole number"),
        (["--rounds", "0", "--no-memory"], "nothing is left to measure"),
        (["--resume"], "there is no run of"),
    ],
)
def test_bad_input_is_one_sentence(arguments, part, command):
    result = command(*arguments)
    assert result.exit_code == 2, result.output
    assert part in " ".join(result.output.split())
    assert "Traceback" not in result.output
    assert not Path("runs").exists()


def killed(job: cost_memory.Job) -> None:
    os._exit(9)


def test_a_process_that_memory_kills_is_a_sentence(monkeypatch):
    monkeypatch.setattr(cost_memory, "measure", killed)
    with pytest.raises(UserError, match="most likely because memory ran out"):
        cost_memory.apart(cost_memory.Job({}, "mezo"))


def test_memory_that_cannot_be_measured_is_said_and_time_is_measured(command, monkeypatch):
    monkeypatch.setattr(cost_memory, "CLEAR", Path("/nonexistent/clear_refs"))
    result = command("--methods", "mezo", "--rounds", "2", "--out", "run")
    assert result.exit_code == 0, result.output
    assert "memory is not measured: the peak of the resident set cannot be reset here" in " ".join(
        result.output.split()
    )
    assert [type(r) for r in rundir.load(Path("run")) if isinstance(r, StepMemory | StepTime)] == [StepTime]
