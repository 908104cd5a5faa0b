"""docs/questions.md: what the answers say follows from the numbers, and records that hold nothing are one sentence."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from hybridtheory.errors import UserError
from hybridtheory.intervals import block_means
from paper_figs import answers_probes as probed
from paper_figs import captured, questions
from probes import records as R
from probes import rundir
from probes.jsonl import encode
from probes.records_convergence import Descent
from probes.records_estimators import Compared

REPORTS = Path(__file__).parent.parent / "docs" / "reports"


def write(reports: Path, name: str, records: list) -> None:
    """reports/NAME, a finished run with these records."""
    (reports / name).mkdir(parents=True, exist_ok=True)
    head = R.Header("smoothness", 0, R.ModelInfo("made-up", "", 0), R.DataInfo("d", ""), [])
    lines = [encode(x) + "\n" for x in (head, *records, R.End("finished"))]
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
    write(tmp_path, "convergence-embedded", found)
    said = probed.coupling(tmp_path)
    assert "step 0: -0.200 ± 0.039 %" in said and "step 5: +0.200 ± 0.039 %" in said and "to within 0.24 %" in said
    assert "it helps at step 5; it hurts at step 0; it is not resolved at step 9" in said


def test_the_committed_record_resolves_what_coupling_takes_at_the_start() -> None:
    assert "step 0: -0.130 ± 0.012 % (Identity Q: -0.128 %)" in probed.coupling(REPORTS)


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


# ---- records that hold nothing, pages that cannot be written ---------------------------------------------------------


@pytest.mark.parametrize("question", [q for q in questions.QUESTIONS if q.answer], ids=lambda q: q.text[:40])
def test_a_record_without_its_lines_is_one_sentence(question: questions.Question, tmp_path: Path) -> None:
    for other in ([], [estimator("another", "peft")]):
        for name in question.records:
            write(tmp_path, name, other)
        assert questions.answered(question, tmp_path).startswith("Cannot be decided ")


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
