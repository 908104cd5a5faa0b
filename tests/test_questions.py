"""docs/questions.md: what the answers say follows from the numbers, and records that hold nothing are one sentence."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_up_run import made_up_run
from made_up_sweep import TASK, made_up

from hybridtheory.errors import UserError
from hybridtheory.estimate import Estimate
from hybridtheory.intervals import block_means
from paper_figs import answers_probes as probed
from paper_figs import answers_sweeps as swept
from paper_figs import bilevel, captured, loss_curves, questions
from probes import records as R
from probes import rundir
from probes.jsonl import encode
from probes.records_convergence import Descent
from probes.records_estimators import Compared
from probes.records_smoothness import Rate
from probes.sweep_description import study
from probes.sweep_report import SweepReport

REPORTS = Path(__file__).parent.parent / "docs" / "reports"


def write(reports: Path, name: str, records: list) -> None:
    """reports/NAME, a finished run with these records, its header included or not."""
    (reports / name).mkdir(parents=True, exist_ok=True)
    head = R.Header("smoothness", 0, R.ModelInfo("made-up", "", 0), R.DataInfo("d", ""), [])
    whole = records if any(isinstance(x, R.Header) for x in records) else [head, *records, R.End("finished")]
    lines = [encode(x) + "\n" for x in whole]
    (reports / name / rundir.RECORDS).write_text("".join(lines), encoding="utf-8")


# ---- base and PEFT together ------------------------------------------------------------------------------------------


def step(at: int, base: float, peft: float, extra: float, own: float, recorded: bool = False) -> list[Descent]:
    """The three changes of a step at the whole rates: the base's error is 0.01, that of what coupling adds ``own``."""
    errors = {"base": 0.01, "peft": 0.0, "both": math.hypot(0.01, own)}
    values = {"base": base, "peft": peft, "both": base + peft + extra}
    kept = (extra, own) if recorded else (None, None)
    return [
        Descent(0, at, w, 1.0, {}, v, errors[w], 30, v, 0.0, v, 0.0, (), "", *(kept if w == "both" else (None, None)))  # type: ignore[arg-type]
        for w, v in values.items()
    ]


@pytest.mark.parametrize("recorded", [False, True])
def test_coupling_is_told_with_its_own_error_and_not_with_the_base_s(tmp_path: Path, recorded: bool) -> None:
    extras = {0: 0.002, 5: -0.002, 9: 3e-4}
    found = [x for at, extra in extras.items() for x in step(at, -0.9, -0.1, extra, 2e-4, recorded)]
    write(tmp_path, "coupling-embedded", found)
    said = probed.coupling(tmp_path)
    assert "step 0: -0.200 ± 0.039 %" in said and "step 5: +0.200 ± 0.039 %" in said and "to within 0.24 %" in said
    assert "it helps at step 5; it hurts at step 0; it is not resolved at step 9" in said


def test_the_committed_record_resolves_what_coupling_takes_at_the_start() -> None:
    assert "step 0: -0.788 ± 0.070 % (Identity Q: -0.784 %)" in probed.coupling(REPORTS)


# ---- cosine, reshaping -----------------------------------------------------------------------------------------------


def estimator(law: str, group: str, **quantities: Compared) -> R.Estimator:
    return R.Estimator(law, group, group, 10_000, 1, 100, 1.0, quantities, {}, 0.0, 0.03, True)


@pytest.mark.parametrize(("predicted", "word"), [(0.0081, "inside"), (0.0095, "outside")])
def test_a_cosine_agrees_with_theory_only_inside_its_interval(tmp_path: Path, predicted: float, word: str) -> None:
    write(tmp_path, "estimators-smollm2", [estimator("gaussian", "base", cosine=Compared(0.008, 2e-4, predicted))])
    write(tmp_path, "convergence-embedded", [*step(0, -1, -0.1, 0, 1e-4), *step(9, -1, -0.1, 0, 1e-4)])
    said = probed.near_zero_cosine(tmp_path)
    assert said.startswith("No. ") and f"{word} that interval" in said and "2 points of a run" in said
    off = [Descent(0, 0, "base", 1.0, {}, -1.0, 0.01, 30, -0.8, 0.0, -1.0, 0.0)]
    write(tmp_path, "convergence-embedded", off)
    assert probed.near_zero_cosine(tmp_path).startswith("It may be. ")


def test_reshaping_is_decided_only_where_the_excess_is_resolved(tmp_path: Path) -> None:
    for excess, said in ((0.005, "Not decided"), (0.5, "The two are")):
        moment = Compared(10_000 * (1 + excess), 300.0, 10_000 * (1 + excess))
        for name in ("estimators-embedded", "estimators-smollm2"):
            write(tmp_path, name, [estimator("subzero:rank=8,refresh=1", "peft", second_moment=moment)])
        text = probed.reshaping(tmp_path)
        assert text.startswith(said) and f"{100 * excess:.2g}" in text and "± 0.059 times d" in text


# ---- growth with the dimension, scale of the adapter -----------------------------------------------------------------


def smooth(points: list[tuple[float, float, float]], alpha: float = 8.0, upper: float = 1.1) -> list[R.Record]:
    """A made-up run whose Hessians have these (least of the base, largest of the base, largest of PEFT) and bounds ``upper`` times them."""

    def block(found: R.Point, name: str, low: float, high: float) -> Any:
        ends = {k: Estimate(v, upper=upper * v, confidence=0.9) for k, v in (("lam_min", low), ("lam_max", high))}
        return replace(found.blocks[name], **ends)

    records, todo = [], iter(points)
    for r in made_up_run("group"):
        if isinstance(r, R.Header):
            assert r.peft is not None
            r = replace(r, peft=replace(r.peft, alpha=alpha, scale=alpha / 4))
        if isinstance(r, R.Point):
            low, base, peft = next(todo)
            r = replace(r, blocks={"base": block(r, "base", low, base), "peft": block(r, "peft", -peft / 2, peft)})
        records.append(r)
    return records


def adapters(reports: Path, large: list[tuple[float, float, float]], peft: float) -> str:
    """The answer where LoRA's largest |λ| is 1 at α/r = 2 and ``peft`` at α/r = 64."""
    write(reports, "smoothness-smollm2-sst2", smooth(large))
    for name, top, alpha in (("scale-2-embedded", 1.0, 8.0), ("scale-64-embedded", peft, 256.0)):
        write(reports, name, smooth([(-1.0, 100.0, top)] * 3, alpha))
    return probed.scale(reports)


def test_the_scale_of_an_adapter_is_told_between_the_bounds_of_its_spectra(tmp_path: Path) -> None:
    said = adapters(tmp_path, [(-1.0, 30.0, 10.0), (-60.0, 30.0, 10.0), (-1.0, 20.0, 10.0)], 1024.0)
    # From the value over the other's bound, 1.1 times its value, to the reverse; of the second point the least eigenvalue is the largest.
    assert said.startswith(
        "At its usual scale yes: on SmolLM2-135M the base's largest |λ| is 3.00 (2.73 to 3.30) (step 0)"
    )
    assert "6.00 (5.45 to 6.60) (step 12), 2.00 (1.82 to 2.20) (step 24) times LoRA's" in said
    assert (
        "α/r = 2.0: 100 (100 to 110) and 1.00 (1.00 to 1.10); α/r = 64: 100 (100 to 110) and 1,024 (1,024 to 1,126)"
        in said
    )
    assert "with p = 2.00 (1.97 to 2.03), and theory says 2" in said and "hold with 90 % each" in said
    assert "a large enough scale makes it the less smooth of the two" in said


@pytest.mark.parametrize(
    ("base", "peft", "start", "outcome"),
    [
        (10.5, 50.0, "Not decided", "none of these scales makes it"),
        (10.5, 105.0, "Not decided", "is not resolved at every one of these scales"),
        (5.0, 50.0, "Not always", "none of these scales makes it"),
    ],
)
def test_what_is_not_resolved_decides_nothing_about_the_scale(
    tmp_path: Path, base: float, peft: float, start: str, outcome: str
) -> None:
    said = adapters(tmp_path, [(-1.0, 30.0, 10.0), (-1.0, base, 10.0), (-1.0, 30.0, 10.0)], peft)
    assert said.startswith(start) and outcome in said


def test_growth_with_the_dimension_has_the_interval_of_the_trace(tmp_path: Path) -> None:
    for name in ("estimators-embedded", "estimators-smollm2"):
        moment = Compared(10_002.0, 100.0, 10_002.0)
        write(tmp_path, name, [estimator("gaussian", g, second_moment=moment) for g in ("base", "peft")])
    for ends, told in (((2e-4, 8e-4), "400 (200 to 800) times"), (None, "400 times")):
        rates = [
            R.Rates("worst_case", "envelope", Rate(1e-6), None, None),
            R.Rates("measured", "envelope", Rate(4e-4, ends, "the trace within 2 standard errors"), None, None),
        ]
        write(tmp_path, "smoothness-smollm2-sst2", [*made_up_run("group")[:-1], *rates, R.End("finished")])
        said = probed.growth(tmp_path)
        assert f"allows {told} the rate of the worst case" in said
        assert ("in brackets the trace within 2 standard errors" in said) == (ends is not None)
        assert ("the records hold no interval" in said) == (ends is None)


# ---- captured energy -------------------------------------------------------------------------------------------------


def run(refresh: int, seed: int, shares: list[float], status: str = "finished") -> R.Captured:
    return R.Captured(
        "subzero:rank=8", refresh, seed, 1e-3, 0.5, [1.0] * len(shares), shares, [0.5] * len(shares), status
    )  # type: ignore[arg-type]


def test_runs_of_a_kept_subspace_are_told_over_their_own_first_step(tmp_path: Path) -> None:
    found = [run(100, 0, [0.5, 0.25]), run(100, 1, [0.25, 0.25]), run(1, 0, [0.1], "not finite")]
    write(tmp_path, "captured-embedded", found)
    said = probed.lazy_capture(tmp_path)
    assert "never drawn anew 0.625 (from 0.500 to 0.750 over 2 seeds)" in said
    assert "over its own first step 0.875 (from 0.750 to 1.00 over 2 seeds)" in said
    assert "Left out, since the loss was not finite: seed 0 with a subspace kept for 1 steps (at step 1)" in said
    text = captured.caption(rundir.load(tmp_path / "captured-embedded"))
    assert "over all steps of all 2 runs (1.00 at the first step, 1.00 at the last)" in text and "Left out" in text
    write(tmp_path, "captured-embedded", found[2:])
    with pytest.raises(UserError, match="hold no finished run"):
        probed.lazy_capture(tmp_path)


# ---- accuracy beside the loss ----------------------------------------------------------------------------------------


def evaluations(changes: np.ndarray) -> list[R.Evaluation]:
    """From (pairs, 3) changes of loss, accuracy, AUC."""
    at = np.array([1.0, 0.5, 0.5]) + np.vstack([np.zeros(3), changes.cumsum(axis=0)])
    return [R.Evaluation(5 * i, "dev", 200, x, 0.5, a, auc=u, calibrated_accuracy=a) for i, (x, a, u) in enumerate(at)]


def test_accuracy_is_compared_with_auc_over_all_pairs_whose_loss_fell(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 0.002, (40, 3))
    loss = np.where(np.arange(40) % 4 == 3, 0.01, -0.01)
    for gain, said in ((0.01, "AUC gains more than accuracy"), (0.0, "Not decided")):
        changes = np.stack([loss, noise[:, 1], noise[:, 2] + gain], axis=1)
        write(tmp_path, "accuracy-embedded", evaluations(changes))
        text = probed.accuracy(tmp_path)
        assert text.startswith(f"{said} where the loss falls: between 30 neighbouring pairs")
        falls = int((changes[loss < 0][:, 1] < 0).sum())
        assert f"Accuracy fell in {falls} of these pairs" in text
    write(tmp_path, "accuracy-embedded", evaluations(changes)[:1])
    with pytest.raises(UserError, match="two evaluations"):
        probed.accuracy(tmp_path)


def test_means_over_some_pairs_of_a_run_cover() -> None:
    """A walk with noise on every evaluation, 40 pairs: the mean change where another one falls, over 200 runs."""
    rng = np.random.default_rng(3)

    def changes(runs: int) -> np.ndarray:
        shocks = rng.standard_normal((runs, 2, 41)).cumsum(axis=2) + rng.standard_normal((runs, 2, 41))
        return np.diff(shocks[:, :1] * [[1.0], [-0.5]] + shocks * [[0.0], [0.8]], axis=2)

    many = changes(20_000)
    truth = many[:, 1][many[:, 0] < 0].mean()
    hits = 0
    for x in changes(200):
        [mean], [half] = block_means(x[1:], x[0] < 0)
        hits += abs(mean - truth) <= half
    assert hits / 200 > 0.95 - 5 * math.sqrt(0.95 * 0.05 / 200)
    means, halves = block_means(np.ones((1, 8)), np.arange(8) < 2)
    assert means == [1.0] and math.isnan(halves[0])
    assert math.isnan(block_means(np.ones((1, 8)), np.zeros(8, bool))[0][0])


# ---- sweeps ----------------------------------------------------------------------------------------------------------


def variants(iid: list[float], sequential: list[float]) -> list[R.Record]:
    """The sweep of variants: reshuffled runs end at 1.0 to 1.04 from 2.0, the others where they are told to, by seed."""
    plain = [1.0, 1.01, 1.02, 1.03, 1.04]
    rates = {"axes": ["fixed"], "lr_base": 1e-3, "lr_peft": 1e-2}
    of = {m: {**rates} for m in ("hybrid", "hybrid-sequential")}
    iid_task = {"name": "iid", "methods": ["hybrid"], "method": {"hybrid": rates}}
    made = study({"seeds": 5, "task": [{"name": "reshuffled", "methods": list(of), "method": of}, iid_task]})
    finals = {("reshuffled", "hybrid"): plain, ("reshuffled", "hybrid-sequential"): sequential, ("iid", "hybrid"): iid}
    tasks = [replace(TASK, name=n) for n in ("reshuffled", "iid")]
    return made_up(made, lambda x, base, peft, seed: finals[x.task, x.method][seed], tasks=tasks)


def test_a_verdict_says_how_many_runs_it_leaves_out(tmp_path: Path) -> None:
    better = [0.9, 0.91, 0.92, 0.93, 0.94]
    write(tmp_path, "variants-embedded", variants([math.inf, 40.0, 2.1, 0.93, 0.94], better))
    [first, *_] = [q for q in questions.QUESTIONS if q.records == ("variants-embedded",)]
    said = questions.answered(first, tmp_path)
    assert said.startswith("Cannot be decided") and "2 blew up (2.00 to ∞, 2.00 to 40.0) and 1 gained nothing" in said
    write(tmp_path, "variants-embedded", variants([math.inf, 2.1, 0.92, 0.93, 0.94], better))
    said = swept.shuffling(tmp_path)
    assert said.startswith(
        "No, it is the worse of the two here among the seeds that gain something under both (0 and 2 of 5 runs each were"
    )
    assert "of drawing rows independently 1 blew up (2.00 to ∞) and 1 gained nothing" in said
    assert "do not tell the two apart (Fisher's exact test, p = 0.44)" in said
    said = swept.order(tmp_path)
    assert said.startswith("Sequential. ") and "Left out" not in said and "5 seeds" in said


METHODS = {"adamw": "base", "mezo": "base", "bilevel": "scale", "peft-sgd": "peft", "mezo-peft": "peft"}


def compared(best: dict[str, float], extensions: int = 1, lost: tuple[str, ...] = ()) -> list[R.Record]:
    """A sweep of methods, the best first, under a budget of 8; bilevel spends 11. Their loss is least at the rate ``best`` (default 1)."""
    grid = {"points": 3, "extensions": extensions, "refine": 3, "boundary": False, "base": 1.0, "peft": 1.0}
    made = study(
        {
            "budget": 8,
            "seeds": 3,
            "methods": list(METHODS),
            "axes": ["base", "peft", "scale"],
            "grid": grid,
            "task": [{"name": "a"}],
        }
    )

    def loss(line: Any, base: float, peft: float, seed: int) -> float:
        if line.method in lost:
            return 2.5 + seed
        rate, k = peft if line.axis == "peft" else base, list(METHODS).index(line.method)
        return 0.5 + 0.1 * k + 0.01 * seed * (k + 1) + 0.1 * abs(math.log(rate / best.get(line.method, 1.0)))

    return made_up(made, loss, spent=lambda line: 11 if line.method == "bilevel" else 8)


def test_what_each_method_spent_is_told_where_it_differs(tmp_path: Path) -> None:
    records = compared({"adamw": 10.0})
    write(tmp_path, "methods-embedded", records)
    said = swept.baselines(tmp_path)
    assert (
        "budget of 8 forward-equivalents" in said
        and "; 11 forward-equivalents; " in said
        and "; 8 forward-equivalents; " in said
    )
    assert "Not bracketed, so better rates may lie beyond: adamw (highest of the grid of η base (η PEFT = 0))." in said
    text = bilevel.caption(records)
    assert "11 forward-equivalents" in text and "Not bracketed" not in text
    with pytest.raises(UserError, match="not swept with hybrid"):
        loss_curves.caption(records)
    # The target is of the best method, which this figure does not show.
    [table] = SweepReport(records).tables
    assert table.rows[0].method == "adamw" and table.target is not None
    assert loss_curves.chosen(records, ("bilevel", "mezo")).target is None
    assert loss_curves.chosen(records, ("adamw", "mezo")).target == table.target


def test_lines_that_end_on_an_edge_give_a_least_factor(tmp_path: Path) -> None:
    write(tmp_path, "methods-embedded", compared({}))
    assert (
        swept.edges(tmp_path) == "Not here: in 0 of 7 lines the best rate lay outside the first 3 points of the grid."
    )
    write(tmp_path, "methods-embedded", compared({"adamw": 100.0, "mezo": 9.0}, extensions=2))
    said = swept.edges(tmp_path)
    assert said.startswith(
        "Yes: in 2 of 7 lines the best rate lay outside the first 3 points of the grid; 1 of them are bracketed there"
    )
    assert "up to a factor 3.0 outside" in said and "adamw, η base (η PEFT = 0), by at least a factor 9.0" in said
    write(tmp_path, "methods-embedded", compared({"adamw": 100.0}, extensions=0))
    said = swept.edges(tmp_path)
    assert said.startswith("Not here") and "1 more have it on the edge" in said


def test_a_method_that_does_not_gain_is_named_and_not_dropped(tmp_path: Path) -> None:
    write(tmp_path, "methods-embedded", compared({}, lost=("mezo",)))
    said = swept.seeds(tmp_path)
    assert "Without a mean decrease: mezo (of 3 runs 3 gained nothing)" in said and "From 3 seeds such a number" in said
    assert "factor of 0.52 to 6.3" in said
    assert "budget too small" in swept.baselines(tmp_path)
    records = compared({})
    some = [r for r in records if not (isinstance(r, R.Cell) and r.method == "mezo" and r.seed == 2)]
    write(tmp_path, "methods-embedded", some)
    assert "so not compared: mezo." in swept.baselines(tmp_path)


# ---- records that hold nothing, pages that cannot be written ---------------------------------------------------------


@pytest.mark.parametrize("question", [q for q in questions.QUESTIONS if q.answer], ids=lambda q: q.text[:40])
def test_a_record_without_its_lines_is_one_sentence(question: questions.Question, tmp_path: Path) -> None:
    for other in ([], [estimator("another", "peft")]):
        for name in question.records:
            write(tmp_path, name, other)
        assert questions.answered(question, tmp_path).startswith("Cannot be decided ")


@pytest.mark.parametrize(
    "question", [q for q in questions.QUESTIONS if q.answer and q.answer.__module__ == swept.__name__]
)
def test_a_sweep_without_its_lines_is_one_sentence(question: questions.Question, tmp_path: Path) -> None:
    other = made_up(study({"task": [{"name": "a"}], "methods": ["mezo"], "axes": ["base"]}), lambda *_: 1.0)
    for records in (other, [r for r in other if not isinstance(r, R.Cell)]):
        write(tmp_path, question.records[0], records)
        if question.answer is not swept.edges or len(records) < 5:
            assert questions.answered(question, tmp_path).startswith("Cannot be decided from these records: ")


def test_a_record_that_cannot_be_read_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "cost-embedded").mkdir()
    (tmp_path / "cost-embedded" / rundir.RECORDS).write_text("{}\n")
    [question] = [q for q in questions.QUESTIONS if q.records == ("cost-embedded",)]
    assert "line 1" in questions.answered(question, tmp_path)


def test_a_page_that_cannot_be_written_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert questions.main() == 2
    assert "docs/questions.md cannot be written" in capsys.readouterr().err
