"""hybrid-sweep without its runs: lines and optima, methods beside each other, predictions that came first, descriptions that are wrong."""

from __future__ import annotations

import json
import math
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from made_up_run import made_up_run
from made_up_sweep import TASK, made_up

from hybridtheory.errors import UserError
from probes import predictions, rundir, sweep_figures, sweep_report, sweep_study
from probes import records as R
from probes.sweep_compare import holm, over_tasks, to_target
from probes.sweep_description import study


def cells(records) -> list[R.Cell]:
    return [r for r in records if isinstance(r, R.Cell)]


# ---- a made-up sweep: everything but the runs ------------------------------------------------------------------------


def bowl(line, base, peft, seed):
    """Optima at lr_base 2e-3 and lr_peft 0.7; base diverges above 0.05."""
    y = 1.5 + 0.002 * seed
    y -= 0.8 * math.exp(-0.15 * math.log(base / 2e-3) ** 2) if base else 0.0
    y -= 0.5 * math.exp(-0.15 * math.log(peft / 0.7) ** 2) if peft else 0.0
    return math.inf if base > 0.05 else max(y, 0.01)


def test_three_sweeps_find_both_optima_and_their_ratio():
    made = study({"task": [{"name": "a"}], "seeds": 3})
    report = sweep_report.SweepReport(made_up(made, bowl))
    by = {s.line.axis: s for s in report.states}
    assert set(by) == {"base", "peft", "scale", "ratio"}
    assert by["base"].optimum.identified and by["base"].optimum.rate == pytest.approx(2e-3, rel=0.1)
    assert by["peft"].optimum.identified and by["peft"].optimum.rate == pytest.approx(0.7, rel=0.1)
    assert by["scale"].optimum.rate == pytest.approx(1.0, rel=0.15)
    low, high = by["base"].boundary
    assert low < 0.05 < high
    [line] = [x for x in report.json()["lines"] if x["axis"] == "ratio"]
    assert line["unit"] * line["optimum"]["rate"] == pytest.approx(0.7 / 2e-3, rel=0.25)
    text = report.text()
    assert "ratio PEFT/base" in text and "not finished" not in text
    assert all(s.done and not s.at_edge for s in report.states)
    json.dumps(report.json(), allow_nan=False)


def test_a_place_has_the_rates_that_were_run():
    """Also where the line that a joint one goes around has another optimum by now, as after a change of what counts as one."""
    records = made_up(study({"task": [{"name": "a"}], "seeds": 3, "axes": ["base", "peft", "scale"]}), bowl)
    moved = [
        replace(r, lr_peft=r.lr_peft * 1.25) if isinstance(r, R.Cell) and r.axis == "scale" and r.lr_peft else r
        for r in records
    ]
    [was], [now] = ([s for s in sweep_report.SweepReport(x).states if s.line.axis == "scale"] for x in (records, moved))
    assert [p.lr_peft for p in was.whole] == pytest.approx([was.rates(p.place)[1] for p in was.whole])
    assert [p.lr_peft for p in now.whole] == pytest.approx([1.25 * p.lr_peft for p in was.whole])


@pytest.mark.parametrize("factor", [1.0, 1.25])
def test_an_older_joint_line_goes_around_what_was_run(factor):
    """Without ``around``, and with other optima (factor 1.25) today than when it was begun."""
    made = study({"task": [{"name": "a"}], "seeds": 3})
    records = made_up(made, bowl)
    older = [
        replace(r, around=None, **({"lr_base": r.lr_base * factor, "lr_peft": r.lr_peft / factor} if r.around else {}))
        if isinstance(r, R.Cell)
        else r
        for r in records
    ]
    new, old = (sweep_report.SweepReport(x) for x in (records, older))
    assert not new.warnings and not new.json()["warnings"]
    [warning] = old.warnings
    assert "runs of 2 joint lines do not say" in warning and f"**Warning:** {warning}." in old.text()
    assert f"warning: {warning}" in old.summary() and old.json()["warnings"] == [warning]
    for was, now in zip(new.states, old.states, strict=True):
        if was.around is None or now.around is None:
            assert was.line.axis in ("base", "peft") and was.around is now.around
            continue
        if factor == 1:
            assert now.around == was.around
        for place in now.whole:
            assert now.rates(place.place) == pytest.approx((place.lr_base, place.lr_peft), rel=1e-5)


def test_an_edge_is_flagged_in_the_report():
    made = study({"task": [{"name": "a"}], "axes": ["base"], "grid": {"base": 1e-9, "extensions": 1}})
    text = sweep_report.SweepReport(made_up(made, bowl)).text()
    assert (
        "the best place is the highest of the grid, after 1 of at most 1 extensions" in text
        and "not identified" in text
    )


def compared(losses, **more):
    """Tables of a sweep of methods at given rates, with losses by method and seed."""
    method = {m: {"axes": ["fixed"], "lr_base": 1e-3, "lr_peft": 1e-2} for m in losses}
    made = study({"methods": list(losses), "method": method, "task": [{"name": "a"}], **more})
    return sweep_report.SweepReport(made_up(made, lambda line, b, p, seed: losses[line.method][seed]))


def test_methods_are_compared_paired_and_one_that_did_not_move_is_not_ranked():
    report = compared(
        {
            "hybrid": [1.0, 1.12, 1.18],
            "mezo": [1.3, 1.41, 1.5],
            "subzero": [1.95, 2.06, 1.9],
            "lozo": [1.0, math.inf, 1.0],
        }
    )
    [table] = report.tables
    assert [r.method for r in table.rows] == ["hybrid", "mezo", "subzero", "lozo"]
    assert [r.ranked for r in table.rows] == [True, True, False, False]
    best, second = table.rows[:2]
    assert second.worse == pytest.approx(0.30333, rel=1e-3) and second.worse_interval[0] > 0 and second.p < 0.01
    assert second.share == pytest.approx((2 - 1.40333) / 0.9, rel=1e-4)
    assert table.target == pytest.approx(2 - 0.5 * 0.9)
    # Read off a curve of four parts: seeds reach it after 2, 3, 3 and 3, 4, 4 of them.
    assert best.reached == pytest.approx((16 / 3, 160 / 3, 8 / 3)) and second.reached == pytest.approx(
        (22 / 3, 220 / 3, 11 / 3)
    )
    assert "budget too small" in report.text()


def test_over_tasks_goes_a_share_and_never_a_raw_loss():
    rows = [
        compared({"hybrid": [x, x + 0.01, x + 0.02], "mezo": [y, y + 0.01, y + 0.02]}).tables[0]
        for x, y in ((1.0, 1.5), (1.8, 1.9))
    ]
    found = over_tasks([replace(rows[0], task="a"), replace(rows[1], task="b")])
    assert (
        found["hybrid"][0] == 1.0
        and found["mezo"][0] == pytest.approx((0.49 / 0.99 + 0.09 / 0.19) / 2)
        and found["mezo"][2] == 2
    )


def test_holm_and_targets():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    cell = cells(made_up(study({"task": [{"name": "a"}], "methods": ["mezo"]}), lambda *a: 1.0))[0]
    assert to_target(cell, 1.5) == (4.0, 40.0, 2.0) and to_target(cell, 0.9) is None
    assert to_target(replace(cell, status="diverged"), 1.5) is None


def test_figures_show_every_line(tmp_path):
    made = study({"task": [{"name": "a [x]"}], "seeds": 3})
    records = made_up(made, bowl, tasks=(replace(TASK, name="a [x]"),))

    figures = sweep_figures.drawn(sweep_report.SweepReport(records))
    [name] = figures
    assert name == "rates-a-x-hybrid-100-steps" and len(figures[name].axes) == 4
    assert {"parabola", "optimum, 95 %"} <= {t.get_text() for t in figures[name].legends[0].get_texts()}
    assert figures[name].get_suptitle() == "a [x], hybrid, 100 steps"
    one = made_up(replace(made, lines=made.lines[:1]), lambda *_: 2.5, tasks=(replace(TASK, name="a [x]"),))
    flat = sweep_figures.drawn(sweep_report.SweepReport(one))
    [figure] = flat.values()
    assert "parabola" not in {t.get_text() for t in figure.legends[0].get_texts()}
    figure = sweep_figures.drawn(compared({"hybrid": [1.0, 1.12, 1.18], "mezo": [1.3, 1.4, 1.5]}))
    assert list(figure) == ["methods-a-100-steps"]


# ---- predictions -----------------------------------------------------------------------------------------------------


@pytest.fixture
def repository(tmp_path):
    """A git repository with a made-up probe's run."""
    for command in (
        ["init", "-q"],
        ["config", "user.email", "a@b"],
        ["config", "user.name", "a"],
        ["commit", "-q", "--allow-empty", "-m", "x"],
    ):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    with rundir.RunFolder(tmp_path / "probe") as kept:
        for record in made_up_run("group"):
            kept.append(record)
    return tmp_path


def commit(repository: Path, *paths: str) -> str:
    subprocess.run(["git", "add", *paths], cwd=repository, check=True)
    subprocess.run(["git", "commit", "-q", "-m", "x"], cwd=repository, check=True)
    return subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=repository, capture_output=True, text=True, check=True
    ).stdout.strip()


def test_predictions_come_before_the_sweep_and_git_says_so(repository):
    file = repository / "predictions.json"
    digest = predictions.write(file, {"a": [repository / "probe"]})
    with pytest.raises(UserError, match="written once"):
        predictions.write(file, {"a": [repository / "probe"]})
    with pytest.raises(UserError, match="is not committed as it stands"):
        predictions.register(file)
    first = commit(repository, "predictions.json")
    known = predictions.register(file)
    assert (known.sha256, known.commit, known.path) == (digest, first, "predictions.json")
    assert sum(e["scored"] for e in known.entries) == 1

    made = study({"task": [{"name": "a"}], "seeds": 3, "steps": known.entries[0]["steps"] or 100})
    records = made_up(made, bowl, tuple(known.entries))
    signed = [
        replace(r, predictions=known.sha256, predictions_commit=known.commit) if isinstance(r, R.Cell) else r
        for r in records
    ]
    with rundir.RunFolder(repository / "run") as kept:
        for record in [signed[0], known, *signed[1:]]:
            kept.append(record)
    commit(repository, "run")
    assert "an ancestor of all" in predictions.check(repository / "run")

    report = sweep_report.load(repository / "run")
    found = {(s.quantity, s.rule): s for s in report.scores}
    scored = found["eta_base", "recommended"]
    assert scored.penalty is not None and scored.ratio == pytest.approx(scored.predicted / scored.swept)
    assert found["both rates", "recommended"].penalty is not None and ("ratio", "recommended") in found
    assert "Predicted and swept" in report.text()

    # The same records brought in before the predictions, or with other hashes, are refused.
    with rundir.RunFolder(repository / "other") as kept:
        for record in [signed[0], known, *records[1:]]:
            kept.append(record)
    with pytest.raises(UserError, match="cells carry other predictions"):
        predictions.check(repository / "other")
    file.write_text(file.read_text() + " ")
    with pytest.raises(UserError, match="is not committed as it stands"):
        predictions.register(file)
    subprocess.run(["git", "checkout", "-q", "--orphan", "new"], cwd=repository, check=True)
    commit(repository, "run")
    with pytest.raises(UserError, match="is no ancestor of"):
        predictions.check(repository / "run")


def test_predictions_of_another_model_are_refused(repository):
    file = repository / "predictions.json"
    predictions.write(file, {"a": [repository / "probe"]})
    commit(repository, "predictions.json")
    known = predictions.register(file)
    with pytest.raises(UserError, match="are about another model"):
        predictions.refuse_other(known, [TASK])
    entry = known.entries[0]
    predictions.refuse_other(
        known, [replace(TASK, model_sha256=entry["model_sha256"], data=entry["data"], peft=entry["adapter"])]
    )
    predictions.refuse_other(known, [replace(TASK, name="b")])


# ---- bad input -------------------------------------------------------------------------------------------------------


def test_records_of_something_else_are_refused():
    with pytest.raises(UserError, match="of no sweep that this version reads"):
        sweep_report.SweepReport(made_up_run("group"))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"methods": ["nonesuch"]}, "there is no method 'nonesuch'"),
        ({"colour": 1}, "the description has no 'colour'"),
        ({"task": [{"colour": 1}]}, r"a \[\[task\]\] has no 'colour'"),
        ({"task": []}, r"a sweep needs a \[\[task\]\]"),
        ({"task": [{}, {}]}, "two tasks have the name 'embedded-sentiment-lora'"),
        ({"task": {"name": "a"}}, "write it with two brackets"),
        ({"steps": 5, "budget": 7}, "give one of steps, budget"),
        ({"steps": 0}, "steps is a number of at least 1"),
        ({"seeds": [1, 1]}, "a list of different whole numbers"),
        ({"train": {"batch": "x"}}, "wrong type"),
        ({"train": {"batch": 0}}, "--batch is a whole number of at least 1"),
        ({"train": {"seed": 1}}, r"\[train\] has no 'seed'"),
        ({"axes": ["scale"]}, "goes around the optimum of the axis base"),
        ({"axes": ["up"]}, "axes is a list of"),
        ({"methods": ["mezo"], "method": {"mezo": {"axes": ["peft"]}}}, "mezo moves the base weights alone"),
        ({"axes": ["fixed"]}, "needs a rate: give lr_base"),
        ({"method": {"mezo": {"mu": 1}}}, "is of no method of this sweep"),
        ({"grid": {"points": 1}}, "at least 3 points"),
        ({"grid": {"base": -1}}, "a positive learning rate"),
        ({"threads": 0}, "threads and checkpoint"),
        ({"target": 2}, "target is a share"),
        ({"seconds": 5, "train": {"schedule": "linear"}}, "a linear schedule needs to know the last step"),
    ],
)
def test_a_description_that_is_wrong_is_one_sentence(changes, sentence):
    with pytest.raises(UserError, match=sentence):
        study(changes)


def test_what_a_task_says_wins_over_what_all_share():
    made = study({
        "steps": 10, "train": {"batch": 4, "mu": 0.1}, "methods": ["mezo", "peft-sgd"], "axes": ["base", "peft"], "grid": {"base": 1.0},
        "task": [{"name": "a", "budget": [20, 40], "train": {"batch": 8}, "grid": {"base": 2.0}}, {"name": "b", "seeds": [5]}],
    })  # fmt: skip
    a, b = ([x for x in made.lines if x.task == t] for t in "ab")
    assert [(x.method, x.axis, x.horizon, x.amount) for x in a] == [
        ("mezo", "base", "budget", 20), ("mezo", "base", "budget", 40),
        ("peft-sgd", "peft", "budget", 20), ("peft-sgd", "peft", "budget", 40),
    ]  # fmt: skip
    assert a[0].train["batch"] == 8 and a[0].train["mu"] == 0.1 and a[0].grid.centre == 2.0
    assert b[0].seeds == (5,) and b[0].horizon == "steps" and b[0].train["batch"] == 4
    assert sweep_study.from_options(json.loads(json.dumps(made.options()))) == replace(made, checkpoint=None)
