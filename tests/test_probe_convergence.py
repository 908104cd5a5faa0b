"""probe-convergence end to end: on quadratics, where every prediction is exact, on a tiny GPT-2 with LoRA, and as a command."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from hybridtheory import descent
from hybridtheory.errors import UserError
from hybridtheory.testing import check_bound
from probes import cli_convergence, convergence_figures, rundir
from probes import convergence_report as report
from probes.convergence import Settings, run
from probes.given import given
from probes.jsonl import decode, encode, plain
from probes.records import Cost, End, Header, Point, Record, Warning
from probes.records_convergence import Checked, Constants, Descent, Exponent, Trajectory
from probes.trajectory import Here, Walker
from tests.toys import Quadratic, language_model, language_oracle, spectrum_matrix, tokens, with_lora

SMALL: dict[str, Any] = {"steps": 10, "runs": 2, "points": 2, "most": 150, "probe_steps": 4}


class QuadraticLora(Quadratic):
    """Named as the probe knows adapters: y becomes lora_y."""

    def __init__(self) -> None:
        super().__init__(spectrum_matrix(torch.cat([10.0 * 0.7 ** torch.arange(30), torch.full((10,), 0.01)]), 3), 30)
        self.lora_B = self.y
        del self.y

    def forward(self) -> torch.Tensor:
        w = torch.cat([self.x, self.lora_B])
        return 0.5 * w @ self.H @ w


def on_quadratic(**more: Any) -> list[Record]:
    model = QuadraticLora()
    batches = [torch.zeros(2, 1, dtype=torch.float64)] * 4
    H = model.H
    trace, top = float(H[:30, :30].diagonal().sum()), float(torch.linalg.eigvalsh(H)[-1])
    settings = {"lr_base": 0.3 / (trace + 2 * top), "lr_peft": 0.3 / top, "f_star": 0.0, **SMALL, **more}
    before = [p.detach().clone() for p in model.parameters()]
    records = list(run(given(model, batches, lambda m, b: m() + 0.0 * b.sum()), Settings(**settings)))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(p.grad is None for p in model.parameters())
    return records


def of(records: list[Record], kind: type[Any]) -> list[Any]:
    return [r for r in records if isinstance(r, kind)]


@pytest.fixture(scope="module")
def quadratic() -> list[Record]:
    return on_quadratic()


@pytest.fixture(scope="module")
def language() -> list[Record]:
    """Rates recommended by the probe itself, one-sided differences."""
    model = with_lora(language_model("gpt2", torch.float32))
    ids = tokens(rows=8)["x"]
    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}]
    return list(
        run(given(model, batches), Settings(micro_batch=4, method="hybrid", **{**SMALL, "most": 30, "points": 1}))
    )


def test_quadratic_every_decided_check_holds(quadratic: list[Record]) -> None:
    checks: list[Checked] = of(quadratic, Checked)
    assert not [c for c in checks if c.holds is False]
    decided = [c for c in checks if c.about == "descent" and c.holds is True]
    assert {(c.name, c.claim.split()[3]) for c in decided} == {
        (k, w) for k in ("quadratic", "fitted") for w in ("base", "peft", "both")
    }
    for d in of(quadratic, Descent):
        assert abs(d.measured - d.quadratic) <= 5 * math.hypot(d.stderr, d.quadratic_stderr) + 1e-9
        assert all(h.holds for h in d.hypotheses)
    a0 = next(c for c in checks if c.name == "A0")
    assert a0.holds is True and a0.slack is not None and a0.slack > 1, a0
    # The worst case allows rates that are smaller by the dimension: it does not apply, and says by how much.
    a = next(c for c in checks if c.name == "A")
    assert (
        a.holds is None
        and a.bound is None
        and any("d+2" in h.name and not h.holds for h in a.hypotheses)
        and "times off" in a.note
    )
    assert all("sphere directions" in c.note for c in checks if c.name == "C'")


def test_quadratic_constants_and_runs_are_what_they_say(quadratic: list[Record]) -> None:
    H = QuadraticLora().H
    c: Constants = of(quadratic, Constants)[0]
    assert c.norms["base"] >= float(torch.linalg.eigvalsh(H[:30, :30])[-1])
    assert c.cross_sq >= 0.5 * float(H[:30, 30:].square().sum()) and c.slope_error < 1e-6 and c.sgd
    D = torch.diag(torch.cat([torch.full((30,), c.L["base"]), torch.full((10,), c.L["peft"])])).double()
    assert torch.linalg.eigvalsh(D - H)[0] >= -1e-9 and torch.linalg.eigvalsh(D + H)[0] >= -1e-9
    runs: list[Trajectory] = of(quadratic, Trajectory)
    w = torch.ones(40, dtype=torch.float64)
    g = H @ w
    assert (
        len(runs) == 2
        and runs[0].loss[0] == pytest.approx(float(0.5 * w @ H @ w))
        and runs[0].loss[1] != runs[1].loss[1]
    )
    assert runs[0].grad_sq["base"][0] == pytest.approx(float(g[:30] @ g[:30]), rel=1e-12)
    assert runs[0].grad_sq["peft"][0] == pytest.approx(float(g[30:] @ g[30:]), rel=1e-12)
    assert len(runs[0].loss) == 10 and len(runs[0].moved["base"]) == 9 and len(runs[0].slope_sq) == 10
    # Gradients of a quadratic are linear: ‖Δg‖² = ‖HΔw‖², so the secants stay within the constants.
    turned, moved = (sum(getattr(runs[0], name)[b][0] for b in ("base", "peft")) for name in ("turned", "moved"))
    assert turned <= float(torch.linalg.eigvalsh(H)[-1]) ** 2 * moved * (1 + 1e-9)
    assert of(quadratic, Exponent)[0].interval is not None and isinstance(quadratic[-1], End)


def test_theorems_hold_at_their_own_rates() -> None:
    """Rates inside every range, sphere directions for C': bounds are computed, and hold."""
    model = QuadraticLora()
    L = 2 * float(torch.linalg.eigvalsh(model.H)[-1]) + 2
    small = {"lr_base": 0.2 / (32 * (30 + 2) * L), "lr_peft": 0.2 / (16 * L), "points": 1, "factors": (0.3,)}
    gauss = {c.name: c for c in of(on_quadratic(**small), Checked) if c.about == "bound"}
    assert {n: gauss[n].holds for n in ("A0", "A", "D")} == {"A0": True, "A": True, "D": True}
    sphere = [c for c in of(on_quadratic(**small, law="sphere", mu=1e-6), Checked) if c.name == "C'"]
    assert len(sphere) == 4 and all(c.holds is True for c in sphere), sphere


def test_check_bound_reads_the_records(quadratic: list[Record], tmp_path: Path) -> None:
    from_objects = check_bound(quadratic, "A0")
    (tmp_path / "records.jsonl").write_text("".join(encode(r) + "\n" for r in quadratic))
    assert check_bound(tmp_path, "A0") == from_objects == check_bound(str(tmp_path / "records.jsonl"), "A0")
    assert from_objects.holds is True
    # A planted wrong constant: gradients as if the loss had had half as far to fall as they used.
    c: Constants = of(quadratic, Constants)[0]
    planted = [replace(r, Delta=r.Delta / 2 / from_objects.slack) if r is c else r for r in quadratic]
    assert check_bound(planted, "A0").holds is False


def test_minibatches_are_a_finite_sum() -> None:
    records = on_quadratic(batch_size=2, points=1, factors=(0.1,))
    c: Constants = of(records, Constants)[0]
    assert c.n == 4 and c.sampling == "reshuffle"
    # All rows are alike here, so their noise is zero and reshuffling is the full batch.
    assert max(of(records, Trajectory)[0].noise["base"]) <= 1e-12 * of(records, Trajectory)[0].grad_sq["base"][0]
    a0 = next(r for r in of(records, Checked) if r.name == "A0")
    assert a0.holds is None and "independently" in a0.note


def test_minibatches_of_unlike_weight_are_unbiased_for_the_loss() -> None:
    """f = (1/n) Σ f_i holds whatever a minibatch holds: here of 4 and of 1 rows of five."""
    oracle, blocks = language_oracle(rows=4)
    assert len({*oracle.weights}) == 2
    for tensor in (p for b in blocks for p in b.tensors):
        tensor.requires_grad_()
    walker = Walker(oracle, blocks, optimizer=None, run=0, seed=0)  # type: ignore[arg-type]
    n, gradients = len(oracle.batches), []
    for i in range(n):
        oracle.model.zero_grad(set_to_none=True)
        walker._closure([i])(backward=True)
        gradients.append([p.grad.clone() for b in blocks for p in b.tensors])  # type: ignore[union-attr]
    oracle.model.zero_grad(set_to_none=True)
    here = Here.of(oracle, blocks)
    whole = [t for b in blocks for t in here.gradients[b.group]]
    mean = [sum(g[k] for g in gradients) / n for k in range(len(whole))]
    torch.testing.assert_close(mean, whole)
    spread = sum(float((t - m).square().sum()) for g in gradients for t, m in zip(g, whole, strict=True)) / n
    assert sum(here.noise.values()) == pytest.approx(spread, rel=1e-9)


def test_language_model_recommended_rates(language: list[Record]) -> None:
    assert isinstance(language[0], Header) and language[0].probe == "convergence" and isinstance(language[-1], End)
    assert of(language, Constants)[0].rates_from.startswith("recommended") and len(of(language, Point)) == 1
    small = [c for c in of(language, Checked) if c.about == "descent" and c.at["factor"] <= 0.1]
    assert small and all(c.holds is True for c in small), [c for c in small if c.holds is not True]
    # One-sided differences at mu = 1e-3 are not derivatives on this model, and A0 says so.
    a0 = next(c for c in of(language, Checked) if c.name == "A0")
    assert "slopes are derivatives" in a0.note
    assert all(encode(r) and plain(decode(encode(r))) == plain(r) for r in language)


def test_a_planted_wrong_prediction_fails_strict(monkeypatch: pytest.MonkeyPatch) -> None:
    original = descent.identity_q
    monkeypatch.setattr(descent, "identity_q", lambda ex, ey, gx, gy, *rest: original(ex, ey, 2 * gx, 2 * gy, *rest))
    bad = report.failed(on_quadratic(points=1, runs=1, factors=(0.1,)))
    assert {c.name for c in bad} == {"quadratic"} and len(bad) == 3 and all(c.note for c in bad)


def test_a_run_that_diverges_is_kept_and_fails() -> None:
    records = on_quadratic(lr_base=2.0, lr_peft=1e3, steps=400, runs=1, points=1, factors=(0.01,), most=12)
    assert of(records, Trajectory)[0].status == "not finite" and any(
        "ended early" in w.text for w in of(records, Warning)
    )
    assert any(c.about == "run" for c in report.failed(records))
    assert "not finite" not in report.text(records) or report.text(records)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"lr_base": -1.0}, "--lr-base must be a positive number"),
        ({"lr_peft": math.nan}, "--lr-peft must be a positive number"),
        ({"mu": 0.0}, "--mu must be a positive number"),
        ({"method": "nonesuch"}, "--method is one of"),
        ({"law": "nonesuch"}, "--law is one of"),
        ({"sampling": "x"}, "--sampling is"),
        ({"steps": 1}, "--steps must be at least 2"),
        ({"factors": (0.0,)}, "positive numbers"),
        ({"f_star": math.nan}, "--f-star must be a finite number"),
        ({"f_star": None}, "needs? f\\*"),
        ({"batch_size": 8}, "--batch-size must be from 1 to 7"),
    ],
)
def test_bad_input(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        on_quadratic(**settings)


def test_a_method_needs_its_weights() -> None:
    net = torch.nn.Linear(3, 2)
    task = given(net, [(torch.ones(4, 3), torch.tensor([0, 1, 0, 1]))])
    with pytest.raises(UserError, match="no peft weights"):
        list(run(task, Settings(**SMALL, lr_base=0.1, lr_peft=0.1)))
    records = list(run(task, Settings(**SMALL, method="zo-adam", lr_base=0.01, factors=(0.1,))))
    a0 = next(c for c in of(records, Checked) if c.name == "A0")
    assert a0.holds is None and "plain SGD" in a0.note and {d.what for d in of(records, Descent)} == {"base"}


def test_report_and_figures(quadratic: list[Record], language: list[Record], tmp_path: Path) -> None:
    for name, records in (("q", quadratic), ("l", language)):
        with rundir.RunFolder(tmp_path / name) as folder:
            for r in records:
                folder.append(r)
            report.save(records, folder)
        text = (tmp_path / name / "report.md").read_text()
        assert "Identity Q" in text and "Hypotheses, each tested" in text and "did not finish" not in text
        checks = json.loads((tmp_path / name / "checks.json").read_text())
        assert len(checks) == len(of(records, Checked))
        assert {p.stem for p in (tmp_path / name / "figures").glob("*.png")} == {"descent", "bounds", "slack"}
    cut = quadratic[: next(i for i, r in enumerate(quadratic) if isinstance(r, Point)) + 1]
    assert "did not finish" in report.text(cut) and not convergence_figures.drawn(cut)


# ---- the command -----------------------------------------------------------------------------------------------------


def command(*arguments: str) -> Any:
    return CliRunner().invoke(cli_convergence.app, list(arguments))


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, quadratic: list[Record]) -> dict[str, list[Record]]:
    """The command with a task that is not loaded and a run that is not measured: its records are ``records``."""
    held = {"records": quadratic}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(cli_convergence, "prepare", lambda: None)
    monkeypatch.setattr("probes.tasks.load_task", lambda *a, **k: None)
    monkeypatch.setattr("probes.convergence.run", lambda *a, **k: iter(held["records"]))
    return held


def test_strict_exits_3_when_a_check_fails(made: dict[str, list[Record]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convergence_figures, "save", lambda *a: [])  # drawn in another test
    good = command("--strict", "--out", "good")
    assert good.exit_code == 0, good.output
    assert Path("good/report.md").exists()
    broken = [replace(r, holds=False) if isinstance(r, Checked) and r.name == "A0" else r for r in made["records"]]
    made["records"] = broken
    assert command("--out", "lenient").exit_code == 0
    strict = command("--strict", "--out", "strict")
    assert strict.exit_code == 3 and "1 check failed" in strict.output and Path("strict/report.md").exists()


def test_ctrl_c_keeps_what_was_measured(made: dict[str, list[Record]], monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*a: Any, **k: Any) -> Any:
        for r in made["records"]:
            yield r
            if isinstance(r, Descent):
                raise KeyboardInterrupt

    monkeypatch.setattr("probes.convergence.run", stopped)
    result = command("--out", "stopped")
    assert result.exit_code == 130 and "1 point and 0 runs are kept in stopped" in result.output
    assert isinstance(rundir.load("stopped")[-1], End) and of(rundir.load("stopped"), Descent)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--lr-base", "-1"], "--lr-base must be a positive number"),
        (["--method", "nonesuch"], "--method is one of"),
        (["--rates", "nowhere.toml"], "cannot be read"),
        (["--rates", "broken.toml"], "is not a trainer.toml"),
        (["--rates", "empty.toml"], "holds no [rates]"),
        (["--rates", "negative.toml"], "eta_base must be a positive number"),
        (["--mu", "nan"], "--mu is a positive number"),
    ],
)
def test_bad_arguments_are_one_sentence(made: dict[str, list[Record]], arguments: list[str], sentence: str) -> None:
    Path("broken.toml").write_text("[rates\n")
    Path("empty.toml").write_text("[settings]\nmu = 1e-3\n")
    Path("negative.toml").write_text("[rates]\neta_base = -1.0\n")
    result = command(*arguments)
    assert result.exit_code == 2 and sentence in result.output and "Traceback" not in result.output
    assert not Path("runs").exists()


def test_rates_come_from_trainer_toml(tmp_path: Path) -> None:
    path = tmp_path / "trainer.toml"
    path.write_text("[rates]\neta_base = 1e-4\neta_peft = 0.1\nratio = 1000.0\n[settings]\nmu = 1e-2\nq = 4\n")
    assert cli_convergence.from_toml(path, None, 0.5, 1e-3, 1) == (1e-4, 0.5, 1e-2, 4, "from trainer.toml")


def test_dry_run_writes_nothing(made: dict[str, list[Record]]) -> None:
    end = next(i for i, r in enumerate(made["records"]) if isinstance(r, Cost))
    made["records"] = made["records"][: end + 1]
    assert command("--dry-run").exit_code == 0 and not Path("runs").exists()
