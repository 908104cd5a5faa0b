"""hybrid-train: exact resume, whole checkpoints, honest scores, exports that are the model that was trained."""

from __future__ import annotations

import errno
import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_models import FILMS, write

from hybridtheory.errors import UserError
from hybridtheory.optimizers import METHODS
from probes import checkpoints, chosen_rates, metrics, rundir
from probes import records as R
from probes.evaluation import Undifferentiable, batch_of, evaluate, scorer
from probes.export import export
from probes.jsonl import stable
from probes.tasks import Task, load_task
from probes.train import run
from probes.train_settings import TrainSettings, options

RATES = {"lr_base": 1e-4, "lr_peft": 1e-2}


@pytest.fixture(scope="module")
def data(root: Path) -> Path:
    return write(root / "train.jsonl", [{"text": f"{t} {i}", "label": i % 2} for i, t in enumerate(FILMS * 4)])


@pytest.fixture
def load(gpt2, data):
    return lambda **o: load_task(gpt2, data, rows=None, **o)


def settings(method: str = "hybrid", **more) -> TrainSettings:
    return TrainSettings(
        **{"method": method, **RATES, "steps": 7, "batch": 5, "eval_every": 3, "checkpoint_every": 2, **more}
    )


def go(task: Task, wanted: TrainSettings, folder: Path | None = None, resume: bool = False, **more):
    """(records of the run folder, its outcome)."""
    if folder is None:
        found: list[R.Record] = []
        return found, run(task, wanted, found.append, **more)
    with rundir.RunFolder(folder, resume) as records:
        outcome = run(task, wanted, records.append, folder, **more)
    return rundir.load(folder), outcome


def weights(task: Task) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in task.model.named_parameters()}


def said(records: list[R.Record]) -> list[str]:
    return [json.dumps([type(r).__name__, stable(r)]) for r in records]


# Stateful in every way there is: a scheduler, dense moments, several copies of the adapter, a law with thresholds, dropout, i.i.d. rows;
# low-rank directions, which are applied to inputs and not to weights where that is cheaper.
RESUMED = {
    "hybrid": {"dropout": 0.2, "schedule": "linear", "weight_decay": 0.1},
    "hybrid-adamw": {"accumulate": 2},
    "zo-adam": {"sampling": "iid", "lr_base": 1e-3},
    "bilevel": {"options": {"penalty": 1.0, "inner_lr": 1e-3, "inner_steps": 2}},
    "s-mezo": {"q": 2, "micro_batch": 2},
    "lozo": {},
    "mezo": {"objective": "accuracy", "mu": 0.1},
}


@pytest.mark.parametrize("method", list(RESUMED))
def test_interrupted_and_resumed_is_uninterrupted_bit_for_bit(method, load, tmp_path):
    wanted, generator = settings(method, **RESUMED[method]), torch.get_rng_state()
    whole, first = go(load(), wanted, tmp_path / "whole")
    assert torch.equal(generator, torch.get_rng_state())
    task = load()

    class Killed(Exception):
        pass

    def kill(what: str, share: float) -> None:
        if what.startswith("step 5"):
            raise Killed  # nothing is saved on the way out: what a kill -9 leaves

    with pytest.raises(Killed):
        go(task, wanted, tmp_path / "cut", progress=kill)
    assert checkpoints.step_of(checkpoints.latest(tmp_path / "cut" / "checkpoints")) == 4
    with pytest.raises(KeyboardInterrupt):  # and then Ctrl-C, which saves where it stands
        go(load(), wanted, tmp_path / "cut", resume=True, stop=lambda: True)
    assert checkpoints.step_of(checkpoints.latest(tmp_path / "cut" / "checkpoints")) == 5
    task = load()
    parts, second = go(task, wanted, tmp_path / "cut", resume=True)
    assert second.weights_sha256 == first.weights_sha256 is not None
    assert said(parts) == said(whole)
    assert [r.step for r in parts if isinstance(r, R.Step)] == list(range(1, 8))
    assert [r.step for r in parts if isinstance(r, R.Evaluation)] == [0, 3, 6, 7]
    _, third = go(load(), replace(wanted, seed=1))
    assert third.weights_sha256 != first.weights_sha256


# ---- checkpoints ---------------------------------------------------------------------------------------------------


def test_a_state_survives_json_and_safetensors_exactly():
    state = {
        0: {"step": torch.tensor(3.0), "m": torch.randn(2, 3, generator=torch.Generator().manual_seed(0))},
        "run": {"x": 0.1 + 0.2, "none": None, "nan": math.nan, "inf": math.inf, "yes": True, "betas": (0.9, 0.999)},
        ("a", 1): [torch.arange(3), [torch.zeros(0, dtype=torch.bfloat16)], "text"],
    }
    tensors: dict[str, torch.Tensor] = {}
    rest = json.loads(json.dumps(checkpoints.pack(state, tensors)))
    back = checkpoints.unpack(rest, tensors)
    assert list(back) == list(state)
    assert torch.equal(back[0]["m"], state[0]["m"])
    assert back[("a", 1)][1][0].dtype == torch.bfloat16
    assert math.isnan(back["run"].pop("nan"))
    state["run"].pop("nan")
    assert back["run"] == state["run"]
    assert type(back["run"]["betas"]) is tuple
    with pytest.raises(UserError, match="a set cannot be kept"):
        checkpoints.pack({"s": {1}}, {})


def test_galores_projector_is_kept_and_no_other_object(monkeypatch):
    class GaLoreProjector:
        pass

    module, name = checkpoints.OBJECTS[0]
    monkeypatch.setitem(sys.modules, "galore_torch", SimpleNamespace())
    monkeypatch.setitem(sys.modules, module, SimpleNamespace(**{name: GaLoreProjector}))
    GaLoreProjector.__module__, GaLoreProjector.__qualname__ = module, name
    projector, tensors = GaLoreProjector(), {}
    projector.rank, projector.ortho_matrix = 2, torch.ones(3, 2)
    back = checkpoints.unpack(json.loads(json.dumps(checkpoints.pack({0: projector}, tensors))), tensors)[0]
    assert type(back) is GaLoreProjector
    assert back.rank == 2 and torch.equal(back.ortho_matrix, projector.ortho_matrix)
    with pytest.raises(ValueError, match="not of this project"):
        checkpoints.unpack({"object": ["os", "system", {"pairs": []}]}, {})


def test_a_full_disk_and_a_kill_leave_the_checkpoint_before_whole(load, tmp_path, monkeypatch):
    whole, first = go(load(), settings(), tmp_path / "whole")
    save = checkpoints.save_file

    def full(tensors, path):
        if "step-000000004" in str(path) and path.name == checkpoints.TENSORS:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(tensors, path)

    monkeypatch.setattr(checkpoints, "save_file", full)
    with pytest.raises(
        UserError, match=r"step 4 could not be written .*No space left.*the checkpoint of step 2 is whole"
    ):
        go(load(), settings(), tmp_path / "cut")
    folder = tmp_path / "cut" / "checkpoints"
    assert [p.name for p in folder.iterdir()] == ["step-000000002"]
    monkeypatch.setattr(checkpoints, "save_file", save)
    (folder / ".partial-step-000000004").mkdir()  # what a kill in the middle of writing leaves
    (folder / ".partial-step-000000004" / checkpoints.WEIGHTS).write_bytes(b"half")
    parts, second = go(load(), settings(), tmp_path / "cut", resume=True)
    assert second.weights_sha256 == first.weights_sha256
    assert said(parts) == said(whole)
    assert [p.name for p in folder.iterdir()] == ["step-000000007"]


def test_a_checkpoint_of_another_model_is_refused_and_nothing_is_loaded(load, tmp_path):
    go(load(), settings(), tmp_path / "run")
    for other, wanted, message in (
        (load(rank=4), settings(), r"checkpoint of another run: its adapter is"),
        (load(), settings("mezo"), r"its method is hybrid and this one's is mezo"),
    ):
        before = weights(other)
        with pytest.raises(UserError, match=message):
            run(other, wanted, lambda record: None, tmp_path / "run")
        assert all(torch.equal(before[n], w) for n, w in weights(other).items())
    other = load()
    with torch.no_grad():
        next(iter(other.model.parameters())).add_(1)
    other.info["model_sha256"] = "another"
    with pytest.raises(UserError, match="its model is"):
        run(other, settings(), lambda record: None, tmp_path / "run")
    with pytest.raises(UserError, match=r"with other settings \(options.batch: 5 then, 4 now\)"):
        go(load(), settings(batch=4), tmp_path / "run", resume=True)
    broken = checkpoints.latest(tmp_path / "run" / "checkpoints")
    (broken / checkpoints.WEIGHTS).write_bytes(b"half")
    with pytest.raises(UserError, match="cannot be read"):
        run(load(), settings(), lambda record: None, tmp_path / "run")


@pytest.mark.parametrize("lr", [3e2, 1e12])
def test_divergence_stops_at_the_last_good_checkpoint(lr, load, tmp_path):
    task = load()
    records, outcome = go(task, settings("peft-sgd", lr_peft=lr, steps=60, checkpoint_every=1), tmp_path / "run")
    assert outcome.status in ("diverged", "not finite")
    good = checkpoints.step_of(checkpoints.latest(tmp_path / "run" / "checkpoints"))
    assert f"the last good checkpoint, of step {good}, is kept" in outcome.reason
    assert good < outcome.step or outcome.status == "not finite"
    losses = {r.step: r.loss for r in records if isinstance(r, R.Step)}
    ceiling = 2 * losses[1] + 1
    assert good == 0 or losses[good] <= ceiling
    kept = {n: p for n, p in task.model.named_parameters() if task.is_peft(n)}
    assert checkpoints.sha256({n: p.detach() for n, p in kept.items()}) == outcome.weights_sha256
    assert all(p.isfinite().all() for p in kept.values())
    assert not any(
        isinstance(r, R.Evaluation) and r.step == outcome.step and r.split == "test" and r.step % 3 for r in records
    )


# ---- the run -------------------------------------------------------------------------------------------------------


def test_budget_counts_forwards_and_backwards(load):
    records, outcome = go(load(), settings("hybrid-two-sided", steps=None, budget=30, eval_every=0))
    steps = [r for r in records if isinstance(r, R.Step)]
    assert outcome.status == "budget"
    assert outcome.equivalents == outcome.forwards + 2 * outcome.backwards
    assert 30 <= outcome.equivalents < 30 + 5  # a step is 2 forwards for the base, 1 forward and 1 backward for PEFT
    assert (
        (steps[-1].forwards, steps[-1].backwards) == (outcome.forwards, outcome.backwards) == (19, 6)
    )  # one more to see what can be reused
    task = load()
    lengths = [sum(len(o["input_ids"]) for o in [r["options"][r["label"]]]) for r in task.rows]
    epoch = next(r for r in records if isinstance(r, R.Epoch))
    assert sorted(epoch.order) == list(range(16))
    assert steps[0].tokens == sum(lengths[i] for i in epoch.order[:5])
    assert steps[3].tokens == sum(lengths)  # 16 rows in 5 + 5 + 5 + 1: the whole epoch


def test_dropout_is_off_unless_asked_for(load):
    off, on = [go(load(), settings("peft-sgd", steps=2, dropout=p, eval_every=0))[0] for p in (0.0, 0.5)]
    losses = [[r.loss for r in records if isinstance(r, R.Step)] for records in (off, on)]
    assert losses[0][0] != losses[1][0]
    scored = [next(r for r in records if isinstance(r, R.Evaluation)).loss for records in (off, on)]
    assert scored[0] == scored[1]  # evaluation never drops
    task = load()
    go(task, settings("peft-sgd", steps=1, dropout=0.5, eval_every=0))
    assert not any(m.training for m in task.model.modules())
    assert all(m.p == 0 for m in task.model.modules() if isinstance(m, torch.nn.Dropout))


def test_training_beats_the_untrained_model_and_the_exports_are_the_trained_model(load, gpt2, data, tmp_path):
    import peft
    import transformers

    task = load()
    records, outcome = go(
        task, settings("hybrid", lr_base=3e-5, lr_peft=0.3, steps=30, batch=8, eval_every=10), tmp_path / "run",
        finish=lambda task, moved: export(task, tmp_path / "out", moved),
    )  # fmt: skip
    scores = [r for r in records if isinstance(r, R.Evaluation)]
    assert scores[-1].loss < scores[0].loss - 1
    assert outcome.exports == ["adapter", "merged"]
    task.model.eval()
    batch = batch_of(task, task.rows, False)
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
    with torch.no_grad():
        trained = task.model(**inputs).logits
        merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "merged").eval()(**inputs).logits
    torch.testing.assert_close(merged, trained, rtol=1e-4, atol=1e-4)
    only = load()
    _, outcome = go(
        only,
        settings("peft-adamw", steps=3, eval_every=0),
        finish=lambda task, moved: export(task, tmp_path / "two", moved),
    )
    assert outcome.exports == ["adapter"]
    base = transformers.AutoModelForCausalLM.from_pretrained(gpt2)
    with torch.no_grad():
        back = peft.PeftModel.from_pretrained(base, tmp_path / "two" / "adapter").eval()(**inputs).logits
        torch.testing.assert_close(back, only.model(**inputs).logits, rtol=1e-5, atol=1e-5)


def test_a_moved_base_under_prompts_is_exported_beside_them(load, tmp_path):
    task = load(peft="prompt", virtual_tokens=2)
    _, outcome = go(
        task, settings("hybrid", steps=1, eval_every=0), finish=lambda task, moved: export(task, tmp_path, moved)
    )
    assert outcome.exports == ["adapter", "base"]
    assert (tmp_path / "base" / "model.safetensors").exists()


def test_eval_data_of_another_task_and_the_rows_that_are_in_both(load, data, tmp_path):
    other = write(tmp_path / "other.jsonl", [{"text": f"{FILMS[0]} {4 * 5}", "label": 0}, {"text": "dull", "label": 1}])
    records, _ = go(load(), settings("mezo-peft", steps=1, eval_data=str(other)))
    scored = [r for r in records if isinstance(r, R.Evaluation)]
    assert {(r.split, r.rows) for r in scored} == {(str(other), 2)}
    records, _ = go(load(), settings("mezo-peft", steps=1, eval_data=str(data)))
    notes = [r.text for r in records if isinstance(r, R.Warning)]
    assert "16 of the 20 test rows are training rows too" in notes


# ---- scores --------------------------------------------------------------------------------------------------------


def test_scores_against_counting():
    rng = np.random.default_rng(0)
    label = rng.integers(0, 3, 60)
    scores = rng.normal(size=(60, 3)) + np.eye(3)[label]
    found = metrics.summary(scores, label, calibrate=True)
    predicted = scores.argmax(1)
    assert found["accuracy"] == np.mean(predicted == label)
    assert found["floor"] == max(np.mean(label == k) for k in range(3))
    f1 = []
    for k in range(3):
        tp, fp = np.sum((predicted == k) & (label == k)), np.sum((predicted == k) & (label != k))
        f1.append(2 * tp / (2 * tp + fp + np.sum((predicted != k) & (label == k))))
    assert found["f1"] == pytest.approx(np.mean(f1), abs=1e-14)
    two = scores[:, :2].copy()
    two[::7] = two[0]  # ties
    there = label > 0
    wins = [(a > b) + 0.5 * (a == b) for a in (two[:, 1] - two[:, 0])[there] for b in (two[:, 1] - two[:, 0])[~there]]
    assert float(metrics.auc(two, there.astype(int))) == pytest.approx(np.mean(wins), abs=1e-14)
    for name in ("accuracy", "f1", "auc", "calibrated_accuracy", "calibrated_f1"):
        low, high = found[f"{name}_interval"]
        assert low < found.get(name, found["accuracy"]) < high
    assert "auc" not in metrics.summary(two, np.zeros(60, int), calibrate=False)


def test_wilson_is_wilson():
    z, k, n = 1.959963984540054, 9, 10
    predicted, label = np.ones(n, int), np.array([1] * k + [0])
    p, (low, high) = metrics.accuracy(predicted, label)
    centre, half = (
        (p + z * z / (2 * n)) / (1 + z * z / n),
        z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n),
    )
    assert (low, high) == pytest.approx((centre - half, centre + half), rel=1e-12)
    assert metrics.accuracy(label, label)[1][1] == 1.0


def test_batch_calibration_takes_out_a_constant_preference():
    rng = np.random.default_rng(1)
    label = np.arange(400) % 2
    clean = rng.normal(size=(400, 2)) + 2 * np.eye(2)[label]
    biased = clean + np.array([0.0, 6.0])
    found = metrics.summary(biased, label, calibrate=True)
    fair = metrics.summary(clean, label, calibrate=True)
    assert found["accuracy"] < 0.6
    assert found["calibrated_accuracy"] > found["accuracy"] + 0.1
    np.testing.assert_allclose(np.exp(metrics.batch_calibrated(biased)).mean(0), 1, rtol=1e-12)
    assert found["auc"] == fair["auc"]


def test_evaluation_is_the_tasks_own_loss_and_argmax(load, gpt2, tmp_path):
    from tiny_models import f

    phrases = [("good it was", "no"), ("bad film", "no, not at all"), ("a", "no"), ("b c", "no, not at all")]
    several = write(tmp_path / "several.jsonl", [{"text": t, "label": a} for t, a in phrases])
    for task in (
        load(),
        load(loss="labels"),
        load_task(gpt2, several, rows=None, labels=["no", "no, not at all"]),
        load_task(gpt2, several, rows=None, labels=["no", "no, not at all"], loss="labels"),
    ):
        found = evaluate(task, task.rows, "train", 0, size=3)
        assert found.loss == pytest.approx(f(task), rel=2e-6)
        scores, label = task.scores()
        assert found.accuracy == float((scores.argmax(1) == label).double().mean())
        assert found.calibration == "batch"


def test_objectives_without_a_derivative(load):
    task = load()
    batch = batch_of(task, task.rows, True)
    scores, label = task.scores()
    right = scores.argmax(1) == label
    for name, value in (
        ("accuracy", 1 - float(right.double().mean())),
        ("f1", 1 - float(metrics.macro_f1(scores.argmax(1).numpy(), label.numpy(), 2))),
    ):
        found = Undifferentiable(scorer(task), name)
        with torch.no_grad():
            loss = float(found.loss(found.forward(task.model, batch), batch)) / found.weight(batch)
        assert loss == pytest.approx(value, rel=1e-6)
    records, _ = go(load(), settings("mezo-peft", objective="f1", steps=2, mu=0.1, eval_every=0))
    assert all(0 <= r.loss <= 1 for r in records if isinstance(r, R.Step))


# ---- rates and settings --------------------------------------------------------------------------------------------

TOML = """
[rates]
eta_base = 1e-4
eta_peft = 0.1
[limits]
eta_base = 2e-4
eta_peft = 0.5
[settings]
mu = 1e-3
q = 1
batch_size = 16
[source]
model = "m"
model_sha256 = "abc"
data = "sentiment"
"""
NOW = {"model_sha256": "abc", "data": "sentiment", "mu": 1e-3, "q": 1, "law": "gaussian", "batch_size": 16}


def test_rates_from_a_trainer_toml(tmp_path):
    (tmp_path / "trainer.toml").write_text(TOML)
    table = chosen_rates.read(tmp_path)
    assert table == chosen_rates.read(tmp_path / "trainer.toml")
    none = {"base": None, "peft": None}
    assert chosen_rates.choose("hybrid", none, table, NOW) == chosen_rates.Rates(1e-4, 0.1)
    assert chosen_rates.choose("mezo", none, table, NOW) == chosen_rates.Rates(1e-4, None)
    given = chosen_rates.choose("hybrid", {"base": 3e-4, "peft": None}, table, NOW)
    assert (given.base, given.peft) == (3e-4, 0.1)
    assert given.notes == [
        "--lr-base 0.0003 is above the stability limit 0.0002 that was measured: expect the loss to diverge"
    ]
    notes = chosen_rates.choose(
        "hybrid-subzero", none, table, {**NOW, "model_sha256": "x", "mu": 1e-2, "batch_size": 4}
    ).notes
    for part in (
        "on another model (m)",
        "for Gaussian directions",
        "mu = 0.001 and is used at mu = 0.01",
        "batches of 16 rows",
    ):
        assert any(part in n for n in notes), part
    for method, group in (("hybrid-adamw", "peft"), ("sgd", "base"), ("zo-adam", "base"), ("mezo-peft", "peft")):
        with pytest.raises(UserError, match=f"the {group} weights move otherwise under {method}: pass --lr-{group}"):
            chosen_rates.choose(method, none, table, NOW)
    with pytest.raises(UserError, match=r"pass --lr-base, or --lr auto or a trainer\.toml"):
        chosen_rates.choose("mezo", none, None, NOW)
    with pytest.raises(UserError, match="holds no rate for the base"):
        chosen_rates.choose("mezo", none, {"rates": {}}, NOW)
    with pytest.raises(UserError, match="--lr-base is a number of at least 0, not nan"):
        chosen_rates.choose("mezo", {"base": math.nan}, None, NOW)
    with pytest.raises(UserError, match="cannot be read"):
        chosen_rates.read(tmp_path / "nothere")
    (tmp_path / "bad.toml").write_text("[rates")
    with pytest.raises(UserError, match=r"is not a trainer\.toml"):
        chosen_rates.read(tmp_path / "bad.toml")


def test_the_probes_trainer_toml_carries_limits(tmp_path):
    import tomllib

    from made_up_run import made_up_run

    from probes.report import Report

    table = tomllib.loads(Report.of(made_up_run()).trainer_toml())
    assert 0 < table["limits"]["eta_base"] < math.inf
    assert table["limits"]["eta_peft"] > table["rates"]["eta_peft"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "nonesuch"}, "there is no method 'nonesuch': choose from hybrid"),
        ({"steps": 0}, "--steps is a whole number of at least 1, not 0"),
        ({"steps": None}, "give --steps or --budget"),
        ({"dropout": 1.0}, "--dropout is a probability"),
        ({"objective": "accuracy"}, "hybrid needs a derivative and accuracy has none"),
        ({"method": "forward-gradient", "objective": "f1"}, "needs a derivative"),
        ({"method": "mezo", "objective": "f1", "micro_batch": 2}, "leave --micro-batch out"),
        ({"method": "adamw", "law": "sphere"}, "has no choice of directions"),
        ({"law": "nonesuch"}, "there is no direction law"),
        ({"schedule": "cosine"}, "--schedule is constant or linear"),
    ],
)
def test_settings_that_cannot_be(changes, message):
    with pytest.raises(UserError, match=message):
        settings(**changes)


def test_options_of_a_method(load):
    assert options(["penalty=1", "inner-lr=1e-3", "rule=sgd", "x=true"]) == {
        "penalty": 1, "inner_lr": 1e-3, "rule": "sgd", "x": True,
    }  # fmt: skip
    with pytest.raises(UserError, match="--option is name=value"):
        options(["penalty"])
    with pytest.raises(UserError, match="bilevel needs a value for its options penalty, inner_lr"):
        go(load(), settings("bilevel"))
    with pytest.raises(UserError, match="mezo has no option 'nonesuch': choose from"):
        go(load(), settings("mezo", options={"nonesuch": 1}))
    assert set(chosen_rates.MEASURED_BASE) | set(chosen_rates.MEASURED_PEFT) <= set(METHODS)
